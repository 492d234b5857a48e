"""vitq.report: tables, strict JSON, sizes to the byte, events that read back, plots that are pictures."""
import json
import math
import re

import pytest
import torch
from helpers import quick
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import vitq
from vitq import report
from vitq.calib.histogram import Histogram
from vitq.calib.statistics import Statistics
from vitq.evaluate import LayerError, score
from vitq.nn.packed import Row
from vitq.profiling import Ceilings, Part, Profile
from vitq.timing import Timing


def test_table_aligns():
    text = report.table(("name", "ms"), [("a", "1.5"), ("longer", None), ("b", "100.25")])
    assert text.splitlines() == ["name        ms", "------  ------", "a          1.5", "longer       -", "b       100.25"]
    assert report.table(("a",), []) == "a\n-"
    with pytest.raises(ValueError, match="2 cells.*1 columns"):
        report.table(("a",), [(1, 2)])


def test_markdown_table():
    text = report.markdown_table(("a", "b"), [("x|y", None), (1, "2")])
    assert text.splitlines() == ["| a | b |", "| --- | --- |", "| x\\|y |  |", "| 1 | 2 |"]


def test_a_profile_stands_beside_its_floors():
    parts = [Part("blocks", "qkv", {"gemm": 3.0}, 2, 4_000_000, 3_000_000), Part("blocks", "norm", {"a": 4.0, "b": 1.0}, 4, 1_000_000, 0),
             Part("", "other", {"copy": 8.0}, 1, 0, 0)]
    text = report.profile_table(Profile(parts, {"blocks": 2}, "a clock"), Ceilings(2e12, 1e12))
    cells = [re.split(r" {2,}", line.strip()) for line in text.splitlines()[2:]]
    assert cells == [
        ["blocks", "qkv", "gemm", "2", "3.0", "2.0", "3.0", "1.00", "0.006", "17.6 %"],
        ["blocks", "norm", "2 kernels", "4", "5.0", "0.5", "0.0", "10.00", "0.020", "58.8 %"],
        ["a", "4.0"], ["b", "1.0"],
        ["other", "copy", "1", "8.0", "0.008", "23.5 %"],
        ["blocks", "one block", "2", "13.0", "3.0", "3.0", "3.25", "0.026", "76.5 %"],  # one qkv, two norms: least 3 + 2·0.5
        ["the model", "1", "34.0", "0.034", "100.0 %"]]


def test_json_is_strict_and_whole(tmp_path):
    path = tmp_path / "r.json"
    report.write_json(path, {"db": math.inf, "bad": math.nan, "row": LayerError("a", "qkv", 1.0), "t": Timing(1, 1, 2, 1.0),
                             "path": tmp_path, "dtype": torch.bfloat16, 3: (1, None, True)})
    data = json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert data["db"] == "inf" and float(data["db"]) == math.inf and data["bad"] == "nan"
    assert data["row"] == {"layer": "a", "role": "qkv", "sqnr_db": 1.0} and data["t"]["p90"] == 2
    assert data["dtype"] == "torch.bfloat16" and data["3"] == [1, None, True]
    with pytest.raises(TypeError):
        report.write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == data and [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_accuracy_by_class_name():
    e = score(torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 1, 2, 2]))
    figures = report.accuracy(e, ("ant", "bee", "cat"))
    assert figures["top1"] == 0.75 and figures["per_class"]["cat"] == {"recall": 0.5, "images": 2}
    text = report.accuracy_table({"float": figures, "quantized": figures})
    assert "75.00" in text and "recall cat" in text and "top5" not in text
    assert "recall" not in report.accuracy_table({"float": figures}, most_classes=2)


@pytest.mark.parametrize("recipe, backend, kernel, size", [
    ("gptq-w4a16", "reference", "torch-float32", 0.5), ("gptq-w4a16", "cpu", "torch-int4", 0.5 + 0.5),
    ("w8a8-dynamic", "reference", "torch-int32", 1), ("w8a8-dynamic", "cpu", "onednn-u8s8", 1 + 1),
    ("dgq-w4a8", "cpu", "onednn-u8s8", 0.5 + 1), ("quik-w4a4", "cpu", "onednn-u8s8", 0.5 + 1)])
def test_memory_counts_what_kernels_made_of_a_weight(recipe, backend, kernel, size):
    """In bytes a weight: the codes, and each other form of them, whose memory none shares."""
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    module = vitq.linear_module(nn.Linear(512, 512), quick(recipe, "solver=rtn"), x, backend=backend, dtype=torch.bfloat16)
    row = module.row("a", "fc1")
    if row.kernel != kernel:
        pytest.skip(row.note)
    assert row.bytes == sum(t.nbytes for t in module.state_dict().values())
    assert size - 0.1 < row.memory / 512**2 < size + 0.45 and row.memory >= row.bytes


def test_kernels_are_counted_and_reasons_kept_once():
    rows = [Row("b.0.qkv", "qkv", "W8A8", "cpu", "k", 10, 30, "fell back: x; fold"), Row("b.1.qkv", "qkv", "W8A8", "cpu", "k", 5, 6, "fold"),
            Row("head", "head", "W8A8", "reference", "torch", 1, 1)]
    groups = report.kernel_summary(rows)
    assert [(g["role"], g["count"], g["bytes"], g["memory"], g["notes"]) for g in groups] == \
        [("qkv", 2, 15, 36, ["fell back: x", "fold"]), ("head", 1, 1, 1, [])]
    assert "fell back: x; fold" in report.kernel_table(groups)
    assert len(report.layer_table(rows).splitlines()) == 5


def test_sizes_are_those_of_the_files(tmp_path):
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    save_file(model.state_dict(), tmp_path / "float.safetensors")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "a").write_bytes(bytes(100))
    (folder / "b").write_bytes(bytes(20))
    size = report.sizes(model.bfloat16(), folder)  # counted as float32 whatever it is now
    assert size.checkpoint_bytes == 120 and size.fp32_bytes == (tmp_path / "float.safetensors").stat().st_size
    assert size.ratio == 120 / size.fp32_bytes
    with pytest.raises(FileNotFoundError, match="no such folder"):
        report.sizes(model, tmp_path / "none")


ROWS = [LayerError("blocks.10.attn.qkv", "qkv", 20.0), LayerError("head", "head", 30.0), LayerError("blocks.2.mlp.fc1", "fc1", 25.0),
        LayerError("patch_embed.proj", "patch_embed", math.inf), LayerError("blocks.2", "block", 35.0),
        LayerError("blocks.2.attn.qkv", "qkv", 21.0)]


def test_tensorboard_reads_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    stats = Statistics()
    stats["b:input"], stats["a:input"] = Histogram(), Histogram(4)
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    stats["b:input"].update(x)
    stats["a:input"].update(x)
    for value in (1.0, 2.0):  # the second run takes the place of the first
        report.write_tensorboard(tmp_path / "tb", {"top1": value, "none": None, "inf": math.inf}, statistics=stats, layer_errors=ROWS)
    events = accumulator.EventAccumulator(str(tmp_path / "tb"), size_guidance={accumulator.SCALARS: 0}).Reload()
    tags = events.Tags()
    assert [e.value for e in events.Scalars("top1")] == [2.0] and "none" not in tags["scalars"] and "inf" not in tags["scalars"]
    assert [(e.step, e.value) for e in events.Scalars("layer_sqnr_db/qkv")] == [(0, 21.0), (1, 20.0)]
    drawn = events.Histograms("activations/b_input")[0].histogram_value
    assert drawn.num == 400 and sum(drawn.bucket) == 400 and drawn.min == float(x.min()) and drawn.max == float(x.max())
    assert drawn.bucket_limit[-1] >= drawn.max and "activations/a_input_channel_amax" in tags["histograms"]


def test_layers_are_drawn_in_the_order_they_run():
    ordered = [r.layer for r in sorted(ROWS, key=report._execution_order)]
    assert ordered == ["patch_embed.proj", "blocks.2.attn.qkv", "blocks.2.mlp.fc1", "blocks.2", "blocks.10.attn.qkv", "head"]


def test_plots_are_pictures(tmp_path):
    timing = Timing(10.0, 9.0, 12.0, 0.3)
    paths = [report.plot_layer_error(tmp_path / "a.png", ROWS), report.plot_layer_error(tmp_path / "b.png", ROWS[:1], "one"),
             report.plot_benchmark(tmp_path / "c.png", {"m": {"float32": timing, "failed": None}, "n": {"w8a8": timing}})]
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 600 and len(image.convert("RGB").getcolors(1 << 20)) > 3
    with pytest.raises(ValueError, match="no layers"):
        report.plot_layer_error(tmp_path / "d.png", [])
    with pytest.raises(ValueError, match="no timings"):
        report.plot_benchmark(tmp_path / "d.png", {"m": {"a": None}})


def test_bits_per_weight_count_scales_and_not_biases():
    module = vitq.linear_module(nn.Linear(64, 32), "w8a8-dynamic")
    linears, model = report.bits_per_weight(module)
    assert linears == pytest.approx(8 + 32 / 64) and model == pytest.approx(8 + 2 * 32 / 64)
    packed = vitq.linear_module(nn.Linear(64, 32), vitq.Recipe.from_yaml("w8a8-dynamic").with_overrides(["fc1.weight.bits=4"]))
    both = nn.Sequential(module, packed, nn.LayerNorm(32))
    assert report.bits_per_weight(both).linears == pytest.approx(6.5)
    assert report.bits_per_weight(both).model == pytest.approx((8.5 * 2048 + 4.5 * 2048 + 32 * (32 + 32 + 64)) / (2 * 2048 + 64))
    with pytest.raises(ValueError, match="Sequential has no quantized linear layers"):
        report.bits_per_weight(nn.Sequential(nn.Linear(2, 2)))
