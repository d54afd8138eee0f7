"""Number formats of MatMulNBits, held against onnxruntime's own quantizer and operator."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from racdeploy import quant as quants
from racdeploy.packing.onnx.tensors import (
    GraphTensor,
    arrays_to_rows,
    blocks_to_arrays,
    rows_to_arrays,
)
from racdeploy.quant import matmulnbits

O, I = 48, 512
NAMES = ("matmulnbits_4", "matmulnbits_8", "k_quant")


def draw_weights(sparsity: float = 0.5) -> np.ndarray:
    """Return rows of different scale with exact zeros, one row of zeros and one of outliers."""
    generator = np.random.default_rng(0)
    weight_OI = (generator.standard_normal((O, I)) * generator.uniform(0.005, 0.2, (O, 1))).astype(
        np.float32
    )
    weight_OI[generator.random((O, I)) < sparsity] = 0
    weight_OI[3, ::32], weight_OI[4] = 40, 0
    return weight_OI


def quantize_with_onnxruntime(
    weight_OI: np.ndarray, bits: int, *, k_quant: bool = False
) -> matmulnbits.MatMulNBitsBlocks:
    """Return what ``MatMulNBitsQuantizer`` makes of a linear, its scales in single precision."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnxruntime.quantization import matmul_nbits_quantizer as peer
    inputs = [helper.make_tensor_value_info("x", 1, ["t", I])]
    outputs = [helper.make_tensor_value_info("y", 1, ["t", O])]
    weights = [numpy_helper.from_array(np.ascontiguousarray(weight_OI.T), "w")]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")], "g", inputs, outputs, weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    config = peer.KQuantWeightOnlyQuantConfig() if k_quant else None
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantizer = peer.MatMulNBitsQuantizer(
            model,
            bits=bits,
            block_size=32,
            is_symmetric=not k_quant,
            accuracy_level=4,
            algo_config=config,
        )
        quantizer.process()
    (node,) = (node for node in quantizer.model.model.graph.node if node.op_type == "MatMulNBits")
    found = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in quantizer.model.model.graph.initializer
    }
    codes, scales, *zeros = (found[name].reshape(O, -1) for name in node.input[1:])
    code_OI = codes if bits == 8 else matmulnbits.unpack_nibbles(codes, I)
    zero_OG = matmulnbits.unpack_nibbles(zeros[0], I // 32) if zeros else None
    return matmulnbits.MatMulNBitsBlocks(bits, code_OI, scales, zero_OG)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_of_onnxruntime_at_its_scales(bits: int) -> None:
    """Bit for bit.

    Scales rounded to half precision cost at most their rounding, 2^-11 of each weight.
    """
    weight_OI = draw_weights()
    weight_OI[0, :32] = np.arange(-16, 16) * 8 / 2**bits  # codes and a half
    theirs = quantize_with_onnxruntime(weight_OI, bits)
    own_OI = matmulnbits.round_to_codes(weight_OI, theirs.scale_OG.astype(np.float32), bits)
    np.testing.assert_array_equal(theirs.code_OI, own_OI)
    own = matmulnbits.quantize_symmetric(weight_OI, bits)
    np.testing.assert_array_equal(theirs.scale_OG.astype(np.float16), own.scale_OG)
    slack_OI = np.abs(weight_OI) * 2.0**-11 + 2.0**-24
    step_OI = np.abs(theirs.scale_OG).repeat(32, axis=1)
    assert (np.abs(own.dequantize() - weight_OI) <= step_OI + slack_OI).all()
    assert (
        np.square(own.dequantize() - weight_OI).sum()
        <= 1.002 * np.square(theirs.dequantize() - weight_OI).sum()
    )


def test_k_quant_is_no_worse_than_onnxruntimes() -> None:
    """Squared error, plain and by magnitude, against its own search with float32 scales."""
    weight_OI = draw_weights()
    quant = quants.load("k_quant")
    own_OI = quant.dequantize(quant.quantize(weight_OI), I)
    their_OI = quantize_with_onnxruntime(weight_OI, 4, k_quant=True).dequantize()
    for importance_OI in (np.ones_like(weight_OI), np.abs(weight_OI)):
        own, theirs = (
            float((importance_OI * (w - weight_OI) ** 2).sum()) for w in (own_OI, their_OI)
        )
        assert own <= theirs


@pytest.mark.parametrize("name", NAMES)
def test_the_operator_reads_what_was_written(name: str) -> None:
    """MatMulNBits on unit vectors gives the weights back, zeros exactly; a damaged code is seen."""
    weight_OI = draw_weights()
    quant = quants.load(name)
    packed_OP = quant.quantize(weight_OI)
    read_OI = run_operator(name, packed_OP)
    np.testing.assert_allclose(read_OI, quant.dequantize(packed_OP, I), rtol=1e-6, atol=0)
    assert (read_OI[weight_OI == 0] == 0).all()
    packed_OP = packed_OP.copy()
    packed_OP[0, 0] ^= 1
    assert not np.array_equal(run_operator(name, packed_OP), read_OI)


def run_operator(name: str, packed_OP: np.ndarray) -> np.ndarray:
    """Return the weights as onnxruntime's operator sees them."""
    tensor = GraphTensor("w", (O, I), name, is_embedding=False)
    arrays = blocks_to_arrays(tensor, quants.load_matmulnbits(name).unpack(packed_OP, I))
    inputs = ["x", "w", "w.scales", *(["w.zero_points"] if "w.zero_points" in arrays else [])]
    bits = 8 if name.endswith("8") else 4
    node = helper.make_node(
        "MatMulNBits", inputs, ["y"], domain="com.microsoft", K=I, N=O, bits=bits, block_size=32
    )
    values = [
        helper.make_tensor_value_info(key, onnx.TensorProto.FLOAT, None) for key in ("x", "y")
    ]
    initializers = [numpy_helper.from_array(array, key) for key, array in arrays.items()]
    graph = helper.make_graph([node], "g", values[:1], values[1:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"x": np.eye(I, dtype=np.float32)})[0].T


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_read_back_and_other_scales_are_refused(name: str) -> None:
    """Scales of somebody else, finer than half precision, would come back as other weights."""
    tensor = GraphTensor("w", (O, I), name, is_embedding=False)
    packed_OP = quants.load(name).quantize(draw_weights())
    arrays = rows_to_arrays(tensor, packed_OP)
    np.testing.assert_array_equal(arrays_to_rows(tensor, arrays), packed_OP)
    arrays["w.scales"] = arrays["w.scales"] * np.float32(1 + 2**-20)
    with pytest.raises(ValueError, match="half precision"):
        arrays_to_rows(tensor, arrays)
