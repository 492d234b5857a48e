// Attention of a few new tokens to the rows of a cache (VitqCachedAttention), which takes as long as reading the rows does.
//
// A block has up to eight queries of one key and value head, so that grouped queries share what is read, and a part of the tokens; its warps take 16
// of them in turn, each with copies of its own under way, without barriers. What the parts give is put together by a second kernel (flash decoding).
//
// Scores are Sᵀ = K·Qᵀ and results Oᵀ = Vᵀ·Pᵀ by mma.sync: tokens, then numbers of a head, are the m16 operand, the queries n8. Codes become float16,
// exactly; scale and shift of a row are applied to what is summed: s = scale·(codes·q) + shift·Σq. Those of a value row go into its probability: with
// s' = s + log2(scale), O = Σ 2^(s' - M)·codes + Σ 2^(s' - M)·shift/scale and L = Σ 2^(s' - M)/scale, M the largest s', so that what is multiplied is
// at most 1. Any order of k will do as long as both operands have it, so lanes take whole words of codes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "async_copy.cuh"
#include "launch.cuh"
#include "mma.cuh"

namespace vitq {
namespace cached {

constexpr int WARPS = 8, TOKENS = 16, QUERIES = 8;  // TOKENS: of a warp's step; QUERIES: of a block
constexpr int BLOCK_TOKENS = WARPS * TOKENS;
static_assert(TOKENS == 16 && QUERIES == WARPS, "a step is one m16 operand, and a warp has one query to make ready");
constexpr float LOG2E = 1.4426950408889634f;

enum Format { S4, S8, F16, BF16 };  // of rows

// How the tokens are divided: whole steps of a warp, as even as can be.
struct Parts {
  int first, each, length, count;  // tokens; count: parts that have any
  __device__ __forceinline__ Parts(const VitqCachedAttention& a, int length_) : length(length_) {
    first = a.window > 0 ? max(length - a.tokens + 1 - a.window, 0) / BLOCK_TOKENS * BLOCK_TOKENS : 0;
    const int steps = (length - first + TOKENS - 1) / TOKENS, steps_each = (steps + a.splits - 1) / a.splits;
    each = steps_each * TOKENS, count = (steps + steps_each - 1) / max(steps_each, 1);
  }
};

__device__ __forceinline__ int tokens_there(const VitqCachedAttention& a) {
  return int(min(int64_t(a.room), *static_cast<const volatile int64_t*>(a.state)));
}

__device__ __forceinline__ float load_float(const void* p, int64_t at, int dtype) {
  return dtype == VITQ_F16 ? __half2float(static_cast<const __half*>(p)[at]) : __bfloat162float(static_cast<const __nv_bfloat16*>(p)[at]);
}
__device__ __forceinline__ void store_float(void* p, int64_t at, float x, int dtype) {
  if (dtype == VITQ_F16) static_cast<__half*>(p)[at] = __float2half_rn(x);
  else static_cast<__nv_bfloat16*>(p)[at] = __float2bfloat16_rn(x);
}
// 16-bit bits of a float.
template <bool BF>
__device__ __forceinline__ uint32_t bits16(float x) { return BF ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x)); }

__device__ __forceinline__ uint32_t shared_at(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
template <int BYTES>
__device__ __forceinline__ void copy(uint32_t to, const void* from) {
  if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ uint32_t read32(const uint8_t* p) { return *reinterpret_cast<const uint32_t*>(p); }
__device__ __forceinline__ uint32_t read16(const uint8_t* p) { return *reinterpret_cast<const uint16_t*>(p); }
__device__ __forceinline__ float read_float(const uint8_t* p) { return *reinterpret_cast<const float*>(p); }

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ uint32_t transposed(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ __half2 halves(uint32_t x) { return *reinterpret_cast<__half2*>(&x); }
__device__ __forceinline__ uint32_t word(__half2 x) { return *reinterpret_cast<uint32_t*>(&x); }

// The codes in the nibbles PLACE (0 to 3) of both halves of x, as float16: their bits below the exponent of 1024 or, high ones, 16 times as large.
template <int PLACE>
__device__ __forceinline__ uint32_t nibble_codes(uint32_t x) {
  if constexpr (PLACE >= 2) x >>= 8;
  if constexpr (PLACE % 2 == 0) return word(__hsub2(halves((x & 0x000F000Fu) ^ 0x64086408u), halves(0x64086408u)));  // less 1032
  else return word(__hfma2(halves((x & 0x00F000F0u) ^ 0x64806480u), halves(0x2C002C00u), halves(0xD480D480u)));      // times 1/16, less 72
}
// The codes of two bytes of x, 8 bits each.
template <int PART>
__device__ __forceinline__ uint32_t byte_codes(uint32_t x) {
  return word(__hsub2(halves(__byte_perm(x ^ 0x80808080u, 0x64646464u, 0x4140 + 0x202 * PART)), halves(0x64806480u)));  // less 1152
}

// Rows of D numbers as the kernel reads them from shared memory.
template <int FORMAT, int D>
struct Rows {
  static constexpr bool FLOATS = FORMAT == F16 || FORMAT == BF16, BF = FORMAT == BF16;
  using Number = std::conditional_t<BF, __nv_bfloat16, __half>;  // that it is multiplied as
  static constexpr int CODES = FORMAT == S4 ? D / 2 : FORMAT == S8 ? D : 2 * D;  // bytes
  static constexpr int STEPS = D / 16, WORDS = FORMAT == S4 ? D / 32 : 0;        // WORDS: of a lane, of two steps each, as K
  static constexpr int MOST_PITCH = FLOATS ? CODES + 16 : CODES + 8;             // floats: rows start at different banks

  // Bytes of a row before its numbers, and of all of it.
  __device__ __forceinline__ static int head(const VitqCacheRows& a) { return FLOATS ? 0 : a.symmetric ? 4 : 8; }
  __device__ __forceinline__ static int bytes(const VitqCacheRows& a) { return CODES + head(a); }

  // Scale and shift of a row.
  __device__ __forceinline__ static float2 constants(const uint8_t* row, const VitqCacheRows& a) {
    if constexpr (FLOATS) return {1.0f, 0.0f};
    else if (a.symmetric) return {read_float(row), 0.0f};
    else return *reinterpret_cast<const float2*>(row);
  }

  // Which numbers a lane has in step s of K: j = 0, 1 are in the first register of the n8 operand, 2, 3 in the second.
  __device__ __forceinline__ static int place(int s, int c, int j) {
    if (FORMAT != S4) return 16 * s + 4 * c + j;
    if (s < 2 * WORDS) return 8 * (4 * (s / 2) + c) + 2 * (s % 2) + (j / 2) + 4 * (j % 2);
    return 32 * WORDS + 4 * c + j;
  }

  // The m16 operands of K of two rows, and what `multiply` does with each.
  template <class F>
  __device__ __forceinline__ static void keys(const uint8_t* first, const uint8_t* second, int c, F multiply) {
    if constexpr (FORMAT == S4) {
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        const uint32_t x = read32(first + 16 * i + 4 * c), y = read32(second + 16 * i + 4 * c);
        multiply(2 * i, {nibble_codes<0>(x), nibble_codes<0>(y), nibble_codes<1>(x), nibble_codes<1>(y)});
        multiply(2 * i + 1, {nibble_codes<2>(x), nibble_codes<2>(y), nibble_codes<3>(x), nibble_codes<3>(y)});
      }
      if constexpr (D % 32 != 0) {
        const uint32_t x = read16(first + 16 * WORDS + 2 * c), y = read16(second + 16 * WORDS + 2 * c);
        multiply(2 * WORDS, {nibble_codes<0>(x | x << 12), nibble_codes<0>(y | y << 12), nibble_codes<0>(x >> 8 | x << 4), nibble_codes<0>(y >> 8 | y << 4)});
      }
    } else {
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        if constexpr (FORMAT == S8) {
          const uint32_t x = read32(first + 16 * s + 4 * c), y = read32(second + 16 * s + 4 * c);
          multiply(s, {byte_codes<0>(x), byte_codes<0>(y), byte_codes<1>(x), byte_codes<1>(y)});
        } else {
          const uint2 x = *reinterpret_cast<const uint2*>(first + 32 * s + 8 * c), y = *reinterpret_cast<const uint2*>(second + 32 * s + 8 * c);
          multiply(s, {x.x, y.x, x.y, y.y});
        }
      }
    }
  }

  // Which number of V is in row g + 8·r of step t.
  __device__ __forceinline__ static int number(int t, int g, int r) {
    if (FORMAT == S4) {
      if (t < D / 64 * 4) return 8 * (8 * (t / 4) + g) + 2 * (t % 4) + r;
      const int left = t - D / 64 * 4, base = D / 64 * 64;
      if (D % 64 >= 32) return left < 2 ? base + 4 * g + 2 * left + r : base + 32 + 2 * g + r;
      return base + 2 * g + r;
    }
    if (FORMAT == S8) return t < D / 32 * 2 ? 4 * (8 * (t / 2) + g) + 2 * (t % 2) + r : D / 32 * 32 + 2 * g + r;
    return 16 * t + 2 * g + r;
  }

  // The m16 operands of Vᵀ of the tokens 2c, 2c + 1, 2c + 8, 2c + 9.
  template <class F>
  __device__ __forceinline__ static void values(const uint8_t* const (&row)[4], int g, F multiply) {
    if constexpr (FORMAT == S4) {
#pragma unroll
      for (int i = 0; i < D / 64; ++i) {
        uint32_t w[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) w[n] = read32(row[n] + 32 * i + 4 * g);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t x = __byte_perm(w[0], w[1], half ? 0x7632 : 0x5410), y = __byte_perm(w[2], w[3], half ? 0x7632 : 0x5410);
          multiply(4 * i + 2 * half, {nibble_codes<0>(x), nibble_codes<1>(x), nibble_codes<0>(y), nibble_codes<1>(y)});
          multiply(4 * i + 2 * half + 1, {nibble_codes<2>(x), nibble_codes<3>(x), nibble_codes<2>(y), nibble_codes<3>(y)});
        }
      }
      constexpr int T = D / 64 * 4, AT = D / 64 * 32;
      if constexpr (D % 64 >= 32) {
        const uint32_t x = read16(row[0] + AT + 2 * g) | read16(row[1] + AT + 2 * g) << 16;
        const uint32_t y = read16(row[2] + AT + 2 * g) | read16(row[3] + AT + 2 * g) << 16;
        multiply(T, {nibble_codes<0>(x), nibble_codes<1>(x), nibble_codes<0>(y), nibble_codes<1>(y)});
        multiply(T + 1, {nibble_codes<2>(x), nibble_codes<3>(x), nibble_codes<2>(y), nibble_codes<3>(y)});
      }
      if constexpr (D % 32 != 0) {
        constexpr int LAST = AT + (D % 64 >= 32 ? 16 : 0);
        const uint32_t x = row[0][LAST + g] | uint32_t(row[1][LAST + g]) << 16, y = row[2][LAST + g] | uint32_t(row[3][LAST + g]) << 16;
        multiply(STEPS - 1, {nibble_codes<0>(x), nibble_codes<1>(x), nibble_codes<0>(y), nibble_codes<1>(y)});
      }
    } else if constexpr (FORMAT == S8) {
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        uint32_t w[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) w[n] = read32(row[n] + 32 * i + 4 * g);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t x = __byte_perm(w[0], w[1], half ? 0x7362 : 0x5140), y = __byte_perm(w[2], w[3], half ? 0x7362 : 0x5140);
          multiply(2 * i + half, {byte_codes<0>(x), byte_codes<1>(x), byte_codes<0>(y), byte_codes<1>(y)});
        }
      }
      if constexpr (D % 32 != 0) {
        constexpr int AT = D / 32 * 32;
        const uint32_t x = __byte_perm(read16(row[0] + AT + 2 * g), read16(row[1] + AT + 2 * g), 0x5140);
        const uint32_t y = __byte_perm(read16(row[2] + AT + 2 * g), read16(row[3] + AT + 2 * g), 0x5140);
        multiply(STEPS - 1, {byte_codes<0>(x), byte_codes<1>(x), byte_codes<0>(y), byte_codes<1>(y)});
      }
    } else {
#pragma unroll
      for (int t = 0; t < STEPS; ++t) {
        uint32_t w[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) w[n] = read32(row[n] + 32 * t + 4 * g);
        multiply(t, {__byte_perm(w[0], w[1], 0x5410), __byte_perm(w[0], w[1], 0x7632), __byte_perm(w[2], w[3], 0x5410), __byte_perm(w[2], w[3], 0x7632)});
      }
    }
  }

  // The rows of a step's tokens from `token` on to shared memory. All of them are the cache's: its room is a multiple of a step.
  __device__ __forceinline__ static void fetch(uint8_t* to, const uint8_t* rows, const VitqCacheRows& a, int token, int lane) {
    const uint8_t* from = rows + token * a.strides[2];
    const uint32_t at = shared_at(to);
    const int bytes = Rows::bytes(a);
    if (!FLOATS && a.strides[2] == bytes && a.aligned) {
      for (int i = 16 * lane; i < TOKENS * bytes; i += 16 * 32) copy<16>(at + i, from + i);
    } else if (FLOATS && a.aligned) {
      constexpr int PIECES = CODES / 16;
#pragma unroll
      for (int i = lane; i < TOKENS * PIECES; i += 32) {
        const int row = i / PIECES, in = 16 * (i % PIECES);
        copy<16>(at + row * MOST_PITCH + in, from + row * a.strides[2] + in);
      }
    } else {
      const int words = bytes / 4;
      for (int i = lane; i < TOKENS * words; i += 32) {
        const int row = i / words, in = 4 * (i % words);
        copy<4>(at + row * (FLOATS ? MOST_PITCH : bytes) + in, from + row * a.strides[2] + in);
      }
    }
  }
};

template <int KF, int VF, int D>
struct Shape {
  using K = Rows<KF, D>;
  using V = Rows<VF, D>;
  static constexpr int STAGE = (TOKENS * (K::MOST_PITCH + V::MOST_PITCH) + 15) / 16 * 16;
  static constexpr int STAGES = 2;
  static constexpr int Q_PITCH = 2 * D + 8;  // bytes between queries
  static constexpr int Q_BYTES = QUERIES * (Q_PITCH + 8);
  static constexpr int RESULTS = WARPS * QUERIES * (D + 2) * 4;
  static constexpr int RING = WARPS * STAGES * STAGE;
  static constexpr int SHARED = Q_BYTES + (RING > RESULTS ? RING : RESULTS);
  static constexpr int FIT = 225000 / (SHARED + 1024), BLOCKS = FIT < 2 ? FIT : 2;  // of a multiprocessor
};

template <int KF, int VF, int D>
__global__ void __launch_bounds__(32 * WARPS, Shape<KF, VF, D>::BLOCKS) attend_kernel(const __grid_constant__ VitqCachedAttention a, int tiles) {
  using S = Shape<KF, VF, D>;
  using K = typename S::K;
  using V = typename S::V;
  extern __shared__ __align__(16) uint8_t shared[];
  uint8_t* const ring = shared + S::Q_BYTES;
  float* const q_sum = reinterpret_cast<float*>(shared + QUERIES * S::Q_PITCH);
  float* const q_scale = q_sum + QUERIES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int split = blockIdx.x % a.splits, unit = blockIdx.x / a.splits, tile = unit % tiles, head = unit / tiles % a.heads, batch = unit / tiles / a.heads;
  const int group = a.query_heads / a.heads, queries = group * a.tokens;  // of the key and value head
  const uint8_t* const keys = static_cast<const uint8_t*>(a.keys.rows) + batch * a.keys.strides[0] + head * a.keys.strides[1];
  const uint8_t* const values = static_cast<const uint8_t*>(a.values.rows) + batch * a.values.strides[0] + head * a.values.strides[1];
  start_dependents();
  {  // rows that were there a token ago, or more: those of two turns of all warps
    const Parts old(a, tokens_there(a));
    const int begin = old.first + split * old.each, there = min(min(old.each, 2 * BLOCK_TOKENS), old.length - begin);
    // Else those of several heads lie side by side.
    if (a.keys.strides[2] == K::bytes(a.keys)) prefetch(keys + begin * a.keys.strides[2], there * a.keys.strides[2]);
    if (a.values.strides[2] == V::bytes(a.values)) prefetch(values + begin * a.values.strides[2], there * a.values.strides[2]);
  }
  wait_for_kernels_before();
  constexpr int LANE = (D + 31) / 32;
  float numbers[LANE];  // of the query `warp`, on their way while the length is
  {
    const int row = tile * QUERIES + warp, t = row % a.tokens, h = head * group + row / a.tokens;
    const int64_t at = batch * a.q_strides[0] + h * a.q_strides[1] + t * a.q_strides[2];
#pragma unroll
    for (int n = 0; n < LANE; ++n) numbers[n] = row < queries && 32 * n + lane < D ? load_float(a.q, at + 32 * n + lane, a.dtype) : 0.0f;
  }
  const int length = tokens_there(a);
  const Parts parts(a, length);
  constexpr int PITCH = D + 2;
  float* const part = a.splits == 1 ? nullptr : a.workspace + (int64_t(unit) * a.splits + split) * QUERIES * PITCH;
  if (split >= parts.count && part) {  // nothing is there
    if (threadIdx.x < QUERIES) part[threadIdx.x * PITCH + D] = -INFINITY;
    return;
  }
  const int begin = parts.first + split * parts.each, end = min(begin + parts.each, length);

  uint8_t* const mine = ring + warp * S::STAGES * S::STAGE;
  const auto fetch = [&](int token, int stage) {
    uint8_t* const to = mine + stage * S::STAGE;
    if (token < end) {
      K::fetch(to, keys, a.keys, token, lane);
      V::fetch(to + TOKENS * K::MOST_PITCH, values, a.values, token, lane);
    }
    commit_copies();
  };
  int token = begin + warp * TOKENS;
#pragma unroll
  for (int s = 0; s < S::STAGES - 1; ++s) fetch(token + s * BLOCK_TOKENS, s);

  // Of the queries 2c and 2c + 1: up to where they see, and their rows of the mask.
  int last[2];
  const uint8_t* mask[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int row = tile * QUERIES + 2 * c + j, t = row % a.tokens;
    last[j] = row < queries || a.tokens == 1 ? length - a.tokens + t : -1;
    mask[j] = static_cast<const uint8_t*>(a.mask) + batch * a.mask_batch + t * a.mask_row;
  }
  const int back = a.window > 0 ? a.window : INT32_MAX;
  // Which queries see which tokens, a bit each: row g or g + 8, query. Read a step ahead, for it may be a long way.
  constexpr uint32_t ALL = 15;
  const auto seen_of = [&](int token) {
    if (!a.mask && token + TOKENS <= length - a.tokens + 1 && length - 1 - token < back) return ALL;  // also by queries that there are not
    uint32_t bits = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int n = token + 8 * r + g;
      const bool one = n <= last[0] && last[0] - n < back && (!a.mask || mask[0][n] != 0);
      const bool other = a.tokens == 1 ? one : n <= last[1] && last[1] - n < back && (!a.mask || mask[1][n] != 0);
      bits |= (uint32_t(one) | uint32_t(other) << 1) << 2 * r;
    }
    return bits;
  };
  uint32_t next = token < end ? seen_of(token) : 0;

  {  // Queries as the n8 operand, each less a power of two, so that none leaves float16's range.
    float largest = 0.0f, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < LANE; ++i) largest = fmaxf(largest, fabsf(numbers[i]));
    largest = __uint_as_float(__reduce_max_sync(0xFFFFFFFFu, __float_as_uint(largest)));
    const int exponent = K::BF ? 0 : max(min(int(__float_as_uint(largest) >> 23) - 127, 120), -120);
    const float down = __uint_as_float(uint32_t(127 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < LANE; ++i)
      if (32 * i + lane < D) {
        const uint32_t bits = bits16<K::BF>(numbers[i] * down);
        *reinterpret_cast<uint16_t*>(shared + warp * S::Q_PITCH + 2 * (32 * i + lane)) = uint16_t(bits);
        sum += K::BF ? __uint_as_float(bits << 16) : __half2float(__ushort_as_half(uint16_t(bits)));
      }
#pragma unroll
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, i);
    if (lane == 0) q_sum[warp] = sum, q_scale[warp] = a.scale * LOG2E * __uint_as_float(uint32_t(127 + exponent) << 23);
  }
  __syncthreads();
  uint32_t q[K::STEPS][2];
#pragma unroll
  for (int s = 0; s < K::STEPS; ++s)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint8_t* row = shared + g * S::Q_PITCH;
      q[s][r] = read16(row + 2 * K::place(s, c, 2 * r)) | read16(row + 2 * K::place(s, c, 2 * r + 1)) << 16;
    }

  // Of the queries 2c and 2c + 1: what a score is multiplied with.
  float sums[2], scales[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) sums[j] = q_sum[2 * c + j], scales[j] = q_scale[2 * c + j];
  const int k_head = K::head(a.keys), k_pitch = K::FLOATS ? K::MOST_PITCH : K::CODES + k_head;
  const int v_head = V::head(a.values), v_pitch = V::FLOATS ? V::MOST_PITCH : V::CODES + v_head;

  float o[V::STEPS][4] = {}, most[2] = {-INFINITY, -INFINITY}, total[2] = {}, shifts[2] = {};
  int stage = 0;
  for (; token < end; token += BLOCK_TOKENS) {
    const uint32_t seen = next;
    wait_copies<S::STAGES - 2>();
    __syncwarp();
    fetch(token + (S::STAGES - 1) * BLOCK_TOKENS, (stage + S::STAGES - 1) % S::STAGES);  // where a step ago all lanes read
    if (token + BLOCK_TOKENS < end) next = seen_of(token + BLOCK_TOKENS);
    const uint8_t* const k_rows = mine + stage * S::STAGE;
    const uint8_t* const v_rows = k_rows + TOKENS * K::MOST_PITCH;
    float score[4] = {}, inverse[2], ratio[2], tops[2];
    K::keys(k_rows + g * k_pitch + k_head, k_rows + (g + 8) * k_pitch + k_head, c,
            [&](int s, const uint32_t (&operand)[4]) { mma(score, operand, q[s][0], q[s][1], typename K::Number()); });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 k_of = K::constants(k_rows + (g + 8 * r) * k_pitch, a.keys), v_of = V::constants(v_rows + (g + 8 * r) * v_pitch, a.values);
      const float level = V::FLOATS ? 0.0f : __log2f(v_of.x);
      inverse[r] = __fdividef(1.0f, v_of.x), ratio[r] = v_of.y * inverse[r];
#pragma unroll
      for (int j = 0; j < 2; ++j) score[2 * r + j] = fmaf(fmaf(k_of.x, score[2 * r + j], k_of.y * sums[j]), scales[j], level);
    }
    if (seen != ALL) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (!(seen >> (2 * r + j) & 1)) score[2 * r + j] = -INFINITY;
        if (!(seen >> 2 * r & 3)) inverse[r] = ratio[r] = 0.0f;  // a row that was never written has the scale 0
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) tops[j] = fmaxf(most[j], fmaxf(score[j], score[2 + j]));
    if (__any_sync(0xFFFFFFFFu, tops[0] > most[0] || tops[1] > most[1])) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 4; i < 32; i *= 2) tops[j] = fmaxf(tops[j], __shfl_xor_sync(0xFFFFFFFFu, tops[j], i));
        const float factor = tops[j] == -INFINITY ? 1.0f : power_of_two(most[j] - tops[j]);
        most[j] = tops[j], total[j] *= factor, shifts[j] *= factor;
#pragma unroll
        for (int t = 0; t < V::STEPS; ++t) o[t][j] *= factor, o[t][2 + j] *= factor;
      }
    }
    const float base[2] = {most[0] == -INFINITY ? 0.0f : most[0], most[1] == -INFINITY ? 0.0f : most[1]};
    uint32_t p[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        x[j] = power_of_two(score[2 * r + j] - base[j]);
        total[j] = fmaf(x[j], inverse[r], total[j]), shifts[j] = fmaf(x[j], ratio[r], shifts[j]);
      }
      p[r] = transposed(bits16<V::BF>(x[0]) | bits16<V::BF>(x[1]) << 16);
    }
    const uint8_t* const first = v_rows + v_head + 2 * c * v_pitch;
    const uint8_t* const rows[4] = {first, first + v_pitch, first + 8 * v_pitch, first + 9 * v_pitch};
    V::values(rows, g, [&](int t, const uint32_t (&operand)[4]) { mma(o[t], operand, p[0], p[1], typename V::Number()); });
    stage = (stage + 1) % S::STAGES;
  }
  wait_copies<0>();
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int i = 4; i < 32; i *= 2) {
      total[j] += __shfl_xor_sync(0xFFFFFFFFu, total[j], i);
      shifts[j] += __shfl_xor_sync(0xFFFFFFFFu, shifts[j], i);
    }

  // The warps' results, put together.
  __syncthreads();
  float* const results = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float* const to = results + (warp * QUERIES + 2 * c + j) * PITCH;
#pragma unroll
    for (int t = 0; t < V::STEPS; ++t)
#pragma unroll
      for (int r = 0; r < 2; ++r) to[V::number(t, g, r)] = o[t][2 * r + j] + shifts[j];
    if (g == 0) to[D] = most[j], to[D + 1] = total[j];
  }
  __syncthreads();
  const int m = warp, row = tile * QUERIES + m;
  if (row < queries) {
    float top = -INFINITY, factor[WARPS], sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, results[(w * QUERIES + m) * PITCH + D]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float* from = results + (w * QUERIES + m) * PITCH;
      factor[w] = from[D] == -INFINITY ? 0.0f : power_of_two(from[D] - top);
      sum = fmaf(factor[w], from[D + 1], sum);
    }
    const float last_factor = a.splits == 1 ? (sum > 0.0f ? 1.0f / sum : 0.0f) : 1.0f;
    const int64_t out = batch * a.out_strides[0] + row % a.tokens * a.out_strides[1] + (head * group + row / a.tokens) * a.out_strides[2];
    for (int d = lane; d < D; d += 32) {
      float y = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) y = fmaf(factor[w], results[(w * QUERIES + m) * PITCH + d], y);
      if (part) part[m * PITCH + d] = y;
      else store_float(a.out, out + d, y * last_factor, a.dtype);
    }
    if (part && lane == 0) part[m * PITCH + D] = top, part[m * PITCH + D + 1] = sum;
  }
}

template <int KF, int VF, int D>
int launch_shape(const VitqCachedAttention& a, cudaStream_t stream) {
  const int tiles = (a.query_heads / a.heads * a.tokens + QUERIES - 1) / QUERIES;
  Gpu gpu;
  if (const int error = gpu_of_now(gpu)) return error;
  if (Shape<KF, VF, D>::SHARED > gpu.shared) return VITQ_UNSUPPORTED;
  if (Shape<KF, VF, D>::SHARED > 48 * 1024)
    if (cudaError_t error = allow_shared(reinterpret_cast<const void*>(attend_kernel<KF, VF, D>))) return error;
  return launch_early(attend_kernel<KF, VF, D>, unsigned(a.batch * a.heads * tiles * a.splits), 32 * WARPS, Shape<KF, VF, D>::SHARED, stream, a, tiles);
}

template <int KF, int D>
int launch_values(const VitqCachedAttention& a, cudaStream_t stream) {
  if (a.values.bits <= 4) return launch_shape<KF, S4, D>(a, stream);
  if (a.values.bits <= 8) return launch_shape<KF, S8, D>(a, stream);
  if constexpr (KF != BF16)
    if (a.dtype == VITQ_F16) return launch_shape<KF, F16, D>(a, stream);
  if constexpr (KF != F16)
    if (a.dtype == VITQ_BF16) return launch_shape<KF, BF16, D>(a, stream);
  return VITQ_UNSUPPORTED;
}

template <int D>
int launch_keys(const VitqCachedAttention& a, cudaStream_t stream) {
  if (a.keys.bits <= 4) return launch_values<S4, D>(a, stream);
  if (a.keys.bits <= 8) return launch_values<S8, D>(a, stream);
  return a.dtype == VITQ_F16 ? launch_values<F16, D>(a, stream) : launch_values<BF16, D>(a, stream);
}

}  // namespace cached

// Heads of 64, 80, 96 and 128 numbers are compiled by files of their own.
int attend_64(const VitqCachedAttention& a, cudaStream_t stream);
int attend_80(const VitqCachedAttention& a, cudaStream_t stream);
int attend_96(const VitqCachedAttention& a, cudaStream_t stream);
int attend_128(const VitqCachedAttention& a, cudaStream_t stream);

}  // namespace vitq
