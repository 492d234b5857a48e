"""Weight codes are held once where a kernel gives them back, and what is saved, copied or moved does not tell the difference."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from helpers import build, images, quick
from torch import Tensor, nn

import vitq
from vitq.cuda.kernels import CutlassLinear
from vitq.nn.linear import CodedLinear
from vitq.nn.packed import link_all, pack_all
from vitq.nn.weight_only import WeightOnlyLinear
from vitq.ops.dispatch import registered

KEPT = ["fc1.input.outliers=32", "fc1.input.outlier_limit=0.2"]
# Recipe, changes, features in and out: both paddings, segments, float16 columns, groups with multipliers, zero points, bits that are stored in more.
LAYERS = [
    ("w8a8-dynamic", [], 64, 32), ("w8a8-dynamic", [], 75, 37), ("w8a8-dynamic", ["fc1.bits=6"], 64, 40), ("w4a8", [], 128, 64), ("w4a8", [], 75, 37),
    ("dgq-w4a8", [], 256, 40), ("dgq-w4a8", ["fc1.weight.bits=3"], 161, 33), ("dual-w8a8", [], 192, 48), ("dual-w4a4", [], 191, 45),
    ("quik-w8a8", KEPT, 193, 37), ("quik-w4a4", KEPT, 193, 37), ("gptq-w4a16", [], 160, 37), ("gptq-w4a16", [], 75, 17),
    ("gptq-w4a16", ["fc1.weight.bits=8"], 75, 37),
    ("gptq-w4a16", ["fc1.weight.symmetric=true", "fc1.weight.granularity=per_channel", "fc1.weight.bits=2"], 129, 40)]


def layer(recipe: str, changes: list[str], k: int, n: int, **kwargs) -> tuple[CodedLinear, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(24, k) * torch.rand(k).exp()
    return vitq.linear_module(nn.Linear(k, n), quick(recipe, *changes), x, dtype=torch.float32, **kwargs), x


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of what a checkpoint holds."""
    return {name: t.clone() for name, t in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(params=LAYERS, ids=lambda p: " ".join([p[0], *p[1][:3], f"{p[2]}x{p[3]}"]))
def case(request: pytest.FixtureRequest, cuda_operators, monkeypatch: pytest.MonkeyPatch) -> tuple[CodedLinear, Tensor, dict[str, Tensor]]:
    """A packed layer, an input, and what the layer held before a kernel packed it."""
    states, pack = [], CodedLinear._pack
    with monkeypatch.context() as patch:
        patch.setattr(CodedLinear, "_pack", lambda self: (states.append(state(self)), pack(self)))
        module, x = layer(*request.param)
    assert module._packed is not None and module.qweight is None and states[0]["qweight"].any(1).all()
    return module, x, states[0]


def test_codes_are_held_once_and_saved_as_they_were(case) -> None:
    module, _, before = case
    assert same(module.state_dict(), before) and module.qweight is None, "reading them changes nothing"
    row = module.row("", "fc1")
    assert row.backend == "cpu" and row.bytes == sum(t.nbytes for t in before.values())
    (packed,) = [packed for case, (_, packed) in module._packed.items() if case in ("linear", "weight_only")]
    rows, columns = module.out_features + -module.out_features % 32, module.coded_features + -module.coded_features % (64 if module.weight_bits <= 4 else 32)
    assert packed.weight.nbytes == rows * columns // (2 if module.weight_bits <= 4 else 1)
    beside = [t for t in module.buffers() if t.data_ptr() != packed.weight.data_ptr() and t.dtype in (torch.int8, torch.uint8) and t.ndim == 2
              and t.shape[0] == module.out_features]
    assert not beside and row.memory < packed.weight.nbytes + 3 * sum(t.nbytes for name, t in before.items() if name != "qweight") + 4096
    module.invalidate()
    assert same(dict(module.named_buffers()), before) and module.own_bytes() == row.bytes
    assert module.held_bytes() == row.memory, "what is counted is packed first"


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle", "move", "load", "load others", "assign", "link", "another backend", "inference mode"])
def test_a_layer_stays_what_it_was(case, how: str) -> None:
    module, x, before = case
    y, other = module(x), module
    if how in ("copy", "deepcopy"):
        other = getattr(copy, how)(module)
        assert module.qweight is None and torch.equal(module(x), y)
        if how == "deepcopy":
            module.invalidate()
            module.qweight.zero_()
    elif how == "pickle":
        torch.save(module, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    elif how == "move":
        pack_all(moved := copy.deepcopy(module))
        assert {t.device.type for t in moved.to("meta").state_dict().values()} == {"meta"}
        other = module.to("cpu")
    elif how == "load":
        module.load_state_dict(module.state_dict())
    elif how == "load others":
        other = copy.deepcopy(module)
        other.qweight.zero_()
        assert not torch.equal(other(x), y) and other.qweight is None
        other.load_state_dict(module.state_dict())
    elif how == "assign":
        module.load_state_dict(state(module), assign=True)
    elif how == "link":
        link_all(module)
    elif how == "another backend":
        module.invalidate()
        module.backend = "reference"
        assert module.row("", "fc1").backend == "reference" and same(module.state_dict(), before)
        module.backend = "auto"
        module.invalidate()
    elif how == "inference mode":
        with torch.inference_mode():
            module.invalidate()
            module(x)
            module.invalidate()
        module.load_state_dict(before)
    assert other._packed is None and torch.equal(other.qweight, before["qweight"])
    assert torch.equal(other(x), y) and other.qweight is None and same(other.state_dict(), before)


def test_new_params_replace_those_that_are_packed(cuda_operators) -> None:
    (a, x), (b, _) = layer("gptq-w4a16", [], 75, 17), layer("gptq-w4a16", ["solver=rtn"], 75, 17)
    params = b.cases()["weight_only"]
    assert not torch.equal(a(x), b(x)) and not torch.equal(a.codes(), params.codes)
    a.set_params(params)
    assert torch.equal(a(x), b(x)) and same(a.state_dict(), b.state_dict())


def test_padding_of_an_odd_weight_is_kept_as_it_was_loaded(cuda_operators) -> None:
    """No kernel has it: the buffer stays, so that what is saved again has the hash that it had."""
    module, x = layer("w4a8", [], 75, 37)
    y, given = module(x), state(module)
    given["qweight"][:, -1] |= 0x50
    module.load_state_dict(given)
    assert torch.equal(module(x), y) and same(module.state_dict(), given) and module.qweight is not None


def test_products_of_codes_and_multipliers_do_not_give_codes_back(cuda_operators, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer("dgq-w4a8", [], 256, 40)
    before, pack = state(module), CutlassLinear.pack

    def multiplied(self, spec, device):
        params = replace(spec.params, codes=spec.params.integers.clamp(-8, 7), weight_multiplier=None, weight_zero=None, column_group=None)
        return pack(self, replace(spec, params=params), device)

    monkeypatch.setattr(CutlassLinear, "pack", multiplied)
    module.invalidate()
    module(x)
    assert module.qweight is not None and same(module.state_dict(), before)


def test_other_forms_that_are_undone() -> None:
    """Beside the compiled kernels': that of torch._int_mm, the 4-bit one of torch on a CPU, and those that are as they are saved."""
    kernels = [k for op in ("linear", "weight_only") for _, k in registered(op) if hasattr(k, "unpack")]
    assert {type(k).__name__ for k in kernels} == {"CutlassLinear", "CublasLtLinear", "CudaWeightOnly", "Int4Linear", "ReferenceWeightOnly",
                                                   "DequantizedLinear"}
    for k, n, bits in ((96, 17, 4), (96, 32, 8), (75, 17, 3), (75, 37, 8), (64, 48, 2)):
        only, plain = ("gptq-w4a16", [f"fc1.weight.bits={bits}", "fc1.weight.group_size=32"]), ("w8a8-dynamic", [f"fc1.weight.bits={bits}"])
        for module, op in ((layer(*only, k, n, backend="reference")[0], "weight_only"), (layer(*plain, k, n, backend="reference")[0], "linear")):
            spec = module.cases()[op]
            for kernel in kernels:
                fits = isinstance(module, WeightOnlyLinear) == (kernel in [k for _, k in registered("weight_only")])
                if not fits or type(kernel).__name__ == "Int4Linear" and kernel.supports(spec):
                    continue
                if type(kernel).__name__ == "CublasLtLinear":
                    pytest.importorskip("triton")
                assert torch.equal(kernel.unpack(kernel.pack(spec, torch.device("cpu"))), module.codes())


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return build("deit_tiny_patch16_224", img_size=32, depth=2, embed_dim=64, num_heads=2)


@pytest.mark.parametrize("recipe", ["w4a8", "w8a8", "gptq-w4a16"])
def test_a_model_that_is_packed(vit: nn.Module, recipe: str, cuda_operators, tmp_path) -> None:
    x = images(vit)
    model = vitq.convert(vit, quick(recipe, "calib_size=2"), [x])
    y, before, layers = model(x), state(model), [m for m in model.modules() if isinstance(m, CodedLinear)]
    assert len(layers) > 7 and all(m.qweight is None for m in layers)
    rows, bits, clone = vitq.explain(model), vitq.report.bits_per_weight(model), copy.deepcopy(model)
    folder = vitq.save(model, tmp_path / "c", source={"name": "deit_tiny_patch16_224", "model_kwargs": {
        "num_classes": 10, "img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 2}})
    model.load_state_dict(clone.state_dict())
    for other in (clone, vitq.load(folder), model, model.to("cpu")):
        assert torch.equal(other(x), y) and same(other.state_dict(), before) and vitq.explain(other) == rows
        assert all(m.qweight is None for m in other.modules() if isinstance(m, CodedLinear))
    for module in layers:
        module.invalidate()
    assert vitq.report.bits_per_weight(model) == bits, "which is of what is saved"


@pytest.mark.parametrize("what", ["move", "load", "pack"])
def test_one_layer_at_a_time_is_there_twice(vit: nn.Module, what: str, cuda_operators, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(vit)
    model = vitq.convert(vit, quick("w4a8", "calib_size=2"), [x])
    layers, twice = [m for m in model.modules() if isinstance(m, CodedLinear)], []
    given_back = CodedLinear._given_back

    def counted(self: CodedLinear) -> Tensor | None:
        found = given_back(self)
        twice.append(sum(m._packed is not None and (m is self or m.qweight is not None) for m in layers))
        return found

    given = model.state_dict()
    monkeypatch.setattr(CodedLinear, "_given_back", counted)
    if what == "move":
        model.to("cpu")
    elif what == "load":
        model.load_state_dict(given)
    else:
        link_all(model)
        pack_all(model)
    assert len(twice) == 2 * len(layers) and set(twice) == {1} and all(m.qweight is None for m in layers)


@pytest.mark.parametrize("where", ["moving", "unpacking", "packing"])
@pytest.mark.parametrize("recipe", ["w4a8", "gptq-w4a16"])
def test_nothing_is_lost_where_memory_runs_out(vit: nn.Module, recipe: str, where: str, cuda_operators, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(vit)
    model = vitq.convert(vit, quick(recipe, "calib_size=2"), [x])
    y, before, version, calls = model(x), state(model), model.vitq.version, []

    def short(wanted):
        def run(*args):
            if len(calls) == 5 and (where != "moving" or args[0].device.type == "cpu"):
                raise torch.OutOfMemoryError("no memory")
            calls.append(1)
            return wanted(*args)

        return run

    with monkeypatch.context() as patch:
        for kernel in (type(k) for op in ("linear", "weight_only") for _, k in registered(op)):
            for name in {"unpacking": ["unpack"], "packing": ["pack"], "moving": []}[where]:
                if name in vars(kernel):
                    patch.setattr(kernel, name, short(vars(kernel)[name]))
        with pytest.raises(torch.OutOfMemoryError):
            model._apply(short(lambda t: t.clone()) if where == "moving" else lambda t: t.clone())
    assert len(calls) == 5 and same(model.state_dict(), before) and model.vitq.version >= version
    assert torch.equal(model.to("cpu")(x), y) and same(model.state_dict(), before)


def test_a_packed_layer_is_traced_whole(case) -> None:
    module, x, _ = case
    y = module(x)
    torch.compiler.reset()
    assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(x), y)
    program = torch.export.export(module, (x,))
    assert torch.equal(program.module()(x), y) and module.qweight is None


def test_the_footprint_of_a_language_model_has_its_codes(cuda_operators) -> None:
    pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
    import language_models

    model = vitq.convert(language_models.build("Llama"), language_models.quick("gptq-w4a16", "solver=rtn"), [language_models.ids()], dtype=torch.float16)
    floats = model.get_memory_footprint(return_buffers=False)
    memory = sum(row.memory for row in vitq.explain(model) if row.format.startswith("W"))
    assert floats == sum(p.nbytes for p in model.parameters()) and floats + memory <= model.get_memory_footprint() < floats + memory + 1024
