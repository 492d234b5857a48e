"""Whole models on a GPU: converted there, moved there, and loaded there from a checkpoint made on a CPU. And without one: on the
compiled kernels' packing and calls, with the CPU implementations of their operators."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import build, images, quick, sqnr

import vitq
from vitq.cuda import loader
from vitq.ops import dispatch


@pytest.fixture
def compiled_kernels(monkeypatch):
    """Every op takes the CUDA library's kernel, though tensors are on the CPU."""
    import vitq.cuda.fallback

    def choose(op, backend, spec, device):
        kernel = next(kernel for which, kernel in dispatch.registered(op) if which == "cuda")
        assert type(kernel).__module__ != vitq.cuda.fallback.__name__ and kernel.supports(spec) is None
        return dispatch.Choice(kernel, "cuda")

    monkeypatch.setattr(loader, "why_unavailable", lambda device=None: None)
    monkeypatch.setattr(loader, "kernel_arch", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return lambda: monkeypatch.setattr(dispatch, "choose", choose)


@pytest.mark.parametrize("name, kwargs, recipe", [
    ("deit_tiny_patch16_224", {"depth": 1}, "w8a8"), ("deit_tiny_patch16_224", {"depth": 1}, "w4a8"),
    ("deit_tiny_patch16_224", {"depth": 1}, "w8a8-dynamic"),
    ("deit_tiny_patch16_224", {"depth": 1}, "phq-mixed"),
    ("deit_tiny_patch16_224", {"depth": 1}, "dual-w8a8"), ("deit_tiny_patch16_224", {"depth": 1}, "dual-w4a4"),
    ("swin_tiny_patch4_window7_224", {"depths": (2, 1), "img_size": 112}, "w8a8")])
def test_the_compiled_kernels_calls_without_a_gpu(name: str, kwargs: dict, recipe: str, compiled_kernels) -> None:
    """They equal the reference but for codes that a norm, GELU or softmax may round the other way, and trace into one graph."""
    model, chosen = build(name, **kwargs), quick(recipe)
    calib = [images(model, 4, seed=2)]
    statistics = calib if chosen.heads else vitq.calibrate(model, chosen, calib) if chosen.is_static else None
    x = images(model)
    expected = vitq.convert(model, chosen, statistics, dtype=torch.float32, backend="reference")(x)
    compiled_kernels()
    converted = vitq.convert(model, chosen, statistics, dtype=torch.float32)
    y = converted(x)
    assert sqnr(expected, y) > 30
    if recipe in ("w8a8", "phq-mixed"):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(converted, fullgraph=True, backend="eager")(x), y)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w8a8", "w4a8", "w4a4", "dual-w8a8", "dual-w4a4"])
@pytest.mark.parametrize("name, kwargs",
                         [("deit_tiny_patch16_224", {"depth": 2}), ("vit_small_patch14_reg4_dinov2", {"depth": 2}),
                                          ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 2, 1)})])
def test_execution_equals_simulation(name: str, kwargs: dict, recipe: str) -> None:
    model, chosen = build(name, **kwargs).cuda(), quick(recipe)
    calib = [images(model, 4, seed=2)] if chosen.is_static else None
    statistics = vitq.calibrate(model, chosen, calib) if calib else None
    converted = vitq.convert(model, chosen, statistics, dtype=torch.float32)
    x = images(model).cuda()
    simulated = vitq.simulate(model, chosen, statistics)(x)
    assert sqnr(simulated, converted(x)) > (15 if recipe.endswith("w4a4") else 35)
    rows = [r for r in vitq.explain(converted) if r.role in ("qkv", "fc1", "qk") and r.kernel != "sdpa"]
    assert all(r.backend == "cuda" for r in rows), rows


@pytest.mark.gpu
def test_accumulators_equal_the_cpus() -> None:
    x, w = (torch.randint(-128, 128, s, dtype=torch.int8, generator=torch.Generator().manual_seed(0)) for s in ((197, 384),
                                                                                                                (1152, 384)))
    assert torch.equal(vitq.ops.int_matmul(x.cuda(), w.cuda()).cpu(), vitq.ops.int_matmul(x, w))


@pytest.mark.gpu
def test_moves_between_devices_and_checkpoints_travel(tmp_path) -> None:
    model, recipe = build(depth=2), quick("w4a8")
    on_cpu = vitq.convert(model, recipe, [images(model, 4, seed=2)], dtype=torch.float32)
    x = images(model)
    expected = on_cpu(x)
    folder = vitq.save(on_cpu, tmp_path / "c", source={"model_kwargs": {"depth": 2}})
    for moved in (copy.deepcopy(on_cpu).cuda(), copy.deepcopy(on_cpu).to("cuda:0"),
                  vitq.load(folder, "cuda", dtype=torch.float32)):
        assert sqnr(expected, moved(x.cuda()).cpu()) > 35
    back = vitq.load(vitq.save(vitq.load(folder, "cuda"), tmp_path / "d"), "cpu", dtype=torch.float32)
    assert torch.equal(moved.cpu()(x), expected) and sqnr(expected, back(x)) > 35
    on_gpu = vitq.load(folder, "cuda")
    again = vitq.load(vitq.save(on_gpu, tmp_path / "e"), "cuda")
    assert torch.equal(again(x.cuda()), on_gpu(x.cuda())) and torch.equal(on_gpu(x.cuda()), on_gpu(x.cuda()))


@pytest.mark.gpu
def test_int4_stays_packed() -> None:
    model = build(depth=2).cuda()
    sizes = [sum(r.bytes for r in vitq.explain(vitq.convert(model, quick(n), [images(model, 4)])) if r.role == "fc1")
             for n in ("w8a8", "w4a8")]
    assert sizes[1] < 0.55 * sizes[0]


@pytest.mark.gpu
def test_whole_model_in_a_cuda_graph() -> None:
    model = build(depth=2).cuda()
    converted = vitq.convert(model, quick("w8a8"), [images(model, 4)])
    static = images(model).cuda()
    expected = converted(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = converted(static)
    graph.replay()
    assert torch.equal(y, expected)
