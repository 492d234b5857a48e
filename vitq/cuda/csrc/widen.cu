// Packed int4 weights (layout.py) to int8 in the same row order, for GEMMs that read int8.
#include <algorithm>

#include <cuda_runtime.h>

#include "vitq_cuda.h"

namespace {

constexpr int THREADS = 256;

__device__ __forceinline__ uint32_t widen(uint32_t word) {  // low nibbles of four bytes to four int8
  const uint32_t low = word & 0x0F0F0F0Fu;
  return low | (low & 0x08080808u) * 0x1Eu;  // 8 · 30 = 0xF0: the sign fills the upper nibble, no byte carries into the next
}

// 16 packed bytes, half a block of 64 k: 16 codes from the low nibbles, and 16 from the high ones 32 codes further on.
__global__ void __launch_bounds__(THREADS) widen_kernel(const uint4* __restrict__ packed, uint4* __restrict__ out,
                                                        int64_t vectors) {
  const int64_t stride = int64_t(gridDim.x) * THREADS;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < vectors; i += stride) {
    const uint4 v = packed[i];
    uint4* to = out + (i >> 1) * 4 + (i & 1);
    to[0] = make_uint4(widen(v.x), widen(v.y), widen(v.z), widen(v.w));
    to[2] = make_uint4(widen(v.x >> 4), widen(v.y >> 4), widen(v.z >> 4), widen(v.w >> 4));
  }
}

}  // namespace

extern "C" int vitq_widen_int4(const uint8_t* packed, int8_t* out, int64_t rows, int64_t k, void* stream) {
  if (rows < 0 || k < 0 || k % 64) return VITQ_BAD_ARGUMENT;
  const int64_t vectors = rows * (k / 32);
  if (!vectors) return 0;
  if (!packed || !out || uintptr_t(packed) % 16 || uintptr_t(out) % 16) return VITQ_BAD_ARGUMENT;
  const auto blocks = unsigned(std::min<int64_t>((vectors + THREADS - 1) / THREADS, 1 << 20));
  widen_kernel<<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
      reinterpret_cast<const uint4*>(packed), reinterpret_cast<uint4*>(out), vectors);
  return cudaGetLastError();
}
