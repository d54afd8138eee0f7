"""Public sets of questions: what each is on the Hub, and its rows from there, a file or a folder.

The Hub and folders are read with Hugging Face's ``datasets`` 4; files need no package but parquet.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from racdeploy.errors import EnvironmentFailure, UsageError
from racdeploy.plugins import require
from racdeploy.tasks.rows import Row, read_rows

_SAVED = ("dataset_dict.json", "state.json")
"""What ``save_to_disk`` leaves in a folder: of several splits, of one."""


@dataclass(frozen=True)
class HubSplit:
    """One split of a dataset on the Hub, at a commit."""

    dataset: str
    config: str
    split: str
    revision: str


@dataclass(frozen=True)
class Published:
    """A public set of questions.

    Args:
        title: what people call it.
        evaluation: the questions that a model is measured on.
        calibration: questions published for training; None where there are none.
        columns: what each row must have.
        follows: harness, version and task whose prompt and score it has.
        thinking_tokens: how long DeepSeek-R1-Distill-Qwen-7B thinks on average; 0 where unknown.
        caution: what the plan says of it, as a sentence without its end.
    """

    title: str
    evaluation: HubSplit
    calibration: HubSplit | None
    columns: tuple[str, ...]
    follows: str
    thinking_tokens: int = 0
    caution: str = ""


Rows = tuple[tuple[Row, ...], tuple[Row, ...] | None]
"""Of evaluation, and of calibration; None where they are not published apart from the rest."""


def read_hub(published: Published) -> Rows:
    """Read a set from the Hub, or from the cache of an earlier download."""
    evaluation = _download(published.evaluation)
    calibration = _download(published.calibration) if published.calibration else ()
    return evaluation, calibration


def read_local(published: Published, path: Path) -> Rows:
    """Read a file in its published form, a folder of ``save_to_disk``, or a copy of the Hub's."""
    if not path.is_dir():
        return tuple(read_rows(path)), None

    splits = _read_folder(published.evaluation, path)
    if len(splits) == 1:
        (only,) = splits.values()
        return only, None

    # Several splits are used as on the Hub.
    wanted = published.evaluation.split
    if wanted not in splits:
        raise UsageError(
            "missing-dataset-split",
            f"{path} has no split {wanted!r} of {published.title}; it has {', '.join(splits)}",
            remedy="save that split, or give a folder with one split",
        )

    source = published.calibration
    beside = source is not None and source.dataset == published.evaluation.dataset
    return splits[wanted], splits.get(source.split, ()) if beside and source else ()


@cache
def _download(part: HubSplit) -> tuple[Row, ...]:
    datasets = _import_datasets()
    try:
        table = datasets.load_dataset(
            part.dataset, part.config, split=part.split, revision=part.revision
        )
    except (OSError, ValueError) as error:
        raise _refuse_download(part, error) from error
    return tuple(table)


def _refuse_download(part: HubSplit, error: Exception) -> EnvironmentFailure:
    page = f"https://huggingface.co/datasets/{part.dataset}"
    remedy = "connect to the Hub, or give what you have of it: --task NAME:FILE"
    if "gated" in str(error).lower():
        remedy = f"accept its terms at {page}, then: hf auth login"
    return EnvironmentFailure(
        "dataset-download-failed",
        f"cannot read {part.dataset} from the Hub: {_first_line(error)}",
        remedy=remedy,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_folder(part: HubSplit, path: Path) -> Mapping[str, tuple[Row, ...]]:
    """Return the rows of a folder by split; one split without a name is ``""``."""
    datasets = _import_datasets()
    try:
        found: Any
        if any((path / name).is_file() for name in _SAVED):
            found = datasets.load_from_disk(str(path))
        else:
            configs = datasets.get_dataset_config_names(str(path))
            config = part.config if part.config in configs else configs[0]
            found = datasets.load_dataset(str(path), config)
    except (OSError, ValueError) as error:
        raise UsageError(
            "dataset-folder-unreadable",
            f"cannot read the folder {path}: {_first_line(error)}",
            remedy="give a folder of save_to_disk, a copy of the one on the Hub, or a file",
        ) from error

    # One split alone comes without a name.
    if isinstance(found, datasets.Dataset):
        found = {"": found}

    return {str(name): tuple(table) for name, table in found.items()}


def _import_datasets() -> Any:
    """Import ``datasets`` without bars and warnings: the errors say what they say."""
    require("datasets")
    import datasets

    datasets.disable_progress_bars()
    for package in ("datasets", "huggingface_hub"):
        logging.getLogger(package).setLevel(logging.ERROR)
    return datasets
