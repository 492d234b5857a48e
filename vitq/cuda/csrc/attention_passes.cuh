// Attention of any number of keys in two passes: the maxima of the rows, then q·k again with the rest. Probabilities get
// their codes beside the true maximum of their row, so it has to be known first.
#pragma once

#include "attention_logits.cuh"

namespace vitq {
namespace {

// All of k and v in shared memory, each warp on its own through tiles of 16 queries. Logits of a few keys at a time: few
// registers, so many warps, and code short enough for the instruction cache.
template <int KS>
struct Passes {
  static constexpr int WARPS = KS <= 2 ? 10 : KS == 3 ? 8 : 6;  // most warps a block; two such blocks fit an SM
  static constexpr int ALL = KS <= 2 ? 21 : KS == 3 ? 16 : 12;   // warps an SM: 96, 128 or 168 registers a thread
  static constexpr int BLOCKS = 4;  // of 8 keys, at a time
};

template <int N>
struct Count {
  static constexpr int value = N;
};

// The keys in whole chunks, then what is left in steps of 16: f(count of 8-key blocks, first key, whether any is missing).
template <int BLOCKS, typename F>
__device__ __forceinline__ void for_keys(int keys, F&& f) {
  int first = 0;
#pragma unroll 1
  for (; first + 8 * BLOCKS <= keys; first += 8 * BLOCKS) f(Count<BLOCKS>(), first, false);
  const int pairs = (keys - first + 15) / 16;
  if (pairs == 1) f(Count<2>(), first, true);
  if (pairs == 2) f(Count<4>(), first, true);
  if (BLOCKS > 4 && pairs == 3) f(Count<(BLOCKS > 4 ? 6 : 2)>(), first, true);
  if (BLOCKS > 4 && pairs == 4) f(Count<(BLOCKS > 4 ? 8 : 2)>(), first, true);
}

// Logits of NB·8 keys; only the last 16 may be missing some.
template <int NB, int KS, Extra EXTRA, bool Q_ZERO>
__device__ __forceinline__ void logits(const Launch& p, const Place& at, uint32_t (&s)[NB][4], const uint32_t (&q)[KS][4],
                                       uint32_t k, int first, bool missing, int row, int lane) {
  multiply_keys<NB, KS, Q_ZERO>(s, q, k + first * (32 * KS), Q_ZERO ? head_of(p, at.head).q_zero : 0, p.start, lane);
  if (EXTRA == ADDED) {
    add_extra<NB>(p, at, s, row + (lane >> 2), first, nullptr, lane);
  } else if (missing) {
#pragma unroll
    for (int j = NB - 2; j < NB; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (first + 8 * j + 2 * (lane & 3) + (e & 1) >= p.a.keys) s[j][e] = 0xFF800000u;  // -inf
      }
    }
  }
}

template <int KS, Extra EXTRA, bool Q_ZERO>
__global__ __launch_bounds__(32 * Passes<KS>::WARPS, 2) void passes_kernel(const __grid_constant__ Launch p) {
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr int PITCH = 32 * KS;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, key_rows = (p.a.keys + 31) / 32 * 32;
  const uint32_t k = static_cast<uint32_t>(__cvta_generic_to_shared(shared)), v = k + key_rows * PITCH;
  const uint32_t q = v + (key_rows + 32 * warp) * PITCH, staging = q + 16 * PITCH;
  const Place at = place_of(p, blockIdx.x);
  const int end = min(at.first_row + p.part_rows, p.a.queries);

  int row = at.first_row + 16 * warp;
  if (p.a.dim != PITCH) clear_columns<KS>(p, k, key_rows, threadIdx.x, blockDim.x);
  load_rows<KS>(p, at, 1, k, 0, p.a.keys, threadIdx.x, nullptr);
  load_rows<KS>(p, at, 2, v, 0, p.a.keys, threadIdx.x, nullptr);
  if (row < end) load_tile<KS>(p, at, q, row, lane);
  commit();
  wait<0>();
  __syncthreads();
  for (int i = warp; i < key_rows / 32 * KS; i += warps) arrange_values<KS>(v + i / KS * (32 * PITCH), i % KS, lane);
  __syncthreads();

#pragma unroll 1
  for (; row < end; row += 16 * warps) {
    uint32_t fragments[KS][4];
    wait<0>();
    __syncwarp();
#pragma unroll
    for (int ks = 0; ks < KS; ++ks) ldmatrix(fragments[ks], q + row_offset<KS>(lane, ks));
    __syncwarp();
    if (row + 16 * warps < end) load_tile<KS>(p, at, q, row + 16 * warps, lane);
    commit();

    float maximum[2] = {-INFINITY, -INFINITY};
    for_keys<Passes<KS>::BLOCKS>(p.a.keys, [&](auto count, int first, bool missing) {
      constexpr int NB = decltype(count)::value;
      uint32_t s[NB][4];
      logits<NB, KS, EXTRA, Q_ZERO>(p, at, s, fragments, k, first, missing, row, lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        maximum[half] =
            fmaxf(maximum[half], EXTRA == PLAIN ? maximum_of_integers<NB>(s, half) : maximum_of_logits<NB, false>(s, half));
      }
    });
    Softmax f[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float m = quad_maximum(maximum[half]);
      f[half] = EXTRA == PLAIN ? softmax_of_integers(m, head_of(p, at.head).c, p.top) : softmax_of_logits(m, LOG2E, p.top);
    }

    float weight[2] = {0.0f, 0.0f};
    uint32_t o[KS][2][2][4], sums[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < KS * 16; ++i) o[i / 16][i / 8 % 2][i / 4 % 2][i % 4] = MAGIC_BITS;
    for_keys<Passes<KS>::BLOCKS>(p.a.keys, [&](auto count, int first, bool missing) {
      constexpr int NB = decltype(count)::value;
      uint32_t s[NB][4], packed[NB / 2][2];
      logits<NB, KS, EXTRA, Q_ZERO>(p, at, s, fragments, k, first, missing, row, lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) weight[half] += encode<NB, false>(packed, s, half, f[half], false);
      multiply_values<NB, KS>(o, packed, v + first * PITCH, lane);
      if (p.v_zeros) add_codes<NB>(sums, packed);
    });

#pragma unroll
    for (int half = 0; half < 2; ++half) weight[half] = quad_sum(weight[half]) * f[half].top;
    float share[2];
    to_floats<KS>(p, head_of(p, at.head), o, sums, weight, share, false);
    store_tile<KS>(p, at, o, share, row, end - row, staging, nullptr, lane);
  }
}

constexpr int CHUNK_BLOCKS = 8, CHUNK = 8 * CHUNK_BLOCKS, CHUNK_STAGES = 4;
template <int KS>
constexpr int CHUNK_WARPS = KS <= 2 ? 8 : 6;  // two blocks an SM: 128 or 168 registers a thread

// More keys than shared memory holds: they come in chunks, twice.
// A block takes 128 queries (96 for dim > 64).
template <int KS, Extra EXTRA>
__global__ __launch_bounds__(32 * CHUNK_WARPS<KS>, 2) void chunked_attention_kernel(const __grid_constant__ Launch p) {
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr int PITCH = 32 * KS, ROWS = 16 * CHUNK_WARPS<KS>, NB = CHUNK_BLOCKS;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const uint32_t q = static_cast<uint32_t>(__cvta_generic_to_shared(shared)), chunks = q + ROWS * PITCH;
  const Place at = place_of(p, blockIdx.x);
  const int steps = (p.a.keys + CHUNK - 1) / CHUNK;

  auto buffer = [&](int step) { return chunks + step % CHUNK_STAGES * (2 * CHUNK * PITCH); };
  auto load = [&](int step) {
    if (step < 2 * steps) {
      const int first = (step < steps ? step : step - steps) * CHUNK, rows = min(CHUNK, p.a.keys - first);
      load_rows<KS>(p, at, 1, buffer(step), first, rows, threadIdx.x, nullptr);
      if (step >= steps) load_rows<KS>(p, at, 2, buffer(step) + CHUNK * PITCH, first, rows, threadIdx.x, nullptr);
    }
    commit();
  };
  if (p.a.dim != PITCH) {
    for (int i = 0; i < CHUNK_STAGES; ++i) clear_columns<KS>(p, buffer(i), CHUNK, threadIdx.x, blockDim.x);
  }
  load_rows<KS>(p, at, 0, q, at.first_row, min(ROWS, p.a.queries - at.first_row), threadIdx.x, nullptr);
  for (int i = 0; i < CHUNK_STAGES - 1; ++i) load(i);

  const int row = at.first_row + 16 * warp, left = p.a.queries - row;
  float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  Softmax f[2];
  uint32_t o[KS][2][2][4], sums[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < KS * 16; ++i) o[i / 16][i / 8 % 2][i / 4 % 2][i % 4] = 0;

  for (int step = 0; step < 2 * steps; ++step) {
    wait<CHUNK_STAGES - 2>();
    __syncthreads();
    load(step + CHUNK_STAGES - 1);  // into the buffer that every warp has left
    if (step >= steps) {
      for (int i = warp; i < CHUNK / 32 * KS; i += CHUNK_WARPS<KS>) {
        arrange_values<KS>(buffer(step) + CHUNK * PITCH + i / KS * (32 * PITCH), i % KS, lane);
      }
      __syncthreads();
    }
    if (left <= 0) continue;
    uint32_t fragments[KS][4];
#pragma unroll
    for (int ks = 0; ks < KS; ++ks) ldmatrix(fragments[ks], q + 16 * warp * PITCH + row_offset<KS>(lane, ks));
    const int first = (step < steps ? step : step - steps) * CHUNK;
    uint32_t s[NB][4];
    if (p.q_zeros) {
      multiply_keys<NB, KS, true>(s, fragments, buffer(step), head_of(p, at.head).q_zero, p.start, lane);
    } else {
      multiply_keys<NB, KS, false>(s, fragments, buffer(step), 0, p.start, lane);
    }
    if (EXTRA == ADDED) {
      add_extra<NB>(p, at, s, row + (lane >> 2), first, nullptr, lane);
    } else if (first + CHUNK > p.a.keys) {
#pragma unroll
      for (int i = 0; i < 4 * NB; ++i) {
        if (first + 8 * (i / 4) + 2 * (lane & 3) + (i & 1) >= p.a.keys) s[i / 4][i % 4] = 0xFF800000u;
      }
    }
    if (step < steps) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        maximum[half] =
            fmaxf(maximum[half], EXTRA == PLAIN ? maximum_of_integers<NB>(s, half) : maximum_of_logits<NB, false>(s, half));
        if (step == steps - 1) {
          const float m = quad_maximum(maximum[half]);
          f[half] = EXTRA == PLAIN ? softmax_of_integers(m, head_of(p, at.head).c, p.top) : softmax_of_logits(m, LOG2E, p.top);
        }
      }
      continue;
    }
    uint32_t packed[NB / 2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) total[half] += encode<NB, false>(packed, s, half, f[half], false);
    multiply_values<NB, KS>(o, packed, buffer(step) + CHUNK * PITCH, lane);
    if (p.v_zeros) add_codes<NB>(sums, packed);
  }
  if (left <= 0) return;

  float share[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float weight = quad_sum(total[half]) * f[half].top;
    share[half] = weight > 0.0f ? head_of(p, at.head).share * reciprocal(weight) : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < KS * 16; ++i) {
    uint32_t& x = o[i / 16][i / 8 % 2][i / 4 % 2][i % 4];
    x = __float_as_uint(__int2float_rn(static_cast<int>(x) - head_of(p, at.head).v_zero * static_cast<int>(sums[i % 4 / 2 * 2])));
  }
  store_tile<KS>(p, at, o, share, row, left, q + 16 * warp * PITCH, nullptr, lane);
}

}  // namespace
}  // namespace vitq
