"""Tools in words, for models whose chat template does not know them: in the style of Hermes 2 Pro.

1. A system text lists the functions and shows how to call one. It follows the system message that there is.
2. Calls in earlier messages are written as the model is asked to write them, and results come as a user's message.

Source of the words: https://huggingface.co/NousResearch/Hermes-2-Pro-Llama-3-8B#prompt-format-for-function-calling
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from router.tools.formats import MARKS, Marks, ToolFormat

Record = Mapping[str, object]

INTRODUCTION = """\
You may call functions to help with the user's request. Here are their signatures, one JSON object on each line:
<tools>
{tools}
</tools>
To call a function, answer with a JSON object that has its name and its arguments{place}:
{example}
Do not make up values for arguments. Answer in plain words where no function is needed."""


def tools_in_words(tools: Sequence[Record], tool_format: ToolFormat) -> str:
    """The system text. It grows with the tools' own JSON and no more."""
    marks = MARKS[tool_format]
    place = f", between {marks.opener} and {marks.closer}" if marks.opener and marks.closer else ""
    example = call_in_words("<name>", '{"<argument>": "<value>"}', marks)
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return INTRODUCTION.format(tools=lines, place=place, example=example)


def call_in_words(name: str, arguments: str, marks: Marks) -> str:
    """One call as the model is to write it. `arguments` is JSON already."""
    call = f'{{"name": {json.dumps(name)}, "{marks.arguments}": {arguments}}}'
    if marks.closer:
        return f"{marks.opener}\n{call}\n{marks.closer}"
    return f"{marks.opener}[{call}]" if marks.has_names else call


def with_system_text(messages: Iterable[Record], text: str) -> list[Record]:
    """The messages with a text that follows the system message at their beginning, or is one."""
    rest = list(messages)
    if rest and rest[0]["role"] == "system":
        first = rest.pop(0)
        text = f"{first['content']}\n\n{text}"
    return [{"role": "system", "content": text}, *rest]


def result_in_words(content: str) -> Record:
    return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
