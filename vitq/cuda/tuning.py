"""Which tile configuration a GEMM takes: a measured table where there is one, else an estimate.

Looked up in this order: what `tune` measured on this machine (a file in `cache_folder`), the table that comes with vitq
(tuned.json, by GPU), and the estimate of `estimate`. A configuration is named kernel:index, such as "sm90:3".
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitq.cache import cache_folder, replacing
from vitq.cuda import loader
from vitq.cuda.layout import round_up
from vitq.graphs import capturing

log = logging.getLogger("vitq")

TABLE = Path(__file__).with_name("tuned.json")
# GPUs with the same multiprocessors, whose table serves both.
ALIASES = {"NVIDIA H100 80GB HBM3": "NVIDIA H200", "NVIDIA H200 NVL": "NVIDIA H200"}
# A measured number of rows stands for others up to this factor away.
NEAR = 1.5
# Hopper's GEMM widens 4-bit weights in tiles that stream them. Up to STREAMED_COLUMNS columns, tiles that keep their weights are faster from WIDEN_ROWS
# rows on, but take 8 bits alone: there a kernel widens the weights first. So it does, from as many rows on, for segments, which Hopper's GEMM
# does not widen. With more columns it pays from GROUP_ROWS on, and only where groups of columns have multipliers.
WIDEN_ROWS, STREAMED_COLUMNS, GROUP_ROWS = 256, 2048, 512


class Case(NamedTuple):
    """One GEMM as far as its speed is concerned."""

    m: int
    n: int
    k: int
    weight_bits: int = 8
    input_bits: int = 8
    segments: int = 1
    fp: int = 0  # columns in float16
    shift: bool = False  # rows have one
    codes: bool = False  # written, rather than floats
    activation: str = ""
    residual: bool = False
    groups: int = 0  # columns of one, where they have multipliers

    @property
    def kind(self) -> str:
        """Everything but the sizes, in words."""
        words = [f"w{self.weight_bits}a{self.input_bits}", "codes" if self.codes else "float", self.activation,
                 "residual" if self.residual else "", f"{self.segments}segments" if self.segments > 1 else "",
                 f"fp{self.fp}" if self.fp else "", "shift" if self.shift else "", f"groups{self.groups}" if self.groups else ""]
        return " ".join(filter(None, words))

    @property
    def key(self) -> str:
        return f"{self.n}x{self.k} {self.kind}"

    @property
    def plain(self) -> bool:
        return self.segments == 1 and not self.fp and not self.shift

    @property
    def pair(self) -> bool:
        """Two integer segments alone: two sets of accumulators, if the epilogue is plain too."""
        return self.segments == 2 and not self.fp and not self.shift

    @property
    def mixed(self) -> bool:
        """One integer segment, with float16 columns beside it or shifted rows."""
        return self.segments == 1 and not self.plain


@dataclass(frozen=True)
class HopperTile:
    """`Tile` of csrc/gemm_sm90_tile.cuh: columns, warpgroups that compute, 64-row pieces of each; whether a block keeps its
    weights."""

    index: int
    columns: int
    groups: int
    pieces: int
    resident: bool
    name = "sm90"

    @property
    def rows(self) -> int:
        return 64 * self.pieces * (1 if self.resident else self.groups)

    def fits(self, case: Case) -> bool:
        """Whether the kernel has this tile for the case, and shared memory holds it (227 KiB on sm_90)."""
        packed = case.weight_bits == 4
        if case.input_bits != 8 or (packed and (case.segments > 1 or self.index not in PACKED or case.groups % loader.PACKED_GROUP)) or (case.groups and not packed):
            return False
        if not packed and not case.plain and self.index not in ((0, 1, 3, 9, 11) if case.pair else (1, 8, 10, 11, 12) if case.mixed else (1, 3, 11)):
            return False
        if not packed and case.plain and case.activation and not case.codes and self.index not in (1, 8, 11):
            return False
        pieces = -(-case.k // 128) + -(-case.fp // 64)
        constants = 8 * self.columns * (3 if case.pair or case.mixed or packed else 2)
        fixed = 1024 + (pieces * self.columns * 128 if self.resident else 0) + constants + 416
        fixed += 3 * 64 * self.columns * PACKED[self.index] if packed else 0
        stage = 128 * (self.rows + (0 if self.resident else self.columns))
        return not (self.resident and pieces > 16) and (227 * 1024 - fixed) // stage >= (3 if self.resident else 2)

    def estimate(self, case: Case, multiprocessors: int) -> float:
        """Clocks, roughly: 4096 int8 multiply-adds, 25 bytes from the L2 a clock and multiprocessor; the products and the epilogue
        of a tile add up, since they compete for the register file (measured: csrc/gemm_sm90.cuh)."""
        across, down = -(-case.n // self.columns), -(-case.m // self.rows)
        area = self.rows * self.columns
        products = area * case.k / 4096
        epilogue = area * (0.17 if case.activation and case.codes else 0.08 if case.codes else 0.12) + area * 0.04 * case.pair
        if self.resident:
            slots = max(multiprocessors // across, 1)
            rounds = -(-down // min(slots, down)) * -(-across // multiprocessors)
            first = 2000 + self.columns * case.k / 25  # the weights, before anything else
            return first + rounds * max(products + epilogue, self.rows * case.k / 25)
        loads = (self.rows + self.columns) * case.k / 25
        return 2000 + -(-down * across // multiprocessors) * (max(products, loads) + 1.5 * epilogue)


# Hopper's configurations for packed weights, and how many pieces of them each of three warps has in shared memory before it widens them.
PACKED = {10: 1, 11: 2, 12: 4}


@dataclass(frozen=True)
class AmpereTile:
    """A configuration of csrc/gemm_sm80.cu, which makes its own estimate where it is asked for number -1."""

    index: int
    name = "sm80"

    def fits(self, case: Case) -> bool:
        return (case.weight_bits == 4 or case.input_bits == 8) and not case.groups


@dataclass(frozen=True)
class FewRowsTile:
    """A configuration of csrc/few.cuh, which makes its own estimate where it is asked for number -1. Nothing that reads a weight in fuller
    tiles is as fast at so few rows."""

    index: int
    name = "few"

    def fits(self, case: Case) -> bool:
        return (case.m <= loader.FEW_ROWS and case.segments == 1 and (case.weight_bits == 4 or case.input_bits == 8)
                and (not case.groups or (case.weight_bits, case.input_bits) == (4, 8)))


TILES: dict[str, tuple[HopperTile | AmpereTile | FewRowsTile, ...]] = {
    "sm90": (HopperTile(0, 192, 2, 1, True), HopperTile(1, 128, 2, 1, True), HopperTile(2, 256, 2, 1, True),
         HopperTile(3, 96, 2, 1, True), HopperTile(4, 64, 2, 1, True), HopperTile(5, 128, 2, 2, True),
         HopperTile(6, 192, 3, 1, True), HopperTile(7, 128, 3, 1, True), HopperTile(8, 256, 2, 1, False),
         HopperTile(9, 192, 2, 1, False), HopperTile(10, 128, 2, 2, False), HopperTile(11, 128, 2, 1, False),
         HopperTile(12, 64, 2, 1, False)),
    "sm80": tuple(AmpereTile(i) for i in range(11)),
    "few": tuple(FewRowsTile(i) for i in range(6)),
}


def widen_rows(device: torch.device, k: int, segments: int = 1, groups: int | None = None) -> int:
    """Up to how many rows a GEMM reads packed 4-bit weights; with more it runs on weights that are widened to int8 before it. groups: columns of
    each, where they have multipliers, 0 where those are not as many in each."""
    hopper = device.type == "cuda" and loader.kernel_arch(_index(device)) == 90
    if hopper and segments == 1 and (groups is None or groups and groups % loader.PACKED_GROUP == 0):
        return WIDEN_ROWS if k <= STREAMED_COLUMNS else sys.maxsize if groups is None else GROUP_ROWS
    if groups is not None:
        return loader.FEW_ROWS if groups else 0
    return WIDEN_ROWS if hopper else sys.maxsize


@functools.lru_cache(maxsize=4096)
def pick(case: Case, device: int) -> tuple[str, int]:
    """("sm90", "sm80" or "few", index): the kernel and its configuration for a case on a GPU."""
    for recorded in _recordings:
        recorded.add(case)
    tiles = candidates(case, device)
    if not tiles:
        raise RuntimeError(f"vitq::linear: no kernel for {case}")
    fitting = {f"{tile.name}:{tile.index}": tile for tile in tiles}
    for table in (cached(device), shipped(torch.cuda.get_device_name(device))):
        name = nearest(table.get(case.key, {}), case.m)
        if name in fitting:
            return split(name)
    hopper = [tile for tile in tiles if isinstance(tile, HopperTile)]
    if not hopper:
        return tiles[0].name, -1
    return "sm90", min(hopper, key=lambda tile: tile.estimate(case, _multiprocessors(device))).index


def candidates(case: Case, device: int) -> list[HopperTile | AmpereTile | FewRowsTile]:
    """The configurations that take a case there: the kernel for few rows where it does, else Hopper's own, else the one for all chips."""
    kernels = ("few", "sm90", "sm80") if loader.kernel_arch(device) == 90 else ("few", "sm80")
    return next(filter(None, ([tile for tile in TILES[kernel] if tile.fits(case)] for kernel in kernels)), [])


def split(name: str) -> tuple[str, int]:
    """'sm90:3' -> ("sm90", 3). ValueError for anything else."""
    kernel, _, index = name.partition(":")
    if kernel not in TILES or not index.isdigit():
        raise ValueError(f"vitq::linear: config is {name!r}; it must be '' or a kernel and its configuration such as 'sm90:3'")
    return kernel, int(index)


def nearest(measured: dict[str, str], m: int) -> str | None:
    """The configuration of the measured number of rows nearest to m, None if it is more than a factor NEAR away."""
    distance, name = min(((abs(math.log(m / int(rows))), name) for rows, name in measured.items()), default=(math.inf, None))
    return name if distance <= math.log(NEAR) else None


@functools.cache
def shipped(gpu: str) -> dict[str, dict[str, str]]:
    """The table that comes with vitq for a GPU: case key -> rows -> configuration."""
    return json.loads(TABLE.read_text(encoding="utf-8")).get(ALIASES.get(gpu, gpu), {})


@functools.cache
def cached(device: int) -> dict[str, dict[str, str]]:
    """What `tune` has measured for this GPU, driver, library and torch."""
    return read_cache(cache_file(device))


def cache_file(device: int) -> Path:
    """One file for each combination that may change what is fastest."""
    library = loader.library()
    what = [torch.cuda.get_device_name(device), str(library.vitq_driver_version()), loader.built_for(), str(loader.ABI_VERSION),
            torch.__version__]
    return cache_folder() / f"tuning-{hashlib.sha256(chr(10).join(what).encode()).hexdigest()[:16]}.json"


def read_cache(path: Path) -> dict[str, dict[str, str]]:
    """{} where there is no file; also, with a line in the log, where it cannot be read or is not such a table."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for measured in table.values():
            for rows, name in measured.items():
                int(rows), split(name)
        return table
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("the tuning cache %s is ignored (%s: %s); delete it, or tune again", path, type(error).__name__, error)
        return {}


def write_cache(path: Path, table: dict[str, dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(table, indent=1, sort_keys=True), encoding="utf-8")


_recordings: list[set[Case]] = []


@contextlib.contextmanager
def recording() -> Iterator[set[Case]]:
    """The cases that run in the `with` block, for `tune`: `with recording() as cases: model(images)`."""
    pick.cache_clear()
    _recordings.append(set())
    try:
        yield _recordings[-1]
    finally:
        _recordings.pop()


def tune(cases: Iterable[Case], device: int | None = None, *, repeats: int = 5,
         save: bool = True) -> dict[Case, dict[str, float]]:
    """Times every configuration of each case, and writes the fastest to the cache. Microseconds by configuration, fastest
    first."""
    device = torch.cuda.current_device() if device is None else device
    path, results = cache_file(device), {}
    table = read_cache(path)
    for case in cases:
        with torch.cuda.device(device):
            operands = example(case, torch.device("cuda", device))
            times = {f"{t.name}:{t.index}": time for t in candidates(case, device)
                     if (time := _time(operands, f"{t.name}:{t.index}", repeats)) is not None}
        results[case] = dict(sorted(times.items(), key=lambda item: item[1]))
        if times:
            table.setdefault(case.key, {})[str(case.m)] = next(iter(results[case]))
    if save:
        write_cache(path, table)
        cached.cache_clear()
        pick.cache_clear()
    return results


def example(case: Case, device: torch.device) -> dict[str, Any]:
    """Arguments of `torch.ops.vitq.linear` with random operands of a case's sizes."""
    n_pad, k_pad = round_up(case.n, 32), round_up(case.k, 64)
    on = {"device": device}

    def bytes_(rows: int, columns: int, bits: int) -> torch.Tensor:
        x = torch.randint(-128, 128, (rows, columns * bits // 8), dtype=torch.int8, **on)
        return x if bits == 8 else x.view(torch.uint8)

    # The first of two is short, as that of dual uniform weights.
    steps = k_pad // 32
    first = max(steps // 6, 1) if case.segments == 2 else max(steps // case.segments, 1)
    ends = [] if case.segments == 1 else [*(32 * first * s for s in range(1, case.segments)), k_pad]
    arguments: dict[str, Any] = {
        "out": torch.empty(case.m, case.n, dtype=torch.int8 if case.codes else torch.float16, **on),
        "codes": bytes_(case.m, k_pad, case.input_bits)[:, : round_up(case.k, 2) * case.input_bits // 8],
        "weight": bytes_(n_pad, k_pad, case.weight_bits), "scale": torch.full((case.segments, n_pad), 1e-4, **on),
        "bias": torch.zeros(n_pad, **on), "weight_bits": case.weight_bits, "input_bits": case.input_bits, "segment_ends": ends,
        "activation": case.activation}
    if case.residual:
        arguments["residual"] = torch.zeros(case.m, case.n, dtype=torch.float16, **on)
    if case.shift:
        arguments["column_sums"] = torch.zeros(n_pad, **on)
        arguments["row_shift"] = torch.zeros(case.m, **on)
    if case.fp:
        arguments["codes_fp"] = torch.zeros(case.m, case.fp, dtype=torch.float16, **on)
        arguments["weight_fp"] = torch.zeros(n_pad, case.fp, dtype=torch.float16, **on)
    if case.groups:
        arguments |= {"multiplier": torch.ones(-(-case.k // case.groups), n_pad, dtype=torch.int8, **on), "group_columns": case.groups}
    return arguments


def _time(arguments: dict[str, Any], config: str, repeats: int, calls: int = 20) -> float | None:
    """Median microseconds of a call in a CUDA graph of `calls`; None where the kernel refuses the case."""
    def run() -> None:
        torch.ops.vitq.linear(**arguments, config=config)

    try:
        run()
    except RuntimeError as error:
        log.info("%s is passed over: %s", config, error)
        return None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        for _ in range(calls):
            run()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1000 * start.elapsed_time(stop) / calls)
    return statistics.median(times)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
