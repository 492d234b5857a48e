"""Metadata is in pyproject.toml. Here is what it cannot say: the C kernels, the CUDA library where VITQ_BUILD_CUDA=1, and
recipes/ as package data.

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

NO_C_KERNELS = (
    "vitq: the C kernels were not built, so the cpu backend runs slower torch kernels in their place. The reason is in the "
    "lines above. Install gcc or clang and install vitq again"
)


class Build(build_ext):
    def run(self) -> None:
        if os.environ.get("VITQ_BUILD_CUDA", "0") not in ("", "0"):
            self.build_cuda()  # first: it is what was asked for by name, and what may be missing
        super().run()

    def build_cuda(self) -> None:
        cuda = runpy.run_path("vitq/cuda/build.py")
        # get_ext_fullpath knows whether the build is in place (an editable install) or for a wheel
        output = Path(self.get_ext_fullpath("vitq.cuda._vitq_cuda")).with_name(cuda["LIBRARY"])
        try:
            cuda["build"](output.resolve(), say=lambda text: print(f"vitq: {text}", flush=True))
        except cuda["BuildError"] as error:
            raise SystemExit(f"vitq: VITQ_BUILD_CUDA=1 asks for the CUDA library. {error}") from None

    def build_extensions(self) -> None:
        super().build_extensions()  # an optional extension that fails only warns
        if not all(Path(self.get_ext_fullpath(ext.name)).is_file() for ext in self.extensions):
            self.warn(NO_C_KERNELS)


setup(
    # recipes/ stays at the top of the repository, where a reader looks, and is installed as vitq/_recipes.
    packages=[*find_packages(include=["vitq", "vitq.*"]), "vitq._recipes"],
    package_dir={"vitq._recipes": "recipes"},
    # The sources of the CUDA library too: `python -m vitq.cuda.build` compiles it for an installed vitq.
    package_data={"vitq": ["demo/*"], "vitq.cuda": ["csrc/*.cu", "csrc/*.cuh", "csrc/*.h", "tuned.json"],
                  "vitq._recipes": ["*.yaml"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": Build},
)
