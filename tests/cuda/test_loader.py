"""The ctypes mirror of csrc/vitq_cuda.h, and what is said where there is no library."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from vitq.cuda import loader

HEADER = Path(loader.__file__).parent / "csrc" / "vitq_cuda.h"
TEXT = re.sub(r"//[^\n]*", "", HEADER.read_text(encoding="utf-8")) if HEADER.is_file() else ""
COMPILER = shutil.which("cc") or shutil.which("gcc")

pytestmark = pytest.mark.skipif(not TEXT, reason="the sources are not installed")


def fields_in_the_header(struct: str) -> list[str]:
    body = re.search(r"typedef struct \{([^}]*)\} " + struct + ";", TEXT)[1]
    names = []
    for declaration in filter(str.strip, body.split(";")):
        first, *others = declaration.split(",")
        names += [re.sub(r"\[.*?\]|\*", "", part).split()[-1] for part in (first, *others)]
    return names


@pytest.mark.parametrize("struct", loader.STRUCTS)
def test_fields_have_the_headers_names_and_order(struct: str) -> None:
    assert [name for name, _ in loader.STRUCTS[struct]._fields_] == fields_in_the_header(struct)


def test_every_struct_and_function_is_mirrored() -> None:
    assert set(re.findall(r"\} (Vitq\w+);", TEXT)) - {"VitqDtype", "VitqActivation", "VitqNorm"} == set(loader.STRUCTS)
    assert set(re.findall(r"\b(vitq_\w+)\(", TEXT)) == set(loader.FUNCTIONS)
    for name, arguments in loader.FUNCTIONS.items():
        declared = re.search(rf"\b{name}\(([^)]*)\)", TEXT)[1]
        assert len(arguments) == (0 if declared in ("", "void") else declared.count(",") + 1), name


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
def test_sizes_and_offsets_are_the_compilers(tmp_path: Path) -> None:
    lines = []
    for struct, mirror in loader.STRUCTS.items():
        lines.append(f'printf("{struct} %zu\\n", sizeof({struct}));')
        lines += [f'printf("{struct}.{name} %zu\\n", offsetof({struct}, {name}));' for name, _ in mirror._fields_]
    source = f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\nint main(void) {{ {" ".join(lines)} return 0; }}\n'
    (tmp_path / "sizes.c").write_text(source)
    subprocess.run([COMPILER, "sizes.c", "-o", "sizes"], cwd=tmp_path, check=True, timeout=60)
    printed = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True, timeout=60).stdout
    expected = {}
    for struct, mirror in loader.STRUCTS.items():
        expected[struct] = ctypes.sizeof(mirror)
        expected |= {f"{struct}.{name}": getattr(mirror, name).offset for name, _ in mirror._fields_}
    assert dict((name, int(value)) for name, value in (line.split() for line in printed.splitlines())) == expected


def test_constants_are_the_headers() -> None:
    for name in ("ABI_VERSION", "FEW_ROWS", "PACKED_GROUP", "MOST_HEADS", "TRANSFORM_SIZE"):
        assert int(re.search(rf"#define VITQ_{name} (\d+)", TEXT)[1]) == getattr(loader, name), name
    assert int(re.search(r"#define VITQ_MAX_SEGMENTS (\d+)", TEXT)[1]) == loader.MAX_SEGMENTS

    def value(name: str) -> int:
        return int(re.search(rf"\b{name} = (-?\d+)", TEXT)[1])

    assert {torch.float32: value("VITQ_F32"), torch.float16: value("VITQ_F16"), torch.bfloat16: value("VITQ_BF16"),
            torch.int8: value("VITQ_S8"), torch.uint8: value("VITQ_S4")} == loader.DTYPES
    assert {"": value("VITQ_NO_ACTIVATION"), "relu": value("VITQ_RELU"), "gelu": value("VITQ_GELU"),
            "gelu_tanh": value("VITQ_GELU_TANH")} == loader.ACTIVATIONS
    assert loader.GATES == loader.ACTIVATIONS | {"silu": value("VITQ_SILU")}
    assert {"": value("VITQ_NO_NORM"), "layer_norm": value("VITQ_LAYER_NORM"), "rms_norm": value("VITQ_RMS_NORM")} == loader.NORMS


@pytest.fixture
def library_at(monkeypatch):
    """Point the loader at a file; what it had loaded comes back afterwards."""
    def point(path: Path) -> str | None:
        monkeypatch.setenv("VITQ_CUDA_LIBRARY", str(path))
        loader._load.cache_clear()
        return loader.why_unavailable()

    yield point
    monkeypatch.undo()
    loader._load.cache_clear()


def compiled(folder: Path, code: str) -> Path:
    (folder / "library.c").write_text(code)
    subprocess.run([COMPILER, "-shared", "-fPIC", "library.c", "-o", "library.so"], cwd=folder, check=True, timeout=60)
    return folder / "library.so"


def stub(version: int = loader.ABI_VERSION, driver: int = 13000, runtime: int = 13000,
         build: str = "sm_80 compute_80 sm_90a, CUTLASS 4.2.0") -> str:
    own = {"vitq_abi_version": version, "vitq_driver_version": driver, "vitq_runtime_version": runtime,
           "vitq_linear_sm90_configs": 3}
    words = {"vitq_build", "vitq_error"}
    code = "".join(f"int {name}(void) {{ return {own.get(name, 0)}; }}\n" for name in loader.FUNCTIONS if name not in words)
    code += f'const char* vitq_build(void) {{ return "{build}"; }}\n'
    return code + 'const char* vitq_error(int code) { return "a reason"; }\n'


def test_a_library_that_is_not_there(library_at, monkeypatch, tmp_path: Path) -> None:
    assert "is not a file" in library_at(tmp_path / "none.so")
    with pytest.raises(RuntimeError, match="is not a file"):
        loader.library()
    monkeypatch.delenv("VITQ_CUDA_LIBRARY")
    monkeypatch.setattr(loader, "path", lambda: tmp_path / "none.so")
    loader._load.cache_clear()
    why = loader.why_unavailable()
    assert "was not built" in why and "VITQ_BUILD_CUDA=1" in why and "nvidia-cutlass" in why


def test_a_file_that_is_no_library(library_at, tmp_path: Path) -> None:
    path = tmp_path / "broken.so"
    path.write_text("not a library")
    assert "does not load" in library_at(path) and "Build it again" in loader.why_unavailable()


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
def test_libraries_of_other_versions(library_at, tmp_path: Path) -> None:
    for i, (code, words) in enumerate([(stub(version=99), "ABI version 99"),
                                       (f"int vitq_abi_version(void) {{ return {loader.ABI_VERSION}; }}", "does not load"),
                                       ("int something;", "does not load"), (stub(driver=0), "no NVIDIA driver"),
                                       (stub(driver=12040), "the driver runs CUDA 12.4, the library was built with CUDA 13.0")]):
        folder = tmp_path / str(i)
        folder.mkdir()
        assert words in library_at(compiled(folder, code)), words


@pytest.mark.skipif(COMPILER is None or torch.cuda.is_available(), reason="needs a C compiler, and no GPU")
def test_a_machine_without_a_gpu(library_at, tmp_path: Path) -> None:
    assert "sees no CUDA device" in library_at(compiled(tmp_path, stub()))
    assert loader.built_for() == "sm_80 compute_80 sm_90a, CUTLASS 4.2.0"
    with pytest.raises(RuntimeError, match=r"vitq::linear: a reason \(code -2\): M=3"):
        loader.check("linear", -2, "M=3")


@pytest.mark.parametrize("gpu, build, words", [
    (80, "sm_80 compute_80", None), (86, "sm_80", None), (89, "sm_86 sm_90a", None), (90, "sm_80 sm_90a", None),
    (90, "sm_80 compute_80", None), (100, "sm_90a compute_80", None), (120, "sm_80 compute_80 sm_90a", None),
    (90, "sm_80 sm_86", "VITQ_CUDA_ARCHS=90a"), (80, "sm_86", "VITQ_CUDA_ARCHS=80"), (89, "sm_90a", "this GPU is sm_89"),
    (100, "sm_90a", "this GPU is sm_100"), (75, "sm_80", "sm_80 or newer")])
def test_which_gpus_a_build_serves(gpu: int, build: str, words: str | None) -> None:
    why = loader.why_not_on(gpu, f"{build}, CUTLASS 4.2.0")
    assert why is None if words is None else words in why


@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
@pytest.mark.parametrize("gpu, forced, arch",
                         [(90, "", 90), (90, "80", 80), (89, "", 80), (90, "90", 90), (89, "90", None), (90, "75", None)])
def test_which_gemm_runs(library_at, tmp_path: Path, monkeypatch, gpu: int, forced: str, arch: int | None) -> None:
    library_at(compiled(tmp_path, stub()))
    monkeypatch.setattr(loader, "capability", lambda device: gpu)
    monkeypatch.setenv("VITQ_FORCE_ARCH", forced)
    if arch is None:
        with pytest.raises(ValueError, match=f"VITQ_FORCE_ARCH={forced}"):
            loader.kernel_arch.__wrapped__(0)
    else:
        assert loader.kernel_arch.__wrapped__(0) == arch
