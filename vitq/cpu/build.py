"""How setuptools compiles the C kernels.

setup.py must not import this file through the `vitq` package: an isolated build has no
torch. It runs it by its path::

    import runpy
    from setuptools import setup

    extension = runpy.run_path("vitq/cpu/build.py")["extension"]
    setup(ext_modules=[extension()])
"""

from setuptools import Extension

SOURCES = ("attention.c", "kernels.c", "layer_norm.c", "quantize.c")
HEADERS = ("common.h", "pack.h", "softmax.h")


def extension() -> Extension:
    """The library as an optional extension: where it cannot be compiled, setuptools warns and goes on.

    It is not a Python module (`vitq.cpu.loader` opens it with ctypes), so that one build
    serves every Python version and no Python header is needed.
    """
    folder = "vitq/cpu/csrc"  # setuptools wants paths relative to setup.py
    return Extension(
        "vitq.cpu._kernels",
        sources=[f"{folder}/{name}" for name in SOURCES],
        depends=[f"{folder}/{name}" for name in HEADERS],
        # No -march: each function names the instructions it needs (csrc/common.h).
        # No contraction: a fused multiply-add only where the source writes one.
        extra_compile_args=["-O3", "-std=gnu11", "-ffp-contract=off", "-fvisibility=hidden", "-fopenmp"],
        # Deliberately not linked with -fopenmp: the OpenMP symbols must come from the
        # runtime torch has already loaded, never from a second one with its own threads.
        optional=True,
    )
