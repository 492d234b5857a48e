"""vitq.save and vitq.load: bit-identical, strict, and nothing half-written."""

from __future__ import annotations

import json
import os
import stat

import pytest
import safetensors.torch
import torch
from helpers import build, convert, images, quick

import vitq
from vitq import checkpoint_files


@pytest.fixture(scope="module")
def model():
    return convert(build(depth=2), quick("w4a8"))


@pytest.fixture
def saved(model, tmp_path):
    return vitq.save(model, tmp_path / "ckpt")


def _depth(saved_model):
    return {"model_kwargs": {"depth": 2}}


@pytest.fixture(autouse=True)
def _kwargs(model):
    model.vitq.source = _depth(model)


@pytest.mark.parametrize("name, kwargs, recipe", [
    ("deit_tiny_patch16_224", {"depth": 2}, "w8a8"), ("deit_tiny_patch16_224", {"depth": 2}, "w8a8-dynamic"),
    ("deit_tiny_patch16_224", {"depth": 2, "img_size": 160}, "w4a4"),
    ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 2, 1), "img_size": 192}, "w4a4"),
    ("vit_base_patch16_siglip_224", {"depth": 1}, "w4a8"), ("deit_tiny_distilled_patch16_224", {"depth": 1}, "w8a8"),
    ("deit_tiny_patch16_224", {"depth": 1}, "dual-w8a8"), ("deit_tiny_patch16_224", {"depth": 1}, "dual-w4a4"),
    ("deit_tiny_patch16_224", {"depth": 1}, "asymmetric"), ("deit_tiny_patch16_224", {"depth": 1}, "dual-asymmetric"),
])
def test_reloads_bit_identically(name: str, kwargs: dict, recipe: str, tmp_path) -> None:
    source = build(name, num_classes=7, **kwargs)
    if recipe.endswith("asymmetric"):
        recipe = quick(recipe.replace("asymmetric", "w4a4"), *(f"{role}.weight.symmetric=false" for role in ("qkv", "proj", "fc1", "fc2")))
    model = convert(source, recipe if isinstance(recipe, vitq.Recipe) else quick(recipe))
    record = {"name": name, "weights": "random:0", "model_kwargs": {k: v for k, v in kwargs.items() if k != "img_size"}}
    loaded = vitq.load(vitq.save(model, tmp_path / "c", source=record))
    assert torch.equal(loaded(images(source)), model(images(source)))
    assert loaded.vitq.source["weights"] == "random:0" and loaded.vitq.recipe == model.vitq.recipe
    assert loaded.pretrained_cfg["mean"] is not None and loaded.num_classes == 7
    assert [(r.layer, r.kernel, r.note) for r in vitq.explain(loaded)] == \
        [(r.layer, r.kernel, r.note) for r in vitq.explain(model)]


def test_no_pickle_and_small(saved) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["model.safetensors", "vitq.json"]
    header = json.loads((saved / "vitq.json").read_text())
    assert header["schema"] == checkpoint_files.SCHEMA and header["recipe"]["name"] == "w4a8"
    floats = sum(p.numel() * 4 for p in build(depth=2).parameters())
    assert (saved / "model.safetensors").stat().st_size < 0.35 * floats


def test_other_dtype(saved) -> None:
    x = images(build(depth=2))
    a, b = vitq.load(saved, dtype=torch.float32)(x), vitq.load(saved, backend="reference", dtype=torch.float32)(x)
    assert torch.allclose(a, b, atol=0.1)


# Damage ---------------------------------------------------------------------------------------------------------------


def _rewrite_header(saved, **changes) -> None:
    header = json.loads((saved / "vitq.json").read_text())
    (saved / "vitq.json").write_text(json.dumps({**header, **changes}))


def test_truncated(saved) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(vitq.CheckpointError, match="damaged or cut short"):
        vitq.load(saved)


@pytest.mark.parametrize("where", [0.3, 0.9])
def test_flipped_bit(saved, where: float) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 4
    path.write_bytes(data)
    with pytest.raises(vitq.CheckpointError, match="SHA-256"):
        vitq.load(saved)


def test_changed_header(saved) -> None:
    _rewrite_header(saved, dtype="float16")
    with pytest.raises(vitq.CheckpointError, match="SHA-256"):
        vitq.load(saved)
    (saved / "vitq.json").write_text('{"schema": 1')
    with pytest.raises(vitq.CheckpointError, match="damaged"):
        vitq.load(saved)
    (saved / "vitq.json").write_text('{"schema": 1}')
    with pytest.raises(vitq.CheckpointError, match="lacks"):
        vitq.load(saved)


def _resign(saved, tensors=None, **changes) -> None:
    """Change a checkpoint and sign it again, so that the checks behind the hash are reached."""
    header = {**json.loads((saved / "vitq.json").read_text()), **changes}
    header.pop("sha256")
    tensors = tensors if tensors is not None else safetensors.torch.load_file(saved / "model.safetensors")
    safetensors.torch.save_file(tensors, saved / "model.safetensors")
    (saved / "vitq.json").write_text(json.dumps({**header, "sha256": checkpoint_files.digest(header, tensors)}))


@pytest.mark.parametrize("signed", [True, False])
def test_missing_tensor(saved, signed: bool) -> None:
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    del tensors["blocks.0.attn.qkv.qweight"]
    if signed:
        _resign(saved, tensors)
    else:
        safetensors.torch.save_file(tensors, saved / "model.safetensors")
    with pytest.raises(vitq.CheckpointError, match="missing tensors blocks.0.attn.qkv.qweight"):
        vitq.load(saved)


def test_unexpected_tensor_and_wrong_shape(saved) -> None:
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    _resign(saved, {**tensors, "extra": torch.zeros(1)})
    with pytest.raises(vitq.CheckpointError, match="unexpected extra"):
        vitq.load(saved)
    _resign(saved, {**tensors, "head.bias": torch.zeros(3)})
    with pytest.raises(vitq.CheckpointError, match="'head.bias' is"):
        vitq.load(saved)


def test_newer_schema(saved) -> None:
    _rewrite_header(saved, schema=99)
    with pytest.raises(vitq.CheckpointError, match="schema 99.*upgrade"):
        vitq.load(saved)


def test_the_first_schema_still_loads(model, saved) -> None:
    """It had models of timm only, and no key `library`."""
    header = json.loads((saved / "vitq.json").read_text())
    del header["library"], header["sha256"]
    header["schema"] = 1
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    (saved / "vitq.json").write_text(json.dumps({**header, "sha256": checkpoint_files.digest(header, tensors)}))
    x = images(build(depth=2))
    assert torch.equal(vitq.load(saved)(x), model(x))


def test_asymmetric_weights_of_the_first_schema(tmp_path) -> None:
    """They were stored as what is added to code · multiplier."""
    model = build(depth=2)
    quantized = convert(model, quick("w4a8", "qkv.weight.symmetric=false", "qkv.weight.segments=dual_uniform", "fc1.weight.symmetric=false"))
    saved = vitq.save(quantized, tmp_path / "c", source={"model_kwargs": {"depth": 2}})
    tensors, x = safetensors.torch.load_file(saved / "model.safetensors"), images(model)
    names = [name for name in tensors if name.endswith(".weight_zero")]
    for name in names:
        stem = name.removesuffix("zero")
        tensors[f"{stem}offset"] = -tensors.pop(name) * tensors[f"{stem}multiplier"]
    _resign(saved, tensors, schema=1)
    assert len(names) == 4 and torch.equal(vitq.load(saved)(x), quantized(x))


def test_for_another_model(saved) -> None:
    _resign(saved, architecture="deit_small_patch16_224")
    with pytest.raises(vitq.CheckpointError, match="deit_small_patch16_224"):
        vitq.load(saved)
    _resign(saved, architecture="no_such_model")
    with pytest.raises(vitq.CheckpointError, match="no model 'no_such_model'"):
        vitq.load(saved)


def test_shards(model, tmp_path) -> None:
    saved, x = vitq.save(model, tmp_path / "c", max_shard_size="300KB"), images(build(depth=2))
    shards = sorted(saved.glob("*.safetensors"))
    assert len(shards) > 2 and torch.equal(vitq.load(saved)(x), model(x))
    whole = [shard.read_bytes() for shard in shards]
    shards[1].unlink()
    with pytest.raises(vitq.CheckpointError, match=f"incomplete: {shards[1].name} is missing"):
        vitq.load(saved)
    shards[1].write_bytes(whole[1][:-100])
    with pytest.raises(vitq.CheckpointError, match=f"{shards[1].name} is damaged or cut short"):
        vitq.load(saved)
    shards[1].write_bytes(whole[0])
    with pytest.raises(vitq.CheckpointError, match=f"{shards[1].name} does not fit model.safetensors.index.json: missing tensors .*, unexpected"):
        vitq.load(saved)
    shards[1].write_bytes(whole[1])
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    name = index["weight_map"].popitem()[0]
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(vitq.CheckpointError, match=f"unexpected {name}"):
        vitq.load(saved)
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: "../c/model-00001-of-00004.safetensors"}}))
    with pytest.raises(vitq.CheckpointError, match="index.json is damaged"):
        vitq.load(saved)


def test_missing_parts(saved, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        vitq.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="vitq.json is missing"):
        vitq.load(tmp_path / "empty")
    (saved / "model.safetensors").unlink()
    with pytest.raises(vitq.CheckpointError, match="incomplete"):
        vitq.load(saved)


# Writing --------------------------------------------------------------------------------------------------------------


def test_interrupted_save_keeps_the_old_checkpoint(model, saved, monkeypatch) -> None:
    x = images(build(depth=2))
    before = vitq.load(saved)(x)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        vitq.save(model, saved)
    assert [p.name for p in saved.parent.iterdir()] == ["ckpt"], "nothing half-written"
    assert torch.equal(vitq.load(saved)(x), before)


def test_full_disk(model, saved, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "save_file", full)
    with pytest.raises(vitq.CheckpointError, match="No space left"):
        vitq.save(model, saved)
    vitq.load(saved)
    assert [p.name for p in saved.parent.iterdir()] == ["ckpt"]


def test_saving_again_replaces(model, saved) -> None:
    other = convert(build(depth=2, seed=9), quick("w4a8"))
    vitq.save(other, saved, source=_depth(other))
    x = images(build(depth=2))
    assert torch.equal(vitq.load(saved)(x), other(x)) and not torch.equal(other(x), model(x))
    assert [p.name for p in saved.parent.iterdir()] == ["ckpt"]


def test_a_model_of_something_else_is_not_replaced(model, tmp_path) -> None:
    for name, content in (("model.safetensors", "weights"), ("config.json", '{"model_type": "llama"}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(vitq.CheckpointError, match=rf"holds a model that vitq did not write \({name}\).*another folder"):
            vitq.save(model, tmp_path)
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, content)]
        (tmp_path / name).unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(vitq.CheckpointError, match="is a file"):
        vitq.save(model, tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(model, tmp_path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(vitq.CheckpointError, match="cannot write"):
        vitq.save(model, tmp_path / "c")


def test_unwritable_parent(model, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(vitq.CheckpointError, match="cannot write"):
        vitq.save(model, tmp_path / "file" / "c")


def test_a_model_that_could_not_be_rebuilt_is_not_written(tmp_path) -> None:
    model = convert(build(depth=1), quick("w8a8"))
    with pytest.raises(vitq.CheckpointError, match="model_kwargs"):
        vitq.save(model, tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("change", ["heads", "eps", "activation"])
def test_a_model_with_the_same_shapes_is_told_apart(change: str, tmp_path) -> None:
    """Nothing of the tensors' names or shapes tells these apart; only the logits do."""
    source = build("vit_tiny_patch16_224", depth=1, **({"num_heads": 6} if change == "heads" else {}))
    if change == "eps":
        source.blocks[0].norm1.eps = 0.1
    elif change == "activation":
        source.blocks[0].mlp.act = torch.nn.SiLU()
    model = convert(source, quick("w8a8"))
    with pytest.raises(vitq.CheckpointError, match="logits differ"):
        vitq.save(model, tmp_path / "c", source={"model_kwargs": {"depth": 1}})
    assert not list(tmp_path.iterdir())
    if change == "heads":
        loaded = vitq.load(vitq.save(model, tmp_path / "c", source={"model_kwargs": {"depth": 1, "num_heads": 6}}))
        assert torch.equal(loaded(images(source)), model(images(source)))


@pytest.mark.parametrize("after", range(1, 7))
def test_an_interrupt_between_the_files_keeps_the_old_checkpoint(model, tmp_path, after: int, monkeypatch) -> None:
    """Whichever file it comes before: an older one that steps aside, or a new one."""
    saved = vitq.save(model, tmp_path / "ckpt", max_shard_size="500KB")
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    rename, calls = os.rename, []

    def interrupted(a, b):
        calls.append(a)
        if len(calls) == after:
            raise KeyboardInterrupt
        rename(a, b)

    other = convert(build(depth=2, seed=9), quick("w4a8"))
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vitq.save(other, saved, source=_depth(other))
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before and len(before) > 3
    vitq.save(other, saved, source=_depth(other))
    assert sorted(p.name for p in saved.iterdir()) == ["model.safetensors", "vitq.json"], "no shard of the old one is left"


def test_other_files_beside_a_checkpoint_are_kept(model, saved) -> None:
    (saved / "tokenizer.json").write_text("mine")
    other = convert(build(depth=2, seed=9), quick("w4a8"))
    vitq.save(other, saved, source=_depth(other))
    assert (saved / "tokenizer.json").read_text() == "mine" and len(list(saved.iterdir())) == 3
    assert torch.equal(vitq.load(saved)(images(build(depth=2))), other(images(build(depth=2))))


def test_through_a_link_and_readable_by_others(model, tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    vitq.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and vitq.load(tmp_path / "real") is not None
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "real").iterdir()}
    assert len(modes) == 1


def test_where_the_model_came_from_is_recorded(saved) -> None:
    header = json.loads((saved / "vitq.json").read_text())
    assert header["source"]["name"].startswith("deit_tiny_patch16_224") and header["source"]["data_config"]["input_size"] == [3, 224, 224]
    assert header["calibration"] == {"images": 4}


def test_bad_load_arguments(saved) -> None:
    with pytest.raises(ValueError, match="dtype must be one of"):
        vitq.load(saved, dtype=torch.int8)
    with pytest.raises(ValueError, match="cannot run on cpu"):
        vitq.load(saved, backend="cuda")
    with pytest.raises(ValueError, match="give cpu, or cuda"):
        vitq.load(saved, device="meta")


def test_unconverted_model(tmp_path) -> None:
    with pytest.raises(TypeError, match="vitq.convert"):
        vitq.save(build(depth=1), tmp_path / "c")
