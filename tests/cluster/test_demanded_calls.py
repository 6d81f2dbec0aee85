"""A call that is demanded of a model that knows nothing: the grammar makes it one, whole and streamed."""

from __future__ import annotations

import json
from pathlib import Path

import openai

from tests.cluster.harness import local_cluster
from tests.cluster.tiny_model import NAME, write_tiny_model

UNIT = {"type": "string", "enum": ["C", "F"]}
PARAMETERS = {"type": "object", "properties": {"unit": UNIT}, "required": ["unit"], "additionalProperties": False}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
DEMAND = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200, "seed": 5}


async def test_a_demanded_call_comes_out_whole_and_streamed_alike(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / NAME)
    settings = {
        "model.name": str(folder),
        "engine.num_blocks": 256,
        "engine.host_tier_bytes": 0,
        "engine.runner": "thread",
    }
    async with (
        local_cluster(settings) as cluster,
        openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client,
    ):
        asked = {"model": NAME, "messages": [{"role": "user", "content": "Weather?"}], **DEMAND}
        whole = await client.chat.completions.create(**asked)
        calls = whole.choices[0].message.tool_calls
        assert calls is not None and len(calls) == 1
        call = calls[0]
        assert whole.choices[0].finish_reason == "tool_calls" and whole.choices[0].message.content is None
        assert call.function.name == "weather" and json.loads(call.function.arguments)["unit"] in UNIT["enum"]
        async with client.chat.completions.stream(**asked) as stream:
            async for _ in stream:
                pass
            streamed = (await stream.get_final_completion()).choices[0]
        assert streamed.finish_reason == "tool_calls"
        assert [one.function.arguments for one in streamed.message.tool_calls or ()] == [call.function.arguments]
        assert not cluster.dispatcher._live
