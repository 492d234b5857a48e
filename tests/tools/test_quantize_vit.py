"""tools/quantize_vit.py, in process: the whole job on a tiny model and folder, and what is said of every mistake."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import run_tool
from PIL import Image
from safetensors.torch import save_file

import quantize_vit
import vitq

SMALL = ["--model", "test_vit", "--calib-size", "8", "--batch-size", "4", "--device", "cpu"]
CLASSES = ("ant", "bee", "cat")


def run(*args):
    return run_tool(quantize_vit, *args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two halves of three classes; each half of the pixels' colours differs, and one file of val is broken."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 3)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((180, 180)).save(root / part / name / f"{i}.png")
    (root / "val" / "cat" / "broken.png").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights that knows its classes: those of `folder`."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    path = tmp_path_factory.mktemp("weights") / "ants.safetensors"
    save_file(model.state_dict(), path, metadata={"vitq_weights": "1", "class_names": json.dumps(CLASSES)})
    return path


@pytest.fixture(scope="module")
def done(folder, weights, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "new" / "folder"
    return output, *run(*SMALL, "--weights", weights, "--data", folder, "--output", output)


def test_everything_is_printed(done):
    output, code, out, err = done
    assert code == 0, err
    for text in ("model test_vit", "top1", "recall ant", "recall cat", "equal predictions", "logits SQNR", "What runs", "qkv",
                 "Largest errors", "ms an image", "float32", "float16", "of the float32 file", "logits are bit-identical",
                 f"wrote checkpoint   {output / 'checkpoint'}", f"wrote report       {output / 'report.json'}"):
        assert text in out, text
    assert "note:" not in out  # the labels are the model's own and the weights known


def test_everything_is_in_the_report(done):
    output, *_ = done
    report = json.loads((output / "report.json").read_text())
    assert {"vitq", "torch", "model", "weights", "recipe", "data", "calibration_images", "device", "dtype", "seed", "images",
            "agreement", "accuracy", "layers", "kernels", "layer_sqnr", "speed", "size", "reload", "files", "notes",
            "skipped_images", "seconds"} <= set(report)
    assert (report["calibration_images"], report["images"]) == (8, 9)
    assert report["calibration"]["seconds"] > 0 and report["calibration"]["memory_mb"] >= 0
    assert report["recipe"]["name"] == "erq-w8a8" and report["weights"].startswith("file:ants.safetensors:")
    for model in ("float", "quantized"):
        per_class = report["accuracy"][model]["per_class"]
        assert {c: f["images"] for c, f in per_class.items()} == dict.fromkeys(CLASSES, 3)
        assert report["accuracy"][model]["top1"] == pytest.approx(np.mean([f["recall"] for f in per_class.values()]))
        assert report["accuracy"][model]["top5"] is None
    assert report["agreement"]["sqnr_db"] > 15 and 0 <= report["agreement"]["equal"] <= 1
    db = [row["sqnr_db"] for row in report["layer_sqnr"]]
    assert db == sorted(db) and {"qkv", "proj", "pv", "fc1", "fc2", "block", "head"} <= {row["role"] for row in report["layer_sqnr"]}
    assert sum(g["count"] for g in report["kernels"]) == len(report["layers"])
    assert set(report["speed"]["models"]) == {"float32", report["speed"]["best_16_bit"][6:], "quantized"}
    assert report["reload"] == {"bit_identical": True, "images": 8}
    assert len(report["skipped_images"]) == 1 and report["skipped_images"][0].endswith("broken.png")


def test_everything_is_written(done, weights):
    output, *_ = done
    report = json.loads((output / "report.json").read_text())
    assert {p.name for p in output.iterdir()} == {"checkpoint", "report.json", "layers.txt", "tensorboard", "layer_error.png"}
    assert all(Path(path).exists() for path in report["files"].values())
    assert report["size"]["checkpoint_bytes"] == sum(p.stat().st_size for p in (output / "checkpoint").iterdir())
    assert len((output / "layers.txt").read_text().splitlines()) == len(report["layers"]) + 2
    assert list((output / "tensorboard").glob("events.out.tfevents.*"))
    model = vitq.load(output / "checkpoint")
    assert model.vitq.source["class_names"] == list(CLASSES) and model.vitq.source["weights"] == report["weights"]
    assert model.vitq.source["data_config"]["input_size"] == [3, 160, 160] and model.num_classes == 3


def test_json_alone_and_no_top1_for_other_classes(folder, tmp_path):
    code, out, err = run(*SMALL, "--weights", "random", "--data", folder, "--output", tmp_path / "o", "--json", "--limit", 5,
                         "--set", "head.bits=16", "--seed", 3)
    report = json.loads(out)
    assert code == 0 and report["accuracy"] is None and report["images"] == 5 and report["weights"] == "random:3"
    assert any("random weights" in note for note in report["notes"])
    assert "float" in next(row["format"] for row in report["layers"] if row["layer"] == "head")
    assert report == json.loads((tmp_path / "o" / "report.json").read_text())


def test_demo_images_for_another_model_and_a_dynamic_recipe(tmp_path):
    pytest.importorskip("conformal_clip_data")
    code, out, err = run(*SMALL, "--weights", "random", "--output", tmp_path / "o", "--recipe", "w8a8-dynamic", "--limit", 4, "--quiet")
    assert code == 0, err
    assert "images like the model's own calibrate better" in out and "--data PATH" in out and "hf:NAME" in out
    assert "no top-1" in out and "top1" not in out and "calibrating" not in out
    assert json.loads((tmp_path / "o" / "report.json").read_text())["calibration_images"] == 0


def test_a_checkpoint_that_differs_is_exit_code_1(folder, tmp_path, monkeypatch):
    load = vitq.load

    def damaged(*args, **kwargs):
        model = load(*args, **kwargs)
        model.head.bias.add_(1e-3)
        model.head.invalidate()
        return model

    monkeypatch.setattr(vitq, "load", damaged)
    code, out, _ = run(*SMALL, "--weights", "random", "--data", folder, "--output", tmp_path / "o", "--limit", 4)
    assert code == 1 and "logits are DIFFERENT" in out


@pytest.mark.parametrize("args, message", [
    (["--model", "deit_q"], "unknown model 'deit_q'.*deit_t"), (["--recipe", "w3a3"], "w3a3.*shipped: .*w8a8"),
    (["--set", "head.bit=4"], "head.bit: unknown key.*bits"), (["--set", "head.weight.bits=9"], "9"), (["--calib-size", "0"], "calib_size"),
    (["--weights", "nothing.safetensors"], "no such file of weights"), (["--data", "no/such/folder"], "no such folder: no/such/folder"),
    (["--device", "nothing"], "device .nothing. cannot be used"), (["--batch-size", "0"], "--batch-size must be at least 1"),
    (["--model", "resnet18"], "no adapter for.*ResNet"), (["--limit", "0"], "limit must be at least 1"),
    (["--memory", "0"], "--memory must be at least 0.001, got 0"), (["--backend", "cuda"], "--backend cuda cannot run on cpu"),
    (["--recipe", "erq-w4a4-paper"], "erq-w4a4-paper is for simulation")])
def test_mistakes_are_one_line_and_leave_nothing(args, message, folder, tmp_path):
    output = tmp_path / "o"
    code, _, err = run(*SMALL, "--weights", "random", "--data", folder, "--output", output, *args)
    lines = [line for line in err.splitlines() if line.startswith("quantize_vit: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err
    assert re.search(message, lines[0]), lines[0]
    assert not output.exists()


def test_a_folder_that_cannot_be_written_is_found_before_any_work(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(vitq, "load_model", lambda *a, **k: pytest.fail("work began"))
    code, _, err = run(*SMALL, "--data", folder, "--output", tmp_path / "file" / "o")
    assert code == 2 and "cannot write to the folder" in err and "--output" in err
    (tmp_path / "o" / "checkpoint").mkdir(parents=True)
    (tmp_path / "o" / "checkpoint" / "thesis.tex").write_text("years of work")
    code, _, err = run(*SMALL, "--data", folder, "--output", tmp_path / "o")
    assert code == 2 and "no vitq checkpoint" in err and (tmp_path / "o" / "checkpoint" / "thesis.tex").exists()


def test_unreadable_images_are_refused_by_flag(folder, tmp_path):
    code, _, err = run(*SMALL, "--weights", "random", "--data", folder, "--output", tmp_path / "o", "--unreadable", "error")
    assert code == 2 and "broken.png" in err


def test_too_few_images_to_calibrate(folder, tmp_path):
    code, _, err = run(*SMALL, "--weights", "random", "--data", folder, "--output", tmp_path / "o", "--calib-size", 512)
    assert code == 2 and "12 images" in err and "needs at least 32" in err


def test_without_images(tmp_path, monkeypatch):
    monkeypatch.setenv("VITQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(vitq.synthesize.__kwdefaults__, "steps", 2)
    for _ in range(2):
        code, out, _ = run(*SMALL, "--weights", "random", "--data", "synthetic", "--output", tmp_path / "o", "--recipe", "erq-w4a4", "--memory", 0.001)
        assert code == 0 and "no top-1, only how the two models agree" in out and "logits are bit-identical" in out
    assert len(list((tmp_path / "cache").iterdir())) == 1
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert (report["data"], report["images"], report["calibration_images"]) == ("synthetic", 16, 8)


def test_the_tool_is_thin():
    text = Path(quantize_vit.__file__).read_text()
    assert len(text.splitlines()) < 250 and "from vitq" not in text and "import timm" not in text
