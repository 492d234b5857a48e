"""How weights lie in memory for the CUDA kernels."""

from __future__ import annotations

import pytest
import torch

from vitq.cuda.layout import (bits_of, pack_transform, pack_weight, pad_columns, permute_rows, starts_of, unpack_transform,
                              unpack_weight, widen)
from vitq.formats import int_range


def codes(n: int, k: int, bits: int) -> torch.Tensor:
    lo, hi = int_range(bits)
    return torch.randint(lo, hi + 1, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("n, k", [(32, 64), (1, 1), (37, 70), (10, 384), (96, 129), (0, 64), (5, 0)])
@pytest.mark.parametrize("bits", [8, 4])
def test_there_and_back(bits: int, n: int, k: int, plain: bool) -> None:
    weight = codes(n, k, bits)
    packed = pack_weight(weight, bits, plain)
    assert packed.shape[0] == -(-n // 32) * 32 and packed.is_contiguous()
    assert packed.shape[1] == (-(-k // 32) * 32 if bits == 8 else -(-k // 64) * 32)
    assert torch.equal(unpack_weight(packed, bits, n, k, plain), weight)


def test_rows_where_the_kernels_expect_them() -> None:
    """physical 8·j + 2·c + e holds logical 8·c + 2·j + e."""
    weight = torch.arange(64, dtype=torch.int8)[:, None].expand(64, 32).contiguous()
    packed = pack_weight(weight, 8)
    for group in (0, 1):
        for j in range(4):
            for c in range(4):
                for e in range(2):
                    assert packed[32 * group + 8 * j + 2 * c + e, 0] == 32 * group + 8 * c + 2 * j + e
    assert torch.equal(permute_rows(packed), weight)


def test_nibbles_where_the_kernels_expect_them() -> None:
    """Byte i of a block of 64: k = i in the low nibble, i + 32 in the high one; masked and shifted, they are codes times 16."""
    weight = codes(32, 128, 4)
    packed, rows = pack_weight(weight, 4), permute_rows(weight)
    for block in (0, 1):
        own = packed[:, 32 * block : 32 * block + 32]
        assert torch.equal((own << 4).view(torch.int8) // 16, rows[:, 64 * block : 64 * block + 32])
        assert torch.equal((own & 0xF0).view(torch.int8) // 16, rows[:, 64 * block + 32 : 64 * block + 64])
    assert torch.equal(widen(packed), pack_weight(weight, 8))


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("size", [1, 7, 16, 64, 86, 128, 200])
def test_matrices_there_and_back(size: int, right: bool) -> None:
    matrix = torch.randn(size, size).half()
    packed = pack_transform(matrix, right)
    assert packed.is_contiguous() and int(packed.ne(0).sum()) == int(matrix.ne(0).sum())
    assert torch.equal(unpack_transform(packed, size, right), matrix)


def test_matrices_where_the_kernels_expect_them() -> None:
    """Lane 4 g + t has outputs g and g + 8 of inputs 2 t + e, then of 2 t + 8 + e; of a right one output 8 q + g is 4 g + q."""
    matrix = torch.arange(64 * 64).view(64, 64)[:, :64].remainder(2039).half()  # [inputs, outputs], integers that float16 holds
    left, right = pack_transform(matrix, False), pack_transform(matrix, True)
    for n in range(4):
        for k in range(4):
            for lane in range(32):
                for i in range(8):
                    output, inputs = 16 * n + lane // 4 + 8 * (i // 2 % 2), 16 * k + 2 * (lane % 4) + 8 * (i // 4) + i % 2
                    assert left[n, k, lane, i] == matrix[inputs, output]
                    assert right[n, k, lane, i] == matrix[inputs, 32 * (output // 32) + 4 * (output % 8) + output % 32 // 8]


def test_padding_is_zero() -> None:
    assert int(pack_weight(codes(5, 7, 8), 8).ne(0).sum()) <= 35
    padded = pad_columns(torch.ones(2, 37, dtype=torch.float64))
    assert padded.shape == (2, 64) and padded.dtype == torch.float32 and not padded[:, 37:].any()


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="8 or 4"):
        pack_weight(codes(3, 3, 8), 6)
    with pytest.raises(ValueError, match="int4 holds -8..7"):
        pack_weight(torch.full((2, 2), 9, dtype=torch.int8), 4)
    with pytest.raises(TypeError, match="torch.float32"):
        pack_weight(torch.zeros(2, 2), 8)


def test_which_features_are_in_an_order() -> None:
    order = torch.tensor([0, 1, 4, 9, 10, -1, 11], dtype=torch.int32)
    assert bits_of(order, 12).tolist() == [0b00010011, 0b1110]


def test_where_eights_of_features_start() -> None:
    """How many features of the order come before each eighth, where both sides ascend and share all features."""
    fp = torch.tensor([3, 8, 9, 17, -1, -1], dtype=torch.int32)
    order = torch.tensor([i for i in range(24) if i not in (3, 8, 9, 17)], dtype=torch.int32)
    assert starts_of(order, fp, 24).tolist() == [0, 7, 13] and starts_of(torch.arange(16, dtype=torch.int32), None, 16).tolist() == [0, 8]
    for other, kept, features in ((order.flip(0), fp, 24), (order, fp.flip(0), 24), (order[1:], fp, 24), (order, None, 24), (order, fp, 25)):
        assert starts_of(other, kept, features) is None
