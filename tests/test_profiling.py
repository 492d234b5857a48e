"""vitq.profiling: what a call must move and multiply, counted by hand; kernels of a trace given to their calls."""
import pytest
import torch
from helpers import build, convert, images, quick

import vitq
from vitq import profiling
from vitq.profiling import Ceilings, measure_ceilings, profile, quick_recipe, record_calls, short_name

DIM, HEADS, TOKENS, BATCH = 32, 2, 17, 3


@pytest.fixture(scope="module")
def model():
    return convert(build("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=DIM, num_heads=HEADS), quick("w8a8"),
                   dtype=torch.float32)


def test_calls_of_a_block(model):
    x = images(model, BATCH)
    calls = record_calls(model, x)
    block = [call for call in calls if call.layer.startswith("blocks.0.")]
    assert [call.role for call in block] == ["norm", "qkv", "attention", "proj", "norm", "fc1", "fc2"]
    assert {call.where for call in block} == {"blocks"} and {calls[0].where, calls[-1].where} == {""}
    rows, weights = BATCH * TOKENS, DIM * DIM
    # bytes a row and feature
    moved = {"norm": 4 + 1, "qkv": 1 + 3, "attention": 3 + 1, "proj": 1 + 4 + 4, "fc1": 1 + 4, "fc2": 4 + 4 + 4}
    sizes = {"qkv": 3 * weights, "proj": weights, "fc1": 4 * weights, "fc2": 4 * weights}
    for call in block:
        least = rows * DIM * moved[call.role] + sizes.get(call.role, 0)
        assert least <= call.bytes < least + 40 * DIM + 100, call  # scales and biases
        assert call.ops == (4 * rows * TOKENS * DIM if call.role == "attention" else 2 * rows * sizes.get(call.role, 0))
    assert not any("call" in module.__dict__ for module in model.modules())


def test_a_call_can_be_made_again(model):
    call = next(call for call in record_calls(model, images(model, BATCH)) if call.role == "qkv")
    assert torch.equal(call.run().codes, call.output.codes)


def test_windows_attend_to_themselves():
    swin = build("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 4))
    swin = convert(swin, quick("w8a8"), dtype=torch.float32)
    calls = [call for call in record_calls(swin, images(swin, 1)) if call.role == "attention"]
    assert [call.where for call in calls] == ["layers.0.blocks"] * 2 + ["layers.1.blocks"] * 2
    assert [call.ops for call in calls] == [4 * 64 * 16 * 32] * 2 + [4 * 16 * 16 * 64] * 2


def test_broadcast_tensors_count_once():
    assert profiling._bytes((torch.zeros(1, 8).expand(5, 8), [torch.zeros(3, dtype=torch.int8)], None, 1.0)) == 8 * 4 + 3


def test_a_float_model_has_no_calls():
    with pytest.raises(TypeError, match="vitq.convert"):
        record_calls(build(depth=1), torch.zeros(1, 3, 224, 224))


def test_profile_by_the_clock(model):
    found = profile(model, images(model, BATCH), repeats=2)
    parts = {(part.where, part.role): part for part in found.parts}
    assert found.blocks == {"blocks": 2} and "clock" in found.clock
    assert parts["blocks", "norm"].calls == 4 and parts["blocks", "qkv"].calls == 2 and ("", "other") in parts
    assert all(part.us > 0 for key, part in parts.items() if key[1] != "other")


def test_a_trace_gives_kernels_to_the_calls_that_launched_them():
    def event(cat, name, ts, dur, correlation=None):
        args = {} if correlation is None else {"correlation": correlation}
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    def kernel(launch, name, launched, us, correlation, cat="kernel"):
        runtime = "cuda_driver" if launch == "cuLaunchKernelEx" else "cuda_runtime"
        return [event(runtime, launch, launched, 5, correlation), event(cat, name, launched + 500, us, correlation)]

    events = [{"ph": "M", "name": "process_name"}]
    for step, gemm in ((0, 10.0), (1, 20.0), (2, 12.0)):  # two calls a forward, three forwards
        at, first = 1000 * step, 10 * step
        events += [event("user_annotation", f"vitq call {2 * step + i}", at + 60 * i, 50) for i in (0, 1)]
        events += [event("gpu_user_annotation", f"vitq call {2 * step}", at + 500, 50)]
        events += kernel("cudaLaunchKernel", "void a::gemm<int>(int)", at + 10, gemm, first + 1)
        events += kernel("cuLaunchKernelEx", "norm_kernel", at + 70, 3, first + 2)
        events += kernel("cudaLaunchKernel", "norm_kernel", at + 80, 4, first + 3)
        events += kernel("cudaMemcpyAsync", "Memcpy DtoD (Device)", at + 200, 6, first + 4, "gpu_memcpy")
    assert profiling._from_trace({"traceEvents": events}, 2, 3) == ([{"gemm": 12.0}, {"norm_kernel": 7.0}], {"Memcpy DtoD": 6.0})
    assert profiling._from_trace({"traceEvents": events[:2]}, 2, 3) is None


@pytest.mark.parametrize("name, short", [
    ("void cutlass::device_kernel<ns::Gemm<int, (bool)1>>(Params)", "device_kernel"), ("_epilogue_kernel", "_epilogue_kernel"),
    ("void (anonymous namespace)::rows<128>(VitqRows const*)", "rows"), ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD")])
def test_short_names(name, short):
    assert short_name(name) == short


def test_ceilings():
    found = measure_ceilings(torch.device("cpu"), copy_bytes=1 << 16, side=32)
    assert set(found.rates) == {"copy", "vitq linear"} and found.ops_per_s == found.rates["vitq linear"] > 0
    assert Ceilings(4e12, 1e15).floor_us(4_000_000, 3_000_000_000) == pytest.approx((1.0, 3.0))


def test_quick_recipes_convert_and_keep_their_names():
    for name in vitq.recipes():
        recipe = quick_recipe(name, 2)
        assert recipe.name == name and (not recipe.is_static or recipe.calib_size == 2)
        assert recipe.resolve("fc1", "fc1").weight.observer == "minmax"


@pytest.mark.gpu
def test_profile_by_cupti(model):
    x = images(model, BATCH).cuda()
    found = profile(model.cuda(), x, repeats=2)
    assert found.clock == "CUPTI" or "events" in found.clock
    assert all(part.us > 0 for part in found.parts)
