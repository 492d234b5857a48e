"""Multiply what an attention's values are by a matrix, and the columns that read them by its inverse: their channels are mixed at no cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def value_rows(weight: Tensor, start: int, matrix: Tensor) -> Tensor:
    """Rows `start` to the end of a weight [N, K], or a bias [N], that make the values of heads, D rows each: each head's v becomes v·matrix, of
    [D, D]. Differentiable; in the dtype of both."""
    rows = weight[start:].unflatten(0, (-1, len(matrix)))
    mixed = torch.einsum("hdk,de->hek", rows, matrix) if weight.dim() == 2 else rows @ matrix
    return torch.cat((weight[:start], mixed.flatten(0, 1)))


def value_columns(weight: Tensor, inverse_transposed: Tensor) -> Tensor:
    """Columns of a weight [N, H·D] that read values: those for values times the matrix of which this, [D, D], is the inverse transpose."""
    return (weight.unflatten(1, (-1, len(inverse_transposed))) @ inverse_transposed).flatten(1)


@torch.no_grad()
def mix_values(qkv: nn.Linear, start: int, proj: nn.Linear, matrix: Tensor) -> None:
    """Multiply the values by `matrix` [D, D] in place: rows of qkv from `start` on, and by its inverse transpose the columns of proj."""
    matrix = matrix.double().to(qkv.weight.device)
    qkv.weight.copy_(value_rows(qkv.weight.double(), start, matrix))
    if qkv.bias is not None:
        qkv.bias.copy_(value_rows(qkv.bias.double(), start, matrix))
    proj.weight.copy_(value_columns(proj.weight.double(), torch.linalg.inv(matrix).T))
