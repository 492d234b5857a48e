"""Transforms of rows: their sizes, Hadamard's matrices, products that stay what they were, clipped ranges."""

from __future__ import annotations

import pytest
import torch
from helpers import sqnr

from vitq.formats import ActivationFormat, Columns, Kronecker
from vitq.ops.dispatch import registered
from vitq.ops.quantize import ReferenceQuantize
from vitq.quantizers.activation import fake_activation
from vitq.quantizers.kronecker import hadamard, sizes
from vitq.quantizers.uniform import quantize_per_token, quantize_per_token_asymmetric


@pytest.mark.parametrize("features, wanted", [
    (4096, (64, 64)), (5120, (64, 80)), (8192, (64, 128)), (11008, (86, 128)), (13824, (108, 128)), (14336, (112, 128)), (28672, (128, 224)),
    (18944, (128, 148)), (3072, (48, 64)), (768, (24, 32)), (576, (24, 24)), (1536, (32, 48)), (49, (7, 7)), (64, (8, 8)), (251, (None, 251)),
    (11006, (None, None)), (2 * 5 * 7 * 1009, (None, 70)), (1, (None, None))])
def test_divisors_next_to_the_root(features: int, wanted: tuple) -> None:
    assert sizes(features) == wanted


def test_heads_are_mixed_with_one_another() -> None:
    assert sizes(4096, heads=32) == (32, None) and sizes(64, heads=1) == (None, None) and sizes(64 * 257, heads=257) == (None, None)


@pytest.mark.parametrize("n", [1, 2, 8, 64, 12, 86, 112, 7])
def test_hadamard_matrices_are_orthogonal_and_spread(n: int) -> None:
    matrix = hadamard(n)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    assert matrix.abs().max() <= (2.0 / n) ** 0.5 + 1e-12  # no number stays where it was
    if n in (2, 8, 64):
        assert torch.equal((matrix * n**0.5).round().abs(), torch.ones(n, n, dtype=torch.float64))


def random_kronecker(a: int | None, b: int | None) -> Kronecker:
    torch.manual_seed(0)
    left, right = (None if n is None else (torch.linalg.qr(torch.randn(n, n))[0] * torch.linspace(0.5, 2, n)).half().contiguous() for n in (a, b))
    return Kronecker(left, right)


@pytest.mark.parametrize("a, b, features", [(6, 8, 48), (7, None, 56), (None, 16, 64), (1, 5, 5), (12, 4, 48)])
def test_products_stay_what_they_were(a: int | None, b: int | None, features: int) -> None:
    k, x, weight = random_kronecker(a, b), torch.randn(3, 5, features), torch.randn(11, features)
    big = torch.kron(*(torch.eye(features // (a or b)) if m is None else m.float() for m in (k.left, k.right)))
    y, w = k.apply(x), k.inverse_transposed(weight)
    torch.testing.assert_close(y, x @ big, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(w, weight @ torch.linalg.inv(big).T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(y @ w.T, x @ weight.T, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(k.inverse(y), x, atol=5e-3, rtol=5e-3)


def test_large_numbers_saturate() -> None:
    k = Kronecker(torch.eye(2).half() * 4, torch.eye(2).half() * 4)
    y = k.apply(torch.tensor([[7e4, -3e4, 1.0, 0.0]]))
    assert torch.equal(y, torch.tensor([[65504.0 * 4, -65504.0 * 4, 16.0, 0.0]]))


@pytest.mark.parametrize("make, message", [
    (lambda: Kronecker(), "neither left nor right"),
    (lambda: Kronecker(torch.eye(3)), "left is torch.float32"),
    (lambda: Kronecker(right=torch.zeros(2, 3).half()), r"right is torch.float16 \[2, 3\]"),
    (lambda: Kronecker(torch.eye(3).half(), torch.eye(4).half()).apply(torch.zeros(2, 13)), "3 x 4 matrices do not divide rows of 13"),
    (lambda: Kronecker(right=torch.eye(4).half()).apply(torch.zeros(2, 13)), "no x 4 matrices do not divide rows of 13"),
    (lambda: ActivationFormat(8, scale=1.0, transform=Kronecker(torch.eye(3).half())), "are for dynamic formats"),
    (lambda: ActivationFormat(8, scale=1.0, clip=torch.ones(2)), "are for dynamic formats"),
    (lambda: ActivationFormat(8, dynamic=True, clip=torch.ones(3)), r"clip is torch.float32 \[3\]"),
    (lambda: ActivationFormat(8, dynamic=True, columns=Columns(), transform=Kronecker(torch.eye(3).half())), "give one of the two"),
])
def test_refuses(make, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize("bits", [4, 8])
def test_clipped_ranges(bits: int) -> None:
    x = torch.tensor([[-4.0, 1.0, 2.0], [1.0, 2.0, 3.0], [-3.0, -2.0, -1.0], [0.0, 0.0, 0.0]])
    clip, top = torch.tensor([0.5, 0.9]), 2 ** (bits - 1) - 1
    codes, scale = quantize_per_token(x, bits, clip=clip)
    torch.testing.assert_close(scale[:3, 0] * top, torch.tensor([2.0, 2.7, 1.5]))
    assert int(codes[0, 0]) == -top - 1 and int(codes[0, 2]) == top and codes[3].eq(0).all()
    codes, scale, shift = quantize_per_token_asymmetric(x, bits, clip)
    lo, hi = shift - (top + 1) * scale, shift + top * scale
    torch.testing.assert_close(lo[:3, 0], torch.tensor([-2.0, 0.0, -1.5]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(hi[:3, 0], torch.tensor([1.8, 2.7, 0.0]), atol=1e-6, rtol=1e-6)
    whole = torch.ones(2)
    assert torch.equal(quantize_per_token(x, bits, clip=whole)[0], quantize_per_token(x, bits)[0])


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_reference_and_the_simulation_say_the_same(symmetric: bool) -> None:
    torch.manual_seed(1)
    fmt = ActivationFormat(4, dynamic=True, symmetric=symmetric, transform=random_kronecker(6, 8), clip=torch.tensor([0.8, 0.95]))
    x = torch.randn(2, 7, 48) * torch.logspace(-1, 1, 48)
    q, fake = ReferenceQuantize().run(fmt, x), fake_activation(x, fmt)
    assert torch.equal(q.dequantize(), fake) and sqnr(fmt.transform.apply(x), fake) > 12
    for backend, kernel in registered("quantize"):
        if backend == "cpu" and "torch" not in kernel.name:
            assert "transforms" in kernel.supports(fmt)
