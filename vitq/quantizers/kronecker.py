"""The matrices that mix the numbers of a row before it is quantized: how large they are, and Hadamard's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = 256  # a kernel holds both in shared memory
LEAST = 8  # mixing fewer numbers evens out nothing


def sizes(features: int, heads: int | None = None) -> tuple[int | None, int | None]:
    """How many rows and columns the left and the right matrix of a transform of so many features have; None for one that there is not.

    heads: of an attention whose output these are, which are mixed with one another. Else the divisors next to the square root of K, which make
    a product of two matrices cheapest: 4096 = 64 · 64, 11008 = 86 · 128. Where the larger one exceeds 256, a right one of the largest divisor up
    to 256, which mixes neighbours in blocks; none at all where that is below 8 (11006 = 2 · 5503).
    """
    if heads is not None:
        return (heads, None) if 1 < heads <= LARGEST else (None, None)
    if features < LEAST:
        return None, None
    left = next(d for d in range(math.isqrt(features), 0, -1) if features % d == 0)
    if features // left <= LARGEST:
        return (left if left > 1 else None), features // left
    block = next(d for d in range(LARGEST, 0, -1) if features % d == 0)
    return None, block if block >= LEAST else None


def hadamard(n: int) -> Tensor:
    """An orthogonal matrix [n, n] that spreads each number over all, float64: of n = 2^k·m Sylvester's Hadamard matrix of 2^k, and of the odd part
    m the discrete cosine transform."""
    odd = n
    while odd % 2 == 0:
        odd //= 2
    row, column = torch.arange(odd, dtype=torch.float64)[:, None], torch.arange(odd, dtype=torch.float64)
    matrix = torch.cos(math.pi * (column + 0.5) * row / odd) * math.sqrt(2.0 / odd)
    matrix[0] = math.sqrt(1.0 / odd)
    while len(matrix) < n:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1))) / math.sqrt(2.0)
    return matrix
