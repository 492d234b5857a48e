"""torch.compile(fullgraph=True) and torch.export of converted models, by the reference and by the operators of the CUDA kernels
(which run on CPU tensors too, with their reference inside)."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import build, convert, images, quick, sqnr

import vitq
from vitq.nn.packed import is_packed

MODELS = {
    "vit": ("deit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 2}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 2}),
    "qk-norm": ("vit_base_patch16_xp_224", {"img_size": 32, "depth": 1, "embed_dim": 64, "num_heads": 2}),
    "any-size": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 64, "num_heads": 2, "dynamic_img_size": True}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 40, "window_size": 4, "embed_dim": 32, "depths": (2, 2),
                                              "num_heads": (2, 4)}),
}
PAIRS = [*((kind, "w8a8") for kind in MODELS), ("vit", "w4a8"), ("vit", "w8a8-dynamic"), ("swin", "w8a8-dynamic"),
         ("vit", "dual-w8a8"), ("vit", "dual-w4a4")]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.compiler.reset()


def converted(kind: str, recipe: str, *overrides: str, **kwargs):
    name, arguments = MODELS[kind]
    model = build(name, **arguments)
    return convert(model, quick(recipe, *overrides), **kwargs), images(model, 3)


def compiled_equals_eager(model, x: torch.Tensor, backend: str = "eager") -> None:
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch in (x, x[:2]):  # the second size makes the batch symbolic
        assert torch.equal(compiled(batch), model(batch))


@pytest.mark.parametrize("kind, recipe", [("vit", "w8a8-dynamic"), ("swin", "w8a8")])
def test_compiles_whole_by_the_reference(kind: str, recipe: str) -> None:
    model, x = converted(kind, recipe, backend="reference", dtype=torch.float32)
    compiled_equals_eager(model, x)


@pytest.mark.parametrize("kind, recipe", PAIRS)
def test_compiles_whole_by_the_cuda_operators(kind: str, recipe: str, cuda_operators) -> None:
    model, x = converted(kind, recipe, dtype=torch.float16)
    assert all(row.backend == "cpu" for row in vitq.explain(model) if row.format.startswith(("W", "float ->")))
    compiled_equals_eager(model, x)
    reference, _ = converted(kind, recipe, backend="reference", dtype=torch.float16)
    assert sqnr(reference(x), model(x)) > 30


def test_parts_left_in_float_compile() -> None:
    model, x = converted("vit", "w8a8", "head.bits=16", "patch_embed.bits=16", "qk.bits=16", "pv.bits=16", backend="reference")
    compiled_equals_eager(model, x)


def test_masks_compile() -> None:
    model, x = converted("vit", "w8a8", backend="reference")
    n = model.pos_embed.shape[1]
    keep = torch.ones(n, n, dtype=torch.bool).tril()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, attn_mask=keep), model(x, attn_mask=keep))
    assert torch.equal(compiled(x, is_causal=True), model(x, attn_mask=keep))


@pytest.mark.parametrize("kind, recipe", PAIRS)
def test_exports_the_cuda_operators(kind: str, recipe: str, cuda_operators) -> None:
    model, x = converted(kind, recipe, dtype=torch.float16)
    # a 4-bit weight is widened for many rows and not for few, which settles what the batch may be
    dynamic = None if recipe.startswith("w4") else ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic).module()
    assert torch.equal(program(x), model(x)) and (dynamic is None or torch.equal(program(x[:2]), model(x[:2])))


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_exports_the_reference(kind: str) -> None:
    model, x = converted(kind, "w8a8", backend="reference", dtype=torch.float32)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    assert torch.equal(program(x), model(x)) and torch.equal(program(x[:2]), model(x[:2]))


def test_a_block_is_seven_operators(cuda_operators) -> None:
    model, x = converted("vit", "w8a8", dtype=torch.float16)
    program = torch.export.export(model, (x,))
    called = [str(node.target).split(".")[1] for node in program.graph.nodes if str(node.target).startswith("vitq.")]
    block = ["rows", "linear", "attention", "linear", "rows", "linear", "linear"]
    assert called == ["patches", "linear", *block, *block, "rows", "rows", "linear"]  # norm; the head's quantize and GEMM
    model, x = converted("swin", "w8a8", dtype=torch.float16)
    program = torch.export.export(model, (x,))
    called = [str(node.target).split(".")[1] for node in program.graph.nodes if str(node.target).startswith("vitq.")]
    assert called == ["patches", "linear", "rows", *block, *block, "rows", "linear", *block, *block, "rows", "rows", "linear"]


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_compiles_after_every_move(kind: str, tmp_path) -> None:
    """What a kernel packed is there again before the next forward, so that no trace has to make it."""
    model, x = converted(kind, "w8a8", backend="reference")
    expected = model(x)
    clone = copy.deepcopy(model)
    model.load_state_dict(model.state_dict())
    for moved in (model, clone, model.to("cpu")):
        assert is_packed(moved) and all(m._packed is not None for m in moved.modules() if hasattr(m, "_packed"))
        assert torch.equal(torch.compile(moved, fullgraph=True, backend="eager")(x), expected)
    assert is_packed(vitq.linear_module(torch.nn.Linear(8, 8)))


def test_inductor_compiles_it(cuda_operators) -> None:
    model, x = converted("vit", "w8a8", dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True)
    assert sqnr(model(x), compiled(x)) > 50


# on a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind, recipe", PAIRS)
def test_compiles_whole_on_the_gpu(kind: str, recipe: str) -> None:
    name, arguments = MODELS[kind]
    model = build(name, **arguments).cuda()
    converted, x = convert(model, quick(recipe)), images(model, 3).cuda()
    compiled_equals_eager(converted, x)
    compiled = torch.compile(converted, fullgraph=True)
    assert sqnr(converted(x), compiled(x)) > 30  # inductor rounds what lies between the operators in its own way
    program = torch.export.export(converted, (x,)).module()
    assert torch.equal(program(x), converted(x))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w4a8", "w4a4", "dual-w8a8", "dual-w4a4"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_forward_never_waits_for_the_gpu(kind: str, recipe: str) -> None:
    name, arguments = MODELS[kind]
    model = build(name, **arguments).cuda()
    converted, x = convert(model, quick(recipe)), images(model, 3).cuda()
    masks = [{}] if kind == "swin" else [{}, {"is_causal": True}]
    if kind == "qk-norm":
        masks = [{}]  # timm's parallel block takes masks in its own way
    for kwargs in masks:
        converted(x, **kwargs)  # compiles what Triton compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            converted(x, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_the_gpu_runs_a_block_in_seven_kernels(kind: str) -> None:
    """Two more blocks launch fourteen more kernels."""
    from torch.profiler import ProfilerActivity, profile

    name, arguments = MODELS[kind]
    launched = []
    for depth in (2, 4):
        model = build(name, **{**arguments, **({"depth": depth} if kind == "vit" else {"depths": (2, depth)})}).cuda()
        converted, x = convert(model, quick("w8a8")), images(model, 3).cuda()
        converted(x)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            converted(x)
            torch.cuda.synchronize()
        launched.append(sum(event.count for event in profiler.key_averages() if event.key in (
            "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cuLaunchKernel")))
    if not launched[0]:
        pytest.skip("the profiler sees no launches here")
    assert launched[1] - launched[0] == 14
