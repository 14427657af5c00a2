"""Quantised weights: the tensor, the rounding, and importers of stored formats; the rows of an int8 KV cache; int8 activations."""

from fastllm.quant.activations import Int8Activations, activation_group
from fastllm.quant.formats import from_awq, from_gptq, from_hqq, from_q4_0, from_q4_1, from_q8_0
from fastllm.quant.rounding import quantize, quantize_rows
from fastllm.quant.tensor import LINE_ROWS, QuantizedTensor, cat_rows, pack_parts

__all__ = [
    "LINE_ROWS",
    "Int8Activations",
    "QuantizedTensor",
    "activation_group",
    "cat_rows",
    "from_awq",
    "from_gptq",
    "from_hqq",
    "from_q4_0",
    "from_q4_1",
    "from_q8_0",
    "pack_parts",
    "quantize",
    "quantize_rows",
]
