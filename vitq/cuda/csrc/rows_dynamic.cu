// Long rows whose range is their own, without a norm: a block takes one or two rows, and many blocks hide each other's latencies, where the
// persistent kernels of rows.cu would have three or four rows each and the last ones alone. What is read stays as it is in registers: they are
// what limits the blocks of a multiprocessor, and conversion costs less.
//
// KEPT: larger features stay in float16 (QUIK), both sides in the order of the features, so that a code's place is its feature less the kept ones
// before it. Where codes go is found once for two rows.
#include <algorithm>
#include <type_traits>

#include <cuda_runtime.h>

#include "launch.cuh"
#include "rows.cuh"

namespace vitq {
namespace {

constexpr int MOST_THREADS = 1024;
constexpr int THREADS = 192;         // of a row, where these are many: what each thread does but once counts
constexpr int LEAST_COLUMNS = 1024;  // below, rows.cu shares a block among rows

// The least and largest value of two or more columns at once.
template <class T>
struct Extremes {
  using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  static constexpr uint32_t INFINITE = std::is_same_v<T, __half> ? 0x7C007C00u : 0x7F807F80u, SIGNS = 0x80008000u;
  uint32_t lo = INFINITE, hi = INFINITE | SIGNS;

  // bits: which of the eight columns count.
  template <bool MASKED>
  __device__ __forceinline__ void add(const Eight<T>& raw, uint32_t bits) {
    const uint32_t words[4] = {raw.q[0].x, raw.q[0].y, raw.q[0].z, raw.q[0].w};
    const auto two = [](uint32_t w) { return *reinterpret_cast<const Two*>(&w); };
    const auto word = [](Two t) { return *reinterpret_cast<const uint32_t*>(&t); };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t mask = !MASKED ? ~0u : (bits >> 2 * i & 1) * 0xFFFFu | (bits >> 2 * i & 2) * 0x7FFF8000u;
      lo = word(__hmin2(two(lo), two(words[i] & mask | INFINITE & ~mask)));
      hi = word(__hmax2(two(hi), two(words[i] & mask | (INFINITE | SIGNS) & ~mask)));
    }
  }
  __device__ __forceinline__ static float first(uint32_t w) {
    const T value = *reinterpret_cast<const T*>(&w);
    return float(value);
  }
  __device__ __forceinline__ float least() const { return fminf(first(lo), first(lo >> 16)); }
  __device__ __forceinline__ float largest() const { return fmaxf(first(hi), first(hi >> 16)); }
};

template <>
struct Extremes<float> {
  float lo = INFINITY, hi = -INFINITY;

  template <bool MASKED>
  __device__ __forceinline__ void add(const Eight<float>& raw, uint32_t bits) {
    float x[8];
    to_floats(raw, x);
#pragma unroll
    for (int w = 0; w < 8; ++w) {
      const bool counts = !MASKED || bits >> w & 1;
      lo = fminf(lo, counts ? x[w] : INFINITY), hi = fmaxf(hi, counts ? x[w] : -INFINITY);
    }
  }
  __device__ __forceinline__ float least() const { return lo; }
  __device__ __forceinline__ float largest() const { return hi; }
};

// Floats as integers of the same order, and back.
__device__ __forceinline__ int ordered(float x) {
  const int bits = __float_as_int(x);
  return bits ^ (bits >> 31 & 0x7FFFFFFF);
}
__device__ __forceinline__ float unordered(int key) { return __int_as_float(key ^ (key >> 31 & 0x7FFFFFFF)); }

// The least of each `lo` and the largest of each `hi` over a block.
template <int ROWS>
__device__ __forceinline__ void reduce_both(float (&lo)[ROWS], float (&hi)[ROWS], int (&meeting)[ROWS][2][32]) {
  const int last = blockDim.x / 32 - 1, lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int least = __reduce_min_sync(0xFFFFFFFFu, ordered(lo[r])), largest = __reduce_max_sync(0xFFFFFFFFu, ordered(hi[r]));
    if (lane == 0) meeting[r][0][threadIdx.x / 32] = least, meeting[r][1][threadIdx.x / 32] = largest;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    lo[r] = unordered(__reduce_min_sync(0xFFFFFFFFu, meeting[r][0][min(lane, last)]));
    hi[r] = unordered(__reduce_max_sync(0xFFFFFFFFu, meeting[r][1][min(lane, last)]));
  }
}

// T: of x. V: vectors of 8 neighbouring columns a thread. ROWS: of a block.
template <class T, int V, bool KEPT, int ROWS>
__global__ void __launch_bounds__(MOST_THREADS) rows_dynamic_kernel(const __grid_constant__ VitqRows a, float qmin, float qmax) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ int meeting[ROWS][2][32];
  start_dependents();
  wait_for_kernels_before();
  const auto vector = [&](int v) { return int(threadIdx.x + v * blockDim.x); };
  const auto used = [&](int v) { return 8 * vector(v) < a.columns; };
  Eight<T> raw[ROWS][V];
  unsigned row[ROWS] = {};
  const auto row_start = [&](int r) {
    if (a.rows_per_group >= a.m) return row[r] * a.x.row_stride;
    return row[r] / unsigned(a.rows_per_group) * a.x.group_stride + row[r] % unsigned(a.rows_per_group) * a.x.row_stride;
  };
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    row[r] = min(ROWS * blockIdx.x + r, unsigned(a.m) - 1);  // the last one may be there twice
#pragma unroll
    for (int v = 0; v < V; ++v) load_eight<T>(raw[r][v], a.x.data, row_start(r) + (used(v) ? 8 * vector(v) : 0));  // the first columns once more change no range
  }
  if constexpr (KEPT) {
    if (a.fp_out) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const T* from = static_cast<const T*>(a.x.data) + row_start(r);
        auto* const kept = static_cast<__half*>(a.fp_out) + int64_t(row[r]) * a.fp_columns;
        for (int i = threadIdx.x; i < a.fp_columns; i += blockDim.x) {
          const int feature = __ldg(a.fp_order + i);
          kept[i] = feature < 0 ? __half() : to_half(float(from[feature]));
        }
      }
    }
  }
  uint32_t bits[KEPT ? V : 1] = {};
  int place[KEPT ? V : 1] = {};
  if constexpr (KEPT)
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (used(v)) bits[v] = __ldg(a.counted + vector(v)), place[v] = __ldg(a.starts + vector(v));

  float lo[ROWS], hi[ROWS];
  Extremes<T> range[ROWS];
#pragma unroll
  for (int v = 0; v < V; ++v)
#pragma unroll
    for (int r = 0; r < ROWS; ++r) range[r].template add<KEPT>(raw[r][v], bits[KEPT ? v : 0]);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) lo[r] = range[r].least(), hi[r] = range[r].largest();
  reduce_both(lo, hi, meeting);
  // A code is the low byte of (x - start) / scale + magic: nothing needs a clamp, and the code of `start`, even, is part of what rounds.
  Scale scale[ROWS];
  float start[ROWS], magic = MAGIC;
  if (a.row_shift) magic += qmin;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    float shift = 0.0f;
    if (a.row_shift) {
      const RowRange range = make_range(lo[r], hi[r], qmin, qmax);
      scale[r] = range.s, start[r] = range.lo, shift = shift_of(range);
    } else {
      scale[r] = make_scale(__fdiv_rn(fmaxf(fmaxf(-lo[r], hi[r]), RANGE_MIN), qmax)), start[r] = 0.0f;
    }
    if (threadIdx.x == 0) {
      a.row_scale[row[r]] = scale[r].scale;
      if (a.row_shift) a.row_shift[row[r]] = shift;
    }
  }

  uint8_t* out[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) out[r] = static_cast<uint8_t*>(a.out) + int64_t(row[r]) * a.out_stride;
  using Codes = std::conditional_t<ROWS == 2, uint16_t, uint8_t>;  // in shared memory the rows' codes lie side by side
#pragma unroll
  for (int v = 0; v < V; ++v) {
    float code[ROWS][8];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float x[8];
      to_floats(raw[r][v], x);
#pragma unroll
      for (int w = 0; w < 8; ++w) code[r][w] = __fadd_rn(divide(__fsub_rn(x[w], start[r]), scale[r]), magic);
      if constexpr (!KEPT)
        if (used(v))
          *reinterpret_cast<uint2*>(out[r] + 8 * vector(v)) =
              make_uint2(pack_codes(code[r][0], code[r][1], code[r][2], code[r][3]), pack_codes(code[r][4], code[r][5], code[r][6], code[r][7]));
    }
    if constexpr (KEPT) {
      int at = place[v];
#pragma unroll
      for (int w = 0; w < 8; ++w) {  // no branches, so that all of a vector's codes are under way at once
        const uint32_t both = __byte_perm(__float_as_uint(code[0][w]), __float_as_uint(code[ROWS - 1][w]), 0x0040);
        const bool here = bits[v] >> w & 1;
        if (here) reinterpret_cast<Codes*>(shared)[at] = Codes(both);
        at += here;
      }
    }
  }
  if constexpr (KEPT) {
    __syncthreads();
    const int vectors = a.out_columns / 8;
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
      if constexpr (ROWS == 1) {
        reinterpret_cast<uint2*>(out[0])[i] = reinterpret_cast<const uint2*>(shared)[i];
      } else {
        const uint4 both = reinterpret_cast<const uint4*>(shared)[i];
        reinterpret_cast<uint2*>(out[0])[i] = make_uint2(__byte_perm(both.x, both.y, 0x6420), __byte_perm(both.z, both.w, 0x6420));
        reinterpret_cast<uint2*>(out[1])[i] = make_uint2(__byte_perm(both.x, both.y, 0x7531), __byte_perm(both.z, both.w, 0x7531));
      }
    }
    const int left = a.out_columns - 8 * vectors;
    if (threadIdx.x < ROWS * left) out[threadIdx.x % ROWS][8 * vectors + threadIdx.x / ROWS] = shared[ROWS * 8 * vectors + threadIdx.x];
  }
}

template <class T, int V, int ROWS>
int launch_rows(const VitqRows& a, cudaStream_t stream) {
  const int threads = (a.columns / 8 + 32 * V - 1) / (32 * V) * 32;
  const int shared = a.starts ? ROWS * ((a.out_columns + 15) / 16 * 16) : 0;
  const auto kernel = a.starts ? rows_dynamic_kernel<T, V, true, ROWS> : rows_dynamic_kernel<T, V, false, 1>;
  const int rows = a.starts ? ROWS : 1;
  return launch_early(kernel, unsigned((a.m + rows - 1) / rows), threads, shared, stream, a, float(a.qmin), float(a.qmax));
}

template <class T>
int launch_type(const VitqRows& a, cudaStream_t stream) {
  const int pieces = a.columns / 8, threads = a.starts && a.m <= 512 ? 2 * THREADS : THREADS;
  if (pieces <= (a.m <= FEW_BLOCK_ROWS ? MOST_THREADS : threads)) return launch_rows<T, 1, 1>(a, stream);
  if (pieces <= 2 * threads) return launch_rows<T, 2, 1>(a, stream);
  if constexpr (sizeof(T) == 4) {
    return launch_rows<T, 4, 1>(a, stream);
  } else {
    if (pieces > 4 * threads) return launch_rows<T, 8, 1>(a, stream);
    return a.m <= 512 ? launch_rows<T, 4, 1>(a, stream) : launch_rows<T, 4, 2>(a, stream);
  }
}

}  // namespace

// Whether this kernel takes the rows, whose arguments were checked.
bool takes_dynamic_rows(const VitqRows& a) {
  const int each = a.x.dtype == VITQ_F32 ? 4 : 8;
  const auto aligned = [](const void* p) { return uintptr_t(p) % 16 == 0; };
  if (!a.row_scale || a.out_dtype != VITQ_S8 || a.norm != VITQ_NO_NORM || a.residual.data || a.sum.data || a.merge_width) return false;
  if (!a.order && (a.fp_out || a.columns < LEAST_COLUMNS)) return false;
  if (a.order && !a.starts) return false;
  return a.rows_per_group > 0 && a.columns % 8 == 0 && a.columns <= 4 * 8 * MOST_THREADS && aligned(a.x.data) && a.x.row_stride % each == 0 &&
         a.x.group_stride % each == 0 && aligned(a.out) && a.out_stride % 16 == 0;
}

int launch_dynamic_rows(const VitqRows& a, cudaStream_t stream) {
  return a.x.dtype == VITQ_F16 ? launch_type<__half>(a, stream)
         : a.x.dtype == VITQ_BF16 ? launch_type<__nv_bfloat16>(a, stream) : launch_type<float>(a, stream);
}

}  // namespace vitq
