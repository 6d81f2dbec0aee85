"""vLLM's engine, driven step by step in one process. Run by benchmarks/engine_peers.py with the Python that has it.

python vllm_engine.py MODEL    # reads {"prompts": [[id, ...]], "num_new": n} by line, writes tokens and seconds
"""

import json
import os
import statistics
import sys
import time

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints must not come between answers
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    llm = LLM(
        model=sys.argv[1], dtype="bfloat16", max_model_len=2304, enable_prefix_caching=False, skip_tokenizer_init=True,
        max_num_batched_tokens=2048, max_num_seqs=64,
    )  # fmt: skip
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        print(json.dumps(run(llm.llm_engine, work["prompts"], work["num_new"])), file=answers, flush=True)


def run(engine, prompts, num_new) -> dict:
    from vllm import SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]

    params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True, detokenize=False)
    begun = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), TokensPrompt(prompt_token_ids=prompt), params)
    tokens, steps = {}, []
    while engine.has_unfinished_requests():
        step_begun, before = time.perf_counter(), sum(map(len, tokens.values()))
        all_begun = len(tokens) == len(prompts)
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        if all_begun and sum(map(len, tokens.values())) == before + len(prompts):
            steps.append(time.perf_counter() - step_begun)
    total_s = time.perf_counter() - begun
    step_s = statistics.median(steps) if steps else None
    return {"tokens": [tokens[str(index)] for index in range(len(prompts))], "total_s": total_s, "step_s": step_s}


if __name__ == "__main__":
    main()
