"""Gemma 3 270M, real weights from its GGUF file: greedy tokens equal transformers'.

The record is compared with one engine that runs every second one of twenty prompts in a batch, in chunks (`make
test-oracle`: all of them); one prompt is also asked of transformers now. Both take the weights that our loader read, so
those are compared with a reading of the gguf package.
"""

from __future__ import annotations

import json
import re

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from engine.errors import ModelError
from engine.models.loader import load_config
from engine.planes import NUMERICS_VERSION
from engine.types import Request, SamplingParams
from tests.engine.record_spm import GOLDEN_PATH as SPM_GOLDEN_PATH
from tests.oracle import gemma
from tests.oracle.combinations import Combination, EngineLab, Tally, run
from tests.oracle.compare import Verdict, compare
from tests.oracle.reference import Reference, read_golden

pytestmark = pytest.mark.slow

GREEDY = SamplingParams(max_tokens=gemma.NUM_NEW, temperature=0.0, ignore_eos=True)
SPACE = "▁"  # reads as a space
LIVE = 8  # the prompt that transformers is asked for now


@pytest.fixture(scope="module", autouse=True)
def _model_at_hand() -> None:
    """Pulled once into the user's cache."""
    try:
        gemma.files()
    except ModelError as error:
        pytest.skip(f"{gemma.MODEL} cannot be had: {error.message}")


def test_the_record_is_of_these_prompts_and_this_numerics_version():
    golden = read_golden(gemma.GOLDEN_PATH)
    assert golden.numerics_version == NUMERICS_VERSION
    assert {prompt.digest for prompt in (*gemma.own_prompts(), *gemma.prompts())} <= set(golden.by_digest)
    lengths = [len(prompt.ids) for prompt in gemma.prompts()]
    assert len(lengths) == 20 and sum(length > gemma.WINDOW for length in lengths) >= 3
    assert sum(length <= gemma.WINDOW < length + gemma.NUM_NEW for length in lengths) >= 1  # leaves it while decoding


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.oracle)])
def test_one_engine_gives_transformers_tokens(total: Tally, every: int):
    one = Combination(chunk=64, batch=20, prefix_cache=True, shuffled=True, block_size=16)
    golden, prompts = read_golden(gemma.GOLDEN_PATH), gemma.prompts()[::every]
    assert any(len(prompt.ids) <= gemma.WINDOW < len(prompt.ids) + gemma.NUM_NEW for prompt in prompts)
    assert len(prompts[-1].ids) > gemma.WINDOW
    engine, model = EngineLab(gemma.MODEL, dict(gemma.weights())).make(one, num_blocks=2000)
    results = run(engine, model, [Request(prompt.digest, prompt.ids, GREEDY) for prompt in prompts])
    tally = Tally()
    for prompt in prompts:
        tally.count(prompt, golden.expected(prompt.ids), results[prompt.digest].tokens, gemma.MODEL)
    total.add(tally)
    assert not tally.wrong, str(tally)
    stats = engine.stats()
    assert (stats.num_free_blocks, stats.num_leaked_blocks) == (stats.num_blocks, 0)


def test_the_record_is_what_transformers_says_now():
    prompt = gemma.prompts()[LIVE]
    now = Reference(load_config(gemma.files()), gemma.weights()).greedy(prompt.ids, gemma.NUM_NEW)
    outcome = compare(read_golden(gemma.GOLDEN_PATH).expected(prompt.ids), now.tokens)
    assert outcome.verdict is not Verdict.WRONG, outcome.details


def test_ids_and_text_are_those_of_transformers():
    """Recorded by `python -m tests.engine.record_spm`: transformers takes half a minute to read the vocabulary."""
    ours = gemma.tokenizer()
    for text, ids in json.loads(SPM_GOLDEN_PATH.read_text("utf-8"))[gemma.MODEL].items():
        assert ours.encode(text) == ids, text
        assert SPACE in text or ours.decode(ids[1:], skip_special=False) == text


# --- the weights ----------------------------------------------------------------------------------------------

COMPARED = re.compile(r"token_embd\.|output_norm\.|blk\.(0|5|17)\.")  # a local layer, a global one, and the last


def test_the_weights_are_those_that_the_gguf_package_reads():
    """Its own reader, dequantisation, and map of names from Hugging Face's."""
    weights = gemma.weights()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, load_config(gemma.files()).num_layers)
    of_gguf = {names.get_name(name, try_suffixes=(".weight",)): name for name in weights}
    assert None not in of_gguf and len(of_gguf) == len(weights)
    tensors = gguf.GGUFReader(gemma.files().path).tensors
    assert {tensor.name for tensor in tensors} == set(of_gguf)
    kinds = set()
    for tensor in tensors:
        if COMPARED.match(tensor.name):
            kinds.add(tensor.tensor_type.name)
            # Of 262,144 tokens every 64th, and of a matrix every fourth row: each is whole blocks of its quantisation
            stride = 64 if tensor.name == "token_embd.weight" else 4 if len(tensor.shape) > 1 else 1
            rows = slice(None, None, stride)
            read = dequantize(np.asarray(tensor.data)[rows], tensor.tensor_type)
            assert np.array_equal(weights[of_gguf[tensor.name]].numpy()[rows], read), tensor.name
    assert kinds == {"F32", "Q5_0", "Q4_K", "Q8_0", "Q6_K"}
