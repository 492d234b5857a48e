"""tools/vit_benchmark.py, module_benchmark.py, gpu_benchmark.py and llm_layer_benchmark.py at their smallest."""
import json
import math
from pathlib import Path

import pytest
import torch

import gpu_benchmark as gpu
import llm_layer_benchmark as layers
import module_benchmark as module
import vit_benchmark as vit
import vitq

TOOLS = Path(__file__).resolve().parents[2] / "tools"


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


def test_a_profile_by_kernel(tmp_path, capsys):
    assert vit.main([*SMALL, "--no-compile", "--recipes", "w8a8", "--profile", "--bandwidth", "4.3", "--peak", "1600", "--json",
                     str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert "floors at 4.3 TB/s and 1600 TOPS; measured: nothing" in out and "w8a8, kernel by kernel" in out and "one block" in out
    (cases,) = json.loads((tmp_path / "r.json").read_text())["models"].values()
    profile = cases["w8a8"]["profile"]
    assert {"norm", "qkv", "attention", "proj", "fc1", "fc2", "head"} <= {part["role"] for part in profile["parts"]}
    assert profile["blocks"] == {"blocks": 6} and "profile" not in cases["float32"]


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
    (["--device", "nothing"], "device 'nothing' cannot be used"), (["--profile", "--peak", "0"], "--peak must be above 0")])
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


TINY = ["--device", "cpu", "--no-compile", "--repeats", "1", "--side", "32", "--batch", "2", "--models", "test_vit",
        "--small-models", "test_vit", "--small-batches", "1"]


def test_everything_of_one_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(gpu.GOALS, "test_vit", (1e-9, 1e9))
    paths = tmp_path / "t.json", tmp_path / "t.md"
    assert gpu.main([*TINY, "--recipes", "w8a8,w4a8", "--json", str(paths[0]), "--markdown", str(paths[1])]) == 0
    out, report, page = capsys.readouterr().out, json.loads(paths[0].read_text()), paths[1].read_text()
    titles = ["GEMM 32³", "test_vit, W8A8, each kernel of a block at batch 2", "test_vit, batch 2", "test_vit, batch 1"]
    assert [table["title"] for table in report["tables"]] == titles and all(f"## {title}" in page for title in titles)
    layers, model, small = ({row[0]: row for row in table["rows"]} for table in report["tables"][1:])
    assert list(layers) == ["norm", "qkv", "attention", "proj", "fc1", "fc2"]
    assert layers["qkv"][1] == "202 x 64 -> 192 int8" and layers["proj"][1].endswith(" + residual")
    assert list(model) == ["fp16", "w8a8", "w4a8", "torchao int8", "torchao fp8"] and list(small) == ["fp16", "w8a8", "w4a8", "dual-w4a4"]
    if not gpu.models.has_torchao():
        assert model["torchao fp8"][-1] == "ImportError: torchao is not installed"
    goals = {goal["what"]: goal for goal in report["goals"]}
    assert {"GEMM, TOPS", "test_vit qkv, time over its floor", "test_vit, W8A8 over the best 16-bit",
            "test_vit, w4a8 time over W8A8's", "test_vit at batch 1, W8A8 over the best 16-bit"} <= set(goals)
    assert goals["test_vit, w4a8 weights over W8A8's"]["found"] < 0.7
    assert "≥ 1e-09 met" in page and "≥ 1e+09 MISSED" in page and "All goals" in out and "python tools/gpu_benchmark.py" in page


def test_one_failure_does_not_lose_the_rest(capsys, monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(gpu.kernels, "time_layers", broken)
    assert gpu.main([*TINY, "--sections", "layers,gemm"]) == 1
    out = capsys.readouterr().out
    assert "each kernel of a block at batch 2: failed" in out and "RuntimeError: no such kernel" in out and "vitq W8A8" in out


def test_a_case_that_fails_is_a_row(monkeypatch):
    convert = vitq.convert

    def moody(model, recipe, *args):
        if recipe.name == "w4a8":
            raise ValueError("not today")
        return convert(model, recipe, *args)

    monkeypatch.setattr(vitq, "convert", moody)
    cases = gpu.models.time_cases(gpu.models.float_model("test_vit", torch.device("cpu")), 1, ["w4a8", "w8a8"], 1)
    assert cases["w4a8"].note == "ValueError: not today" and cases["w4a8"].timing is None and cases["w8a8"].timing.median_ms > 0


def test_goals_say_whether_they_are_met():
    assert gpu.Goal("speed", 2.25, 2.0, 2.6).cells() == ("speed", "2.25", "≥ 2 met", "≥ 2.6 MISSED")
    assert gpu.Goal("memory", 0.7, 0.75, at_least=False).cells() == ("memory", "0.70", "≤ 0.75 met", None)


def test_jobs_of_the_processes_that_compile_ahead(monkeypatch):
    started = []

    class Process:
        def __init__(self, command, **kwargs):
            started.append(command[-1])

        def wait(self, timeout=None):
            return 0

        def kill(self):
            pass

    monkeypatch.setattr(gpu.models.subprocess, "Popen", Process)
    monkeypatch.setattr(gpu.models, "has_torchao", lambda: False)
    gpu.ahead(["models", "small-batches", "peers"], list(gpu.MODELS), ["deit_s"], [1, 8], 200, torch.device("cuda"))
    jobs = [job for share in started for job in gpu.models.parse_jobs(share)]
    assert len(started) == 5 and sorted(jobs) == sorted([(name, 200, "fp16 compiled") for name in gpu.MODELS]
                                                        + [("deit_s", b, "fp16 compiled") for b in (1, 8)])


@pytest.mark.parametrize("args, message", [
    (["--sections", "gem"], "unknown section gem"), (["--batch", "0"], "--batch must be at least 1"), (["--recipes", "w3"], "w3"),
    (["--models", "deit_x"], "unknown model 'deit_x'"), (["--small-models", "x"], "unknown model 'x'"), (["--small-batches", "x"], "--small-batches must be numbers"),
    (["--markdown", "no/such/x.md"], "no folder no/such")])
def test_mistakes_of_gpu_benchmark(args, message, capsys):
    assert gpu.main([*TINY, *args]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_gpu_benchmark_without_a_gpu(capsys):
    assert gpu.main([]) == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_layers_of_language_models(tmp_path, capsys):
    path = tmp_path / "l.json"
    assert layers.main(["--device", "cpu", "--shapes", "48x64,32x128", "--rows", "1,3", "--recipes", "w4-per-channel,gptq-w4a16", "--repeats", "1",
                        "--output", str(path)]) == 0
    out, report = capsys.readouterr().out, json.loads(path.read_text())
    assert "no GPU, so these times say nothing" in out and "| 48x64 | 1 | fp16, cuBLAS |" in out and "no GPU" in report["machine"]
    cases = ["fp16, cuBLAS", "W8A8, codes given", "W4A8, codes given", "w4-per-channel", "gptq-w4a16"]
    assert [(r["shape"], r["rows"], r["case"]) for r in report["rows"]] == [(s, m, c) for s in ("48x64", "32x128") for m in (1, 3) for c in cases]
    assert all(row["us"] > 0 and row["speedup"] > 0 for row in report["rows"])


def test_a_layer_that_fails_is_a_row(capsys, monkeypatch):
    module = vitq.linear_module

    def moody(linear, recipe, *args, **kwargs):
        if recipe.name == "gptq-w4a16":
            raise ValueError("not today")
        return module(linear, recipe, *args, **kwargs)

    monkeypatch.setattr(vitq, "linear_module", moody)
    assert layers.main(["--device", "cpu", "--shapes", "32x64", "--rows", "2", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("gptq-w4a16 |  |  |  |  | ValueError: not today" in line for line in lines) and any("| w4-per-channel | " in line for line in lines)


@pytest.mark.parametrize("args, message", [
    (["--shapes", "4096"], "'4096' is not NxK"), (["--shapes", "0x32"], "'0x32' is not NxK"), (["--rows", "0"], "--rows must be numbers from 1"),
    (["--recipes", "w3"], "w3"), (["--recipes", ","], "at least one"), (["--repeats", "0"], "--repeats must be at least 1"),
    (["--recipes", "erq-w3a3-paper"], "is for simulation"), (["--output", "no/such/x.json"], "no folder no/such"), (["--device", "nothing"], "cannot be used")])
def test_mistakes_of_llm_layer_benchmark(args, message, capsys):
    assert layers.main(["--device", "cpu", *args]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_llm_layer_benchmark_without_a_gpu(capsys):
    assert layers.main([]) == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_tools_are_thin():
    for path in TOOLS.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) < 250, path.name
