"""Loading of bundles: choose an artifact, check it against the manifest, open the engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from racdeploy import engines, plugins
from racdeploy.engines.engine import Engine, EngineSettings
from racdeploy.errors import ArtifactError, UsageError
from racdeploy.files.sha256_cache import has_sha256, refuse_changed, take_states
from racdeploy.manifest import ArtifactEntry, GenerationSettings, Manifest, hash_error
from racdeploy.models.tokenizer_files import TOKENIZER_FILES
from racdeploy.packing import racgguf
from racdeploy.runtime.deployed import find_plain
from racdeploy.runtime.model import Model
from racdeploy.runtime.template import PromptEncoder
from racdeploy.sparse_kernels import AccelMode, accel_name


def load(
    bundle: str | Path,
    *,
    backend: str | None = None,
    threads: int = 0,
    parallel: int = 1,
    context_tokens: int | None = None,
    accel: AccelMode = "auto",
    memory_limit_bytes: int | None = None,
    dense: Path | None = None,
) -> Model:
    """Load a bundle and return the model.

    Args:
        bundle: folder that ``racdeploy build`` wrote, a GGUF file, or an ONNX file or folder with
            its tokenizer.json.
        backend: engine, if the bundle has artifacts for several; None takes the first.
        threads: 0 uses every core.
        parallel: maximum number of requests decoded together, from :meth:`Model.generate_many`,
            threads and tasks; each takes memory for a context. Further requests wait.
        context_tokens: maximum length of prompt and completion together; None takes the length that
            the bundle was verified with. More takes more memory.
        accel: kernels for sparse weights; ``auto`` uses them if they are built and tested.
        memory_limit_bytes: memory limit of the engine's process, without the engine itself and
            mapped files; 0 sets no limit, None derives one from files and context that no healthy
            model reaches. Linux only.
        dense: dense artifact of the bundle's build to run instead, which is not checked, with the
            dense model's tokenizer and without thinking control.

    Raises:
        ArtifactError: the folder is not a bundle, or a file differs from its manifest.
        UsageError: there is no artifact for that backend, or the context is too long for the model.
        MissingExtraError: the engine is not installed.
        EngineError: the engine cannot load the artifact.
    """
    folder = Path(bundle)
    plain = find_plain(folder)
    listed: Mapping[str, str] = {}
    if plain:
        artifact = _choose_artifact((plain.entry,), folder, backend)
        states = take_states(folder, listed)
        run_time = plain.settings
        file = plain.path
    else:
        manifest = Manifest.read(folder)
        artifact = _choose_artifact(manifest.artifacts, folder, backend)
        listed = artifact.files
        # Taken before the hashes are checked, so that any later change is detected.
        states = take_states(folder, listed)
        check_artifact_files(folder, manifest, artifact)
        run_time = (manifest.of_dense_model() if dense else manifest).run_time(artifact)
        file = folder / artifact.path
    if dense:
        file, accel = dense, "off"

    context_tokens = _choose_context(run_time.generation, context_tokens)
    settings = EngineSettings(
        context_tokens, parallel, threads, accel=accel, memory_limit_bytes=memory_limit_bytes
    )
    # A bundle's tokenizer is loaded while its engine is.
    tokenizer = folder / run_time.tokenizer.folder
    encoder = plain.encoder if plain else PromptEncoder.start_loading(tokenizer)
    engine = engines.open_engine(artifact.backend, file, settings)

    try:
        encoder.check()
        refuse_changed(folder, listed, states)
        if not (plain or dense):
            _check_configuration(engine, folder, artifact)
        return Model(run_time, encoder, engine, context_tokens)
    except BaseException:
        engine.close()
        encoder.tokenizer.close()
        raise


def _check_configuration(engine: Engine, folder: Path, artifact: ArtifactEntry) -> None:
    """Refuse a configuration that an engine used, and that is not listed with its hash."""
    if not (configuration := engine.info.get("configuration")):
        return

    used = Path(configuration)
    inside = Path(os.path.relpath(used, folder.resolve())).as_posix()
    expected = artifact.companions.get(inside)
    if expected is None:
        raise _refuse_file(used)
    if not has_sha256(used, expected):
        raise hash_error(used, expected)


def _choose_context(generation: GenerationSettings, context_tokens: int | None) -> int:
    """Return the context length to load; raise UsageError if the model does not support it."""
    if context_tokens is None:
        return generation.context_tokens

    max_tokens = generation.model_context_tokens
    if max_tokens is not None and context_tokens > max_tokens:
        raise UsageError(
            "context-beyond-model",
            f"context_tokens is {context_tokens}, and the model supports {max_tokens}",
            remedy=f"at most --context-tokens {max_tokens}; in Python context_tokens={max_tokens}",
        )
    return context_tokens


def check_artifact_files(folder: Path, manifest: Manifest, artifact: ArtifactEntry) -> None:
    """Compare all files to run with their hashes, and refuse unlisted files that would be used.

    A file that passed is not hashed again until it changes.
    """
    check_companion_files(folder, manifest, artifact)
    if artifact.packing == "plain":
        artifact.check_changed_files(folder)


def check_companion_files(folder: Path, manifest: Manifest, artifact: ArtifactEntry) -> None:
    """Compare the files beside an artifact with their hashes, and refuse unlisted ones.

    A plain artifact itself is not compared: verification judges its bytes. A packed one is, because
    a damaged one could not be unpacked.
    """
    manifest.check_tokenizer(folder)
    refuse_unlisted(folder, manifest)
    refuse_unlisted_parts(folder, artifact)

    if artifact.path.endswith(racgguf.SUFFIX):
        # Unpacking checks the content.
        sha256 = racgguf.Container.open(folder / artifact.path).sha256
        if sha256 != artifact.unpacked_sha256:
            raise hash_error(folder / artifact.path, artifact.unpacked_sha256)
    elif artifact.packing != "plain":
        artifact.check_changed_files(folder)


def refuse_unlisted(folder: Path, manifest: Manifest) -> None:
    """Raise ArtifactError for unlisted files that an engine or tokenizer would find by name."""
    unlisted = []
    for tokenizer in manifest.tokenizers:
        names = {str(tokenizer.folder / name) for name in TOKENIZER_FILES}
        unlisted += sorted(names - tokenizer.files.keys())

    for artifact in manifest.artifacts:
        unlisted += {accel_name(artifact.path)} - artifact.files.keys()

    for name in unlisted:
        if os.path.lexists(folder / name):
            raise _refuse_file(folder / name)


def refuse_unlisted_parts(folder: Path, artifact: ArtifactEntry) -> None:
    """Raise ArtifactError for unlisted files that an artifact consists of."""
    plugin = plugins.load("engines", artifact.backend)
    find_parts = getattr(plugin, "find_parts", lambda path: ())
    main = PurePosixPath(artifact.path)
    for name in sorted(find_parts(folder / main)):
        if str(main.parent / name) not in artifact.files:
            raise _refuse_file(folder / main.parent / name)


def _refuse_file(file: Path) -> ArtifactError:
    return ArtifactError(
        "file-not-listed",
        f"{file!s:.400} would be used, and the manifest does not list it",
        remedy="remove it, or copy the bundle again",
    )


def _choose_artifact(
    artifacts: Sequence[ArtifactEntry], folder: Path, backend: str | None
) -> ArtifactEntry:
    for entry in artifacts:
        if backend is None or entry.backend == backend:
            return entry

    offered = ", ".join(sorted({entry.backend for entry in artifacts}))
    raise UsageError(
        "no-artifact-for-engine",
        f"{folder} has no artifact for {backend!r}",
        remedy=f"it has one for: {offered}",
    )
