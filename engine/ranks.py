"""What the ranks of a tensor-parallel worker do together: add up hidden states, gather logits, agree on ladders.

Rank 0 schedules and samples; it tells the others each step as one message (engine/step_plan.py). With one rank nothing
is to be done. Ranks are processes of one host, which talk by gloo over the loopback device.
"""

from __future__ import annotations

import datetime
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from engine.shares import Share
from engine.step_plan import StepPlan
from kernels.reference.ladder import REFERENCE_ROWS, Ladders, RowLadder

COLLECTIVE_TIMEOUT_S = 60.0  # then a rank is taken for dead, and with it the worker


class Ranks(Protocol):
    """All ranks call the same in the same order, `tell` excepted, which is rank 0's."""

    @property
    def share(self) -> Share: ...

    def tell(self, plan: StepPlan) -> None:
        """Let the other ranks compute this step, too."""
        ...

    def add(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden]: the sum over all ranks, equal bits on each."""
        ...

    def gather(self, logits: torch.Tensor, width: int) -> torch.Tensor:
        """[rows, this rank's part of `width`] -> [rows, width] on rank 0; elsewhere nothing of use."""
        ...

    def agree(self, ladders: Ladders) -> Ladders:
        """Row counts that every rank can use: a row must be padded alike on all."""
        ...


class OneRank:
    """A worker of one rank."""

    share = Share(0, 1)

    def tell(self, plan: StepPlan) -> None:
        return

    def add(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def gather(self, logits: torch.Tensor, width: int) -> torch.Tensor:
        return logits

    def agree(self, ladders: Ladders) -> Ladders:
        return ladders


ONE_RANK = OneRank()


class Followers(Protocol):
    """The way from rank 0 to the others."""

    def send(self, message: bytes) -> None: ...


def meeting_point(port: int, size: int, listening: int | None = None) -> TCPStore:
    """The store at which ranks find each other. Rank 0 keeps it, on a socket that already listens; only who reaches
    that socket can."""
    if listening is None:
        return TCPStore("127.0.0.1", port, size, is_master=False)
    return TCPStore("127.0.0.1", port, size, is_master=True, wait_for_workers=False, master_listen_fd=listening)


class GroupRanks:
    """Ranks that are processes of one host, joined by torch.distributed."""

    def __init__(self, share: Share, store: TCPStore, in_order: bool, followers: Followers | None = None) -> None:
        """`in_order`: sums are made in the order of the ranks, so that their bits do not depend on a row's place."""
        self.share = share
        self._in_order = in_order
        self._followers = followers
        timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        dist.init_process_group("gloo", store=store, rank=share.rank, world_size=share.size, timeout=timeout)

    def tell(self, plan: StepPlan) -> None:
        if self._followers is not None:
            self._followers.send(plan.encode())

    def add(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self._in_order:
            dist.all_reduce(hidden)
            return hidden
        parts = [torch.empty_like(hidden) for _ in range(self.share.size)]
        dist.all_gather(parts, hidden.contiguous())
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part
        return total.to(hidden.dtype)

    def gather(self, logits: torch.Tensor, width: int) -> torch.Tensor:
        if not len(logits):
            return logits.new_zeros(0, width)
        shares = [len(Share(rank, self.share.size).cut(width)) for rank in range(self.share.size)]
        padded = logits.new_zeros(len(logits), max(shares))
        padded[:, : logits.shape[1]] = logits
        is_first = self.share.rank == 0
        parts = [torch.empty_like(padded) for _ in shares] if is_first else None
        dist.gather(padded, parts, dst=0)
        if parts is None:
            return logits
        return torch.cat([part[:, :size] for part, size in zip(parts, shares, strict=True)], dim=1)

    def agree(self, ladders: Ladders) -> Ladders:
        return Ladders(self._agreed(ladders.linear), self._agreed(ladders.attention))

    def _agreed(self, ladder: RowLadder) -> RowLadder:
        usable = torch.tensor([int(rows in ladder.rungs) for rows in range(REFERENCE_ROWS + 1)] + [int(ladder.high)])
        dist.all_reduce(usable, op=dist.ReduceOp.MIN)
        *rungs, high = usable.tolist()
        return RowLadder(tuple(rows for rows, is_usable in enumerate(rungs) if is_usable), bool(high))
