"""The float LayerNorm op, the merging LayerNorm, and quantize_patches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitq.formats import ActivationFormat
from vitq.ops import dispatch
from vitq.ops.common import signed
from vitq.ops.float_norm import FloatNormSpec
from vitq.ops.layer_norm import LayerNormSpec
from vitq.ops.patches import PatchesSpec, nan_guard
from vitq.ops.windows import merge_patches

CPU = torch.device("cpu")


def kernels(op: str) -> list:
    return [pytest.param(kernel, id=f"{backend}-{kernel.name}")
            for backend, kernel in dispatch.registered(op) if backend != "cuda"]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(kernel, spec, *args, **kwargs):
    if why := kernel.supports(spec):
        pytest.skip(why)
    return kernel.run(kernel.pack(spec, CPU), *args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", kernels("layer_norm"))
def test_float_norm_is_rounded_once(kernel, bias: bool, dtype: torch.dtype) -> None:
    weight, shift = randn(48, seed=1), randn(48, seed=2) if bias else None
    x = randn(3, 7, 48).to(dtype)
    for view in (x, x[:, :1], x.transpose(0, 1), torch.cat([x, x], 2)[..., :48]):
        y = run(kernel, FloatNormSpec(weight, shift, 1e-5), view, dtype=dtype)
        assert y.dtype == dtype and y.shape == view.shape
        assert torch.equal(y, F.layer_norm(view.float(), (48,), weight, shift, 1e-5).to(dtype))


@pytest.mark.parametrize("output", [ActivationFormat(8, scale=0.05, zero_point=7), ActivationFormat(8, dynamic=True)])
@pytest.mark.parametrize("kernel", kernels("layer_norm_quantize"))
def test_merging_norm_is_the_norm_of_merged_patches(kernel, output: ActivationFormat) -> None:
    x, weight, bias = randn(2, 6, 4, 12), randn(48, seed=1), randn(48, seed=2)
    merged = run(kernel, LayerNormSpec(weight, bias, 1e-5, output, True), x)
    plain = run(kernel, LayerNormSpec(weight, bias, 1e-5, output), merge_patches(x))
    assert merged.shape == (2, 3, 2, 48)
    assert torch.equal(merged.codes, plain.codes) and torch.equal(merged.scale, plain.scale)


@pytest.mark.parametrize("patch, size", [((4, 4), (12, 8)), ((3, 2), (10, 7)), ((16, 16), (16, 16))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kernel", kernels("quantize_patches"))
def test_patches_have_a_convolutions_order(kernel, patch: tuple, size: tuple, dtype: torch.dtype) -> None:
    images, fmt = randn(2, 3, *size).to(dtype), ActivationFormat(8, scale=0.03, zero_point=-5)
    codes, broken = run(kernel, PatchesSpec(fmt, patch), images)
    rows = F.unfold(images[:, :, : size[0] // patch[0] * patch[0], : size[1] // patch[1] * patch[1]].float(), patch, stride=patch)
    expected = torch.clamp(torch.round(rows.transpose(1, 2) / fmt.scale) + fmt.zero_point, -128, 127)
    assert torch.equal(signed(codes).float(), expected) and torch.equal(broken, torch.zeros(2))


def test_the_guard_sees_one_broken_pixel() -> None:
    images = randn(5, 3, 8, 8)
    images[1, 2, 7, 7], images[3, 0, 0, 0], images[4, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
    assert nan_guard(images).isnan().tolist() == [False, True, False, True, True]
    assert nan_guard(images[:0]).shape == (0,)
