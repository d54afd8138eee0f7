"""The processes of one job: who does what, sums, and results to all. Nothing else knows how many there are.

torchrun starts them and says so in the environment. The first process runs the command; the others do their share of
whatever it asks for. Whole batches are shared out, never cut or regrouped, and their products are summed in float64: on
like processors and with as many threads the result is that of one process, bit for bit. Messages go through gloo.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from racdeploy.errors import ArtifactError, EngineError, EnvironmentFailure, MissingExtraError

if TYPE_CHECKING:
    import torch


T = TypeVar("T")
R = TypeVar("R")
_NO_JOB: tuple[str, Mapping[str, str], Mapping[str, Any]] = ("", {}, {})
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MEETING = timedelta(minutes=10)
_PATIENCE = timedelta(
    days=7
)  # the others wait while the first one exports and verifies; a death shows at once
_REMEDY = "the first error above is the cause; run the same command again, it goes on at the first missing block"


class Processes:
    """All processes of a job, seen from one of them. One process alone sends nothing.

    Args:
        rank: number of this process; 0 runs the command and writes the results.
        count: how many there are.
        group: torch.distributed, where there is more than one.
        members: its process group.
    """

    def __init__(
        self, rank: int = 0, count: int = 1, group: Any = None, members: Any = None
    ) -> None:
        self.rank, self.count = rank, count
        self._group, self._members = group, members
        self._waiting = True  # whether the others wait for a job

    def owners(self, costs: Sequence[int]) -> list[int]:
        """Return a process for each piece of work: the largest first, to whoever has least so far."""
        loads, owners = [0] * self.count, [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
            owners[index] = loads.index(min(loads))
            loads[owners[index]] += costs[index]
        return owners

    def mine(self, costs: Sequence[int]) -> list[int]:
        """Return the indices of the pieces of work that this process does."""
        return [index for index, owner in enumerate(self.owners(costs)) if owner == self.rank]

    def total(self, tensor: torch.Tensor, owners: Sequence[int] = ()) -> None:
        """Add up a tensor over all processes, in place, in those that own it, or in all; elsewhere it is lost."""
        if self.count == 1:
            return
        receivers = sorted(set(owners)) or list(range(self.count))
        with _talking(), _on_cpu(tensor) as message:
            self._group.reduce(message, receivers[0], group=self._members)
            for other in receivers[1:]:
                if self.rank == receivers[0]:
                    self._group.send(message, other, group=self._members)
                elif self.rank == other:
                    self._group.recv(message, receivers[0], group=self._members)

    def spread(self, tensor: torch.Tensor, owner: int) -> None:
        """Overwrite a tensor by that of one process."""
        if self.count > 1:
            with _talking(), _on_cpu(tensor) as message:
                self._group.broadcast(message, owner, group=self._members)

    def tell(self, value: T, owner: int = 0) -> T:
        """Return the value that one process has."""
        if self.count == 1:
            return value
        box = [value if self.rank == owner else None]
        with _talking():
            self._group.broadcast_object_list(box, owner, group=self._members)
        result: T = box[0]  # type: ignore[assignment]
        return result

    def all(self, value: T) -> list[T]:
        """Return the values of all processes, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with _talking():
            self._group.all_gather_object(values, value, group=self._members)
        return values

    @contextmanager
    def job(self, name: str, same: Mapping[str, str], given: Mapping[str, Any]) -> Iterator[None]:
        """While the body runs, the other processes do the same job; for the first process.

        Args:
            name: of the job.
            same: what all processes must have in common.
            given: what the others need to know.
        """
        self._waiting = False
        self.tell((name, same, given))
        yield
        self._waiting = True

    def jobs(
        self, same: Callable[[str], Mapping[str, str]]
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield name and data of the first process's jobs until it has no more; for the others.

        Args:
            same: what this process has in common with the others, by the name of a job.

        Raises:
            ArtifactError: not what the first process has.
        """
        while (found := self.tell(_NO_JOB))[0]:
            name, wanted, given = found
            if different := [key for key, value in same(name).items() if value != wanted[key]]:
                raise ArtifactError(
                    f"process {self.rank} is not like the first one; they differ in {', '.join(different)}",
                    remedy="give every machine the same model folder, and the same racdeploy, torch and transformers",
                )
            yield name, given

    def each(self, do: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Return what the processes make of one item each; fewer items leave some idle. For the first process."""
        self.tell(items)
        return self.all(do(items[0]))[: len(items)] if self.count > 1 else [do(items[0])]

    def serve(self, do: Callable[[Any], Any]) -> None:
        """Do the items of :meth:`each` until there are none. For the others."""
        while items := self.tell(()):
            self.all(do(items[self.rank]) if self.rank < len(items) else None)

    def dismiss(self) -> None:
        """Let the others go, where they wait; for the first process, at its end."""
        if self.rank == 0 and self._waiting:
            self.tell(_NO_JOB)


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """Yield the processes that torchrun started, or :data:`ALONE`.

    Raises:
        EngineError: the others do not come, or one of them is gone.
    """
    if not _asked():
        yield ALONE
        return
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("torch", "prune")
    import torch.distributed as group

    before = signal.signal(signal.SIGTERM, _on_terminate)
    with _talking():
        group.init_process_group("gloo", timeout=_MEETING)
        members = group.new_group(timeout=_PATIENCE)
    processes = Processes(group.get_rank(), group.get_world_size(), group, members)
    try:
        yield processes
    except BaseException:
        _ignore_terminate()
        raise
    finally:
        try:
            processes.dismiss()
        finally:
            group.destroy_process_group()
            processes._members = members = (
                None  # the last references: gloo ends its threads here, not as we exit
            )
    signal.signal(signal.SIGTERM, before)


def _asked() -> bool:
    """Return whether this process is one of several, by torchrun's variables."""
    return all(os.environ.get(name) for name in _ENVIRONMENT) and os.environ["WORLD_SIZE"] != "1"


@contextmanager
def _talking() -> Iterator[None]:
    """Say what a broken connection means."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # gloo has no errors of its own
        _ignore_terminate()
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise EngineError(f"lost another process of this job: {reason}", remedy=_REMEDY) from error


@contextmanager
def _on_cpu(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensor, or while the body runs its copy on the CPU: gloo sends nothing else between all its members."""
    copy = tensor.cpu()
    yield copy
    if copy is not tensor:
        tensor.copy_(copy)


def _on_terminate(signum: int, frame: FrameType | None) -> None:
    _ignore_terminate()
    raise EnvironmentFailure(
        "stopped by torchrun, because another process of this job ended", remedy=_REMEDY
    )


def _ignore_terminate() -> None:
    """Let no second signal of torchrun's break into the message and the clean end of a process that ends anyway."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
