"""Chunks from serialised parts are, byte for byte, those that pydantic gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.chat_replies import ChatReplies
from router.replies import CompletionReplies


@pytest.mark.parametrize("has_usage", [False, True])
@pytest.mark.parametrize("dialect", [ChatReplies, CompletionReplies])
@given(text=st.text(), index=st.integers(0, 127))
def test_an_event_is_the_same_either_way(
    dialect: type[ChatReplies | CompletionReplies], has_usage: bool, text: str, index: int
) -> None:
    replies = dialect('r"1', "a/m\\odel\u00e9", 7, "fp_1", has_usage)
    assert replies.text(index, text) == replies._text(index, text)
