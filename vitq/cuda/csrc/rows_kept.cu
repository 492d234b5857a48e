// Rows whose larger features stay in float16 (QUIK): both sides in the order of the features, so that a code's place is its feature less the
// kept ones before it. A block takes a row; blocks hide each other's latencies. 2048 rows of 4096 float16 columns, of which 256 are kept.
#include <algorithm>

#include <cuda_runtime.h>

#include "launch.cuh"
#include "rows.cuh"

namespace vitq {
namespace {

constexpr int MOST_THREADS = 1024;

// The least of `lo` and the largest of `hi` over a block.
__device__ __forceinline__ void reduce_both(float& lo, float& hi, float (&meeting)[2][32]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    lo = fminf(lo, __shfl_xor_sync(0xFFFFFFFFu, lo, offset));
    hi = fmaxf(hi, __shfl_xor_sync(0xFFFFFFFFu, hi, offset));
  }
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) meeting[0][threadIdx.x / 32] = lo, meeting[1][threadIdx.x / 32] = hi;
  __syncthreads();
  lo = meeting[0][min(lane, warps - 1)], hi = meeting[1][min(lane, warps - 1)];
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    lo = fminf(lo, __shfl_xor_sync(0xFFFFFFFFu, lo, offset));
    hi = fmaxf(hi, __shfl_xor_sync(0xFFFFFFFFu, hi, offset));
  }
}

// T: of x. V: vectors of 8 neighbouring columns a thread.
template <class T, int V>
__global__ void __launch_bounds__(MOST_THREADS) rows_kept_kernel(const __grid_constant__ VitqRows a, float qmin, float qmax) {
  extern __shared__ __align__(16) uint8_t codes[];
  __shared__ float meeting[2][32];
  start_dependents();
  const unsigned row = blockIdx.x;
  const int64_t group = row / unsigned(a.rows_per_group), within = row % unsigned(a.rows_per_group);
  const int64_t from = group * a.x.group_stride + within * a.x.row_stride;
  float x[V][8], lo = INFINITY, hi = -INFINITY;
  uint32_t bits[V];
  int place[V];
  Eight<T> raw[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int vector = threadIdx.x + v * blockDim.x;
    const bool used = 8 * vector < a.columns;
    load_eight<T>(raw[v], a.x.data, from + (used ? 8 * vector : 0));
    bits[v] = used ? __ldg(a.counted + vector) : 0;
    place[v] = used ? __ldg(a.starts + vector) : 0;
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    to_floats(raw[v], x[v]);
#pragma unroll
    for (int w = 0; w < 8; ++w)
      if (bits[v] >> w & 1) lo = fminf(lo, x[v][w]), hi = fmaxf(hi, x[v][w]);
  }
  reduce_both(lo, hi, meeting);
  RowRange range;
  Scale scale{};
  if (a.row_shift) range = make_range(lo, hi, qmin, qmax);
  else scale = make_scale(__fdiv_rn(fmaxf(fmaxf(-lo, hi), RANGE_MIN), qmax));
  if (threadIdx.x == 0) {
    a.row_scale[row] = a.row_shift ? range.s.scale : scale.scale;
    if (a.row_shift) a.row_shift[row] = shift_of(range);
  }
  __half* const kept = static_cast<__half*>(a.fp_out) + int64_t(row) * a.fp_columns;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int column = 8 * (threadIdx.x + v * blockDim.x);
    if (column >= a.columns) continue;
    int at = place[v];
#pragma unroll
    for (int w = 0; w < 8; ++w) {
      if (bits[v] >> w & 1) codes[at++] = uint8_t(__float_as_uint(a.row_shift ? ranged_code(x[v][w], range) : symmetric_code(x[v][w], scale)));
      else if (a.fp_out) kept[column + w - at] = __float2half_rn(x[v][w]);
    }
  }
  for (int i = a.columns - a.out_columns + threadIdx.x; i < a.fp_columns; i += blockDim.x) kept[i] = __half();  // filled up to whole steps
  __syncthreads();
  auto* const to = static_cast<uint8_t*>(a.out) + int64_t(row) * a.out_stride;
  const int whole = a.out_columns / 16;
  for (int i = threadIdx.x; i < whole; i += blockDim.x) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(codes)[i];
  for (int i = 16 * whole + threadIdx.x; i < a.out_columns; i += blockDim.x) to[i] = codes[i];
}

template <class T, int V>
int launch_rows(const VitqRows& a, int threads, cudaStream_t stream) {
  const int shared = (a.out_columns + 15) / 16 * 16;
  rows_kept_kernel<T, V><<<unsigned(a.m), threads, shared, stream>>>(a, float(a.qmin), float(a.qmax));
  return cudaGetLastError();
}

template <class T>
int launch_type(const VitqRows& a, cudaStream_t stream) {
  const int pieces = a.columns / 8, vectors = pieces <= 2 * MOST_THREADS / 2 ? 2 : 4;
  const int threads = (pieces + 32 * vectors - 1) / (32 * vectors) * 32;
  return vectors == 2 ? launch_rows<T, 2>(a, threads, stream) : launch_rows<T, 4>(a, threads, stream);
}

}  // namespace

// Whether this kernel takes the rows, whose arguments were checked.
bool takes_kept_rows(const VitqRows& a) {
  const int each = a.x.dtype == VITQ_F32 ? 4 : 8;
  const auto aligned = [](const void* p) { return uintptr_t(p) % 16 == 0; };
  return a.starts && a.row_scale && a.order && a.out_dtype == VITQ_S8 && a.norm == VITQ_NO_NORM && !a.residual.data && !a.sum.data &&
         !a.merge_width && a.rows_per_group > 0 && a.columns % 8 == 0 && a.columns <= 4 * 8 * MOST_THREADS && aligned(a.x.data) &&
         a.x.row_stride % each == 0 && a.x.group_stride % each == 0 && aligned(a.out) && a.out_stride % 16 == 0;
}

int launch_kept_rows(const VitqRows& a, cudaStream_t stream) {
  return a.x.dtype == VITQ_F16 ? launch_type<__half>(a, stream)
         : a.x.dtype == VITQ_BF16 ? launch_type<__nv_bfloat16>(a, stream) : launch_type<float>(a, stream);
}

}  // namespace vitq
