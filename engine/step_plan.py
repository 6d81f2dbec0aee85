"""StepPlan: a step in plain numbers, all that a rank must know of a Batch to compute it.

The rank that schedules makes one of its Batch (engine/batch.py) and sends it to the others as bytes, so that they need
no object for a sequence or a token. Integers only; what follows from others is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

_COUNT = np.dtype("<u4")
_NUMBER = np.dtype("<i8")


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All arrays are int64, [length].

    token_ids, positions: of each new token, in the order of the rows
    new_blocks: of each group, the block of each new token
    num_seqs, num_new: of each attention call, its sequences and the new tokens of each
    starts: of each sequence of each call, the position of its first new token
    tables: of each group, of each call, [num_seqs, blocks of whole key tiles]
    sample_rows: rows whose logits are wanted
    state_rows: rows whose final hidden states are wanted
    copies: pairs (from, to) of blocks that are copied before anything is written
    """

    token_ids: np.ndarray
    positions: np.ndarray
    new_blocks: np.ndarray
    num_seqs: np.ndarray
    num_new: np.ndarray
    starts: np.ndarray
    tables: np.ndarray
    sample_rows: np.ndarray
    state_rows: np.ndarray
    copies: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def encode(self) -> bytes:
        """The lengths of all arrays, then the arrays."""
        arrays = [getattr(self, field.name) for field in fields(self)]
        lengths = np.array([len(array) for array in arrays], _COUNT)
        return b"".join((lengths.tobytes(), *(array.astype(_NUMBER, copy=False).tobytes() for array in arrays)))

    @classmethod
    def decode(cls, data: bytes) -> StepPlan:
        num_fields = len(fields(cls))
        lengths = np.frombuffer(data, _COUNT, num_fields)
        numbers = np.frombuffer(data, _NUMBER, offset=num_fields * _COUNT.itemsize)
        return cls(*np.split(numbers, np.cumsum(lengths[:-1], dtype=np.int64)))
