"""Metadata is in pyproject.toml. Here is what it cannot say: the C kernels, and recipes/ as package data.

Nothing here needs torch, nvcc or a GPU, and reading the metadata never fails.
"""

import os
import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

# setuptools wants paths relative to this folder, and some frontends start elsewhere.
os.chdir(Path(__file__).resolve().parent)
extension = runpy.run_path("vitq/cpu/build.py")["extension"]

NO_CUDA = (
    "VITQ_BUILD_CUDA=1 asks for the CUDA library, and this version of vitq has none to build yet; install without it: "
    "the cuda backend then runs torch._int_mm with Triton kernels (`python -m vitq.cuda` shows them)"
)
NO_C_KERNELS = (
    "vitq: the C kernels were not built, so the cpu backend runs slower torch kernels in their place. The reason is in the "
    "lines above. Install gcc or clang and install vitq again"
)


class Build(build_ext):
    def run(self) -> None:
        if os.environ.get("VITQ_BUILD_CUDA", "0") not in ("", "0"):
            raise SystemExit(NO_CUDA)
        super().run()

    def build_extensions(self) -> None:
        super().build_extensions()  # an optional extension that fails only warns
        if not all(Path(self.get_ext_fullpath(ext.name)).is_file() for ext in self.extensions):
            self.warn(NO_C_KERNELS)


setup(
    # recipes/ stays at the top of the repository, where a reader looks, and is installed as vitq/_recipes.
    packages=[*find_packages(include=["vitq", "vitq.*"]), "vitq._recipes"],
    package_dir={"vitq._recipes": "recipes"},
    package_data={"vitq": ["demo/*"], "vitq._recipes": ["*.yaml"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": Build},
)
