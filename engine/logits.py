"""From a model's logits to those that are sampled: a grammar, bias, penalties and bans, in this order.

0. tokens that the grammar does not allow are banned, and stay so: what follows chooses among the others;
1. logit_bias is added; 2. repetition penalty (Keskar et al., 2019) over prompt and answer; 3. presence and frequency
penalties over the answer, as the OpenAI API defines them; 4. bad words; 5. before min_tokens, whatever would end the
answer. Temperature and truncation follow in engine/sampler.py. Pure: nothing is changed in place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from engine.types import SamplingParams

MINUS_INFINITY = -np.inf


def process(
    logits: np.ndarray, params: SamplingParams, tokens: Sequence[int], num_prompt: int, eos_token_ids: Collection[int],
    allowed: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Logits [vocab] float32 after `tokens`, of which the first `num_prompt` are the prompt -> [vocab] of that type.

    `allowed` [at least vocab] bool: what the answer's grammar allows. Where nothing applies it is `logits` itself;
    where 4 and 5 would ban all that is allowed, they are left out with 1 to 3."""
    if allowed is not None:
        logits = np.where(allowed[: len(logits)], logits, MINUS_INFINITY)
    changed = logits.copy() if changes(params, len(tokens) - num_prompt) else logits
    if changed is logits:
        return logits
    for token_id, bias in params.logit_bias:
        if token_id < len(changed):
            changed[token_id] += bias
    if params.repetition_penalty != 1:
        _penalize_repetition(changed, tokens, params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        ids, counts = np.unique(np.asarray(tokens[num_prompt:], dtype=np.int64), return_counts=True)
        changed[ids] -= params.presence_penalty + params.frequency_penalty * counts
    _ban(changed, _completed_bad_words(params.bad_words, tokens))
    if len(tokens) - num_prompt < params.min_tokens:
        _ban(changed, params.stop_token_ids)
        _ban(changed, () if params.ignore_eos else eos_token_ids)
    return logits if np.isneginf(changed).all() else changed


def changes(params: SamplingParams, num_generated: int) -> bool:
    """Will these change the logits of a token after so many, a grammar apart?"""
    penalizes = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    return bool(params.logit_bias or params.bad_words or penalizes or num_generated < params.min_tokens)


def _penalize_repetition(logits: np.ndarray, tokens: Sequence[int], penalty: float) -> None:
    """Divide positive logits of tokens that occurred by the penalty, multiply negative ones."""
    ids = np.unique(np.asarray(tokens, dtype=np.int64))
    scores = logits[ids]
    logits[ids] = np.where(scores < 0, scores * penalty, scores / penalty)


def _completed_bad_words(bad_words: Iterable[Sequence[int]], tokens: Sequence[int]) -> list[int]:
    """Last tokens of the sequences whose beginning the text ends with."""
    return [words[-1] for words in bad_words if _ends_with(tokens, words[:-1])]


def _ends_with(tokens: Sequence[int], beginning: Sequence[int]) -> bool:
    count = len(beginning)
    if count == 0:
        return True
    return count <= len(tokens) and tokens[-1] == beginning[-1] and list(tokens[-count:]) == list(beginning)


def _ban(logits: np.ndarray, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        if token_id < len(logits):
            logits[token_id] = MINUS_INFINITY
