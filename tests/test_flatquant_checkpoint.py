"""Folders that FlatQuant's code quantized and saved: what runs are their numbers, every tensor is used, and what is wrong with one is said."""

from __future__ import annotations

import json
import weakref

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from flatquant_files import LINEARS, TRANS, input_of, matrices, rounded, saved_tensors, weight_of  # noqa: E402
from helpers import sqnr  # noqa: E402
from huggingface_hub import split_torch_state_dict_into_shards  # noqa: E402
from language_models import build, ids  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import vitq  # noqa: E402
from vitq import flatquant_checkpoint  # noqa: E402
from vitq.models.language import source_names  # noqa: E402

SIZES = dict(hidden_size=96, num_attention_heads=6, intermediate_size=160, num_key_value_heads=3)
SITES = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
OWN = {"w_bits": 4, "model_name": "./modelzoo/tiny", "symmetric": True, "format": "packed_int4"}


def half(family: str = "Llama", **kwargs) -> torch.nn.Module:
    """A model in numbers that float16 holds."""
    model = build(family, **{**SIZES, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return model


def write(folder, model: torch.nn.Module, tensors: dict[str, torch.Tensor], *, shards: str | None = None, config: bool = True, **said) -> None:
    folder.mkdir(exist_ok=True)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shards or "5GB", filename_pattern="model{suffix}.safetensors")
    for name, names in split.filename_to_tensors.items():
        save_file({key: tensors[key] for key in names}, folder / name)
    if split.is_sharded:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": split.tensor_to_filename}))
    (folder / "quantization_config.json").write_text(json.dumps({**OWN, "sharded": split.is_sharded, **said}))
    if config:  # as the published folders have it
        fields = {**json.loads(model.config.to_json_string(use_diff=False)), "architectures": [f"FlatQuant{type(model).__name__}"],
                  "auto_map": {"AutoModelForCausalLM": "modeling.FlatQuantLlamaForCausalLM"}, "quantization_config": {"trans": "matmul"}}
        (folder / "config.json").write_text(json.dumps({**fields, "model_type": f"{fields['model_type']}_FlatQuant"}))  # as its own loader calls it


def folded(block: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is left to do of a block's transforms where scales and values are in what comes before; in the float16 of the folder."""
    left = {name: t.half().float() for name, t in block.items() if not name.endswith("diag_scale")}
    return {**left, "self_attn.vcache_trans.matrix": torch.eye(len(left["self_attn.vcache_trans.matrix"]))}


@torch.no_grad()
def its_own(file: dict[int, dict], tensors: dict[str, torch.Tensor], x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logits of transformers' model with keys and values in float: weights as the folder's codes have them, inputs of so many bits by its formulas."""
    model = build("Llama", **SIZES)
    model.load_state_dict({name: t for name, t in tensors.items() if name in model.state_dict()}, strict=False)
    for i, block in file.items():
        for name in LINEARS:
            linear = model.get_submodule(f"model.layers.{i}.{name}")
            codes, scale = rounded(weight_of(half(), block, i, name))
            linear.weight.copy_(codes * scale)
            linear.register_forward_pre_hook(lambda module, args, block=folded(block), name=name: (input_of(block, name, args[0], bits).float(),))
    return model(x).logits


@torch.no_grad()
def test_layers_are_the_numbers_of_the_folder(tmp_path) -> None:
    model, x = half(), torch.randn(20, 160, generator=torch.Generator().manual_seed(0)).half().float()
    file = matrices(model, tied=True)
    write(tmp_path / "model", model, saved_tensors(model, file))
    executed = vitq.import_flatquant_checkpoint(tmp_path / "model", dtype=torch.float32)
    assert executed.vitq.source["name"] == "./modelzoo/tiny" and executed.vitq.recipe.name == "flatquant-w4a4kv4"
    for i, block in file.items():
        for layer in SITES:
            module, sources = executed.get_submodule(f"model.layers.{i}.{layer}"), source_names(layer)
            weights = [rounded(weight_of(model, block, i, source)) for source in sources]
            codes, scales = (torch.cat(parts) for parts in zip(*weights))
            assert torch.equal(module.codes(), codes.to(torch.int8)) and torch.equal(module.weight_scale, scales[:, 0])
            assert (module.weight_bits, module.input_bits) == (4, 4)
            rows = x[:, : module.in_features]
            exact = torch.cat([input_of(folded(block), source, rows) @ (q * s).T for source, (q, s) in zip(sources, weights)], 1)
            assert sqnr(exact, module(rows)) > 30, layer  # a code that turns over in float16 weighs 20 dB less than the whole
        cache = executed.model.layers[i].self_attn.kv
        assert torch.equal(cache.keys_0_right, block["self_attn.kcache_trans.matrix"].half())
        for name, clip in (("k", cache.keys_0_clip), ("v", cache.values_0_clip)):
            logits = [block[f"self_attn.{name}_cache_quantizer.clip_factor_a_{end}"].half().float() for end in ("min", "max")]
            assert torch.equal(clip, torch.cat(logits).sigmoid())
        for name in ("input_layernorm", "post_attention_layernorm"):
            scale = block[f"{'self_attn.ln_trans' if name[0] == 'i' else 'mlp.up_gate_trans'}.diag_scale"].double()
            wanted = (model.get_submodule(f"model.layers.{i}.{name}").weight.double() * scale).half().float()
            assert torch.equal(executed.get_submodule(f"model.layers.{i}.{name}").weight, wanted)


EIGHT = {"a_bits": 8, "k_bits": 8, "v_bits": 8}  # where a code that turns over is not what decides about logits


@torch.no_grad()
def test_the_whole_is_transformers_model_with_its_formulas(tmp_path) -> None:
    model, x = half(), ids(4, 24, seed=50)
    file = matrices(model, tied=True)
    tensors = saved_tensors(model, file)
    exact, fine = (its_own(file, tensors, x, bits) for bits in (8, 24))
    floor = sqnr(fine, exact)  # what rounding inputs to 8 bits costs: codes that turn over in float16 cost as much
    for name, bits, least in (("kv16", {"k_bits": 16, "v_bits": 16}, floor - 2), ("kv8", {}, floor - 4)):
        write(tmp_path / name, model, tensors, **{**EIGHT, **bits}, real_runtime="flatquant")
        executed = vitq.import_flatquant_checkpoint(tmp_path / name, dtype=torch.float32)
        assert sqnr(exact, executed(x).logits) > least, name
    assert sqnr(model(x).logits, exact) < floor - 15, "which is not the float model"


@pytest.mark.parametrize("family, kwargs, options", [
    ("Qwen2", {}, {}), ("Llama", {"attention_bias": True, "mlp_bias": True}, {"diag": False}), ("Llama", {"tie_word_embeddings": True}, {"clips": False}),
    ("Llama", {}, {"keys": False}), ("Llama", {"num_key_value_heads": 6}, {"bits": 3})])
@torch.no_grad()
def test_models_and_options(family: str, kwargs: dict, options: dict, tmp_path) -> None:
    model, x, bits = half(family, **kwargs), ids(4, 24, seed=50), options.pop("bits", 4)
    file = matrices(model, tied=True, **options)
    keys = options.get("keys", True)
    write(tmp_path / "model", model, saved_tensors(model, file, bits), shards="60KB", w_bits=bits, **(EIGHT if keys else {"a_bits": 8}))
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 2
    executed = vitq.import_flatquant_checkpoint(tmp_path / "model", dtype=torch.float32)
    learned = vitq.import_flatquant(file, model)
    recipe = vitq.Recipe.from_yaml("flatquant-w4a4kv4" if keys else "flatquant-w4a4").with_overrides(
        [*(f"{role}.{operand}.bits={n}" for role in ("qkv", "proj", "fc1", "fc2") for operand, n in (("weight", bits), ("input", 8))),
         *(f"{role}.other.bits={8 if keys else 16}" for role in ("qk", "pv"))])
    simulated = vitq.simulate(model, recipe, learned=learned)(x).logits  # quantized here, of the same matrices
    assert sqnr(simulated, executed(x).logits) > 25
    assert sqnr(model(x).logits, simulated) < 20
    again = vitq.load(vitq.save(executed, tmp_path / "saved"))
    assert torch.equal(again(x).logits, executed(x).logits)
    tokens = again.generate(x[:1, :5], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 9)
    assert (executed.lm_head.weight is executed.model.embed_tokens.weight) == bool(kwargs.get("tie_word_embeddings"))


def test_published_folders_have_no_file_of_their_own_for_the_format(tmp_path) -> None:
    model, x = half(), ids(1, 10)
    tensors = saved_tensors(model, matrices(model, tied=True))
    write(tmp_path, model, tensors)
    wanted = vitq.import_flatquant_checkpoint(tmp_path)
    (tmp_path / "quantization_config.json").unlink()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"quantization_config": json.dumps(OWN)})
    from_metadata = vitq.import_flatquant_checkpoint(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    kinds = {"w_bits": 4, "a_bits": 4, "kv_bits": 4, "w_is_symmetric": True, "a_is_symmetric": True, "kv_is_symmetric": False, "fuseLN": False}

    def published(**changes) -> torch.nn.Module:
        said = {"quant_method": "flatquant", **kinds, "trans": "matmul", **changes}
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama", "quantization_config": said}))
        return vitq.import_flatquant_checkpoint(tmp_path)

    with torch.no_grad():
        assert all(torch.equal(model(x).logits, wanted(x).logits) for model in (from_metadata, published()))
        assert not torch.equal(published(kv_is_symmetric=True)(x).logits, wanted(x).logits)
    cached = published(kv_bits=8, kv_is_symmetric=True, a_bits=6).vitq.recipe
    assert (cached.resolve("qk").other.bits, cached.resolve("pv").other.symmetric, cached.resolve("fc2").input.bits) == (8, True, 6)
    with pytest.raises(vitq.CheckpointError, match="a_is_symmetric is False; vitq reads True"):
        published(a_is_symmetric=False)
    with pytest.raises(vitq.CheckpointError, match="symmetric is False; vitq reads True"):
        published(w_is_symmetric=False)


def test_the_config_may_lie_elsewhere(tmp_path) -> None:
    model, x = half(), ids(1, 10)
    write(tmp_path / "model", model, saved_tensors(model, matrices(model)), config=False)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "float")
    with pytest.raises(FileNotFoundError, match="config.json: no such file; give the float model's config"):
        vitq.import_flatquant_checkpoint(tmp_path / "model")
    both = [vitq.import_flatquant_checkpoint(tmp_path / "model", config=config) for config in (model.config, tmp_path / "float")]
    with torch.no_grad():
        assert torch.equal(both[0](x).logits, both[1](x).logits)


def test_what_is_wrong_with_a_folder(tmp_path) -> None:
    model = half()
    tensors, q = saved_tensors(model, matrices(model, tied=True)), "model.layers.1.self_attn.q_proj.linear"

    def refuses(match: str, changed: dict | None = None, **said) -> None:
        kept = {name: t for name, t in {**tensors, **(changed or {})}.items() if t is not None}
        write(tmp_path / "model", model, kept, **said)
        with pytest.raises(vitq.CheckpointError, match=match):
            vitq.import_flatquant_checkpoint(tmp_path / "model")

    refuses(f"'{q}.weight' is missing", {f"{q}.weight": None})
    refuses(f"'quantizer.{q}.scale' is missing", {f"quantizer.{q}.scale": None})
    refuses("'model.norm.weight' is missing", {"model.norm.weight": None})
    refuses("'lm_head.weight' is missing", {"lm_head.weight": None})
    refuses("model.layers.0: 'mlp.down_trans.matrix_left' is missing", {"model.layers.0.mlp.down_trans.matrix_left": None})
    refuses("'self_attn.kcache_trans.matrix_inv_t' is missing", {"model.layers.1.self_attn.kcache_trans.matrix_inv_t": None})
    refuses("nothing is there of 'model.layers.1.self_attn.qk'",
            {f"model.layers.1.self_attn.kcache_trans.{key}": None for key in ("matrix", "matrix_inv_t")}
            | {f"model.layers.1.self_attn.k_cache_quantizer.clip_factor_a_{end}": None for end in ("max", "min")})
    refuses(f"{q}.other are not known", {f"{q}.other": torch.ones(1)})
    refuses("mlp.odd_trans.matrix are not known", {"model.layers.0.mlp.odd_trans.matrix": torch.eye(2)})
    refuses("model.layers.2.mlp.up_proj.linear.weight are not known", {"model.layers.2.mlp.up_proj.linear.weight": torch.ones(2)})
    refuses(r"\[96, 47\] uint8; the model needs \[96, 48\] uint8", {f"{q}.weight": tensors[f"{q}.weight"][:, 1:].contiguous()})
    refuses(r"\[96, 48\] int8; the model needs \[96, 48\] uint8", {f"{q}.weight": tensors[f"{q}.weight"].view(torch.int8)})
    refuses("holds scales that are not above 0", {f"quantizer.{q}.scale": -tensors[f"quantizer.{q}.scale"]})
    refuses("zero points up to 8", {f"quantizer.{q}.zero": torch.full((96, 1), 8.0)})
    refuses("the largest code 15; symmetric weights of 4 bits have 0 and 7", {f"quantizer.{q}.maxq": torch.tensor(15)})
    refuses("holds NaN or infinite values", {"model.norm.weight": tensors["model.norm.weight"] * float("nan")})
    refuses("the largest code 7; symmetric weights of 3 bits have 0 and 3", w_bits=3)
    refuses("has codes -7 to 7, 3 bits hold -4 to 3",
            {name: torch.tensor(3) for name in tensors if name.endswith("maxq")}, w_bits=3)
    for key, value in (("w_bits", 8), ("symmetric", False), ("format", "gptq"), ("q_bits", 4), ("trans", "had"), ("fuseLN", True)):
        refuses(f"{key} is {value!r}; vitq reads", **{key: value})
    refuses("is incomplete: quantization_config.json has sharded: true, and model.safetensors.index.json is missing", sharded=True)
    (tmp_path / "model" / "quantization_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="quantization_config.json is missing, and neither config.json nor the tensors say that it is one"):
        vitq.import_flatquant_checkpoint(tmp_path / "model")


def test_files_that_are_cut_short_or_missing(tmp_path, caplog) -> None:
    model = half()
    write(tmp_path, model, saved_tensors(model, matrices(model)), shards="100KB")
    second = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(vitq.CheckpointError, match=f"{second.name} is damaged or cut short"):
        vitq.import_flatquant_checkpoint(tmp_path)
    second.unlink()
    with pytest.raises(vitq.CheckpointError, match=f"{second.name} is missing"):
        vitq.import_flatquant_checkpoint(tmp_path)
    second.write_bytes(whole)
    assert "here they share the mean" not in caplog.text
    vitq.import_flatquant_checkpoint(tmp_path)
    assert "clip it in ways that differ by up to 0.0" in caplog.text and "here they share the mean" in caplog.text
    other = build("Llama", **{**SIZES, "hidden_size": 72})
    with pytest.raises(vitq.CheckpointError, match=r"clip_factor_w_min' is \[96, 1\], the model needs \[72, 1\]"):
        vitq.import_flatquant_checkpoint(tmp_path, config=_named(other))
    for family in ("OPT", "Falcon"):  # which has nothing by the name of `model`
        with pytest.raises(vitq.CheckpointError, match=f"FlatQuant's models are Llama, Mistral, Qwen2 or Qwen3; a {family}ForCausalLM is none"):
            vitq.import_flatquant_checkpoint(tmp_path, config=_named(build(family)))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2))
    with pytest.raises(vitq.CheckpointError, match="vitq has no adapter for .*GPT2LMHeadModel"):
        vitq.import_flatquant_checkpoint(tmp_path, config=_named(gpt2))


def test_load_says_what_reads_such_a_folder(tmp_path) -> None:
    model = half()
    write(tmp_path, model, saved_tensors(model, matrices(model)))
    said = "FlatQuant quantized: vitq.import_flatquant_checkpoint\\(folder\\) reads it"
    with pytest.raises(vitq.CheckpointError, match=f"config.json is the config of a model that {said}"):
        vitq.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"no vitq checkpoint in .*quantization_config.json is there, of a model that {said}"):
        vitq.load(tmp_path)
    (tmp_path / "quantization_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="of a language model$"):
        vitq.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "flatquant"}}))  # as published
    with pytest.raises(vitq.CheckpointError, match=said):
        vitq.load(tmp_path)


def test_codes_of_one_layer_at_a_time(tmp_path, monkeypatch) -> None:
    """Packed as they are stored until the layer's turn: at most what is being put in a module and what comes next are there as int8."""
    model = half(num_hidden_layers=6)
    write(tmp_path, model, saved_tensors(model, matrices(model)))
    there, most, unpack = weakref.WeakSet(), [], flatquant_checkpoint.unpack_int4

    def counted(packed: torch.Tensor, features: int) -> torch.Tensor:
        codes = unpack(packed, features)
        there.add(codes)
        most.append(len(there))
        return codes

    monkeypatch.setattr(flatquant_checkpoint, "unpack_int4", counted)
    vitq.import_flatquant_checkpoint(tmp_path)
    assert len(most) == 6 * len(LINEARS) and max(most) <= 2 * 3  # q, k and v


def _named(model: torch.nn.Module):
    model.config.architectures = [type(model).__name__]
    return model.config


def test_what_direct_inverses_leave_is_of_no_use(tmp_path) -> None:
    model, x = half(), ids(1, 10)
    tensors = saved_tensors(model, matrices(model))
    write(tmp_path / "svd", model, tensors)
    raw = {}
    for i in range(2):
        for trans, n in (("o", 6), ("kcache", 16), ("vcache", 16)):
            name = f"model.layers.{i}.self_attn.{trans}_trans.linear"
            raw |= {f"{name}.weight": torch.zeros(n, n // 2, dtype=torch.uint8), f"quantizer.{name}.scale": torch.ones(n, 1),
                    f"quantizer.{name}.zero": torch.zeros(n, 1), f"quantizer.{name}.maxq": torch.tensor(7)}
    write(tmp_path / "direct", model, {**tensors, **raw})
    assert set(TRANS) < set(LINEARS)
    with torch.no_grad():
        assert torch.equal(*(vitq.import_flatquant_checkpoint(tmp_path / name)(x).logits for name in ("svd", "direct")))
