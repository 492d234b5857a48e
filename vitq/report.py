"""What a run found, for people and programs: text tables, JSON, TensorBoard, plots, sizes."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitq.cache import replacing
from vitq.calib.histogram import Histogram
from vitq.calib.statistics import Statistics
from vitq.evaluate import Evaluation, LayerError
from vitq.models.heads import ColumnParts, RowParts
from vitq.nn.linear import CodedLinear
from vitq.nn.packed import PackedModule, Row
from vitq.profiling import Ceilings, Profile
from vitq.timing import Timing

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
           torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
# Where a block's layers stand in the order of execution; the rest keeps the order of its names.
_IN_BLOCK = ("qkv", "pv", "proj", "fc1", "fc2", "block", "reduction")


# --- text and JSON ------------------------------------------------------------------------------------------------

def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Plain aligned text: numbers to the right, the rest to the left. None prints as '-'."""
    cells = [["-" if value is None else str(value) for value in row] for row in rows]
    for row in cells:
        if len(row) != len(headers):
            raise ValueError(f"a row has {len(row)} cells, the table {len(headers)} columns: {row}")
    widths = [max(map(len, column)) for column in zip(headers, *cells)]
    right = [bool(cells) and all(_NUMBER.match(row[i]) for row in cells if row[i]) for i in range(len(headers))]

    def line(values: Sequence[str]) -> str:
        return "  ".join(v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right)).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *map(line, cells)])


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The same cells as a table of Markdown; None is an empty cell."""
    lines = [list(headers), ["---"] * len(headers), *(["" if value is None else str(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


_NUMBER = re.compile(r"(-|[-+]?(\d[\d,]*(\.\d+)?|inf|nan)( ?(%|x|ms|dB|MB|MiB))?)\Z")


def write_json(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write `data` as strict JSON, whole or not at all; see `to_json`."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(data) + "\n", encoding="utf-8")


def to_json(data: Any) -> str:
    """JSON text. Infinity and NaN, which JSON lacks, become the strings "inf", "-inf" and "nan"; named tuples become
    objects."""
    return json.dumps(_plain(data), indent=2, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if hasattr(value, "_asdict"):
        value = value._asdict()
    elif hasattr(value, "__dataclass_fields__"):
        value = {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, (os.PathLike, torch.dtype, torch.device)) else value


def accuracy(evaluation: Evaluation, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """Top-1, top-5 and, by class name, recall and support."""
    names = {c: class_names[c] if c < len(class_names) else str(c) for c in evaluation.per_class}
    return {"top1": evaluation.top1, "top5": evaluation.top5,
            "per_class": {names[c]: {"recall": recall, "images": evaluation.support[c]}
                          for c, recall in evaluation.per_class.items()}}


def kernel_summary(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """`vitq.explain`'s rows, counted by role, format and kernel; `notes` are the reasons of all, each once."""
    groups: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = row.role, row.format, row.backend, row.kernel
        group = groups.setdefault(key, {"role": row.role, "format": row.format, "backend": row.backend,
                                        "kernel": row.kernel, "count": 0, "bytes": 0, "memory": 0, "notes": []})
        group["count"] += 1
        group["bytes"] += row.bytes
        group["memory"] += row.memory
        group["notes"] += [note for note in row.note.split("; ") if note and note not in group["notes"]]
    return list(groups.values())


def accuracy_table(accuracies: Mapping[str, Mapping[str, Any]], most_classes: int = 20) -> str:
    """Figures of `accuracy`, a column a model, in percent; recalls by class where there are at most `most_classes`."""
    models = list(accuracies)

    def percent(value: float | None) -> str | None:
        return None if value is None else f"{100 * value:.2f}"

    rows = [(name, None, *(percent(accuracies[m][name]) for m in models)) for name in ("top1", "top5")
            if any(accuracies[m][name] is not None for m in models)]
    classes = accuracies[models[0]]["per_class"]
    if len(classes) <= most_classes:
        rows += [(f"recall {c}", of["images"], *(percent(accuracies[m]["per_class"][c]["recall"]) for m in models))
                 for c, of in classes.items()]
    return table(("percent", "images", *models), rows)


def kernel_table(summary: Iterable[Mapping[str, Any]]) -> str:
    """`kernel_summary` as text."""
    columns = ("role", "format", "backend", "kernel", "count", "bytes", "memory", "notes")
    return table(columns, [[*(group[c] for c in columns[:-1]), "; ".join(group["notes"])] for group in summary])


def layer_table(rows: Iterable[Row]) -> str:
    """`vitq.explain`'s rows as text."""
    columns = ("layer", "role", "format", "backend", "kernel", "bytes", "memory", "note")
    return table(columns, [[getattr(row, column) for column in columns] for row in rows])


def profile_table(profile: Profile, ceilings: Ceilings) -> str:
    """`vitq.profiling.profile` as text: a row for each kind of call, its kernels below it where there are several, and a
    sum for one block of each stage. Floors are least times for the call's bytes and operations; `x floor` is to the larger."""
    total = sum(part.us * part.calls for part in profile.parts)
    rows: list[tuple[str, ...]] = []

    def add(where: str, role: str, kernel: str, calls: int, us: float, floors: Sequence[float], least: float) -> None:
        rows.append((where, role, kernel, str(calls), f"{us:.1f}", *(f"{f:.1f}" if least else "" for f in floors),
                     f"{us / least:.2f}" if least else "", f"{us * calls / 1e3:.3f}", f"{100 * us * calls / total:.1f} %"))

    for part in profile.parts:
        floors, names = ceilings.floor_us(part.bytes, part.ops), list(part.kernels)
        kernel = names[0] if len(names) == 1 else f"{len(names)} kernels"
        add(part.where, part.role, kernel, part.calls, part.us, floors, max(floors))
        if len(names) > 1:
            rows += [("", "", f"  {name}", "", f"{us:.1f}", "", "", "", "", "") for name, us in part.kernels.items()]
    for where, count in profile.blocks.items():
        parts = [(part, ceilings.floor_us(part.bytes, part.ops)) for part in profile.parts if part.where == where]
        add(where, "one block", "", count, sum(part.us * part.calls for part, _ in parts) / count,
            [sum(floors[i] * part.calls for part, floors in parts) / count for i in (0, 1)],
            sum(max(floors) * part.calls for part, floors in parts) / count)
    add("", "the model", "", 1, total, (0.0, 0.0), 0.0)
    headers = ("where", "role", "kernel", "calls", "us", "bytes floor us", "math floor us", "x floor", "ms a forward", "part")
    return table(headers, rows)


def scalars(report: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of a report of tools/quantize_vit.py that TensorBoard should draw, by tag."""
    found = {f"accuracy/{model}_{key}": figures[key] for model, figures in (report.get("accuracy") or {}).items()
             for key in ("top1", "top5")}
    found |= {f"ms_per_image/{name}": case["ms_per_image"] for name, case in report["speed"]["models"].items()}
    agreement, size = report["agreement"], report["size"]
    return {**found, "agreement/equal": agreement.equal, "agreement/logits_sqnr_db": agreement.sqnr_db,
            "size/checkpoint_bytes": size.checkpoint_bytes, "size/ratio_to_fp32": size.ratio}


# --- sizes --------------------------------------------------------------------------------------------------------

class Sizes(NamedTuple):
    """Bytes of the float model as one float32 safetensors file, of the checkpoint folder, and their ratio."""

    fp32_bytes: int
    checkpoint_bytes: int
    ratio: float


def sizes(model: nn.Module, folder: str | os.PathLike[str]) -> Sizes:
    """Compare the float `model` as a file with every file of `folder`. FileNotFoundError without the folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    saved = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    whole = safetensors_bytes(model.state_dict())
    return Sizes(whole, saved, saved / whole)


class Bits(NamedTuple):
    """Average bits for each weight: of the quantized linear layers, and of the whole model."""

    linears: float
    model: float


def bits_per_weight(model: nn.Module) -> Bits:
    """What a converted `model` stores, scales and all, divided by its weights. A layer's biases are no weights: they count for the model only.
    Heads that stay in float while others are quantized count among the linear layers.

    Raises ValueError for a model without quantized linear layers.
    """
    linears = [module for module in model.modules() if isinstance(module, CodedLinear)]
    if not linears:
        raise ValueError(f"{type(model).__name__} has no quantized linear layers")

    def stored(tensors: Iterable[Tensor]) -> int:
        return 8 * sum(t.numel() * t.element_size() for t in tensors)

    def buffers(module: nn.Module) -> int:
        return 8 * module.own_bytes() if isinstance(module, PackedModule) else stored(module.buffers(recurse=False))

    floats = [part.weight for module in model.modules() if isinstance(module, (RowParts, ColumnParts)) for part in module.children()
              if isinstance(part, nn.Linear)]
    weights = sum(module.in_features * module.out_features for module in linears)
    bits = sum(buffers(module) - stored([module.bias]) for module in linears)
    stays = sum(p.numel() for p in model.parameters())
    return Bits((bits + stored(floats)) / (weights + sum(t.numel() for t in floats)),
                (stored(model.parameters()) + sum(map(buffers, model.modules()))) / (weights + stays))


def make_folder(path: str | os.PathLike[str]) -> None:
    """Makes a folder for results. Raises ValueError where nothing can be written to it, before any work."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"cannot write to the folder {path}: {error.strerror}; choose another with --output") from error


def storage_notes(rows: Iterable[Row]) -> list[str]:
    """What the file does not save: codes of fewer bits than they are stored in."""
    found = {match[0] for row in rows if (match := re.search(r"\d-bit codes are stored in \d bits", row.note))}
    return [f"{note}: the file is no smaller than with those" for note in sorted(found)]


def safetensors_bytes(state: Mapping[str, Tensor]) -> int:
    """Size of the safetensors file of `state` with its floating tensors in float32, without writing it."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in sorted(state.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        end = offset + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + text + -text % 8 + offset


# --- TensorBoard --------------------------------------------------------------------------------------------------

def write_tensorboard(folder: str | os.PathLike[str], scalars: Mapping[str, float | None], *,
                      model: nn.Module | None = None, statistics: Statistics | None = None,
                      layer_errors: Sequence[LayerError] = ()) -> Path:
    """Write one run of TensorBoard events to `folder`, in place of an earlier run's, and return it.

    scalars: by tag; None is left out. model: a converted one, whose layers' weight codes and weight scales become
    histograms. statistics: of the calibration; each operand's activations become a histogram (of the largest absolute
    value of each channel where it was observed by channel). layer_errors: one curve a role, over the depth.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(folder)
    for old in folder.glob("events.out.tfevents.*"):  # two runs in one folder are drawn as one
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for tag, value in scalars.items():
            if value is not None and math.isfinite(value):
                writer.add_scalar(tag, value, 0)
        depth: dict[str, int] = {}
        for layer, role, sqnr in sorted(layer_errors, key=_execution_order):
            if math.isfinite(sqnr):
                writer.add_scalar(f"layer_sqnr_db/{role}", sqnr, depth.get(role, 0))
            depth[role] = depth.get(role, 0) + 1
        for name, module in [] if model is None else model.named_modules():
            if isinstance(module, CodedLinear):
                writer.add_histogram(f"weight_codes/{name}", module.codes().cpu().float(), 0)
                writer.add_histogram(f"weight_scale/{name}", module.weight_scale.cpu(), 0)
        for key in statistics or ():
            _add_activations(writer, f"activations/{key.replace(':', '_')}", statistics[key])
    return folder


def _add_activations(writer: Any, tag: str, seen: Histogram) -> None:
    if seen.channels is not None:
        writer.add_histogram(f"{tag}_channel_amax", torch.maximum(seen.min.abs(), seen.max.abs()), 0)
        return
    counts = seen.counts[0].double()
    top = 2.0 ** int(seen.exponent[0])
    edges = torch.linspace(-top, top, seen.bins + 1, dtype=torch.float64)
    centres = (edges[1:] + edges[:-1]) / 2
    # TensorBoard draws a few dozen buckets: merge, and leave out the empty ends.
    merged = counts.view(-1, max(1, seen.bins // 128)).sum(1)
    limits = edges[1:].view(len(merged), -1)[:, -1]
    used = merged.nonzero().flatten()
    if not len(used):
        return
    part = slice(max(0, int(used[0]) - 1), int(used[-1]) + 1)
    writer.add_histogram_raw(tag, min=float(seen.min[0]), max=float(seen.max[0]), num=float(counts.sum()),
                             sum=float((counts * centres).sum()), sum_squares=float((counts * centres.square()).sum()),
                             bucket_limits=limits[part].tolist(), bucket_counts=merged[part].tolist(), global_step=0)


# --- plots --------------------------------------------------------------------------------------------------------

def plot_layer_error(path: str | os.PathLike[str], rows: Sequence[LayerError], title: str = "") -> Path:
    """A PNG with one bar a layer, in the order of execution: its output's SQNR in dB, coloured by role."""
    if not rows:
        raise ValueError("there are no layers to plot")
    rows = sorted(rows, key=_execution_order)
    roles = list(dict.fromkeys(sorted((row[1] for row in rows), key=_role_order)))
    figure, axes = _figure(9, 1.6 + 0.17 * len(rows))
    colours = dict(zip(roles, _colours(len(roles))))
    values = [row[2] for row in rows]
    finite = [v for v in values if math.isfinite(v)]
    most = max(finite, default=1.0)
    places = range(len(rows))
    axes.barh(places, [v if math.isfinite(v) else most for v in values], color=[colours[row[1]] for row in rows], height=0.8)
    for place, value in zip(places, values):
        text = f"{value:.1f}" if math.isfinite(value) else "exact" if value > 0 else "lost"
        axes.text(max(value if math.isfinite(value) else most, 0), place, f" {text}", va="center", fontsize=6)
    axes.set_yticks(places, [f"{name}  (block)" if role == "block" else name for name, role, _ in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.06)
    axes.set_xlabel("SQNR of the layer's output against float32, end to end (dB; higher is better)")
    axes.set_title(title or "Error by layer", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    handles = [axes.barh(0, 0, color=colours[role], label=role) for role in roles]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
    return _save(figure, path)


def plot_benchmark(path: str | os.PathLike[str], groups: Mapping[str, Mapping[str, Timing | None]],
                   unit: str = "ms a batch", title: str = "") -> Path:
    """A PNG with one group of bars a model: the median time of each way to run it, with p10..p90 as a whisker."""
    bars = [(group, name, timing) for group, cases in groups.items() for name, timing in cases.items() if timing is not None]
    if not bars:
        raise ValueError("there are no timings to plot")
    names = list(dict.fromkeys(name for _, name, _ in bars))
    colours = dict(zip(names, _colours(len(names))))
    figure, axes = _figure(9, 1.4 + 0.32 * len(bars) + 0.3 * len(groups))
    place, ticks, longest = 0.0, [], max(timing.p90 for *_, timing in bars)
    for group in groups:
        for name, timing in [(n, t) for g, n, t in bars if g == group]:
            whisker = [[max(0.0, timing.median_ms - timing.p10)], [max(0.0, timing.p90 - timing.median_ms)]]
            axes.barh(place, timing.median_ms, xerr=whisker, color=colours[name], height=0.8,
                      error_kw={"elinewidth": 0.8, "capsize": 2})
            axes.text(timing.p90 + 0.01 * longest, place, f"{timing.median_ms:.3g}", va="center", fontsize=8)
            ticks.append((place, f"{group}  {name}" if len(groups) > 1 else name))
            place += 1
        place += 0.6
    axes.set_yticks([p for p, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel(f"{unit} (median, whiskers p10 to p90; lower is better)")
    axes.set_title(title or "Speed", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return _save(figure, path)


def plot_drops(path: str | os.PathLike[str], models: Sequence[Mapping[str, Any]], title: str = "") -> Path:
    """A PNG with one bar for each recipe and method of each model, as tools/compare_methods.py reports them: the mean drop from float in
    points of top-1, a dot for each calibration draw."""
    bars = [(found["model"], row) for found in models for row in found["rows"]]
    if not bars:
        raise ValueError("there are no drops to plot")
    methods = list(dict.fromkeys(row["method"] for _, row in bars))
    colours = dict(zip(methods, _colours(len(methods))))
    figure, axes = _figure(9, 1.4 + 0.3 * len(bars))
    for place, (_, row) in enumerate(bars):
        axes.barh(place, row["drop"], color=colours[row["method"]], height=0.8)
        axes.scatter(row["drops"], [place] * len(row["drops"]), s=8, color="black", zorder=3)
    axes.set_yticks(range(len(bars)), [f"{model}  {row['recipe']}  {row['method']}" for model, row in bars], fontsize=7)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlabel("points of top-1 below float (dots: calibration draws; lower is better)")
    axes.set_title(title or "Drop by method", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Figure and not pyplot: no display, no global state, and a caller's own backend stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    palette = colormaps["tab10" if count <= 10 else "tab20"]
    return [palette(i % palette.N) for i in range(count)]


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    figure.savefig(path, dpi=120, format="png")
    return path


def _role_order(role: str) -> tuple[int, str]:
    order = ("patch_embed", *_IN_BLOCK, "pool", "head")
    return (order.index(role) if role in order else len(order), role)


def _execution_order(row: Sequence[Any]) -> tuple:
    """Sort key: the stem, then blocks by number and by what they do inside, then pooling and head."""
    name, role = row[0], row[1]
    stage = 0 if role == "patch_embed" else 3 if role == "head" else 2 if role == "pool" else 1
    numbers = [int(n) for n in re.findall(r"(?<=\.)\d+", f".{name}")]
    if role == "reduction":  # at the start of its stage
        numbers += [-1]
    inside = _IN_BLOCK.index(role) if role in _IN_BLOCK else len(_IN_BLOCK)
    return stage, numbers, inside, name
