// Packed int4 weights (layout.py) to int8 in the same row order, for GEMMs that read int8.
#include <algorithm>

#include <cuda_runtime.h>

#include "launch.cuh"
#include "widen.cuh"

namespace {

constexpr int THREADS = 256;

__device__ __forceinline__ uint32_t widen(uint32_t word) {  // low nibbles of four bytes to four int8
  const uint32_t low = word & 0x0F0F0F0Fu;
  return low | (low & 0x08080808u) * 0x1Eu;  // 8 · 30 = 0xF0: the sign fills the upper nibble, no byte carries into the next
}

// The codes of a row, less one of two zero points, times one of two multipliers, by the column's group: 0 or 1 in four bytes.
struct TwoGroups {
  vitq::Multiplied first, second;

  __device__ __forceinline__ uint32_t two(uint32_t nibbles, uint32_t group) const {  // two codes in the low nibbles of 16-bit lanes
    const uint32_t u = nibbles ^ 0x00080008u, mask = group * 0xFFFFu;
    return (u & mask) * second.multiplier + (u & ~mask) * first.multiplier + (second.addend & mask) + (first.addend & ~mask);
  }
  __device__ __forceinline__ uint32_t four(uint32_t word, uint32_t group) const {
    return __byte_perm(two(word & 0x000F000Fu, group & 0x00010001u), two(word >> 8 & 0x000F000Fu, group >> 8 & 0x00010001u), 0x6240);
  }
};

// ONE: no multipliers. TWO: of two groups of columns, in any order. MANY: 32 columns from a multiple of 32 on share one.
enum Groups { ONE, TWO, MANY };

// 16 packed bytes, half a block of 64 k: 16 codes from the low nibbles, and 16 from the high ones 32 codes further on.
template <Groups GROUPS>
__global__ void __launch_bounds__(THREADS) widen_kernel(const uint4* __restrict__ packed, const int8_t* __restrict__ multiplier,
                                                        const int8_t* __restrict__ zero, const uint8_t* __restrict__ group,
                                                        uint4* __restrict__ out, unsigned rows, unsigned row_vectors) {
  vitq::start_dependents();
  vitq::wait_for_kernels_before();  // one of them may still read what is written here
  const unsigned vectors = rows * row_vectors, stride = gridDim.x * THREADS;
  for (unsigned i = blockIdx.x * THREADS + threadIdx.x; i < vectors; i += stride) {
    const uint4 v = packed[i];
    uint4* to = out + int64_t(i >> 1) * 4 + (i & 1);
    if constexpr (GROUPS == ONE) {
      to[0] = make_uint4(widen(v.x), widen(v.y), widen(v.z), widen(v.w));
      to[2] = make_uint4(widen(v.x >> 4), widen(v.y >> 4), widen(v.z >> 4), widen(v.w >> 4));
    } else {
      const unsigned line = i / row_vectors, j = i - line * row_vectors, row = (line & ~31u) + line % 8 * 4 + line % 32 / 8;
      // `row` is where the line's constants are (even_first)
      const uint8_t* groups = group + (j >> 1) * 64 + (j & 1) * 16;
      const auto constants = [&](unsigned g) {
        return vitq::Multiplied(__ldg(multiplier + g * rows + row), zero ? __ldg(zero + g * rows + row) : 0);
      };
      if constexpr (GROUPS == TWO) {
        const uint4 low = __ldg(reinterpret_cast<const uint4*>(groups)), high = __ldg(reinterpret_cast<const uint4*>(groups + 32));
        const TwoGroups m{constants(0), constants(1)};
        to[0] = make_uint4(m.four(v.x, low.x), m.four(v.y, low.y), m.four(v.z, low.z), m.four(v.w, low.w));
        to[2] = make_uint4(m.four(v.x >> 4, high.x), m.four(v.y >> 4, high.y), m.four(v.z >> 4, high.z), m.four(v.w >> 4, high.w));
      } else {
        const unsigned first = __ldg(groups), second = __ldg(groups + 32);
        const vitq::Multiplied l = constants(first), h = first == second ? l : constants(second);
        to[0] = make_uint4(l.low(v.x), l.low(v.y), l.low(v.z), l.low(v.w));
        to[2] = make_uint4(h.high(v.x), h.high(v.y), h.high(v.z), h.high(v.w));
      }
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
  const auto kernel = !multiplier ? widen_kernel<ONE> : groups > 2 ? widen_kernel<MANY> : widen_kernel<TWO>;
  return vitq::launch_early(kernel, blocks, THREADS, 0, static_cast<cudaStream_t>(stream_), reinterpret_cast<const uint4*>(packed), multiplier, zero,
                            group, reinterpret_cast<uint4*>(out), unsigned(rows), unsigned(k / 32));
}
