"""Process group of a job that torchrun started: division of work, sums and broadcasts.

The first process runs the command and has the files; the others take part in each of its jobs.
Whole batches are distributed and their products summed in float64: on equal processors with equal
threads, the result is that of a single process, bit for bit.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from racdeploy import plugins
from racdeploy.errors import ArtifactError, EngineError, EnvironmentFailure
from racdeploy.pruning.heartbeat import choose_interface, watch_processes

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
R = TypeVar("R")
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_START_TIMEOUT = timedelta(minutes=10)
_CONNECTION_ERROR = re.compile("gloo|nccl|Dist(Network|Store)Error", re.IGNORECASE)
_TIMEOUT = timedelta(days=7)  # the first exports and verifies meanwhile; a loss shows at once
_REMEDY = (
    "the first error above is the cause; "
    "run the same command again, it resumes at the first missing block"
)


@dataclass(frozen=True)
class _Announcement:
    """Job of the first process, and facts that must be equal in all processes."""

    request: Any
    facts: Mapping[str, str]


_NO_JOB: _Announcement | None = None


class ProcessGroup:
    """All processes of a job, seen from the one with this ``rank``; a single one sends nothing."""

    def __init__(
        self, rank: int = 0, world_size: int = 1, group: Any = None, members: Any = None
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._group, self._members = group, members
        self._mesh: DeviceMesh | None = None
        self._others_wait = True  # for a job

    @property
    def is_first(self) -> bool:
        """True in the process that runs the command and has the files."""
        return self.rank == 0

    def assign_owners(self, costs: Sequence[int]) -> list[int]:
        """Return a process for each work item: largest first, each to the least loaded one."""
        loads = [0] * self.world_size
        owners = [0] * len(costs)
        largest_first = sorted(range(len(costs)), key=lambda index: -costs[index])
        for index in largest_first:
            owner = loads.index(min(loads))
            owners[index] = owner
            loads[owner] += costs[index]
        return owners

    def reduce(self, tensor: Tensor, owners: Sequence[int] = ()) -> None:
        """Add up a tensor in place, in its owners or in all processes; undefined elsewhere."""
        if self.world_size == 1:
            return

        with _on_cpu(tensor) as message:
            if len(set(owners)) == 1:
                self._group.reduce(message, owners[0], group=self._members)
            else:
                self._group.all_reduce(message, group=self._members)

    def broadcast(self, tensor: Tensor, owner: int = 0) -> Tensor:
        """Return the tensor of one process; others pass one of the same shape and dtype."""
        if self.world_size == 1:
            return tensor

        received = tensor.clone()
        with _on_cpu(received) as message:
            self._group.broadcast(message, owner, group=self._members)

        return received

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, in rank order, to the first; others get their own."""
        if self.world_size == 1:
            return rows

        import torch

        counts = self.all_gather(len(rows))
        parts = [rows.detach().cpu().contiguous()]

        if not self.is_first:
            self._send(parts[0], 0)
            return rows

        for other in range(1, self.world_size):
            part = parts[0].new_empty((counts[other], *rows.shape[1:]))
            self._receive(part, other)
            parts.append(part)

        return torch.cat(parts)

    def scatter_rows(self, all_rows: Tensor | None, rows: Tensor) -> Tensor:
        """Return this process's rows of a tensor of the first one, as many as ``rows`` has.

        ``all_rows``: the tensor, in the first process; None in the others.
        """
        import torch

        counts = self.all_gather(len(rows))

        if all_rows is None:
            own_rows = rows.detach().cpu().clone()
            self._receive(own_rows, 0)
            return own_rows

        own_rows, *other_parts = torch.split(all_rows, counts)
        for other, part in enumerate(other_parts, 1):
            self._send(part.contiguous(), other)
        return own_rows

    def _send(self, rows: Tensor, receiver: int) -> None:
        if rows.numel():
            self._group.send(rows, receiver, group=self._members)

    def _receive(self, rows: Tensor, sender: int) -> None:
        if rows.numel():
            self._group.recv(rows, sender, group=self._members)

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Return the device mesh of all processes for FSDP: gloo on the CPU, NCCL on GPUs."""
        from torch.distributed.device_mesh import DeviceMesh

        if self._mesh is not None:
            return self._mesh

        members = self._members
        if device.type == "cuda":
            import torch

            count, gpus = count_local_processes(), torch.cuda.device_count()
            if count > gpus:
                raise EnvironmentFailure(
                    "processes-share-gpus",
                    f"{count} processes share {gpus} GPUs of this machine",
                    remedy="start one process for each GPU",
                )

            torch.cuda.set_device(device)
            members = self._group.new_group(backend="nccl", timeout=_TIMEOUT)

        self._mesh = DeviceMesh.from_group(members, device.type)
        return self._mesh

    def broadcast_object(self, value: T, owner: int = 0) -> T:
        """Return the object of one process, in all of them."""
        if self.world_size == 1:
            return value

        box = [value if self.rank == owner else None]
        self._group.broadcast_object_list(box, owner, group=self._members)

        result: T = box[0]  # type: ignore[assignment]
        return result

    def run_on_first(self, function: Callable[[], T]) -> T:
        """Call a function in the first process, which has the files; return its result in all."""
        return self.broadcast_object(function() if self.is_first else None)  # type: ignore[return-value]

    def all_gather(self, value: T) -> list[T]:
        """Return the objects of all processes, in rank order."""
        if self.world_size == 1:
            return [value]

        values: list[Any] = [None] * self.world_size
        self._group.all_gather_object(values, value, group=self._members)

        return values

    @contextmanager
    def announce_job(self, request: object, facts: Mapping[str, str]) -> Iterator[None]:
        """Have the other processes do the same job while the body runs.

        Args:
            request: the job, a record that can be pickled.
            facts: facts that must be equal in all processes, as hashes of model and code.
        """
        self._others_wait = False
        self.broadcast_object(_Announcement(request, facts))
        yield
        self._others_wait = True

    def receive_jobs(self, describe: Callable[[R], Mapping[str, str]]) -> Iterator[R]:
        """Yield the requests of the first process until it has no more, in the others.

        Args:
            describe: returns the facts on a request's job in this process.

        Raises:
            ArtifactError: a fact differs from that of the first process.
        """
        while job := self.broadcast_object(_NO_JOB):
            own = describe(job.request)
            different = [name for name, value in own.items() if value != job.facts[name]]

            if different:
                names = ", ".join(different)
                raise ArtifactError(
                    "processes-differ",
                    f"process {self.rank} is not like the first one; they differ in {names}",
                    remedy="give every machine the same model folder, "
                    "and the same racdeploy, torch and transformers",
                )

            yield job.request

    @contextmanager
    def share_calls(self, function: Callable[[T], R]) -> Iterator[Callable[[Sequence[T]], list[R]]]:
        """Yield a function that calls ``function`` for one item in each process.

        It takes at most as many items as there are processes. For the first process, while the
        others :meth:`serve_calls`.
        """

        def call(items: Sequence[T]) -> list[R]:
            self.broadcast_object(items)
            return self.all_gather(function(items[0]))[: len(items)]

        yield call
        self.broadcast_object(())

    def serve_calls(self, function: Callable[[Any], Any]) -> None:
        """Take part in :meth:`share_calls` until it ends, in the other processes."""
        while items := self.broadcast_object(()):
            idle = self.rank >= len(items)
            self.all_gather(None if idle else function(items[self.rank]))

    def set_threads(self, threads: int) -> None:
        """Use the first process's number of threads; with another one, sums round differently."""
        import torch

        torch.set_num_threads(self.broadcast_object(threads or torch.get_num_threads()))

    def dismiss(self) -> None:
        """Tell waiting processes that there are no more jobs; in the first process, at its end."""
        if self.is_first and self._others_wait:
            self.broadcast_object(_NO_JOB)


SINGLE_PROCESS = ProcessGroup()


def count_local_processes() -> int:
    """Return the number of processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def join_process_group() -> Iterator[ProcessGroup]:
    """Yield the processes that torchrun started, or :data:`SINGLE_PROCESS`."""
    is_set = all(os.environ.get(name) for name in _ENVIRONMENT)
    if not is_set or os.environ["WORLD_SIZE"] == "1":
        yield SINGLE_PROCESS
        return

    plugins.require_package("torch")
    import torch.distributed as group
    from torch.distributed.rendezvous import rendezvous

    before = signal.signal(signal.SIGTERM, _on_terminate)

    with _explain_loss():
        # The heartbeat's own store: a call that waits keeps all other calls of its store waiting.
        store, rank, world_size = next(rendezvous("env://", timeout=_START_TIMEOUT))
        hosts = choose_interface(store, rank, world_size)

    with watch_processes(store, rank, hosts), _explain_loss():
        group.init_process_group("gloo", timeout=_START_TIMEOUT)
        members = group.new_group(timeout=_TIMEOUT)
        processes = ProcessGroup(rank, world_size, group, members)

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
                processes._members = members = None  # end gloo's threads here, not at exit

    signal.signal(signal.SIGTERM, before)


@contextmanager
def _explain_loss() -> Iterator[None]:
    """Turn an error of gloo, NCCL or torchrun's store into one that says what was lost.

    None of them has an exception of its own that can be relied on.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not _CONNECTION_ERROR.search(f"{type(error)} {error}"):
            raise
        _ignore_terminate()
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise EngineError(
            "lost-process", f"lost another process of this job: {reason}", remedy=_REMEDY
        ) from error


@contextmanager
def _on_cpu(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensor, or a copy on the CPU that is written back: gloo needs CPU tensors."""
    copy = tensor.cpu()
    yield copy
    if copy is not tensor:
        tensor.copy_(copy)


def _on_terminate(*_: object) -> None:
    _ignore_terminate()
    raise EnvironmentFailure(
        "stopped-by-torchrun",
        "stopped by torchrun, because another process of this job ended",
        remedy=_REMEDY,
    )


def _ignore_terminate() -> None:
    """Ignore a second signal of torchrun, which would interrupt the message and the clean end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
