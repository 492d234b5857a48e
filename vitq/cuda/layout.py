"""How the CUDA kernels want weights in memory, and back. Pure torch, on any device.

Rows (output features n) are padded with zeros to a multiple of 32 and permuted within each group of 32: physical row
8·j + 2·c + e holds logical row 8·c + 2·j + e (j, c in 0..3; e in 0..1). A thread of a tensor-core fragment holds columns
2·c + e of each of four 8-column tiles j, so with this order they are eight neighbouring columns of the result.

Columns (input features k) are padded with zeros to a multiple of 32 (int8) or 64 (int4). An int4 byte i of a block of 64 holds k
= i in its low and k = i + 32 in its high nibble: `w << 4` and `w`, each masked with 0xF0, are then the codes of two steps of k,
times 16.

Where inputs are floats (`weight_only`) the middle two of each four int4 bytes are exchanged: `w & 0x000F000F` then holds codes of two
neighbouring k, the halves of one operand of the MMA.

Matrices that rows are multiplied with before they are quantized (`transformed_rows`) lie in the order of the MMA's fragments: tiles of 16 outputs x 16
inputs, of which lane 4 g + t has eight halves side by side, outputs g and g + 8 of inputs 2 t, 2 t + 1, then those of inputs 2 t + 8, 2 t + 9. Of a right
matrix each 32 outputs are permuted, 8 q + g holds 4 g + q, so that a lane's results are four neighbours.

What goes with a row (scales, biases) stays in logical order, padded to the same n. Constants of groups of columns are [G, N'], of each eight
neighbouring rows the even ones first: a lane of the MMA then has those of its four rows side by side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.formats import pack_int4, unpack_int4

ROWS = 32
COLUMNS = {8: 32, 4: 64}


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def pack_weight(codes: Tensor, bits: int, plain: bool = False) -> Tensor:
    """int8 codes [N, K] -> int8 [N', K'] for 8 bits, uint8 [N', K'/2] for 4. plain: int4 in the order of
    `vitq.formats.pack_int4`, for activations that are packed too. Raises ValueError for other bits or codes beyond 4 bits."""
    _check_bits(bits)
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise TypeError(f"pack_weight: codes are {codes.dtype} {list(codes.shape)}; give torch.int8 [N, K]")
    n, k = codes.shape
    permuted = permute_rows(F.pad(codes, (0, -k % COLUMNS[bits], 0, 0)))
    if bits == 8:
        return permuted
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError(f"pack_weight: codes are in {int(codes.min())}..{int(codes.max())}; int4 holds -8..7")
    if plain:
        return pack_int4(permuted)
    low, high = permuted.view(torch.uint8).view(permuted.shape[0], permuted.shape[1] // 64, 2, 32).unbind(2)
    return ((low & 0xF) | ((high & 0xF) << 4)).reshape(permuted.shape[0], permuted.shape[1] // 2)


def unpack_weight(packed: Tensor, bits: int, n: int, k: int, plain: bool = False) -> Tensor:
    """Undo `pack_weight`: the int8 codes [n, k]."""
    if bits == 4:
        packed = unpack_int4(packed, 2 * packed.shape[1]) if plain else widen(packed)
    return permute_rows(packed)[:n, :k].contiguous()


def widen(packed: Tensor) -> Tensor:
    """Packed int4 uint8 [N', K'/2] -> int8 [N', K'] in the same row order."""
    low, high = packed & 0xF, packed >> 4
    blocks = packed.shape[0], packed.shape[1] // 32, 32
    nibbles = torch.stack((low.view(blocks), high.view(blocks)), dim=2)
    return ((nibbles ^ 8) - 8).view(torch.int8).reshape(packed.shape[0], packed.shape[1] * 2)


def pack_transform(matrix: Tensor, right: bool) -> Tensor:
    """A float16 matrix [K, N], inputs by outputs, in the order of fragments: [N'/16, K'/16, 32, 8], K' the next multiple of 16, N' of 16 or, of a right one,
    32."""
    k, n = matrix.shape
    m = F.pad(matrix.T, (0, -k % 16, 0, -n % (32 if right else 16)))
    if right:
        m = m.reshape(-1, 8, 4, m.shape[1]).transpose(1, 2).reshape(m.shape)
    tiles = m.reshape(m.shape[0] // 16, 2, 8, m.shape[1] // 16, 2, 4, 2)
    return tiles.permute(0, 3, 2, 5, 4, 1, 6).reshape(tiles.shape[0], tiles.shape[3], 32, 8).contiguous()


def unpack_transform(packed: Tensor, size: int, right: bool) -> Tensor:
    """Undo `pack_transform`: the square matrix [size, size]."""
    outputs, inputs = packed.shape[:2]
    m = packed.reshape(outputs, inputs, 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6).reshape(16 * outputs, 16 * inputs)
    if right:
        m = m.reshape(-1, 4, 8, m.shape[1]).transpose(1, 2).reshape(m.shape)
    return m[:size, :size].T


def exchange_bytes(packed: Tensor) -> Tensor:
    """Packed int4 uint8 [N', K'/2] between the order of `pack_weight` and that for float inputs; its own inverse."""
    return packed.view(packed.shape[0], packed.shape[1] // 4, 4)[..., [0, 2, 1, 3]].reshape(packed.shape)


def permute_rows(weight: Tensor) -> Tensor:
    """[N, ...] -> [N', ...] with N' the next multiple of 32, rows in the kernels' order. Its own inverse, but for the padding."""
    n = weight.shape[0]
    if n % ROWS:
        weight = torch.cat((weight, weight.new_zeros((-n % ROWS, *weight.shape[1:]))))
    groups = weight.reshape(weight.shape[0] // ROWS, 4, 4, 2, *weight.shape[1:])
    return groups.transpose(1, 2).reshape(weight.shape).contiguous()


def bits_of(order: Tensor, features: int) -> Tensor:
    """uint8 [⌈features/8⌉]: bit c % 8 of byte c / 8 is whether feature c is in `order`, int32 [K'], in which -1 is none."""
    there = torch.zeros(round_up(features, 8), dtype=torch.uint8, device=order.device)
    there[order[order >= 0].long()] = 1
    return (there.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=order.device)).sum(1, dtype=torch.uint8)


def starts_of(order: Tensor, fp: Tensor | None, features: int) -> Tensor | None:
    """int32 [features / 8], how many of `order` come before each eighth feature; None unless order and fp [F], which -1 may follow, ascend and
    share all features, and these are a multiple of 8."""
    kept = order.new_empty(0) if fp is None else fp[fp >= 0]
    both = torch.cat((order, kept)).sort().values
    if features % 8 or not torch.equal(both, torch.arange(features, dtype=both.dtype, device=both.device)) or bool(
            (order.diff() < 0).any()) or bool((kept.diff() < 0).any()) or fp is not None and not torch.equal(fp[: len(kept)], kept):
        return None
    return torch.searchsorted(order, torch.arange(0, features, 8, dtype=order.dtype, device=order.device)).to(torch.int32)


def even_first(constants: Tensor) -> Tensor:
    """Constants of groups of columns [G, N] -> [G, N'] in the kernels' order, contiguous."""
    padded = F.pad(constants, (0, -constants.shape[-1] % ROWS))
    return padded.view(len(padded), padded.shape[1] // 8, 4, 2).transpose(2, 3).reshape(padded.shape).contiguous()


def even_first_undone(constants: Tensor) -> Tensor:
    """[G, N'] in the kernels' order -> logical order."""
    return constants.reshape(len(constants), constants.shape[1] // 8, 2, 4).transpose(2, 3).reshape(constants.shape)


def pad_columns(values: Tensor) -> Tensor:
    """A constant for each output column, [..., N], as contiguous float32 [..., N'], the added ones 0."""
    return F.pad(values.to(torch.float32), (0, -values.shape[-1] % ROWS)).contiguous()


def _check_bits(bits: int) -> None:
    if bits not in COLUMNS:
        raise ValueError(f"pack_weight: bits = {bits}; the kernels take weights of 8 or 4")


def unit_columns(x: Tensor) -> Tensor:
    """x with neighbouring columns side by side in memory: x itself where they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
