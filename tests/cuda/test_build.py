"""What would be compiled and how, and what is said where something is missing: none of it needs nvcc."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from vitq.cuda import build
from vitq.cuda.build import Arch, BuildError, parse_archs


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("VITQ_CUDA_ARCHS", "VITQ_CUTLASS_DIR", "VITQ_NVCC_FLAGS", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)


def test_architectures() -> None:
    assert parse_archs(build.DEFAULT_ARCHS) == [Arch("80", True), Arch("86"), Arch("89"), Arch("90a")]
    assert parse_archs("9.0a, 8.6+PTX") == [Arch("90a"), Arch("86", True)]
    assert parse_archs("90") == [Arch("90a")] and parse_archs("100a;120") == [Arch("100a"), Arch("120")]
    for wrong in ("", ";", "75", "ninety", "80;x"):
        with pytest.raises(BuildError, match="80\\+PTX"):
            parse_archs(wrong)
    assert Arch("80", True).flags() == ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_80,code=compute_80"]


def test_hopper_sources_are_compiled_for_hopper_alone() -> None:
    names = [path.name for path in build.sources(parse_archs("80;90a"))]
    assert "info.cu" in names and {"gemm_sm90.cu", "kronecker_sm90.cu"} < {name for name in names if build.HOPPER_ONLY in name}
    assert not any(build.HOPPER_ONLY in path.name for path in build.sources(parse_archs("80;86")))

    def command(name: str, archs: str) -> str:
        return " ".join(build.compile_command("nvcc", Path("cutlass"), build.FOLDER / "csrc" / name, Path("x.o"),
                                              parse_archs(archs)))

    hopper = command("gemm_sm90.cu", "80+PTX;90a")
    assert "code=sm_90a" in hopper and "compute_80" not in hopper
    other = command("rows.cu", "80+PTX;90a")
    assert all(code in other for code in ("code=sm_80", "code=compute_80", "code=sm_90a")) and "fast" not in other
    assert '-DVITQ_ARCHS="sm_80 compute_80 sm_90a"' in command("info.cu", "80+PTX;90a") and "NO_SM90" not in command("info.cu",
                                                                                                                     "80+PTX;90a")
    assert "-DVITQ_NO_SM90" in command("info.cu", "86")


def test_more_flags(monkeypatch) -> None:
    monkeypatch.setenv("VITQ_NVCC_FLAGS", "-lineinfo -Xptxas -v")
    command = build.compile_command("nvcc", Path("c"), Path("a.cu"), Path("a.o"), parse_archs("90a"))
    assert command[-3:] == ["-lineinfo", "-Xptxas", "-v"]
    assert "--cudart=static" in build.link_command("nvcc", [Path("a.o")], Path("b.so"))


def test_where_cutlass_is(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BuildError) as missing:
        build.find_cutlass()
    assert all(words in str(missing.value) for words in ("VITQ_CUTLASS_DIR", "pip install nvidia-cutlass==4.2.0.0",
                                                         "third_party/cutlass"))

    def headers(folder: Path) -> Path:
        (folder / "cutlass").mkdir(parents=True)
        (folder / "cutlass" / "version.h").touch()
        return folder

    clone = headers(tmp_path / "third_party" / "cutlass" / "include")
    assert build.find_cutlass() == clone
    package = headers(tmp_path / "site" / "cutlass_library" / "source" / "include")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "site" / "cutlass_library")]})
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
    assert build.find_cutlass() == package
    own = headers(tmp_path / "own" / "include")
    for given in (own, own.parent):
        monkeypatch.setenv("VITQ_CUTLASS_DIR", str(given))
        assert build.find_cutlass() == own
    monkeypatch.setenv("VITQ_CUTLASS_DIR", str(tmp_path))
    with pytest.raises(BuildError, match="holds no include/cutlass/version.h"):
        build.find_cutlass()


def test_where_nvcc_is(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="nvcc was not found: install the CUDA toolkit"):
        build.find_nvcc()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BuildError, match="holds no bin/nvcc"):
        build.find_nvcc()


def test_how_many_compilers(monkeypatch) -> None:
    assert build.jobs() >= 1
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(BuildError, match="MAX_JOBS=many"):
        build.jobs()


@pytest.fixture
def toolkit(monkeypatch, tmp_path: Path) -> Path:
    """An nvcc that writes what it was asked for, and a source with one header; the log has a line for each call."""
    folder = tmp_path / "toolkit"
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text('''#!/bin/sh
echo "$@" >> "$0.log"
case "$*" in *broken*) echo "error: no such thing" >&2; exit 2;; esac
while [ $# -gt 0 ]; do
  case "$1" in
    -o) out="$2";;
    -MF) depends="$2";;
    -c) source="$2";;
  esac
  shift
done
touch "$out"
[ -z "$depends" ] || echo "$out : $source $(dirname "$source")/shared.h" > "$depends"
''')
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    (folder / "include" / "cutlass").mkdir(parents=True)
    (folder / "include" / "cutlass" / "version.h").touch()
    sources = tmp_path / "package" / "csrc"
    sources.mkdir(parents=True)
    for name in ("info.cu", "one.cu", "gemm_sm90.cu", "shared.h"):
        (sources / name).touch()
    monkeypatch.setattr(build, "FOLDER", tmp_path / "package")
    monkeypatch.setenv("CUDA_HOME", str(folder))
    monkeypatch.setenv("VITQ_CUTLASS_DIR", str(folder))
    return folder


def compiled(toolkit: Path, tmp_path: Path, **kwargs) -> list[str]:
    """Names of the files that one build compiles or links."""
    log = toolkit / "bin" / "nvcc.log"
    log.write_text("")
    build.build(tmp_path / "out" / "library.so", tmp_path / "objects", say=lambda text: None, **kwargs)
    lines = log.read_text().splitlines()
    return sorted(Path(line.split()[1]).name if line.startswith("-c") else "link" for line in lines)


def test_only_what_changed_is_compiled_again(toolkit: Path, tmp_path: Path, monkeypatch) -> None:
    def later(name: str) -> None:
        path = tmp_path / "package" / "csrc" / name
        stamp = max(p.stat().st_mtime for p in (tmp_path / "objects").iterdir()) + 10
        os.utime(path, (stamp, stamp))

    everything = ["gemm_sm90.cu", "info.cu", "link", "one.cu"]
    assert compiled(toolkit, tmp_path) == everything
    assert (tmp_path / "out" / "library.so").is_file()
    assert compiled(toolkit, tmp_path) == []
    monkeypatch.setenv("MAX_JOBS", "1")  # does not change what comes out
    assert compiled(toolkit, tmp_path) == []
    later("one.cu")
    assert compiled(toolkit, tmp_path) == ["link", "one.cu"]
    later("shared.h")
    assert set(compiled(toolkit, tmp_path)) == set(everything)
    assert compiled(toolkit, tmp_path, archs="86") == ["info.cu", "link", "one.cu"]
    (tmp_path / "out" / "library.so").unlink()
    assert "link" in compiled(toolkit, tmp_path, archs="86")


def test_a_failed_compilation_says_what_failed(toolkit: Path, tmp_path: Path, capsys) -> None:
    compiled(toolkit, tmp_path)
    before = (tmp_path / "out" / "library.so").stat().st_mtime_ns
    (tmp_path / "package" / "csrc" / "broken.cu").touch()
    with pytest.raises(BuildError, match="compiling broken.cu failed:(.|\n)*error: no such thing"):
        compiled(toolkit, tmp_path)
    assert (tmp_path / "out" / "library.so").stat().st_mtime_ns == before
    assert build.main(["--output", str(tmp_path / "x.so"), "--folder", str(tmp_path / "objects")]) == 1
    assert "vitq: compiling broken.cu failed" in capsys.readouterr().err
