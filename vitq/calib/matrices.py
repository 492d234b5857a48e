"""The matrices that block_gradient learns: how they are parametrised, so that each can be inverted, and made on a GPU where a CUDA graph holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitq.quantizers.kronecker import hadamard

LEAST_BATCH = 4  # of matrices up to 256 x 256 that torch gives to cuBLAS: what it gives to cuSOLVER, no CUDA graph can hold


class Matrix(nn.Module):
    """An invertible matrix P [n, n] and the transpose of its inverse: `pair`, as `Equal` made them last. `svd`: U·diag(d)·Vᵀ, d from 1 on, U and V orthogonal
    by Cayley's map of skew matrices, from a random start: start · (I + A/2)(I − A/2)⁻¹. `direct`: P itself, which starts as such a U·Vᵀ."""

    def __init__(self, n: int, kind: str, generator: torch.Generator) -> None:
        super().__init__()
        self.n, self.kind = n, kind
        q, r = torch.linalg.qr(torch.randn(2, n, n, dtype=torch.float64, generator=generator))
        start = (q * r.diagonal(dim1=1, dim2=2).sign()[:, None]).float()
        if kind == "svd":
            self.register_buffer("start", start)
            self.skew, self.log_d = nn.Parameter(torch.zeros(2, n, n)), nn.Parameter(torch.zeros(n))
        else:
            self.raw = nn.Parameter(start[0] @ start[1].T)


class Equal:
    """Matrices of one size and kind, which are made together: a small one takes a GPU as long as a few of them do."""

    def __init__(self, matrices: list[Matrix]) -> None:
        self.matrices, first = matrices, next(matrices[0].parameters())
        self.eye = torch.eye(matrices[0].n, device=first.device)
        self.start = torch.cat([one.start for one in matrices]) if matrices[0].kind == "svd" else None

    def make(self) -> None:
        """Make the `pair` of each, of what was learned so far."""
        if self.start is None:
            raw = [one.raw for one in self.matrices]
            inverse = torch.linalg.inv_ex(self._filled(torch.stack(raw)).double())[0]  # `_ex`: nothing is read on the host
            pairs = zip(raw, _first(inverse, len(raw)).mT.float())
        else:
            skew = torch.cat([one.skew for one in self.matrices])
            half = (skew - skew.mT) / 2
            cayley = torch.linalg.solve_ex(self._filled(self.eye - half), self._filled(self.eye + half))[0]  # never singular
            u, v = (self.start @ _first(cayley, len(half))).unflatten(0, (-1, 2)).unbind(1)
            log_d = torch.stack([one.log_d for one in self.matrices])[:, None]
            pairs = ((a @ c.T, b @ c.T) for a, b, c in zip(u * log_d.exp(), u * (-log_d).exp(), v))
        for one, pair in zip(self.matrices, pairs):
            one.pair = pair

    def _filled(self, matrices: Tensor) -> Tensor:
        """Up to `LEAST_BATCH` with unit matrices on a GPU."""
        rest = LEAST_BATCH - len(matrices) if matrices.is_cuda else 0
        return torch.cat((matrices, self.eye.expand(rest, -1, -1))) if rest > 0 else matrices


def _first(matrices: Tensor, count: int) -> Tensor:
    return matrices if len(matrices) == count else matrices[:count]  # a slice costs launches in the backward pass, of all of them too


def equals(modules: nn.Module) -> list[Equal]:
    """The learned matrices in the modules."""
    found: dict[tuple[int, str], list[Matrix]] = {}
    for module in modules.modules():
        if isinstance(module, Matrix):
            found.setdefault((module.n, module.kind), []).append(module)
    return [Equal(matrices) for matrices in found.values()]


@contextmanager
def capturable(matrices: list[Equal]) -> Iterator[None]:
    """Inside, matrices on a GPU are inverted by what a CUDA graph can hold: larger ones not by MAGMA, which reads results on the host."""
    if not (torch.cuda.has_magma and any(equal.eye.is_cuda and len(equal.eye) > 128 for equal in matrices)):
        yield
        return
    before = torch.backends.cuda.preferred_linalg_library()
    torch.backends.cuda.preferred_linalg_library("cusolver")  # which leaves batches to cuBLAS
    try:
        yield
    finally:
        torch.backends.cuda.preferred_linalg_library(before)


class Fixed(nn.Module):
    """A matrix that is not learned, orthogonal."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix.float())

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.matrix, self.matrix


def matrix_of(transform: str, n: int | None, options: Mapping[str, Any], generator: torch.Generator) -> nn.Module | None:
    if n is None:
        return None
    return Fixed(hadamard(n)) if transform == "hadamard" else Matrix(n, options["matrices"], generator)
