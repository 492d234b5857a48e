// Rows that are gated or normalised, or whose range is clipped, and quantized with the range that they then have: a block takes a row, which stays in
// its registers. Those that are multiplied with matrices as well are kronecker.cu's.
#include <algorithm>

#include <cuda_runtime.h>

#include "launch.cuh"
#include "transformed_rows.cuh"

namespace vitq {
namespace {

constexpr int MOST_COLUMNS = 32768;
constexpr int MOST_THREADS = 1024;

// The sum of a value over a block, in the same order whatever the run. meeting: one of two places, by turns.
__device__ __forceinline__ float block_sum(float value, float (&meeting)[32]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  if (threadIdx.x % 32 == 0) meeting[threadIdx.x / 32] = value;
  __syncthreads();
  value = meeting[0];
  for (int warp = 1; warp < int(blockDim.x) / 32; ++warp) value += meeting[warp];
  return value;
}

// T: of x. V: groups of 8 neighbouring columns a thread. EIGHTS: they are read and written at once. NORM: values are floats; without a norm they are T's, and
// stay so, in half of the registers.
template <class T, int V, bool EIGHTS, bool NORM>
__global__ void __launch_bounds__(MOST_THREADS) transformed_rows_kernel(const __grid_constant__ TransformedLaunch p) {
  __shared__ float sums[2][32];
  __shared__ int least[32], largest[32];
  start_dependents();
  const VitqTransformedRows& a = p.a;
  if constexpr (NORM)
    if (gridDim.x <= FEW_BLOCK_ROWS) prefetch(a.weight, 4 * a.columns), prefetch(a.bias, 4 * a.columns);
  const float2 clip = clip_of(a);
  wait_for_kernels_before();
  const unsigned row = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + int64_t(row) * a.x_stride;
  const auto column = [&](int v) { return 8 * int(threadIdx.x + v * blockDim.x); };
  const auto used = [&](int v) { return column(v) < a.columns; };
  const auto there = [&](int v, int w) { return EIGHTS ? used(v) : column(v) + w < a.columns; };
  float y[NORM ? V : 1][8];
  Eight<T> kept[NORM ? 1 : V];
  const auto place = [&](int v) { return EIGHTS && !used(v) ? 0 : column(v); };  // where there are no columns, the first ones once more: they change no range
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if constexpr (NORM) to_floats(read_eight<T, EIGHTS>(x, place(v), a.columns), y[v]);
    else kept[v] = read_eight<T, EIGHTS>(x, place(v), a.columns);
  }
  if constexpr (!NORM) {
    if (a.gate) {
      Eight<T> up[V];
#pragma unroll
      for (int v = 0; v < V; ++v) up[v] = read_eight<T, EIGHTS>(x + a.columns, place(v), a.columns);
#pragma unroll
      for (int v = 0; v < V; ++v) apply_gate<T>(kept[v], up[v], a.gate);
    }
  }
  // The values of group v, in floats.
  const auto values = [&](int v, auto use) {
    if constexpr (NORM) {
      use(y[v]);
    } else {
      float converted[8];
      to_floats(kept[v], converted);
      use(converted);
    }
  };
  if constexpr (NORM) {
    float mean = 0.0f, squares = 0.0f;
    if (a.norm == VITQ_LAYER_NORM) {
      float sum = 0.0f;
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int w = 0; w < 8; ++w) sum += there(v, w) ? y[v][w] : 0.0f;
      mean = block_sum(sum, sums[0]) * p.inverse_columns;
    }
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
      for (int w = 0; w < 8; ++w) {
        const float off = there(v, w) ? y[v][w] - mean : 0.0f;
        squares = fmaf(off, off, squares);
      }
    const float rstd = rsqrtf(fmaf(block_sum(squares, sums[1]), p.inverse_columns, a.eps));
#pragma unroll
    for (int v = 0; v < V; ++v) normalise<EIGHTS>(a, y[v], place(v), mean, rstd);
  }

  float lo = INFINITY, hi = -INFINITY;
#pragma unroll
  for (int v = 0; v < V; ++v)
    values(v, [&](const float (&x)[8]) {
#pragma unroll
      for (int w = 0; w < 8; ++w) {
        const bool counts = EIGHTS || there(v, w);
        lo = fminf(lo, counts ? x[w] : INFINITY), hi = fmaxf(hi, counts ? x[w] : -INFINITY);
      }
    });
  const int low = __reduce_min_sync(0xFFFFFFFFu, order_of(lo)), high = __reduce_max_sync(0xFFFFFFFFu, order_of(hi));
  if (threadIdx.x % 32 == 0) least[threadIdx.x / 32] = low, largest[threadIdx.x / 32] = high;
  __syncthreads();
  const int warp = min(threadIdx.x % 32, blockDim.x / 32 - 1);
  lo = of_order(__reduce_min_sync(0xFFFFFFFFu, least[warp])), hi = of_order(__reduce_max_sync(0xFFFFFFFFu, largest[warp]));
  const ClippedRange range = clipped_range(p, clip, lo, hi);
  if (threadIdx.x == 0) store_range(p, row, range);

  uint8_t* out = reinterpret_cast<uint8_t*>(a.out) + int64_t(row) * a.out_stride;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    float code[8];
    values(v, [&](const float (&x)[8]) {
#pragma unroll
      for (int w = 0; w < 8; ++w) code[w] = __fadd_rn(divide(clamped(x[w], range), range.s), range.magic);
    });
    const uint2 both = make_uint2(pack_codes(code[0], code[1], code[2], code[3]), pack_codes(code[4], code[5], code[6], code[7]));
    if (EIGHTS) {
      if (used(v)) *reinterpret_cast<uint2*>(out + column(v)) = both;
    } else {
#pragma unroll
      for (int w = 0; w < 8; ++w)
        if (there(v, w)) out[column(v) + w] = uint8_t((w < 4 ? both.x : both.y) >> 8 * (w & 3));
    }
  }
}

template <class T, int V>
int launch_rows(const TransformedLaunch& p, cudaStream_t stream) {
  const int threads = ((p.a.columns + 7) / 8 + 32 * V - 1) / (32 * V) * 32;
  const auto of = [&](auto norm) {
    constexpr bool NORM = decltype(norm)::value;
    return p.eights ? transformed_rows_kernel<T, V, true, NORM> : transformed_rows_kernel<T, V, false, NORM>;
  };
  const auto kernel = p.a.norm ? of(std::true_type()) : of(std::false_type());
  return launch_early(kernel, unsigned(p.a.m), threads, 0, stream, p);
}

template <class T>
int launch_type(const TransformedLaunch& p, cudaStream_t stream) {
  const int groups = (p.a.columns + 7) / 8;
  if (groups <= (p.a.m <= FEW_BLOCK_ROWS ? MOST_THREADS : 256)) return launch_rows<T, 1>(p, stream);
  return groups <= (p.a.m <= FEW_BLOCK_ROWS ? 2 * MOST_THREADS : 1024) ? launch_rows<T, 2>(p, stream) : launch_rows<T, 4>(p, stream);
}

int check(const VitqTransformedRows& a) {
  if (a.m < 0 || a.columns < 1 || a.columns > VITQ_TRANSFORM_SIZE * VITQ_TRANSFORM_SIZE) return VITQ_BAD_ARGUMENT;
  if (a.x_dtype != VITQ_F32 && a.x_dtype != VITQ_F16 && a.x_dtype != VITQ_BF16) return VITQ_BAD_ARGUMENT;
  if (a.gate < VITQ_NO_ACTIVATION || a.gate > VITQ_SILU || a.norm < VITQ_NO_NORM || a.norm > VITQ_RMS_NORM || (a.gate && a.norm)) return VITQ_BAD_ARGUMENT;
  if (a.qmin < -128 || a.qmin > -2 || a.qmax != -a.qmin - 1 || a.qmin & a.qmax) return VITQ_BAD_ARGUMENT;
  for (const auto& [matrix, size] : {std::pair{a.left, a.left_size}, std::pair{a.right, a.right_size}}) {
    if ((matrix != nullptr) != (size != 0) || size < 0 || size > VITQ_TRANSFORM_SIZE) return VITQ_BAD_ARGUMENT;
    if (size && (a.columns % size || !aligned16(matrix))) return VITQ_BAD_ARGUMENT;
  }
  if (a.left && a.right && a.left_size * a.right_size != a.columns) return VITQ_BAD_ARGUMENT;
  return a.m && (!a.x || !a.out || !a.row_scale) ? VITQ_BAD_ARGUMENT : 0;
}

}  // namespace
}  // namespace vitq

extern "C" int vitq_transformed_rows(const VitqTransformedRows* args, void* stream_) {
  using namespace vitq;
  if (!args) return VITQ_BAD_ARGUMENT;
  const VitqTransformedRows& a = *args;
  if (const int error = check(a)) return error;
  if (!a.m) return 0;
  const auto stream = static_cast<cudaStream_t>(stream_);
  TransformedLaunch p{};
  p.a = a;
  p.qmin = float(a.qmin), p.qmax = float(a.qmax), p.inverse_columns = 1.0f / float(a.columns);
  p.eights = a.columns % 8 == 0 && aligned16(a.x) && aligned16(a.weight) && aligned16(a.bias) && a.x_stride % (a.x_dtype == VITQ_F32 ? 4 : 8) == 0;
  if (a.left || a.right) return launch_kronecker(p, stream);
  if (a.columns > MOST_COLUMNS) return VITQ_UNSUPPORTED;
  p.eights &= uintptr_t(a.out) % 8 == 0 && a.out_stride % 8 == 0;
  return a.x_dtype == VITQ_F16    ? launch_type<__half>(p, stream)
         : a.x_dtype == VITQ_BF16 ? launch_type<__nv_bfloat16>(p, stream)
                                  : launch_type<float>(p, stream);
}

extern "C" int vitq_transformed_rows_supports(int32_t columns, int32_t left_size, int32_t right_size) {
  using namespace vitq;
  if (!left_size && !right_size) return columns <= MOST_COLUMNS ? 0 : VITQ_UNSUPPORTED;
  Gpu gpu;
  if (const int error = gpu_of_now(gpu)) return error;
  TransformedLaunch p{};
  p.a.m = 1, p.a.columns = columns, p.a.left_size = left_size, p.a.right_size = right_size;
  return plan_kronecker(p, gpu.processors, gpu.shared);
}
