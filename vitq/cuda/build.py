"""Compiles the CUDA library: `python -m vitq.cuda.build`, or setup.py where VITQ_BUILD_CUDA=1.

Needs nvcc, a C++ compiler and CUTLASS's headers; no GPU, no torch. setup.py runs this file by its path, since an isolated
build cannot import vitq, so nothing but the standard library may be imported here.

VITQ_CUDA_ARCHS   what to compile for, such as "90a" or "80+PTX;86;89;90a" (the default); fewer compile faster
VITQ_CUTLASS_DIR  a CUTLASS checkout, or its include folder
VITQ_NVCC_FLAGS   more flags for nvcc, such as -lineinfo
CUDA_HOME         where bin/nvcc is, if it is not on PATH
MAX_JOBS          how many compilers run at once (default: the CPUs this process may use)
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
LIBRARY = "_vitq_cuda.so"
DEFAULT_ARCHS = "80+PTX;86;89;90a"
CUTLASS = "nvidia-cutlass==4.2.0.0"
HOPPER_ONLY = "_sm90"  # sources with this in their names use instructions of sm_90a


class BuildError(Exception):
    """One or two sentences: what is missing or failed, and what to do."""


class Arch(NamedTuple):
    """number: as nvcc writes it, '86' or '90a'; ptx: also include PTX, for GPUs newer than all."""

    number: str
    ptx: bool = False

    def flags(self) -> list[str]:
        flags = ["-gencode", f"arch=compute_{self.number},code=sm_{self.number}"]
        return flags + (["-gencode", f"arch=compute_{self.number},code=compute_{self.number}"] if self.ptx else [])

    def words(self) -> str:
        return f"sm_{self.number}" + (f" compute_{self.number}" if self.ptx else "")


def parse_archs(text: str) -> list[Arch]:
    """'80+PTX;9.0a' -> [Arch('80', True), Arch('90a')]. BuildError for what is not such a list, or older than sm_80."""
    archs = []
    for item in filter(None, re.split(r"[;,\s]+", text)):
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", item)
        if not match or int(match[1]) * 10 + int(match[2]) < 80:
            raise BuildError(f"VITQ_CUDA_ARCHS={text}: {item!r} is not an architecture from 80 on; give for example "
                             f"{DEFAULT_ARCHS!r}")
        number = match[1] + match[2]
        # plain 90 lacks wgmma, for which the Hopper kernels are written
        archs.append(Arch(number + ("a" if number == "90" else match[3]), match[4] is not None))
    if not archs:
        raise BuildError(f"VITQ_CUDA_ARCHS={text!r} names no architecture; give for example {DEFAULT_ARCHS!r}")
    return archs


def find_nvcc() -> str:
    """CUDA_HOME's or CUDA_PATH's nvcc, or the one on PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            nvcc = Path(home) / "bin" / "nvcc"
            if nvcc.is_file():
                return str(nvcc)
            raise BuildError(f"{variable}={home} holds no bin/nvcc; set it to the CUDA toolkit's folder, or unset it")
    if nvcc := shutil.which("nvcc"):
        return nvcc
    raise BuildError("nvcc was not found: install the CUDA toolkit (12.1 or newer; no GPU is needed) and put nvcc on PATH or set "
                     "CUDA_HOME")


def find_cutlass() -> Path:
    """CUTLASS's include folder: VITQ_CUTLASS_DIR, else the PyPI package, else third_party/cutlass."""
    if given := os.environ.get("VITQ_CUTLASS_DIR"):
        for folder in (Path(given) / "include", Path(given)):
            if (folder / "cutlass" / "version.h").is_file():
                return folder
        raise BuildError(f"VITQ_CUTLASS_DIR={given} holds no include/cutlass/version.h; set it to a CUTLASS 4 checkout")
    package = importlib.util.find_spec("cutlass_library")
    places = [Path(place) / "source" / "include" for place in (package.submodule_search_locations or () if package else ())]
    for folder in [*places, ROOT / "third_party" / "cutlass" / "include"]:
        if (folder / "cutlass" / "version.h").is_file():
            return folder
    raise BuildError("CUTLASS's headers were not found: set VITQ_CUTLASS_DIR to a CUTLASS 4 checkout, or run "
                     f"`pip install {CUTLASS}` and build with --no-build-isolation, or clone CUTLASS to third_party/cutlass")


def jobs() -> int:
    """MAX_JOBS, or the CPUs that this process may use."""
    given = os.environ.get("MAX_JOBS", "")
    if given:
        if not given.isdigit() or int(given) < 1:
            raise BuildError(f"MAX_JOBS={given}: give a number of compilers, 1 or more")
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sources(archs: Sequence[Arch]) -> list[Path]:
    """Every .cu file, without the Hopper ones where nothing is compiled for sm_90a."""
    hopper = any(arch.number == "90a" for arch in archs)
    return [path for path in sorted((FOLDER / "csrc").glob("*.cu")) if hopper or HOPPER_ONLY not in path.name]


def compile_command(nvcc: str, cutlass: Path, source: Path, target: Path, archs: Sequence[Arch], threads: int = 1) -> list[str]:
    """One object, for all architectures that the source serves. No fast math: results must round as the reference's do."""
    chosen = [a for a in archs if a.number == "90a"] if HOPPER_ONLY in source.name else list(archs)
    facts = []
    if source.name == "info.cu":
        facts = [f'-DVITQ_ARCHS="{" ".join(a.words() for a in archs)}"']
        facts += [] if any(a.number == "90a" for a in archs) else ["-DVITQ_NO_SM90"]
    return [nvcc, "-c", str(source), "-o", str(target), "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC",
            f"-I{FOLDER / 'csrc'}", f"-I{cutlass}", *facts, *(flag for arch in chosen for flag in arch.flags()),
            "--threads", str(threads), "-MD", "-MF", f"{target}.d", *shlex.split(os.environ.get("VITQ_NVCC_FLAGS", ""))]


def link_command(nvcc: str, objects: Sequence[Path], target: Path) -> list[str]:
    """The CUDA runtime is linked in and its symbols are hidden, so that it never meets the one of torch."""
    return [nvcc, "-shared", "-o", str(target), *map(str, objects), "--cudart=static", "-Xlinker=--exclude-libs=ALL"]


def is_fresh(target: Path, command: list[str]) -> bool:
    """Whether the object was made by this command from sources and headers that have not changed since."""
    record, dependencies = Path(f"{target}.command"), Path(f"{target}.d")
    try:
        if record.read_text() != shlex.join(_lasting(command)):
            return False
        made = target.stat().st_mtime
        names = shlex.split(dependencies.read_text().replace("\\\n", " ").partition(":")[2])
        return all(Path(name).stat().st_mtime <= made for name in names)
    except OSError:
        return False


def build(output: Path | None = None, folder: Path | None = None, archs: str | None = None, say=print) -> Path:
    """Compiles what has changed and links the library at `output` (beside this file by default). Raises BuildError."""
    started = time.monotonic()
    chosen = parse_archs(archs or os.environ.get("VITQ_CUDA_ARCHS") or DEFAULT_ARCHS)
    nvcc, cutlass, workers = find_nvcc(), find_cutlass(), jobs()
    output, folder = output or FOLDER / LIBRARY, folder or object_folder()
    folder.mkdir(parents=True, exist_ok=True)
    files = sources(chosen)
    threads = max(1, workers // len(files))
    objects = [folder / f"{source.stem}.o" for source in files]
    commands = [compile_command(nvcc, cutlass, source, target, chosen, threads) for source, target in zip(files, objects)]
    stale = [(target, command) for target, command in zip(objects, commands) if not is_fresh(target, command)]
    if not stale and _is_linked(folder, objects, output):
        say(f"{output} is up to date")
        return output
    words = " ".join(arch.words() for arch in chosen)
    say(f"CUDA library for {words}: {len(stale)} of {len(files)} files to compile, {workers} at once; CUTLASS in {cutlass}")
    with ThreadPoolExecutor(workers) as pool:
        for target, seconds in pool.map(lambda item: _compile(*item), sorted(stale, key=lambda item: -_size(item[0], files))):
            say(f"  {target.stem}: {seconds:.0f} s")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        _run(link_command(nvcc, objects, temporary), "linking")
        os.replace(temporary, output)  # in one step: a process that has the old one open keeps it
    finally:
        temporary.unlink(missing_ok=True)
    (folder / "linked").write_text(_linked(objects, output))
    say(f"{output}: {output.stat().st_size / 1e6:.1f} MB in {time.monotonic() - started:.0f} s")
    return output


def object_folder() -> Path:
    """build/cuda in a checkout; in an installed package a folder of the user's cache."""
    if (ROOT / "setup.py").is_file():
        return ROOT / "build" / "cuda"
    base = os.environ.get("VITQ_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitq"
    return Path(base) / "build"


def _compile(target: Path, command: list[str]) -> tuple[Path, float]:
    started = time.monotonic()
    record = Path(f"{target}.command")
    record.unlink(missing_ok=True)
    _run(command, f"compiling {Path(command[2]).name}")
    record.write_text(shlex.join(_lasting(command)))
    return target, time.monotonic() - started


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{what} failed:\n{shlex.join(command)}\n{done.stdout}{done.stderr}".rstrip())
    if text := (done.stdout + done.stderr).strip():
        print(text)


def _lasting(command: list[str]) -> list[str]:
    """The command without what does not change its result."""
    at = command.index("--threads")
    return command[:at] + command[at + 2 :]


def _size(target: Path, files: Sequence[Path]) -> int:
    """Long compilations first; the Hopper and Ampere GEMMs are made of templates in headers, so names say more than sizes."""
    return next((2 if path.name.startswith("gemm") else 1 for path in files if path.stem == target.stem), 0)


def _linked(objects: Sequence[Path], output: Path) -> str:
    return "\n".join([str(output), *(str(o) for o in objects)])


def _is_linked(folder: Path, objects: Sequence[Path], output: Path) -> bool:
    """Whether the library at `output` was linked from just these objects as they are."""
    record = folder / "linked"
    return (output.is_file() and record.is_file() and record.read_text() == _linked(objects, output)
            and all(o.stat().st_mtime <= output.stat().st_mtime for o in objects))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vitq.cuda.build", description="Compile vitq's CUDA library.")
    parser.add_argument("--archs", help=f"architectures, default {DEFAULT_ARCHS}")
    parser.add_argument("--output", type=Path,
                        help="the library to write; default: beside vitq's CUDA modules, where it is found")
    parser.add_argument("--folder", type=Path, help="where objects are kept; default: build/cuda in a checkout")
    options = parser.parse_args(arguments)
    try:
        build(options.output, options.folder, options.archs)
    except BuildError as error:
        print(f"vitq: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
