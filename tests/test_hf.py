"""transformers opens what vitq quantized, strictly; and the hub, which is played."""

from __future__ import annotations

import copy
import json
import shutil
import time
import types
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
import yaml
from helpers import build as build_vit
from helpers import convert as convert_vit
from helpers import images
from helpers import quick as quick_vit

import vitq
from vitq import publish
from vitq.models import hub

transformers = pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
from language_models import CASES, build, ids, quick  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import vitq.hf  # noqa: E402


def converted(name: str = "w8a8-dynamic", *changes: str, dtype: torch.dtype = torch.float32, family: str = "Llama", **kwargs):
    recipe = quick(name, *changes)
    return vitq.convert(build(family, **kwargs), recipe, [ids(4, 40, seed=2)] if recipe.needs_data else None, dtype=dtype)


@pytest.fixture(scope="module")
def model():
    return converted("w4a8", dtype=torch.bfloat16, tie_word_embeddings=True)


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "ckpt", max_shard_size="30KB")
    return tmp_path / "ckpt"


def same(a, b) -> None:
    """Bits of everything, and the tokens."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys() and {k: t.dtype for k, t in ours.items()} == {k: t.dtype for k, t in theirs.items()}
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(a(ids()).logits, b(ids()).logits)
    tokens = [m.generate(ids(2, 6), attention_mask=torch.ones(2, 6), max_new_tokens=8, do_sample=False) for m in (a, b)]
    assert torch.equal(*tokens) and tokens[0].shape == (2, 14)


# Round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, kwargs", CASES)
def test_every_family_generates_the_same_tokens(family: str, kwargs: dict, tmp_path) -> None:
    model = converted(dtype=torch.bfloat16, family=family, **kwargs)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    same(model, loaded)
    same(model, vitq.load(tmp_path))
    assert type(loaded) is type(model) and loaded.config._attn_implementation == model.config._attn_implementation and not loaded.training


@pytest.mark.parametrize("name, changes", [
    ("w8a8", ()), ("w4a8", ()), ("gptq-w4a16", ("weight.group_size=32",)), ("dgq-w4a8", ("weight.group_size=32",)),
    ("quik-w4a4", ("input.outliers=16", "input.outlier_limit=0.5")), ("w8a8-dynamic", ("kv.bits=4", "kv.symmetric=false")), ("phq-mixed", ())])
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_every_kind_of_recipe(name: str, changes: tuple, shard: str, tmp_path) -> None:
    model = converted(name, *changes)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    same(model, loaded)
    assert loaded.vitq.recipe == model.vitq.recipe and loaded.vitq.calibration == model.vitq.calibration
    assert [(r.layer, r.format, r.kernel, r.bytes, r.note) for r in vitq.explain(loaded)] == \
        [(r.layer, r.format, r.kernel, r.bytes, r.note) for r in vitq.explain(model)]
    if changes and changes[0].startswith("kv"):
        assert vitq.quantized_cache(loaded) is not None


def test_one_folder_for_both(model, saved, tmp_path) -> None:
    """vitq.save writes what save_pretrained writes; what either loads can be saved again, to the same bytes."""
    vitq.save(model, tmp_path / "other", max_shard_size="30KB")
    files = {p.name: p.read_bytes() for p in saved.iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "other").iterdir()} == files and "model.safetensors.index.json" in files
    for loaded in (AutoModelForCausalLM.from_pretrained(saved), vitq.load(saved)):
        loaded.save_pretrained(saved, max_shard_size="30KB")
        assert {p.name: p.read_bytes() for p in saved.iterdir()} == files


def test_what_is_tied_is_stored_once_and_stays_tied(model, saved) -> None:
    names = [name for file in saved.glob("*.safetensors") for name in safetensors.torch.load_file(file)]
    assert names.count("model.embed_tokens.weight") == 1 and "lm_head.weight" not in names
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_rotary_frequencies_that_no_config_tells(tmp_path) -> None:
    source = build()
    source.model.rotary_emb.inv_freq.mul_(1 + 1e-6)
    model = vitq.convert(source, quick("w8a8-dynamic"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    same(model, loaded)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32 and torch.equal(loaded.model.rotary_emb.inv_freq, source.model.rotary_emb.inv_freq)


def test_generation_config_and_tokenizer_beside_it(tmp_path) -> None:
    from tokenizers import Tokenizer, models

    model = converted()
    model.generation_config.update(temperature=0.3, do_sample=True, eos_token_id=[2, 3])
    words = Tokenizer(models.WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path)
    for _ in range(2):  # again, over it
        model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.to_dict() == model.generation_config.to_dict()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("word")["input_ids"] == [1]


def test_arguments_that_say_how_a_model_is_used(model, saved) -> None:
    copied = copy.deepcopy(AutoModelForCausalLM.from_pretrained(saved)).to("cpu")
    same(copied, model)
    with pytest.raises(ValueError, match="already quantized"):
        vitq.convert(copied)
    eager = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager", use_cache=False, pad_token_id=5)
    assert eager.config._attn_implementation == "eager" and eager.config.use_cache is False and eager.config.pad_token_id == 5
    assert torch.allclose(eager(ids()).logits, model(ids()).logits, atol=0.15)
    other = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert other.model.embed_tokens.weight.dtype == other.dtype == torch.float32
    same(other, vitq.load(saved, dtype=torch.float32))
    same(other, AutoModelForCausalLM.from_pretrained(saved, dtype="float32"))
    with pytest.raises(ValueError, match="dtype must be one of"):
        AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float64)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(model, saved, device_map, monkeypatch) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    same(model, AutoModelForCausalLM.from_pretrained(saved, device_map=device_map))


@pytest.mark.gpu
def test_on_a_gpu(model, saved) -> None:
    pytest.importorskip("accelerate")
    there = AutoModelForCausalLM.from_pretrained(saved, device_map="cuda", dtype=torch.float16)
    again = vitq.load(saved, "cuda")
    assert {t.device.type for t in (*there.parameters(), *there.buffers())} == {"cuda"}
    x = ids().cuda()
    assert torch.equal(there(x).logits, again(x).logits) and torch.equal(there.generate(x, max_new_tokens=5), again.generate(x, max_new_tokens=5))
    assert torch.allclose(there(x).logits.float().cpu(), model(ids()).logits.float(), atol=0.15)
    quantized = AutoModelForCausalLM.from_pretrained(saved, device_map="auto")
    assert quantized.device.type == "cuda" and quantized.dtype == torch.bfloat16


def test_a_device_map_names_one_device(monkeypatch) -> None:
    place = vitq.hf.VitqQuantizer(vitq.hf.VitqConfig()).update_device_map
    assert place(None) is None and place({"": torch.device("cpu")}) == place({"model": "cpu", "lm_head": "cpu"}) == {"": torch.device("cpu")}
    with pytest.raises(ValueError, match="one device, device_map names cpu, cuda:0: give"):
        place({"model": 0, "lm_head": "cpu"})
    for device in ("disk", "meta", "mps"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used.*give cpu, or cuda"):
            place({"": device})


# Quantizing on the way ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float_checkpoint_is_quantized_as_it_is_loaded(dtype: torch.dtype, tmp_path) -> None:
    source = build(tie_word_embeddings=True).to(dtype)
    source.save_pretrained(tmp_path / "float")
    recipe = quick("w8a8-dynamic", "fc2.weight.bits=4")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=vitq.hf.VitqConfig(recipe))
    same(loaded, vitq.convert(AutoModelForCausalLM.from_pretrained(tmp_path / "float"), recipe, dtype=dtype))
    assert loaded.model.embed_tokens.weight.dtype == dtype and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    loaded.save_pretrained(tmp_path / "int")
    same(loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "int"))
    assert json.loads((tmp_path / "int" / "config.json").read_text())["quantization_config"]["recipe"] == recipe.to_dict()


def test_recipes_that_need_data_are_refused_before_weights_are_read(tmp_path) -> None:
    build().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name, why in (("w8a8", "needs data"), ("gptq-w4a16", "needs data"), ("erq-w4a4-paper", "needs data|is for simulation")):
        with pytest.raises(ValueError, match=f"the recipe '{name}' ({why}).*vitq.convert"):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=vitq.hf.VitqConfig(name))
    for arguments, message in (({"recipe": "no-such"}, "no-such"), ({"backend": "tpu"}, "backend must be one of"),
                               ({"bits": 4}, "takes recipe and backend; got bits")):
        with pytest.raises((ValueError, TypeError), match=message):
            vitq.hf.VitqConfig(**arguments)


# Refused --------------------------------------------------------------------------------------------------------------


def refused(folder, message: str, error: type[Exception] = vitq.CheckpointError, **options) -> None:
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(folder, **options)


def test_damaged_shards(saved) -> None:
    shard = sorted(saved.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-50])
    refused(saved, f"{shard.name} is damaged or cut short")
    flipped = bytearray(whole)
    flipped[-50] ^= 4
    shard.write_bytes(flipped)
    refused(saved, "SHA-256")
    shard.unlink()
    refused(saved, f"incomplete: {shard.name} is missing")


def resave(saved, change) -> str:
    """The first shard with other tensors, and an index that knows of it; its name."""
    shard = sorted(saved.glob("*.safetensors"))[0]
    tensors = safetensors.torch.load_file(shard)
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    name = change(tensors)
    index["weight_map"] = {n: file for n, file in index["weight_map"].items() if file != shard.name} | {n: shard.name for n in tensors}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    safetensors.torch.save_file(tensors, shard, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("change, message", [
    (lambda t: t.popitem()[0], "missing tensors {}, unexpected none"),
    (lambda t: t.update(extra=torch.zeros(2)), "missing tensors none, unexpected extra"),
    (lambda t: t.update({(name := list(t)[0]): t[name][1:].clone()}) or name, "tensor '{}' is"),
    (lambda t: t.update({(name := list(t)[0]): t[name].to(torch.int64)}) or name, "tensor '{}' is .*torch.int64"),
    (lambda t: t.update({(name := next(n for n in t if n.endswith("qweight"))): t[name] ^ 1}) or name, "SHA-256")])
def test_other_tensors(saved, change, message: str) -> None:
    refused(saved, message.format(resave(saved, change)))


def test_other_configs(saved) -> None:
    text = (saved / "config.json").read_text()
    for old, new, message in [('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05', "SHA-256"),
                              ('"num_attention_heads": 4', '"num_attention_heads": 8', "SHA-256|needs"),
                              ('"num_hidden_layers": 2', '"num_hidden_layers": 1', "unexpected model.layers.1"),
                              ('"schema": 3', '"schema": 99', "schema 99.*upgrade vitq"), ('"w4a8"', '"w4a9"', "SHA-256"),
                              ('"dynamic": true', '"dynamic": false', "recipe is damaged"),
                              ('"architectures": [\n  "LlamaForCausalLM"', '"architectures": [\n  "X"', "holds a X and was opened as a Llama")]:
        assert old in text, old
        (saved / "config.json").write_text(text.replace(old, new))
        refused(saved, message)
    (saved / "config.json").write_text(text)
    refused(saved, "another config: rms_norm_eps=0.1 instead of 1e-06", rms_norm_eps=0.1)
    refused(saved, "another config: max_position_embeddings=99 instead of 2048", max_position_embeddings=99)
    config = transformers.AutoConfig.from_pretrained(saved)
    config.num_key_value_heads = 4
    refused(saved, "another config: num_key_value_heads=4 instead of 2", config=config)


def test_headers_without_a_schema_or_with_another_dtype(model, saved) -> None:
    text = (saved / "config.json").read_text()

    def changed(config: dict | None = None, drop: str = "", **header) -> None:
        found = {**json.loads(text), **(config or {})}
        found["quantization_config"].update(header)
        found["quantization_config"].pop(drop, None)
        (saved / "config.json").write_text(json.dumps(found))

    def both(message: str) -> None:
        refused(saved, message)
        with pytest.raises(vitq.CheckpointError, match=message):
            vitq.load(saved)

    changed(drop="schema")
    both("quantization_config of .*config.json is damaged: it has no schema number, and every checkpoint has one from 1 to 3; copy or save it again")
    changed({"quantization_config": {"quant_method": "vitq"}})
    both("it has no schema number")
    for schema in ("3", True, 0, None):
        changed(schema=schema)
        both(f"is damaged: its schema is {schema!r}, and every")
    for dtype in ("int8", "float64", 5):
        changed({"dtype": dtype})
        refused(saved, "dtype must be one of .*: give one of them as dtype=, or where none was given, save or copy .*config.json is damaged", ValueError)
    for dtype in ("int8", "float99", [1], {"": "float32"}, None):
        changed({"dtype": dtype})
        with pytest.raises(vitq.CheckpointError, match="is damaged: dtype must be one of float32, float16, bfloat16, got .*; copy or save it again"):
            vitq.load(saved)
    (saved / "config.json").write_text(text)
    same(model, AutoModelForCausalLM.from_pretrained(saved))
    kept = vitq.hf.VitqConfig("w8a8-dynamic").to_dict()  # of no checkpoint
    assert vitq.hf.VitqConfig.from_dict(kept).recipe["name"] == "w8a8-dynamic"


def test_other_architectures(saved) -> None:
    for cls in (transformers.LlamaModel, transformers.MistralForCausalLM, transformers.LlamaForSequenceClassification, transformers.AutoModel):
        with pytest.raises(vitq.CheckpointError, match="holds a LlamaForCausalLM and was opened as a .*AutoModelForCausalLM"):
            cls.from_pretrained(saved)
    assert transformers.LlamaForCausalLM.from_pretrained(saved).lm_head is not None


def test_other_arguments(model, saved, tmp_path) -> None:
    with pytest.raises(TypeError, match="takes max_shard_size.*got safe_serialization"):
        model.save_pretrained(tmp_path / "x", safe_serialization=True)
    with pytest.raises(ValueError, match="Got 'many'"):
        model.save_pretrained(tmp_path / "x", max_shard_size="many")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="vitq.load reads it"):
        vitq.load_language_model(saved)
    with pytest.raises(ValueError, match="revision= is of a repository on the hub"):
        vitq.load(saved, revision="main")
    build().save_pretrained(tmp_path / "float")
    with pytest.raises(vitq.CheckpointError, match="a model that vitq did not write"):
        model.save_pretrained(tmp_path / "float")
    with pytest.raises(vitq.CheckpointError, match="a model that vitq did not quantize"):
        vitq.load(tmp_path / "float")


# The hub --------------------------------------------------------------------------------------------------------------


def matching(folder: Path, patterns: list[str]) -> list[str]:
    """As the hub has it."""
    return list(huggingface_hub.utils.filter_repo_objects([p.name for p in folder.iterdir()], allow_patterns=patterns))


@pytest.fixture
def played(tmp_path, monkeypatch):
    """A hub that answers, with its repositories as folders of `played.root`, and what was asked of it."""
    asked = types.SimpleNamespace(root=tmp_path / "hub", downloads=[], created=[], uploads=[])

    def snapshot_download(name: str, **options):
        asked.downloads.append((name, options))
        if not (asked.root / name).is_dir():
            response = types.SimpleNamespace(headers={}, request=None, status_code=404)
            raise huggingface_hub.errors.RepositoryNotFoundError("404 Client Error", response=response)
        there = tmp_path / f"cache{len(asked.downloads)}"
        there.mkdir()
        for file in matching(asked.root / name, options["allow_patterns"]):
            shutil.copy(asked.root / name / file, there)
        return str(there)

    class Api:
        def __init__(self, token=None):
            asked.token = token

        def create_repo(self, repo_id, **options):
            asked.created.append((repo_id, options))
            repo_id = repo_id if "/" in repo_id else f"user/{repo_id}"
            (asked.root / repo_id).mkdir(parents=True, exist_ok=True)
            return types.SimpleNamespace(repo_id=repo_id)

        def list_repo_files(self, repo_id):
            return [p.name for p in (asked.root / repo_id).iterdir()]

        def hf_hub_download(self, repo_id, name):
            there = tmp_path / "one" / name  # without the rest
            there.parent.mkdir(exist_ok=True)
            return shutil.copy(asked.root / repo_id / name, there)

        def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
            for file in matching(asked.root / repo_id, delete_patterns):
                (asked.root / repo_id / file).unlink()
            shutil.copytree(folder_path, asked.root / repo_id, dirs_exist_ok=True)
            asked.uploads.append(commit_message)
            return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "probe", lambda url: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize("by", ["vitq", "push_to_hub", "save_pretrained"])
def test_a_language_model_to_the_hub_and_back(model, played, tmp_path, by: str) -> None:
    options = {"private": True, "token": "hf_x", "commit_message": "Four bits", "max_shard_size": "30KB"}
    if by == "vitq":
        assert vitq.push_to_hub(model, "user/small", **options) == "https://hub/user/small/commit/1"
    elif by == "push_to_hub":
        assert model.push_to_hub("user/small", **options) == "https://hub/user/small/commit/1"
    else:
        model.save_pretrained(tmp_path / "small", push_to_hub=True, **options)  # by the folder's name
        same(model, vitq.load(tmp_path / "small"))
    assert played.created == [("small" if by == "save_pretrained" else "user/small", {"private": True, "exist_ok": True})] and played.token == "hf_x" and played.uploads == ["Four bits"]
    same(model, vitq.load("user/small", revision="v1", token="hf_y"))
    (name, asked), = played.downloads
    assert (name, asked["revision"], asked["token"]) == ("user/small", "v1", "hf_y")
    same(model, AutoModelForCausalLM.from_pretrained(played.root / "user/small"))
    card = huggingface_hub.ModelCard.load(played.root / "user/small" / "README.md")
    assert card.data.library_name == "vitq" and card.data.pipeline_tag == "text-generation" and "w4a8" in card.data.tags
    bits = vitq.report.bits_per_weight(model)
    for said in (f"| recipe | `{model.vitq.recipe.name}` |", f"{bits.linears:.2f}", f"{bits.model:.2f}", 'vitq.load("user/small")',
                 'AutoModelForCausalLM.from_pretrained("user/small")', "import vitq.hf", "bfloat16", "calibrated on | 4 samples"):
        assert said in card.text, said
    assert vitq.Recipe.from_dict(yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])) == model.vitq.recipe


def test_an_image_model_to_the_hub_and_back(played) -> None:
    source = build_vit(depth=2)
    model = convert_vit(source, quick_vit("w4a8"))
    vitq.push_to_hub(model, "user/vit", source={"model_kwargs": {"depth": 2}}, max_shard_size="300KB")
    repository = played.root / "user/vit"
    (repository / "weights.bin").write_text("of something else")
    assert torch.equal(vitq.load("user/vit")(images(source)), model(images(source)))
    assert not (Path("cache1") / "weights.bin").exists() and (Path("cache1") / "vitq.json").exists()
    card = (repository / "README.md").read_text()
    assert "image-classification" in card and "deit_tiny_patch16_224" in card and "from_pretrained" not in card
    assert played.uploads == [f"Upload a model quantized with the recipe {model.vitq.recipe.name}"]
    (repository / "README.md").write_text("My own words")
    vitq.push_to_hub(model, "user/vit", source={"model_kwargs": {"depth": 2}})
    assert sorted(p.name for p in repository.iterdir()) == ["README.md", "model.safetensors", "vitq.json", "weights.bin"], "no shard is left"
    assert (repository / "README.md").read_text() == "My own words"


def test_what_is_no_name_of_a_repository(model, played) -> None:
    with pytest.raises(ValueError, match="not a name!!"):
        vitq.push_to_hub(model, "not a name!!")
    assert not played.created


@pytest.mark.parametrize("files", [{"config.json": "{}"}, {"config.json": "{}", "model.safetensors": ""}, {"model-00001-of-00002.safetensors": ""}])
def test_a_repository_with_another_model_stays_as_it_is(model, played, files: dict[str, str]) -> None:
    repository = played.root / "user/float"
    repository.mkdir(parents=True)
    for name, content in files.items():
        (repository / name).write_text(content)
    with pytest.raises(vitq.CheckpointError, match="user/float holds a model that vitq did not write .*give another repository"):
        vitq.push_to_hub(model, "user/float")
    assert not played.uploads and {p.name: p.read_text() for p in repository.iterdir()} == files


def test_a_folder_of_that_name_comes_first(model, played) -> None:
    vitq.save(model, "user/small")
    same(model, vitq.load("user/small"))
    assert played.downloads == []


def test_a_repository_that_there_is_not(played) -> None:
    with pytest.raises(FileNotFoundError, match="user/none is neither a folder nor a repository on the hub"):
        vitq.load("user/none")
    for name in ("none", Path("user/none"), "a/b/c", "./none"):  # no names of repositories
        with pytest.raises(FileNotFoundError, match="no vitq checkpoint"):
            vitq.load(name)
    assert len(played.downloads) == 1


def test_a_repository_of_something_else(played) -> None:
    build().save_pretrained(played.root / "user/float")
    with pytest.raises(vitq.CheckpointError, match="a model that vitq did not quantize"):
        vitq.load("user/float")


def test_a_download_that_breaks_off(played, monkeypatch) -> None:
    def broken(name, **options):
        raise OSError("connection reset")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(ConnectionError, match="downloading user/small failed: connection reset"):
        vitq.load("user/small")


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_hub_its_cache_is_enough(model, tmp_path, monkeypatch, offline: bool) -> None:
    """A cache as huggingface_hub keeps it, and its own code."""
    vitq.save(model, tmp_path / "models--user--small" / "snapshots" / ("0" * 40))
    (tmp_path / "models--user--small" / "refs").mkdir()
    (tmp_path / "models--user--small" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(urllib.request, "urlopen", away)
    same(model, vitq.load("user/small"))
    same(model, AutoModelForCausalLM.from_pretrained("user/small", cache_dir=tmp_path, local_files_only=True))
    start, reason = time.monotonic(), "HF_HUB_OFFLINE is set" if offline else "cannot be reached: no route"
    with pytest.raises(ConnectionError, match=f"user/none is neither a folder nor in the hub's cache, and the hub cannot give it: .*{reason}"):
        vitq.load("user/none")
    with pytest.raises(ConnectionError, match=f"user/none cannot be uploaded: .*{reason}"):
        vitq.push_to_hub(model, "user/none")
    assert time.monotonic() - start < 10


def away(request, timeout):
    raise OSError("no route")


def test_a_model_that_cannot_be_saved_makes_no_repository(played) -> None:
    with pytest.raises(vitq.CheckpointError, match="model_kwargs"):
        vitq.push_to_hub(convert_vit(build_vit(depth=1), quick_vit("w8a8")), "user/vit")
    with pytest.raises(TypeError, match="vitq.convert"):
        vitq.push_to_hub(build_vit(depth=1), "user/vit")
    assert played.created == [] and publish.CARD == "README.md"
