"""Write the header of a GGUF file, and of each file of a model in several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from racdeploy import quant as quants
from racdeploy.export.gguf.general import add_value
from racdeploy.export.gguf.parameters import write_parameters
from racdeploy.export.gguf.splits import COUNT_KEY, NUMBER_KEY, TENSORS_KEY
from racdeploy.export.gguf.tensors import PlannedTensor
from racdeploy.export.gguf.vocabulary import Vocabulary
from racdeploy.models.checkpoint import Checkpoint


def write_header(
    checkpoint: Checkpoint,
    file: Path,
    tensors: list[PlannedTensor],
    *,
    vocabulary: Vocabulary | None,
    general: Mapping[str, Any],
    split: tuple[int, int, int],
) -> None:
    """Write the header of a file: of the first with all metadata, of a later one with its number.

    Args:
        checkpoint: the model folder.
        file: replaced if it exists.
        tensors: of this file.
        vocabulary: None in a later file.
        general: keys that say what the file is.
        split: which file of how many it is, and how many tensors they have together.
    """
    writer = GGUFWriter(file, checkpoint.family.gguf_arch)
    try:
        for key, value in general.items():
            add_value(writer, key, value)
        if vocabulary:
            write_parameters(writer, checkpoint)
            vocabulary.write(writer, checkpoint.tokenizer.chat_template)

        number, files, all_tensors = split
        if files > 1:
            writer.add_uint16(NUMBER_KEY, number)
            writer.add_uint16(COUNT_KEY, files)
            writer.add_int32(TENSORS_KEY, all_tensors)

        for tensor in tensors:
            _add_tensor(writer, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add_tensor(writer: GGUFWriter, tensor: PlannedTensor) -> None:
    ggml_type = GGMLQuantizationType(quants.load_ggml(tensor.quant_real).GGML_TYPE)
    dtype = np.dtype(np.float32)  # of the values, whatever the type in the file
    writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.size_bytes, raw_dtype=ggml_type)
