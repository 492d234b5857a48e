"""tools/vit_benchmark.py and tools/module_benchmark.py at their smallest."""
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


vit, module = load_tool("vit_benchmark"), load_tool("module_benchmark")
SMALL = ["--model", "test_vit", "--val-batchsize", "2", "--repeats", "2", "--device", "cpu"]


def test_models_are_timed_tabled_and_plotted(tmp_path, capsys):
    code = vit.main([*SMALL, "--no-compile", "--recipes", "w8a8,w8a8-dynamic", "--json", str(tmp_path / "r.json"), "--plot",
                     str(tmp_path / "r.png")])
    out = capsys.readouterr().out
    assert code == 0 and "weights are random" in out and "x best 16-bit" in out and "batch 2" in out
    report = json.loads((tmp_path / "r.json").read_text())
    (cases,) = report["models"].values()
    half = next(c for c in cases if "float16" in c)
    assert list(cases) == ["float32", half, "w8a8", "w8a8-dynamic"]
    for case in cases.values():
        assert case["timing"]["median_ms"] > 0 and case["ms_per_image"] == case["timing"]["median_ms"] / 2
    assert cases["float32"]["speedup_float32"] == 1 and cases[half]["speedup_best_16_bit"] == 1
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_a_failing_compiler_is_a_row_that_says_so(capsys, monkeypatch):
    def broken(model):
        raise RuntimeError("Failed to find C compiler\nset CC")

    monkeypatch.setattr(torch, "compile", broken)
    assert vit.main([*SMALL, "--recipes", "w8a8"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "compiled" in line]
    assert "torch.compile failed: Failed to find C compiler" in line and "set CC" not in line


@pytest.mark.parametrize("args, message", [
    (["--recipes", "w3"], "w3"), (["--model", "deit_q"], "unknown model"), (["--model", ","], "at least one model"),
    (["--val-batchsize", "0"], "--val-batchsize must be at least 1"), (["--json", "no/such/x.json"], "no folder no/such"),
    (["--device", "nothing"], "device 'nothing' cannot be used")])
def test_mistakes_of_vit_benchmark(args, message, capsys):
    assert vit.main([*SMALL, "--no-compile", *args]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("layer", ["fc1", "proj"])
def test_one_layer_in_every_format(layer, tmp_path, capsys):
    path = tmp_path / "m.json"
    assert module.main(["--layer_type", layer, "--dim", "32", "--bsz", "2", "--seq_len", "5", "--repeats", "2", "--device", "cpu",
                        "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert set(rows) > {"float32", "W8A8 static", "W8A8 dynamic", "W4A8", "vitq.ops W8A8"} and len(rows) == 6
    db = {name: float(row["sqnr_db"]) for name, row in rows.items()}
    assert db["float32"] == math.inf and min(db["W8A8 static"], db["W8A8 dynamic"], db["vitq.ops W8A8"]) > 30 > db["W4A8"] > 14
    out = capsys.readouterr().out
    assert f"32 -> {32 * (4 if layer == 'fc1' else 1)}" in out and "runs as" in out


def test_shapes():
    assert module.shape("v_proj", 5120, 384) == (5120, 5120) and module.shape("down_proj", 8192, 384) == (8192, 28672)
    assert module.shape("qkv", 4096, 768) == (768, 2304) and module.shape("fc2", 4096, 384) == (1536, 384)


def test_mistakes_of_module_benchmark(capsys):
    assert module.main(["--bsz", "0"]) == 2
    assert "--bsz must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        module.main(["--layer_type", "nothing"])
    assert stop.value.code == 2
