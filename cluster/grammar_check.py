"""Whether engines can keep answers to a grammar, tried by a process of its own that is killed when it takes too long.

1. The process starts with the first grammar, reads the vocabulary once, and is asked about one grammar at a time.
2. One that takes longer than `limit_s`, or more memory than there is for it, is refused; the process is ended, and the
   next grammar starts another. So is the process of a check whose request was given up.
3. Answers of the last grammars are kept, so those in use never wait for a stranger's. A time-out is not: it may have
   been the machine that was slow.

Why a process: llguidance's limits do not bound its time, and a thread of it cannot be stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict

from cluster.grammar_process import LENGTH, message
from engine.child import child_env
from engine.errors import Unavailable

MAX_KNOWN = 256
START_S = 60.0
NUM_THREADS = 1


class GrammarProcess:
    """Implements router.grammar.GrammarCheck. Of one event loop."""

    def __init__(self, vocabulary: bytes, limit_s: float) -> None:
        """`vocabulary`: cluster.grammar_process.vocabulary_message."""
        self._vocabulary = vocabulary
        self._limit_s = limit_s
        self._known: OrderedDict[str, str] = OrderedDict()
        self._turn = asyncio.Lock()
        self._process: Process | None = None

    async def problem_with(self, grammar: str) -> str:
        if grammar not in self._known:
            async with self._turn:
                if grammar not in self._known:
                    return await self._try(grammar)
        self._known.move_to_end(grammar)
        return self._known[grammar]

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _try(self, grammar: str) -> str:
        is_answered = False
        try:
            process = await self._running()
            async with asyncio.timeout(self._limit_s):
                problem = await _ask(process, message(grammar))
            is_answered = True
        except TimeoutError:
            return f"it takes longer than {self._limit_s:g} s (router.grammar_compile_s) to compile"
        except (EOFError, ConnectionError):
            return "it cannot be compiled in the memory that there is for it"
        finally:
            if not is_answered:
                await self.stop()
        self._known[grammar] = problem
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return problem

    async def _running(self) -> Process:
        """Unavailable if it does not start."""
        if self._process is None:
            command = (sys.executable, "-m", "cluster.grammar_process")
            environment = child_env(NUM_THREADS)
            self._process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, env=environment)
            try:
                async with asyncio.timeout(START_S):
                    await _ask(self._process, self._vocabulary)
            except (TimeoutError, EOFError, ConnectionError):
                raise Unavailable("what tries grammars did not start", retry_after_s=1) from None
        return self._process


async def _ask(process: Process, request: bytes) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(request)
    await process.stdin.drain()
    (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
    return (await process.stdout.readexactly(length)).decode()
