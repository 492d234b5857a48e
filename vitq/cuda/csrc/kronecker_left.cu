// Rows multiplied with a left matrix alone, leftᵀ·X, as the input of an output projection is where heads are mixed: nothing goes through shared memory.
//
// A block has a token, a warp 32 columns of it, all rows of them. Lane 4 g + t reads four neighbours, from column 4 g on, of those rows of X that its fragments
// have; pairs of rows, put together, are the second operand of MMAs whose columns are 4 n + q, q = 0 to 3. So what a thread gets are eight neighbours from column
// 8 t on, of rows g and g + 8: two words of codes.
#include <cuda_runtime.h>

#include "kronecker.cuh"

namespace vitq {
namespace {

constexpr int MOST_TILES = 4, MOST_WARPS = 8;

// Of two neighbours in each of two rows of X: the pairs of the first column and of the second, as float16.
__device__ __forceinline__ void pairs_of(__half, uint32_t upper, uint32_t lower, uint32_t (&pair)[2]) {
  upper = saturated(upper), lower = saturated(lower);
  pair[0] = __byte_perm(upper, lower, 0x5410), pair[1] = __byte_perm(upper, lower, 0x7632);
}
__device__ __forceinline__ void pairs_of(__nv_bfloat16, uint32_t upper, uint32_t lower, uint32_t (&pair)[2]) {
  pair[0] = halves(__uint_as_float(upper << 16), __uint_as_float(lower << 16));
  pair[1] = halves(__uint_as_float(upper & 0xFFFF0000u), __uint_as_float(lower & 0xFFFF0000u));
}

// TILES: of 16 rows.
template <int TILES, class T>
__global__ void __launch_bounds__(32 * MOST_WARPS) kronecker_left_kernel(const __grid_constant__ TransformedLaunch p) {
  __shared__ uint32_t scratch[64];
  const VitqTransformedRows& a = p.a;
  Team team{int(threadIdx.x), int(blockDim.x), 1, scratch, 0};
  const int lane = threadIdx.x % 32, t = lane % 4, g = lane / 4, first = threadIdx.x / 32 * 32;
  start_dependents();
  uint4 left[TILES][TILES];  // before the wait: no kernel writes it
#pragma unroll
  for (int i = 0; i < TILES; ++i)
#pragma unroll
    for (int k = 0; k < TILES; ++k) left[i][k] = __ldg(static_cast<const uint4*>(a.left) + 32 * (TILES * i + k) + lane);
  const float2 clip = clip_of(a);
  wait_for_kernels_before();

  uint2 x[TILES][4];  // of rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of a tile
  const T* const from = static_cast<const T*>(a.x) + int64_t(blockIdx.x) * a.x_stride + first + 4 * g;
#pragma unroll
  for (int k = 0; k < TILES; ++k)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = 16 * k + 2 * t + j % 2 + 8 * (j / 2);
      x[k][j] = make_uint2(0, 0);
      if (row < p.rows && first + 4 * g < p.columns) x[k][j] = *reinterpret_cast<const uint2*>(from + row * p.columns);
    }
  float y[TILES][4][4] = {};
#pragma unroll
  for (int k = 0; k < TILES; ++k) {
    uint32_t b[4][2];  // by columns q, pairs of the upper and of the lower eight rows
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t pair[2];
      pairs_of(T(), x[k][2 * h].x, x[k][2 * h + 1].x, pair), b[0][h] = pair[0], b[1][h] = pair[1];
      pairs_of(T(), x[k][2 * h].y, x[k][2 * h + 1].y, pair), b[2][h] = pair[0], b[3][h] = pair[1];
    }
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const uint32_t l[4] = {left[i][k].x, left[i][k].y, left[i][k].z, left[i][k].w};
#pragma unroll
      for (int q = 0; q < 4; ++q) mma(y[i][q], l, b[q][0], b[q][1], __half());
    }
  }

  const int column = first + 8 * t;
  const auto there = [&](int i, int h) { return 16 * i + 8 * h + g < p.rows && column < p.columns; };
  float lo = INFINITY, hi = -INFINITY;
#pragma unroll
  for (int i = 0; i < TILES; ++i)
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool counts = there(i, e / 2);
        lo = fminf(lo, counts ? y[i][q][e] : INFINITY), hi = fmaxf(hi, counts ? y[i][q][e] : -INFINITY);
      }
  team.extremes(lo, hi);
  const ClippedRange range = clipped_range(p, clip, lo, hi);
  if (threadIdx.x == 0) store_range(p, blockIdx.x, range);

  uint8_t* const out = reinterpret_cast<uint8_t*>(a.out) + int64_t(blockIdx.x) * a.out_stride + g * p.columns + column;
  with_rounded_codes(p, range, [&](auto code) {
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto word = [&](int e) { return pack_codes(code(y[i][0][e]), code(y[i][1][e]), code(y[i][2][e]), code(y[i][3][e])); };
        const uint2 both = make_uint2(word(2 * h), word(2 * h + 1));
        if (there(i, h)) *reinterpret_cast<uint2*>(out + (16 * i + 8 * h) * p.columns) = both;
      }
  });
}

}  // namespace

int launch_kronecker_left(const TransformedLaunch& p, cudaStream_t stream) {
  const VitqTransformedRows& a = p.a;
  if (a.right || a.gate || a.norm || a.x_dtype == VITQ_F32 || p.left_tiles > MOST_TILES || p.columns > 32 * MOST_WARPS) return VITQ_UNSUPPORTED;
  if (!p.eights || uintptr_t(a.out) % 8 != 0 || a.out_stride % 8 != 0) return VITQ_UNSUPPORTED;
  const int threads = 32 * ((p.columns + 31) / 32);
  return with_tiles<MOST_TILES>(p.left_tiles, [&](auto tiles) {
    constexpr int TILES = decltype(tiles)::value;
    return launch_early(a.x_dtype == VITQ_F16 ? kronecker_left_kernel<TILES, __half> : kronecker_left_kernel<TILES, __nv_bfloat16>, unsigned(a.m), threads, 0, stream, p);
  });
}

}  // namespace vitq
