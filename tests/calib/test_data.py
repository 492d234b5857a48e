"""vitq.calib.data: splits, layouts, broken images, streams."""
import hashlib
import os
import random
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vitq.calib.data import DEMO_CLASSES, ImageData, batches, data_config, demo_split, labels_match, open_images

CFG = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "crop_pct": 0.9,
       "crop_mode": "center"}


def picture(path, seed, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def class_folder(tmp_path):
    for c, name in enumerate(("ant", "bee", "cat")):
        for i in range(6):
            picture(tmp_path / "data" / name / f"{i}.png", 100 * c + i)
    return tmp_path / "data"


def paths(dataset):
    return [s.path for s in dataset.samples]


# --- demo ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def split():
    pytest.importorskip("conformal_clip_data")
    return demo_split()


def test_demo_split_is_stratified_disjoint_and_pinned(split):
    train, test = split["train"], split["test"]
    assert (len(train), len(test)) == (1600, 400)
    assert {c: sum(label == i for _, label in test) for i, c in enumerate(DEMO_CLASSES)} == \
        {"global": 100, "local": 100, "nominal": 200}
    assert not {p for p, _ in train} & {p for p, _ in test}
    names = "\n".join(f"{DEMO_CLASSES[label]}/{os.path.basename(p)}" for p, label in test)
    # The demo weights were trained on the other 1600: a change here would let training images into the test.
    pinned = "f8b697fb6edebecdb660024eb7e86776ec6a257b01d5f75d953013acdebf8a60"
    assert hashlib.sha256(names.encode()).hexdigest() == pinned


def test_demo_seed_orders_calibration_only(split):
    a, b, a2 = (open_images("demo", CFG, seed=s) for s in (0, 1, 0))
    assert paths(a.calib) != paths(b.calib) and sorted(paths(a.calib)) == sorted(paths(b.calib))
    assert paths(a.calib) == paths(a2.calib)
    assert paths(a.eval) == paths(b.eval) == [p for p, _ in split["test"]]
    assert a.class_names == DEMO_CLASSES and a.eval_labels_known and a.name == "demo"
    assert {s.label for s in a.eval.samples[:30]} == {0, 1, 2}  # a prefix is a fair sample


def test_demo_leaves_the_global_random_state_alone(split):
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    next(batches(open_images("demo", CFG, seed=5).calib, 4))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_demo_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "conformal_clip_data", None)
    with pytest.raises(ImportError, match=r"pip install 'vitq\[demo\]'"):
        open_images("demo", CFG)


def test_demo_split_of_a_wrong_root(tmp_path):
    with pytest.raises(FileNotFoundError, match="global"):
        demo_split(tmp_path)


# --- folders ------------------------------------------------------------------------------------------------------

def test_train_and_val_folders(tmp_path):
    for part, n in (("train", 4), ("val", 3)):
        for c, name in enumerate(("ant", "bee")):
            for i in range(n):
                picture(tmp_path / part / name / f"{i}.png", 1000 * n + 10 * c + i)
    data = open_images(str(tmp_path), CFG)
    assert all("/train/" in p for p in paths(data.calib)) and all("/val/" in p for p in paths(data.eval))
    assert data.class_names == ("ant", "bee") and data.eval_labels_known and not data.skipped
    (x, y), = batches(data.eval, 64)
    assert x.shape == (6, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert sorted(y.tolist()) == [0, 0, 0, 1, 1, 1]


def test_class_folders_are_split_by_seed(class_folder):
    a, b = open_images(str(class_folder), CFG, seed=0), open_images(str(class_folder), CFG, seed=1)
    assert len(a.calib) == len(a.eval) == 9 and a.class_names == ("ant", "bee", "cat")
    assert not set(paths(a.calib)) & set(paths(a.eval))
    assert set(paths(a.calib)) != set(paths(b.calib))


def test_flat_folder_has_no_labels(tmp_path):
    for i in range(7):
        picture(tmp_path / f"{i}.png", i)
    data = open_images(str(tmp_path), CFG)
    assert not data.eval_labels_known and data.class_names == ()
    assert len(data.calib) == 3 and len(data.eval) == 4
    assert {y for _, y in data.eval} == {-1}


def test_no_image_is_in_both_sets_through_links_or_copies(tmp_path):
    for i in range(4):
        picture(tmp_path / "val" / "ant" / f"{i}.png", i)
        picture(tmp_path / "train" / "ant" / f"own{i}.png", 50 + i)
    os.symlink(tmp_path / "val" / "ant" / "0.png", tmp_path / "train" / "ant" / "link.png")
    (tmp_path / "train" / "ant" / "copy.png").write_bytes((tmp_path / "val" / "ant" / "1.png").read_bytes())
    assert len(list(open_images(str(tmp_path), CFG).calib)) == 4
    flat = tmp_path / "flat"
    for i in range(4):
        picture(flat / f"{i}.png", i)
        os.symlink(flat / f"{i}.png", flat / f"link{i}.png")
    os.symlink(flat, flat / "loop")
    data = open_images(str(flat), CFG)
    assert len(data.calib) + len(data.eval) == 4


def test_only_copies_to_calibrate_with(tmp_path):
    for part in ("train", "val"):
        picture(tmp_path / part / "ant" / "0.png", 1)
    with pytest.raises(ValueError, match="copy of an evaluation image"):
        open_images(str(tmp_path), CFG)


def test_unreadable_images_are_named_and_skipped(class_folder, caplog):
    bad = [class_folder / "ant" / "broken.jpg", class_folder / "bee" / "empty.png", class_folder / "cat" / "cut.png"]
    whole = picture(class_folder / "cat" / "whole.png", 9).read_bytes()
    for path, content in zip(bad, (b"not an image", b"", whole[: len(whole) // 2])):
        path.write_bytes(content)
    data = open_images(str(class_folder), CFG)
    seen = len(list(data.calib)) + len(list(data.eval))
    assert seen == 19 and sorted(data.skipped) == sorted(map(str, bad))
    assert "unreadable image" in caplog.text and "broken.jpg" in caplog.text
    list(data.eval)
    assert len(data.skipped) == 3  # a second pass counts nothing twice


def test_unreadable_images_refused(class_folder):
    (class_folder / "ant" / "broken.jpg").write_bytes(b"not an image")
    data = open_images(str(class_folder), CFG, unreadable="error")
    with pytest.raises(ValueError, match="broken.jpg"):
        list(data.calib), list(data.eval)


def test_every_mode_gives_rgb(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (40, 40), dtype=np.uint8)
    rgb = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    for mode in ("L", "RGBA", "P", "1", "LA"):
        rgb.convert(mode).save(tmp_path / f"{mode}.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "i16.png")
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "float.tif")
    rgb.convert("P").save(tmp_path / "clear.png", transparency=bytes(range(256)))
    data = open_images(str(tmp_path), CFG, unreadable="error")
    images = {os.path.basename(p): x for d in (data.calib, data.eval) for p, (x, _) in zip(paths(d), d)}
    assert len(images) == 10 and all(x.shape == (3, 32, 32) and torch.isfinite(x).all() for x in images.values())
    assert torch.equal(images["i16.png"], images["grey.png"])  # scaled, not clipped to white
    assert torch.equal(images["float.tif"], images["grey.png"])


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (300, 5), (32, 32)])
def test_any_size_comes_out_at_the_input_size(tmp_path, size):
    for i in range(2):
        picture(tmp_path / f"{i}.png", i, size)
    for mode in ("center", "squash", "border"):
        for x, _ in batches(open_images(str(tmp_path), {**CFG, "crop_mode": mode}).eval, 8):
            assert x.shape == (1, 3, 32, 32)


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_images(str(tmp_path / "nowhere"), CFG)
    with pytest.raises(ValueError, match="no image files"):
        open_images(str(tmp_path), CFG)
    picture(tmp_path / "one.png", 0)
    with pytest.raises(ValueError, match="at least two"):
        open_images(str(tmp_path), CFG)
    with pytest.raises(ValueError, match="is a file"):
        open_images(str(tmp_path / "one.png"), CFG)
    junk = tmp_path / "junk"
    junk.mkdir()
    for i in range(4):
        (junk / f"{i}.jpg").write_bytes(b"junk%d" % i)
    with pytest.raises(ValueError, match="none of its 2 images"):
        open_images(str(junk), CFG)
    (tmp_path / "two" / "train" / "ant").mkdir(parents=True)
    picture(tmp_path / "two" / "val" / "ant" / "0.png", 0)
    with pytest.raises(ValueError, match="train holds no image files"):
        open_images(str(tmp_path / "two"), CFG)


def test_bad_arguments(class_folder):
    for kwargs, words in (({"unreadable": "maybe"}, "'skip' or 'error'"), ({"limit": 0}, "limit")):
        with pytest.raises(ValueError, match=words):
            open_images(str(class_folder), CFG, **kwargs)
    with pytest.raises(ValueError, match="input_size"):
        open_images(str(class_folder), {**CFG, "input_size": [1, 32, 32]})
    with pytest.raises(ValueError, match="data_config needs"):
        open_images(str(class_folder), {"mean": [0.5] * 3})
    with pytest.raises(TypeError, match="hf:NAME"):
        open_images(7, CFG)


def test_batches_and_limits(class_folder):
    data = open_images(str(class_folder), CFG)
    assert [len(y) for _, y in batches(data.eval, 4)] == [4, 4, 1]
    assert [len(y) for _, y in batches(data.eval, 4, limit=6)] == [4, 2]
    one, two = (torch.cat([x for x, _ in batches(data.eval, b)]) for b in (2, 9))
    assert torch.equal(one, two)
    assert torch.equal(torch.stack([data.eval[i][0] for i in range(9)]), one)
    assert len(list(open_images(str(class_folder), CFG, limit=5).eval)) == 5
    with pytest.raises(ValueError, match="batch_size"):
        next(batches(data.eval, 0))
    assert [len(y) for _, y in batches([(torch.zeros(3, 4, 4), 1)] * 3, 2)] == [2, 1]


def test_data_loader_with_workers_gives_every_image_once(class_folder):
    data = open_images(str(class_folder), CFG)
    labels = torch.cat([y for _, y in DataLoader(data.eval, batch_size=2, num_workers=2)])
    assert sorted(labels.tolist()) == sorted(s.label for s in data.eval.samples)


# --- Hugging Face -------------------------------------------------------------------------------------------------

class FakeStream:
    """As much of datasets.IterableDataset as vitq may use."""

    def __init__(self, rows, features, order=None):
        self.rows, self.features, self.order = rows, features, order

    def __iter__(self):
        return iter(self.rows)

    def cast_column(self, column, feature):
        return FakeStream(self.rows, self.features)

    def shuffle(self, seed, buffer_size):
        rows = list(self.rows)
        random.Random(seed).shuffle(rows)
        return FakeStream(rows, self.features)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Installs a fake `datasets`; the returned dict maps split -> stream."""
    class ClassLabel:
        names = ["ant", "bee"]

    features = {"id": object(), "picture": type("Image", (), {})(), "label": ClassLabel()}

    def stream(first, count, **changes):
        rows = [{"id": i, "picture": {"bytes": picture(tmp_path / f"{i}.png", i).read_bytes(), "path": f"{i}.png"},
                 "label": i % 2} for i in range(first, first + count)]
        return FakeStream(rows, {**features, **changes})

    splits = {"train": stream(0, 20), "test": stream(50, 8)}
    fake = types.ModuleType("datasets")
    fake.Image = lambda decode: None

    def load_dataset(name, streaming):
        if name != "some/name":
            raise FileNotFoundError(f"no {name} on the hub")
        return splits

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return splits


def keys(dataset):
    return [round(x.double().sum().item(), 6) for x, _ in dataset]


def test_hf_train_calibrates_and_test_evaluates(hub):
    data = open_images("hf:some/name", CFG)
    assert len(keys(data.calib)) == 20 and len(keys(data.eval)) == 8
    assert data.class_names == ("ant", "bee") and data.eval_labels_known and data.name == "hf:some/name"
    assert [y for _, y in data.eval] == [0, 1] * 4
    assert keys(data.calib) != keys(open_images("hf:some/name", CFG, seed=1).calib)


@pytest.mark.parametrize("only_split", [False, True])
def test_hf_one_split_is_dealt_in_two(hub, only_split):
    if only_split:
        del hub["test"]
    data = open_images("hf:some/name" if only_split else "hf:some/name:train", CFG)
    a, b = keys(data.calib), keys(data.eval)
    assert a and b and len(a) + len(b) == 20 and not set(a) & set(b)


def test_hf_unreadable_examples_are_skipped_or_refused(hub):
    hub["test"].rows[3]["picture"] = {"bytes": b"junk", "path": "odd.png"}
    hub["test"].rows[4]["picture"] = None
    data = open_images("hf:some/name", CFG)
    assert len(keys(data.eval)) == 6 and data.skipped == ["example 3 (odd.png)", "example 4"]
    with pytest.raises(ValueError, match="odd.png"):
        keys(open_images("hf:some/name", CFG, unreadable="error").eval)


def test_hf_decoded_images_without_features_or_labels(hub, tmp_path):
    for name, stream in hub.items():
        rows = [{"picture": Image.open(tmp_path / r["picture"]["path"])} for r in stream.rows]
        hub[name] = FakeStream(rows, None)
    data = open_images("hf:some/name", CFG, limit=3)
    assert len(keys(data.eval)) == 3 and not data.eval_labels_known and data.class_names == ()


def test_hf_mistakes(hub, monkeypatch):
    with pytest.raises(ValueError, match="no split 'val'; it has train, test"):
        open_images("hf:some/name:val", CFG)
    with pytest.raises(ValueError, match="other/name"):
        open_images("hf:other/name", CFG)
    with pytest.raises(ValueError, match="hf:NAME"):
        open_images("hf:", CFG)
    hub["test"].features = {"text": object()}
    with pytest.raises(ValueError, match=r"no column holds images; the columns are text"):
        open_images("hf:some/name", CFG)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        open_images("hf:some/name", CFG)


# --- what belongs to a model --------------------------------------------------------------------------------------

def test_data_config_is_plain_and_follows_the_models_size():
    import json

    import timm
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=1)
    cfg = data_config(model)
    assert json.loads(json.dumps(cfg)) == cfg
    assert cfg["input_size"] == [3, 96, 96] and set(cfg) == set(CFG)


def test_labels_match():
    from timm.data import ImageNetInfo
    info = ImageNetInfo("imagenet-1k")
    wnids, words = tuple(info.label_names()), tuple(info.label_descriptions())

    def data(names, known=True):
        return ImageData(None, None, tuple(names), "x", known)

    assert labels_match(("a", "b"), 2, data(("a", "b")))
    assert not labels_match(("a", "b"), 2, data(("b", "a")))
    assert not labels_match(("a", "b"), 2, data(("a", "b"), known=False))
    assert not labels_match(None, 2, data(("a", "b")))
    assert not labels_match(None, 1000, data(("a", "b")))
    assert labels_match(None, 1000, data(wnids))
    assert labels_match(wnids, 1000, data(wnids)) and labels_match(wnids, 1000, data(words))
    assert not labels_match(wnids, 1000, data(words[::-1])) and not labels_match(wnids, 1000, data(wnids[::-1]))
    assert not labels_match(None, 1000, data(f"thing {i}" for i in range(1000)))
    assert not labels_match(wnids, 1000, data(DEMO_CLASSES))
