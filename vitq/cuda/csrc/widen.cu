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

// Two levels of scales: the codes of a row, less one of two zero points, times one of two multipliers, by the column's group. group: 0 or 1 in
// four bytes. Of more than two groups 32 columns share one, so that first and second are the same.
struct Levels {
  uint32_t first, second, first_offset, second_offset;

  // Two codes in the low nibbles of 16-bit lanes. Multipliers are up to 127: code + 8 times that, and what takes 8 of them off again and adds
  // the offset (a multiple of 256 keeps the sum positive), stay in their lanes. The low bytes are the result, so offsets count modulo 256.
  __device__ __forceinline__ uint32_t two(uint32_t nibbles, uint32_t group) const {
    const uint32_t u = nibbles ^ 0x00080008u, mask = group * 0xFFFFu;
    const uint32_t ones = 0x00010001u & mask, zeros = 0x00010001u & ~mask;
    return (u & mask) * second + (u & ~mask) * first + ones * (0x800u - 8 * second + second_offset) +
           zeros * (0x800u - 8 * first + first_offset);
  }

  __device__ __forceinline__ uint32_t four(uint32_t word, uint32_t group) const {
    return __byte_perm(two(word & 0x000F000Fu, group & 0x00010001u), two(word >> 8 & 0x000F000Fu, group >> 8 & 0x00010001u), 0x6240);
  }
};

// 16 packed bytes, half a block of 64 k: 16 codes from the low nibbles, and 16 from the high ones 32 codes further on.
template <bool MULTIPLIED>
__global__ void __launch_bounds__(THREADS) widen_kernel(const uint4* __restrict__ packed, const int8_t* __restrict__ multiplier,
                                                        const int8_t* __restrict__ zero, const uint4* __restrict__ group,
                                                        uint4* __restrict__ out, unsigned rows, unsigned row_vectors, bool stepped) {
  const unsigned vectors = rows * row_vectors, stride = gridDim.x * THREADS;
  for (unsigned i = blockIdx.x * THREADS + threadIdx.x; i < vectors; i += stride) {
    const uint4 v = packed[i];
    uint4* to = out + int64_t(i >> 1) * 4 + (i & 1);
    if constexpr (MULTIPLIED) {
      const unsigned line = i / row_vectors, j = i - line * row_vectors, row = (line & ~31u) + line % 8 * 4 + line % 32 / 8;
      // `row` is where the line's constants are (even_first)
      const uint4* groups = group + (j >> 1) * 4 + (j & 1);
      const uint4 low = __ldg(groups), high = __ldg(groups + 2);
      const auto levels = [&](unsigned a, unsigned b) {
        Levels m{uint32_t(multiplier[a * rows + row]), uint32_t(multiplier[b * rows + row]), 0, 0};
        if (zero) {
          m.first_offset = -uint32_t(int32_t(zero[a * rows + row])) * m.first & 0xFFu;
          m.second_offset = -uint32_t(int32_t(zero[b * rows + row])) * m.second & 0xFFu;
        }
        return m;
      };
      const unsigned of_low = low.x & 0xFF, of_high = high.x & 0xFF;
      const Levels m = stepped ? levels(of_low, of_low) : levels(0, 1), h = stepped ? levels(of_high, of_high) : m;
      to[0] = make_uint4(m.four(v.x, low.x), m.four(v.y, low.y), m.four(v.z, low.z), m.four(v.w, low.w));
      to[2] = make_uint4(h.four(v.x >> 4, high.x), h.four(v.y >> 4, high.y), h.four(v.z >> 4, high.z), h.four(v.w >> 4, high.w));
    } else {
      to[0] = make_uint4(widen(v.x), widen(v.y), widen(v.z), widen(v.w));
      to[2] = make_uint4(widen(v.x >> 4), widen(v.y >> 4), widen(v.z >> 4), widen(v.w >> 4));
    }
  }
}

}  // namespace

extern "C" int vitq_widen_int4(const uint8_t* packed, const int8_t* multiplier, const int8_t* zero, const uint8_t* group,
                               int64_t groups, int8_t* out, int64_t rows, int64_t k, void* stream_) {
  if (rows < 0 || k < 0 || k % 64 || (multiplier && (groups < 2 || groups > 256)) || (multiplier == nullptr) != (group == nullptr) || (zero && !multiplier)) return VITQ_BAD_ARGUMENT;
  const int64_t vectors = rows * (k / 32);
  if (!vectors) return 0;
  if (!packed || !out || uintptr_t(packed) % 16 || uintptr_t(out) % 16 || uintptr_t(group) % 16) return VITQ_BAD_ARGUMENT;
  if (vectors > 1u << 31) return VITQ_UNSUPPORTED;
  const auto blocks = unsigned(std::min<int64_t>((vectors + THREADS - 1) / THREADS, 1 << 20));
  const auto kernel = multiplier ? widen_kernel<true> : widen_kernel<false>;
  kernel<<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream_)>>>(
      reinterpret_cast<const uint4*>(packed), multiplier, zero, reinterpret_cast<const uint4*>(group),
      reinterpret_cast<uint4*>(out), unsigned(rows), unsigned(k / 32), groups > 2);
  return cudaGetLastError();
}
