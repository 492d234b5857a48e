// What the kernels that multiply rows with Kronecker products have in common (kronecker.cu, kronecker_left.cu, kronecker_sm90.cu): the warps of a token, and
// where shared memory has what.
#pragma once

#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "mma.cuh"
#include "transformed_rows.cuh"

namespace vitq {

// The warps of one token.
struct Team {
  int thread, threads, barrier;
  uint32_t* scratch;  // of 64 words
  int turn;

  __device__ __forceinline__ void meet() { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

  // Two places by turns, so that one barrier is enough: who writes a place again has passed the barrier of the other.
  __device__ __forceinline__ uint32_t* place() { return scratch + 32 * (turn ^= 1); }

  __device__ __forceinline__ float sum(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
    auto* const at = reinterpret_cast<float*>(place());
    if (thread % 32 == 0) at[thread / 32] = value;
    meet();
    value = at[0];
    for (int warp = 1; warp < threads / 32; ++warp) value += at[warp];
    return value;
  }

  __device__ __forceinline__ void extremes(float& lo, float& hi) {
    const int least = __reduce_min_sync(0xFFFFFFFFu, order_of(lo)), largest = __reduce_max_sync(0xFFFFFFFFu, order_of(hi));
    auto* const at = reinterpret_cast<int*>(place());
    if (thread % 32 == 0) at[thread / 32] = least, at[16 + thread / 32] = largest;
    meet();
    const int warp = min(thread % 32, threads / 32 - 1);
    lo = of_order(__reduce_min_sync(0xFFFFFFFFu, at[warp])), hi = of_order(__reduce_max_sync(0xFFFFFFFFu, at[16 + warp]));
  }
};

constexpr int TEAM_BYTES = 256 + 16;  // of shared memory: a team's scratch, and two barriers

// Tokens of a block, and rows to come, as far as there is room behind `p.tokens`. own: bytes of a token's X; warps: of a block; staged: no token is without its row
// to come. Whether there is room for one token.
inline bool place_tokens(TransformedLaunch& p, int64_t own, int warps, int processors, int shared, bool staged) {
  const VitqTransformedRows& a = p.a;
  const int64_t raw = (a.gate ? 2 : 1) * int64_t(a.columns) * (a.x_dtype == VITQ_F32 ? 4 : 2);
  const int wanted = std::min({warps / p.warps, (a.m + processors - 1) / processors, 15});
  const auto fitting = [&](int stages) { return int(std::clamp<int64_t>((shared - p.tokens) / (own + stages * raw + TEAM_BYTES), 0, wanted)); };
  // Else two tokens at once are worth more than one and its next: 2048 gates of 14336 with 112 x 128 took 113 us in place of 152, by fragments on an H100.
  const int with_next = staged ? fitting(1) : wanted;
  p.stages = !p.eights || fitting(1) < with_next ? 0 : fitting(2) >= with_next ? 2 : 1;
  p.groups = fitting(p.stages);
  p.staged = int(own), p.stage_bytes = int(raw), p.token_bytes = int(own + p.stages * raw);
  p.scratch = p.tokens + p.groups * p.token_bytes;
  return p.groups > 0;
}

// A kernel of such a plan.
inline int start_teams(void (*kernel)(TransformedLaunch), const TransformedLaunch& p, const Gpu& gpu, cudaStream_t stream) {
  if (const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel))) return error;
  const int blocks = std::min((p.a.m + p.groups - 1) / p.groups, gpu.processors);
  return launch_early(kernel, unsigned(blocks), 32 * p.warps * p.groups, p.scratch + TEAM_BYTES * p.groups, stream, p);
}

// Runs f(tiles, as a constant), of 1 to MOST.
template <int MOST = 8, int TILES = 1, class F>
int with_tiles(int tiles, const F& f) {
  if constexpr (TILES < MOST)
    if (tiles != TILES) return with_tiles<MOST, TILES + 1>(tiles, f);
  return f(std::integral_constant<int, TILES>{});
}

}  // namespace vitq
