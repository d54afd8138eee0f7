"""One process's share of a training: some batches, some rows of every weight, and sums over all.

In this room it alone knows the process group. All processes make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from racdeploy.pruning.process_group import SINGLE_PROCESS, ProcessGroup, count_local_processes

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
Number = TypeVar("Number", int, float)


class TrainingShare:
    """The share of one process; a process that trains alone has all of it."""

    def __init__(self, processes: ProcessGroup = SINGLE_PROCESS) -> None:
        self._processes = processes

    @property
    def count(self) -> int:
        """Number of shares: one for each process of the job."""
        return self._processes.world_size

    @property
    def local_count(self) -> int:
        """Number of shares that this machine has, whose memory they divide."""
        return count_local_processes() if self.count > 1 else 1

    @property
    def has_files(self) -> bool:
        """True in the process that reads and writes the files of the training."""
        return self._processes.is_first

    def run_once(self, function: Callable[[], T]) -> T:
        """Call a function in the process that has the files; return its result in all."""
        return self._processes.run_on_first(function)

    def total(self, value: Number) -> Number:
        """Return the sum of a number over all processes."""
        return sum(self._processes.all_gather(value))

    def list_all(self, value: T) -> list[T]:
        """Return the values of all processes, in their order."""
        return self._processes.all_gather(value)

    def agree(self, own: bool) -> bool:
        """Return True if it is true in all processes."""
        return all(self._processes.all_gather(own))

    def unite(self, names: Iterable[str]) -> set[str]:
        """Return the names that any process has."""
        return set[str]().union(*self._processes.all_gather([*names]))

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        self._processes.reduce(tensor)

    def assign_owners(self, costs: Sequence[int]) -> list[int]:
        """Return the number of a process for each work item, so that all have about the same."""
        return self._processes.assign_owners(costs)

    def list_owned(self, owners: Sequence[int]) -> list[int]:
        """Return the indices of this process's work items, given the owners of all."""
        rank = self._processes.rank
        return [index for index, owner in enumerate(owners) if owner == rank]

    def take(self, items: Sequence[T]) -> T | None:
        """Return this process's one of some items, or None if there are too few for all."""
        rank = self._processes.rank
        return items[rank] if rank < len(items) else None

    def send_to_all(self, tensor: Tensor, owner: int = 0) -> Tensor:
        """Return the tensor of one process, by default of the one that has the files.

        Others pass a tensor of the same shape and dtype.
        """
        return self._processes.broadcast(tensor, owner)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes where the files are; others get their own."""
        return self._processes.gather_rows(rows)

    def scatter_rows(self, all_rows: Tensor | None, rows: Tensor) -> Tensor:
        """Return this process's rows of a tensor, as many as ``rows`` has.

        Args:
            all_rows: the whole tensor, where the files are; None in other processes.
        """
        return self._processes.scatter_rows(all_rows, rows)

    def set_threads(self, threads: int) -> None:
        """Use as many threads in all processes as in the one that has the files; 0: torch's."""
        self._processes.set_threads(threads)

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Return the device mesh of all processes, for FSDP."""
        return self._processes.mesh(device)


WHOLE_SHARE = TrainingShare()
