"""Input features that stay in float16 because their values are large (QUIK, Ashkboos et al., arXiv 2310.09259)."""

from __future__ import annotations

import torch
from torch import Tensor

from vitq.formats import Columns
from vitq.recipe import QuantSpec

MULTIPLE = 16  # of a step of the float16 multiplication


def outlier_count(spec: QuantSpec, features: int) -> int:
    """How many of a layer's input features stay in float16: as many as `spec` asks for, at most its part of all, to the nearest 16 that leaves
    some."""
    count = int(min(spec.outliers, spec.outlier_limit * features) / MULTIPLE + 0.5) * MULTIPLE
    return min(count, (features - 1) // MULTIPLE * MULTIPLE)


def outlier_columns(largest: Tensor, count: int) -> Columns:
    """The columns of an input whose features have these largest absolute values [K]: the `count` largest in float16, ties to the first, the
    others as codes; both in the order of the features."""
    return kept_columns(torch.argsort(largest.cpu().double(), descending=True, stable=True)[:count].sort().values, len(largest))


def kept_columns(kept: Tensor, features: int) -> Columns:
    """The columns of an input of which the features `kept`, integers [F], stay in float16, in that order; the others are codes, in theirs."""
    coded = torch.ones(features, dtype=torch.bool)
    coded[kept.cpu().long()] = False
    return Columns(coded.nonzero()[:, 0].to(torch.int32), fp=kept.cpu().to(torch.int32))
