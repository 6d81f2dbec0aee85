"""llama.cpp by way of llama-cpp-python, one sequence at a time. Run by benchmarks/engine_peers.py with its Python.

python llama_engine.py MODEL.gguf NUM_THREADS    # the same lines as vllm_engine.py's
python llama_engine.py --bf16 FROM.gguf TO.gguf  # writes the model again, its matrices in bfloat16
"""

import json
import os
import statistics
import sys
import time

BF16 = 32  # llama.cpp's LLAMA_FTYPE_MOSTLY_BF16


def main() -> None:
    if sys.argv[1] == "--bf16":
        write_bf16(sys.argv[2], sys.argv[3])
        return
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    threads = int(sys.argv[2])
    model = Llama(
        sys.argv[1], n_ctx=2304, n_batch=2048, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )  # fmt: skip
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        (prompt,) = work["prompts"]
        print(json.dumps(run(model, prompt, work["num_new"])), file=answers, flush=True)


def run(model, prompt, num_new) -> dict:
    model.reset()
    tokens, steps = [], []
    begun = time.perf_counter()
    model.eval(prompt)
    tokens.append(model.sample(temp=0.0, repeat_penalty=1.0))
    while len(tokens) < num_new:
        step_begun = time.perf_counter()
        model.eval(tokens[-1:])
        tokens.append(model.sample(temp=0.0, repeat_penalty=1.0))
        steps.append(time.perf_counter() - step_begun)
    total_s = time.perf_counter() - begun
    return {"tokens": [tokens], "total_s": total_s, "step_s": statistics.median(steps) if steps else None}


def write_bf16(source: str, target: str) -> None:
    import ctypes

    import llama_cpp  # pyright: ignore[reportMissingImports]

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = BF16, True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        sys.exit("llama.cpp could not write the model in bfloat16")


if __name__ == "__main__":
    main()
