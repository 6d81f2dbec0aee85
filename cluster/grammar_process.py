"""The process that tries grammars for a gateway: `python -m cluster.grammar_process`, started by GrammarProcess.

1. Reads the vocabulary from its standard input, and says so with an empty answer; 2. answers each grammar with what is
wrong with it, empty if nothing is; 3. ends when its input is closed. What takes too long is the gateway's to end.

A message is its length in 4 bytes, little-endian, and its bytes.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
from typing import BinaryIO

from engine.errors import ModelError
from engine.grammar import problem_with, read_vocabulary

LENGTH = struct.Struct("<I")
MAX_MEMORY_BYTES = 4 * 2**30  # of addresses; beyond it llguidance aborts, and the grammar is refused


def message(text: str) -> bytes:
    data = text.encode()
    return LENGTH.pack(len(data)) + data


def vocabulary_message(tokenizer_json: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> bytes:
    return message(json.dumps([tokenizer_json, vocab_size, eos_token_ids]))


def _read(source: BinaryIO) -> str | None:
    head = source.read(LENGTH.size)
    return source.read(*LENGTH.unpack(head)).decode() if len(head) == LENGTH.size else None


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    first = _read(source)
    if first is None:
        return
    fault = ""
    try:
        vocabulary = read_vocabulary(*json.loads(first))
    except ModelError as error:
        vocabulary, fault = None, error.message
    answer: str | None = ""
    while answer is not None:
        sink.write(message(answer))
        sink.flush()
        grammar = _read(source)
        answer = None if grammar is None else problem_with(vocabulary, grammar) if vocabulary else fault


if __name__ == "__main__":
    main()
