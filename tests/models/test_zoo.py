"""vitq.models.zoo: names, where weights come from, and what is said when they cannot be had."""
import random
import time
import urllib.request
import warnings

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from vitq.calib.data import data_config
from vitq.models import hub
from vitq.models.zoo import ALIASES, DEMO_ARCH, load_model, resolve_name

SMALL = {"depth": 1, "embed_dim": 64, "num_heads": 2}  # a vit_tiny that builds in no time


def test_aliases_are_timm_names_with_weights():
    assert set(ALIASES) == {"deit_t", "deit_s", "deit_b", "vit_s", "vit_b", "vit_l", "swin_t", "swin_s", "swin_b"}
    for short, full in ALIASES.items():
        assert resolve_name(short) == full == resolve_name(full)
        assert timm.get_pretrained_cfg(full).tag == full.partition(".")[2]


def test_a_name_without_a_tag_gets_timms_default():
    assert resolve_name("deit_small_patch16_224") == "deit_small_patch16_224.fb_in1k"
    assert resolve_name("test_vit").startswith("test_vit.")


@pytest.mark.parametrize("name, hint", [("deit_x", "deit_s"), ("vit_smal_patch16_224", "vit_small_patch16_224"),
                                        ("zzzz", "deit_t"), ("", "deit_t")])
def test_unknown_names_get_suggestions(name, hint):
    with pytest.raises(ValueError, match=f"unknown model.*{hint}"):
        resolve_name(name)


def test_unknown_tag_and_type():
    with pytest.raises(ValueError, match="no weights tagged 'fb_in2k'.*fb_in1k"):
        resolve_name("deit_small_patch16_224.fb_in2k")
    with pytest.raises(TypeError, match="string"):
        resolve_name(3)


def test_random_weights_are_reproducible_and_said_to_be_random():
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    a, b, c = (load_model("vit_tiny_patch16_224", "random", seed=s, **SMALL) for s in (0, 0, 1))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters()))
    assert not torch.equal(a.model.head.weight, c.model.head.weight)
    assert (a.weights, a.class_names) == ("random:0", None) and "random" in a.notes[0]
    assert not a.model.training and a.model.pretrained_cfg["tag"] == ""


def test_demo_weights():
    a = load_model("deit_s", "demo")
    assert a.weights == "demo" and a.class_names == ("global", "local", "nominal") and a.name == DEMO_ARCH
    assert a.model.num_classes == 3 and not a.model.training
    assert {p.dtype for p in a.model.parameters()} == {torch.float32}
    cfg = data_config(a.model)
    assert cfg == {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.135] * 3, "interpolation": "bicubic",
                   "crop_pct": 1.0, "crop_mode": "center"}
    assert not a.model.pretrained_cfg["hf_hub_id"]


def test_demo_weights_know_the_photographs():
    pytest.importorskip("conformal_clip_data")
    from vitq.calib.data import batches, open_images
    model = load_model("deit_s", "demo").model
    data = open_images("demo", data_config(model), limit=24)
    with torch.inference_mode():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(data.eval, 24))
    assert right >= 23  # 396 of all 400


def test_demo_weights_fit_deit_s_alone():
    with pytest.raises(ValueError, match="deit_s .* only"):
        load_model("deit_b", "demo")
    with pytest.raises(ValueError, match="3 classes; num_classes=10"):
        load_model("deit_s", "demo", num_classes=10)


@pytest.fixture
def saved(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **SMALL)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    return model, tmp_path / "w.safetensors"


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_file_of_weights(saved):
    model, path = saved
    loaded = load_model("vit_tiny_patch16_224", str(path), **SMALL)
    assert loaded.model.num_classes == 7 and same(model, loaded.model) and loaded.class_names is None
    kind, name, digest = loaded.weights.split(":")
    assert (kind, name, len(digest)) == ("file", "w.safetensors", 64)
    assert loaded.model.pretrained_cfg["num_classes"] == 7 and not loaded.model.pretrained_cfg["hf_hub_id"]


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3},
                                  lambda s: {"state_dict": {"module." + k: v for k, v in s.items()}}])
def test_a_torch_checkpoint(saved, wrap):
    model, path = saved
    torch.save(wrap(model.state_dict()), path.with_suffix(".pth"))
    assert same(model, load_model("vit_tiny_patch16_224", str(path.with_suffix(".pth")), **SMALL).model)


def test_a_pickle_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"head.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="cannot read weights"):
        load_model("vit_tiny_patch16_224", str(tmp_path / "bomb.pth"))
    assert not (tmp_path / "ran").exists()


def test_wrong_files(saved, tmp_path):
    model, path = saved
    with pytest.raises(ValueError, match="does not fit vit_tiny_patch16_224.*(missing|wrong shape)"):
        load_model("vit_tiny_patch16_224", str(path))
    state = load_file(path)
    state["extra"] = state.pop("blocks.0.norm1.weight")
    save_file(state, tmp_path / "names.safetensors")
    with pytest.raises(ValueError, match="missing blocks.0.norm1.weight; unexpected extra"):
        load_model("vit_tiny_patch16_224", str(tmp_path / "names.safetensors"), **SMALL)
    state = load_file(path)
    state["norm.bias"][0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="NaN or infinite values in norm.bias"):
        load_model("vit_tiny_patch16_224", str(tmp_path / "nan.safetensors"), **SMALL)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:1000])
    (tmp_path / "junk.pth").write_bytes(b"junk")
    for name in ("cut.safetensors", "junk.pth"):
        with pytest.raises(ValueError, match="cannot read weights"):
            load_model("vit_tiny_patch16_224", str(tmp_path / name), **SMALL)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no state dict"):
        load_model("vit_tiny_patch16_224", str(tmp_path / "list.pth"), **SMALL)
    with pytest.raises(ValueError, match="7 classes; num_classes=9"):
        load_model("vit_tiny_patch16_224", str(path), num_classes=9, **SMALL)
    for name in (str(tmp_path / "none.safetensors"), "pretraind"):
        with pytest.raises(FileNotFoundError, match="no such file of weights"):
            load_model("vit_tiny_patch16_224", name)


def test_a_file_for_another_architecture_or_a_newer_format(saved, tmp_path):
    model, path = saved
    for meta, words in (({"vitq_weights": "1", "timm": "deit_small_patch16_224"}, "weights of deit_small"),
                        ({"vitq_weights": "2"}, "update vitq")):
        save_file(model.state_dict(), tmp_path / "m.safetensors", metadata=meta)
        with pytest.raises(ValueError, match=words):
            load_model("vit_tiny_patch16_224", str(tmp_path / "m.safetensors"), **SMALL)


def test_timm_arguments_that_weights_decides():
    with pytest.raises(ValueError, match="weights= says"):
        load_model("deit_s", "random", pretrained=True)


# --- pretrained, with a hub that is played ------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.augreg_in21k_ft_in1k", "deit_tiny_patch16_224.fb_in1k"])
def test_cached_weights_need_no_network(name, tmp_path, monkeypatch):
    import huggingface_hub
    model = timm.create_model(name)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache",
                        lambda repo, file: str(tmp_path / file) if file == "model.safetensors" else None)
    monkeypatch.setattr(hub, "probe", lambda url: pytest.fail("asked the network"))
    loaded = load_model(name)
    assert same(model, loaded.model) and loaded.weights == "pretrained:" + name.partition(".")[2]
    cfg = loaded.model.pretrained_cfg
    assert cfg["tag"] == name.partition(".")[2] and not cfg["file"] and not loaded.notes
    assert len(loaded.class_names) == 1000 and loaded.class_names[0] == "n01440764"
    with pytest.raises(ValueError, match="head random"):
        load_model(name, num_classes=5)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    import huggingface_hub

    def away(request, timeout):
        raise OSError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", away)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))


def test_without_a_hub_auto_takes_the_demo_weights_for_deit_s_and_says_so(no_hub):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_model("deit_s")
    assert loaded.weights == "demo" and len(loaded.notes) == 1
    assert "demo weights" in loaded.notes[0] and "cannot be reached" in loaded.notes[0]


@pytest.mark.parametrize("name, weights", [("deit_b", "auto"), ("swin_t", "auto"), ("deit_s", "pretrained")])
def test_without_a_hub_nothing_is_made_up(no_hub, name, weights):
    with pytest.raises(RuntimeError, match=r"--weights PATH.*--weights random"):
        load_model(name, weights)


def test_a_hub_that_never_answers_is_given_up(no_hub, monkeypatch):
    def never(request, timeout):
        time.sleep(30)
        raise OSError("too late")

    monkeypatch.setattr(urllib.request, "urlopen", never)
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.5)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="no answer from"):
        load_model("deit_b")
    assert time.monotonic() - start < 5


def test_weights_that_do_not_exist():
    name = "vit_small_patch16_36x1_224"
    cfg = timm.get_pretrained_cfg(resolve_name(name))
    assert not (cfg.hf_hub_id or cfg.url)
    with pytest.raises(RuntimeError, match="timm knows of none"):
        load_model(name, "pretrained")


def test_an_unreachable_hub_is_noticed_within_ten_seconds():
    try:
        urllib.request.urlopen("https://huggingface.co", timeout=4).close()
        pytest.skip("the hub is reachable here")
    except OSError:
        pass
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="--weights"):
        load_model("vit_l", "pretrained")
    assert time.monotonic() - start < 10
