"""Number formats: integer ranges, packed int4, and tensors that carry their scale.

The reference rounding of the whole package (see :mod:`vitq.quantizers.uniform`) is

    codes = clamp(round(x.float() / scale) + zero_point, qmin, qmax)

with ``torch.round`` (half to even) and a true float32 division. A multiplication by ``1 / scale`` gives other codes at ties, so no backend may
use it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Smallest range (largest absolute value, or hi - lo) from which a scale is made. A row of zeros then has a finite, positive scale and codes 0;
# values this small are zero in every 16-bit format a model is stored in.
RANGE_MIN = 1e-12
PRODUCT_NUMBERS = 1 << 22  # that are multiplied by matrices at once, in float64


def int_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """Smallest and largest code of a ``bits``-wide integer: 8 -> (-128, 127), unsigned 8 -> (0, 255). ValueError unless bits is in 2..8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits = {bits!r}: a quantized format has 2 to 8 bits (an integer)")
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def to_float16(x: Tensor) -> Tensor:
    """Floats of any type in float16; those beyond its largest number, ±65504, become that. NaN stays NaN."""
    most = torch.finfo(torch.float16).max
    return x.float().clamp(-most, most).half()


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes [..., K] with values in -8..7 into uint8 [..., ceil(K/2)].

    Element 2i is the low nibble of byte i and 2i+1 the high one; an odd K is padded with code 0. TypeError for another dtype, ValueError for a
    scalar or for values that four bits cannot hold.
    """
    if codes.dtype != torch.int8:
        raise TypeError(f"pack_int4: codes are {codes.dtype}; give torch.int8")
    if codes.dim() == 0:
        raise ValueError("pack_int4: codes are a scalar; give at least one dimension")
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError(f"pack_int4: codes are in {int(codes.min())}..{int(codes.max())}; int4 holds -8..7")
    return pack_nibbles(codes)


def pack_nibbles(codes: Tensor) -> Tensor:
    """:func:`pack_int4` of codes that are known to fit: nothing is read on the host."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    nibbles = codes.view(torch.uint8) if codes.is_contiguous() else codes.contiguous().view(torch.uint8)
    return (nibbles[..., 0::2] & 0xF) | ((nibbles[..., 1::2] & 0xF) << 4)


def unpack_int4(packed: Tensor, size: int) -> Tensor:
    """Undo :func:`pack_int4`: uint8 [..., ceil(size/2)] -> int8 [..., size]. ValueError where ``size`` does not fit the packed tensor."""
    if packed.dtype != torch.uint8:
        raise TypeError(f"unpack_int4: packed is {packed.dtype}; give torch.uint8")
    if packed.dim() == 0 or size < 0 or packed.shape[-1] != (size + 1) // 2:
        raise ValueError(f"unpack_int4: packed has shape {tuple(packed.shape)}; {size} codes need a last dimension of {(size + 1) // 2}")
    low = packed & 0xF
    high = packed >> 4
    nibbles = torch.stack((low, high), dim=-1).flatten(-2).view(torch.int8)
    # (n ^ 8) - 8 extends the sign of a nibble: 0..7 stay, 8..15 become -8..-1.
    return ((nibbles ^ 8) - 8)[..., :size].contiguous()


@dataclass(frozen=True, eq=False)
class QTensor:
    """Integer codes and what turns them back into numbers: ``(codes - zero_point) * scale + shift``.

    codes: int8, or uint8 whose codes are the signed ones + 128 with ``zero_point`` shifted alike. scale: float32, broadcastable to codes (a
    scalar, or one a row [..., 1]). zero_point: one integer. shift: float32 [..., 1] of dynamic asymmetric codes, else None. fp: float16 [..., F],
    the features that were not quantized, where :class:`Columns` names some.
    """

    codes: Tensor
    scale: Tensor
    zero_point: int = 0
    shift: Tensor | None = None
    fp: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype not in (torch.int8, torch.uint8):
            raise TypeError(f"QTensor: codes are {self.codes.dtype}; give torch.int8 or torch.uint8")
        if self.scale.dtype != torch.float32:
            raise TypeError(f"QTensor: scale is {self.scale.dtype}; give torch.float32")
        # A scale may not enlarge the tensor: broadcasting must give the codes' own shape.
        sizes = zip(reversed(self.scale.shape), reversed(self.codes.shape))
        if self.scale.dim() > self.codes.dim() or any(s not in (1, c) for s, c in sizes):
            raise ValueError(
                f"QTensor: scale of shape {tuple(self.scale.shape)} does not broadcast to codes of shape {tuple(self.codes.shape)}; "
                "give a scalar or one scale a row [..., 1]"
            )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers, computed in float32 and cast last."""
        numbers = (self.codes.float() - self.zero_point) * self.scale
        return (numbers if self.shift is None else numbers + self.shift).to(dtype)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device


@dataclass(frozen=True, eq=False)
class Columns:
    """What the code columns of a layer's input hold, where it is not each feature in its place.

    order: int32 [K'], the feature of each column, or -1 for a column that holds the value 0; None: in order. segment_ends: where the ordered
    ranges of columns end that have weight scales of their own, multiples of 32 but for the last, K'; (): one range. fp: int32 [F], features
    that stay float16.
    """

    order: Tensor | None = None
    segment_ends: tuple[int, ...] = ()
    fp: Tensor | None = None

    def __post_init__(self) -> None:
        inner, ends = self.segment_ends[:-1], self.segment_ends
        if any(end % 32 for end in inner) or list(ends) != sorted(set(ends)) or ends and ends[0] < 1:
            raise ValueError(f"Columns: segment_ends = {ends}; give ascending ends, multiples of 32 but for the last")
        for name, tensor in (("order", self.order), ("fp", self.fp)):
            if tensor is not None and (tensor.dtype != torch.int32 or tensor.dim() != 1):
                raise TypeError(f"Columns: {name} is {tensor.dtype} of {tensor.dim()} dimensions; give int32 of one")
        if ends and self.order is not None and ends[-1] != len(self.order):
            raise ValueError(f"Columns: the last segment ends at {ends[-1]}, there are {len(self.order)} columns")

    def to(self, device: torch.device) -> Columns:
        """The same with its tensors on a device."""
        order, fp = (None if t is None else t.to(device) for t in (self.order, self.fp))
        return Columns(order, self.segment_ends, fp)


@dataclass(frozen=True, eq=False)
class Kronecker:
    """A linear map of rows of K = A·B numbers, seen as a matrix X [A, B]: leftᵀ·X·right, which is x·(left ⊗ right).

    left: float16 [A, A], or None where rows are not mixed; right: float16 [B, B], or None. A weight whose rows are multiplied by the inverse
    transpose gives the same products with transformed inputs as it had with these (FlatQuant, arXiv 2410.09426).
    """

    left: Tensor | None = None
    right: Tensor | None = None

    def __post_init__(self) -> None:
        if self.left is None and self.right is None:
            raise ValueError("Kronecker: neither left nor right is given")
        for name, matrix in (("left", self.left), ("right", self.right)):
            if matrix is not None and (matrix.dtype != torch.float16 or matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]):
                raise TypeError(f"Kronecker: {name} is {matrix.dtype} {list(matrix.shape)}; give a square float16 matrix")

    def sizes(self, features: int) -> tuple[int, int]:
        """A and B of rows of that many numbers. ValueError where the matrices do not divide them."""
        a, b = (None if matrix is None else len(matrix) for matrix in (self.left, self.right))
        if features % (a or b) or a is not None and b is not None and a * b != features:
            raise ValueError(f"Kronecker: {a or 'no'} x {b or 'no'} matrices do not divide rows of {features}")
        return a or features // b, b or features // a

    def apply(self, x: Tensor) -> Tensor:
        """x [..., K] -> float32 [..., K]. What is multiplied is float16, x at first and what the first product gives, clamped to ±65504; sums
        are float32."""
        sizes, shape = self.sizes(x.shape[-1]), x.shape
        x = to_float16(x).float().reshape(*shape[:-1], *sizes)
        if self.right is not None:
            x = x @ self.right.float()
        if self.left is not None:
            x = self.left.float().T @ (x if self.right is None else to_float16(x).float())
        return x.reshape(shape)

    def inverse(self, x: Tensor) -> Tensor:
        """What `apply` was given, float32 [..., K], up to rounding."""
        left, right = (None if matrix is None else torch.linalg.inv(matrix.double()) for matrix in (self.left, self.right))
        return _multiplied(x, self.sizes(x.shape[-1]), None if left is None else left.T, right)

    def inverse_transposed(self, weight: Tensor) -> Tensor:
        """weight float32 [..., K], rows that are multiplied with x -> those for `apply(x)`."""
        left, right = (None if matrix is None else torch.linalg.inv(matrix.double()) for matrix in (self.left, self.right))
        return _multiplied(weight, self.sizes(weight.shape[-1]), left, None if right is None else right.T)

    def transposed(self, weight: Tensor) -> Tensor:
        """What `inverse_transposed` was given, float32 [..., K], up to rounding."""
        left, right = (None if matrix is None else matrix.double() for matrix in (self.left, self.right))
        return _multiplied(weight, self.sizes(weight.shape[-1]), left, None if right is None else right.T)

    def to(self, device: torch.device) -> Kronecker:
        """The same with its tensors on a device."""
        return Kronecker(*(None if matrix is None else matrix.to(device) for matrix in (self.left, self.right)))


def _multiplied(x: Tensor, sizes: tuple[int, int], left: Tensor | None, right: Tensor | None) -> Tensor:
    """float32, left · X · right of rows X of these sizes, in float64: of some rows at a time, since large temporaries fragment a GPU's memory."""
    def product(rows: Tensor) -> Tensor:
        y = rows.double() if right is None else rows.double() @ right
        return (y if left is None else left @ y).float()

    rows = x.reshape(-1, *sizes)
    return torch.cat([product(some) for some in rows.split(max(1, PRODUCT_NUMBERS // x.shape[-1]))]).reshape(x.shape)


@dataclass(frozen=True, eq=False)
class ActivationFormat:
    """How one activation operand is quantized, once chosen. Simulation and executed modules both read this.

    static: ``scale`` and ``zero_point`` are given (numbers or 0-d tensors; [H] where each attention head has its own) and kept as float32 and
    int32 tensors of one shape, 0-d or [H]. dynamic: one scale a token, found at run time, so both are None; ``symmetric=False`` of these: a
    shift a token too, a float, so that the codes span the token's own range (QUIK). ``signed=False`` is for attention probabilities: codes 0..2^bits - 1.
    ``columns`` is None where the codes are the features in order.

    Of a dynamic format: ``transform`` maps each row before it is quantized, so that codes are of what it gives. ``clip``: float32 [2], what a row's least and
    largest value are multiplied with before its scale comes of them; a range that is clipped holds 0.
    """

    bits: int
    dynamic: bool = False
    scale: float | Tensor | None = None
    zero_point: int | Tensor | None = None
    signed: bool = True
    columns: Columns | None = None
    symmetric: bool = True
    transform: Kronecker | None = None
    clip: Tensor | None = None

    def __post_init__(self) -> None:
        int_range(self.bits, self.signed)
        if not self.symmetric and not (self.dynamic and self.signed):
            raise ValueError("ActivationFormat: symmetric=False is for signed dynamic formats; a static one says it by its zero point")
        if (self.transform is not None or self.clip is not None) and not self.dynamic:
            raise ValueError("ActivationFormat: transform and clip are for dynamic formats, whose ranges are found in what the transform gives")
        if self.transform is not None and self.columns is not None:
            raise ValueError("ActivationFormat: a transform mixes features, so none of them has a column of its own: give one of the two")
        if self.clip is not None and (self.clip.dtype != torch.float32 or self.clip.shape != (2,)):
            raise TypeError(f"ActivationFormat: clip is {self.clip.dtype} {list(self.clip.shape)}; give float32 [2]")
        if self.dynamic:
            if self.scale is not None or self.zero_point is not None:
                raise ValueError("ActivationFormat: a dynamic format finds its scale at run time; leave scale and zero_point out")
            return
        if self.scale is None:
            raise ValueError("ActivationFormat: a static format needs a scale; calibrate, or choose dynamic=True")
        scale = torch.as_tensor(self.scale).detach().to(torch.float32)
        zero_point = torch.as_tensor(0 if self.zero_point is None else self.zero_point).detach()
        shape = () if max(scale.numel(), zero_point.numel()) == 1 else (max(scale.numel(), zero_point.numel()),)
        if {scale.numel(), zero_point.numel()} - {1, *shape} or max(scale.dim(), zero_point.dim()) > 1:
            raise ValueError(f"ActivationFormat: scale has shape {list(scale.shape)} and zero_point {list(zero_point.shape)}; static formats have "
                             "one of each, or one a head")
        if not (torch.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"ActivationFormat: scale = {scale.tolist()}; it must be finite and above 0")
        if zero_point.is_floating_point():
            raise TypeError(f"ActivationFormat: zero_point is {zero_point.dtype}; give an integer")
        if not (zero_point.ge(self.qmin) & zero_point.le(self.qmax)).all():
            raise ValueError(f"ActivationFormat: zero_point = {zero_point.tolist()}; {self.bits} bits allow {self.qmin}..{self.qmax}")
        object.__setattr__(self, "scale", scale.reshape(-1).expand(shape or 1).clone().reshape(shape))
        object.__setattr__(self, "zero_point", zero_point.to(torch.int32).reshape(-1).expand(shape or 1).clone().reshape(shape))

    @property
    def qmin(self) -> int:
        return int_range(self.bits, self.signed)[0]

    @property
    def qmax(self) -> int:
        return int_range(self.bits, self.signed)[1]
