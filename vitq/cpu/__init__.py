"""Int8 kernels in C for x86-64 CPUs with AVX-512 VNNI, an optional part of the install.

`loader` finds and loads the compiled library, `kernels` wraps its functions for torch
tensors, `build` describes to setuptools how it is compiled. Importing this package loads
nothing; `loader.why_unavailable()` says whether the kernels can be used here.
"""
