"""Reasoning told from content, and its tokens counted, however an answer is cut into tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.parts import Spoken, joined, spoken
from router.reasoning import STYLES, ReasoningCounter, ReasoningSplitter, opens_reasoning, reasoning_marks_of

THINK = STYLES["think"]
GOLDEN = [
    # the text, was it opened by the prompt, the reasoning, the content
    ("<think>\nwhy\n</think>\n\nso", False, "why", "so"),
    ("<think>why</think>so", False, "why", "so"),
    ("\n<think>why</think>so", False, "why", "so"),
    ("\nwhy\n</think>\n\nso", True, "why", "so"),
    ("<think>\nwhy</think>so", True, "why", "so"),
    ("<think>why", False, "why", ""),
    ("<think>why </thi", False, "why </thi", ""),
    ("why\n", True, "why\n", ""),
    ("<thi", True, "<thi", ""),
    ("<think></think>so", False, "", "so"),
    ("<think>\n\n</think>\n\n", False, "", ""),
    ("so <think>no</think>", False, "", "so <think>no</think>"),
    ("so</think>", False, "", "so</think>"),
    ("<th", False, "", "<th"),
    ("", False, "", ""),
    ("a\n\nb\n</think>c</think>", True, "a\n\nb", "c</think>"),
]


def split(pieces: list[str], is_open: bool) -> Spoken:
    splitter = ReasoningSplitter(THINK, is_open)
    return spoken(joined([part for piece in pieces for part in splitter.push(piece)] + [*splitter.flush()]))


@pytest.mark.parametrize(("text", "is_open", "reasoning", "content"), GOLDEN)
def test_reasoning_is_told_from_content(text: str, is_open: bool, reasoning: str, content: str) -> None:
    assert split([text], is_open) == Spoken(content, reasoning, ())
    assert split(list(text), is_open) == Spoken(content, reasoning, ())


FRAGMENTS = st.sampled_from(["<think>", "</think>", "\n", " ", "why", "<", "</", "think>", "é"])


@given(text=st.lists(FRAGMENTS, max_size=10).map("".join), sizes=st.lists(st.integers(0, 6), max_size=30), is_open=...)
def test_the_same_comes_out_however_the_text_is_cut(text: str, sizes: list[int], is_open: bool) -> None:
    pieces, rest = [], text
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    assert split([*pieces, rest], is_open) == split([text], is_open)


def counted(tokens: list[str], is_open: bool) -> int:
    counter = ReasoningCounter(THINK, is_open)
    for token in tokens:
        counter.push(token)
    return counter.num_tokens


@pytest.mark.parametrize(
    ("tokens", "is_open", "expected"),
    [
        (["<think>", "a", "b", "</think>", "c"], False, 2),
        (["<think>", "a", "b"], False, 2),
        (["a", "b", "</think>", "c"], True, 2),
        (["<think>", "\n", "a", "</think>", "c"], True, 2),
        (["<", "think", ">a", "b<", "/think", ">", "c"], False, 2),
        (["a", "", "b", "</", "thi"], True, 5),  # cut: what may become a mark is none
        (["a", "", "b", "</", "think>", "", "c"], True, 3),
        (["a", "<think>", "b", "</think>"], False, 0),
        (["<think></think>", "c"], False, 0),
        (["<think>a</think>b", "c"], False, 1),
        ([], True, 0),
    ],
)
def test_tokens_between_the_marks_are_counted(tokens: list[str], is_open: bool, expected: int) -> None:
    assert counted(tokens, is_open) == expected


@given(
    tokens=st.lists(
        st.sampled_from(["<think>", "</think>", "<think></think>", "<", "/", "think>", "a", "a<"]), max_size=12
    )
)
def test_at_every_token_the_count_is_that_of_tokens_with_text_between_the_marks(tokens: list[str]) -> None:
    for end in range(len(tokens) + 1):
        assert counted(tokens[:end], False) == _slowly(tokens[:end])


def _slowly(tokens: list[str]) -> int:
    """The oracle: where the marks lie in the whole text, and which tokens have a character between them."""
    text = "".join(tokens)
    begin = text.lstrip().startswith("<think>")
    if not begin:
        return 0
    start = text.index("<think>") + len("<think>")
    end = text.find("</think>", start)
    end = len(text) if end < 0 else end
    owners = [index for index, token in enumerate(tokens) for _ in token]
    return len(set(owners[start:end]))


def test_marks_are_found_in_templates_and_at_the_end_of_prompts() -> None:
    assert reasoning_marks_of("{% if x %}<think>{% endif %}</think>") == THINK
    assert reasoning_marks_of("[THINK] and [/THINK]") == STYLES["bracket"]
    assert reasoning_marks_of("{{ messages }}") is None and reasoning_marks_of(None) is None
    assert opens_reasoning("<|im_start|>assistant\n<think>\n", THINK)
    assert not opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n", THINK)
