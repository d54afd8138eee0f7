"""Public datasets: their description, and their rows from the Hub, a file or a folder.

The Hub and folders are read by Hugging Face's ``datasets`` 4; of the files only parquet needs a
package.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from racdeploy.errors import EnvironmentFailure, UsageError
from racdeploy.plugins import require_package
from racdeploy.tasks.rows import Row, read_rows

_SAVED = ("dataset_dict.json", "state.json")
"""Files that mark a folder of ``save_to_disk``: of several splits, of one split."""


@dataclass(frozen=True)
class HubSplit:
    """Split of a dataset on the Hub, at a commit."""

    dataset: str
    config: str
    split: str
    revision: str


@dataclass(frozen=True, kw_only=True)
class PublicDataset:
    """Public dataset of questions.

    Args:
        title: usual name.
        evaluation: split that models are measured on.
        calibration: split published for training; None if there is none.
        columns: required columns of each row.
        protocol: harness, version and task whose prompt and score are used.
        thinking_tokens: mean thinking length of DeepSeek-R1-Distill-Qwen-7B; 0 if unknown.
        caution: warning for the plan, as a sentence without its full stop.
    """

    title: str
    evaluation: HubSplit
    calibration: HubSplit | None = None
    columns: tuple[str, ...]
    protocol: str
    thinking_tokens: int = 0
    caution: str = ""


SplitRows = tuple[tuple[Row, ...], tuple[Row, ...] | None]
"""Rows of evaluation and of calibration; None if they come without a calibration split."""


def read_hub(published: PublicDataset) -> SplitRows:
    """Read a dataset from the Hub, or from the cache of an earlier download."""
    evaluation = _download(published.evaluation)
    calibration = _download(published.calibration) if published.calibration else ()
    return evaluation, calibration


def read_local(published: PublicDataset, path: Path) -> SplitRows:
    """Read a published file, a folder of ``save_to_disk``, or a copy of the Hub's folder.

    Raises:
        UsageError: the folder lacks the evaluation split, or cannot be read.
    """
    if not path.is_dir():
        return tuple(read_rows(path)), None

    splits = _read_folder(published.evaluation, path)
    if len(splits) == 1:
        (only,) = splits.values()
        return only, None

    # Several splits have the same roles as on the Hub.
    wanted = published.evaluation.split
    if wanted not in splits:
        raise UsageError(
            "missing-dataset-split",
            f"{path} has no split {wanted!r} of {published.title}; it has {', '.join(splits)}",
            remedy="save that split, or give a folder with one split",
        )

    source = published.calibration
    in_folder = source is not None and source.dataset == published.evaluation.dataset
    return splits[wanted], splits.get(source.split, ()) if in_folder and source else ()


@cache
def _download(part: HubSplit) -> tuple[Row, ...]:
    datasets = _import_datasets()
    try:
        table = datasets.load_dataset(
            part.dataset, part.config, split=part.split, revision=part.revision
        )
    except (OSError, ValueError) as error:
        # Gated datasets need a login.
        page = f"https://huggingface.co/datasets/{part.dataset}"
        remedy = "connect to the Hub, or give your own copy: --tasks NAME:FILE"
        if "gated" in str(error).lower():
            remedy = f"accept its terms at {page}, then: hf auth login"
        raise EnvironmentFailure(
            "dataset-download-failed",
            f"cannot read {part.dataset} from the Hub: {_first_line(error)}",
            remedy=remedy,
        ) from error
    return tuple(table)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_folder(part: HubSplit, path: Path) -> Mapping[str, tuple[Row, ...]]:
    """Return the rows of a folder by split; a single split without a name is ``""``."""
    datasets = _import_datasets()
    try:
        loaded: Any
        if any((path / name).is_file() for name in _SAVED):
            loaded = datasets.load_from_disk(str(path))
        else:
            configs = datasets.get_dataset_config_names(str(path))
            config = part.config if part.config in configs else configs[0]
            loaded = datasets.load_dataset(str(path), config)
    except (OSError, ValueError) as error:
        raise UsageError(
            "dataset-folder-unreadable",
            f"cannot read the folder {path}: {_first_line(error)}",
            remedy="give a folder of save_to_disk, a copy of the one on the Hub, or a file",
        ) from error

    # save_to_disk stores a single split without its name.
    if isinstance(loaded, datasets.Dataset):
        loaded = {"": loaded}

    return {str(name): tuple(table) for name, table in loaded.items()}


def _import_datasets() -> Any:
    """Import ``datasets`` without progress bars and log lines; errors are raised anyway."""
    require_package("datasets")
    import datasets

    datasets.disable_progress_bars()
    for package in ("datasets", "huggingface_hub"):
        logging.getLogger(package).setLevel(logging.ERROR)
    return datasets
