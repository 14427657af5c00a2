"""``torch.nn.Linear`` over a quantised weight: what ``accelerate`` puts in a Linear's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..ops.quant_matmul import quant_matmul
from ..quant import QuantizedTensor

__all__ = ["QuantLinear"]


class QuantLinear(nn.Module):
    """y = x W^T + b with W in 4 or 8 bits: ``fastllm.quant_matmul`` as a module, for inference.

    Args:
        weight: a QuantizedTensor (N, K); the CPU's layout is made here, once.
        bias: (N,) or None; kept as the very parameter that it was.
        activations: "float", or "int8": how ``quant_matmul`` sees x.

    Its weight is no parameter: it is not trained, and ``state_dict()`` refuses, because no reader would find it again.
    """

    bias: Tensor | None

    def __init__(self, weight: QuantizedTensor, bias: nn.Parameter | None = None, *, activations: str = "float") -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.activations = activations
        self.quantized = weight.pack() if weight.data.is_cpu else weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        bias = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return quant_matmul(x, self.quantized, bias, activations=self.activations)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        super()._apply(fn, recurse)
        device = fn(self.quantized.data.new_empty(0)).device
        if device != self.quantized.data.device:
            weight = self.quantized.unpack().to(device)
            self.quantized = weight.pack() if weight.data.is_cpu else weight
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise NotImplementedError(
            f"state_dict: {prefix.removesuffix('.')} is a quantised Linear of fastllm.accelerate, expected float weights, because "
            "transformers could not load what is saved here; call undo() of the report first"
        )

    def extra_repr(self) -> str:
        bits, group = self.quantized.bits, self.quantized.group_size
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, bits={bits}, group_size={group}, activations={self.activations!r}"
