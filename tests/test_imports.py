"""The import arrows of docs/design.md, read from the source; and what `import vitq` may pull in, tried in a fresh interpreter."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vitq

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vitq"
TOOLS = ROOT / "tools"

# layer -> the layers it may import beside itself. A layer is a module of vitq/ or a folder of modules.
RECIPE = {"recipe", "recipe_checks", "recipe_files"}
NUMBERS = {"formats", "quantizers"} | RECIPE
CALIB = NUMBERS | {"plan", "transforms", "models", "calib"}
EXECUTION = NUMBERS | {"plan", "ops", "nn"}
ARROWS = {
    "vitq": set(),
    "recipe_checks": set(),
    "recipe_files": {"recipe_checks"},
    "recipe": {"recipe_checks", "recipe_files"},
    "formats": set(),
    "plan": {"formats", "recipe"},
    "quantizers": {"formats", "recipe"},
    "transforms": {"formats", "quantizers"},
    "models": set(),
    "calib": CALIB - {"recipe_checks", "recipe_files"} | {"cache", "graphs"},
    "cache": set(),
    "cpu": set(),
    "ops": {"formats", "plan", "quantizers", "cpu", "cuda"},
    "cuda": {"formats", "plan", "ops", "cache", "graphs"},
    "nn": EXECUTION - {"recipe_checks", "recipe_files"} | {"vitq", "graphs"},
    "conversion": CALIB | EXECUTION,
    "builders": {"calib"},
    "checkpoint_files": {"vitq"},
    "checkpoint": CALIB | EXECUTION | {"builders", "checkpoint_files", "conversion", "vitq"},
    "hf": CALIB | EXECUTION | {"checkpoint_files", "checkpoint", "conversion"},
    "flatquant_checkpoint": CALIB | EXECUTION | {"builders", "checkpoint_files", "conversion"},
    "publish": CALIB | EXECUTION | {"checkpoint_files", "checkpoint", "conversion", "report", "vitq"},
    "likelihood": {"calib"},
    "timing": set(),
    "graphs": set(),
    "profiling": CALIB | EXECUTION | {"conversion", "timing"},
    "evaluate": CALIB | EXECUTION | {"conversion", "checkpoint", "graphs"},
    "report": CALIB | EXECUTION | {"conversion", "checkpoint", "evaluate", "timing", "profiling", "cache"},
}
# What a layer may import of another is narrower in these cases.
ONLY = {("ops", "cpu"): {"vitq.cpu.loader", "vitq.cpu.kernels"}}
ONLY_FROM = {"cuda": {"vitq.ops.dispatch"}}

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = MODULES + sorted(TOOLS.glob("*.py"))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def imported(path: Path, tree: ast.AST) -> set[str]:
    """Every module of vitq that the tree imports, in functions too; `from vitq.ops import dispatch` is vitq.ops.dispatch."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(above + ([base] if base else []))
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in NAMES else base for alias in node.names}
    return {name for name in found if name.split(".")[0] == "vitq"}


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_layer_has_arrows():
    found = {layer(name) for name in NAMES}
    assert found == set(ARROWS), "a new layer needs its line in ARROWS and in docs/design.md"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_arrows(path: Path):
    module = module_name(path)
    own = layer(module)
    for target in imported(path, parse(path)):
        other = layer(target)
        if other == own:
            continue
        assert other in ARROWS[own], f"{relative(path)} imports {target}: {own} may import {sorted(ARROWS[own]) or 'nothing of vitq'}"
        assert target in ONLY.get((own, other), {target}), f"{relative(path)} imports {target}"
        assert module in ONLY_FROM.get(other, {module}), f"{relative(path)} imports {target}: only {ONLY_FROM[other]} may"


def test_dispatch_imports_cuda_when_it_is_asked_for():
    path = PACKAGE / "ops" / "dispatch.py"
    tree = parse(path)
    tree.body = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert not any(layer(name) == "cuda" for name in imported(path, tree))


@pytest.mark.parametrize("path", sorted(TOOLS.glob("*.py")), ids=relative)
def test_tools_use_public_names_only(path: Path):
    tree, wrong = parse(path), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wrong += [(node.lineno, f"import {a.name}") for a in node.names if a.name.startswith("vitq.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vitq":
            names = [a.name for a in node.names]
            if node.module != "vitq" or not set(names) <= set(vitq.__all__):
                wrong.append((node.lineno, f"from {node.module} import {', '.join(names)}"))
        elif isinstance(node, ast.Attribute) and (chain := dotted(node)) and chain[0] == "vitq":
            if chain[1] not in vitq.__all__ or any(re.match(r"_(?!_)", part) for part in chain):
                wrong.append((node.lineno, ".".join(chain)))
    assert not wrong, f"{relative(path)}: not public: {wrong}"


def dotted(node: ast.Attribute) -> list[str] | None:
    """a.b.c as ['a', 'b', 'c']; None where the root is not a plain name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value  # type: ignore[assignment]
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_assert_no_bare_except_no_unfinished_work(path: Path):
    for node in ast.walk(parse(path)):
        assert not isinstance(node, ast.Assert), f"{relative(path)}:{node.lineno}: assert; raise ValueError or TypeError"
        bare = isinstance(node, ast.ExceptHandler) and node.type is None
        assert not bare, f"{relative(path)}:{node.lineno}: bare except"
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", line), f"{relative(path)}:{number}: {line.strip()}"


def in_a_fresh_interpreter(code: str) -> dict:
    """What the code leaves in `result`, from a Python that has imported nothing of ours."""
    done = subprocess.run([sys.executable, "-c", f"import sys, json\n{code}\nprint(json.dumps(result))"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LOADED = "[n for n in ('timm', 'transformers', 'huggingface_hub', 'torchvision', 'matplotlib', 'datasets', 'triton', 'torch') if n in sys.modules]"
CUDA_STARTED = "'torch' in sys.modules and sys.modules['torch'].cuda.is_initialized()"


def test_import_vitq_is_light():
    result = in_a_fresh_interpreter(f"import vitq\nresult = {{'loaded': {LOADED}, 'cuda': {CUDA_STARTED}}}")
    assert result == {"loaded": [], "cuda": False}


def test_recipes_need_no_torch():
    result = in_a_fresh_interpreter(f"import vitq\nnames = list(vitq.recipes())\nresult = {{'loaded': {LOADED}, 'names': names}}")
    assert result["loaded"] == [] and result["names"]


def test_all_public_names_resolve_and_start_no_gpu():
    result = in_a_fresh_interpreter("import vitq\nmissing = [n for n in vitq.__all__ if getattr(vitq, n, None) is None]\n"
                                    f"result = {{'missing': missing, 'loaded': {LOADED}, 'cuda': {CUDA_STARTED}}}")
    assert result["missing"] == [] and result["cuda"] is False
    assert not set(result["loaded"]) & {"transformers", "matplotlib", "datasets", "triton"}


def test_dir_and_unknown_names():
    assert set(vitq.__all__) == set(dir(vitq))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vitq.nothing


def public_objects() -> list[tuple[str, object]]:
    """Public names of vitq, and the functions and classes its public modules define."""
    found: list[tuple[str, object]] = []
    for name in vitq.__all__:
        value = getattr(vitq, name)
        if inspect.ismodule(value):
            own = getattr(value, "__all__", None) or [n for n, v in vars(value).items()
                                                      if not n.startswith("_") and getattr(v, "__module__", None) == value.__name__]
            found += [(f"{name}.{n}", getattr(value, n)) for n in own]
        else:
            found.append((name, value))
    return [(name, value) for name, value in found if inspect.isfunction(value) or inspect.isclass(value)]


def test_public_functions_and_classes_have_docstrings():
    def described(value: object) -> bool:
        text = getattr(value, "__doc__", None) or ""
        # a dataclass without a docstring gets its signature as one
        return bool(text.strip()) and not text.startswith(f"{value.__name__}(")

    objects = public_objects()
    assert len(objects) > 20
    assert [name for name, value in objects if not described(value)] == []
