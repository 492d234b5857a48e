"""Integer ops, one file each: what a case is, the torch reference, the CPU kernel; dispatch picks one and says why.

The functional pipeline for those who build their own layers is `quantize` -> `int_matmul` -> `dequantize`.
"""

from __future__ import annotations

from vitq.ops.functional import dequantize, int_matmul, quantize

__all__ = ["dequantize", "int_matmul", "quantize"]
