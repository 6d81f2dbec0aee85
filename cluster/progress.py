"""What `steelyard serve` shows: one line per step with its duration, and at the end how to use what was started."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

Note = Callable[[str], None]


class Steps:
    """Steps with durations; a spinner on a terminal, plain lines elsewhere (the log of a Ray job)."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began = time.monotonic()

    @property
    def total_s(self) -> float:
        return time.monotonic() - self._began

    @contextmanager
    def step(self, name: str) -> Iterator[Note]:
        """One step; what was last passed to the note stands on its line."""
        began, detail, spinner = time.monotonic(), "", Spinner("dots", Text(name))

        def note(text: str) -> None:
            nonlocal detail
            detail = text
            spinner.update(text=Text(f"{name}  {text}"))

        def finish(mark: str, style: str) -> None:
            line = Text.assemble((mark, style), f" {name:<13} {time.monotonic() - began:5.1f} s  ", (detail, "dim"))
            self.console.print(line, soft_wrap=True)

        live = Live(spinner, console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False)
        try:
            if self.console.is_terminal:
                with live:
                    yield note
            else:
                yield note
        except BaseException:
            finish("x", "bold red")
            raise
        finish("+", "bold green")

    def say(self, text: str) -> None:
        self.console.print(Text(f"{time.strftime('%H:%M:%S')} {text}"), soft_wrap=True)


def show_ready(console: Console, *, url: str, model: str, workers: str, total_s: float, how_to_stop: str) -> None:
    """The block that ends the start. Its curl line stands alone and is never wrapped, so that it can be pasted."""
    message = {"role": "user", "content": "Why is the sky blue?"}
    body = json.dumps({"model": model, "messages": [message], "max_tokens": 64, "temperature": 0})
    curl = f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    lines = [
        "",
        f"Ready after {total_s:.1f} s: {model} on {workers}",
        f"URL   {url}/v1",
        f"Chat  steelyard chat --url {url}",
        f"Stop  {how_to_stop}",
        "Try",
        curl,
        "",
    ]
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def how_to_stop(name: str, detached: bool) -> str:
    """For whoever reads this process's output: a terminal, or the log of a Ray job."""
    if detached:
        return f"steelyard stop CONFIG (the same file; the cluster is named {name!r})"
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {}).get("job_submission_id")
    return f"ray job stop {job}" if job else "Ctrl-C"
