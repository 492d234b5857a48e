"""Quantizers: pure functions that choose a range, quantize and dequantize."""
