"""A weight matrix stored as small unsigned integers with a scale, and if need be a minimum, for each group of columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from ..errors import dtype_error, shape_error, type_error, value_error
from ..pages import HugePages

__all__ = ["LINE_ROWS", "QuantizedTensor", "cat_rows", "pack_parts", "store_integers"]

GROUP_SIZES = (32, 64, 128)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LINE_ROWS = 16  # rows in a block of the "x16" layout: the fp32 lanes of a 512-bit register
LINE_BYTES = 64  # one cache line, one 512-bit register
K_MULTIPLE = 8  # columns in a 4-bit line; 8-bit weights are padded to the same multiple so that one loop serves both
PACK_ROWS = 1024  # rows converted at a time: bounds what a change of layout needs beside the result


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A weight (N, K) in 4 or 8 bits.

    Formula: ``w[n, k] = (q[n, k] - zero) * scale[n, k // group_size] + minimum[n, k // group_size]``

    Layout "rows" is canonical, it is what is saved. Layout "x16" is what the CPU kernels read: rows in blocks of 16,
    ``N16 = ceil(N / 16)``, columns padded to a multiple of 8 (``Kp``), lines of 64 bytes. An 8-bit line i of a block
    holds 4 columns, ``byte[row * 4 + j] = q[row, 4 i + j]``; a 4-bit line holds 8, the low nibble of
    ``byte[row * 4 + j]`` is ``q[row, 8 i + j]`` and the high nibble ``q[row, 8 i + 4 + j]``, j in 0..3. Missing rows have
    q = zero, scale = 0 and minimum = 0; missing columns have q = zero.

    Args:
        data: uint8. "rows": (N, K) for 8 bits, (N, ceil(K / 2)) for 4 bits with even k in the low nibble.
            "x16": (N16, Kp / L, 64), L = 4 for 8 bits and 8 for 4 bits, 64-byte aligned.
        scale: "rows": (N, G), "x16": (N16, G, 16); fp16|bf16|fp32, G = K / group_size.
        minimum: shape and dtype of ``scale``, or None for zero everywhere.
        zero: the stored integer that stands for 0 (0 for Q4_1, 8 for Q4_0, 128 for Q8_0): q itself is unsigned.
        shape: (N, K).
        bits: 4 or 8.
        group_size: 32, 64, 128 or K.
        layout: "rows" or "x16".

    The constructor trusts its arguments; ``QuantizedTensor.make`` checks them.

    Numerics: ``dequantize`` multiplies and adds in fp32 (in float64 if that is asked for), each rounded once.
    Units: ``scale`` is real value per integer step.
    """

    data: Tensor
    scale: Tensor
    minimum: Tensor | None
    zero: int
    shape: tuple[int, int]
    bits: int
    group_size: int
    layout: str

    @classmethod
    def make(
        cls,
        data: Tensor,
        scale: Tensor,
        minimum: Tensor | None = None,
        *,
        zero: int,
        shape: Sequence[int],
        bits: int,
        group_size: int,
        layout: str = "rows",
    ) -> QuantizedTensor:
        """Check everything that a kernel relies on, then construct.

        Raises: TypeError for a non-tensor or a wrong dtype; ValueError for a shape, a range, scales that are not finite,
        or "x16" data off a 64-byte boundary.
        """
        op = "QuantizedTensor"
        if bits not in (4, 8):
            raise value_error(op, "bits", bits, "4 or 8")
        if layout not in ("rows", "x16"):
            raise value_error(op, "layout", layout, "'rows' or 'x16'")
        if len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise value_error(op, "shape", tuple(shape), "two positive integers (N, K)")
        n, k = int(shape[0]), int(shape[1])
        if group_size != k and (group_size not in GROUP_SIZES or k % group_size != 0):
            raise value_error(op, "group_size", group_size, f"32, 64, 128 or K = {k}", "dividing K")
        if not isinstance(zero, int) or not 0 <= zero < 1 << bits:
            raise value_error(op, "zero", zero, f"an integer from 0 to {(1 << bits) - 1}", f"for {bits} bits")
        groups, blocks = k // group_size, -(-n // LINE_ROWS)
        if layout == "rows":
            data_shape: tuple[int, ...] = (n, k if bits == 8 else -(-k // 2))
            scale_shape: tuple[int, ...] = (n, groups)
        else:
            data_shape = (blocks, _lines(k, bits), LINE_BYTES)
            scale_shape = (blocks, groups, LINE_ROWS)
        _check_tensor(op, "data", data, data_shape, (torch.uint8,))
        _check_tensor(op, "scale", scale, scale_shape, SCALE_DTYPES)
        if minimum is not None:
            _check_tensor(op, "minimum", minimum, scale_shape, (scale.dtype,))
        for name, tensor in (("scale", scale), ("minimum", minimum)):
            if tensor is None:
                continue
            if tensor.device != data.device:
                raise value_error(op, f"device of {name}", str(tensor.device), str(data.device), "the device of data")
            if not bool(torch.isfinite(tensor).all()):
                raise value_error(op, name, "partly inf or nan", "finite values")
        if layout == "x16" and data.device.type == "cpu" and data.data_ptr() % LINE_BYTES != 0:
            raise value_error(op, "address of data", data.data_ptr() % LINE_BYTES, "0 modulo 64", "one line is one load")
        return cls(data, scale, minimum, zero, (n, k), bits, group_size, layout)

    @property
    def nbytes(self) -> int:
        """Bytes of data, scale and minimum together."""
        minimum = 0 if self.minimum is None else self.minimum.nbytes
        return self.data.nbytes + self.scale.nbytes + minimum

    def __repr__(self) -> str:
        form = f"{self.bits} bits, group_size={self.group_size}, zero={self.zero}, scale={self.scale.dtype}"
        minimum = "no minimum" if self.minimum is None else "with minimum"
        place = "" if self.data.device.type == "cpu" else f", device='{self.data.device}'"
        return f"QuantizedTensor({self.shape}, {form}, {minimum}, layout='{self.layout}', {self.nbytes} bytes{place})"

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same weight on another device."""
        minimum = None if self.minimum is None else self.minimum.to(device)
        return replace(self, data=self.data.to(device), scale=self.scale.to(device), minimum=minimum)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (N, K) in ``dtype`` fp32|bf16|fp16|fp64: computed in fp32 (fp64 for fp64), then rounded once."""
        if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise dtype_error("dequantize", "dtype", dtype, "float32, float16, bfloat16 or float64")
        work = torch.float64 if dtype == torch.float64 else torch.float32
        rows = self.unpack()
        n, k = rows.shape
        q = rows.data if rows.bits == 8 else _split_nibbles(rows.data, k)
        w = q.to(work)
        if rows.zero:
            w.sub_(rows.zero)
        grouped = w.view(n, k // rows.group_size, rows.group_size)
        grouped.mul_(rows.scale.to(work).unsqueeze(-1))
        if rows.minimum is not None:
            grouped.add_(rows.minimum.to(work).unsqueeze(-1))
        return w.to(dtype)

    def pack(self, memory: HugePages | None = None) -> QuantizedTensor:
        """The same weight in layout "x16", on the CPU in ``memory`` if it is given; itself if it is there already."""
        if self.layout == "x16":
            return self
        rows = range(0, self.shape[0], PACK_ROWS)
        return pack_parts((self.slice_rows(i, min(i + PACK_ROWS, self.shape[0])) for i in rows), self.shape[0], memory)

    def unpack(self) -> QuantizedTensor:
        """The same weight in layout "rows"; itself if it is there already."""
        if self.layout == "rows":
            return self
        n, k = self.shape
        width = k if self.bits == 8 else -(-k // 2)
        data = self.data.new_empty((n, width))
        for start in range(0, n, PACK_ROWS):
            first, count = start // LINE_ROWS, min(PACK_ROWS, n - start)
            lines = self.data[first : first + -(-count // LINE_ROWS)]
            lines = lines.view(lines.shape[0], -1, LINE_ROWS, 4)
            rows = lines.transpose(1, 2)
            if self.bits == 4:
                rows = _deinterleave_nibbles(rows)
            data[start : start + count] = rows.reshape(lines.shape[0] * LINE_ROWS, -1)[:count, :width]
        if self.bits == 4 and k % 2:
            data[:, -1] &= 0x0F  # the nibble past the last column is 0 in the canonical layout
        return replace(
            self,
            data=data,
            scale=_unblock_groups(self.scale, n),
            minimum=None if self.minimum is None else _unblock_groups(self.minimum, n),
            layout="rows",
        )

    def slice_rows(self, start: int, stop: int) -> QuantizedTensor:
        """Rows ``start`` to ``stop`` as views, nothing is copied.

        Raises: ValueError if the range is empty or leaves the tensor, or if it cuts a block of the "x16" layout.
        """
        n, k = self.shape
        if not 0 <= start < stop <= n:
            raise value_error("slice_rows", "range", (start, stop), f"0 <= start < stop <= {n}")
        if self.layout == "x16":
            if start % LINE_ROWS or (stop % LINE_ROWS and stop != n):
                raise value_error("slice_rows", "range", (start, stop), "multiples of 16", "in the x16 layout; unpack() first")
            start_index, stop_index = start // LINE_ROWS, -(-stop // LINE_ROWS)
        else:
            start_index, stop_index = start, stop
        return replace(
            self,
            data=self.data[start_index:stop_index],
            scale=self.scale[start_index:stop_index],
            minimum=None if self.minimum is None else self.minimum[start_index:stop_index],
            shape=(stop - start, k),
        )

    def alike(self, other: QuantizedTensor) -> bool:
        """Whether rows of the other can stand below this one's as they are."""
        mine, its = (
            (t.shape[1], t.bits, t.zero, t.group_size, t.layout, t.scale.dtype, t.minimum is None, t.data.device)
            for t in (self, other)
        )
        return mine == its

    def _pack_into(self, data: Tensor, scale: Tensor, minimum: Tensor | None) -> None:
        """Writes the rows into the blocks of a packed weight that they fill."""
        lines = data.view(data.shape[0], -1, LINE_ROWS, 4)
        padded = self._pad(data.shape[0] * LINE_ROWS).view(data.shape[0], LINE_ROWS, lines.shape[1], -1).transpose(1, 2)
        if self.bits == 8:
            lines.copy_(padded)
        else:
            _interleave_nibbles(padded, out=lines)
        _block_groups(self.scale, out=scale)
        if minimum is not None and self.minimum is not None:
            _block_groups(self.minimum, out=minimum)

    def _pad(self, count: int) -> Tensor:
        """The canonical data, extended to ``count`` rows and to the padded width with q = zero."""
        rows, k = self.data, self.shape[1]
        width = -(-k // K_MULTIPLE) * K_MULTIPLE * self.bits // 8
        if rows.shape == (count, width):
            return rows
        fill = self.zero if self.bits == 8 else self.zero | self.zero << 4
        padded = rows.new_full((count, width), fill)
        padded[: rows.shape[0], : rows.shape[1]] = rows
        if self.bits == 4 and k % 2:
            padded[: rows.shape[0], k // 2] &= 0x0F
            padded[: rows.shape[0], k // 2] |= self.zero << 4
        return padded


def pack_parts(parts: Iterable[QuantizedTensor], rows: int, memory: HugePages | None = None) -> QuantizedTensor:
    """Rows that come in parts, one below the other, as one weight in layout "x16": parts are read and packed one by one, so that no
    more than one of them is ever held beside the result.

    Args:
        parts: in layout "rows", ``alike``; each but the last has a multiple of 16 rows.
        rows: N of them all.
        memory: where the result goes on the CPU, if it is given.

    Returns: the weight (rows, K), of the parts' bits, zero, group size and scale dtype, on their device.
    Raises: ValueError for no part, parts that differ, that do not fill their blocks, or that are not ``rows`` rows together.
    """
    op, done, parts = "pack_parts", 0, iter(parts)
    first = next(parts, None)
    if first is None:
        raise value_error(op, "parts", "none", "at least one QuantizedTensor")
    blocks = -(-rows // LINE_ROWS)
    data = _empty((blocks, _lines(first.shape[1], first.bits), LINE_BYTES), first.data, memory)
    scale = _empty((blocks, first.scale.shape[1], LINE_ROWS), first.scale, memory)
    minimum = None if first.minimum is None else _empty(scale.shape, first.scale, memory)
    for part in chain([first], parts):
        if part.layout != "rows" or not part.alike(first):
            raise value_error(op, "an element of parts", part, f"one like {first}, in layout 'rows'")
        end = done + part.shape[0]
        if done % LINE_ROWS or end > rows:
            raise value_error(op, "rows of the parts", end, f"{rows} in all", "each part but the last fills blocks of 16")
        to = slice(done // LINE_ROWS, -(-end // LINE_ROWS))
        part._pack_into(data[to], scale[to], None if minimum is None else minimum[to])
        done = end
    if done != rows:
        raise value_error(op, "rows of the parts", done, f"{rows} in all")
    return replace(first, data=data, scale=scale, minimum=minimum, shape=(rows, first.shape[1]), layout="x16")


def cat_rows(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Concatenate along N, as fused QKV and gate/up projections need.

    Differences that can be removed without changing a single weight are removed: a missing minimum becomes zeros, the
    finer group size and the wider scale dtype win, and differing ``zero`` move into the minimum where that is exact.

    Raises: TypeError for an element that is no QuantizedTensor; ValueError for differing K, bits, layout or device, for
    a group size or zero that cannot be made equal exactly, or for "x16" parts that do not fill their blocks.
    """
    op = "cat_rows"
    if not tensors:
        raise value_error(op, "tensors", [], "at least one QuantizedTensor")
    for tensor in tensors:
        if not isinstance(tensor, QuantizedTensor):
            raise type_error(op, "an element of tensors", tensor, "a QuantizedTensor")
    first = tensors[0]
    for tensor in tensors[1:]:
        if tensor.shape[1] != first.shape[1]:
            raise value_error(op, "K", tensor.shape[1], str(first.shape[1]), "as in the first tensor")
        if tensor.bits != first.bits:
            raise value_error(op, "bits", tensor.bits, str(first.bits), "as in the first tensor")
        if tensor.layout != first.layout:
            raise value_error(op, "layout", tensor.layout, repr(first.layout), "as in the first tensor")
        if tensor.data.device != first.data.device:
            raise value_error(op, "device", str(tensor.data.device), str(first.data.device), "as in the first tensor")
    if first.layout == "x16" and any(tensor.shape[0] % LINE_ROWS for tensor in tensors[:-1]):
        rows = [tensor.shape[0] for tensor in tensors]
        raise value_error(op, "N", rows, "multiples of 16 before the last", "in the x16 layout; unpack() first")
    if any(tensor.zero != first.zero for tensor in tensors):
        tensors = [_move_zero_into_minimum(op, tensor) for tensor in tensors]
    group_size = min(tensor.group_size for tensor in tensors)
    for tensor in tensors:
        if tensor.group_size % group_size:
            raise value_error(op, "group_size", tensor.group_size, f"a multiple of {group_size}", "the finest given")
    dtypes = {tensor.scale.dtype for tensor in tensors}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    has_minimum = any(tensor.minimum is not None for tensor in tensors)
    scales, minimums = [], []
    for tensor in tensors:
        # dim 1 is the group in both layouts
        repeats = tensor.group_size // group_size
        scales.append(tensor.scale.to(dtype).repeat_interleave(repeats, dim=1))
        if has_minimum:
            minimum = torch.zeros_like(tensor.scale) if tensor.minimum is None else tensor.minimum
            minimums.append(minimum.to(dtype).repeat_interleave(repeats, dim=1))
    return replace(
        tensors[0],
        data=torch.cat([tensor.data for tensor in tensors]),
        scale=torch.cat(scales),
        minimum=torch.cat(minimums) if has_minimum else None,
        shape=(sum(tensor.shape[0] for tensor in tensors), first.shape[1]),
        group_size=group_size,
    )


def store_integers(q: Tensor, bits: int) -> Tensor:
    """Integers (N, K) uint8 -> canonical bytes, even k in the low nibble."""
    q = q.contiguous()
    if bits == 8:
        return q
    if q.shape[1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    return q[:, 0::2] | (q[:, 1::2] << 4)


def _check_tensor(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise type_error(op, name, tensor, "a torch.Tensor")
    if tensor.dtype not in dtypes:
        raise dtype_error(op, name, tensor.dtype, " or ".join(str(dtype) for dtype in dtypes))
    if tuple(tensor.shape) != shape:
        raise shape_error(op, name, tensor.shape, str(shape))
    if not tensor.is_contiguous():
        raise value_error(op, f"stride of {name}", tensor.stride(), "a contiguous tensor")


def _lines(k: int, bits: int) -> int:
    """Lines of 64 bytes in a block of 16 rows."""
    return -(-k // K_MULTIPLE) * K_MULTIPLE * bits // 32


def _split_nibbles(data: Tensor, k: int) -> Tensor:
    """(N, ceil(K / 2)) bytes -> (N, K) integers, even k from the low nibble."""
    n, width = data.shape
    q = data.new_empty((n, width, 2))
    torch.bitwise_and(data, 0x0F, out=q[..., 0])
    torch.bitwise_right_shift(data, 4, out=q[..., 1])
    return q.view(n, 2 * width)[:, :k].contiguous()


def _interleave_nibbles(rows: Tensor, out: Tensor) -> None:
    """Bytes (.., 4) of column pairs (0 1)(2 3)(4 5)(6 7) -> pairs (0 4)(1 5)(2 6)(3 7), low nibble first."""
    low, high = rows[..., :2], rows[..., 2:]
    out[..., 0::2] = (low & 0x0F) | (high << 4)
    out[..., 1::2] = (low >> 4) | (high & 0xF0)


def _deinterleave_nibbles(lines: Tensor) -> Tensor:
    """The inverse of ``_interleave_nibbles``."""
    even, odd = lines[..., 0::2], lines[..., 1::2]
    rows = torch.empty_like(lines, memory_format=torch.contiguous_format)
    rows[..., :2] = (even & 0x0F) | (odd << 4)
    rows[..., 2:] = (even >> 4) | (odd & 0xF0)
    return rows


def _empty(shape: Sequence[int], like: Tensor, memory: HugePages | None) -> Tensor:
    return memory.zeros(shape, like.dtype) if memory and like.is_cpu else like.new_empty(shape)


def _block_groups(values: Tensor, out: Tensor) -> None:
    """(N, G) -> (N16, G, 16), missing rows 0."""
    n, groups = values.shape
    whole = n // LINE_ROWS
    out[:whole] = values[: whole * LINE_ROWS].view(whole, LINE_ROWS, groups).transpose(1, 2)
    out[whole:] = 0
    out[whole:, :, : n % LINE_ROWS] = values[whole * LINE_ROWS :].T


def _unblock_groups(values: Tensor, n: int) -> Tensor:
    """(N16, G, 16) -> (N, G)."""
    blocks, groups, _ = values.shape
    return values.transpose(1, 2).reshape(blocks * LINE_ROWS, groups)[:n].contiguous()


def _move_zero_into_minimum(op: str, tensor: QuantizedTensor) -> QuantizedTensor:
    """Rewrite (q - zero) * scale as q * scale + minimum, if every weight keeps its bits.

    With a 16-bit scale (at most 11 significant bits) both q * scale and zero * scale fit the 24 bits of fp32, and so does
    their difference. With an fp32 scale or a minimum of its own the products would round.
    """
    if tensor.zero == 0:
        return tensor
    if tensor.minimum is not None or tensor.scale.dtype == torch.float32:
        raise value_error(op, "zero", tensor.zero, "the same in all tensors", "it cannot be made equal exactly")
    scale = tensor.scale.to(torch.float32)
    return replace(tensor, scale=scale, minimum=scale * -tensor.zero, zero=0)
