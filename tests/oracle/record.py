"""`python -m tests.oracle.record` runs transformers on all prompts and writes golden.json. Minutes on two cores.

It records this project's own prompts always, and those of the data sets too, so it refuses to run without these.
`python -m tests.oracle.record gemma` does the same with Gemma 3 and its prompts, into golden_gemma.json.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from engine.models.loader import load_config
from engine.planes import NUMERICS_VERSION
from tests.oracle import gemma
from tests.oracle.compare import NEAR_TIE, Expected
from tests.oracle.prompts import DATA, MODEL, NUM_PROMPTS, OraclePrompt, has_data, oracle_prompts, own_prompts
from tests.oracle.reference import GOLDEN_PATH, NUM_NEW, Reference, load_reference


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")}


def as_json(model: str, num_new: int, results: Mapping[OraclePrompt, Expected]) -> str:
    """One line for each prompt."""
    head = {"model": model, "numerics_version": NUMERICS_VERSION, "num_new": num_new, "versions": versions()}
    lines = (f'  "{prompt.digest}": {json.dumps(_record(prompt, one))}' for prompt, one in results.items())
    return json.dumps(head, indent=1)[:-2] + ',\n "prompts": {\n' + ",\n".join(lines) + "\n }\n}\n"


def _record(prompt: OraclePrompt, result: Expected) -> dict[str, object]:
    gaps = {str(step): float(f"{gap:.3g}") for step, gap in result.close_gaps.items()}
    return {
        "kind": prompt.kind, "chat": prompt.is_chat, "num_prompt": len(prompt.ids),
        "min_gap": float(f"{result.min_gap:.3g}"), "close_gaps": gaps, "tokens": result.tokens,
    }  # fmt: skip


def record(reference: Reference, prompts: Sequence[OraclePrompt], num_new: int) -> dict[OraclePrompt, Expected]:
    results: dict[OraclePrompt, Expected] = {}
    begun = time.perf_counter()
    for number, prompt in enumerate(prompts, start=1):
        result = results[prompt] = reference.greedy(prompt.ids, num_new)
        seconds, note = time.perf_counter() - begun, "  NEAR TIE" if result.min_gap < NEAR_TIE else ""
        print(f"{number:3}/{len(prompts)} {seconds:5.0f} s  gap {result.min_gap:.1e}  {prompt}{note}", flush=True)
    return results


def main() -> None:
    if not has_data():
        sys.exit(f"the data sets are not at {DATA}; their prompts would be lost")
    if sys.argv[1:] == ["gemma"]:
        gemma_prompts = (*gemma.own_prompts(), *gemma.prompts())
        results = record(Reference(load_config(gemma.files()), gemma.weights()), gemma_prompts, gemma.NUM_NEW)
        gemma.GOLDEN_PATH.write_text(as_json(gemma.MODEL, gemma.NUM_NEW, results), "utf-8")
        return
    results = record(load_reference(), (*own_prompts(NUM_PROMPTS), *oracle_prompts(NUM_PROMPTS)), NUM_NEW)
    GOLDEN_PATH.write_text(as_json(MODEL, NUM_NEW, results), "utf-8")


if __name__ == "__main__":
    main()
