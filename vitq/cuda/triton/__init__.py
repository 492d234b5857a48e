"""Triton kernels and their launchers. Import these modules only where Triton is installed.

Every launcher runs on the current stream of its input's device, allocates with `torch.empty` and never waits for the
GPU, so that CUDA graphs can capture it.
"""
