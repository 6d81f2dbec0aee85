"""Grammars: which tokens may come next in answers that keep to one, by llguidance.

1. The first answer with a grammar makes it read the model's vocabulary, once; engines without such answers, and ranks
   that do not sample, never do.
2. Each grammar is compiled once, and kept while it is among the last that were used; an answer gets a copy.
3. Before each of its tokens an answer's Matching follows what has been generated; the masks of a step are computed
   by several threads, without Python's lock.
4. A grammar that cannot be compiled, or that exceeds its limits on the way, is an error of its own request.

Source: https://github.com/guidance-ai/llguidance (its limits: LLParserLimits).
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask, fill_next_token_bitmask_par

from engine.errors import InvalidRequest, ModelError, SteelyardError
from engine.matching import Matching
from engine.sequence import Sequence
from engine.types import ErrorInfo

MAX_COMPILED = 32  # grammars that are kept compiled
MAX_LEXER_STATES = 50_000  # of one answer, about 2 kB each; llguidance's own limit is five times that
MAX_ERROR_CHARS = 300
# Of llguidance's own limits; by its words 50,000 are about a millisecond of the first, 14,000 of the second and 20,000
# of the third. They do not bound all: an ambiguous grammar can take for ever within them, so gateways try each first.
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000, step_lexer_fuel=100_000, step_max_items=25_000, max_grammar_size=200_000,
    max_lexer_states=MAX_LEXER_STATES, verbose_errors=False,
)  # fmt: skip
MAX_HELD_S = 0.5  # of one step, by compiling or by one mask; 1000 properties of an object take 0.18 s
NUM_TRIED_ANSWERS = 2
NUM_TRIED_TOKENS = 24

Mask = np.ndarray | ErrorInfo | None  # [vocab] bool: the tokens that may come next; or why there is none


def first_line(error: str) -> str:
    """What llguidance complains of, without the excerpts that it draws below."""
    return error.strip().partition("\n")[0][:MAX_ERROR_CHARS]


def read_vocabulary(tokenizer_json: str, vocab_size: int, eos_token_ids: Iterable[int]) -> LLTokenizer:
    """llguidance's view of a tokenizer in Hugging Face's format. `vocab_size`: columns of the logits, which may be more
    than there are tokens. Raises ModelError."""
    eos = sorted(eos_token_ids)
    if not eos:
        raise ModelError("the model has no end-of-sequence token, so no answer of its own can keep to a grammar")
    try:
        return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos)
    except ValueError as error:
        raise ModelError(f"its tokenizer cannot be used with a grammar: {error}") from error


def problem_with(vocabulary: LLTokenizer, grammar: str) -> str:
    """Compile it and begin a few answers by chance; why an engine should not, or empty. It may take for ever: for a
    process that can be killed. Times are the processor's, so others on the machine do not change what is refused."""
    begun_s = time.process_time()
    compiled = LLMatcher(vocabulary, grammar, log_level=0, limits=LIMITS)
    for chance in range(NUM_TRIED_ANSWERS):
        matcher, draw = compiled.deep_copy(), random.Random(chance)
        for _ in range(NUM_TRIED_TOKENS):
            bits = b"" if matcher.is_error() else matcher.compute_bitmask()
            if matcher.is_error():
                return first_line(matcher.get_error())
            if time.process_time() - begun_s > MAX_HELD_S:
                return f"it would hold up an engine for more than {MAX_HELD_S:g} s"
            begun_s = time.process_time()
            going_on = _going_on(vocabulary, bits)
            if not len(going_on):
                break
            matcher.consume_token(int(draw.choice(going_on)))
    return ""


def _going_on(vocabulary: LLTokenizer, bits: bytes) -> np.ndarray:
    """Ids of the tokens that are allowed, without those that end an answer."""
    allowed = np.unpackbits(np.frombuffer(bits, np.uint8), count=vocabulary.vocab_size, bitorder="little")
    return np.setdiff1d(np.flatnonzero(allowed), vocabulary.eos_tokens)


class Grammars:
    """Of one engine. Not thread-safe: its model runner owns it."""

    def __init__(self, read: Callable[[], LLTokenizer], num_threads: int = 1) -> None:
        """`read` gives the vocabulary, or raises ModelError. Threads are started at once: those that an engine's thread
        starts later would have to share the one core that it keeps to (engine/cores.py)."""
        self._read = read
        self._vocabulary: LLTokenizer | None = None
        self._executor = LLExecutor(num_threads=num_threads) if num_threads > 1 else None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def masks(self, sequences: Items[Sequence | None]) -> list[Mask]:
        """For the next token of each; None where there is no sequence or no grammar.

        Where an answer is complete the end-of-sequence tokens are in it; where it cannot go on, nothing else is."""
        masks: list[Mask] = [None] * len(sequences)
        going: list[tuple[int, Matching]] = []
        for index, sequence in enumerate(sequences):
            if sequence is not None and sequence.request.sampling.grammar:
                try:
                    going.append((index, self._follow(sequence)))
                except SteelyardError as error:
                    masks[index] = ErrorInfo(error.code, error.message)
        for (index, matching), mask in zip(going, self._fill([one.matcher for _, one in going]), strict=True):
            failed = matching.matcher.is_error()
            masks[index] = _failure(matching.matcher) if failed else mask
        return masks

    def _follow(self, sequence: Sequence) -> Matching:
        """Raises InvalidRequest or ModelError."""
        matching = sequence.matching or Matching(self._compile(sequence.request.sampling.grammar))
        matching.follow(sequence.tokens[sequence.num_prompt :])
        sequence.matching = matching
        return matching

    def _compile(self, grammar: str) -> LLMatcher:
        compiled = self._compiled.pop(grammar, None)
        if compiled is None:
            self._vocabulary = self._vocabulary or self._read()
            compiled = LLMatcher(self._vocabulary, grammar, log_level=0, limits=LIMITS)
            if compiled.is_error():
                raise InvalidRequest(_failure(compiled).message)
        self._compiled[grammar] = compiled
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return compiled.deep_copy()

    def _fill(self, matchers: list[LLMatcher]) -> np.ndarray:
        """[len(matchers), vocab] bool."""
        if not matchers or self._vocabulary is None:
            return np.zeros((0, 0), bool)
        vocab_size = self._vocabulary.vocab_size
        words = allocate_token_bitmask(len(matchers), vocab_size)  # [len(matchers), ceil(vocab / 32)] int32
        if len(matchers) == 1 or self._executor is None:
            for index, matcher in enumerate(matchers):
                fill_next_token_bitmask(matcher, words, index)
        else:
            fill_next_token_bitmask_par(self._executor, [(one, row) for row, one in enumerate(matchers)], words)
        return np.unpackbits(words.view(np.uint8), axis=1, count=vocab_size, bitorder="little").view(bool)


def _failure(matcher: LLMatcher) -> ErrorInfo:
    return ErrorInfo(InvalidRequest.code, f"the answer's grammar: {first_line(matcher.get_error())}")
