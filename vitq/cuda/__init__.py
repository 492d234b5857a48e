"""The CUDA backend. Importing it registers its kernels with `vitq.ops.dispatch` and needs neither a GPU nor Triton.

There is no compiled CUDA library yet, so what runs is the fallback: cuBLASLt's int8 GEMM through `torch._int_mm`, with
Triton kernels for everything around it.
"""

from vitq.cuda import kernels  # noqa: F401  (registers)
