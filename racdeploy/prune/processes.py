"""The processes of one job: who does what, sums, and results to all.

torchrun starts them. The first one runs the command and has the files; the others do their share of
whatever it asks for. Whole batches are shared out and their products summed in float64: on like
processors and with as many threads the result is that of one process, bit for bit.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from racdeploy import plugins
from racdeploy.errors import ArtifactError, EngineError, EnvironmentFailure

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
R = TypeVar("R")
_NO_JOB: tuple[str, Mapping[str, str], Mapping[str, Any]] = ("", {}, {})
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MEETING = timedelta(minutes=10)
_OF_CONNECTION = re.compile("gloo|nccl", re.IGNORECASE)
_PATIENCE = timedelta(days=7)  # while the first exports and verifies; a lost one shows at once
_REMEDY = (
    "the first error above is the cause; "
    "run the same command again, it resumes at the first missing block"
)


class Processes:
    """All processes of a job, seen from the one of number ``rank``. One alone sends nothing."""

    def __init__(
        self, rank: int = 0, count: int = 1, group: Any = None, members: Any = None
    ) -> None:
        self.rank, self.count = rank, count
        self._group, self._members = group, members
        self._mesh: DeviceMesh | None = None
        self._waiting = True  # whether the others wait for a job

    @property
    def first(self) -> bool:
        """Whether this process runs the command and has the files."""
        return self.rank == 0

    def owners(self, costs: Sequence[int]) -> list[int]:
        """Return a process for each piece of work: the largest first, to whoever has least."""
        loads = [0] * self.count
        owners = [0] * len(costs)
        largest_first = sorted(range(len(costs)), key=lambda index: -costs[index])
        for index in largest_first:
            owner = loads.index(min(loads))
            owners[index] = owner
            loads[owner] += costs[index]
        return owners

    def mine(self, costs: Sequence[int]) -> list[int]:
        """Return the indices of the pieces of work that this process does."""
        return [index for index, owner in enumerate(self.owners(costs)) if owner == self.rank]

    def total(self, tensor: torch.Tensor, owners: Sequence[int] = ()) -> None:
        """Add up a tensor in place, in its owners or all processes; in others it is lost."""
        if self.count == 1:
            return

        receivers = sorted(set(owners)) or list(range(self.count))
        summing = receivers[0]

        with _talking(), _on_cpu(tensor) as message:
            self._group.reduce(message, summing, group=self._members)
            for other in receivers[1:]:
                if self.rank == summing:
                    self._group.send(message, other, group=self._members)
                elif self.rank == other:
                    self._group.recv(message, summing, group=self._members)

    def spread(self, tensor: torch.Tensor, owner: int = 0) -> torch.Tensor:
        """Return the tensor that one process has; the others give one of its shape and type."""
        if self.count == 1:
            return tensor

        spread = tensor.clone()
        with _talking(), _on_cpu(spread) as message:
            self._group.broadcast(message, owner, group=self._members)

        return spread

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of all processes, in their order, in the first; others keep their own."""
        if self.count == 1:
            return rows

        import torch

        counts = self.all(len(rows))
        parts = [rows.detach().cpu().contiguous()]

        with _talking():
            if not self.first:
                self._send(parts[0], 0)
                return rows

            for other in range(1, self.count):
                part = parts[0].new_empty((counts[other], *rows.shape[1:]))
                self._receive(part, other)
                parts.append(part)

        return torch.cat(parts)

    def part(self, whole: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        """Return this process's rows of a tensor that the first one has, as many as ``rows``."""
        import torch

        counts = self.all(len(rows))

        if whole is None:
            mine = rows.detach().cpu().clone()
            with _talking():
                self._receive(mine, 0)
            return mine

        mine, *others = torch.split(whole, counts)
        with _talking():
            for other, part in enumerate(others, 1):
                self._send(part.contiguous(), other)
        return mine

    def _send(self, rows: torch.Tensor, receiver: int) -> None:
        if rows.numel():
            self._group.send(rows, receiver, group=self._members)

    def _receive(self, rows: torch.Tensor, sender: int) -> None:
        if rows.numel():
            self._group.recv(rows, sender, group=self._members)

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Return all processes as torch's FSDP knows them: by gloo on the CPU, by NCCL on GPUs."""
        from torch.distributed.device_mesh import DeviceMesh

        if self._mesh is not None:
            return self._mesh

        members = self._members
        if device.type == "cuda":
            with _talking():
                members = self._one_gpu_each(device)

        self._mesh = DeviceMesh.from_group(members, device.type)
        return self._mesh

    def _one_gpu_each(self, device: torch.device) -> Any:
        """Return a group that talks by NCCL, of which two members never share a GPU."""
        import torch

        here = processes_here()
        if here > torch.cuda.device_count():
            raise EnvironmentFailure(
                "processes-share-gpus",
                f"{here} processes share {torch.cuda.device_count()} GPUs of this machine",
                remedy="start one process for each GPU",
            )

        torch.cuda.set_device(device)
        return self._group.new_group(backend="nccl", timeout=_PATIENCE)

    @contextmanager
    def talking(self) -> Iterator[None]:
        """Say what a broken connection means where, in the body, torch itself talks to the others.

        It also computes there, and says other things with the same exception: those are let
        through.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _OF_CONNECTION.search(str(error)):
                raise
            raise _lost(error) from error

    def tell(self, value: T, owner: int = 0) -> T:
        """Return the value that one process has."""
        if self.count == 1:
            return value

        box = [value if self.rank == owner else None]
        with _talking():
            self._group.broadcast_object_list(box, owner, group=self._members)

        result: T = box[0]  # type: ignore[assignment]
        return result

    def ask_first(self, find: Callable[[], T]) -> T:
        """Return what the first process finds, where it alone has the files."""
        return self.tell(find() if self.first else None)  # type: ignore[return-value]

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
        """While the body runs, the others do the same job, if ``same`` is the same there too."""
        self._waiting = False
        self.tell((name, same, given))
        yield
        self._waiting = True

    def jobs(
        self, same: Callable[[str], Mapping[str, str]]
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield name and data of the first process's jobs until it has no more; for the others."""
        while (found := self.tell(_NO_JOB))[0]:
            name, wanted, given = found
            different = [key for key, value in same(name).items() if value != wanted[key]]

            if different:
                names = ", ".join(different)
                raise ArtifactError(
                    "processes-differ",
                    f"process {self.rank} is not like the first one; they differ in {names}",
                    remedy="give every machine the same model folder, "
                    "and the same racdeploy, torch and transformers",
                )

            yield name, given

    def each(self, do: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Return what the processes make of one item each, some idle; for the first process."""
        self.tell(items)
        return self.all(do(items[0]))[: len(items)]

    def serve(self, do: Callable[[Any], Any]) -> None:
        """Do the items of :meth:`each` until there are none. For the others."""
        while items := self.tell(()):
            idle = self.rank >= len(items)
            self.all(None if idle else do(items[self.rank]))

    def dismiss(self) -> None:
        """Let the others go, where they wait; for the first process, at its end."""
        if self.first and self._waiting:
            self.tell(_NO_JOB)


ALONE = Processes()


def processes_here() -> int:
    """Return how many processes of the job run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Yield the processes that torchrun started, or :data:`ALONE`."""
    is_set = all(os.environ.get(name) for name in _ENVIRONMENT)
    if not is_set or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return

    plugins.require("torch")
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
            processes._mesh = None
            processes._members = members = None  # gloo ends its threads here, not as we exit

    signal.signal(signal.SIGTERM, before)


@contextmanager
def _talking() -> Iterator[None]:
    """Turn a broken connection into an error that says what it means."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # gloo has no errors of its own
        raise _lost(error) from error


def _lost(error: Exception) -> EngineError:
    _ignore_terminate()
    reason = str(error).splitlines()[0].partition(". ")[0]
    return EngineError(
        "lost-process", f"lost another process of this job: {reason}", remedy=_REMEDY
    )


@contextmanager
def _on_cpu(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensor, or for a while its copy on the CPU: gloo broadcasts nothing else."""
    copy = tensor.cpu()
    yield copy
    if copy is not tensor:
        tensor.copy_(copy)


def _on_terminate(signum: int, frame: FrameType | None) -> None:
    _ignore_terminate()
    raise EnvironmentFailure(
        "stopped-by-torchrun",
        "stopped by torchrun, because another process of this job ended",
        remedy=_REMEDY,
    )


def _ignore_terminate() -> None:
    """Let no second signal of torchrun's break into the message and the clean end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
