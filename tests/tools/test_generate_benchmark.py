"""tools/generate_benchmark.py on a small model and a CPU."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
import generate_benchmark  # noqa: E402
from helpers import run_tool  # noqa: E402

SMALL = ["--layers", "1", "--hidden", "64", "--intermediate", "96", "--heads", "4", "--kv-heads", "2", "--vocab", "50", "--prompt", "20", "--new", "12",
         "--repeats", "1", "--device", "cpu"]


def test_every_cache_has_a_row() -> None:
    code, out, err = run_tool(generate_benchmark, *SMALL, "--batch", "2")
    assert (code, err) == (0, "")
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row[0].strip("| ") for row in rows] == ["cache", "dynamic", "static, disable_compile=True", "static"]
    assert all(float(row[1]) > 0 for row in rows[1:]) and rows[-1][-1].strip(" |") == "0.5000" and "kv.bits=4" in out


@pytest.mark.parametrize("recipe", ["flatquant-w4a4", "flatquant-w4a4kv4", "quarot-w4a4kv4", "quik-w4a4", "phq-mixed", "smoothquant-w8a8", "dgq-w4a8",
                                    "gptq-w4a16", "erq-w4a4", "w8a8"])
def test_every_recipe_runs(recipe: str) -> None:
    """Those that learn, measure or choose heads too."""
    code, out, err = run_tool(generate_benchmark, *SMALL, "--recipe", recipe)
    assert (code, err) == (0, "") and f"recipe {recipe} with" in out


@pytest.mark.parametrize("given, message", [
    (["--new", "8"], "--new 8: give more than 8"), (["--set", "kv.bits=16"], "leaves keys and values in float"),
    *(([f"--{name}", "0"], f"--{name} must be at least 1, got 0") for name in ("layers", "hidden", "intermediate", "heads", "kv-heads", "batch", "prompt",
                                                                              "repeats")),
    (["--layers", "-1"], "--layers must be at least 1, got -1"), (["--vocab", "2"], "--vocab must be at least 3, got 2"),
    (["--kv-heads", "3"], "--heads 4 with --kv-heads 3: give a divisor"), (["--kv-heads", "8"], "--heads 4 with --kv-heads 8: give a divisor"),
    (["--hidden", "66"], "--hidden 66 with --heads 4: give a multiple of 8"), (["--hidden", "60"], "--hidden 60 with --heads 4: give a multiple of 8"),
    (["--recipe", "erq-w4a4-paper"], "--recipe erq-w4a4-paper is for simulation"), (["--recipe", "w9"], "neither a file nor a shipped recipe"),
])
def test_mistakes(given: list[str], message: str) -> None:
    code, _, err = run_tool(generate_benchmark, *SMALL, *given)
    assert code == 2 and message in err
