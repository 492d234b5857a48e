"""torch.ops.vitq.*: opcheck and the reference's own arithmetic on CPU; on a GPU each case again, the kernels against the
reference.

Integers and plain quantization are equal bit for bit; after a norm, GELU or softmax a code may differ by 1 in 0.1 % of elements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_cases import CASES, append_rows, attention, cached_attention, dequantize, linear, rows, transformed_rows, weight_only
from torch import Tensor

import vitq.cuda
import vitq.evaluate
from vitq.cuda import loader
from vitq.ops.cached_attention import RowCodes

NAMES = ("linear", "weight_only", "dequantize", "attention", "rows", "transformed_rows", "patches", "widen_int4", "append_rows", "cached_attention")
OUTPUTS = {"linear": ("out",), "weight_only": ("out",), "dequantize": ("out",), "attention": ("out",),
           "rows": ("out", "sum", "row_scale", "row_shift", "fp_out"), "transformed_rows": ("out", "row_scale", "row_shift"),
           "patches": ("out",), "widen_int4": ("out",), "append_rows": ("keys", "values", "state", "q_out", "k_out", "v_out"),
           "cached_attention": ("out",)}


# running them ----------------------------------------------------------------------------------------------------------

def call(op: str, arguments: dict[str, Any]) -> None:
    getattr(torch.ops.vitq, op)(**arguments)


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Copies on the device with the same strides and the same sharing of memory (a residual that is `out`)."""
    moved: dict[int, Tensor] = {}

    def move(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in moved or not storage.nbytes():
            whole = t.as_strided((storage.nbytes() // t.element_size(),), (1,), 0)
            moved[storage.data_ptr()] = whole.to(device, copy=True)
        return moved[storage.data_ptr()].as_strided(t.shape, t.stride(), t.storage_offset())

    return {name: move(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def differences(op: str, got: dict[str, Any], want: dict[str, Any], share: float, error: float) -> list[str]:
    """What of the outputs is not as it may be."""
    wrong = []
    if op == "append_rows" and share:  # of rows whose scales may differ in the last bits the numbers they stand for
        got, want = ({**t, **{name: RowCodes(t[f"{kind}_bits"], t[f"{kind}_symmetric"]).unpack(t[name].cpu(), t["k"].shape[-1], torch.float32)
                              for kind, name in (("key", "keys"), ("value", "values")) if t[f"{kind}_bits"] != 16}} for t in (got, want))
    for name in OUTPUTS[op]:
        if want.get(name) is None or not want[name].numel():
            continue
        a, b = got[name].cpu(), want[name]
        if b.dtype == torch.uint8:  # packed int4
            a, b = (torch.stack([(t & 15).to(torch.int8), (t >> 4).to(torch.int8)]) for t in (a, b))
            a, b = ((t ^ 8) - 8 for t in (a, b))
        if b.is_floating_point():
            limit = max(error, 1e-3 if share and b.dtype == torch.float16 else 0)
            off = (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)
            if not torch.isfinite(a).all() or (not torch.equal(a, b) if not limit else off > limit):
                wrong.append(f"{name}: relative error {off:.3g}, allowed {limit}")
            continue
        off = (a.int() - b.int()).abs()
        # sums of codes may differ by as many as codes did
        most = 0 if not share else 1 if name == "out" else max(1, int(share * b.numel()) + 3)
        many = max(share * off.numel(), 2) if name == "out" else off.numel()
        if int(off.max()) > most or int((off > 0).sum()) > many * bool(share):
            wrong.append(f"{name}: {int((off > 0).sum())} of {off.numel()} differ, by up to {int(off.max())}; "
                         f"allowed {most} in {share}")
    return wrong


def made(name: str) -> dict[str, Any]:
    """The arguments of a case, which is passed over where no kernel of the GPU takes it."""
    arguments = CASES[name][1]()
    if arguments.get("multiplier") is not None and "codes" in arguments and len(arguments["codes"]) > loader.FEW_ROWS:
        if loader.why_unavailable() is None and loader.kernel_arch(torch.cuda.current_device()) != 90:
            with pytest.raises(RuntimeError, match="no kernel for"):
                call("linear", on("cuda", arguments))
            pytest.skip("many rows with groups of columns have a kernel on Hopper alone")
    return arguments


def check(name: str, device: str = "cuda") -> dict[str, Any]:
    op, _, share, error = CASES[name]
    want = made(name)
    got = on(device, want)
    call(op, want)
    call(op, got)
    assert not (wrong := differences(op, got, want, share, error)), (name, wrong)
    return got


def families(every: int = 1) -> list[str]:
    return list(CASES)[::every]


@pytest.mark.parametrize("op", NAMES)
def test_registered(op: str) -> None:
    overload = getattr(torch.ops.vitq, op).default
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vitq::{op}", key)
    assert overload._schema.is_mutable and not overload._schema.returns


# Not the largest; nor empty views of q, k and v in one tensor, of which torch's schema check makes tensors of negative sizes.
@pytest.mark.parametrize("name", [n for n in families(23) if not n.startswith(("attention (2, 1025", "attention (0"))])
def test_opcheck(name: str) -> None:
    op, make, _, _ = CASES[name]
    result = torch.library.opcheck(getattr(torch.ops.vitq, op).default, (), make())
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", families())
def test_cuda_equals_the_reference(name: str) -> None:
    check(name)


# some of each kind, with the configurations and circumstances in which a kernel could go wrong ----------------------------------

def some(op: str, every: int) -> list[str]:
    return [name for name, (which, *_) in CASES.items() if which == op][::every]


def hopper() -> bool:
    return loader.why_unavailable() is None and loader.capability(torch.cuda.current_device()) == 90


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["sm80", "sm90", "few"])
@pytest.mark.parametrize("name", list(dict.fromkeys([*some("linear", 7), *(name for name in CASES if "many tiles" in name)])))
def test_every_configuration(name: str, kernel: str) -> None:
    """A configuration either refuses the case or is exact."""
    if kernel == "sm90" and not hopper():
        pytest.skip("needs an sm_90 GPU")
    op, make, share, error = CASES[name]
    want = make()
    got = on("cuda", want)
    call(op, want)
    ran = 0
    configs = list(range(getattr(loader.library(), f"vitq_linear_{kernel}_configs")()))
    if kernel == "sm80" and want["input_bits"] == 4:  # by the s4 instruction, which newer chips emulate
        configs += [100 + index for index in configs]
    for index in configs:
        try:
            call(op, {**got, "config": f"{kernel}:{index}"})
        except RuntimeError as refused:
            assert "code -2" in str(refused), refused
            continue
        ran += 1
        if "in place" not in name:
            assert not (wrong := differences(op, got, want, share, error)), (name, index, wrong)
            got["out"].zero_()
    sizes = want["out"].numel()
    plain = want.get("zero") is None and len(want["segment_ends"]) < 2
    grouped = want.get("multiplier") is not None
    packed = want["weight_bits"] == 4 and len(want["segment_ends"]) < 2 and (not grouped or want["group_columns"] % 128 == 0)
    refuses = {"sm90": want["input_bits"] == 4 or not (packed or want["weight_bits"] == 8),
               "sm80": grouped, "few": len(want["codes"]) > loader.FEW_ROWS or not plain}[kernel]
    assert (ran > 0) != refuses or not sizes


@pytest.mark.gpu
@pytest.mark.parametrize("name", some("weight_only", 5))
def test_every_configuration_of_weight_only(name: str) -> None:
    op, make, share, error = CASES[name]
    want = make()
    got = on("cuda", want)
    call(op, want)
    for index in range(loader.library().vitq_linear_few_configs()):
        try:
            call(op, {**got, "config": f"few:{index}"})
        except RuntimeError as refused:
            assert "code -2" in str(refused), refused
            continue
        assert not (wrong := differences(op, got, want, share, error)), (name, index, wrong)
        got["out"].zero_()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for op in NAMES for n in some(op, 25)])
def test_twenty_runs_are_equal(name: str) -> None:
    op = CASES[name][0]
    if "in place" in name:
        pytest.skip("changes its input")
    got = on("cuda", made(name))
    if op == "append_rows":
        got["advance"] = False  # each run writes the same rows
    call(op, got)
    first = {k: got[k].clone() for k in OUTPUTS[op] if isinstance(got.get(k), Tensor)}
    for _ in range(20):
        call(op, got)
        assert all(torch.equal(got[k], first[k]) for k in first)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for op in NAMES for n in some(op, 40)])
def test_side_streams(name: str) -> None:
    """The kernel waits for what its stream does, and only that: a long copy before it would show."""
    op, _, share, error = CASES[name]
    want = made(name)
    arguments = on("cuda", want)
    call(op, want)
    stream, late = torch.cuda.Stream(), {k: v for k,
                                         v in arguments.items() if isinstance(v, Tensor) and k not in OUTPUTS[op] and v.numel()}
    kept = {k: v.clone() for k, v in late.items()}
    if "in place" not in name:
        for value in late.values():
            if 0 not in value.stride():
                value.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for k, value in late.items():
            if 0 not in value.stride() and "in place" not in name:
                value.copy_(kept[k])
        call(op, arguments)
    stream.synchronize()
    assert not (wrong := differences(op, arguments, want, share, error)), wrong


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", [n for op in NAMES for n in some(op, 40)])
def test_second_gpu(name: str) -> None:
    assert torch.cuda.current_device() == 0
    got = check(name, "cuda:1")
    assert got[OUTPUTS[CASES[name][0]][0]].device.index == 1 and torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for op in NAMES for n in some(op, 25)])
def test_capture(name: str) -> None:
    op, _, share, error = CASES[name]
    if "in place" in name or name.startswith("append_rows"):
        pytest.skip("changes its input")
    want = made(name)
    got = on("cuda", want)
    call(op, want)
    call(op, got)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(op, got)
    for output in OUTPUTS[op]:
        if isinstance(got.get(output), Tensor):
            got[output].zero_()
    graph.replay()
    assert not (wrong := differences(op, got, want, share, error)), wrong


@pytest.mark.gpu
def test_sm80_kernels_where_they_are_forced(monkeypatch) -> None:
    from vitq.cuda import tuning

    monkeypatch.setenv("VITQ_FORCE_ARCH", "80")
    loader.kernel_arch.cache_clear()
    tuning.pick.cache_clear()
    try:
        assert loader.kernel_arch(torch.cuda.current_device()) == 80
        ran = 0
        for name in some("linear", 11):
            with contextlib.suppress(pytest.skip.Exception):
                check(name)
                ran += 1
        assert ran > 40
    finally:
        monkeypatch.undo()
        loader.kernel_arch.cache_clear()
        tuning.pick.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 40, 700])
@torch.no_grad()
def test_kernels_that_start_early_wait_for_those_before(rows: int) -> None:
    """A chain in which every kernel reads what the one before it wrote, in memory that is used again and again, is that which waits for each."""
    recipes = [vitq.Recipe.from_yaml(name).with_overrides(["weight.observer=minmax", "solver=rtn", "solver_options={}"])
               for name in ("w8a8-dynamic", "dgq-w4a8", "quik-w4a4", "gptq-w4a16") for _ in range(2)]
    layers = [vitq.linear_module(torch.nn.Linear(2304, 2304, device="cuda"), recipe, torch.randn(256, 2304, device="cuda"), dtype=torch.float16)
              for recipe in recipes]
    x = torch.randn(rows, 2304, device="cuda").half()

    def run(wait: bool) -> Tensor:
        y = x
        for layer in layers * 3:
            y = torch.nn.functional.normalize(layer(y).float(), dim=-1).mul(48).half() if layer is layers[-1] else layer(y) * 2
            if wait:
                torch.cuda.synchronize()
        return y

    wanted = run(True)
    assert wanted.isfinite().all() and wanted.float().std() > 0.1
    for _ in range(20):
        assert torch.equal(run(False), wanted)
    replay, reason = vitq.evaluate.cuda_graph(lambda t: run(False), x)
    assert not reason and torch.equal(replay(x), wanted)


@pytest.mark.gpu
def test_compiled_by_inductor() -> None:
    """The operators write into buffers that inductor allocates."""
    arguments = on("cuda", linear(64, 96, 64, out=torch.float16, residual=torch.float16))

    def run(codes: Tensor, residual: Tensor) -> Tensor:
        out = torch.empty_like(residual)
        torch.ops.vitq.linear(**{**arguments, "out": out, "codes": codes, "residual": residual})
        return out * 2

    torch._dynamo.reset()
    got = torch.compile(run, fullgraph=True)(arguments["codes"], arguments["residual"])
    assert torch.equal(got, run(arguments["codes"], arguments["residual"]))


# what is refused -----------------------------------------------------------------------------------------------------------

REFUSED = {
    "linear": [
        ({"out": torch.zeros(2, 3, 4, 5)}, "out is"), ({"out": torch.zeros(8, 40, dtype=torch.float64)}, "float64"),
        ({"codes": torch.zeros(7, 64, dtype=torch.int8)}, "7 rows"), ({"codes": torch.zeros(8, 64)}, "codes is torch.float32"),
        ({"weight": torch.zeros(40, 64, dtype=torch.int8)}, "layout.pack_weight"), ({"weight_bits": 5}, "weight_bits is 5"),
        ({"scale": torch.ones(40)}, "scale is [40]"), ({"bias": torch.zeros(64).half()}, "bias is torch.float16"),
        ({"activation": "silu"}, "'silu'"), ({"segment_ends": [20, 64]}, "segment_ends is [20, 64]"),
        ({"row_shift": torch.zeros(8)}, "row_shift is given alone"),
        ({"residual": torch.zeros(8, 39)}, "[8, 39]"), ({"out_bits": 9}, "2 to 8 bits"),
        ({"out": torch.zeros(8, 40, dtype=torch.int8), "residual": torch.zeros(8, 40)}, "residual is given"),
        ({"codes_fp": torch.zeros(8, 16).half()}, "codes_fp is given alone"),
        ({"multiplier": torch.ones(2, 64, dtype=torch.int8)}, "multiplier is given with W8A8"),
        ({"group_zero": torch.ones(2, 64, dtype=torch.int8)}, "group_zero is given without multiplier"),
        (linear(8, 40, 64, bits=4, group=32) | {"group_columns": 48}, "group_columns is 48"),
        (linear(8, 40, 64, bits=4, group=32) | {"multiplier": torch.ones(1, 64, dtype=torch.int8)}, "multiplier is torch.int8 [1, 64]"),
        (linear(17, 40, 64, bits=4) | {"multiplier": torch.ones(1, 64, dtype=torch.int8), "group_columns": 64}, "17 rows")],
    "weight_only": [
        ({"out": torch.zeros(3, 40, dtype=torch.int8)}, "out is torch.int8"), ({"x": torch.zeros(3, 70)}, "x is torch.float32"),
        ({"x": torch.zeros(2, 70).half()}, "x is of 2 rows"), ({"weight_bits": 8}, "weight, weight_bits is torch.uint8, 8"),
        ({"x": torch.zeros(3, 200).half()}, "layout.pack_weight"), ({"scale": torch.ones(2, 64)}, "scale is torch.float32 [2, 64]"),
        ({"zero": torch.ones(3, 64)}, "zero is torch.float32 [3, 64]"), ({"bias": torch.zeros(40)}, "bias is torch.float32 [40]"),
        ({"group_columns": 16}, "group_columns is 16"), (weight_only(17, 40, 70), "x is of 17 rows")],
    "dequantize": [
        ({"out": torch.zeros(70, 40).T}, "out is torch.float32 [40, 70]"), ({"weight": torch.zeros(32, 64, dtype=torch.uint8)}, "layout.pack_weight"),
        ({"scale": torch.ones(3, 128)[:, ::2]}, "scale is torch.float32 [3, 64]"),
        ({"zero": torch.ones(3, 128, dtype=torch.int8)[:, :64]}, "zero is of row stride 128")],
    "attention": [
        ({"q": torch.zeros(2, 5, 2, 16)}, "q is torch.float32"), ({"k": torch.zeros(2, 5, 2, 8, dtype=torch.int8)}, "k, v is"),
        ({"out": torch.zeros(2, 5, 31)}, "out is [2, 5, 31]"), ({"p_bits": 9}, "p_bits is 9"),
        ({"bias": torch.zeros(3, 5, 5)}, "bias is torch.float32 [3, 5, 5]"),
        ({"mask": torch.zeros(3, 5, 5)}, "mask is of 3 windows"),
        ({"window": [2, 3, 1, 1, 0, 0]}, "window is [2, 3, 1, 1, 0, 0]"), ({"window": [5, 1, 3, 1, 0, 0]}, "pad is None")],
    "rows": [
        ({"x": torch.zeros(4, 8, dtype=torch.int32)}, "x is torch.int32"), ({"x": torch.zeros(8, 4).t()}, "contiguous columns"),
        ({"norm": "batch"}, "'batch'"), ({"out": torch.zeros(4, 9, dtype=torch.int8)}, "out is [4, 9]"),
        ({"out": torch.zeros(4, 8)}, "float result of a norm"), ({"scale": 0.0}, "scale is 0.0"), ({"bits": 1}, "2 to 8 bits"),
        ({"weight": torch.zeros(7)}, "weight is torch.float32 [7]"), ({"row_shift": torch.zeros(4)}, "row_shift is given without row_scale"),
        ({"counted": torch.zeros(1, dtype=torch.uint8)}, "counted is given"),
        ({"row_scale": torch.zeros(4), "order": torch.arange(8, dtype=torch.int32)}, "counted is None"),
        ({"row_scale": torch.zeros(3)}, "row_scale is"),
        ({"fp_order": torch.zeros(2, dtype=torch.int32)}, "fp_order is given alone"), ({"merge": True}, "[.., H, W, C]"),
        ({"residual": torch.zeros(4, 7)}, "residual is")],
    "transformed_rows": [
        ({"x": torch.zeros(4, 24, dtype=torch.int32)}, "x is torch.int32"), ({"x": torch.zeros(24, 4).t()}, "contiguous columns"),
        ({"gate": "tanh"}, "'tanh'"), ({"norm": "batch"}, "'batch'"), ({"norm": "rms_norm", "gate": "silu"}, "'rms_norm' with a gate"),
        ({"norm": "rms_norm", "bias": torch.zeros(24)}, "weight, bias is given"), ({"weight": torch.zeros(24)}, "weight, bias is given"),
        ({"gate": "silu"}, "out is torch.int8 [4, 24]"), ({"gate": "silu", "x": torch.zeros(4, 25)}, "[M, 2 K]"), ({"bits": 9}, "2 to 8 bits"),
        ({"left_size": 0}, "left_size is 0"), ({"left_size": 5}, "left_size is 5"), ({"right_size": 512}, "right_size is 512"),
        ({"left": torch.zeros(4, 4).half()}, "layout.pack_transform"), ({"right_size": 2}, "left_size, right_size is 4, 2"),
        ({"row_scale": torch.zeros(3)}, "row_scale is"), ({"clip": torch.zeros(3)}, "clip is"), ({"clip": torch.zeros(2).half()}, "clip is")],
    "patches": [({"images": torch.zeros(2, 3, 8, 8).permute(0, 2, 3, 1)}, "contiguous float [B, C, H, W]"),
                ({"patch_h": 0}, "(0, 4)"), ({"out": torch.zeros(8, 47, dtype=torch.int8)}, "int8 [8, 48]"),
                ({"scale": -1.0}, "scale is -1.0")],
    "widen_int4": [({"packed": torch.zeros(32, 33, dtype=torch.uint8)}, "[32, 33]"),
                   ({"out": torch.zeros(32, 63, dtype=torch.int8)}, "[32, 63]")],
    "append_rows": [
        (dict(k=torch.zeros(2, 2, 3, 64, dtype=torch.int8)), "k is torch.int8"), (dict(k=torch.zeros(2, 2, 3, 66).half()), "of 66 numbers"),
        (dict(key_bits=8), "keys is torch.uint8 [2, 2, 32, 40]"), (dict(value_symmetric=True), "values is"), (dict(key_bits=9), "bits = 9"),
        (dict(state=torch.zeros(1, dtype=torch.int64)), "state is torch.int64 [1]"), (dict(q_out=None), "q, q_out, inverse is given in part"),
        (dict(sin=None), "cos, sin is given in part"), (dict(cos=torch.zeros(1, 2, 64).half(), sin=torch.zeros(1, 2, 64).half()), "cos is torch.float16 [1, 2, 64]"),
        (dict(right=torch.zeros(64, 64)), "right is torch.float32"), (dict(key_clip=torch.zeros(3)), "key_clip is torch.float32 [3]"),
        (dict(v=torch.zeros(2, 2, 3, 64)), "v is torch.float32"), (dict(values=torch.zeros(2, 2, 16, 40, dtype=torch.uint8)), "of 32 and 16 rows"),
        (dict(q=torch.zeros(2, 3, 3, 64).half(), q_out=torch.zeros(2, 3, 3, 64).half()), "q is of 3 heads"), (dict(out_turned=True), "out_turned is given")],
    "cached_attention": [
        (dict(q=torch.zeros(2, 8, 3, 64)), "q is torch.float32"), (dict(q=torch.zeros(2, 8, 3, 72).half()), "q is of 72 numbers"),
        (dict(q=torch.zeros(2, 7, 3, 64).half()), "keys is [2, 2, 128, 40]"), (dict(key_symmetric=True), "keys is torch.uint8"),
        (dict(out=torch.zeros(2, 3, 8, 64)), "out is torch.float32"), (dict(mask=torch.ones(2, 3, 200) > 0), "mask is torch.bool [2, 3, 200]"),
        (dict(mask=torch.ones(2, 3, 128)), "mask is torch.float32"),
        (dict(window=-1), "window is -1"), (dict(workspace=torch.zeros(4, 2, 8, 66)), "workspace is torch.float32 [4, 2, 8, 66]"),
        (dict(keys=torch.zeros(2, 2, 120, 40, dtype=torch.uint8), values=torch.zeros(2, 2, 120, 40, dtype=torch.uint8)), "a multiple of 16")],
}
VALID: dict[str, Callable[[], dict[str, Any]]] = {
    "linear": lambda: linear(8, 40, 64), "attention": lambda: attention(2, 5, 2, 16), "rows": lambda: rows(torch.zeros(4, 8)),
    "transformed_rows": lambda: transformed_rows(4, 24, 4, 6),
    "patches": lambda: dict(out=torch.zeros(8, 48, dtype=torch.int8), images=torch.zeros(2, 3, 8, 8), patch_h=4, patch_w=4,
                            scale=1.0, zero_point=0, bits=8),
    "widen_int4": lambda: dict(out=torch.zeros(32, 64, dtype=torch.int8), packed=torch.zeros(32, 32, dtype=torch.uint8)),
    "weight_only": lambda: weight_only(3, 40, 70, group=32),
    "dequantize": lambda: dequantize(40, 70, group=32),
    "append_rows": lambda: append_rows(2, 2, 3, 64, rotary=1, right=True, clip=True),
    "cached_attention": lambda: cached_attention(2, 2, 3, 64, 100, mask=2, splits=2)}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("op, change, words",
                         [(op, change, words) for op, changes in REFUSED.items() for change, words in changes])
def test_mistakes_name_the_argument(op: str, change: dict[str, Any], words: str, device: str) -> None:
    arguments = on(device, {**VALID[op](), **change})
    with pytest.raises((ValueError, TypeError)) as caught:
        call(op, arguments)
    assert words in str(caught.value)


@pytest.mark.gpu
def test_tensors_of_two_devices_are_refused() -> None:
    arguments = on("cuda", linear(8, 40, 64))
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        call("linear", {**arguments, "scale": arguments["scale"].cpu()})


def test_import_needs_no_library() -> None:
    assert vitq.cuda.why_unavailable is loader.why_unavailable


# what the library is given, without one ------------------------------------------------------------------------------------

@pytest.fixture
def launched(monkeypatch) -> list:
    """Structs that the CUDA implementations, called on CPU tensors, would hand to the library."""
    from vitq.cuda import ops, tuning

    calls: list = []
    names = ("vitq_linear_sm80", "vitq_linear_sm90", "vitq_linear_few", "vitq_attention", "vitq_rows", "vitq_transformed_rows", "vitq_patches",
             "vitq_weight_only", "vitq_dequantize", "vitq_append_rows", "vitq_cached_attention")
    monkeypatch.setattr(loader, "library", lambda: type("Library", (), {name: name for name in names}))
    monkeypatch.setattr(ops, "_launch", lambda function, arguments, device: calls.append((function, arguments)) or 0)
    monkeypatch.setattr(tuning, "pick", lambda case, device: ("sm80", -1))
    return calls


@pytest.mark.parametrize("name", list(CASES)[::5])
def test_every_case_makes_its_struct(name: str, launched: list) -> None:
    from vitq.cuda import ops

    op, make, _, _ = CASES[name]
    if op == "widen_int4":
        return  # it has no struct
    arguments = make()
    getattr(ops, f"_{op}")(**arguments)
    made = arguments["k"] if op == "append_rows" else arguments["out"]
    assert len(launched) == (1 if made.numel() and arguments.get("x", made).numel() else 0)


def test_the_struct_of_linear(launched: list) -> None:
    from vitq.cuda import ops

    arguments = linear(68, 37, 70, out=torch.float16, residual=torch.float16, grouped=17, expanded=True, bits=4, ends=(64, 70),
                       shift=True, fp=16)
    ops._linear(**arguments, config="sm90:3")
    (function, s), = launched
    assert (function, s.config) == ("vitq_linear_sm90", 3)
    assert (s.m, s.n, s.k, s.a_columns, s.a_bits, s.weight_bits, s.segments, list(s.segment_ends)) == (68, 37, 128, 70, 8, 4, 2,
                                                                                                       [64, 128, 0, 0])
    assert (s.lda, s.lda_fp, s.k_fp, s.rows_per_group) == (arguments["codes"].stride(0), 16, 16, 17)
    assert (s.out.data, s.out.row_stride, s.out.group_stride, s.out.dtype) == (arguments["out"].data_ptr(), 37, 18 * 37, 1)
    assert (s.residual.row_stride, s.residual.group_stride) == (37, 0)
    assert (s.scale, s.column_sums, s.row_shift, s.bias) == tuple(
        arguments[n].data_ptr() for n in ("scale", "column_sums", "row_shift", "bias")) and s.row_scale is None
    with pytest.raises(ValueError, match="sm90:3"):
        ops._linear(**arguments, config="sm100")


def test_the_struct_of_weight_only(launched: list) -> None:
    from vitq.cuda import ops

    arguments = weight_only(3, 40, 70, group=32)
    ops._weight_only(**arguments, config="few:2")
    ops._dequantize(torch.zeros(32, 70), arguments["weight"][:32], arguments["scale"][:, :32], zero=arguments["zero"][:, :32], group_columns=32)
    (function, s), (other, d) = launched
    assert (function, other, s.config) == ("vitq_weight_only", "vitq_dequantize", 2)
    assert (s.m, s.n, s.k, s.x_columns, s.ldx, s.x_dtype, s.weight_bits, s.group_columns) == (3, 40, 128, 70, arguments["x"].stride(0), 1, 4, 32)
    assert (d.n, d.k, d.x_columns, d.scale_stride, s.scale_stride, d.out_stride, d.out_dtype) == (32, 128, 70, 64, 64, 70, 0)
    assert (s.x, s.scale, s.zero, s.bias) == tuple(arguments[n].data_ptr() for n in ("x", "scale", "zero", "bias"))
    with pytest.raises(ValueError, match="of the kernel few"):
        ops._weight_only(**arguments, config="sm80:1")


def test_the_struct_of_rows(launched: list) -> None:
    from vitq.cuda import ops

    x = torch.zeros(4, 17, 96).half()[:, 1:]
    ops._rows(**rows(x, norm="layer_norm", order=64, dynamic=True, shift=True, fp=16))
    s = launched[0][1]
    assert (s.m, s.columns, s.rows_per_group, s.x.row_stride, s.x.group_stride, s.x.dtype) == (64, 96, 16, 96, 17 * 96, 1)
    assert (s.out_columns, s.out_stride, s.fp_columns, s.norm, s.qmin, s.qmax) == (64, 64, 16, 1, -128, 127)
    assert s.row_scale and s.row_shift and s.fp_out
    ops._rows(**rows(torch.zeros(2, 7, 5, 8), merge=True))
    s = launched[1][1]
    assert (s.m, s.columns, s.merge_height, s.merge_width) == (2 * 4 * 3, 32, 7, 5)


def test_the_struct_of_transformed_rows(launched: list) -> None:
    from vitq.cuda import ops

    arguments = transformed_rows(5, 30, 5, 6, dtype=torch.bfloat16, gate="silu", shift=True, clip=(0.5, 0.6), bits=4)
    ops._transformed_rows(**arguments)
    (function, s), = launched
    assert function == "vitq_transformed_rows"
    assert (s.m, s.columns, s.x_stride, s.x_dtype, s.gate, s.norm, s.left_size, s.right_size) == (5, 30, 60, 2, 4, 0, 5, 6)
    assert (s.qmin, s.qmax, s.out_stride) == (-8, 7, 32)
    assert (s.x, s.left, s.right, s.clip, s.out, s.row_scale, s.row_shift) == tuple(
        arguments[n].data_ptr() for n in ("x", "left", "right", "clip", "out", "row_scale", "row_shift"))


def test_the_struct_of_attention(launched: list) -> None:
    from vitq.cuda import ops

    arguments = attention(2, 12 * 13, 3, 32, window=(12, 13, 7, 7, 3, 2), bias=1, out=torch.int8)
    ops._attention(**arguments)
    s = launched[0][1]
    assert (s.batch, s.heads, s.queries, s.keys, s.dim) == (2, 3, 49, 49, 32)
    assert (s.height, s.width, s.window_h, s.window_w, s.shift_h, s.shift_w) == (12, 13, 7, 7, 3, 2)
    assert (list(s.q_strides), s.bias_head, s.bias_row, s.mask_windows, s.out_dtype) == ([156 * 9 * 32, 9 * 32, 32], 0, 49, 1, 3)
