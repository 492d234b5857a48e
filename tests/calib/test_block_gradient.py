"""Learned transforms: they leave the float output as it was, lower the error, run as they are simulated, go on after an interruption."""

from __future__ import annotations

import functools
import os
import statistics
import time

import pytest

pytest.importorskip("transformers")

import helpers  # noqa: E402
import torch  # noqa: E402
from helpers import sqnr  # noqa: E402
from language_models import build, ids  # noqa: E402
from torch import nn  # noqa: E402

import vitq  # noqa: E402
from vitq.calib import descent  # noqa: E402
from vitq.calib.block_gradient import fake_rows, fake_weight  # noqa: E402
from vitq.calib.blocks import quantize_blocks  # noqa: E402
from vitq.calib.matrices import Equal, Matrix, equals  # noqa: E402
from vitq.formats import ActivationFormat  # noqa: E402
from vitq.models import prepare  # noqa: E402
from vitq.quantizers.activation import fake_activation  # noqa: E402
from vitq.recipe import QuantSpec  # noqa: E402

SIZES = dict(hidden_size=96, num_attention_heads=6, intermediate_size=160, num_key_value_heads=3)


def outlying(family: str = "Llama", **kwargs) -> nn.Module:
    """A model whose norms, values and gates make channels far larger than others."""
    model = build(family, **{**SIZES, **kwargs})
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                parameter[torch.randperm(len(parameter))[:4]] *= 12
            elif name.endswith(("up_proj.weight", "v_proj.weight")):
                parameter[torch.randperm(len(parameter))[:3]] *= 8
    return model


def recipe(name: str = "flatquant-w4a4kv4", *changes: str, epochs: int = 8) -> vitq.Recipe:
    learning = [f"block_gradient.epochs={epochs}"] if "flatquant" in name and "block_gradient={}" not in changes else []
    return vitq.Recipe.from_yaml(name).with_overrides(["calib_size=8", *learning, *changes])


RTN = ("block_gradient={}", "transforms=[]", "input.transform=none", "input.observer=minmax", "weight.observer=minmax",
       "qk.other.transform=none", "qk.other.observer=minmax", "pv.other.observer=minmax")
CALIB = [ids(2, 24, seed) for seed in range(4)]


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [None, (0.7, 0.9)])
def test_rows_are_those_of_the_quantizers(bits: int, symmetric: bool, clip: tuple | None) -> None:
    x = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0))
    clip = None if clip is None else torch.tensor(clip)
    wanted = fake_activation(x, ActivationFormat(bits, dynamic=True, symmetric=symmetric, clip=clip))
    torch.testing.assert_close(fake_rows(x, bits, symmetric, clip), wanted, atol=1e-5, rtol=1e-5)


def test_weights_by_rows_groups_and_as_a_whole() -> None:
    weight = torch.randn(6, 80, generator=torch.Generator().manual_seed(0))
    rows = fake_weight(weight, QuantSpec(bits=4, granularity="per_channel"), None)
    assert torch.equal(rows[2], fake_rows(weight[2], 4, True, None))
    groups = fake_weight(weight, QuantSpec(bits=4, granularity="per_group", group_size=32, symmetric=False), None)
    assert torch.equal(groups[:, 32:64], fake_rows(weight[:, 32:64], 4, False, None)) and groups.shape == weight.shape
    whole = fake_weight(weight, QuantSpec(bits=4, granularity="per_tensor"), None)
    assert len(whole.unique()) <= 16
    clipped = fake_weight(weight, QuantSpec(bits=4, granularity="per_channel"), torch.full((6, 2), 0.5))
    assert (clipped.abs().amax(1) < 0.6 * weight.abs().amax(1)).all()


@pytest.mark.parametrize("kind", ["svd", "direct"])
@torch.enable_grad()
def test_a_matrix_and_its_inverse(kind: str) -> None:
    """As ever how many of its size are made together."""
    generator = torch.Generator().manual_seed(0)
    matrices = nn.ModuleList(Matrix(n, kind, generator) for n in (12, 9, 12))
    with torch.no_grad():
        for parameter in matrices.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    together = equals(matrices)
    assert [len(equal.matrices) for equal in together] == [2, 1]
    for equal in together:
        equal.make()
    for matrix in matrices:
        p, inverse_transposed = matrix.pair
        torch.testing.assert_close(p @ inverse_transposed.T, torch.eye(matrix.n), atol=1e-5, rtol=1e-5)
        (p.square().sum() + inverse_transposed.square().sum()).backward(retain_graph=True)
        assert all(parameter.grad.abs().sum() > 0 for parameter in matrix.parameters() if kind == "direct" or parameter.ndim == 1)
        Equal([matrix]).make()
        torch.testing.assert_close(matrix.pair, (p, inverse_transposed))


@pytest.mark.parametrize("family, kwargs", [("Llama", {}), ("Qwen3", {"head_dim": 24}), ("OPT", {"num_attention_heads": 4})])
@torch.no_grad()
def test_learning_lowers_the_error_and_runs_as_simulated(family: str, kwargs: dict) -> None:
    model = outlying(family, **kwargs)
    x = ids(6, 30, seed=50)
    wanted = model(x).logits
    learned, rtn = recipe(), recipe("flatquant-w4a4kv4", *RTN)
    simulated = vitq.simulate(model, learned, CALIB)(x).logits
    assert sqnr(wanted, simulated) > sqnr(wanted, vitq.simulate(model, rtn, CALIB)(x).logits) + 1
    executed = vitq.convert(model, learned, CALIB, dtype=torch.float32)
    assert sqnr(simulated, executed(x).logits) > sqnr(wanted, simulated) + 8  # a code of 4 bits that turns over weighs much


@torch.no_grad()
def test_what_is_moved_leaves_the_float_output() -> None:
    model = outlying()
    prepared, x = prepare(model), ids(2, 20, seed=7)
    plan, _ = quantize_blocks(prepared, recipe(epochs=4), CALIB, stream="float")
    assert sqnr(model(x).logits, prepared.model(x).logits) > 80
    assert "values mixed" in plan.notes["model.layers.0.self_attn.o_proj"] and "channels scaled" in plan.notes["model.layers.0.mlp.down_proj"]
    fmt = plan.layers["model.layers.1.mlp.gate_up_proj"].input
    assert fmt.transform.left.shape == (8, 8) and fmt.transform.right.shape == (12, 12) and fmt.clip.max() < 1
    assert plan.layers["model.layers.1.self_attn.o_proj"].input.transform.left.shape == (6, 6)
    assert plan.layers["model.layers.1.self_attn.kv"].k.transform.right.shape == (16, 16)
    assert plan.layers["model.layers.1.self_attn.kv"].v.transform is None and plan.layers["model.layers.1.self_attn.kv"].v.clip is not None


@functools.cache
@torch.no_grad()
def rounded() -> float:
    """What nothing but rounding to nearest leaves of the model of `test_ways_to_learn`, in dB."""
    model, x = outlying(), ids(4, 24, seed=50)
    none = [f"{operand}.{change}" for operand in ("input", "qk.other") for change in ("transform=none", "observer=minmax")]
    made = vitq.Recipe.from_yaml("flatquant-w4a4kv4").with_overrides(["block_gradient={}", "transforms=[]", *none, "weight.observer=minmax", "pv.other.observer=minmax"])
    return sqnr(model(x).logits, vitq.simulate(model, made)(x).logits)


@pytest.mark.parametrize("changes", [(), ("block_gradient.matrices=direct", "block_gradient.learning_rate=0.002"), ("block_gradient.warmup=4",),
                                     ("block_gradient.mixed_precision=true",), ("solver=gptq",), ("input.symmetric=false",),
                                     ("weight.granularity=per_group", "weight.group_size=32", "weight.observer=minmax"),
                                     ("input.transform=hadamard", "qk.other.transform=hadamard"), ("fc1.input.bits=8",), ("qkv.bits=16",)])
@torch.no_grad()
def test_ways_to_learn(changes: tuple) -> None:
    model, x = outlying(), ids(4, 24, seed=50)
    made = recipe("flatquant-w4a4kv4", *changes, epochs=4)
    simulated = vitq.simulate(model, made, CALIB)(x).logits
    executed = vitq.convert(model, made, CALIB, dtype=torch.float32)
    assert sqnr(model(x).logits, simulated) > rounded() + 3 and sqnr(simulated, executed(x).logits) > 12
    again = vitq.convert(model, made, CALIB, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(executed.state_dict().values(), again.state_dict().values()))


RAGGED = [*CALIB, ids(1, 24, seed=4)]  # batches of four, and one of a single sequence
WAYS = [(), ("block_gradient.matrices=direct", "block_gradient.learning_rate=0.002"), ("block_gradient.mixed_precision=true", "block_gradient.warmup=4")]


@pytest.mark.parametrize("changes", WAYS)
@pytest.mark.parametrize("stream", ["float", "quantized"])
@torch.no_grad()
def test_static_steps_are_those_that_are_launched(changes: tuple, stream: str, monkeypatch) -> None:
    """What a CUDA graph replays, batches and rates at fixed addresses, without one; of batches that differ in shape, in both orders."""
    made = recipe("flatquant-w4a4kv4", "calib_size=9", *changes, epochs=3)
    plain = vitq.convert(outlying(), made, RAGGED, dtype=torch.float32, stream=stream)
    shapes = []
    monkeypatch.setattr(descent, "is_static", lambda device: True)
    monkeypatch.setattr(descent.Steps, "release", lambda steps: shapes.append((len(steps.buffers), steps.taken)))
    static = vitq.convert(outlying(), made, RAGGED, dtype=torch.float32, stream=stream)
    assert shapes == [(2, 9)] * 2
    for (name, a), b in zip(plain.state_dict().items(), static.state_dict().values()):
        assert torch.equal(a, b), name


def test_batches_of_one_shape_share_buffers() -> None:
    mask, hidden = torch.ones(1, 4), torch.zeros(2, 4, 8)
    one = descent.Batch(((mask,), {"positions": (torch.arange(4), None), "causal": True}), hidden, hidden)
    two = descent.Batch(((mask,), {"positions": (torch.arange(1, 5), None), "causal": True}), hidden + 1, hidden + 2)
    other = descent.Batch((two.given[0], {**two.given[1], "causal": False}), two.hidden, two.target)
    assert descent.shape_of(one) == descent.shape_of(two) != descent.shape_of(other)
    static = descent.Static(one, torch.device("cpu"))
    held = static.batch.given[1]["positions"][0]
    static.batch.given[0][0].zero_()
    static.fill(two)
    assert held.tolist() == [1, 2, 3, 4] and static.batch.given[1]["causal"] and torch.equal(static.batch.target, two.target)
    assert not static.batch.given[0][0].any()  # the mask is the same tensor in both, and was not copied again
    static.fill(one)
    assert held.tolist() == [0, 1, 2, 3] and torch.equal(static.batch.hidden, hidden) and hidden.sum() == 0


def _learned_on_gpu(made: vitq.Recipe, monkeypatch, warmup: int) -> tuple[dict, list[tuple], float]:
    """What was learned of a model, (shapes, graphs, steps) of each block, and the median time of a step in s."""
    seen, times = [], []
    release, call = descent.Steps.release, descent.Steps.__call__

    def timed(steps: descent.Steps, i: int) -> None:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(steps, i)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)

    def released(steps: descent.Steps) -> None:
        seen.append((len(steps.buffers), len(steps.graphs), steps.taken))
        release(steps)

    with monkeypatch.context() as patch:
        patch.setattr(descent, "WARMUP", warmup)
        patch.setattr(descent.Steps, "__call__", timed)
        patch.setattr(descent.Steps, "release", released)
        plan, _ = quantize_blocks(prepare(outlying()), made, RAGGED, stream="float", device=torch.device("cuda"))
    learned = {f"{name}.{part}": tensor for name, params in plan.layers.items() if (fmt := getattr(params, "input", None)) is not None
               for part, tensor in (("left", fmt.transform and fmt.transform.left), ("right", fmt.transform and fmt.transform.right), ("clip", fmt.clip))
               if tensor is not None}
    return learned, seen, statistics.median(times)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", WAYS)
@torch.no_grad()
def test_a_graph_learns_what_launched_steps_do(changes: tuple, monkeypatch) -> None:
    made = recipe("flatquant-w4a4kv4", "calib_size=9", "block_gradient.learning_rate=0.001", *changes, epochs=12)
    launched, seen, slow = _learned_on_gpu(made, monkeypatch, warmup=1000)
    assert seen == [(2, 0, 36)] * 2
    replayed, seen, fast = _learned_on_gpu(made, monkeypatch, warmup=2)
    assert seen == [(2, 2, 36)] * 2
    assert launched.keys() == replayed.keys() and len(launched) >= 16
    for name, tensor in launched.items():  # a code that turns over in one of them changes a little of what follows
        assert (tensor.float() - replayed[name].float()).norm() < 0.05 * tensor.float().norm(), name
    assert fast < slow / 2


@pytest.mark.gpu
@torch.no_grad()
def test_a_step_that_cannot_be_captured_is_launched(monkeypatch, caplog) -> None:
    """Its error is read on the host."""
    launch = descent.Steps._launch

    def reading(steps: descent.Steps, batch: descent.Batch) -> None:
        launch(steps, batch)
        float(steps.total)

    made = recipe("flatquant-w4a4kv4", "calib_size=9", epochs=4)
    launched, _, _ = _learned_on_gpu(made, monkeypatch, warmup=1000)
    monkeypatch.setattr(descent.Steps, "_launch", reading)
    monkeypatch.setattr(descent.Steps, "refused", False)  # as it is afterwards again
    again, seen, _ = _learned_on_gpu(made, monkeypatch, warmup=2)
    assert seen == [(2, 0, 12)] * 2 and caplog.text.count("cannot be captured as a CUDA graph") == 1
    assert all((tensor.float() - again[name].float()).norm() < 0.05 * tensor.float().norm() for name, tensor in launched.items())


@pytest.mark.parametrize("stream", ["float", "quantized"])
@pytest.mark.parametrize("solver", ["rtn", "gptq"])
@torch.no_grad()
def test_a_run_that_was_cut_off_goes_on(stream: str, solver: str, tmp_path) -> None:
    model, made = outlying(), recipe("flatquant-w4a4kv4", f"solver={solver}", epochs=3)
    whole = vitq.convert(model, made, CALIB, stream=stream, dtype=torch.float32)

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vitq.convert(model, made, CALIB, stream=stream, dtype=torch.float32, resume=tmp_path / "run", progress=stop)
    assert (tmp_path / "run" / "0001.safetensors").exists()
    resumed = vitq.convert(model, made, CALIB, stream=stream, dtype=torch.float32, resume=tmp_path / "run")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name


@torch.no_grad()
def test_a_checkpoint_has_the_matrices(tmp_path) -> None:
    model = vitq.convert(outlying(), recipe(epochs=2), CALIB, dtype=torch.float32)
    again, x = vitq.load(vitq.save(model, tmp_path / "c")), ids(2, 20, seed=9)
    assert torch.equal(model(x).logits, again(x).logits)
    assert torch.equal(model.generate(x, max_new_tokens=6, do_sample=False), again.generate(x, max_new_tokens=6, do_sample=False))
    assert {"input_left", "input_right", "input_clip"} <= {name.rpartition(".")[2] for name in again.state_dict()}
    formats = {row.layer: row for row in vitq.explain(again)}
    assert "times 8 x 8 and 12 x 12, clipped" in formats["model.layers.0.self_attn.qkv_proj"].format
    assert "keys times 16 x 16" in formats["model.layers.0.self_attn.kv"].note


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@torch.no_grad()
def test_vision_models(name: str) -> None:
    small = dict(depths=(1, 1), embed_dim=24, num_heads=(1, 2)) if "swin" in name else dict(depth=2)
    model = helpers.build(name, **small)
    calib, x = [helpers.images(model, 4, seed) for seed in (2, 3)], helpers.images(model, 3, 9)
    made = recipe("flatquant-w4a4", epochs=3)
    simulated, executed = vitq.simulate(model, made, calib), vitq.convert(model, made, calib, dtype=torch.float32)
    assert sqnr(model(x), simulated(x)) > 6
    wanted, found, floats = (m.forward_features(x) for m in (simulated, executed, model))  # of all tokens: a 4-bit code that turns over in one is no matter
    assert sqnr(wanted, found) > sqnr(floats, wanted) + 10


def test_a_static_recipe_has_no_diagonal_to_learn() -> None:
    with pytest.raises(ValueError, match="inputs of dynamic: true"):
        vitq.Recipe.from_yaml("w8a8").with_overrides(["block_gradient={epochs: 1, diagonal: true}"])


@torch.no_grad()
def test_hadamard_matrices_need_no_data() -> None:
    model, x = outlying(), ids(4, 24, seed=50)
    made = recipe("quarot-w4a4kv4", "solver=rtn")
    assert not made.needs_data
    rtn = recipe("flatquant-w4a4kv4", *RTN)
    wanted = model(x).logits
    assert sqnr(wanted, vitq.simulate(model, made)(x).logits) > sqnr(wanted, vitq.simulate(model, rtn)(x).logits) + 1
    layer = nn.Linear(96, 40)
    rows = torch.randn(20, 96) * torch.logspace(-1, 1, 96)
    module = vitq.QuantLinear.from_float(layer, made, dtype=torch.float32)
    assert sqnr(layer(rows), module(rows)) > sqnr(layer(rows), vitq.QuantLinear.from_float(layer, rtn, dtype=torch.float32)(rows))


@pytest.mark.parametrize("changes, message", [
    (["block_gradient={}"], "'learned', and block_gradient is missing"),
    ([*RTN[1:]], "nothing is to be learned|channels"),
    (["block_gradient.epoch=3"], "block_gradient.epoch: unknown key"),
    (["block_gradient.epochs=0"], "block_gradient.epochs: 0; allowed: 1 to"),
    (["block_gradient.learning_rate=0"], "block_gradient.learning_rate: 0; allowed: above 0"),
    (["block_gradient.matrices=lu"], "block_gradient.matrices: 'lu' is not known"),
    (["input.dynamic=false", "weight.observer=mse"], "transform: 'learned' for the input"),
    (["qkv.input.outliers=32"], "transform: 'learned' for the input of qkv"),
    (["pv.other.transform=learned"], "for the input of a linear layer, or for keys"),
    (["qkv.weight.transform=hadamard"], "transform: 'hadamard' for the weight of qkv"),
    (["qkv.weight.symmetric=false"], "observer: 'learned' for the weight of qkv"),
    (["qkv.input.clip_ratio=0.9"], "clip_ratio: 0.9 for the input of qkv"),
    (["qkv.input.clip_ratio=1.5"], "clip_ratio: 1.5; allowed: 0.1 to 1"),
    (["block_gradient.learning_rate=1e-3"], "write 0.001 or 1.0e-3"),
])
def test_recipe_mistakes(changes: list[str], message: str) -> None:
    if changes == [*RTN[1:]]:
        changes = [*changes, "block_gradient.diagonal=false"]
    with pytest.raises((ValueError, TypeError), match=message):
        vitq.Recipe.from_yaml("flatquant-w4a4kv4").with_overrides(changes)


@torch.no_grad()
def test_refuses() -> None:
    model = outlying()
    with pytest.raises(ValueError, match="learns by block_gradient: give calib="):
        vitq.convert(model, recipe())
    with pytest.raises(ValueError, match="'lm_head' is in no block"):
        vitq.convert(model, recipe("flatquant-w4a4", "head.bits=4", "head.input.dynamic=true", "head.input.transform=learned", epochs=1), CALIB)
    with pytest.raises(ValueError, match="'model.layers.0' (can no longer be inverted|is no longer finite in epoch)"):
        vitq.convert(model, recipe("flatquant-w4a4", "block_gradient.learning_rate=10.0", epochs=8), CALIB)
    with pytest.raises(ValueError, match="learns by block_gradient, from whole blocks"):
        vitq.QuantLinear.from_float(nn.Linear(8, 8), "flatquant-w4a4", torch.randn(4, 8))
    parallel = build("Falcon")
    with pytest.raises(ValueError, match="share in two ways"):
        vitq.convert(parallel, recipe("flatquant-w4a4", "fc1.input.bits=8", epochs=1), CALIB)


def _learn_a_share(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    with torch.no_grad():
        model = vitq.convert(outlying(num_hidden_layers=3), recipe(epochs=2), CALIB, dtype=torch.float32, stream="float", resume=f"{folder}/run")
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")


def test_processes_share_the_blocks(tmp_path) -> None:
    """Two learn what one would have learned, each its part of the blocks."""
    torch.multiprocessing.spawn(_learn_a_share, (str(tmp_path),), nprocs=2)
    with torch.no_grad():
        alone = vitq.convert(outlying(num_hidden_layers=3), recipe(epochs=2), CALIB, dtype=torch.float32, stream="float", resume=tmp_path / "alone")
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(shared[name], tensor) for name, tensor in alone.state_dict().items())
    assert (tmp_path / "run" / "statistics.safetensors").exists()


@pytest.mark.parametrize("name", ["w8a8", "gptq-w4a16", "flatquant-w4a4kv4"])
@torch.no_grad()
def test_a_finished_quantized_stream_opens_again(name: str, tmp_path) -> None:
    """Of a model whose tail, with a tied head, has no layer."""
    model, made = outlying(tie_word_embeddings=True), recipe(name, epochs=1)
    first, again = (vitq.convert(model, made, CALIB, stream="quantized", dtype=torch.float32, resume=tmp_path / "run") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("changes, message", [
    (["head.bits=4", "head.input.dynamic=true", "head.input.transform=learned"], "'lm_head' is in no block"),
    (["name:*.layers.1.*down_proj.input.bits=16"], "learned with those of dynamic inputs"),
    (["fc2.input.dynamic=false", "fc2.input.transform=none", "fc2.input.observer=minmax"], "learned with those of dynamic inputs"),
])
def test_what_cannot_be_learned_is_said_before_any_work(changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vitq.check(outlying(), recipe("flatquant-w4a4", *changes))
