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


@pytest.mark.parametrize("given, message", [(["--new", "8"], "--new 8: give more than 8"), (["--set", "kv.bits=16"], "leaves keys and values in float")])
def test_mistakes(given: list[str], message: str) -> None:
    code, _, err = run_tool(generate_benchmark, *SMALL, *given)
    assert code == 2 and message in err
