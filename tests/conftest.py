"""Every test runs without a hub, and those marked gpu only where there is a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "tools")]  # files that tests share; those that the tools share


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def one_thread():
    """For thousands of small tensor operations: threads cost more than they give, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cuda_operators(monkeypatch):
    """CPU tensors run the compiled kernels' classes, whose operators fall to their reference."""
    import vitq.cuda  # noqa: F401  (registers)
    from vitq.cuda import loader, tuning
    from vitq.ops import dispatch

    monkeypatch.setattr(loader, "why_unavailable", lambda *args: None)
    monkeypatch.setattr(loader, "kernel_arch", lambda *args: 90)
    monkeypatch.setattr(tuning, "widen_rows", lambda device, k, segments, groups: 256 if groups is None else 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for op in {op for op, _ in dispatch._REGISTRY}:
        compiled = [kernel for kernel in dispatch._REGISTRY[op, "cuda"] if "fallback" not in type(kernel).__module__]
        monkeypatch.setitem(dispatch._REGISTRY, (op, "cpu"), compiled)
