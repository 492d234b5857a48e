"""Finds and loads the C kernels, once, on first use."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

ABI_VERSION = 2  # VITQ_ABI_VERSION in csrc/common.h; raise both when a struct or function changes

_REBUILD = "run `pip install .` (or `python setup.py build_ext --inplace`) again"


class QuantizeArgs(Structure):
    """`vitq_quantize_args` in csrc/quantize.c."""

    _fields_ = [
        ("x", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("row_stride", c_int64),
        ("dtype", c_int32),
        ("scale", c_float),
        ("zero_point", c_int32),
        ("lo", c_int32),
        ("hi", c_int32),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("threads", c_int32),
    ]


class LayerNormArgs(Structure):
    """`vitq_layer_norm_args` in csrc/layer_norm.c."""

    _fields_ = [
        ("x", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("row_stride", c_int64),
        ("dtype", c_int32),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("eps", c_float),
        ("scale", c_float),
        ("zero_point", c_int32),
        ("lo", c_int32),
        ("hi", c_int32),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("threads", c_int32),
    ]


class AttentionArgs(Structure):
    """`vitq_attention_args` in csrc/attention.c."""

    _fields_ = [
        ("batch", c_int64),
        ("tokens", c_int64),
        ("heads", c_int64),
        ("dim", c_int64),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("q_strides", c_int64 * 3),
        ("k_strides", c_int64 * 3),
        ("v_strides", c_int64 * 3),
        ("logit_scale", c_void_p),
        ("v_scale", c_void_p),
        ("q_zero", c_void_p),
        ("k_zero", c_void_p),
        ("v_zero", c_void_p),
        ("p_max", c_int32),
        ("bias", c_void_p),
        ("bias_head_stride", c_int64),
        ("mask", c_void_p),
        ("windows", c_int64),
        ("out", c_void_p),
        ("out_dtype", c_int32),
        ("out_scale", c_float),
        ("out_zero_point", c_int32),
        ("out_lo", c_int32),
        ("out_hi", c_int32),
        ("threads", c_int32),
    ]


def why_unavailable() -> str | None:
    """None when the kernels can be called here, otherwise the reason and what to do about it."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The loaded library; RuntimeError with the reason when there is none."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(f"vitq's C kernels are unavailable: {reason}")
    return loaded


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    path = _find()
    if path is None:
        return None, (
            "the library was not built (the install found no C compiler, or its build failed); "
            f"install gcc or clang and {_REBUILD}"
        )
    # The library names no OpenMP runtime of its own; torch brings one into the process.
    import torch  # noqa: F401

    try:
        loaded = ctypes.CDLL(str(path))
        version = loaded.vitq_cpu_abi_version()
        supported = loaded.vitq_cpu_supported()
    except (OSError, AttributeError) as error:
        return None, f"{path} does not load ({error}); {_REBUILD}"
    if version != ABI_VERSION:
        return None, f"{path} has ABI version {version}, this vitq needs {ABI_VERSION}; {_REBUILD}"
    if not supported:
        return None, "this CPU has no AVX-512 VNNI (avx512f, bw, vl, dq, vnni); use a CPU that has, or another backend"
    _declare(loaded)
    return loaded, None


def _find() -> Path | None:
    """This Python's build of the library, or any: it does not depend on the Python version."""
    folder = Path(__file__).parent
    own = [folder / f"_kernels{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    for path in own + sorted(folder.glob("_kernels*.so")):
        if path.is_file():
            return path
    return None


def _declare(loaded: ctypes.CDLL) -> None:
    for name, arguments in (
        ("vitq_cpu_quantize_rows", QuantizeArgs),
        ("vitq_cpu_layer_norm_quantize", LayerNormArgs),
        ("vitq_cpu_attention_int8", AttentionArgs),
    ):
        function = getattr(loaded, name)
        function.argtypes = [POINTER(arguments)]
        function.restype = c_int32
    loaded.vitq_cpu_exp.argtypes = [c_void_p, c_void_p, c_int64]
    loaded.vitq_cpu_exp.restype = None
