"""One process's share of a job: the batches and rows that it has, and sums over all processes.

Traces, pruning and recovery ask it and do not know the process group. All processes make the same
calls in the same order.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from racdeploy.pruning.process_group import SINGLE_PROCESS, ProcessGroup, count_local_processes

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
Result = TypeVar("Result")
Number = TypeVar("Number", int, float)


class JobShare:
    """The share of one process; a process that works alone has all of the job."""

    def __init__(self, processes: ProcessGroup = SINGLE_PROCESS) -> None:
        self._processes = processes

    @property
    def count(self) -> int:
        """Number of shares: one for each process of the job."""
        return self._processes.world_size

    @property
    def local_count(self) -> int:
        """Number of shares on this machine, which divide its memory."""
        return count_local_processes() if self.count > 1 else 1

    @property
    def has_files(self) -> bool:
        """True in the process that reads and writes the files of the job."""
        return self._processes.is_first

    def set_threads(self, threads: int) -> None:
        """Use as many threads in all processes as where the files are; 0: torch's choice there."""
        self._processes.set_threads(threads)

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

    def list_lacking(self, is_here: bool) -> list[int]:
        """Return the numbers of the processes that lack something."""
        everywhere = self._processes.all_gather(is_here)
        return [number for number, is_there in enumerate(everywhere) if not is_there]

    def unite(self, names: Iterable[str]) -> set[str]:
        """Return the names that any process has."""
        return set[str]().union(*self._processes.all_gather([*names]))

    def merge(self, values: Mapping[str, T]) -> Mapping[str, T]:
        """Return the values of all processes by their keys."""
        return ChainMap(*map(dict, self._processes.all_gather(values)))

    def add_up(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes, which is the sum over all batches."""
        for tensor in tensors:
            self._processes.reduce(tensor)

    def add_up_for(self, tensor: Tensor, owners: Sequence[int]) -> None:
        """Replace a tensor by its sum over all processes, in some; it is undefined in others."""
        self._processes.reduce(tensor, owners)

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

    def send_object_to_all(self, value: T, owner: int) -> T:
        """Return the object of one process."""
        return self._processes.broadcast_object(value, owner)

    @contextmanager
    def share_calls(
        self, function: Callable[[T], Result]
    ) -> Iterator[Callable[[Sequence[T]], list[Result]]]:
        """Yield a function that calls ``function`` for one item in each process.

        It takes at most :attr:`count` items. The other processes :meth:`serve_calls`.
        """
        with self._processes.share_calls(function) as call:
            yield call

    def serve_calls(self, function: Callable[[Any], Any]) -> None:
        """Take part in the :meth:`share_calls` of the process that has the files."""
        self._processes.serve_calls(function)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes where the files are; others get their own."""
        return self._processes.gather_rows(rows)

    def scatter_rows(self, all_rows: Tensor | None, rows: Tensor) -> Tensor:
        """Return this process's rows of a tensor, as many as ``rows`` has.

        Args:
            all_rows: the whole tensor, where the files are; None in other processes.
        """
        return self._processes.scatter_rows(all_rows, rows)

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Return the device mesh of all processes, for FSDP."""
        return self._processes.mesh(device)


WHOLE_SHARE = JobShare()
