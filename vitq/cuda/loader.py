"""Finds and opens the CUDA library, once, on first use; mirrors the structs of csrc/vitq_cuda.h.

Nothing here starts CUDA before a kernel is asked for, and nothing raises where there is no library: `why_unavailable`
says what is missing and what to do.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

ABI_VERSION = 10  # VITQ_ABI_VERSION in csrc/vitq_cuda.h
MAX_SEGMENTS = 4
MOST_HEADS = 64  # VITQ_MOST_HEADS
FEW_ROWS = 16  # VITQ_FEW_ROWS
PACKED_GROUP = 128  # VITQ_PACKED_GROUP
CACHED_HEADS = (64, 80, 96, 128)  # numbers of a head that vitq_cached_attention takes
MOST_SPLITS = 512  # parts of the tokens there, and below numbers of a head that vitq_append_rows multiplies by a matrix
MOST_MIXED = 128
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.uint8: 4}  # VitqDtype
ACTIVATIONS = {"": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}  # VitqActivation
GATES = ACTIVATIONS | {"silu": 4}
TRANSFORM_SIZE = 256  # VITQ_TRANSFORM_SIZE
NORMS = {"": 0, "layer_norm": 1, "rms_norm": 2}  # VitqNorm

BUILD = "VITQ_BUILD_CUDA=1 pip install --no-build-isolation .   (in a checkout: `make cuda`)"
NEEDS = "it needs nvcc (CUDA 12.1 or newer) and `pip install nvidia-cutlass==4.2.0.0`; no GPU is needed to build it"


class Matrix(Structure):
    """`VitqMatrix`."""

    _fields_ = [("data", c_void_p), ("row_stride", c_int64), ("group_stride", c_int64), ("dtype", c_int32)]


class Linear(Structure):
    """`VitqLinear`."""

    _fields_ = [
        ("a", c_void_p),
        ("lda", c_int64),
        ("weight", c_void_p),
        ("m", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("a_columns", c_int32),
        ("a_bits", c_int32),
        ("weight_bits", c_int32),
        ("segments", c_int32),
        ("segment_ends", c_int32 * MAX_SEGMENTS),
        ("scale", c_void_p),
        ("column_sums", c_void_p),
        ("row_shift", c_void_p),
        ("bias", c_void_p),
        ("row_scale", c_void_p),
        ("a_fp", c_void_p),
        ("lda_fp", c_int64),
        ("weight_fp", c_void_p),
        ("k_fp", c_int32),
        ("rows_per_group", c_int32),
        ("residual", Matrix),
        ("out", Matrix),
        ("activation", c_int32),
        ("out_inverse", c_float),
        ("out_zero", c_float),
        ("qmin", c_int32),
        ("qmax", c_int32),
        ("multiplier", c_void_p),
        ("group_zero", c_void_p),
        ("group_columns", c_int32),
        ("config", c_int32),
    ]


class WeightOnly(Structure):
    """`VitqWeightOnly`."""

    _fields_ = [
        ("x", c_void_p),
        ("ldx", c_int64),
        ("x_dtype", c_int32),
        ("x_columns", c_int32),
        ("weight", c_void_p),
        ("m", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("weight_bits", c_int32),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("scale_stride", c_int64),
        ("group_columns", c_int32),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("out_dtype", c_int32),
        ("config", c_int32),
    ]


class Attention(Structure):
    """`VitqAttention`."""

    _fields_ = [
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("q_strides", c_int64 * 3),
        ("k_strides", c_int64 * 3),
        ("v_strides", c_int64 * 3),
        ("batch", c_int32),
        ("heads", c_int32),
        ("queries", c_int32),
        ("keys", c_int32),
        ("dim", c_int32),
        ("logit_scale", POINTER(c_float)),
        ("v_scale", POINTER(c_float)),
        ("q_zero", POINTER(c_int32)),
        ("v_zero", POINTER(c_int32)),
        ("scales", c_int32),
        ("p_bits", c_int32),
        ("bias", c_void_p),
        ("bias_head", c_int64),
        ("bias_row", c_int64),
        ("mask", c_void_p),
        ("mask_window", c_int64),
        ("mask_row", c_int64),
        ("mask_windows", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("window_h", c_int32),
        ("window_w", c_int32),
        ("shift_h", c_int32),
        ("shift_w", c_int32),
        ("pad", c_void_p),
        ("out", c_void_p),
        ("out_dtype", c_int32),
        ("out_scale", c_float),
        ("out_zero", c_int32),
        ("qmin", c_int32),
        ("qmax", c_int32),
    ]


class Rows(Structure):
    """`VitqRows`."""

    _fields_ = [
        ("x", Matrix),
        ("rows_per_group", c_int32),
        ("m", c_int32),
        ("columns", c_int32),
        ("merge_height", c_int32),
        ("merge_width", c_int32),
        ("residual", Matrix),
        ("sum", Matrix),
        ("norm", c_int32),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("eps", c_float),
        ("order", c_void_p),
        ("out_columns", c_int32),
        ("counted", c_void_p),
        ("starts", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("out_dtype", c_int32),
        ("scale", c_float),
        ("zero", c_int32),
        ("qmin", c_int32),
        ("qmax", c_int32),
        ("row_scale", c_void_p),
        ("row_shift", c_void_p),
        ("fp_order", c_void_p),
        ("fp_columns", c_int32),
        ("fp_out", c_void_p),
    ]


class Patches(Structure):
    """`VitqPatches`."""

    _fields_ = [
        ("images", c_void_p),
        ("dtype", c_int32),
        ("batch", c_int32),
        ("channels", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("patch_h", c_int32),
        ("patch_w", c_int32),
        ("scale", c_float),
        ("zero", c_int32),
        ("qmin", c_int32),
        ("qmax", c_int32),
        ("out", c_void_p),
        ("out_stride", c_int64),
    ]


class TransformedRows(Structure):
    """`VitqTransformedRows`."""

    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("x_dtype", c_int32),
        ("m", c_int32),
        ("columns", c_int32),
        ("gate", c_int32),
        ("norm", c_int32),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("eps", c_float),
        ("left", c_void_p),
        ("right", c_void_p),
        ("left_size", c_int32),
        ("right_size", c_int32),
        ("clip", c_void_p),
        ("qmin", c_int32),
        ("qmax", c_int32),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("row_scale", c_void_p),
        ("row_shift", c_void_p),
        ("fragments", c_int32),
    ]


class CacheRows(Structure):
    """`VitqCacheRows`."""

    _fields_ = [("rows", c_void_p), ("strides", c_int64 * 3), ("bits", c_int32), ("symmetric", c_int32), ("aligned", c_int32)]


class AppendRows(Structure):
    """`VitqAppendRows`."""

    _fields_ = [
        ("keys", CacheRows),
        ("values", CacheRows),
        ("state", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("q", c_void_p),
        ("k_strides", c_int64 * 3),
        ("v_strides", c_int64 * 3),
        ("q_strides", c_int64 * 3),
        ("dtype", c_int32),
        ("batch", c_int32),
        ("query_heads", c_int32),
        ("heads", c_int32),
        ("tokens", c_int32),
        ("dim", c_int32),
        ("room", c_int32),
        ("key_clip", c_void_p),
        ("value_clip", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("rotary_strides", c_int64 * 2),
        ("right", c_void_p),
        ("inverse", c_void_p),
        ("q_out", c_void_p),
        ("k_out", c_void_p),
        ("v_out", c_void_p),
        ("out_before", c_int32),
        ("out_turned", c_int32),
        ("advance", c_int32),
        ("paired", c_int32),
    ]


class CachedAttention(Structure):
    """`VitqCachedAttention`."""

    _fields_ = [
        ("keys", CacheRows),
        ("values", CacheRows),
        ("state", c_void_p),
        ("q", c_void_p),
        ("q_strides", c_int64 * 3),
        ("dtype", c_int32),
        ("batch", c_int32),
        ("query_heads", c_int32),
        ("heads", c_int32),
        ("tokens", c_int32),
        ("dim", c_int32),
        ("room", c_int32),
        ("mask", c_void_p),
        ("mask_batch", c_int64),
        ("mask_row", c_int64),
        ("scale", c_float),
        ("window", c_int32),
        ("out", c_void_p),
        ("out_strides", c_int64 * 3),
        ("workspace", c_void_p),
        ("splits", c_int32),
    ]


STRUCTS = {"VitqMatrix": Matrix, "VitqLinear": Linear, "VitqWeightOnly": WeightOnly, "VitqAttention": Attention, "VitqRows": Rows,
           "VitqPatches": Patches, "VitqTransformedRows": TransformedRows, "VitqCacheRows": CacheRows, "VitqAppendRows": AppendRows,
           "VitqCachedAttention": CachedAttention}
FUNCTIONS: dict[str, list] = {
    "vitq_linear_sm90": [POINTER(Linear), c_void_p],
    "vitq_linear_sm80": [POINTER(Linear), c_void_p],
    "vitq_linear_few": [POINTER(Linear), c_void_p],
    "vitq_linear_sm90_configs": [],
    "vitq_linear_sm80_configs": [],
    "vitq_linear_few_configs": [],
    "vitq_weight_only": [POINTER(WeightOnly), c_void_p],
    "vitq_dequantize": [POINTER(WeightOnly), c_void_p],
    "vitq_attention": [POINTER(Attention), c_void_p],
    "vitq_attention_supports": [c_int32, c_int32, c_int32, c_int32],
    "vitq_rows": [POINTER(Rows), c_void_p],
    "vitq_patches": [POINTER(Patches), c_void_p],
    "vitq_transformed_rows": [POINTER(TransformedRows), c_void_p],
    "vitq_transformed_rows_supports": [c_int32, c_int32, c_int32],
    "vitq_widen_int4": [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p],
    "vitq_append_rows": [POINTER(AppendRows), c_void_p],
    "vitq_cached_attention": [POINTER(CachedAttention), c_void_p],
    "vitq_abi_version": [],
    "vitq_error": [c_int],
    "vitq_build": [],
    "vitq_arch": [],
    "vitq_driver_version": [],
    "vitq_runtime_version": [],
}


def path() -> Path:
    """The library that would be opened: VITQ_CUDA_LIBRARY, or the one beside this file."""
    return Path(os.environ.get("VITQ_CUDA_LIBRARY") or Path(__file__).with_name("_vitq_cuda.so"))


def library() -> ctypes.CDLL:
    """The opened library; RuntimeError with the reason where there is none. It may still lack code for the GPU."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(f"vitq's CUDA library is unavailable: {reason}")
    return loaded


def why_unavailable(device: int | None = None) -> str | None:
    """None where the library's kernels run on this GPU (the current one by default), else the reason and what to do."""
    loaded, reason = _load()
    if loaded is None:
        return reason
    if torch.version.hip is not None:
        return "this is a ROCm build of PyTorch; an NVIDIA GPU is needed"
    if (driver := loaded.vitq_driver_version()) < (runtime := loaded.vitq_runtime_version()) // 1000 * 1000:
        return _driver_too_old(driver, runtime)
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device; this needs an NVIDIA GPU, its driver and a CUDA build of PyTorch"
    return why_not_on(capability(torch.cuda.current_device() if device is None else device), built_for())


def why_not_on(gpu: int, build: str) -> str | None:
    """Whether a library built for e.g. 'sm_80 compute_80 sm_90a' holds code that GPU 89 (sm_89) runs; None or the reason."""
    if gpu < 80:
        return f"the GPU is sm_{gpu}; sm_80 or newer is needed"
    for kind, number, exact in re.findall(r"\b(sm|compute)_(\d+)(a?)", build):
        arch = int(number)
        if kind == "compute" and arch <= gpu and not exact or arch == gpu:
            return None
        # machine code runs on later minor versions of its major one, unless it is of the `a` kind
        if kind == "sm" and not exact and arch // 10 == gpu // 10 and arch <= gpu:
            return None
    name = "90a" if gpu == 90 else str(gpu)
    return (f"the library was built for {build.split(',')[0]}, this GPU is sm_{gpu}: build it again without VITQ_CUDA_ARCHS, "
            f"or with VITQ_CUDA_ARCHS={name}")


def built_for() -> str:
    """The library's own words: architectures, and CUTLASS's version."""
    return library().vitq_build().decode()


@functools.cache
def capability(device: int) -> int:
    """10·major + minor of a GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def kernel_arch(device: int) -> int:
    """Which GEMM runs there: 90 (wgmma) or 80 (mma.sync). VITQ_FORCE_ARCH=80 takes the latter where either would run.

    Raises ValueError for another value of that variable, or for 90 where it cannot run.
    """
    best = 90 if capability(device) == 90 and library().vitq_linear_sm90_configs() > 0 else 80
    forced = os.environ.get("VITQ_FORCE_ARCH", "")
    if forced not in ("", "80", "90") or forced == "90" != str(best):
        raise ValueError(f"VITQ_FORCE_ARCH={forced}: it may be 80, or 90 on an sm_90 GPU with a library built for sm_90a")
    return int(forced or best)


def check(name: str, code: int, what: str = "") -> None:
    """RuntimeError if a function of the library returned an error; `what` says for which case."""
    if code:
        message = library().vitq_error(code).decode()
        raise RuntimeError(f"vitq::{name}: {message} (code {code})" + (f": {what}" if what else ""))


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    file = path()
    if not file.is_file():
        if "VITQ_CUDA_LIBRARY" in os.environ:
            return None, f"VITQ_CUDA_LIBRARY={file} is not a file"
        return None, f"the CUDA library was not built. To build it: {BUILD}; {NEEDS}"
    try:
        loaded = ctypes.CDLL(str(file))
        version = loaded.vitq_abi_version()
        if version != ABI_VERSION:
            return None, f"{file} has ABI version {version}, this vitq needs {ABI_VERSION}. Build it again: {BUILD}"
        for name, arguments in FUNCTIONS.items():
            function = getattr(loaded, name)
            function.argtypes = arguments
            function.restype = c_char_p if name in ("vitq_error", "vitq_build") else c_int
    except (OSError, AttributeError) as error:
        return None, f"{file} does not load ({error}). Build it again: {BUILD}"
    return loaded, None


def _driver_too_old(driver: int, runtime: int) -> str:
    built = f"CUDA {runtime // 1000}.{runtime % 1000 // 10}"
    if not driver:
        return f"there is no NVIDIA driver; the library was built with {built}"
    return (f"the driver runs CUDA {driver // 1000}.{driver % 1000 // 10}, the library was built with {built}: update the "
            f"driver, or build the library with an nvcc of CUDA {driver // 1000}")
