"""Whole models on a GPU: converted there, moved there, and loaded there from a checkpoint made on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import build, images, quick, sqnr

import vitq

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w8a8", "w4a8", "w4a4"])
@pytest.mark.parametrize("name, kwargs", [("deit_tiny_patch16_224", {"depth": 2}), ("vit_small_patch14_reg4_dinov2", {"depth": 2}),
                                          ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 2, 1)})])
def test_execution_equals_simulation(name: str, kwargs: dict, recipe: str) -> None:
    model, chosen = build(name, **kwargs).cuda(), quick(recipe)
    calib = [images(model, 4, seed=2)] if chosen.is_static else None
    statistics = vitq.calibrate(model, chosen, calib) if calib else None
    converted = vitq.convert(model, chosen, statistics, dtype=torch.float32)
    x = images(model).cuda()
    simulated = vitq.simulate(model, chosen, statistics)(x)
    assert sqnr(simulated, converted(x)) > (15 if recipe == "w4a4" else 35)
    rows = [r for r in vitq.explain(converted) if r.role in ("qkv", "fc1", "qk") and r.kernel != "sdpa"]
    assert all(r.backend == "cuda" for r in rows), rows


def test_accumulators_equal_the_cpus() -> None:
    x, w = (torch.randint(-128, 128, s, dtype=torch.int8, generator=torch.Generator().manual_seed(0)) for s in ((197, 384), (1152, 384)))
    assert torch.equal(vitq.ops.int_matmul(x.cuda(), w.cuda()).cpu(), vitq.ops.int_matmul(x, w))


def test_moves_between_devices_and_checkpoints_travel(tmp_path) -> None:
    model, recipe = build(depth=2), quick("w4a8")
    on_cpu = vitq.convert(model, recipe, [images(model, 4, seed=2)], dtype=torch.float32)
    x = images(model)
    expected = on_cpu(x)
    folder = vitq.save(on_cpu, tmp_path / "c", source={"model_kwargs": {"depth": 2}})
    for moved in (copy.deepcopy(on_cpu).cuda(), copy.deepcopy(on_cpu).to("cuda:0"), vitq.load(folder, "cuda", dtype=torch.float32)):
        assert sqnr(expected, moved(x.cuda()).cpu()) > 35
    back = vitq.load(vitq.save(vitq.load(folder, "cuda"), tmp_path / "d"), "cpu", dtype=torch.float32)
    assert torch.equal(moved.cpu()(x), expected) and sqnr(expected, back(x)) > 35
    on_gpu = vitq.load(folder, "cuda")
    again = vitq.load(vitq.save(on_gpu, tmp_path / "e"), "cuda")
    assert torch.equal(again(x.cuda()), on_gpu(x.cuda())) and torch.equal(on_gpu(x.cuda()), on_gpu(x.cuda()))


def test_int4_stays_packed() -> None:
    model = build(depth=2).cuda()
    sizes = [sum(r.bytes for r in vitq.explain(vitq.convert(model, quick(n), [images(model, 4)])) if r.role == "fc1")
             for n in ("w8a8", "w4a8")]
    assert sizes[1] < 0.55 * sizes[0]


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
