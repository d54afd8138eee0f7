"""Number formats: one file each, with ``QUANT``, a :class:`racdeploy.quant.Quant`."""

_INT8 = (
    "rounding activations to 8 bits while the model runs gave SmolLM2-135M a KL of 0.52 nats where"
    " matmulnbits_8 has 0.004, and a chain of thought adds it up"
)
REFUSED = {
    "hqq": "its zero points lie between codes, so pruned weights come back as small numbers and"
    " sparsity is lost",
    "int8": _INT8,
    "dynamic_int8": _INT8,
}
"""Number formats that are refused on purpose: name → reason."""
