"""What the stages leave on disk, and how it is written: whole or not at all.

``Trace`` and ``TraceSet`` (token ids of prompts and completions), and the bundle's ``Manifest``. Every
file is written under a temporary name and renamed.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

try:
    import fcntl
except ImportError:  # Windows has no flock; what a killed process left half written stays there
    fcntl = None  # type: ignore[assignment]

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from racdeploy.checkpoint import file_sha256, read_json
from racdeploy.errors import ArtifactError, EnvironmentFailure, UsageError

__all__ = [
    "ArtifactEntry",
    "GenerationSettings",
    "Manifest",
    "TokenizerEntry",
    "Trace",
    "TraceSet",
    "atomic_file",
    "atomic_folder",
    "canonical_hash",
    "code_hash",
    "disk_errors",
    "refuse_another",
    "remove_leftovers",
    "write_atomic",
]

MANIFEST_NAME = "racdeploy.json"
IMPORTANCE_FILE = "importance.safetensors"  # of a pruned model: mean squared input of each column, by linear
Stream = Literal["prompt", "thinking", "answer"]
STREAMS: tuple[Stream, ...] = ("prompt", "thinking", "answer")
_WRITE_BYTES = 1 << 20  # the kernel takes one large piece in two thirds of the time of many small ones


def canonical_hash(value: object) -> str:
    """Return the SHA-256 of a JSON value with sorted keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def code_hash(units: Sequence[str]) -> str:
    """Return a hash over the code of units of racdeploy, files or folders: a stage that it made is not made again."""
    digest = hashlib.sha256()
    root = Path(str(files("racdeploy")))
    for unit in units:
        place = root / unit
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full, read-only or otherwise unwilling disk into an error with a remedy."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write {where}: {error.strerror}",
            remedy=f"free some space or choose another place than {where.parent}, then run the same command",
        ) from error


@contextlib.contextmanager
def atomic_file(file: Path) -> Iterator[BinaryIO]:
    """Yield a stream; what was written takes the name ``file`` when the body succeeds, and is on the disk then.

    The partial file has this process's number in its name, so that two processes may write the same file. It is locked.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with disk_errors(file):
        try:
            with partial.open("wb", buffering=_WRITE_BYTES) as stream:
                if fcntl:
                    with contextlib.suppress(OSError):  # not every file system has locks
                        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def remove_leftovers(file: Path) -> None:
    """Remove partial files of :func:`atomic_file` whose processes were killed.

    Those of another machine or container have no process here, so the lock must be free too; where one cannot be told,
    the file stays.
    """
    if fcntl is None:
        return
    for partial in file.parent.glob(f".{glob.escape(file.name)}.*.partial"):
        number = partial.name[len(file.name) + 2 : -len(".partial")]
        if re.fullmatch("[0-9]{1,9}", number) and not _runs(int(number)):
            with contextlib.suppress(OSError), partial.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def write_atomic(file: Path, content: bytes | str) -> None:
    """Write a file so that it is whole or absent."""
    with atomic_file(file) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder that takes the name ``folder`` when the body succeeds.

    An older folder of that name is replaced only then, so the name never holds half a result.
    """
    scratch = folder.with_name(f".{folder.name}.partial")
    retired = folder.with_name(f".{folder.name}.old")
    with disk_errors(folder):
        try:
            if retired.exists() and not folder.exists():  # killed between the two renames below
                retired.replace(folder)
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            yield scratch
            if folder.exists():
                folder.replace(retired)
            scratch.replace(folder)
        finally:
            if retired.exists() and not folder.exists():
                retired.replace(folder)
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.rmtree(retired, ignore_errors=True)


@dataclass(frozen=True)
class Trace:
    """A prompt and the model's completion of it, as token ids.

    Args:
        index: place in the trace set.
        task: specification of the task that asked.
        question, gold: the problem.
        prompt_ids: rendered prompt.
        completion_ids: sampled ids, end-of-sequence included.
        answer_from: index in ``completion_ids`` of the first token after the close tag, or None if never closed.
        thinking_tokens: tokens strictly between the tags.
        truncated: the completion hit a cap.
        correct: the task's score of the answer.
    """

    index: int
    task: str
    question: str
    gold: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    answer_from: int | None
    thinking_tokens: int
    truncated: bool
    correct: bool

    def streams(self) -> list[int]:
        """Return, for every token, the index of its stream in ``STREAMS``."""
        close = len(self.completion_ids) if self.answer_from is None else self.answer_from
        rest = len(self.completion_ids) - close
        return [0] * len(self.prompt_ids) + [1] * close + [2] * rest

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and completion."""
        return self.prompt_ids + self.completion_ids


@dataclass(frozen=True)
class TraceSet:
    """A folder of append-only trace shards with a manifest."""

    folder: Path

    def shard(self, number: int) -> Path:
        """Path of a shard."""
        return self.folder / f"shard-{number:05d}.jsonl"

    def append(self, number: int, traces: Sequence[Trace]) -> None:
        """Write one shard, whole or not at all."""
        lines = (json.dumps(asdict(trace), separators=(",", ":")) + "\n" for trace in traces)
        write_atomic(self.shard(number), "".join(lines))

    @property
    def sha256(self) -> str:
        """Hash over the contents of every shard, in order."""
        digest = hashlib.sha256()
        for file in sorted(self.folder.glob("shard-*.jsonl")):
            digest.update(file_sha256(file).encode())
        return digest.hexdigest()

    def read(self) -> list[Trace]:
        """Return every trace in order.

        Raises:
            ArtifactError: a shard is damaged.
        """
        return [t for file in sorted(self.folder.glob("shard-*.jsonl")) for t in self.read_shard(file)]

    @staticmethod
    def read_shard(file: Path) -> list[Trace]:
        """Return the traces of one shard.

        Raises:
            ArtifactError: the shard is damaged.
        """
        traces = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                values = json.loads(line)
                values["prompt_ids"] = tuple(map(int, values["prompt_ids"]))
                values["completion_ids"] = tuple(map(int, values["completion_ids"]))
                traces.append(Trace(**values))
            except (json.JSONDecodeError, TypeError, KeyError, ValueError) as error:
                raise ArtifactError(
                    f"{file}:{number} is damaged: {error}", remedy=f"remove {file} and run the command again"
                ) from error
        return traces


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ArtifactEntry(_Entry):
    """One exported artifact of a bundle; ``path`` is its main file, relative to the bundle.

    ``files`` are the hashes of all its files by their path in the bundle; a manifest that was written before artifacts
    could be several files has none, and means the main file. ``size_bytes`` is of those that every engine
    opens: not of the second graph of packing ``bitmask_op``. ``unpacked_sha256`` is that of the file that a packed one
    stands for, empty where nothing is packed.
    """

    path: str
    format: str
    quant: str
    packing: str
    size_bytes: int = Field(ge=0)
    sha256: str
    backend: str
    unpacked_sha256: str = ""
    files: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fill_files(self) -> Self:
        if not self.files:
            object.__setattr__(self, "files", {self.path: self.sha256})
        return self

    def check(self, bundle: Path) -> None:
        """Compare every file of the artifact with its hash.

        Raises:
            ArtifactError: naming the first file that differs.
        """
        _check_hashes(bundle, self.files)


class TokenizerEntry(_Entry):
    """Tokenizer files with their hashes, thinking tags and end-of-sequence ids."""

    files: dict[str, str]
    template_sha256: str
    open_tag: str | None
    close_tag: str | None
    eos_ids: tuple[int, ...]


class GenerationSettings(_Entry):
    """How to run the model: the sampling its authors recommend, and the limits it was verified with."""

    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    max_new_tokens: int = Field(ge=1)
    max_thinking_tokens: int | None = Field(default=None, ge=1)
    context_tokens: int = Field(ge=1)


class Manifest(_Entry):
    """``racdeploy.json``: everything a device needs to run a bundle, and what was measured.

    ``base`` holds model, revision, licence and file hashes; ``recipe`` the resolved recipe; ``traces`` hash and
    counts; ``pruning`` the headline sparsity and error; ``verdict`` and ``headline`` the result of the verification.
    """

    schema_version: Literal[1] = 1
    racdeploy_version: str
    base: dict[str, Any]
    recipe: dict[str, Any]
    traces: dict[str, Any]
    pruning: dict[str, Any]
    artifacts: tuple[ArtifactEntry, ...] = Field(min_length=1)
    tokenizer: TokenizerEntry
    generation: GenerationSettings
    verdict: str
    headline: dict[str, Any]

    @classmethod
    def read(cls, bundle: Path) -> Manifest:
        """Read and check the manifest of a bundle; its paths stay inside the bundle and exist.

        Raises:
            ArtifactError: not a bundle, a damaged manifest, or a path that escapes.
        """
        file = bundle / MANIFEST_NAME
        if not file.is_file():
            raise ArtifactError(
                f"{bundle} is not a bundle: it has no {MANIFEST_NAME}",
                remedy="give the folder that racdeploy build wrote with --out",
            )
        try:
            manifest = cls.model_validate(read_json(file))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ArtifactError(f"{file}: {where}: {first['msg']}", remedy="build the bundle again") from error
        for entry in manifest.artifacts:
            for name in (entry.path, *entry.files):
                _check_inside(bundle, name)
            if entry.files.get(entry.path) != entry.sha256:
                raise ArtifactError(f"{file}: the files of {entry.path!r} lack it, or have another hash for it")
        for name in manifest.tokenizer.files:
            _check_inside(bundle, name)
        return manifest

    def check_tokenizer(self, bundle: Path) -> None:
        """Compare tokenizer and template files with their hashes.

        Raises:
            ArtifactError: naming the first file that differs.
        """
        _check_hashes(bundle, self.tokenizer.files)

    def check_files(self, bundle: Path) -> None:
        """Compare every listed file with its hash.

        Raises:
            ArtifactError: naming the first file that differs.
        """
        for entry in self.artifacts:
            entry.check(bundle)
        _check_hashes(bundle, self.tokenizer.files)


def _check_hashes(bundle: Path, listed: Mapping[str, str]) -> None:
    for name, expected in listed.items():
        if file_sha256(bundle / name) != expected:
            raise ArtifactError(
                f"{bundle / name} differs from its manifest: SHA-256 is not {expected[:16]}…",
                remedy="copy the bundle again, or build it again",
            )


def _check_inside(bundle: Path, name: str) -> None:
    path = (bundle / name).resolve()
    if not path.is_relative_to(bundle.resolve()):
        raise ArtifactError(f"{bundle / MANIFEST_NAME} names a path outside the bundle: {name!r}")
    if not path.is_file():
        raise ArtifactError(f"{path} is listed in the manifest and missing", remedy="copy the bundle again")


def refuse_another(path: Path, sha256: str) -> None:
    """Refuse to write where another file than the one to be written lies.

    Raises:
        UsageError: there is one.
    """
    if path.exists() and not (path.is_file() and file_sha256(path) == sha256):
        raise UsageError(f"{path} is there and is not that file", remedy="remove it, or name another one with --out")
