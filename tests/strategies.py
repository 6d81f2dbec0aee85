"""Hypothesis strategies that several tests share: records with every field drawn."""

from __future__ import annotations

from dataclasses import fields

from hypothesis import strategies as st

from engine.types import SamplingParams, Service, TokenLogprob

U32 = st.integers(0, 2**32 - 1)
FLOATS = st.floats(allow_nan=False)
IDS = st.lists(U32, max_size=10).map(tuple)
PAIRS = st.lists(st.tuples(U32, FLOATS), max_size=4).map(tuple)

_BY_TYPE = {
    "int": st.integers(0, 2**31 - 1),
    "float": FLOATS,
    "bool": st.booleans(),
    "str": st.text(),
    "tuple[int, ...]": IDS,
}
_BY_NAME = {
    "max_tokens": st.integers(1, 2**31),
    "seed": st.integers(0, 2**64 - 1),
    "logit_bias": PAIRS,
    "bad_words": st.lists(IDS, max_size=3).map(tuple),
    "logprobs": st.integers(-1, 20),
    "prompt_logprobs": st.integers(-1, 20),
}
SAMPLING_PARAMS = st.builds(
    SamplingParams,
    **{
        each.name: _BY_NAME[each.name] if each.name in _BY_NAME else _BY_TYPE[str(each.type)]
        for each in fields(SamplingParams)
    },
)
SERVICES = st.builds(Service, st.text(), st.integers(-(2**31), 2**31 - 1), FLOATS, FLOATS)
TOKEN_LOGPROBS = st.lists(st.builds(TokenLogprob, FLOATS, U32, PAIRS), max_size=3).map(tuple)
