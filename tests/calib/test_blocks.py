"""Calibration block by block: what it gives is that of the whole model; what is where; what is kept and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
from pathlib import Path

import pytest
import torch
from helpers import build, images, sqnr
from torch import Tensor, nn

import vitq
from vitq.calib import blocks, chain
from vitq.calib.resume import HEADER, on_cpu
from vitq.calib.runner import fingerprint
from vitq.calib.solvers import SOLVERS
from vitq.conversion import quantize
from vitq.models import prepare

pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
import language_models  # noqa: E402
from language_models import CASES, ids  # noqa: E402

NAMES = ["w8a8", "smoothquant-w8a8", "gptq-w4a16", "dgq-w4a8", "quik-w4a4", "erq-w4a4"]
SWIN = dict(depths=(1, 2, 1, 1), embed_dim=24, num_heads=(1, 2, 2, 2))


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    yield


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    return language_models.build("Llama", num_hidden_layers=3, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return build("deit_tiny_patch16_224", depth=2, img_size=64, embed_dim=96)


@pytest.fixture(scope="module")
def tokens() -> list[Tensor]:
    return [ids(2, seed=1), ids(2, seed=2)]


def quick(name: str, *changes: str) -> vitq.Recipe:
    """Without the search for ranges of inputs."""
    return language_models.quick(name, "input.observer=minmax", *changes)


def batches(model: nn.Module) -> list[Tensor]:
    return [ids(3, seed=1), ids(1, seed=2)] if hasattr(model, "config") else list(images(model, 4).split(3))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return getattr(y, "logits", y)


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return a == b


def check_same(found, wanted) -> None:
    """Both (prepared, plan): the same codes, formats, notes and float weights."""
    assert found[1].layers.keys() == wanted[1].layers.keys()
    assert [name for name, params in wanted[1].layers.items() if not same(found[1].layers[name], params)] == []
    assert (found[1].notes, found[1].samples, found[1].specs) == (wanted[1].notes, wanted[1].samples, wanted[1].specs)
    weights, states = found[0].model.state_dict(), wanted[0].model.state_dict()
    assert weights.keys() == states.keys() and all(torch.equal(weights[name], states[name]) for name in states)


@pytest.mark.parametrize("kind", ["decoder", "vit"])
@pytest.mark.parametrize("name", NAMES)
def test_the_float_stream_gives_what_the_whole_model_gives(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    data, recipe = batches(model), quick(name)
    wanted = quantize(model, recipe, data)
    check_same(quantize(model, recipe, data, stream="float"), wanted)
    check_same(quantize(model, recipe, iter(data), stream="float", memory=1.0), wanted)  # a pass for each Gram matrix
    converted, whole = vitq.convert(model, recipe, data, stream="float", dtype=torch.float32), vitq.convert(model, recipe, data, dtype=torch.float32)
    assert type(converted) is type(whole) and torch.equal(logits(converted, data[0]), logits(whole, data[0]))


@pytest.mark.parametrize(("family", "kwargs"), CASES)
def test_every_language_model_is_a_chain_of_its_blocks(family: str, kwargs: dict) -> None:
    """Masks, positions and ALiBi are each block's own: the outputs are those of the whole model."""
    model = language_models.build(family, **kwargs)
    assert len(prepare(model).stages) == 2
    for name in ("w8a8", "gptq-w4a16"):
        recipe, data = quick(name), [ids(3, 24, seed=1), ids(1, 24, seed=2)]
        check_same(quantize(model, recipe, data, stream="float"), quantize(model, recipe, data))


@pytest.mark.parametrize(("name", "kwargs"), [
    ("swin_tiny_patch4_window7_224", SWIN), ("deit_tiny_distilled_patch16_224", dict(depth=2, img_size=64)),
    ("vit_tiny_patch16_224", dict(depth=1, global_pool="map", img_size=64)),
    ("vit_tiny_patch16_224", dict(depth=2, img_size=64, reg_tokens=2, global_pool="avg", fc_norm=True, pre_norm=True))])
def test_every_image_model_is_a_chain_of_its_blocks(name: str, kwargs: dict) -> None:
    model = build(name, **kwargs)
    recipe, data = quick("erq-w4a4"), batches(model)
    check_same(quantize(model, recipe, data, stream="float"), quantize(model, recipe, data))
    assert torch.isfinite(logits(vitq.convert(model, recipe, data, stream="quantized"), data[0])).all()


def test_layers_of_two_kinds_of_mask_get_their_own() -> None:
    """Qwen2's later layers have a sliding window, its first ones see all that came before."""
    model = language_models.build("Qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    assert len(set(model.config.layer_types)) == 2
    recipe, data = quick("w8a8"), [ids(2, 24)]
    check_same(quantize(model, recipe, data, stream="float"), quantize(model, recipe, data))


def inputs_of(model: nn.Module, names: list[str], data: list[Tensor]) -> dict[str, Tensor]:
    """What these layers are given, before a fake quantizer: [rows, K]."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [model.get_submodule(name).register_forward_pre_hook(
        lambda module, args, name=name: found[name].append(args[0].flatten(0, -2)), prepend=True) for name in names]
    for x in data:
        model(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(of) for name, of in found.items()}


@pytest.mark.parametrize("kind", ["decoder", "vit"])
def test_ranges_of_the_quantized_stream_are_those_of_the_quantized_model(kind: str, request: pytest.FixtureRequest) -> None:
    """Each layer's minimum and maximum are what the simulated model gives it: all layers before it, in its own block too, were quantized when they
    were measured."""
    model = request.getfixturevalue(kind)
    recipe, data = quick("w8a8", "transforms=[]", "input.bits=5", "weight.bits=4", "qk.other.observer=minmax",
                         "pv.other.observer=minmax", "pv.input.bits=8"), batches(model)
    plan = quantize(model, recipe, data, stream="quantized")[1]
    simulated = vitq.simulate(model, recipe, data, stream="quantized")
    linears = [name for name, params in plan.layers.items() if hasattr(params, "codes") and name != "patch_embed.proj"]
    differ = 0
    whole = quantize(model, recipe, data)[1]
    for name, x in inputs_of(simulated, linears, data).items():
        fmt, spec = plan.layers[name].input, recipe.resolve(next(s.role for s in prepare(model).linears if s.name == name), name).input
        lo, hi = float(x.min().clamp_max(0)), float(x.max().clamp_min(0))
        assert float(fmt.scale) == pytest.approx((hi - lo) / 31 if not spec.symmetric else max(hi, -lo) / 15, rel=1e-4), name
        differ += float(fmt.scale) != float(whole.layers[name].input.scale)
    assert differ > len(linears) // 2, "the float stream has other ranges"


@pytest.mark.parametrize(("kind", "name"), [("decoder", "erq-w4a4"), ("vit", "erq-w4a4"), ("decoder", "dgq-w4a8"), ("decoder", "gptq-w4a16"), ("decoder", "quik-w4a4")])
def test_gram_matrices_of_the_quantized_stream(kind: str, name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """quantized: of what the layer reads in the finished simulation; cross: of that and of what it reads in the float model."""
    from vitq.quantizers.activation import fake_activation

    model, grams = request.getfixturevalue(kind), []
    recipe, data = quick(name), batches(model)
    solver = SOLVERS[recipe.solver]
    monkeypatch.setitem(SOLVERS, recipe.solver, lambda problem: grams.append(problem.gram) or solver(problem))
    prepared, plan = quantize(model, recipe, data, stream="quantized", memory=1.0)
    solved = [layer for layer, params in plan.layers.items() if hasattr(params, "codes")]
    assert len(grams) == len(solved)
    monkeypatch.setitem(SOLVERS, recipe.solver, solver)
    simulated = vitq.simulate(model, recipe, data, stream="quantized")
    layers = [layer for layer in solved if layer != "patch_embed.proj"]
    read, floats = inputs_of(simulated, layers, data), inputs_of(prepared.model, layers, data)
    assert sqnr(logits(model, data[0]), logits(prepared.model, data[0])) > 80, "the prepared model has float weights and no hooks"
    for layer, gram in zip(solved, grams):
        if layer in layers:
            x = torch.nn.functional.pad(fake_activation(read[layer], plan.layers[layer].input), (0, 1), value=1.0).double()
            f = torch.nn.functional.pad(floats[layer], (0, 1), value=1.0).double()
            assert sqnr(x.T @ x, gram.quantized) > 60 and sqnr(x.T @ f, gram.cross) > 60, layer


def test_the_quantized_stream_is_closer_at_few_bits(decoder: nn.Module, vit: nn.Module) -> None:
    for model in (decoder, vit):
        recipe, data = quick("erq-w4a4"), batches(model)
        float_logits = torch.cat([logits(model, x) for x in data])
        found = {stream: sqnr(float_logits, torch.cat([logits(vitq.simulate(model, recipe, data, stream=stream), x) for x in data]))
                 for stream in ("float", "quantized")}
        assert found["quantized"] > found["float"] + 0.2, found


def test_rows_of_an_earlier_layer_are_divided_before_it_is_solved(decoder: nn.Module, tokens: list[Tensor]) -> None:
    """SmoothQuant's hidden values with static inputs: their scale is divided out of a layer that is solved earlier in the block."""
    recipe = quick("smoothquant-w8a8", "fc2.input.dynamic=false", "fc2.input.symmetric=true")
    prepared, plan = quantize(decoder, recipe, tokens, stream="quantized")
    assert plan.notes["model.layers.1.mlp.down_proj"].startswith("SmoothQuant")
    simulated = vitq.simulate(decoder, recipe, tokens, stream="quantized")
    assert sqnr(logits(decoder, tokens[0]), logits(simulated, tokens[0])) > 28
    down = "model.layers.2.mlp.down_proj"
    most = float(inputs_of(simulated, [down], tokens)[down].abs().max())
    assert float(plan.layers[down].input.scale) == pytest.approx(most / 127, rel=0.02)  # the middle of a bucket is divided


class Evicted:
    """Stands for `chain.placed`: what is not on the device holds NaN, so that whoever uses it is found out."""

    def __init__(self) -> None:
        self.here: list[nn.Module] = []
        self.blocks: list[nn.Module] = []
        self.most, self.away = 0, {}

    def evict(self, module: nn.Module) -> None:
        for p in module.parameters():
            if id(p) not in self.away:
                self.away[id(p)] = p.data
                p.data = torch.full_like(p.data, torch.nan)

    @contextlib.contextmanager
    def __call__(self, module: nn.Module, device: torch.device, home: torch.device):
        for p in module.parameters():
            p.data = self.away.pop(id(p), p.data)
        self.here.append(module)
        self.most = max(self.most, sum(any(part is block for part in placed.modules()) for placed in self.here for block in self.blocks))
        yield
        self.here.remove(module)
        self.evict(module)


@pytest.mark.parametrize("stream", ["float", "quantized"])
@pytest.mark.parametrize("kind", ["decoder", "vit"])
def test_one_block_at_a_time_is_on_the_device(kind: str, stream: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    model = request.getfixturevalue(kind)
    recipe, data = quick("erq-w4a4"), batches(model)
    wanted = quantize(model, recipe, data, stream=stream)
    evicted = Evicted()
    monkeypatch.setattr(chain, "placed", evicted)
    init, chains = chain.Chain.__init__, []

    def prepared_chain(self: chain.Chain, *args: object) -> None:
        evicted.blocks = [args[0].model.get_submodule(name) for name in args[0].stages]
        evicted.evict(args[0].model)
        init(self, *args)
        chains.append(self)

    monkeypatch.setattr(chain.Chain, "__init__", prepared_chain)
    monkeypatch.setattr(blocks, "fingerprint", lambda model: "")
    found = quantize(model, recipe, data, stream=stream)
    assert evicted.most == 1 and not evicted.here
    assert [name for name, params in wanted[1].layers.items() if not same(found[1].layers[name], params)] == []
    assert all(t.device.type == "cpu" for t in chains[0]._tensors)


@pytest.mark.parametrize("stream", ["float", "quantized"])
@pytest.mark.parametrize(("kind", "name"), [("decoder", "dgq-w4a8"), ("decoder", "w8a8"), ("vit", "erq-w4a4"), ("decoder", "smoothquant-w8a8")])
def test_a_run_that_was_cut_off_goes_on(kind: str, name: str, stream: str, tmp_path: Path, request: pytest.FixtureRequest,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    model, recipe = request.getfixturevalue(kind), quick(name)
    data, folder, calls = batches(model), tmp_path / "run", []
    wanted = quantize(model, recipe, data, stream=stream)
    solver, per_block = SOLVERS[recipe.solver], 4
    first = sum(name == "patch_embed.proj" for name in wanted[1].layers) + per_block

    def interrupted(problem):
        calls.append(problem)
        if len(calls) == first + 2:
            raise KeyboardInterrupt
        return solver(problem)

    monkeypatch.setitem(SOLVERS, recipe.solver, interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, recipe, data, stream=stream, resume=folder)
    assert not (folder / "0002.safetensors").exists() and (folder / "0001.safetensors").exists()
    kept = (folder / "0001.safetensors").read_bytes()
    check_same(quantize(model, recipe, iter(data), stream=stream, resume=folder), wanted)
    linears = sum(hasattr(params, "codes") for params in wanted[1].layers.values())
    assert len(calls) == first + 2 + linears - first, "finished blocks are not solved again"
    assert (folder / "0001.safetensors").read_bytes() == kept
    monkeypatch.setitem(SOLVERS, recipe.solver, lambda problem: pytest.fail("all is done"))
    check_same(quantize(model, recipe, [torch.cat(data)], stream=stream, resume=folder), wanted)  # other batches of the same data
    assert not list(folder.glob(".*"))


def test_out_of_memory_says_what_is_kept_and_what_to_lower(decoder: nn.Module, tokens: list[Tensor], tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, calls = quick("gptq-w4a16"), []
    solver = SOLVERS["gptq"]

    def full(problem):
        calls.append(problem)
        if len(calls) == 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return solver(problem)

    monkeypatch.setitem(SOLVERS, "gptq", full)
    said = rf"'model.layers.2': 2 of 3 blocks are kept in {tmp_path}.*smaller batch size of calib \(now 2\) or a smaller memory= \(now 2e\+09"
    with pytest.raises(torch.OutOfMemoryError, match=said):
        vitq.convert(decoder, recipe, tokens, stream="float", resume=tmp_path)
    calls.clear()
    with pytest.raises(torch.OutOfMemoryError, match="nothing is kept; .*resume=FOLDER"):
        vitq.convert(decoder, recipe, tokens, stream="float")
    calls[:] = [None] * 10
    check_same(quantize(decoder, recipe, tokens, stream="float", resume=tmp_path), quantize(decoder, recipe, tokens))


def test_a_folder_of_another_run_is_refused_and_left_alone(decoder: nn.Module, tokens: list[Tensor], tmp_path: Path) -> None:
    folder, recipe, changed = tmp_path / "run", quick("gptq-w4a16"), quick("gptq-w4a16", "solver_options={damping: 0.02}")
    vitq.simulate(decoder, recipe, tokens, stream="float", resume=folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    other = language_models.build("Llama", num_hidden_layers=3, tie_word_embeddings=False)
    other.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    stats = vitq.calibrate(decoder, "smoothquant-w8a8", [torch.cat(tokens)] * 3)
    for said, call in {
        "a run of another model or other weights": lambda: vitq.simulate(other, recipe, tokens, stream="float", resume=folder),
        "another recipe": lambda: vitq.simulate(decoder, changed, tokens, stream="float", resume=folder),
        "other calibration data": lambda: vitq.simulate(decoder, recipe, tokens[::-1], stream="float", resume=folder),
        "the other stream": lambda: vitq.simulate(decoder, recipe, tokens, stream="quantized", resume=folder),
        "another recipe and other calibration data and other statistics": lambda: vitq.simulate(
            decoder, "smoothquant-w8a8", statistics=stats, stream="float", resume=folder)}.items():
        with pytest.raises(ValueError, match=f"{said}; give another folder, or delete"):
            call()
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_folders_that_cannot_be_used(decoder: nn.Module, tokens: list[Tensor], tmp_path: Path) -> None:
    def run(folder: Path):
        return quantize(decoder, quick("w8a8"), tokens, stream="float", resume=folder)

    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="is no folder"):
        run(file)
    with pytest.raises((OSError, ValueError), match="resume: .*(cannot be read and written|is no folder)"):
        run(file / "below")
    with pytest.raises(ValueError, match=f"holds other files and no {HEADER}"):
        run(tmp_path)
    assert file.read_text() == "x" and [f.name for f in tmp_path.iterdir()] == ["file"]
    folder = tmp_path / "run"
    wanted = run(folder)
    path, header = folder / "0002.safetensors", folder / HEADER
    whole = path.read_bytes()
    for damaged in (whole[:100], whole[:-1] + bytes([whole[-1] ^ 1]), b"", (folder / "0001.safetensors").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"0002.safetensors is damaged or not of this run .*delete this file"):
            run(folder)
        assert path.read_bytes() == damaged
    path.unlink()
    check_same(run(folder), wanted)
    assert path.read_bytes() == whole
    said = json.loads(header.read_text())
    header.write_text(header.read_text()[:-20])
    with pytest.raises(ValueError, match=f"{HEADER} is damaged"):
        run(folder)
    header.write_text(json.dumps({**said, "schema": 99}))
    with pytest.raises(ValueError, match="another version of vitq"):
        run(folder)


def test_statistics_of_blocks_are_those_of_the_whole_model(decoder: nn.Module, vit: nn.Module, tmp_path: Path) -> None:
    for model in (decoder, vit):
        recipes, data, folder = [quick("w8a8"), quick("smoothquant-w8a8")], batches(model), tmp_path / type(model).__name__
        wanted, counted = vitq.calibrate(model, recipes, data), []
        found = vitq.calibrate(model, recipes, data, stream="float", progress=counted.append)
        assert counted == [4] * len(prepare(model).stages)
        assert found.fingerprint() == wanted.fingerprint() and (found.model, found.samples) == (fingerprint(prepare(model).model), 4)
        quantize(model, recipes[0], data, stream="float", resume=folder)
        loaded = vitq.Statistics.load(folder / blocks.STATISTICS)
        assert loaded.fingerprint() == vitq.calibrate(model, recipes[0], data).fingerprint()
        for calib in ({"calib": loaded}, {"calib": data, "statistics": loaded}):
            check_same(quantize(model, recipes[0], **{"calib": None, **calib}, stream="float"), quantize(model, recipes[0], data))
        quantize(model, recipes[0], data, stream="quantized", resume=folder / "quantized")
        assert not (folder / "quantized" / blocks.STATISTICS).exists()
    with pytest.raises(ValueError, match="statistics are of the float model"):
        vitq.calibrate(decoder, recipes, data, stream="quantized")
    with pytest.raises(ValueError, match="other weights"):
        quantize(decoder, quick("w8a8"), loaded, stream="float")


def test_a_recipe_without_data_needs_none(decoder: nn.Module, vit: nn.Module, tmp_path: Path) -> None:
    recipe = vitq.Recipe.from_yaml("w8a8-dynamic")
    for model in (decoder, vit):
        for stream in blocks.STREAMS:
            folder = tmp_path / f"{type(model).__name__}-{stream}"
            check_same(quantize(model, recipe, None, stream=stream, resume=folder), quantize(model, recipe, None))


def test_mistakes_say_what_to_do(decoder: nn.Module, vit: nn.Module, tokens: list[Tensor], tmp_path: Path) -> None:
    recipe, static = quick("gptq-w4a16"), quick("w8a8")
    for call in (vitq.convert, vitq.simulate):
        with pytest.raises(ValueError, match="stream must be None, 'float' or 'quantized', got 'both'"):
            call(decoder, recipe, tokens, stream="both")
        with pytest.raises(ValueError, match="device 'cuda:77' cannot be used .*give cpu"):
            call(decoder, recipe, tokens, stream="float", device="cuda:77")
        with pytest.raises(ValueError, match="device 'meta' cannot be used"):
            call(decoder, recipe, tokens, stream="float", device="meta")
        for option in ({"device": "cpu"}, {"resume": tmp_path}):
            with pytest.raises(ValueError, match=f"{next(iter(option))}= is for calibration block by block: give stream="):
                call(decoder, recipe, tokens, **option)
        for model, what in ((decoder, "sequences"), (vit, "images")):
            with pytest.raises(ValueError, match=f"holds 0 {what}.*give more {what}"):
                call(model, recipe, [], stream="quantized")
            with pytest.raises(ValueError, match=f"holds 0 {what}"):
                call(model, static, [])
    with pytest.raises(ValueError, match="needs the calibration sequences themselves"):
        quantize(decoder, recipe, vitq.calibrate(decoder, static, tokens), stream="float")
    with pytest.raises(ValueError, match="leave out statistics="):
        quantize(decoder, static, vitq.calibrate(decoder, static, tokens), stream="quantized")
    with pytest.raises(ValueError, match="calib="):
        quantize(decoder, static, None, stream="quantized")
    with pytest.raises(ValueError, match="token ids must be 0 to 127"):
        quantize(decoder, recipe, [ids(4) + 1000], stream="float")


def test_the_source_model_is_not_changed(decoder: nn.Module, tokens: list[Tensor]) -> None:
    before = {name: t.clone() for name, t in decoder.state_dict().items()}
    vitq.convert(decoder, quick("dgq-w4a8"), tokens, stream="quantized")
    assert all(torch.equal(before[name], t) for name, t in decoder.state_dict().items())


def peak_on_gpu(blocks: int, recipe: vitq.Recipe, data: list[Tensor], **options: object) -> tuple[int, int, int, nn.Module]:
    """(bytes of the GPU at most, those that stay, float32 bytes of a block, the model), of a Llama with so many blocks."""
    model = language_models.build("Llama", num_hidden_layers=blocks, hidden_size=512, intermediate_size=1024, num_key_value_heads=4)
    gc.collect()  # what other tests left would be freed meanwhile
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    prepared, _ = quantize(model, recipe, data, device="cuda", **options)
    peak, stays = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    assert all(p.device.type == "cpu" for p in prepared.model.parameters())
    return peak, stays, 4 * sum(p.numel() for p in model.model.layers[0].parameters()), model


@pytest.mark.gpu
@pytest.mark.parametrize("stream", ["float", "quantized"])
@pytest.mark.parametrize("name", ["gptq-w4a16", "smoothquant-w8a8", "erq-w4a4"])
def test_memory_of_the_device_does_not_grow_with_the_blocks(name: str, stream: str) -> None:
    data, recipe = [ids(2, 64, seed=1), ids(2, 64, seed=2)], quick(name)
    peak_on_gpu(2, recipe, data, stream=stream)  # what libraries allocate once and keep: cuBLAS, for each stream, 32 MiB
    few, _, block, _ = peak_on_gpu(2, recipe, data, stream=stream)
    many, stays, _, model = peak_on_gpu(8, recipe, data, stream=stream)
    assert few > block and many < few + block / 4, (few, many, block)
    assert stays < block / 10, (stays, block)
    if name == "smoothquant-w8a8":  # no Gram matrices
        assert many < 4 * block, (many, block)
    if stream == "float":
        found, whole = quantize(model, recipe, data, stream="float", device="cuda")[1], quantize(model.cuda(), recipe, data)[1]
        assert all(same(on_cpu(params), on_cpu(whole.layers[layer])) for layer, params in found.layers.items())
