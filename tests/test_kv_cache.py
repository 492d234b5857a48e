"""Keys and values that are quantized as they enter the cache: the same numbers with codes and without, in any split into steps; what it holds."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers import sqnr
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
from helpers import build as build_vit  # noqa: E402
from helpers import images  # noqa: E402
from language_models import GQA, build, ids, layers, quick  # noqa: E402
from transformers import DynamicCache, StaticCache  # noqa: E402
from transformers.cache_utils import Cache, DynamicLayer  # noqa: E402

import vitq  # noqa: E402
from vitq.formats import QTensor, pack_int4, unpack_int4  # noqa: E402
from vitq.nn.key_values import HeadCodes, RowCodes  # noqa: E402
from vitq.nn.quantized_cache import QuantizedCache  # noqa: E402
from vitq.quantizers.uniform import quantize_per_token, quantize_per_token_asymmetric  # noqa: E402

INT8, INT4 = ("kv.bits=8",), ("kv.bits=4", "kv.symmetric=false")
FLOAT32 = dict(dtype=torch.float32)
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"  # as this transformers calls it
SPLIT = 60  # dB: sums of another order turn a code of a key now and then. Linear layers are in float there, whose input codes would turn too


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    yield


def converted(family: str = "Llama", *changes: str, dtype: torch.dtype = torch.float32, **kwargs) -> nn.Module:
    return vitq.convert(build(family, **kwargs), quick("w8a8-dynamic", *changes), dtype=dtype)


def generated(model: nn.Module, x: Tensor, mask: Tensor | None = None, **kwargs) -> Tensor:
    mask = torch.ones_like(x) if mask is None else mask
    return model.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False, **kwargs)[:, x.shape[1]:]


def step_by_step(model: nn.Module, x: Tensor, cache, *ends: int) -> Tensor:
    """Logits of x in pieces that end there."""
    found = [model(x[:, a:b], **{CACHE: cache}, use_cache=True).logits for a, b in zip((0, *ends), (*ends, x.shape[1]))]
    return torch.cat(found, 1)


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [1, 7, 24, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_hold_the_codes_of_the_quantizers(bits: int, symmetric: bool, features: int) -> None:
    """Stored bytes and fake quantization give the same bits, in each float type."""
    codes = RowCodes(bits, symmetric)
    x = torch.randn(2, 3, 5, features, generator=torch.Generator().manual_seed(bits)) * 3 + 1
    x[0, 0, 0], x[1, 2, 4] = 0.0, 7.5
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        given = x.to(dtype)
        rows, numbers = codes.pack(given), codes.unpack(codes.pack(given), features, dtype)
        assert rows.dtype == torch.uint8 and rows.shape == (2, 3, 5, codes.size(features))
        assert numbers.dtype == dtype and torch.equal(numbers, codes.fake(given))
        wanted, scale, *shift = quantize_per_token(given, bits) if symmetric else quantize_per_token_asymmetric(given, bits)
        stored = rows[..., 4 * (1 + len(shift)):].contiguous()
        assert torch.equal(unpack_int4(stored, features) if bits <= 4 else stored.view(torch.int8), wanted)
        assert bits > 4 or torch.equal(stored, pack_int4(wanted))
        assert torch.equal(numbers, QTensor(wanted, scale, 0, *shift).dequantize(dtype))
    assert symmetric or torch.equal(codes.unpack(codes.pack(x), features, torch.float32)[1, 2, 4], torch.full((features,), 7.5))


CASES = [("Llama", {}), ("Mistral", {"sliding_window": 8}), ("Qwen2", {}), ("Qwen3", {"head_dim": 25 * 2}), ("OPT", {}),
         ("OPT", {"hidden_size": 60, "num_attention_heads": 4, "ffn_dim": 112, "word_embed_proj_dim": 60}), ("Llama", {"num_key_value_heads": 4})]


@pytest.mark.parametrize("family, kwargs", CASES)
@pytest.mark.parametrize("changes", [INT8, INT4, ("kv.bits=8", "qk.other.bits=16")])
def test_a_cache_changes_no_number(family: str, kwargs: dict, changes: tuple) -> None:
    """Without a cache, with one, and in any split, the same keys and values are attended to; execution is the simulation."""
    model, x = converted(family, "bits=16", *changes, **kwargs), ids(2, 20)
    whole, cache = model(x, use_cache=False).logits, vitq.quantized_cache(model)
    assert torch.equal(model(x, use_cache=True).logits, whole)
    assert sqnr(whole, step_by_step(model, x, cache, 3, 12, 13, 14)) > SPLIT and cache.get_seq_length() == 20
    simulated = vitq.simulate(build(family, **kwargs), model.vitq.recipe)
    assert sqnr(simulated(x).logits, whole) > SPLIT
    assert sqnr(whole, step_by_step(simulated, x, DynamicCache(config=simulated.config), 3, 12, 13)) > SPLIT
    assert SPLIT > sqnr(build(family, **kwargs)(x).logits, whole) > (30 if "kv.bits=8" in changes else 8)
    model = converted(family, *changes, **kwargs)
    assert sqnr(vitq.simulate(build(family, **kwargs), model.vitq.recipe)(x).logits, model(x).logits) > 35


def test_prefill_attends_to_what_the_cache_holds() -> None:
    """The codes in the cache are those of the keys and values that the simulation makes of its own."""
    model, x = converted("Llama", *INT4), ids(2, 9)
    cache, seen = vitq.quantized_cache(model), {}
    entry = layers(model)[1].self_attn.kv
    entry.register_forward_hook(lambda module, args, output: seen.update(given=args[1:3], output=output[1:]))
    model(x, **{CACHE: cache})
    for given, output, codes, rows in zip(seen["given"], seen["output"], entry.codes, (cache.layers[1].keys, cache.layers[1].values)):
        assert given.shape == (2, 2, 9, 16)  # heads of grouped queries once
        assert torch.equal(rows, codes.pack(given)) and torch.equal(output, codes.fake(given))


@pytest.mark.parametrize("family, kwargs", [*CASES[:2], ("OPT", {})])
@pytest.mark.parametrize("changes", [INT8, INT4])
def test_generation(family: str, kwargs: dict, changes: tuple) -> None:
    """The same greedy tokens with a cache and without, given one or making one, beside longer rows, and as beams."""
    model, x = converted(family, *changes, **kwargs), ids(2, 6)
    wanted = generated(model, x, use_cache=False)
    assert torch.equal(generated(model, x), wanted)
    cache = vitq.quantized_cache(model)
    assert torch.equal(model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=8, do_sample=False, **{CACHE: cache},
                                      return_dict_in_generate=True).sequences[:, 6:], wanted)
    assert cache.get_seq_length() == 13
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), x), 1)
    mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), torch.ones_like(x)), 1)
    assert torch.equal(generated(model, padded, mask), wanted)
    beams = dict(num_beams=3, num_return_sequences=2)
    assert torch.equal(generated(model, x, **beams), generated(model, x, use_cache=False, **beams))


def test_what_is_done_along_the_batch_and_the_tokens() -> None:
    model, x = converted("Llama", "bits=16", *INT4), ids(3, 12)
    for change, same in [(lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]), (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
                         (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])]:
        cache = vitq.quantized_cache(model)
        model(x[:, :8], **{CACHE: cache})
        change(cache)
        assert sqnr(model(x[same], use_cache=False).logits[:, 8:], model(x[same, 8:], **{CACHE: cache}).logits) > SPLIT
    cache = vitq.quantized_cache(model)
    model(x, **{CACHE: cache})
    cache.crop(-4)
    assert cache.get_seq_length() == 8
    assert sqnr(model(x, use_cache=False).logits[:, 8:], model(x[:, 8:], **{CACHE: cache}).logits) > SPLIT
    cache.reset()
    assert cache.get_seq_length() == 0 and torch.equal(model(x, **{CACHE: cache}).logits, model(x, use_cache=False).logits)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, part", [(("kv.bits=8",), 0.53125), (("kv.bits=8", "kv.symmetric=false"), 0.5625), (("kv.bits=4",), 0.28125),
                                           (INT4, 0.3125), (("kv.bits=4", "pv.other.bits=16"), (0.28125 + 1) / 2)])
def test_bytes(changes: tuple, part: float) -> None:
    """Of a cache in float16, heads of 64; `explain` says the same."""
    model, x = converted("Llama", *changes, dtype=torch.float16, head_dim=64), ids(2, 10)
    out = model(x, use_cache=True)
    cache = getattr(out, CACHE)
    assert type(cache) is QuantizedCache and isinstance(cache, DynamicCache)
    assert cache.nbytes == part * 2 * 2 * 2 * 10 * 2 * 64 * 2  # layers, k and v, batch, tokens, heads, numbers, bytes
    rows = [row for row in vitq.explain(model) if row.role == "kv"]
    assert [row.layer for row in rows] == [f"model.layers.{i}.self_attn.kv" for i in range(2)]
    assert rows[0].note == f"in a cache {int(part * 256)} bytes a token and head, 256 in 16-bit floats"
    first, second = ("8" if "kv.bits=8" in changes else "4", "16" if "pv.other.bits=16" in changes else None)
    kind = " asymmetric" if "kv.symmetric=false" in changes else ""
    assert rows[0].format == f"K{first}{kind} V{second or first + kind}"


def test_a_window_keeps_no_more_than_it_reads() -> None:
    model = converted("Mistral", *INT8, sliding_window=8)
    cache = vitq.quantized_cache(model)
    step_by_step(model, ids(1, 30), cache, 10, 11, 12)
    assert cache.layers[0].keys.shape == (1, 2, 7, 16 + 4) and cache.get_seq_length() == 30


# Recipes --------------------------------------------------------------------------------------------------------------


def test_some_layers_only() -> None:
    model = converted("Llama", *INT8, "name:model.layers.0.*.other.bits=16", "name:model.layers.1.self_attn.pv.other.bits=4")
    assert [row.format for row in vitq.explain(model) if row.role == "kv"] == ["K8 V4"]
    assert torch.equal(generated(model, ids(2, 6)), generated(model, ids(2, 6), use_cache=False))


def test_short_and_long_forms_are_one() -> None:
    base = vitq.Recipe.from_yaml("dgq-w4a8")
    short = base.with_overrides(["kv.bits=4", "kv.symmetric=false"])
    long = base.with_overrides([f"{role}.other.{field}" for role in ("qk", "pv") for field in ("dynamic=true", "bits=4", "symmetric=false")])
    for role in ("qk", "pv"):
        layer = short.resolve(role)
        assert layer == long.resolve(role) and layer.is_float and layer.cached is layer.other
        assert (layer.cached.bits, layer.cached.symmetric, layer.cached.granularity) == (4, False, "per_token")
        assert base.resolve(role).cached is None and base.with_overrides(["kv.bits=16"]).resolve(role).cached is None
    assert vitq.Recipe.from_yaml("w8a8").with_overrides(["kv.bits=8"]).resolve("qk").cached.bits == 8
    assert not vitq.Recipe.from_yaml("w8a8-dynamic").with_overrides(["kv.bits=8"]).is_static
    assert vitq.Recipe.from_yaml("w8a8").resolve("qk").cached is None


@pytest.mark.parametrize("changes, message", [
    (["kv.bits=12"], r"other.bits: 12; allowed: 2 to 8"),
    (["kv.granularity=per_head"], r"kv.granularity: unknown key; allowed: .*kv.bits or kv.symmetric"),
    (["kv.bits=8", "qk.other.granularity=per_head"], "'per_head' for the other of qk; keys and values of a cache have one scale for each token"),
    (["kv.bits=8", "qk.input.bits=8"], r"true for the other of qk; q and k have static scales: false; true for other \(k\) with an input of 16 bits"),
    (["kv.bits=8", "pv.input.bits=8"], r"true for the other of pv; .*true with an input of 16 bits, in a cache"),
])
def test_what_a_recipe_may_not_say(changes: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick("w8a8-dynamic", *changes)


@pytest.mark.parametrize("kwargs", [{}, GQA])
def test_what_a_model_does_not_take(kwargs: dict) -> None:
    with pytest.raises(ValueError, match="keys as they enter the cache, but a FalconForCausalLM keeps the attention.*leave out kv.bits, or give qk.other 16"):
        converted("Falcon", *INT8, **kwargs)
    with pytest.raises(ValueError, match="static keys of 'model.layers.0.self_attn.qk', whose attention runs in float.*dynamic: true"):
        converted("Llama", "qk.input.bits=16", "qk.other.bits=8")
    vit = build_vit("deit_tiny_patch16_224", depth=1, img_size=32, embed_dim=48)
    with pytest.raises(ValueError, match="values of 'blocks.0.attn' as they enter a cache, and a model of images has none"):
        vitq.convert(vit, quick("w8a8-dynamic", *INT8), [images(vit, 4)])


# Caches ---------------------------------------------------------------------------------------------------------------


def test_caches_that_do_not_fit() -> None:
    model, x = converted("Llama", *INT8), ids(2, 6)
    class Own(DynamicLayer):
        pass

    with pytest.raises(TypeError, match="a Cache of Owns holds floats, or codes of its own.*leave cache_implementation= out, or give vitq.quantized_cache"):
        model(x, **{CACHE: Cache(layers=[Own(), Own()])})
    for floats in (DynamicCache(), StaticCache(config=model.config, max_cache_len=20)):
        build()(x, **{CACHE: floats})
        with pytest.raises(ValueError, match="holds floats of another model"):
            model(x, **{CACHE: floats})
    other = vitq.quantized_cache(model)
    model(x, **{CACHE: other})
    with pytest.raises(ValueError, match=r"holds \(RowCodes\(bits=8.*are \(RowCodes\(bits=4"):
        converted("Llama", *INT4)(x, **{CACHE: other})
    with pytest.raises(ValueError, match="leaves keys and values in float: convert with kv.bits=8"):
        vitq.quantized_cache(converted())
    with pytest.raises(TypeError, match="vitq.convert or vitq.load returned, got LlamaForCausalLM"):
        vitq.quantized_cache(build())
    empty = DynamicCache()  # without a config it grows as it fills
    assert torch.equal(model(x, **{CACHE: empty}).logits, model(x, use_cache=False).logits)
    assert len(empty) == 2 and empty.nbytes == 2 * 2 * 2 * 6 * 2 * 20


# Checkpoints, calibration ---------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_recipe_alone(tmp_path) -> None:
    model, x = converted("Llama", *INT4), ids(2, 6)
    again = vitq.load(vitq.save(model, tmp_path / "c"))
    assert again.state_dict().keys() == converted().state_dict().keys()
    assert torch.equal(again(x).logits, model(x).logits) and torch.equal(generated(again, x), generated(model, x))
    assert [row for row in vitq.explain(again) if row.role == "kv"] == [row for row in vitq.explain(model) if row.role == "kv"]


@pytest.mark.parametrize("stream", ["float", "quantized"])
def test_block_by_block(stream: str, tmp_path) -> None:
    """Streams go on through quantized keys and values, and a run that was cut off goes on."""
    model, recipe, calib, x = build(), quick("dgq-w4a8", *INT4), [ids(4, 40, seed=2)], ids(2, 20)
    made = vitq.convert(model, recipe, calib, stream=stream, resume=tmp_path / "run", **FLOAT32)
    assert sqnr(vitq.simulate(model, recipe, calib, stream=stream)(x).logits, made(x).logits) > 35
    (tmp_path / "run" / "0002.safetensors").unlink()
    assert torch.equal(vitq.convert(model, recipe, calib, stream=stream, resume=tmp_path / "run", **FLOAT32)(x).logits, made(x).logits)
    if stream == "float":
        assert torch.equal(vitq.convert(model, recipe, calib, **FLOAT32)(x).logits, made(x).logits)
    else:
        floats = vitq.convert(model, quick("dgq-w4a8"), calib, stream=stream, **FLOAT32)
        assert not torch.equal(layers(floats)[0].self_attn.o_proj.codes(), layers(made)[0].self_attn.o_proj.codes()), "o_proj reads what codes give"
        assert torch.equal(layers(floats)[0].self_attn.qkv_proj.codes(), layers(made)[0].self_attn.qkv_proj.codes())


# Heads of their own bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_heads_of_different_codes_lie_side_by_side(dtype: torch.dtype) -> None:
    codes = HeadCodes(((2, RowCodes(4, False)), (1, None), (3, RowCodes(8, True))))
    x = torch.randn(2, 6, 5, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = codes.pack(x)
    assert rows.shape == (2, 1, 5, codes.size(24, dtype.itemsize)) and codes.size(24) == 2 * (8 + 12) + 48 + 3 * (4 + 24)
    numbers = codes.unpack(rows, 24, dtype)
    assert torch.equal(numbers, codes.fake(x)) and torch.equal(numbers[:, 2], x[:, 2])
    assert torch.equal(numbers[:, :2], RowCodes(4, False).fake(x[:, :2])) and torch.equal(numbers[:, 3:], RowCodes(8, True).fake(x[:, 3:]))


@pytest.mark.parametrize("family, kwargs", [("Llama", {"num_key_value_heads": 4}), ("Llama", {}), ("OPT", {}), ("Mistral", {"sliding_window": 8})])
@torch.no_grad()
def test_heads_that_matter_less_have_fewer_bits_in_the_cache(family: str, kwargs: dict, tmp_path) -> None:
    changes = ["heads.least=2", "heads.score=l1", "kv.bits=8", "name:*.least.other.bits=4", "name:*.least.other.symmetric=false", "solver=rtn"]
    model, recipe, x = build(family, **kwargs), quick("phq-mixed", *changes), ids(2, 20)
    executed = vitq.convert(model, recipe, [ids(4, 50, seed=2)], **FLOAT32)
    simulated = vitq.simulate(model, recipe, [ids(4, 50, seed=2)])
    assert sqnr(simulated(x).logits, executed(x).logits) > 35
    cache = vitq.quantized_cache(executed)
    assert sqnr(executed(x).logits, step_by_step(executed, x, cache, 7, 12)) > 35
    kv = executed.get_submodule(next(row.layer for row in vitq.explain(executed) if row.role == "kv"))
    (least, rest), dim = (heads for heads, _ in kv.codes[0].parts), kv.head_dim
    tokens = min(x.shape[1], kwargs.get("sliding_window", 100) - 1)
    assert cache.nbytes == 2 * 2 * len(x) * tokens * (least * (8 + dim // 2) + rest * (4 + dim)), "of two layers, keys and values"
    row = next(row for row in vitq.explain(executed) if row.role == "kv")
    assert row.format == "K4 asymmetric/8 V4 asymmetric/8" and f"{4 * (least + rest) * dim} in 16-bit floats" in row.note
    assert torch.equal(vitq.load(vitq.save(executed, tmp_path / "c"))(x).logits, executed(x).logits)
    one = vitq.convert(model, recipe.with_overrides(["name:*.least.other.bits=16"]), [ids(4, 50, seed=2)], **FLOAT32)
    assert sqnr(model(x).logits, one(x).logits) > sqnr(model(x).logits, executed(x).logits), "float for the least, 8 bits for the others"
