"""Load a bundle: choose its artifact, compare it with the manifest, open the engine."""

from __future__ import annotations

import os
from pathlib import Path

from racdeploy import engines
from racdeploy.engines.engine import EngineSettings
from racdeploy.errors import ArtifactError, UsageError
from racdeploy.files.checked import State, file_state
from racdeploy.manifest import ArtifactEntry, Manifest, ThinkingControl
from racdeploy.models.tokenizer_files import TOKENIZER_FILES
from racdeploy.packing import racgguf
from racdeploy.packing.raconnx import sidecar_name
from racdeploy.packing.sparse_matrix import accel_name
from racdeploy.runtime.model import Model
from racdeploy.runtime.template import PromptEncoder
from racdeploy.sparse_kernels import Mode


def load(
    bundle: str | Path,
    *,
    backend: str | None = None,
    threads: int = 0,
    parallel: int = 1,
    context_tokens: int | None = None,
    accel: Mode = "auto",
    memory_limit_bytes: int | None = None,
) -> Model:
    """Load a bundle.

    Args:
        bundle: folder that ``racdeploy build`` wrote.
        backend: engine to use where the bundle has artifacts for several; None takes the first.
        threads: 0 uses every core.
        parallel: requests that are decoded together, of :meth:`Model.generate_many`, threads and
            tasks; each takes memory for a context. More wait for their turn.
        context_tokens: longest prompt and completion together; None takes what the bundle was
            verified with. It takes memory, and the model is made for a limited number.
        accel: kernels for sparse weights; ``auto`` uses them where they are built and proven.
        memory_limit_bytes: what the model may take in its engine's process, beside the engine and
            files that are mapped; 0 sets no limit, None one by its files and its context, which no
            healthy model reaches. Linux alone has it.

    Raises:
        ArtifactError: not a bundle, or what runs is not what its manifest lists.
        UsageError: it has no artifact for that backend, or the model is made for less context.
        MissingExtraError: the engine is not installed.
        EngineError: the engine cannot load the artifact.
    """
    folder = Path(bundle)
    manifest = Manifest.read(folder)
    artifact = _choose_artifact(manifest, folder, backend)
    states = _read_states(folder, artifact)
    check_what_runs(folder, manifest, artifact)

    context_tokens = _choose_context(manifest, context_tokens)
    settings = EngineSettings(
        context_tokens, parallel, threads, accel=accel, memory_limit_bytes=memory_limit_bytes
    )
    model = _open(folder, manifest, artifact.backend, folder / artifact.path, settings)

    try:
        _check_what_ran(folder, artifact, model, states)
    except BaseException:
        model.close()
        raise
    return model


def _check_what_ran(
    folder: Path, artifact: ArtifactEntry, model: Model, states: list[State]
) -> None:
    """Refuse what was replaced while it was loaded, or was used and is not as it is listed."""
    if states != _read_states(folder, artifact):
        raise ArtifactError(
            "artifact-changed",
            f"{folder / artifact.path} changed while it was loaded",
            remedy="wait until it is copied, then load it again",
        )

    if configuration := model.engine.about.get("configuration"):
        artifact.check_companion(folder, Path(configuration))


def load_dense(
    bundle: str | Path,
    dense: Path,
    *,
    threads: int,
    parallel: int,
    context_tokens: int | None,
) -> Model:
    """Load the dense artifact that a bundle was compared with in the place of the pruned one.

    It has the dense model's tokenizer, and nothing is done about its thinking. The other arguments
    and errors are those of :func:`load`; whether the file is that artifact is not looked at.
    """
    folder = Path(bundle)
    manifest = Manifest.read(folder)
    manifest.check_tokenizer(folder)

    free = {"max_thinking_tokens": None, "thinking": ThinkingControl()}
    changed = {
        "tokenizer": manifest.dense_tokenizer or manifest.tokenizer,
        "generation": manifest.generation.model_copy(update=free),
    }
    settings = EngineSettings(_choose_context(manifest, context_tokens), parallel, threads)
    backend = manifest.artifacts[0].backend
    return _open(folder, manifest.model_copy(update=changed), backend, dense, settings)


def _open(
    folder: Path, manifest: Manifest, backend: str, file: Path, settings: EngineSettings
) -> Model:
    encoder = PromptEncoder.begin(folder / manifest.tokenizer.place)  # while the engine loads
    engine = engines.open_engine(backend, file, settings)

    try:
        encoder.check()
        return Model(manifest, encoder, engine, settings.context_tokens)
    except BaseException:
        engine.close()
        raise


def _choose_context(manifest: Manifest, asked: int | None) -> int:
    """Return the context to load a model with; one that it is not made for is refused."""
    generation = manifest.generation
    if asked is None:
        return generation.context_tokens

    most = generation.model_context_tokens
    if most is not None and asked > most:
        raise UsageError(
            "context-beyond-model",
            f"context_tokens is {asked}, and the model is made for {most}",
            remedy=f"racdeploy.load(…, context_tokens={most})",
        )
    return asked


def check_what_runs(folder: Path, manifest: Manifest, artifact: ArtifactEntry) -> None:
    """Compare every file that runs with its hash, and refuse what is not listed and would be used.

    A large file that has passed is not read again until it changes.
    """
    check_beside(folder, manifest, artifact)
    if artifact.packing == "plain":
        artifact.check_once(folder)


def check_beside(folder: Path, manifest: Manifest, artifact: ArtifactEntry) -> None:
    """Compare what is used beside a plain artifact, whose bytes are for a verification to judge.

    A packed artifact is compared, too: what is wrong in it could not be unpacked.
    """
    manifest.check_tokenizer(folder)
    refuse_unlisted(folder, manifest)

    if artifact.path.endswith(racgguf.SUFFIX):
        _check_container(folder, artifact)
    elif artifact.packing != "plain":
        artifact.check_once(folder)


def refuse_unlisted(folder: Path, manifest: Manifest) -> None:
    """Refuse files that would be found by their names, though the manifest does not know them."""
    unlisted = []
    for tokenizer in manifest.tokenizers:
        names = {str(tokenizer.place / name) for name in TOKENIZER_FILES}
        unlisted += sorted(names - tokenizer.files.keys())

    for artifact in manifest.artifacts:
        second = accel_name(artifact.path)
        names = {second, sidecar_name(artifact.path), sidecar_name(second)}
        unlisted += sorted(names - artifact.files.keys())

    for name in unlisted:
        if os.path.lexists(folder / name):
            raise ArtifactError(
                "file-not-listed",
                f"{folder / name} would be used, and the manifest does not list it",
                remedy="remove it, or copy the bundle again",
            )


def _read_states(folder: Path, artifact: ArtifactEntry) -> list[State]:
    return [file_state(folder / name) for name in artifact.files]


def _check_container(folder: Path, artifact: ArtifactEntry) -> None:
    """Compare what a container holds with the manifest; it is checked as it is unpacked."""
    found = racgguf.Container.open(folder / artifact.path).sha256
    if found != artifact.unpacked_sha256:
        raise ArtifactError(
            "differs-from-manifest",
            f"{folder / artifact.path} holds a file with SHA-256 {found[:16]}…, its manifest says "
            f"{artifact.unpacked_sha256[:16]}…",
            remedy="copy the bundle again, or build it again",
        )


def _choose_artifact(manifest: Manifest, folder: Path, backend: str | None) -> ArtifactEntry:
    for entry in manifest.artifacts:
        if backend is None or entry.backend == backend:
            return entry

    offered = ", ".join(sorted({entry.backend for entry in manifest.artifacts}))
    raise UsageError(
        "no-artifact-for-engine",
        f"{folder} has no artifact for {backend!r}",
        remedy=f"it has one for: {offered}",
    )
