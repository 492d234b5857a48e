"""vitq.save and vitq.load of language models: what tests/test_checkpoint.py holds of timm's, and tied weights, configs, transformers missing."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import safetensors.torch
import torch

transformers = pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
from language_models import CASES, build, ids, quick  # noqa: E402

import vitq  # noqa: E402
from vitq import checkpoint_files  # noqa: E402


def converted(name: str = "w8a8-dynamic", dtype: torch.dtype = torch.float32, family: str = "Llama", **kwargs):
    recipe = quick(name)
    return vitq.convert(build(family, **kwargs), recipe, [ids(4, 40, seed=2)] if recipe.is_static else None, dtype=dtype)


@pytest.fixture(scope="module")
def model():
    return converted("w4a8", tie_word_embeddings=True)


@pytest.fixture
def saved(model, tmp_path):
    return vitq.save(model, tmp_path / "ckpt")


@pytest.mark.parametrize("family, kwargs", CASES)
@pytest.mark.parametrize("name, dtype", [("w8a8-dynamic", torch.bfloat16), ("w8a8", torch.float32), ("w4a8", torch.float32)])
def test_reloads_bit_identically(family: str, kwargs: dict, name: str, dtype: torch.dtype, tmp_path) -> None:
    model = converted(name, dtype, family, **kwargs)
    loaded = vitq.load(vitq.save(model, tmp_path / "c"))
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    tokens = [m.generate(ids(2, 6), attention_mask=torch.ones(2, 6), max_new_tokens=6, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*tokens)
    assert type(loaded) is type(model) and loaded.vitq.recipe == model.vitq.recipe and loaded.vitq.calibration == model.vitq.calibration
    assert loaded.config.to_dict() == model.config.to_dict() | {"dtype": "float32", "architectures": [type(model).__bases__[-1].__name__]}
    assert [(r.layer, r.kernel, r.bytes, r.note) for r in vitq.explain(loaded)] == [(r.layer, r.kernel, r.bytes, r.note) for r in vitq.explain(model)]


def test_solvers_and_rotary_positions_that_no_config_tells(tmp_path) -> None:
    """GPTQ's codes; frequencies that another device computed to other last bits."""
    source = build()
    source.model.rotary_emb.inv_freq.mul_(1 + 1e-6)
    model = vitq.convert(source, quick("w4a8", "solver=gptq"), [ids(4, 40, seed=2)], dtype=torch.bfloat16)
    loaded = vitq.load(vitq.save(model, tmp_path / "c"))
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, source.model.rotary_emb.inv_freq) and loaded.model.rotary_emb.inv_freq.dtype == torch.float32


def test_tied_weights_are_stored_once_and_stay_tied(model, saved) -> None:
    names = safetensors.torch.load_file(saved / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    loaded = vitq.load(saved)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.to("cpu").lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(vitq.load(vitq.save(loaded, saved))(ids()).logits, model(ids()).logits), "what was loaded can be saved"


def test_generation_config_source_and_attention_are_recorded(tmp_path) -> None:
    model = converted()
    model.generation_config.update(temperature=0.3, do_sample=True, eos_token_id=[2, 3])
    model.set_attn_implementation("eager")
    saved = vitq.save(model, tmp_path / "c", source={"name": "someone/a-llama"})
    loaded = vitq.load(saved)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert loaded.config._attn_implementation == "eager" and loaded.vitq.source == {"name": "someone/a-llama"}
    config = json.loads((saved / "config.json").read_text())
    header = config["quantization_config"]
    assert (header["quant_method"], header["schema"], header["library"]) == ("vitq", checkpoint_files.SCHEMA, "transformers")
    assert header["recipe"]["name"] == "w8a8-dynamic" and header["attention"] == "eager" and header["transformers_version"] == transformers.__version__
    assert (config["architectures"], config["hidden_size"], config["dtype"]) == (["LlamaForCausalLM"], 64, "float32")
    assert json.loads((saved / "generation_config.json").read_text())["temperature"] == 0.3


def test_loading_initialises_no_weights(saved, monkeypatch) -> None:
    """Neither time nor random numbers go into weights that the file replaces."""
    drawn = []
    for name in ("normal_", "uniform_"):
        draw = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, _draw=draw, **k: drawn.append(self.device.type) or _draw(self, *a, **k))
    before = torch.get_rng_state()
    loaded = vitq.load(saved)
    assert torch.equal(torch.get_rng_state(), before) and set(drawn) <= {"meta"}
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}


def test_other_dtype(saved, model) -> None:
    loaded = vitq.load(saved, dtype=torch.bfloat16)
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16 and loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.allclose(loaded(ids()).logits.float(), model(ids()).logits, atol=0.15)


@pytest.mark.gpu
def test_between_cpu_and_cuda(model, saved, tmp_path) -> None:
    there = vitq.load(saved, device="cuda", dtype=torch.float32)
    assert torch.allclose(there(ids().cuda()).logits.cpu(), model(ids()).logits, atol=0.05)
    assert there.lm_head.weight is there.model.embed_tokens.weight
    back = vitq.save(there, tmp_path / "back")
    assert torch.equal(vitq.load(back, device="cuda")(ids().cuda()).logits, there(ids().cuda()).logits)
    assert torch.equal(vitq.load(back, dtype=torch.float32)(ids()).logits, model(ids()).logits)


# Damage ---------------------------------------------------------------------------------------------------------------


def _rewrite(saved, signed: bool, config: dict | None = None, **header) -> None:
    """Change a config and the header in it, and sign them again, so that the checks behind the hash are reached, or not."""
    path = saved / "config.json"
    found = {**json.loads(path.read_text()), **(config or {})}
    found["quantization_config"].update(header)
    path.write_text(json.dumps(found))
    if signed:
        found["quantization_config"]["sha256"] = checkpoint_files.digest({**checkpoint_files.read_header(saved)}, checkpoint_files.read_tensors(saved))
        path.write_text(json.dumps(found))


def test_damaged_files(saved) -> None:
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(vitq.CheckpointError, match="damaged or cut short"):
        vitq.load(saved)
    flipped = bytearray(whole)
    flipped[int(len(whole) * 0.9)] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(vitq.CheckpointError, match="SHA-256"):
        vitq.load(saved)
    path.write_bytes(whole)
    tensors = safetensors.torch.load_file(path)
    tensors.pop("model.layers.0.mlp.down_proj.qweight")
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(vitq.CheckpointError, match="missing tensors model.layers.0.mlp.down_proj.qweight"):
        vitq.load(saved)


def test_changed_headers(saved) -> None:
    text = (saved / "config.json").read_text()
    for changes in ({"config": {"rms_norm_eps": 0.1}}, {"config": {"eos_token_id": 3}}, {"notes": {"model": "better"}}):
        (saved / "config.json").write_text(text)
        _rewrite(saved, False, **changes)
        with pytest.raises(vitq.CheckpointError, match="SHA-256"):
            vitq.load(saved)
    recipe = vitq.Recipe.from_yaml("w8a8-dynamic").to_dict()
    for changes, message in [({"config": {"hidden_size": 128}}, "tensor .* .LlamaForCausalLM. needs"),
                             ({"config": {"num_hidden_layers": 3}}, "missing tensors model.layers.2"),
                             ({"config": {"hidden_size": "wide"}}, "transformers .* cannot build the LlamaForCausalLM"),
                             ({"config": {"model_type": "no-such-type"}}, "cannot build the LlamaForCausalLM"),
                             ({"config": {"model_type": "gpt2"}}, "builds a GPT2LMHeadModel of the config, not a LlamaForCausalLM"),
                             ({"config": {"architectures": None}}, "lacks architecture"), ({"config": {"dtype": "int8"}}, "dtype must be one of"),
                             ({"recipe": recipe}, "does not fit|needs"), ({"recipe": {"name": "x", "bits": 3}}, "recipe is damaged"),
                             ({"library": "keras"}, "names the library 'keras'; models are of timm or transformers")]:
        (saved / "config.json").write_text(text)
        _rewrite(saved, True, **changes)
        with pytest.raises(vitq.CheckpointError, match=message):
            vitq.load(saved)
    for broken, message in [(text[:-20], "config.json is damaged"), ("[]", "config.json is damaged: it holds a list"),
                            ('{"model_type": "llama"}', "a model that vitq did not quantize"),
                            ('{"quantization_config": {"quant_method": "gptq"}}', "a model that vitq did not quantize"),
                            ('{"quantization_config": {"quant_method": "vitq"}}', "no schema number"),
                            (text.replace('"schema": 3', '"schema": 99'), "schema 99.*upgrade")]:
        (saved / "config.json").write_text(broken)
        with pytest.raises(vitq.CheckpointError, match=message):
            vitq.load(saved)


def test_how_to_sample_may_be_edited(model, saved) -> None:
    (saved / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.5}')
    assert vitq.load(saved).generation_config.temperature == 0.5
    (saved / "generation_config.json").unlink()
    assert torch.equal(vitq.load(saved)(ids()).logits, model(ids()).logits)
    (saved / "generation_config.json").write_text("{")
    with pytest.raises(vitq.CheckpointError, match="generation_config.json is damaged"):
        vitq.load(saved)


def test_the_second_schema_still_loads(model, saved) -> None:
    """It had all of the header in vitq.json, the generation config signed with it."""
    header = {**checkpoint_files.read_header(saved), "schema": 2}
    tensors = checkpoint_files.read_tensors(saved)
    for name in ("config.json", "generation_config.json"):
        (saved / name).unlink()
    header["sha256"] = checkpoint_files.digest(header, tensors)
    (saved / "vitq.json").write_text(json.dumps(header))
    assert torch.equal(vitq.load(saved)(ids()).logits, model(ids()).logits)
    (saved / "vitq.json").write_text(json.dumps({**header, "generation_config": {"temperature": 0.5}}))
    with pytest.raises(vitq.CheckpointError, match="SHA-256"):
        vitq.load(saved)
    vitq.save(model, saved)
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"], "the old header is gone"
    assert torch.equal(vitq.load(saved)(ids()).logits, model(ids()).logits)


def test_without_transformers(saved, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"LlamaForCausalLM of the package transformers, which is not installed: pip install 'vitq\[llm\]'"):
        vitq.load(saved)


# Writing --------------------------------------------------------------------------------------------------------------


def test_an_interrupted_save_keeps_the_old_checkpoint(model, saved, monkeypatch) -> None:
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        vitq.save(converted(), saved)
    assert [p.name for p in saved.parent.iterdir()] == ["ckpt"] and torch.equal(vitq.load(saved)(ids()).logits, model(ids()).logits)


def test_buffers_that_no_checkpoint_would_hold_are_named(tmp_path, monkeypatch) -> None:
    """Rotary frequencies of an adapter that does not keep them exact."""
    from vitq.models import decoder

    fill = decoder.fill

    def careless(prepared) -> None:
        fill(prepared)
        prepared.exact.clear()

    monkeypatch.setattr(decoder, "fill", careless)
    with pytest.raises(vitq.CheckpointError, match="model.rotary_emb.inv_freq, .* would have no values"):
        vitq.save(converted(), tmp_path / "c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["eps", "activation", "config"])
def test_a_model_that_its_config_would_not_give_back_is_not_written(change: str, tmp_path) -> None:
    source = build()
    if change == "eps":
        source.model.norm.variance_epsilon = 0.1
    elif change == "activation":
        source.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    model = vitq.convert(source, quick("w8a8-dynamic"), dtype=torch.float32)
    if change == "config":
        model.config = copy.deepcopy(model.config)
        model.config.num_key_value_heads = 4
    with pytest.raises(vitq.CheckpointError, match="builds another model of this LlamaForCausalLM's config"):
        vitq.save(model, tmp_path / "c")
    assert not list(tmp_path.iterdir())
