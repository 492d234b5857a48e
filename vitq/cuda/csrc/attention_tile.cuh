// Attention of 16 query rows by one warp, from codes in shared memory to int32 sums: q·k, softmax, requantized p·v.
//
// Fragments. Of an m16n8 accumulator, lane = 4·g + t holds rows g and g + 8, columns 2t and 2t + 1. The codes of two
// neighbouring 8-key blocks, packed to bytes, are therefore an A fragment of the second product whose 16 keys come in the
// order (block 0: 2t, 2t+1; block 1: 2t, 2t+1) for t = 0..3. A transposing ldmatrix of 8 tokens x 16 bytes of V gives lane
// (g, t) tokens 2t and 2t + 1 of the features 2g and 2g + 1, so one byte permutation with the next block's register makes
// the B fragment in the same order, even features and odd ones in turn. A lane then owns features 4t .. 4t + 3 of 16.
//
// Numbers. Conversions between int and float run at an eighth of the rate of an FMA. So the integer product starts from the
// bits of 1.5·2^23, and read as a float it is 1.5·2^23 + the exact sum while that stays below 2^22: at most 128·255·128
// for q·k (dim <= 128, zero point included). Rounding to a code is adding 1.5·2^23 too; the code is then the low byte.
#pragma once

#include <stdint.h>

#include "mma.cuh"

namespace vitq {

constexpr float MAGIC = 12582912.0f;  // 1.5·2^23
constexpr uint32_t MAGIC_BITS = 0x4B400000u;
constexpr float LOG2E = 1.4426950408889634f;

// Rows of 32·KS bytes in shared memory, 16-byte chunks exchanged so that 8 rows of one chunk fall into 8 bank groups.
template <int KS>
__device__ __forceinline__ uint32_t swizzle(uint32_t row) {
  return KS % 4 == 0 ? row & 7 : KS % 2 == 0 ? (row >> 1) & 3 : (row >> 2) & 1;
}

template <int KS>
__device__ __forceinline__ uint32_t place(uint32_t row, uint32_t byte) {
  return row * (32 * KS) + (((byte >> 4) ^ swizzle<KS>(row)) << 4) + (byte & 15);
}

__device__ __forceinline__ void load_shared(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// d = a·b + c, 16 x 8 x 32, s8·s8
__device__ __forceinline__ void mma_s8(uint32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                       const uint32_t (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// d += a·b, 16 x 8 x 32, u8·s8: probabilities times values
__device__ __forceinline__ void mma_u8(uint32_t (&d)[4], const uint32_t (&lower)[2], const uint32_t (&upper)[2], uint32_t b0,
                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(lower[0]), "r"(lower[1]), "r"(upper[0]), "r"(upper[1]), "r"(b0), "r"(b1));
}

// the same, 16 x 8 x 16
__device__ __forceinline__ void mma_u8(uint32_t (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What a lane adds to the address of a block of rows, for the k-step of features 32·ks .. 32·ks + 31: of two 8-row blocks
// each two chunks, in the order (block 0: 2ks, 2ks + 1; block 1: 2ks, 2ks + 1).
template <int KS>
__device__ __forceinline__ uint32_t block_offset(int lane, int ks) {
  return place<KS>((lane >> 4) * 8 + (lane & 7), 32 * ks + ((lane >> 3) & 1) * 16);
}

// The same for an A fragment of 16 rows: (rows 0..7, rows 8..15) of chunk 2ks, then of chunk 2ks + 1.
template <int KS>
__device__ __forceinline__ uint32_t row_offset(int lane, int ks) {
  return place<KS>(((lane >> 3) & 1) * 8 + (lane & 7), 32 * ks + (lane >> 4) * 16);
}

// s = bits of 1.5·2^23 + (q − q_zero)·k for NB blocks of 8 keys that start at `keys`. A query zero point is one or two more
// products with a constant A, so nothing has to be summed beforehand. start: MAGIC_BITS four times, but not known to the
// compiler, which would otherwise copy the constant to four new registers before every product.
template <int NB, int KS, bool Q_ZERO>
__device__ __forceinline__ void multiply_keys(uint32_t (&s)[NB][4], const uint32_t (&q)[KS][4], uint32_t keys, int q_zero,
                                              const uint32_t (&start)[4], int lane) {
  int first = 0, rest = 0;
  if (Q_ZERO) {
    first = min(-q_zero, 127);  // 128 does not fit s8
    rest = -q_zero - first;
  }
  const uint32_t first_bytes = (first & 0xFF) * 0x01010101u, rest_bytes = (rest & 0xFF) * 0x01010101u;
  const uint32_t first_a[4] = {first_bytes, first_bytes, first_bytes, first_bytes};
  const uint32_t rest_a[4] = {rest_bytes, rest_bytes, rest_bytes, rest_bytes};
  uint32_t address[KS];
#pragma unroll
  for (int ks = 0; ks < KS; ++ks) address[ks] = keys + block_offset<KS>(lane, ks);
#pragma unroll
  for (int j = 0; j < NB; j += 2) {
#pragma unroll
    for (int ks = 0; ks < KS; ++ks) {
      uint32_t b[4];
      ldmatrix(b, address[ks] + j * (8 * 32 * KS));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (j + i < NB) {
          if (ks == 0) {
            mma_s8(s[j + i], q[ks], b[2 * i], b[2 * i + 1], start);
          } else {
            mma_s8(s[j + i], q[ks], b[2 * i], b[2 * i + 1], s[j + i]);
          }
          if (Q_ZERO) {
            mma_s8(s[j + i], first_a, b[2 * i], b[2 * i + 1], s[j + i]);
            mma_s8(s[j + i], rest_a, b[2 * i], b[2 * i + 1], s[j + i]);
          }
        }
      }
    }
  }
}

// Largest of this lane's part of a row of positive floats (or −inf): ordered as signed integers, which have a three-way
// maximum on sm_90.
template <int NB>
__device__ __forceinline__ float maximum_of_integers(const uint32_t (&s)[NB][4], int half) {
  int m[2] = {static_cast<int>(0x80000000u), static_cast<int>(0x80000000u)};
#pragma unroll
  for (int j = 0; j < NB; ++j) {
    m[j % 2] = __vimax3_s32(m[j % 2], static_cast<int>(s[j][2 * half]), static_cast<int>(s[j][2 * half + 1]));
  }
  return __int_as_float(max(m[0], m[1]));
}

// SINGLE here and below: the last block has one key, so every lane's second one is missing.
template <int NB, bool SINGLE>
__device__ __forceinline__ float maximum_of_logits(const uint32_t (&s)[NB][4], int half) {
  float m[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int j = 0; j < NB; ++j) {
#pragma unroll
    for (int i = 0; i < 2 - (SINGLE && j == NB - 1); ++i) m[i] = fmaxf(m[i], __uint_as_float(s[j][2 * half + i]));
  }
  return fmaxf(m[0], m[1]);
}

__device__ __forceinline__ float quad_maximum(float m) {
  m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, 1));
  return fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, 2));
}

// exponential of element x: 2^(x·factor + shift). Its code is exponential·top, rounded.
struct Softmax {
  float factor, shift, top;
};

// Logits that are still integers x = 1.5·2^23 + acc: x·c − maximum·c takes one FMA if the product maximum·c is rounded
// first. What that rounding lost is the same for the whole row and goes into `top`, so nothing is lost.
__device__ __forceinline__ Softmax softmax_of_integers(float maximum, float c, float top) {
  const float product = __fmul_rn(maximum, c);
  return {c, -product, top * exp2f(-__fmaf_rn(maximum, c, -product))};
}

// Logits to the base 2^unit; a row with every key masked has maximum -inf, and with 0 there its exponentials are 0.
__device__ __forceinline__ Softmax softmax_of_logits(float maximum, float unit, float top) {
  if (maximum == -INFINITY) maximum = 0.0f;
  const float product = __fmul_rn(maximum, unit);
  return {unit, -product, top * exp2f(-__fmaf_rn(maximum, unit, -product))};
}

// Row `half` of each lane (g, or g + 8): codes packed as A fragments; returns this lane's part of the sum of exponentials.
template <int NB, bool SINGLE>
__device__ __forceinline__ float encode(uint32_t (&packed)[(NB + 1) / 2][2], const uint32_t (&s)[NB][4], int half,
                                        const Softmax& f, bool scaled) {
  float sums[2] = {0.0f, 0.0f};
#pragma unroll
  for (int pair = 0; pair < (NB + 1) / 2; ++pair) {
    uint32_t two[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = 2 * pair + i;
      if (j < NB) {
        uint32_t code[2] = {0, 0};
#pragma unroll
        for (int column = 0; column < 2 - (SINGLE && j == NB - 1); ++column) {
          const float x = __uint_as_float(s[j][2 * half + column]);
          const float e = exp2_fast(scaled ? x + f.shift : __fmaf_rn(x, f.factor, f.shift));
          sums[column] += e;
          code[column] = __float_as_uint(__fmaf_rn(e, f.top, MAGIC));
        }
        two[i] = __byte_perm(code[0], code[1], 0x0040);
      }
    }
    packed[pair][half] = 2 * pair + 1 < NB ? __byte_perm(two[0], two[1], 0x5410) : two[0] & 0xFFFFu;
  }
  return sums[0] + sums[1];
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

// Values of 32 tokens and 32 features from rows to B fragments, in place. A transposing ldmatrix of 8 tokens x 16 bytes gives
// lane (g, t) tokens 2t and 2t + 1 of the features 2g and 2g + 1; a permutation of bytes with the next 8 tokens' makes the
// fragments of the even features and of the odd ones. `values`: the first token's row. Where row `lane` had features 0..15
// and 16..31 are then this lane's fragments of each 16 features: (even, odd) x (tokens 0..15, 16..31).
template <int KS>
__device__ __forceinline__ void arrange_values(uint32_t values, int ks, int lane) {
  const uint32_t from = values + block_offset<KS>(lane, ks);
  uint32_t lower[4], upper[4];
  ldmatrix_transposed(lower, from);
  ldmatrix_transposed(upper, from + 16 * 32 * KS);
  __syncwarp();
#pragma unroll
  for (int chunk = 0; chunk < 2; ++chunk) {
    const uint32_t b[4] = {__byte_perm(lower[chunk], lower[chunk + 2], 0x6420),
                           __byte_perm(upper[chunk], upper[chunk + 2], 0x6420),
                           __byte_perm(lower[chunk], lower[chunk + 2], 0x7531),
                           __byte_perm(upper[chunk], upper[chunk + 2], 0x7531)};
    store_shared(values + place<KS>(lane, 32 * ks + 16 * chunk), b);
  }
}

// o[ks][chunk][odd] += p·v for the features 16·(2ks + chunk) + 2n + odd of column n. values: of arrange_values, an even
// number of 16 tokens.
template <int NB, int KS>
__device__ __forceinline__ void multiply_values(uint32_t (&o)[KS][2][2][4], const uint32_t (&packed)[(NB + 1) / 2][2],
                                                uint32_t values, int lane) {
  constexpr int PAIRS = (NB + 1) / 2;
  const uint32_t none[2] = {0, 0};
#pragma unroll
  for (int pair = 0; pair < PAIRS; pair += 2) {
#pragma unroll
    for (int ks = 0; ks < KS; ++ks) {
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        uint32_t b[4];
        load_shared(b, values + place<KS>(lane, 32 * ks + 16 * chunk) + pair * (16 * 32 * KS));
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const uint32_t(&next)[2] = pair + 1 < PAIRS ? packed[pair + 1 < PAIRS ? pair + 1 : pair] : none;
          mma_u8(o[ks][chunk][odd], packed[pair], next, b[2 * odd], b[2 * odd + 1]);
        }
      }
    }
  }
}

// Sums of the codes of rows g (element 0) and g + 8 (element 2), in every lane of the row: p times ones.
template <int NB>
__device__ __forceinline__ void add_codes(uint32_t (&sums)[4], const uint32_t (&packed)[(NB + 1) / 2][2]) {
#pragma unroll
  for (int pair = 0; pair < (NB + 1) / 2; ++pair) mma_u8(sums, packed[pair], 0x01010101u);
}

}  // namespace vitq
