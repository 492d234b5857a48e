"""The CUDA backend. Importing it registers its kernels with `vitq.ops.dispatch` and needs neither a GPU nor Triton.

Kernels of the compiled library come first. Where it is absent, or does not take a case, the fallback runs: cuBLASLt's int8
GEMM through `torch._int_mm`, with Triton kernels for everything around it. `python -m vitq.cuda` says which and why.
"""

from vitq.cuda import cache_kernels, kernels, row_kernels, weight_only  # noqa: F401, I001  (register; before the fallback, which is the second choice)
from vitq.cuda import fallback  # noqa: F401
from vitq.cuda.loader import why_unavailable

__all__ = ["why_unavailable"]
