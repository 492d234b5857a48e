"""A static cache of quantized keys and values: the tokens of the dynamic one, at places that do not move."""

from __future__ import annotations

import copy
import gc
import os
import types

import pytest
import torch
from helpers import sqnr

transformers = pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
from _generation import random_model  # noqa: E402
from language_models import build, ids, quick  # noqa: E402
from test_kv_cache import CACHE, CASES, INT4, INT8, SPLIT, converted, generated, step_by_step  # noqa: E402
from transformers import StaticCache  # noqa: E402

import vitq  # noqa: E402
import vitq.graphs  # noqa: E402
from vitq.nn.key_values import QuantKeyValues  # noqa: E402
from vitq.nn.quantized_cache import StaticQuantizedCache  # noqa: E402
from vitq.ops.cached_attention import CachedAttention  # noqa: E402

MIXED = ("kv.bits=8", "qk.other.bits=16", "name:*.layers.0.self_attn.*.other.bits=16")


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    yield


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many new tokens each attention had that wrote and read the rows of a static cache itself."""
    counts, run = [], CachedAttention.run
    monkeypatch.setattr(CachedAttention, "run", lambda self, packed, q, *rest: counts.append(q.shape[2]) or run(self, packed, q, *rest))
    return counts


@pytest.mark.parametrize("family, kwargs", CASES)
@pytest.mark.parametrize("changes", [INT8, INT4, ("kv.bits=8", "qk.other.bits=16"), ("kv.bits=4", "pv.other.bits=8"), MIXED])
def test_logits_are_those_without_a_cache(family: str, kwargs: dict, changes: tuple, attended: list[int]) -> None:
    """In pieces of one token, of a few and of many."""
    model, x = converted(family, "bits=16", *changes, **kwargs), ids(2, 32)
    cache = vitq.quantized_cache(model, max_length=37, batch_size=2)
    assert sqnr(model(x, use_cache=False).logits, step_by_step(model, x, cache, 9, 10, 14, 30, 31)) > SPLIT
    assert cache.get_seq_length() == 32 and cache.get_max_length() == 37 and cache.layers[0].keys.shape[2] == 48 and cache.is_compileable
    layers = sum(isinstance(module, QuantKeyValues) for module in model.modules())
    assert attended == [tokens for tokens in (9, 1, 4, 16, 1, 1) for _ in range(layers)]


@pytest.mark.parametrize("family, kwargs", [*CASES[:2], CASES[4]])
@pytest.mark.parametrize("changes", [INT8, INT4])
def test_generation(family: str, kwargs: dict, changes: tuple, attended: list[int]) -> None:
    """The tokens of the dynamic cache: greedy, sampled, with padding on the left, as beams, and once more after reset."""
    model, x = converted(family, *changes, **kwargs), ids(2, 12)
    padded, mask = x.clone(), torch.ones_like(x)
    padded[1, :5], mask[1, :5] = 0, 0
    wanted, other = generated(model, x), generated(model, padded, mask)
    cache = vitq.quantized_cache(model, max_length=20, batch_size=2)
    places = [layer.keys.data_ptr() for layer in cache.layers]
    assert torch.equal(generated(model, x, past_key_values=cache), wanted) and attended
    for given, of, tokens in ((x, torch.ones_like(x), wanted), (padded, mask, other)):
        cache.reset()
        assert cache.get_seq_length() == 0 and torch.equal(generated(model, given, of, past_key_values=cache), tokens)
    beams = dict(num_beams=3, num_return_sequences=2)
    of_beams = vitq.quantized_cache(model, max_length=20, batch_size=6)
    assert torch.equal(generated(model, x, **beams, past_key_values=of_beams), generated(model, x, **beams))
    assert places == [layer.keys.data_ptr() for layer in cache.layers]
    drawn = []
    cache.reset()
    for given in (cache, None):
        torch.manual_seed(3)
        drawn.append(model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=8, do_sample=True, past_key_values=given))
    assert torch.equal(*drawn)


def test_a_cache_of_transformers_becomes_one() -> None:
    model, x = converted("Llama", *INT4), ids(2, 6)
    assert torch.equal(generated(model, x, cache_implementation="static"), generated(model, x))
    assert torch.equal(generated(model, x, cache_implementation="static", prefill_chunk_size=4), generated(model, x))
    cache = StaticCache(config=model.config, max_cache_len=20)
    assert torch.equal(generated(model, x, past_key_values=cache), generated(model, x))
    assert isinstance(cache, StaticQuantizedCache) and cache.get_max_length() == 20 and cache.nbytes == 2 * 2 * 2 * 2 * 32 * (8 + 8)  # layers, k and v, batch, heads, tokens, bytes


@pytest.mark.parametrize("family, kwargs", CASES)
def test_floats_in_a_static_cache(family: str, kwargs: dict, attended: list[int]) -> None:
    """A recipe that leaves keys and values in float attends itself too, in transformers' own static cache of all layers but those of a window, and says so
    in no row."""
    if family == "Mistral":
        kwargs = {**kwargs, "sliding_window": None}
    model, x = converted(family, **kwargs), ids(2, 20)
    cache = StaticCache(config=model.config, max_cache_len=24)
    assert sqnr(model(x, use_cache=False).logits, step_by_step(model, x, cache, 9, 10, 14)) > SPLIT
    layers = len(cache.layers)
    assert type(cache) is StaticCache and attended == [tokens for tokens in (9, 1, 4, 6) for _ in range(layers)]
    assert cache.layers[0].keys.dtype == torch.float32 and "kv" not in {row.role for row in vitq.explain(model)}
    cache.reset()
    assert torch.equal(generated(model, x[:, :12], past_key_values=cache), generated(model, x[:, :12]))
    with pytest.raises(ValueError, match="keys and values are floats: give a cache of transformers"):
        model(x, **{CACHE: vitq.quantized_cache(converted(family, *INT4, **kwargs), max_length=24, batch_size=2)})


@pytest.mark.parametrize("changes, static", [((), False), ((), True), (INT4, True)])
def test_compiled_steps_are_counted_on_the_device(changes: tuple, static: bool) -> None:
    """A prompt and tokens by `torch.compile`, whose count the host learns when it is asked: by tokens, a crop, a reorder."""
    model, x = converted("Llama", "bits=16", *changes), ids(2, 16)
    cache = vitq.quantized_cache(model, max_length=20, batch_size=2) if changes else StaticCache(config=model.config, max_cache_len=20)
    if static and not changes:  # an eager prompt makes the layers vitq's
        model(x[:, :1], **{CACHE: cache})
        cache.reset()
    wanted = model(x, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", dynamic=False)
    found = [compiled(x[:, :8], **{CACHE: cache}).logits, *(compiled(x[:, i : i + 1], **{CACHE: cache}).logits for i in (8, 9)), model(x[:, 10:], **{CACHE: cache}).logits]
    assert sqnr(wanted, torch.cat(found, 1)) > SPLIT and int(cache.get_seq_length()) == 16
    compiled(x[:, :1], **{CACHE: cache})
    cache.crop(-9)
    assert int(cache.get_seq_length()) == 8 and sqnr(wanted[:, 8:], model(x[:, 8:], **{CACHE: cache}).logits) > SPLIT
    if static:  # else the layers are transformers' own
        with pytest.raises(ValueError, match="holds 16 tokens, of which 17"):
            cache.layers[0].crop(-17)
        with pytest.raises(ValueError, match="room for 20 tokens, holds 16, and 5 came"):
            model(x[:, :5], **{CACHE: cache})


@pytest.mark.parametrize("recipe", ["phq-w8", "phq-mixed"])
def test_heads_in_parts_with_floats(recipe: str, attended: list[int]) -> None:
    model, x = vitq.convert(build("Llama"), quick(recipe), [ids(4, 40)], dtype=torch.float32), ids(2, 12)
    assert torch.equal(generated(model, x, cache_implementation="static"), generated(model, x)) and attended
    model = vitq.convert(build("Llama"), quick(recipe, *INT4, "name:model.layers.0.*.other.bits=16"), [ids(4, 40)], dtype=torch.float32)
    cache = vitq.quantized_cache(model, max_length=20, batch_size=2)
    assert torch.equal(generated(model, x, past_key_values=cache), generated(model, x)) and cache.layers[0].codes == (None, None)


def test_caches_of_other_models() -> None:
    """What cannot hold a model's keys and values is refused with what to do; a cache that was made early and holds nothing is taken."""
    floats, codes, x = converted("Llama"), converted("Llama", *INT4), ids(2, 6)
    cache = StaticCache(config=floats.config, max_cache_len=20)
    floats(x, **{CACHE: cache})
    cache.reset()
    with pytest.raises(ValueError, match="holds floats of another model"):
        codes(x, **{CACHE: cache})
    with pytest.raises(ValueError, match="of 2 sequences, and 1 came: give a new cache"):
        floats(x[:1], **{CACHE: cache})
    with pytest.raises(ValueError, match="of torch.float32, and torch.bfloat16 came"):
        vitq.convert(build("Llama"), "w8a8-dynamic", dtype=torch.bfloat16)(x, **{CACHE: cache})
    dynamic = vitq.quantized_cache(codes)
    codes(x, **{CACHE: dynamic})
    with pytest.raises(ValueError, match="keys and values are floats: give a cache of transformers"):
        floats(x, **{CACHE: dynamic})


@pytest.mark.parametrize("changes", [(), INT4])
def test_chunks_of_a_prompt(changes: tuple, attended: list[int]) -> None:
    model, x = converted("Llama", *changes), ids(2, 12)
    assert torch.equal(generated(model, x, cache_implementation="static", prefill_chunk_size=5), generated(model, x))
    assert attended[:6] == [5, 5, 5, 5, 2, 2]


@pytest.mark.parametrize("recipe", ["phq-w8", "phq-mixed"])
def test_heads_with_codes_of_their_own(recipe: str, attended: list[int]) -> None:
    heads = [f"name:model.layers.{i}.self_attn.{role}.least.other.bits=4" for i in (0, 1) for role in ("qk", "pv")]
    model = vitq.convert(build("Llama"), quick(recipe, *INT8, *heads), [ids(4, 40)], dtype=torch.float32)
    x = ids(2, 12)
    cache = vitq.quantized_cache(model, max_length=32, batch_size=2)
    assert torch.equal(generated(model, x, past_key_values=cache), generated(model, x)) and attended
    assert cache.layers[0].keys.shape == (2, 1, 32, cache.layers[0].codes[0].size(16, 4))


def test_crop_and_rows() -> None:
    """A cache that was cropped writes over what lay behind; its rows are the dynamic one's."""
    model, x = converted("Llama", "bits=16", *INT4), ids(2, 30)
    cache, dynamic = vitq.quantized_cache(model, max_length=32, batch_size=2), vitq.quantized_cache(model)
    step_by_step(model, ids(2, 30, seed=9), cache, 20)
    cache.crop(-10)
    assert cache.get_seq_length() == 20 == cache.layers[0].seen
    cache.crop(-20)
    found, wanted = step_by_step(model, x, cache, 12, 13, 14), step_by_step(model, x, dynamic, 12, 13, 14)
    assert sqnr(wanted, found) > SPLIT
    for static, of in zip(cache.layers, dynamic.layers):
        for codes, rows, others in zip(static.codes, (static.keys, static.values), (of.keys, of.values)):
            numbers = (codes.unpack(some, 16, torch.float32) for some in (others, rows[:, :, :30]))
            assert rows.shape == (2, 2, 32, 16) and sqnr(*numbers) > SPLIT


def test_a_prompt_in_float() -> None:
    """Its tokens see each other in float; the cache keeps codes, which those after see."""
    model, x = converted("Llama", "bits=16", *INT4), ids(2, 20)
    plain = vitq.convert(build("Llama"), quick("w8a8-dynamic", "bits=16"), dtype=torch.float32)
    cache = vitq.quantized_cache(model, max_length=32, batch_size=2, float_prefill=True)
    first = model(x, **{CACHE: cache}).logits
    assert sqnr(plain(x).logits, first) > SPLIT > sqnr(model(x).logits, first)
    assert cache.layers[0].keys.dtype == torch.uint8
    other = vitq.quantized_cache(model, max_length=32, batch_size=2)
    model(x, **{CACHE: other})
    assert torch.equal(cache.layers[0].keys, other.layers[0].keys)  # of the first layer, whose input is the same


def test_what_does_not_fit() -> None:
    model, x = converted("Llama", *INT8), ids(2, 12)
    cache = vitq.quantized_cache(model, max_length=16)
    with pytest.raises(ValueError, match="of 1 sequences, and 2 came: .*batch_size=2"):
        model(x, **{CACHE: cache})
    model(x[:1], **{CACHE: cache})
    for tokens in (5, 12):
        with pytest.raises(ValueError, match=f"room for 16 tokens, holds 12, and {tokens} came: give a larger max_length"):
            model(x[:1, :tokens], **{CACHE: cache})
    with pytest.raises(ValueError, match="max_length 0, batch_size 1"):
        vitq.quantized_cache(model, max_length=0)
    with pytest.raises(ValueError, match="are of a cache with a max_length"):
        vitq.quantized_cache(model, batch_size=2)
    with pytest.raises(ValueError, match="leaves keys and values in float: .*StaticCache"):
        vitq.quantized_cache(converted("Llama"), max_length=16)
    with pytest.raises(TypeError, match=r"sliding window comes from vitq.quantized_cache\(model, max_length=…\)"):
        generated(converted("Mistral", *INT8, sliding_window=8), x, cache_implementation="static")
    with pytest.raises(ValueError, match=r"holds \(RowCodes\(bits=8.*are \(RowCodes\(bits=4"):
        converted("Llama", *INT4)(x[:1], **{CACHE: cache})


@pytest.mark.parametrize("changes, part", [(INT4, 0.28125), (("kv.bits=4",), 68 / 256), (INT8, 132 / 256)])
def test_memory_of_32k_tokens(changes: tuple, part: float) -> None:
    """Of Llama-3-8B's shape, beside the cache of float16 numbers."""
    small = converted("Llama", *changes, head_dim=128, dtype=torch.float16)
    kv = next(module for module in small.modules() if isinstance(module, QuantKeyValues))
    cache = StaticQuantizedCache([(kv.codes, torch.empty(1, 8, 0, 128, dtype=torch.float16, device="meta"))] * 32, 32768)
    floats = 32 * 2 * 8 * 32768 * 128 * 2
    assert len(cache) == 32 and cache.nbytes == part * floats and part <= (0.30 if "kv.bits=4" in changes else 0.52)


@pytest.mark.xdist_group("much memory")
@pytest.mark.parametrize("device, tokens, shape", [("cpu", 600, None), pytest.param("cuda", 32700, None, marks=pytest.mark.gpu),
                                                   pytest.param("cuda", 32700, "llama-3-8b", marks=pytest.mark.gpu)])
@torch.inference_mode()
def test_long_contexts(device: str, tokens: int, shape: str | None) -> None:
    """Greedy tokens are those of the simulated cache, but where two are as good as equal, which roundings of floats tell apart. Of two small layers the simulation is
    in float32, of a whole model in its own float16."""
    if shape is not None:
        gc.collect()
        torch.cuda.empty_cache()
        free, whole = torch.cuda.mem_get_info()
        if free < 70e9 or "PYTEST_XDIST_WORKER" in os.environ and whole < 120e9:
            pytest.skip("needs 70 GB of GPU memory that no other process takes: beside others, a GPU of 120 GB")
    recipe, new = quick("w8a8-dynamic", "bits=16", *INT4), 24

    def source() -> torch.nn.Module:
        if shape is not None:
            return random_model(shape, torch.device(device))
        return build("Llama", num_attention_heads=8, head_dim=128, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}, max_position_embeddings=40000)

    model = vitq.convert(source(), recipe, dtype=torch.float32 if device == "cpu" else torch.float16).to(device)
    x = ids(1, tokens).to(device)
    mask = torch.ones(1, tokens + new, dtype=torch.long, device=device)
    mask[0, 0] = 0  # so that attention in float32 has a mask, with which torch does not make the whole matrix
    cache = vitq.quantized_cache(model, max_length=tokens + new)
    found = model.generate(x, attention_mask=mask[:, :tokens], max_new_tokens=new, do_sample=False, past_key_values=cache)
    config = model.config
    floats = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * (tokens + new)  # k and v, 2 bytes
    assert cache.nbytes < 0.30 * floats and found.shape == (1, tokens + new)
    del model, cache
    simulated = vitq.simulate(source(), recipe).to(device)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    logits = simulated(found[:, :-1], attention_mask=mask[:, :-1], position_ids=places[:, :-1], use_cache=False, logits_to_keep=new).logits[0].float()
    top = logits.topk(2).values
    same, near = logits.argmax(-1) == found[0, tokens:], top[:, 0] - top[:, 1] < 0.1 * logits.std()
    assert (same | near).all() and same.float().mean() > 0.7, (same, near)


def test_copies_and_hooks() -> None:
    """A copied model attends with its own constants; a hook on the entry sees every token."""
    model, x = converted("Llama", *INT4), ids(1, 12)
    wanted = generated(model, x, past_key_values=vitq.quantized_cache(model, max_length=24))
    again, seen = copy.deepcopy(model), []
    next(m for m in again.modules() if isinstance(m, QuantKeyValues)).register_forward_hook(lambda module, args, output: seen.append(args[1].shape[2]))
    assert torch.equal(generated(again, x, past_key_values=vitq.quantized_cache(again, max_length=24)), wanted)
    assert seen == [12] + [1] * 7


def test_a_loaded_model_may_have_graphs(tmp_path) -> None:
    """transformers asks its quantizer, and then the model, of what a step is to be made."""
    import vitq.hf  # noqa: F401

    vitq.save(converted("Llama", *INT4), tmp_path / "c")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert model.hf_quantizer.is_compileable
    step = model.get_compiled_call(None)
    x, cache = ids(1, 12), vitq.quantized_cache(model, max_length=16)
    assert torch.equal(step(input_ids=x, **{CACHE: cache}).logits, model(x, use_cache=False).logits) and not cache.__dict__.get("_step_graphs")


def test_streaming() -> None:
    from transformers import TextStreamer

    words: list[str] = []
    tokenizer = types.SimpleNamespace(decode=lambda tokens, **options: " ".join(map(str, tokens)) + " ")
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    streamer.on_finalized_text = lambda text, stream_end=False: words.extend(text.split())
    model, x = converted("Llama", *INT8), ids(1, 6)
    tokens = generated(model, x, past_key_values=vitq.quantized_cache(model, max_length=16), streamer=streamer)
    assert [int(w) for w in words] == tokens[0].tolist()


class StandIn:
    """Of a CUDA graph: a capture that leaves nothing behind, and replays that run what was captured on the same tensors."""

    made: list[StandIn]
    layers: list

    def __init__(self, fn, static, pool=None, warmup=3):
        self.fn = self.run = fn
        self.static, self.replays = static, 0
        self.output = fn(static)
        for layer in self.layers:
            layer.state[0] -= static.shape[1]
        self.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        before = [layer.seen for layer in self.layers]
        self.output[2].copy_(self.run(self.static)[2])
        for layer, seen in zip(self.layers, before):  # a graph does not tell the host
            layer.seen = seen


@pytest.mark.parametrize("family, kwargs", [("Llama", {}), ("Mistral", {"sliding_window": 8}), ("OPT", {})])
def test_steps_as_graphs(family: str, kwargs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` as on a GPU: the first step as ever, the second captured, all others replayed; another batch size or model has its own."""
    model, x = converted(family, *INT4, **kwargs), ids(2, 12)
    padded, mask = x.clone(), torch.ones_like(x)
    padded[1, :5], mask[1, :5] = 0, 0
    wanted = [generated(model, given, of) for given, of in ((x, None), (padded, mask))]
    cache = vitq.quantized_cache(model, max_length=32, batch_size=2)
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *args: True)
    monkeypatch.setattr(vitq.graphs, "Graph", StandIn)
    StandIn.made, StandIn.layers = [], cache.layers
    for (given, of), tokens in zip(((x, None), (padded, mask), (x, None)), (*wanted, wanted[0])):
        cache.reset()
        assert torch.equal(generated(model, given, of, past_key_values=cache), tokens)
        assert cache.get_seq_length() == 19 == cache.layers[0].seen
    assert [graph.replays for graph in StandIn.made] == [3 * 7 - 1]


def test_transformed_keys(attended: list[int]) -> None:
    """Queries and keys in other bases, clipped ranges."""
    recipe = quick("w8a8-dynamic", "bits=16", *INT4, "qk.other.transform=hadamard", "qk.other.clip_ratio=0.9")
    model, x = vitq.convert(build("Llama"), recipe, dtype=torch.float32), ids(2, 24)
    cache = vitq.quantized_cache(model, max_length=32, batch_size=2)
    assert sqnr(model(x).logits, step_by_step(model, x, cache, 12, 13, 16)) > SPLIT and attended == [12, 12, 1, 1, 3, 3, 8, 8]


def test_what_a_graph_writes_is_counted_and_copies_have_no_graphs() -> None:
    model = converted("Llama", *INT4)
    cache = vitq.quantized_cache(model, max_length=16, batch_size=2)
    model(ids(2, 9), **{CACHE: cache})
    cache._step_graphs = vitq.graphs._StepGraphs({"key": (lambda: None, {})})
    copied = copy.deepcopy(cache)
    assert copied._step_graphs == {} and copied.layers[0].seen == 9 and torch.equal(copied.layers[1].keys, cache.layers[1].keys)
    cache.layers[0].count(7)
    with pytest.raises(ValueError, match="room for 16 tokens, holds 16, and 1 came"):
        cache.layers[0].count(1)
    for wrong in ({"max_length": "8"}, {"max_length": 4.5}, {"max_length": 8, "batch_size": True}):
        with pytest.raises(TypeError, match="give integers"):
            vitq.quantized_cache(model, **wrong)
