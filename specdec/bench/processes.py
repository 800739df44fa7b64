"""Processes that share the calls of a bench, as torchrun or accelerate start them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

Item = TypeVar("Item")

# A process may have much more to decode than another; one that has died is noticed at once.
_PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Processes:
    """This process among those that run the same bench.

    Attributes:
        rank: its number.
        num: of processes in all.
        local_rank: its number on this machine.
    """

    rank: int = 0
    num: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that joins the results and speaks."""
        return self.rank == 0

    @property
    def shard(self) -> int | None:
        """The number of its file of records; None for a process alone."""
        return self.rank if self.num > 1 else None

    def share(self, items: Sequence[Item]) -> Iterator[tuple[int, Item]]:
        """What of the items is its own, with their numbers: every `num`th one."""
        return ((i, item) for i, item in enumerate(items) if i % self.num == self.rank)

    def device(self, given: str | None) -> str | None:
        """Where it puts the models: a CUDA device of its own, unless another one is given."""
        if given is None and self.num > 1 and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return given

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block when all processes have; where one of them failed, all fail.

        Raises:
            RuntimeError: another process failed or has ended.
        """
        try:
            yield
        except Exception as error:
            self._exchange(f"{type(error).__name__}: {error}")
            raise
        for rank, problem in enumerate(self._exchange("")):
            if problem:
                raise RuntimeError(f"process {rank} failed: {problem}")

    def _exchange(self, problem: str) -> list[str]:
        problems: list[Any] = [problem] * self.num
        if self.num > 1:
            try:
                distributed.all_gather_object(problems, problem)
            except RuntimeError as error:
                raise RuntimeError(
                    "another process ended before its part was done; finished calls are kept: "
                    "give the same command again"
                ) from error
        return problems


def launched_processes(environment: Mapping[str, str] = os.environ) -> Processes:
    """What the launcher's variables RANK, WORLD_SIZE and LOCAL_RANK say; without them, one."""
    num = int(environment.get("WORLD_SIZE", 1))
    if num < 2 or "RANK" not in environment:
        return Processes()
    rank = int(environment["RANK"])
    return Processes(rank, num, int(environment.get("LOCAL_RANK", rank)))


@contextmanager
def joined_processes(environment: Mapping[str, str] = os.environ) -> Iterator[Processes]:
    """Meet the processes that a launcher started; for one alone, nothing is opened."""
    processes = launched_processes(environment)
    if processes.num == 1:
        yield processes
        return
    # Of processors too: what is exchanged is text, and devices are left to the arms.
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield processes
    finally:
        distributed.destroy_process_group()
