"""Which tile a GEMM takes: measured tables, their cache, and the estimate behind them."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from vitq.cuda import loader, tuning
from vitq.cuda.tuning import Case

VIT = [Case(m, n, k, codes=codes, activation=activation, residual=not codes)
       for m in (197, 8 * 197, 200 * 197)
       for n, k, codes, activation in ((1152, 384, True, ""), (384, 384, False, ""), (1536, 384, True, "gelu"),
                                       (384, 1536, False, ""), (2304, 768, True, ""), (768, 3072, False, ""),
                                       (3072, 1024, True, "gelu"))]
ODD = [Case(1, 10, 48), Case(3, 1, 5), Case(12544, 96, 48), Case(8192, 8192, 8192, codes=True), Case(50, 1000, 384),
       Case(300, 100, 192, segments=2, shift=True), Case(2048, 4096, 3840, fp=256, shift=True), Case(300, 1152, 384, segments=2, codes=True), Case(300, 100, 192, fp=32), Case(300, 100, 96, activation="gelu")]


@pytest.fixture
def hopper(monkeypatch, tmp_path: Path):
    """An H200 that is not there."""
    monkeypatch.setenv("VITQ_CACHE", str(tmp_path))
    monkeypatch.setattr(loader, "kernel_arch", lambda device: 90)
    monkeypatch.setattr(tuning, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(tuning, "cache_file", lambda device: tmp_path / "tuning.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    for cached in (tuning.pick, tuning.cached, tuning.shipped):
        cached.cache_clear()
    yield tmp_path
    for cached in (tuning.pick, tuning.cached, tuning.shipped):
        cached.cache_clear()


@pytest.mark.parametrize("case", VIT + ODD, ids=str)
def test_every_case_gets_a_tile_that_fits(case: Case, hopper) -> None:
    kernel, index = tuning.pick(case, 0)
    if case.m <= loader.FEW_ROWS and case.plain:
        assert (kernel, index) == ("few", -1)
    else:
        assert kernel == "sm90" and tuning.TILES[kernel][index].fits(case)


def test_few_rows_have_their_kernel_on_every_chip(hopper, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = Case(16, 384, 384, weight_bits=4, groups=64)
    for arch in (80, 90):
        monkeypatch.setattr(loader, "kernel_arch", lambda device, arch=arch: arch)
        tuning.pick.cache_clear()
        assert tuning.pick(groups, 0) == tuning.pick(Case(1, 384, 384, weight_bits=4, input_bits=4, fp=256), 0) == ("few", -1)
        assert tuning.pick(Case(1, 384, 384, segments=2), 0)[0] != "few" != tuning.pick(Case(17, 384, 384), 0)[0]
        with pytest.raises(RuntimeError, match="no kernel for"):
            tuning.pick(groups._replace(m=17), 0)


def test_packed_weights_that_hopper_does_not_widen_go_to_the_kernel_for_all_chips(hopper) -> None:
    assert tuning.pick(Case(200, 384, 384, weight_bits=4, segments=2), 0) == ("sm80", -1)
    assert tuning.pick(Case(200, 384, 384, weight_bits=4, input_bits=4), 0) == ("sm80", -1)


@pytest.mark.parametrize("case", [Case(200, 384, 384, 4), Case(17, 4096, 4096, 4, groups=128), Case(2048, 4096, 3840, 4, fp=256, shift=True),
                                  Case(2048, 11008, 4096, 4, groups=4096, codes=True, activation="gelu")], ids=str)
def test_packed_weights_stream_on_hopper(case: Case, hopper) -> None:
    kernel, index = tuning.pick(case, 0)
    tile = tuning.TILES[kernel][index]
    assert kernel == "sm90" and index in tuning.PACKED and tile.fits(case) and not tile.fits(case._replace(groups=192))


def test_weights_are_widened_before_the_gemm_where_it_does_not(hopper) -> None:
    gpu, never = torch.device("cuda", 0), sys.maxsize
    assert tuning.widen_rows(gpu, 4096) == never and tuning.widen_rows(gpu, 4096, 1, 128) == tuning.GROUP_ROWS
    assert tuning.widen_rows(gpu, 384) == tuning.widen_rows(gpu, 384, 1, 128) == tuning.widen_rows(gpu, 4096, 2) == tuning.WIDEN_ROWS
    assert tuning.widen_rows(gpu, 4096, 1, 64) == loader.FEW_ROWS and tuning.widen_rows(gpu, 4096, 1, 0) == 0
    cpu = torch.device("cpu")
    assert tuning.widen_rows(cpu, 4096) == never and tuning.widen_rows(cpu, 4096, 1, 128) == loader.FEW_ROWS


def test_tiles_are_numbered_in_order() -> None:
    for kernel, tiles in tuning.TILES.items():
        assert [tile.index for tile in tiles] == list(range(len(tiles))) and {tile.name for tile in tiles} == {kernel}


def test_the_table_of_tiles_is_the_sources() -> None:
    folder = Path(tuning.__file__).parent / "csrc"
    hopper = re.findall(r"using Config(\d+) = Tile<(\d+), (\d+), (\d+), (true|false)>;", (folder / "gemm_sm90.cuh").read_text())
    assert [(int(i), int(n), int(g), int(p), resident == "true") for i, n, g, p, resident in hopper] == [
        (t.index, t.columns, t.groups, t.pieces, t.resident) for t in tuning.TILES["sm90"]]
    packed = re.findall(r"using Packed(\d+) = Tile<(\d+), (\d+), (\d+), false, 4>;", (folder / "gemm_sm90.cuh").read_text())
    assert [tuple(map(int, each)) for each in packed] == [(t.index, t.columns, t.groups, t.pieces) for t in tuning.TILES["sm90"] if t.index in tuning.PACKED]
    most = {name: int(value) for name, value in re.findall(r"constexpr int (MAX_\w+) = (\d+)", (folder / "gemm_sm90_tile.cuh").read_text())}
    warps = int(re.search(r"constexpr int WIDENERS = (\d+)", (folder / "gemm_sm90_tile.cuh").read_text())[1])
    assert "MAX_PACKED = 4 * WIDENERS" in (folder / "gemm_sm90_tile.cuh").read_text() and warps == 3
    assert 8 * (2 * most["MAX_STAGES"] + most["MAX_RESIDENT"] + 4 * warps) == 416, "of barriers, in HopperTile.fits"
    depths = re.search(r"N \* PIECES >= 256 \? (\d) : N == 128 \? (\d) : (\d);", (folder / "gemm_sm90_tile.cuh").read_text())
    assert tuning.PACKED == {t.index: int(depths[1 if t.columns * t.pieces >= 256 else 2 if t.columns == 128 else 3])
                             for t in tuning.TILES["sm90"] if t.index in tuning.PACKED}
    ampere = re.search(r"constexpr Tile TILES\[\] = \{(.*?)\n\};", (folder / "gemm_sm80.cuh").read_text(), re.DOTALL)[1]
    assert len(re.findall(r"^ *\{", ampere, re.MULTILINE)) == len(tuning.TILES["sm80"])
    for source, fits in (("segments", Case(9, 64, 64, segments=2)), ("mixed", Case(9, 64, 64, fp=16)), ("act_float", Case(9, 64, 64, activation="gelu"))):
        cases = re.findall(r"case (\d+): return launch<", (folder / f"gemm_sm90_{source}.cu").read_text())
        assert [int(i) for i in cases] == [t.index for t in tuning.TILES["sm90"] if t.fits(fits)]


@pytest.mark.gpu
def test_the_table_of_tiles_is_the_librarys() -> None:
    library = loader.library()
    for kernel in tuning.TILES:
        count = getattr(library, f"vitq_linear_{kernel}_configs")()
        assert count in (len(tuning.TILES[kernel]), 0)


def test_a_measured_tile_comes_first(hopper: Path) -> None:
    case = Case(39400, 1152, 384, codes=True)
    estimated = tuning.pick(case, 0)
    other = next(t.index for t in tuning.TILES["sm90"] if t.fits(case) and t.index != estimated[1])
    tuning.write_cache(hopper / "tuning.json", {case.key: {"39400": f"sm90:{other}", "197": "sm90:99"}})
    for cached in (tuning.pick, tuning.cached):
        cached.cache_clear()
    assert tuning.pick(case, 0) == ("sm90", other)
    assert tuning.pick(case._replace(m=30000), 0) == ("sm90", other)  # near enough
    assert tuning.pick(case._replace(m=190), 0)[1] != 99  # measured, but no such tile in this library


def test_nearest() -> None:
    assert tuning.nearest({"100": "a", "1000": "b"}, 120) == "a"
    assert tuning.nearest({"100": "a", "1000": "b"}, 900) == "b"
    assert tuning.nearest({"100": "a", "1000": "b"}, 300) is None
    assert tuning.nearest({}, 5) is None


def test_the_shipped_table_names_tiles() -> None:
    for gpu, table in json.loads(tuning.TABLE.read_text()).items():
        assert gpu not in tuning.ALIASES
        for key, measured in table.items():
            for rows, name in measured.items():
                kernel, index = tuning.split(name)
                assert int(rows) > 0 and index < len(tuning.TILES[kernel]), (gpu, key)


@pytest.mark.parametrize("content",
                         ["", "{", "[]", '{"a": 3}', '{"a": {"x": "sm90:1"}}', '{"a": {"1": "sm70:1"}}', '{"a": {"1": null}}',
                          "\x00\xff"])
def test_a_damaged_cache_is_ignored_with_a_word(content: str, tmp_path: Path, caplog) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(content)
    with caplog.at_level(logging.WARNING, "vitq"):
        assert tuning.read_cache(path) == {}
    assert len(caplog.records) == 1 and "is ignored" in caplog.text and str(path) in caplog.text


def test_the_cache_is_replaced_in_one_step(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "new" / "tuning.json"
    assert tuning.read_cache(path) == {}
    tuning.write_cache(path, {"a": {"1": "sm90:1"}})

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        tuning.write_cache(path, {"b": {}})
    monkeypatch.undo()
    assert tuning.read_cache(path) == {"a": {"1": "sm90:1"}} and os.listdir(path.parent) == ["tuning.json"]


def test_the_cache_folder(monkeypatch) -> None:
    monkeypatch.setenv("VITQ_CACHE", "/a")
    assert tuning.cache_folder() == Path("/a")
    monkeypatch.delenv("VITQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert tuning.cache_folder() == Path("/b/vitq")


def test_names() -> None:
    assert tuning.split("sm90:12") == ("sm90", 12) and tuning.split("few:0") == ("few", 0)
    for wrong in ("", "sm90", "sm70:1", "sm90:x", "sm90:-1"):
        with pytest.raises(ValueError, match="such as 'sm90:3'"):
            tuning.split(wrong)
    assert Case(1, 2, 3, 4, 8, 2, 16, True, True, "gelu").key == "2x3 w4a8 codes gelu 2segments fp16 shift"


@pytest.mark.parametrize("case",
                         [Case(64, 96, 70), Case(64, 96, 70, weight_bits=4), Case(64, 96, 70, weight_bits=4, input_bits=4),
                                  Case(64, 37, 192, segments=2, shift=True, fp=16, residual=True),
                                  Case(5, 40, 64, codes=True, activation="gelu"), Case(3, 40, 300, weight_bits=4, groups=64)], ids=str)
def test_examples_are_valid_arguments(case: Case) -> None:
    torch.ops.vitq.linear(**tuning.example(case, torch.device("cpu")))


@pytest.mark.gpu
def test_tune_writes_what_pick_reads(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VITQ_CACHE", str(tmp_path))
    tuning.cached.cache_clear()
    device = torch.cuda.current_device()
    cases = [Case(197, 384, 384, residual=True), Case(197, 1536, 384, codes=True, activation="gelu"),
             Case(64, 96, 64, weight_bits=4)]
    with tuning.recording() as seen:
        for case in cases:
            torch.ops.vitq.linear(**tuning.example(case, torch.device("cuda", device)))
    assert seen == set(cases)
    results = tuning.tune(cases, device, repeats=2)
    for case in cases:
        assert results[case] and tuning.pick(case, device) == tuning.split(next(iter(results[case])))
    assert tuning.read_cache(tuning.cache_file(device)).keys() == {case.key for case in cases}
    monkeypatch.undo()
    tuning.cached.cache_clear()
    tuning.pick.cache_clear()
