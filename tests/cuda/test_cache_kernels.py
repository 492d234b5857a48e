"""Attention to a static cache: the operators give what torch does with the numbers of the rows, on a CPU by their reference, and on a GPU again."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import append_rows
from helpers import sqnr
from torch import Tensor

import vitq.cuda  # noqa: F401  (registers)
from vitq.cuda.cache_kernels import CudaCachedAttention, fits, whole
from vitq.formats import Kronecker
from vitq.ops.cached_attention import CachedAttention, CachedAttentionSpec, CachePart, RowCodes, codes_of, write

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INT4, INT8 = RowCodes(4, False), RowCodes(8, True)
CLIP = torch.tensor([0.9, 0.8])
PARTS = {
    "int4": [(None, INT4, INT4)], "int8": [(None, INT8, INT8)], "mixed": [(None, INT8, INT4)], "keys in float": [(None, None, INT4)],
    "values in float": [(None, INT4, None)], "parts": [(1, INT4, INT4), (2, INT8, INT8)], "parts in float": [(1, INT4, INT8), (2, None, None)],
    "transformed": [(None, RowCodes(4, False, CLIP), RowCodes(3, True))], "floats": [(None, None, None)],
}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spec_of(name: str, dim: int, device: str) -> CachedAttentionSpec:
    parts = []
    for heads, keys, values in PARTS[name]:
        transform = Kronecker(None, torch.linalg.qr(randn(dim, dim, seed=0))[0].half().to(device)) if name == "transformed" else None
        inverse = None if transform is None else transform.inverse_transposed(torch.eye(dim, device=device))
        moved = (None if codes is None else RowCodes(codes.bits, codes.symmetric, None if codes.clip is None else codes.clip.to(device)) for codes in (keys, values))
        parts.append(CachePart(heads, *moved, transform, inverse))
    return CachedAttentionSpec(dim, tuple(parts))


def two_steps(kernel: CachedAttention | CudaCachedAttention, name: str, tokens: int, dim: int, device: str) -> Tensor:
    """After a prompt of 11 tokens, without and with a mask, of grouped queries."""
    spec, batch, heads, room = spec_of(name, dim, device), 2, 3, 48
    packed, rows, state = kernel.pack(spec, torch.device(device)), [], torch.zeros(2, dtype=torch.long, device=device)
    for seed, side in enumerate(("keys", "values")):
        new = randn(batch, heads, 11, dim, seed=seed).half().to(device)
        codes = codes_of([(part.heads, getattr(part, side)) for part in spec.parts])
        first = new if codes is None else codes.pack(new)
        rows.append(first.new_zeros(*first.shape[:2], room, first.shape[-1]))
        write(rows[-1], new, codes, state[0])
    state[0] += 11
    steps = []
    for step in range(2):
        q, k, v = (randn(batch, tokens, n, dim, seed=10 * step + i).half().to(device).transpose(1, 2) for i, n in enumerate((2 * heads, heads, heads)))
        mask = None
        if step:
            own = 11 + tokens + torch.arange(tokens, device=device)
            mask = (torch.arange(room, device=device) <= own[:, None]).repeat(batch, 1, 1, 1)
            mask[1, ..., :4] = False
        cos, sin = (f(randn(1, tokens, dim // 2, seed=step)).repeat(1, 1, 2).half().to(device) for f in (torch.cos, torch.sin))
        steps.append(kernel.run(packed, q, k, v, *rows, state, mask, dim**-0.5, (cos, sin), 0 if step else 7))
    assert state.tolist() == [11 + 2 * tokens, 0] and steps[0].shape == (batch, tokens, 2 * heads * dim)
    return torch.cat(steps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("name", PARTS)
def test_operators_attend_as_torch_does(name: str, tokens: int, dim: int, device: str) -> None:
    found = [two_steps(kernel, name, tokens, dim, device) for kernel in (CachedAttention(), CudaCachedAttention())]
    assert sqnr(*found) > 45 and sqnr(found[0].roll(1, -1), found[1]) < 5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["parts in float", "transformed"])
def test_torch_attends_where_a_block_has_no_room(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitq.cuda.cache_kernels.fits", lambda packed, q: False)
    monkeypatch.setattr(CudaCachedAttention, "_few", None)
    found = [two_steps(kernel, name, 3, 128, device) for kernel in (CachedAttention(), CudaCachedAttention())]
    assert torch.equal(*found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", ["first", "exact", "later"])
@pytest.mark.parametrize("name", PARTS)
def test_prompts_attend_as_torch_does(name: str, how: str, masked: bool, dtype: torch.dtype, device: str) -> None:
    """20 tokens of an empty cache, by their codes' numbers or by their own, or behind 20 others."""
    spec, batch, heads, tokens, dim, room = spec_of(name, 64, device), 2, 3, 20, 64, 48
    q, k, v = (randn(batch, tokens, n, dim, seed=i).to(device, dtype).transpose(1, 2) for i, n in enumerate((2 * heads, heads, heads)))
    cos, sin = (f(randn(1, tokens, dim // 2, seed=3)).repeat(1, 1, 2).to(device, dtype) for f in (torch.cos, torch.sin))
    start = tokens if how == "later" else 0
    mask = None
    if masked:
        mask = (torch.arange(room, device=device) <= start + torch.arange(tokens, device=device)[:, None]).repeat(batch, 1, 1, 1)
        mask[1, ..., :4], mask[1, ..., torch.arange(4), torch.arange(4)] = False, True
    found, kept = [], []
    for kernel in (CachedAttention(), CudaCachedAttention()):
        packed, state, rows = kernel.pack(spec, torch.device(device)), torch.zeros(2, dtype=torch.long, device=device), []
        for side in ("keys", "values"):
            codes = codes_of([(part.heads, getattr(part, side)) for part in spec.parts])
            one = k if codes is None else codes.pack(k)
            rows.append(one.new_zeros(*one.shape[:2], room, one.shape[-1]))
        if start:
            kernel.run(packed, q.flip(2), k.flip(2), v.flip(2), *rows, state, None, dim**-0.5, (cos, sin), first=True)
        y = kernel.run(packed, q, k, v, *rows, state, mask, dim**-0.5, (cos, sin), first=not start, exact=how == "exact")
        assert state.tolist() == [start + tokens, 0] and y.shape == (batch, tokens, 2 * heads * dim)
        found.append(y)
        kept.append([rows[i][:, :, : start + tokens] for i in (0, 1)])
    assert sqnr(*found) > (45 if dtype == torch.float16 else 30) and sqnr(found[0].roll(1, 1), found[1]) < 5
    for one, other in zip(*kept):  # rows of matrices may differ by a code
        assert (one != other).float().mean() < (0.02 if name == "transformed" else 0.002)


def test_keys_are_turned_back_where_a_prompt_lies_at_multiples_of_16_bytes() -> None:
    prompt = torch.empty(1, 2, 9, 128, dtype=torch.float16, device="meta")
    assert whole(prompt) and whole(prompt, None) and not whole(prompt[:, :, :8]) and not whole(prompt[..., 1:]) and not whole(prompt, prompt[..., :-4].contiguous())


def test_a_few_tokens_attend_where_a_block_has_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of float rows of 96 numbers do not fit a block of sm_86 and sm_89, nor where some heads alone are floats; those of 80 do, codes, and
    floats of 128 beside 4 bits."""
    def found(name: str, dim: int) -> bool:
        return fits(CudaCachedAttention().pack(spec_of(name, dim, "cpu"), torch.device("cpu")), torch.empty(1, 2, 1, dim, dtype=torch.float16, device="meta"))

    monkeypatch.setattr("vitq.cuda.cache_kernels.most_shared", lambda device: 101_376)
    assert found("floats", 80) and found("int8", 128) and found("keys in float", 128)
    assert not found("floats", 96) and not found("floats", 128) and not found("parts in float", 96)
    monkeypatch.setattr("vitq.cuda.cache_kernels.most_shared", lambda device: 232_448)
    assert found("floats", 128)


@pytest.mark.gpu
def test_a_graph_goes_on_behind_what_is_there() -> None:
    """Each replay appends to what those before left, and counts it."""
    want = append_rows(2, 2, 3, 128, rotary=2, keys=(8, True))
    got = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in want.items()}
    torch.ops.vitq.append_rows(**want)
    torch.ops.vitq.append_rows(**got)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.vitq.append_rows(**got)
    for _ in range(9):  # the last one has room for no more than a part
        torch.ops.vitq.append_rows(**want)
        graph.replay()
    for name in ("keys", "values", "state", "q_out"):
        assert torch.equal(got[name].cpu(), want[name]), name
    assert want["state"].tolist() == [35, 0]
