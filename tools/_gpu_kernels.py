"""Single kernels for gpu_benchmark.py: one large GEMM, and each layer of a DeiT block as the fused model calls it."""
from __future__ import annotations

from typing import Any, Callable

import torch
import torch.nn.functional as F

import vitq
from _gpu_models import first_line, float_model, graphed, random_images

CALLS = 10  # of a torch op in one graph, so that starting the graph does not count; of vitq's, one a block
IN_BLOCK = ("norm", "qkv", "attention", "proj", "fc1", "fc2")
PLAIN, FUSED = "torch._int_mm, int32 out", "vitq W8A8, scale and bias, fp16 out"
GEMM_HEADERS = ("GEMM", "us", "TOPS", "x torch._int_mm", "note")
LAYER_HEADERS = ("layer", "shape", "us", "spread", "bytes floor us", "math floor us", "x floor", "torch fp16 us", "x torch fp16",
                 "note")


def time_gemm(side: int, device: torch.device, repeats: int) -> tuple[dict[str, float], list[tuple]]:
    """TOPS by case, and cells of GEMM_HEADERS. Every case multiplies the same random numbers: power depends on them."""
    x = torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device).float()
    layer, codes = vitq.profiling.int8_layer(side, side, x)
    weight = layer.codes()
    half = (codes.codes / 127).half(), (weight / 127).half(), layer.bias.half()

    def four_bits() -> Callable[[Any], Any]:
        other, other_codes = vitq.profiling.int8_layer(side, side, x, "w4a8")
        return lambda _: other(other_codes)

    builds: dict[str, Callable[[], Callable[[Any], Any]]] = {
        "fp16 and bias, cuBLAS": lambda: lambda _: F.linear(*half),
        PLAIN: lambda: lambda _: torch._int_mm(codes.codes, weight.t()),
        FUSED: lambda: lambda _: layer(codes),
        "vitq W4A8, scale and bias, fp16 out": four_bits}
    ready, notes = {}, {}
    for name, build in builds.items():
        try:
            fn, notes[name] = graphed(build(), codes.codes)
            ready[name] = fn, codes.codes
        except Exception as error:
            notes[name] = first_line(error)
    timings = vitq.timing.time_models(ready, repeats)
    tops = {name: 2 * side**3 / t.median_ms / 1e9 for name, t in timings.items()}

    def cells(name: str) -> tuple:
        if name not in tops:
            return None, None, None, notes[name]
        times = f"{tops[name] / tops[PLAIN]:.2f}" if PLAIN in tops else None
        return f"{1e3 * timings[name].median_ms:.1f}", f"{tops[name]:.4g}", times, notes[name]

    return tops, [(name, *cells(name)) for name in builds]


def time_layers(name: str, batch: int, device: torch.device, repeats: int, ceilings: Any) -> tuple[dict[str, float], list[tuple]]:
    """Time over floor by layer, and cells of LAYER_HEADERS: the calls of one role in all blocks as one graph, and what torch
    takes in float16 for the same shapes (a GEMM and its bias; SDPA; LayerNorm), with nothing fused to it."""
    model = float_model(name, device)
    images = random_images(model, batch, torch.float16)
    recipe = vitq.profiling.quick_recipe("w8a8", min(8, batch))
    quantized = vitq.convert(model, recipe, [images[:8].float()])
    calls = [call for call in vitq.profiling.record_calls(quantized, images) if call.where]
    cases: dict[str, tuple] = {}
    notes: dict[str, str] = {}
    groups = {role: group for role in IN_BLOCK if (group := [call for call in calls if call.role == role])}
    for role, group in groups.items():
        for key, make in ((role, lambda: lambda _, group=group: [call.run() for call in group]),
                          (f"torch {role}", lambda: torch_twin(role, group[0]))):
            try:
                fn, notes[key] = graphed(make(), images)
                cases[key] = fn, images
            except Exception as error:
                notes[key] = first_line(error)
    timings = vitq.timing.time_models(cases, repeats)
    ratios, found = {}, []
    for role, group in groups.items():
        floors = ceilings.floor_us(sum(call.bytes for call in group) / len(group), sum(call.ops for call in group) / len(group))
        t, twin = timings.get(role), timings.get(f"torch {role}")
        us, torch_us = t and 1e3 * t.median_ms / len(group), twin and 1e3 * twin.median_ms / CALLS
        if us:
            ratios[role] = us / max(floors)
        figures = us, t and 100 * t.spread, *floors, ratios.get(role), torch_us, us and torch_us and torch_us / us
        formats = "{:.1f}", "{:.0f} %", "{:.1f}", "{:.1f}", "{:.2f}", "{:.1f}", "{:.2f}"
        note = "; ".join(filter(None, (*dict.fromkeys(call.kernel for call in group), notes[role])))
        cells = (None if figure is None else form.format(figure) for figure, form in zip(figures, formats))
        found.append((role, describe(group[0]), *cells, note))
    return ratios, found


def describe(call: Any) -> str:
    """Shapes of a call: M x K -> N, and what leaves it."""
    first, out = call.args[0], call.output
    kind = "int8" if hasattr(out, "codes") else str(out.dtype)[6:]
    if call.op == "attention":
        b, n, h, d = first.shape
        return f"{b} x {n} tokens, {h} heads of {d} -> {kind}"
    rows = first.shape[:-1].numel()
    width = f" -> {out.shape[-1]}" if call.op == "linear" else ""
    residual = " + residual" if call.kwargs.get("residual") is not None else ""
    return f"{rows} x {first.shape[-1]}{width} {kind}{residual}"


def torch_twin(role: str, call: Any) -> Callable[[Any], Any]:
    """CALLS times what torch does in float16 on the shapes of `call`."""
    first, out = call.args[0], call.output
    device = out.device
    if role == "attention":
        q, k, v = torch.randn(3, *first.shape, device=device).half().permute(1, 2, 0, 3, 4).contiguous().unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # strided as timm's: views of qkv
        return lambda _: [F.scaled_dot_product_attention(q, k, v) for _ in range(CALLS)]
    x = torch.randn(first.shape[:-1].numel(), first.shape[-1], device=device).half()
    if role == "norm":
        weight = torch.ones(x.shape[1], device=device).half()
        return lambda _: [F.layer_norm(x, weight.shape, weight, weight) for _ in range(CALLS)]
    weight = torch.randn(out.shape[-1], x.shape[1], device=device).half()
    bias = torch.zeros(out.shape[-1], device=device).half()
    return lambda _: [F.linear(x, weight, bias) for _ in range(CALLS)]
