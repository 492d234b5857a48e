"""A non-editable install, used from an empty folder, has everything: recipes, demo weights, the C kernels or why they are missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def installed(name: str) -> bool:
    # not importlib.util.find_spec: asked for "pip", it makes setuptools (up to Python 3.11) take this process for pip's own and
    # refuse to be imported from then on, which inductor needs
    return any(importlib.metadata.distributions(name=name))


pytestmark = [
    pytest.mark.xdist_group("install"),  # the wheel is built once, in one process
    pytest.mark.skipif(not installed("pip"), reason="pip is not in this environment"),
    pytest.mark.skipif(not installed("setuptools"), reason="setuptools is not in this environment"),
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the tests do not lie beside the sources"),
]

# What an installed vitq does from an empty folder; the answers go to stdout as one JSON line. Ranges by minmax: convert is then quick.
USE = """
import json, pathlib, sys
import torch, vitq
from vitq.cpu import loader

loaded = vitq.load_model("deit_s", "demo")
recipe = vitq.Recipe.from_yaml("w8a8-dynamic").with_overrides(["weight.observer=minmax"])
model = vitq.convert(loaded.model, recipe)
images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    agreement = vitq.evaluate.compare(loaded.model(images), model(images))
print(json.dumps({"file": vitq.__file__, "version": vitq.__version__, "recipes": sorted(vitq.recipes()), "weights": loaded.weights,
                  "card": (pathlib.Path(vitq.__file__).parent / "demo" / "README.md").is_file(),
                  "equal": agreement.equal, "sqnr": agreement.sqnr_db, "kernels": sorted({r.kernel for r in vitq.explain(model)}),
                  "c_kernels": loader.why_unavailable()}))
"""


def copy_of_the_sources(folder: Path) -> Path:
    """The files that git tracks or would track, so that no build folder and no compiled library comes along."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("the sources are not a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = ROOT / name
        if source.is_file() and not name.startswith("tests/"):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return folder


def build_wheel(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess, Path | None]:
    """`pip wheel` on a fresh copy of the sources, without network; the wheel is None where it failed."""
    source = copy_of_the_sources(folder / "source")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir",
         str(folder / "wheel"), str(source)],
        env={**clean_environment(), **environment}, cwd=folder, capture_output=True, text=True, timeout=300)
    return done, next((folder / "wheel").glob("vitq-*.whl"), None)


def clean_environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in (
        "PYTHONPATH", "VITQ_BUILD_CUDA", "VITQ_CUDA_ARCHS", "VITQ_CUTLASS_DIR", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS", "CC", "CFLAGS", "LDFLAGS")}
    return {**kept, "PYTHONNOUSERSITE": "1"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    done, path = build_wheel(tmp_path_factory.mktemp("build"))
    assert path is not None, done.stdout + done.stderr
    return path


@pytest.fixture(scope="module")
def wheel_without_compiler(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    done, path = build_wheel(tmp_path_factory.mktemp("build"), CC="/nonexistent")
    assert path is not None, done.stdout + done.stderr
    return done.stdout + done.stderr, path


def use(wheel: Path, folder: Path) -> dict:
    """Install the wheel into a folder of its own and run USE from an empty one."""
    target, empty = folder / "site", folder / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)],
                   env=clean_environment(), cwd=empty, check=True, timeout=120)
    done = subprocess.run([sys.executable, "-c", USE], cwd=empty, capture_output=True,
                          text=True, timeout=300, env={**clean_environment(), "PYTHONPATH": str(target)})
    assert done.returncode == 0, done.stderr
    assert list(empty.iterdir()) == []
    answers = json.loads(done.stdout.splitlines()[-1])
    assert Path(answers["file"]).is_relative_to(target)
    return answers


def test_an_installed_vitq_has_everything(wheel: Path, tmp_path: Path):
    answers = use(wheel, tmp_path)
    assert answers["recipes"] == RECIPES and "w8a8" in RECIPES
    assert answers["weights"] == "demo" and answers["card"]
    assert answers["equal"] == 1.0 and answers["sqnr"] > 20
    if shutil.which(os.environ.get("CC", "cc")):
        assert "was not built" not in (answers["c_kernels"] or "")


def test_what_the_wheel_holds(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    assert sorted(Path(n).stem for n in names if n.startswith("vitq/_recipes/")) == RECIPES
    top = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    assert top == {"vitq"}, "recipes, tools and tests are not packages of their own"
    assert any(n.endswith("licenses/LICENSE") for n in names) and "License-Expression: Apache-2.0" in metadata
    assert "vitq/demo/deit_small_patch16_224.textiles.safetensors" in names
    for path in (ROOT / "vitq").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names


def test_without_a_compiler_it_installs_and_says_what_is_missing(wheel_without_compiler: tuple[str, Path], tmp_path: Path):
    log, wheel = wheel_without_compiler
    assert "the C kernels were not built" in log and "/nonexistent" in log
    with zipfile.ZipFile(wheel) as archive:
        assert not any(name.endswith(".so") for name in archive.namelist())
    answers = use(wheel, tmp_path)
    assert "was not built" in answers["c_kernels"] and "install gcc or clang" in answers["c_kernels"]
    assert answers["equal"] == 1.0 and answers["sqnr"] > 20


def test_a_cuda_build_without_nvcc_fails_in_one_sentence(tmp_path: Path):
    done, path = build_wheel(tmp_path, VITQ_BUILD_CUDA="1", CUDA_HOME=str(tmp_path))
    assert path is None and done.returncode != 0
    assert "VITQ_BUILD_CUDA=1 asks for the CUDA library." in done.stdout + done.stderr
    assert f"CUDA_HOME={tmp_path} holds no bin/nvcc" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_the_wheel_holds_the_sources_of_the_cuda_library(wheel: Path):
    """`python -m vitq.cuda.build` then compiles it for an installed vitq."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for path in (ROOT / "vitq" / "cuda" / "csrc").iterdir():
        assert path.relative_to(ROOT).as_posix() in names
    assert "vitq/cuda/tuned.json" in names and not any(n.startswith("vitq/cuda/_vitq_cuda") for n in names)


def test_metadata_needs_no_compiler_and_no_cuda(tmp_path: Path):
    source = copy_of_the_sources(tmp_path / "source")
    done = subprocess.run([sys.executable, "setup.py", "--quiet", "--name", "--version"], cwd=source, capture_output=True, text=True,
                          timeout=60, env={**clean_environment(), "VITQ_BUILD_CUDA": "1", "CC": "/nonexistent"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "vitq"


def test_a_cuda_build_puts_the_library_into_the_wheel_and_beside_the_sources(tmp_path: Path):
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "include" / "cutlass").mkdir(parents=True)
    (toolkit / "include" / "cutlass" / "version.h").touch()
    nvcc = toolkit / "bin" / "nvcc"  # one that only makes the file it is asked for
    nvcc.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done\n')
    nvcc.chmod(0o755)
    asked = {"VITQ_BUILD_CUDA": "1", "CUDA_HOME": str(toolkit), "VITQ_CUTLASS_DIR": str(toolkit), "VITQ_CUDA_ARCHS": "90a"}
    done, wheel = build_wheel(tmp_path, **asked)
    assert wheel is not None, done.stdout + done.stderr
    with zipfile.ZipFile(wheel) as archive:
        assert "vitq/cuda/_vitq_cuda.so" in archive.namelist()
    assert "py3-none-any" not in wheel.name
    source = tmp_path / "source"
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=source, capture_output=True, text=True, timeout=300,
                          env={**clean_environment(), **asked})
    assert done.returncode == 0, done.stderr
    assert (source / "vitq" / "cuda" / "_vitq_cuda.so").is_file() and "CUDA library for sm_90a" in done.stdout
