"""Models that racdeploy did not build: a GGUF file, an ONNX folder or a model folder.

Template, thinking tags, end-of-sequence, context and advised sampling are read from the model
itself. So what asks the model of a bundle asks these, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from racdeploy import plugins
from racdeploy.engines.engine import Ids
from racdeploy.errors import ArtifactError
from racdeploy.files.reading import Json, artifact_errors, read_json
from racdeploy.files.writing import file_sha256
from racdeploy.manifest import (
    MANIFEST_NAME,
    MAX_TOKENS,
    ArtifactEntry,
    GenerationSettings,
    Manifest,
    RunTimeSettings,
    TokenizerEntry,
)
from racdeploy.models.sources import fetch_gguf
from racdeploy.models.tokenizer_files import find_token_ids
from racdeploy.runtime.gguf_encoder import GgufEncoder
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, encode_tags, find_tag_names
from racdeploy.tensors.ggml_types import TYPES_BY_ID
from racdeploy.tensors.gguf_header import read_header

_CONTEXT_TOKENS = 4096  # to load a model with: its longest context may take all memory
_GRAPHS = ("model.onnx", "onnx/model.onnx", "onnx/model_q4.onnx", "onnx/model_quantized.onnx")


@dataclass(frozen=True)
class DeployedModel:
    """A model and what is needed to ask it: its settings, file, tokenizer and template.

    Args:
        path: file or folder that its engine opens.
        eos_id: end-of-sequence that the file names; None if it names none.
        manifest: of a bundle; None for any other model.
        files: all files of the weights; empty for a bundle, whose manifest lists them.
        url: set for a model behind a server, whose texts are counted in another model's tokens.
    """

    settings: RunTimeSettings
    path: Path
    encoder: PromptEncoder
    eos_id: int | None
    manifest: Manifest | None = None
    files: tuple[Path, ...] = ()
    url: str = ""

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def entry(self) -> ArtifactEntry:
        """Its artifact; that of a plain model has no hashes."""
        return self.settings.artifact

    def renamed(self, name: str) -> DeployedModel:
        """Return the model under another name, for a report of several."""
        return replace(self, settings=replace(self.settings, name=name))

    @property
    def tags(self) -> ThinkingTags | None:
        tokenizer = self.settings.tokenizer
        return encode_tags(self.encoder, tokenizer.open_tag, tokenizer.close_tag)

    @property
    def context_limit(self) -> int:
        """Longest context in tokens that the model is made for."""
        return self.settings.generation.model_context_tokens or MAX_TOKENS

    @property
    def file(self) -> Path:
        """Main file, or the first of a folder."""
        return self.path if self.path.is_file() else self.files[0]

    def hash_files(self) -> dict[str, str]:
        """Return the SHA-256 of each file by its path from the main file's folder.

        Of a bundle they are those that its manifest records.
        """
        if self.url:
            return {}
        if self.files:
            return {file.name: file_sha256(file) for file in self.files}
        folder = PurePosixPath(self.entry.path).parent
        return {
            PurePosixPath(name).relative_to(folder).as_posix(): sha256
            for name, sha256 in self.entry.files.items()
        }


def find_model(source: Path) -> DeployedModel:
    """Return the model of a bundle, a plain file, or a folder of transformers.

    Raises:
        ArtifactError: it is none of these, or lacks a tokenizer or chat template.
    """
    if found := find_plain(source):
        return found
    if (source / "config.json").is_file() and not (source / MANIFEST_NAME).is_file():
        return _open_folder(source, "transformers")
    return open_bundle(source, Manifest.read(source))


def find_plain(source: Path) -> DeployedModel | None:
    """Return the model of a .gguf file (of a split model the first), or of an ONNX file or folder.

    ``ORG/NAME:QUANT`` is a file of the Hub. None for anything else, such as a bundle.
    """
    source = fetch_gguf(source)
    if (source / MANIFEST_NAME).is_file():
        return None
    if source.suffix == ".gguf" and source.is_file():
        return _open_gguf(source)
    graph = source if source.suffix == ".onnx" else find_graph(source)
    return _open_folder(graph, "onnxruntime") if graph is not None and graph.is_file() else None


def find_served(url: str, counting: DeployedModel) -> DeployedModel:
    """Return the model behind ``http://HOST:PORT/v1#NAME``; the server's only one without a name.

    Args:
        counting: model whose tokenizer, template and tags the server's texts are read with.
    """
    entry = counting.entry.model_copy(update={"backend": "server", "quant": "", "size_bytes": 0})
    settings = RunTimeSettings(
        name=url,
        artifact=entry,
        tokenizer=counting.settings.tokenizer,
        generation=counting.settings.generation.without_control(),  # it is the server's task
    )
    return replace(counting, settings=settings, manifest=None, url=url)


def is_url(source: str) -> bool:
    """Return whether a model is behind a server."""
    return source.startswith(("http://", "https://"))


def open_bundle(folder: Path, manifest: Manifest) -> DeployedModel:
    """Return the first artifact of a bundle."""
    entry = manifest.artifacts[0]
    encoder = PromptEncoder.from_folder(folder / manifest.tokenizer.folder)
    eos_id = next(iter(manifest.tokenizer.eos_ids), None)
    settings = manifest.run_time(entry)
    return DeployedModel(settings, folder / entry.path, encoder, eos_id, manifest=manifest)


def _open_gguf(file: Path) -> DeployedModel:
    header = read_header(file)
    metadata = header.metadata
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise ArtifactError(
            "no-model-in-file",
            f"{file} is a GGUF file of type {kind!r:.100}, not of a model",
            remedy="name the file of the model: a pattern such as *.gguf matches others, too",
        )

    encoder = GgufEncoder.from_file(file)
    info = encoder.tokenizer.info

    bytes_by_type: dict[int, int] = {}
    for tensor in header.tensors:
        size_bytes = bytes_by_type.get(tensor.ggml_type, 0) + tensor.size_bytes
        bytes_by_type[tensor.ggml_type] = size_bytes
    main_type = TYPES_BY_ID.get(max(bytes_by_type, key=bytes_by_type.__getitem__, default=-1))

    plain = _PlainModel(
        path=file,
        name=file.name,
        encoder=encoder,
        quant=main_type.name if main_type else "unknown",
        format="gguf",
        backend="llamacpp",
        stop_ids=tuple(info["stop_ids"]),
        eos_id=info["eos_id"] if info["eos_id"] >= 0 else None,
        context=metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        temperature=metadata.get("general.sampling.temp"),
        top_p=metadata.get("general.sampling.top_p"),
    )
    return plain.deploy()


def _list_weights(path: Path, backend: str) -> list[Path]:
    """Return all files of a plain model, which may be split or have its data beside it."""
    if path.is_dir():
        return sorted(path.glob("*.safetensors"))
    names = sorted({path.name, *plugins.load("engines", backend).find_parts(path)})
    if outside := [name for name in names if Path(name).name != name]:
        raise ArtifactError(
            "weights-elsewhere",
            f"{path} would read {outside[0]!r:.400}, which is not beside it",
            remedy="save the model with its data in one folder",
        )
    return [path.with_name(name) for name in names]


def find_graph(folder: Path) -> Path | None:
    """Return the graph of an ONNX folder: by onnxruntime-genai's config, by name, or the only."""
    config = folder / "genai_config.json"
    name: Any = read_json(config) if config.is_file() else {}
    for key in ("model", "decoder", "filename"):
        name = name.get(key, {}) if isinstance(name, dict) else {}

    names = list(_GRAPHS)
    if isinstance(name, str):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ArtifactError(
                "weights-elsewhere",
                f"{config} names the graph {name!r:.400}, which is not in its folder",
                remedy="save the model with its graph in one folder",
            )
        names = [name]

    graphs = [folder / name for name in names if (folder / name).is_file()]
    return next(iter([*graphs, *sorted(folder.glob("*.onnx"))]), None)


def _open_folder(path: Path, backend: str) -> DeployedModel:
    """Return a model whose tokenizer and configs lie beside its graph, or one folder above."""
    folder = path if path.is_dir() else path.parent
    if not (folder / "tokenizer.json").is_file() and (folder.parent / "tokenizer.json").is_file():
        folder = folder.parent

    configs: list[Json] = []
    for name in ("genai_config.json", "generation_config.json", "config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            inner = content.get("model")
            configs.append({**content, **inner} if isinstance(inner, dict) else content)

    encoder = PromptEncoder.from_folder(folder)
    stop_ids = next(filter(None, (find_token_ids(config, "eos") for config in configs)), [])
    if not stop_ids:
        raise ArtifactError(
            "no-eos-in-folder",
            f"{folder} names no end-of-sequence, so no answer would end",
            remedy="copy generation_config.json and config.json of the model beside its tokenizer",
        )

    def find(*keys: str) -> object:
        return next((c[key] for c in configs for key in keys if key in c), None)

    quant = str(find("torch_dtype", "dtype") or "unknown") if path.is_dir() else "unknown"
    plain = _PlainModel(
        path=path,
        name=path.name if path.is_dir() else folder.name,
        encoder=encoder,
        quant=quant,
        format=path.suffix[1:] or "safetensors",
        backend=backend,
        stop_ids=tuple(stop_ids),
        eos_id=stop_ids[0],
        context=find("context_length", "max_position_embeddings"),
        temperature=find("temperature"),
        top_p=find("top_p"),
    )
    return plain.deploy()


@dataclass(frozen=True, kw_only=True)
class _PlainModel:
    """A model as its own files describe it.

    Args:
        path: file or folder that its engine opens.
        context: tokens of its longest context; any value, as the two below.
        temperature, top_p: advised for sampling.
    """

    path: Path
    name: str
    encoder: PromptEncoder
    quant: str
    format: str
    backend: str
    stop_ids: Ids
    eos_id: int | None
    context: object
    temperature: object
    top_p: object

    def deploy(self) -> DeployedModel:
        """Return a plain model with the settings that it advises."""
        with artifact_errors(self.path):  # the names of its data files are a stranger's
            files = _list_weights(self.path, self.backend)
            size_bytes = sum(file.stat().st_size for file in files)

        open_tag, close_tag = find_tag_names(self.encoder) or (None, None)
        with artifact_errors(f"the advice for sampling in {self.path}"):
            settings = RunTimeSettings(
                name=self.name,
                artifact=ArtifactEntry(
                    path=self.name,
                    format=self.format,
                    quant=self.quant,
                    packing="plain",
                    size_bytes=size_bytes,
                    backend=self.backend,
                ),
                tokenizer=TokenizerEntry(
                    files={},
                    template_sha256=self.encoder.template.sha256,
                    open_tag=open_tag,
                    close_tag=close_tag,
                    eos_ids=self.stop_ids,
                ),
                generation=self._advise_generation(),
            )
        return DeployedModel(settings, self.path, self.encoder, self.eos_id, files=tuple(files))

    def _advise_generation(self) -> GenerationSettings:
        """Return the model's advice; what is no number, or no possible context, counts as none."""
        max_tokens = None
        if isinstance(self.context, int) and 0 < self.context <= MAX_TOKENS:
            max_tokens = self.context

        return GenerationSettings(
            temperature=self.temperature if isinstance(self.temperature, int | float) else 0.0,
            top_p=self.top_p if isinstance(self.top_p, int | float) else 1.0,
            max_new_tokens=max_tokens or MAX_TOKENS,
            context_tokens=min(_CONTEXT_TOKENS, max_tokens or _CONTEXT_TOKENS),
            model_context_tokens=max_tokens,
        )
