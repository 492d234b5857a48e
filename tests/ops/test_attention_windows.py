"""Attention on windows of an image, and with fewer queries than keys, against plain attention on what timm would cut."""

from __future__ import annotations

import pytest
import torch
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, window_partition, window_reverse

from vitq.formats import ActivationFormat, QTensor
from vitq.ops import dispatch
from vitq.ops.attention import AttentionSpec
from vitq.ops.common import OutputFormat, signed
from vitq.ops.windows import Windows, from_windows, merge_patches, shift_mask, to_windows
from vitq.plan import AttentionParams

HEADS, DIM = 3, 16
CASES = [Windows(8, 8, (4, 4)), Windows(8, 12, (4, 4), (2, 2)), Windows(9, 10, (4, 4), (2, 2)), Windows(5, 7, (7, 7), (3, 3)),
         Windows(14, 7, (7, 7), (3, 0)), Windows(7, 7, (7, 7)), Windows(6, 10, (3, 5), (1, 2)), Windows(1, 3, (2, 2), (1, 1))]


def kernels() -> list:
    return [pytest.param(kernel, id=f"{backend}-{kernel.name}")
            for backend, kernel in dispatch.registered("attention") if backend != "cuda"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator(seed))


def packed(kernel, output: OutputFormat | None):
    params = AttentionParams(ActivationFormat(8, scale=0.02, zero_point=9), ActivationFormat(8, scale=0.02, zero_point=-4),
                             ActivationFormat(8, scale=0.01, zero_point=3), 8)
    spec = AttentionSpec(params, HEADS, DIM, DIM**-0.5, output)
    if why := kernel.supports(spec):
        pytest.skip(why)
    return kernel.pack(spec, torch.device("cpu"))


def plain(y: torch.Tensor | QTensor) -> torch.Tensor:
    return signed(y) if isinstance(y, QTensor) else y


def cut_by_timm(x: torch.Tensor, windows: Windows, pad: torch.Tensor) -> torch.Tensor:
    """[B, H·W, ...] -> [B·nW, T, ...] as SwinTransformerBlock does it, the padding filled in afterwards."""
    inner = x.shape[2:]
    x = x.reshape(len(x), windows.height, windows.width, -1).long()
    x = torch.roll(x, (-windows.shift[0], -windows.shift[1]), (1, 2))
    (height, width), outside = windows.padded, 1000
    x = torch.nn.functional.pad(x, (0, 0, 0, width - windows.width, 0, height - windows.height), value=outside)
    x = torch.where(x == outside, pad.reshape(-1).long(), x).to(torch.int8)
    return window_partition(x, windows.window).reshape(-1, windows.tokens, *inner)


@pytest.mark.parametrize("output", [None, OutputFormat(8, torch.tensor(0.004), torch.tensor(2, dtype=torch.int32))])
@pytest.mark.parametrize("windows", CASES, ids=lambda w: f"{w.height}x{w.width}-{w.window}-{w.shift}")
@pytest.mark.parametrize("kernel", kernels())
def test_windows_of_an_image(kernel, windows: Windows, output: OutputFormat | None) -> None:
    constants = packed(kernel, output)
    q, k, v = codes(2, windows.height * windows.width, 3, HEADS, DIM).unbind(2)  # strided, as qkv leaves them
    pad = codes(3, HEADS, DIM, seed=1)
    bias = torch.randn(HEADS, windows.tokens, windows.tokens, generator=generator(2))
    y = plain(kernel.run(constants, q, k, v, dtype=torch.float32, bias=bias, window=windows, pad=pad))
    assert y.shape == (2, windows.height * windows.width, HEADS * DIM)

    cut = [cut_by_timm(t, windows, pad[i]) for i, t in enumerate((q, k, v))]
    block = SwinTransformerBlock(8, windows.padded, num_heads=1, window_size=windows.window, always_partition=True)
    block.window_size, block.shift_size = windows.window, windows.shift
    mask = block.get_attn_mask(torch.zeros(1, *windows.padded, 1))
    inside = plain(kernel.run(constants, *cut, dtype=torch.float32, bias=bias, mask=mask))
    height, width = windows.padded
    image = window_reverse(inside.reshape(-1, *windows.window, HEADS * DIM), windows.window, height, width)
    image = torch.roll(image[:, : windows.height, : windows.width], windows.shift, (1, 2))
    assert torch.equal(y, image.reshape(y.shape))


@pytest.mark.parametrize("windows", CASES)
def test_the_shift_mask_is_timms(windows: Windows) -> None:
    block = SwinTransformerBlock(8, windows.padded, num_heads=1, window_size=windows.window, always_partition=True)
    block.window_size, block.shift_size = windows.window, windows.shift
    expected = block.get_attn_mask(torch.zeros(1, *windows.padded, 1))
    found = shift_mask(windows, torch.device("cpu"))
    assert (found is None) == (expected is None)
    assert found is None or torch.equal(found, expected)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("windows", CASES)
def test_windows_go_back_where_they_were(windows: Windows, batch: int) -> None:
    x = torch.randn(batch, windows.height * windows.width, 2, 5, generator=generator(3))
    cut = to_windows(x, windows, torch.zeros(2, 5))
    assert cut.shape[1:] == (windows.tokens, 2, 5)
    assert torch.equal(from_windows(cut.flatten(2), windows), x.flatten(2))


def test_the_geometry() -> None:
    windows = Windows(9, 12, (4, 6), (2, 3))
    assert windows.padded == (12, 12) and windows.pads and windows.tokens == 24
    assert windows.list() == [9, 12, 4, 6, 2, 3] and not Windows(8, 12, (4, 6)).pads


@pytest.mark.parametrize("queries", [1, 2, 19])
@pytest.mark.parametrize("output", [None, OutputFormat(8, torch.tensor(0.004), torch.tensor(2, dtype=torch.int32))])
@pytest.mark.parametrize("kernel", kernels())
def test_fewer_queries_are_the_first_rows(kernel, queries: int, output: OutputFormat | None) -> None:
    constants = packed(kernel, output)
    q, k, v = codes(4, 19, 3, HEADS, DIM).unbind(2)
    mask = torch.zeros(2, 19, 19).masked_fill_(torch.rand(2, 19, 19, generator=generator(4)) < 0.3, -torch.inf)
    whole = plain(kernel.run(constants, q, k, v, dtype=torch.float32, mask=mask))
    part = plain(kernel.run(constants, q[:, :queries], k, v, dtype=torch.float32, mask=mask[:, :queries]))
    assert part.is_contiguous() and torch.equal(part, whole[:, :queries])


def test_patches_merge_in_timms_order() -> None:
    merging = PatchMerging(5)
    merging.norm, merging.reduction = torch.nn.Identity(), torch.nn.Identity()
    x = torch.randn(2, 6, 8, 5, generator=generator(5))
    assert torch.equal(merge_patches(x), merging(x))
