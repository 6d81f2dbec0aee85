"""How models write calls of functions: between which marks, and with which words.

A format is found from the chat template's text, which shows the model what it was trained on; `model.tool_format` in
the config says otherwise. Sources: the templates of Qwen 2.5 and 3 and of Hermes 2 Pro (hermes), of Llama 3.1 and 3.2
(llama3), of Mistral 7B v0.3 to Small 3.2 (mistral).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ToolFormat(StrEnum):
    HERMES = "hermes"  # <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    LLAMA3 = "llama3"  # {"name": ..., "parameters": {...}}, maybe after <|python_tag|>, several with ; between them
    MISTRAL = "mistral"  # [TOOL_CALLS][{"name": ..., "arguments": {...}}], or [TOOL_CALLS]name[ARGS]{...}
    JSON = "json"  # one such object, or a list of them


@dataclass(frozen=True, slots=True)
class Marks:
    """`opener` begins calls wherever it stands. Without one, or where `bare`, an answer that begins with a bracket may
    be calls. `closer` ends them. `arguments`: the key that the model itself uses."""

    opener: str = ""
    closer: str = ""
    bare: bool = False
    has_names: bool = False  # a function's name may stand in front of its arguments, outside of JSON
    arguments: str = "arguments"


MARKS = {
    ToolFormat.HERMES: Marks("<tool_call>", "</tool_call>"),
    ToolFormat.LLAMA3: Marks("<|python_tag|>", bare=True, arguments="parameters"),
    ToolFormat.MISTRAL: Marks("[TOOL_CALLS]", has_names=True),
    ToolFormat.JSON: Marks(bare=True),
}
SEPARATORS = {  # words that divide a name from its arguments, and from the call's id (Mistral's)
    "[ARGS]": "arguments",
    "[CALL_ID]": "id",
}


def tool_format_of(template: str | None) -> ToolFormat | None:
    """The format that a chat template's text shows; None where it shows none that we know."""
    if template is None:
        return None
    if "[TOOL_CALLS]" in template:
        return ToolFormat.MISTRAL
    if "<tool_call>" in template:  # what is not JSON between these marks (Qwen3-Coder, GLM) is another format
        return None if "<function=" in template or "<arg_key>" in template else ToolFormat.HERMES
    if "<|python_tag|>" in template or '"parameters": dictionary' in template:
        return ToolFormat.LLAMA3
    return None
