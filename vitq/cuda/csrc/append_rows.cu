// New keys and values to the rows of a cache, and what is done to them and to the queries before: a warp has a row, or a block where there are matrices, a lane
// numbers that lie half a row apart, which rotary positions bring together.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "codes.cuh"
#include "launch.cuh"

namespace vitq {
namespace {

constexpr int WARPS = 4, PAIRS = 4, MOST_DIM = 64 * PAIRS;  // PAIRS: of a lane
constexpr int SLICES = 4, MOST_MIXED = 128;  // of a matrix: into how many parts its rows may be divided, and how many there may be

template <class T>
__device__ __forceinline__ float rounded(float x) { return float(T(x)); }
template <>
__device__ __forceinline__ float rounded<__half>(float x) { return __half2float(__float2half_rn(x)); }
template <>
__device__ __forceinline__ float rounded<__nv_bfloat16>(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

__device__ __forceinline__ float largest(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, i));
  return x;
}

// A lane's numbers lane + 32·i of the first half of a row, and those of the second.
struct Lane {
  float x[PAIRS][2];
};

template <class F>
__device__ __forceinline__ void each(int half, int lane, F f) {
#pragma unroll
  for (int i = 0; i < PAIRS; ++i)
    if (32 * i < half) f(i, lane + 32 * i, lane + 32 * i < half);
}

// x, which all warps of the block have, times a matrix [dim, dim], dim up to MOST_MIXED. Warps and lanes share the rows of the matrix, a lane has neighbouring
// columns of 16 bytes, and many are under way at once: one warp alone would wait for one after the other.
template <class M>
__device__ __forceinline__ void multiply(Lane& x, const M* matrix, int dim, int warp, int lane, float (&shared)[WARPS * SLICES + 1][MOST_MIXED]) {
  constexpr int COLUMNS = 16 / sizeof(M), ALL = WARPS * SLICES;
  const int half = dim / 2, groups = dim / COLUMNS, slices = min(32 / groups, SLICES), slice = lane / groups, first = lane % groups * COLUMNS;
  if (warp == 0) each(half, lane, [&](int i, int at, bool there) { if (there) shared[ALL][at] = x.x[i][0], shared[ALL][at + half] = x.x[i][1]; });
  __syncthreads();
  if (slice < slices) {
    float sums[COLUMNS] = {};
#pragma unroll 16
    for (int k = warp * slices + slice; k < dim; k += WARPS * slices) {
      const uint4 raw = __ldg(reinterpret_cast<const uint4*>(matrix + k * dim + first));
      const float one = shared[ALL][k];
      const M* const numbers = reinterpret_cast<const M*>(&raw);
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) sums[j] = fmaf(one, float(numbers[j]), sums[j]);
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) shared[warp * slices + slice][first + j] = sums[j];
  }
  __syncthreads();
  each(half, lane, [&](int i, int at, bool there) {
    if (!there) return;
    x.x[i][0] = x.x[i][1] = 0.0f;
    for (int s = 0; s < WARPS * slices; ++s) x.x[i][0] += shared[s][at], x.x[i][1] += shared[s][at + half];
  });
}

// As quantizers/uniform.py: scale, shift and codes of a row.
__device__ __forceinline__ void write_codes(const Lane& x, uint8_t* to, const VitqCacheRows& rows, const float* clip, int dim, int lane) {
  const int half = dim / 2;
  float lo = INFINITY, hi = -INFINITY;
  each(half, lane, [&](int i, int, bool there) {
    if (there) lo = fminf(lo, fminf(x.x[i][0], x.x[i][1])), hi = fmaxf(hi, fmaxf(x.x[i][0], x.x[i][1]));
  });
  lo = -largest(-lo), hi = largest(hi);
  const float qmax = float((1 << (rows.bits - 1)) - 1), qmin = -qmax - 1.0f;
  RowRange range;
  Scale scale;
  if (rows.symmetric) {
    const float most = clip ? fmaxf(-lo * clip[0], hi * clip[1]) : fmaxf(-lo, hi);
    scale = make_scale(__fdiv_rn(fmaxf(most, RANGE_MIN), qmax));
  } else {
    if (clip) lo = fminf(lo, 0.0f) * clip[0], hi = fmaxf(hi, 0.0f) * clip[1];
    range = make_range(lo, hi, qmin, qmax), scale = range.s;
  }
  const auto code = [&](float value) {
    const float c = rows.symmetric ? symmetric_code(fminf(fmaxf(value, qmin * scale.scale), qmax * scale.scale), scale) : ranged_code(value, range);
    return __float_as_uint(c) & 0xFF;
  };
  if (lane == 0) reinterpret_cast<float*>(to)[0] = scale.scale;
  if (lane == 1 && !rows.symmetric) reinterpret_cast<float*>(to)[1] = shift_of(range);
  to += rows.symmetric ? 4 : 8;
  each(half, lane, [&](int i, int at, bool there) {
    const uint32_t first = code(x.x[i][0]), second = code(x.x[i][1]);
    if (rows.bits > 4) {
      if (there) to[at] = first, to[at + half] = second;
    } else {  // the neighbour has the other nibble
      const uint32_t both = first & 15 | (second & 15) << 8, other = __shfl_down_sync(0xFFFFFFFFu, both, 1);
      if (there && lane % 2 == 0) to[at / 2] = uint8_t(both | other << 4), to[(at + half) / 2] = uint8_t((both | other << 4) >> 8);
    }
  });
}

template <class T, bool MIXED>
__global__ void __launch_bounds__(32 * WARPS) append_kernel(const __grid_constant__ VitqAppendRows a) {
  __shared__ float mixed[MIXED ? WARPS * SLICES + 1 : 1][MOST_MIXED];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, half = a.dim / 2;
  const int heads = 2 * a.heads + (a.q ? a.query_heads : 0);
  const int row = MIXED ? blockIdx.x : blockIdx.x * WARPS + warp, t = row % a.tokens, which = row / a.tokens % heads, batch = row / a.tokens / heads;
  start_dependents();
  wait_for_kernels_before();
  const int64_t start = *static_cast<const volatile int64_t*>(a.state);
  if (batch < a.batch) {
    const bool is_key = which < a.heads, is_value = !is_key && which < 2 * a.heads;
    const int head = is_key ? which : is_value ? which - a.heads : which - 2 * a.heads;
    const int64_t* strides = is_key ? a.k_strides : is_value ? a.v_strides : a.q_strides;
    const T* from = static_cast<const T*>(is_key ? a.k : is_value ? a.v : a.q) + batch * strides[0] + head * strides[1] + t * strides[2];
    Lane x = {};
    each(half, lane, [&](int i, int at, bool there) { if (there) x.x[i][0] = float(from[at]), x.x[i][1] = float(from[at + half]); });
    if (a.cos && !is_value) {
      const int64_t at0 = batch * a.rotary_strides[0] + t * a.rotary_strides[1];
      const T *cos = static_cast<const T*>(a.cos) + at0, *sin = static_cast<const T*>(a.sin) + at0;
      each(half, lane, [&](int i, int at, bool there) {
        if (!there) return;
        const float p = x.x[i][0], q = x.x[i][1];
        x.x[i][0] = rounded<T>(__fadd_rn(rounded<T>(__fmul_rn(p, float(cos[at]))), rounded<T>(__fmul_rn(-q, float(sin[at])))));
        x.x[i][1] = rounded<T>(__fadd_rn(rounded<T>(__fmul_rn(q, float(cos[at + half]))), rounded<T>(__fmul_rn(p, float(sin[at + half])))));
      });
    }
    if constexpr (MIXED) {
      if (is_key && a.right) {
        each(half, lane, [&](int i, int, bool) {
          for (float& v : x.x[i]) v = __half2float(__float2half_rn(fminf(fmaxf(v, -65504.0f), 65504.0f)));
        });
        multiply(x, static_cast<const __half*>(a.right), a.dim, warp, lane, mixed);
      } else if (!is_key && !is_value && a.inverse) {
        multiply(x, a.inverse, a.dim, warp, lane, mixed);
      }
      each(half, lane, [&](int i, int, bool) {
        for (float& v : x.x[i]) v = rounded<T>(v);
      });
    }
    if (MIXED && warp != 0) {
      // the first one writes
    } else if (!is_key && !is_value) {
      T* to = static_cast<T*>(a.q_out) + ((int64_t(batch) * a.query_heads + head) * a.tokens + t) * a.dim;
      each(half, lane, [&](int i, int at, bool there) { if (there) to[at] = T(x.x[i][0]), to[at + half] = T(x.x[i][1]); });
    } else if (start + t < a.room) {
      const VitqCacheRows& cache = is_key ? a.keys : a.values;
      uint8_t* to = static_cast<uint8_t*>(cache.rows) + batch * cache.strides[0] + head * cache.strides[1] + (start + t) * cache.strides[2];
      if (cache.bits > 8) {
        T* const numbers = reinterpret_cast<T*>(to);
        each(half, lane, [&](int i, int at, bool there) { if (there) numbers[at] = T(x.x[i][0]), numbers[at + half] = T(x.x[i][1]); });
      } else {
        write_codes(x, to, cache, is_key ? a.key_clip : a.value_clip, a.dim, lane);
      }
    }
  }
  if (!a.advance) return;
  // The last block counts the tokens: all others have read how many there were.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    auto* const state = reinterpret_cast<unsigned long long*>(a.state);
    if (atomicAdd(state + 1, 1ull) == gridDim.x - 1) state[1] = 0, state[0] = start + a.tokens;
  }
}

template <class T>
int launch(const VitqAppendRows& a, cudaStream_t stream) {
  const int64_t rows = int64_t(a.batch) * a.tokens * (2 * a.heads + (a.q ? a.query_heads : 0));
  if (rows > INT32_MAX - WARPS) return VITQ_UNSUPPORTED;
  if (a.right || a.inverse) return launch_early(append_kernel<T, true>, unsigned(rows), 32 * WARPS, 0, stream, a);
  return launch_early(append_kernel<T, false>, unsigned((rows + WARPS - 1) / WARPS), 32 * WARPS, 0, stream, a);
}

}  // namespace
}  // namespace vitq

extern "C" int vitq_append_rows(const VitqAppendRows* args, void* stream) {
  using namespace vitq;
  const VitqAppendRows& a = *args;
  if (a.batch < 1 || a.heads < 1 || a.tokens < 1 || a.room < 1 || !a.state || !a.k || !a.v || !a.keys.rows || !a.values.rows) return VITQ_BAD_ARGUMENT;
  if (a.q && (!a.q_out || a.query_heads < 1)) return VITQ_BAD_ARGUMENT;
  if ((a.right || a.inverse) && (a.dim % 8 != 0 || a.dim > MOST_MIXED || !aligned16(a.right) || !aligned16(a.inverse))) return VITQ_UNSUPPORTED;
  if (a.dim < 4 || a.dim % 4 != 0 || a.dim > MOST_DIM) return VITQ_UNSUPPORTED;
  const auto s = static_cast<cudaStream_t>(stream);
  return a.dtype == VITQ_F16 ? launch<__half>(a, s) : a.dtype == VITQ_BF16 ? launch<__nv_bfloat16>(a, s) : launch<float>(a, s);
}
