// What lies between the two products beside the softmax: bias and masks, and the scales of the sums.
#pragma once

#include "attention_memory.cuh"

namespace vitq {
namespace {

// Exact sums of codes as floats, and what they are multiplied by. o: from 1.5·2^23; sums: of the rows' codes, used if v has a
// zero point; weight: top · sum of the exponentials. small: |sum| < 2^22 is known already.
template <int KS>
__device__ __forceinline__ void to_floats(const Launch& p, const Head& head, uint32_t (&o)[KS][2][2][4], const uint32_t (&sums)[4],
                                          const float (&weight)[2], float (&share)[2], bool small) {
  // |sum| <= 128 · sum of codes, which is below `weight` plus half the keys
  small = small || __all_sync(0xFFFFFFFFu, fmaxf(weight[0], weight[1]) + 0.5f * p.a.keys < 32700.0f);
  const float zero = static_cast<float>(-head.v_zero);
  const float shift[2] = {zero * static_cast<int>(sums[0]), zero * static_cast<int>(sums[2])};
  if (small) {
#pragma unroll
    for (int i = 0; i < KS * 16; ++i) {
      uint32_t& x = o[i / 16][i / 8 % 2][i / 4 % 2][i % 4];
      x = __float_as_uint(__uint_as_float(x) - MAGIC);
    }
  } else {
#pragma unroll
    for (int i = 0; i < KS * 16; ++i) {
      uint32_t& x = o[i / 16][i / 8 % 2][i / 4 % 2][i % 4];
      x = __float_as_uint(__int2float_rn(static_cast<int>(x - MAGIC_BITS)));
    }
  }
  if (p.v_zeros) {
#pragma unroll
    for (int i = 0; i < KS * 16; ++i) {
      uint32_t& x = o[i / 16][i / 8 % 2][i / 4 % 2][i % 4];
      x = __float_as_uint(__uint_as_float(x) + shift[i % 4 / 2]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) share[half] = weight[half] > 0.0f ? head.share * reciprocal(weight[half]) : 0.0f;
}

// Integers to natural logits with bias and mask from global memory; -inf beyond the last key.
// PAIRS: both are read two keys at a time, and the number of keys is even.
template <int NB, bool PAIRS>
__device__ __forceinline__ void add_global(const Launch& p, const Place& at, uint32_t (&s)[NB][4], int row, int first_key,
                                           int lane) {
  const float c = head_of(p, at.head).c;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = min(row + 8 * half, p.a.queries - 1);  // rows beyond the last are computed and not stored
    const int first = first_key + 2 * (lane & 3);
    const float* bias = p.a.bias ? p.a.bias + at.head * p.a.bias_head + r * p.a.bias_row + first : nullptr;
    const float* mask =
        p.a.mask ? p.a.mask + (at.unit % p.a.mask_windows) * p.a.mask_window + r * p.a.mask_row + first : nullptr;
#pragma unroll
    for (int j = 0; j < NB; ++j) {
      float extra[2] = {-INFINITY, -INFINITY};
      if (PAIRS) {
        if (first + 8 * j < p.a.keys) {
          const float2 b = bias ? __ldg(reinterpret_cast<const float2*>(bias + 8 * j)) : make_float2(0.0f, 0.0f);
          const float2 m = mask ? __ldg(reinterpret_cast<const float2*>(mask + 8 * j)) : make_float2(0.0f, 0.0f);
          extra[0] = b.x + m.x;
          extra[1] = b.y + m.y;
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (first + 8 * j + i < p.a.keys) {
            extra[i] = bias ? __ldg(bias + 8 * j + i) : 0.0f;
            if (mask) extra[i] += __ldg(mask + 8 * j + i);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t& x = s[j][2 * half + i];
        x = __float_as_uint(__fmaf_rn(__uint_as_float(x) - MAGIC, c, extra[i]));
      }
    }
  }
}

// bias, mask and shift mask. geometry: fill_geometry's, or null.
template <int NB>
__device__ __forceinline__ void add_extra(const Launch& p, const Place& at, uint32_t (&s)[NB][4], int row, int first_key,
                                          const int* geometry, int lane) {
  if (p.pairs) {
    add_global<NB, true>(p, at, s, row, first_key, lane);
  } else {
    add_global<NB, false>(p, at, s, row, first_key, lane);
  }
  if (!at.bottom && !at.right) return;
  const int seams = (at.bottom ? 1 : 0) | (at.right ? 2 : 0);
  const int own[2] = {side(p, geometry, min(row, p.a.queries - 1)), side(p, geometry, min(row + 8, p.a.queries - 1))};
#pragma unroll
  for (int j = 0; j < NB; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int other = side(p, geometry, min(first_key + 8 * j + 2 * (lane & 3) + i, p.a.keys - 1));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t& x = s[j][2 * half + i];
        if ((own[half] ^ other) & seams) x = __float_as_uint(__uint_as_float(x) + APART);
      }
    }
  }
}

}  // namespace
}  // namespace vitq
