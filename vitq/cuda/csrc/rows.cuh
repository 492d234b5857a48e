// The parts of the row kernels (rows.cu): where rows lie, loads and stores of eight values, reductions over a row's lanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "async_copy.cuh"
#include "codes.cuh"
#include "vitq_cuda.h"

namespace vitq {

constexpr int FEW_BLOCK_ROWS = 64;  // so few long rows have a block each, and more threads

// What the host adds to the arguments.
struct RowsLaunch {
  VitqRows a;
  StaticCodes code;        // static codes without a norm
  float factor;            // 1 / scale folded into a norm's weight and bias, 1 where the result is float
  float inverse_columns;   // 1 / columns
  float qmin, qmax;
  int32_t lanes, lane_shift;  // threads of a row; below a warp a power of 2, and its logarithm
  int32_t fill;            // the code of an order of -1: that of the value 0
  Divisor by_group, by_merge_width, by_merge_height;  // rows_per_group, and merged rows of a line and lines of an image
  // Shared memory: codes and then halves for fp_order, of each row that a block works on; from `ring` on the rows to come.
  int32_t slot_bytes, halves, ring;
  bool direct;             // no shared memory for rows to come
  bool flat;               // rows_per_group does not matter
  bool aligned_order, aligned_out;  // order by 16 bytes; rows of codes by 4 (2 for packed int4)
};

// Where row `row` of x starts; with patch merging its upper left neighbour.
struct Place {
  int64_t offset;
  int y, x;
};

__device__ __forceinline__ int64_t row_offset(const RowsLaunch& p, const VitqMatrix& matrix, unsigned row) {
  if (p.flat) return row * matrix.row_stride;
  const unsigned group = p.by_group.divide(row);
  return group * matrix.group_stride + (row - group * unsigned(p.a.rows_per_group)) * matrix.row_stride;
}

__device__ __forceinline__ Place place(const RowsLaunch& p, unsigned row) {
  if (!p.a.merge_width) return {row_offset(p, p.a.x, row), 0, 0};
  const unsigned width = (p.a.merge_width + 1) / 2, height = (p.a.merge_height + 1) / 2;
  const unsigned line = p.by_merge_width.divide(row), image = p.by_merge_height.divide(line);
  const int y = 2 * (line - image * height), x = 2 * (row - line * width);
  return {((int64_t(image) * p.a.merge_height + y) * p.a.merge_width + x) * (p.a.columns / 4), y, x};
}

// Where `column` lies from a row's start, and with patch merging which neighbour's it is: dy + 2 dx.
__device__ __forceinline__ int locate(const RowsLaunch& p, int column, int64_t& offset) {
  offset = column;
  if (!p.a.merge_width) return 0;
  const int quarter = p.a.columns / 4;
  const int part = (column >= quarter) + (column >= 2 * quarter) + (column >= 3 * quarter);
  offset = int64_t((part & 1) * p.a.merge_width + (part >> 1)) * quarter + (column - part * quarter);
  return part;
}

// The neighbours beyond an image of odd size, a bit of dy and one of dx: they count as zero.
__device__ __forceinline__ int missing(const RowsLaunch& p, const Place& at) {
  return p.a.merge_width ? (at.y + 1 >= p.a.merge_height) + 2 * (at.x + 1 >= p.a.merge_width) : 0;
}

// Eight neighbouring values as they lie in memory.
template <typename T>
struct Eight {
  uint4 q[sizeof(T) / 2];
};

template <typename T>
__device__ __forceinline__ void load_eight(Eight<T>& to, const void* base, int64_t offset) {
  const auto* from = reinterpret_cast<const uint4*>(static_cast<const T*>(base) + offset);
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 2); i++) to.q[i] = from[i];
}

__device__ __forceinline__ uint4 load_shared(uint32_t from) {
  uint4 q;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "r"(from) : "memory");
  return q;
}

__device__ __forceinline__ void clear(uint4& q) { q = make_uint4(0, 0, 0, 0); }

__device__ __forceinline__ void to_floats(const Eight<__half>& from, float (&x)[8]) {
  const uint32_t words[4] = {from.q[0].x, from.q[0].y, from.q[0].z, from.q[0].w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
    x[2 * i] = both.x;
    x[2 * i + 1] = both.y;
  }
}

__device__ __forceinline__ void to_floats(const Eight<__nv_bfloat16>& from, float (&x)[8]) {
  const uint32_t words[4] = {from.q[0].x, from.q[0].y, from.q[0].z, from.q[0].w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
  }
}

__device__ __forceinline__ void to_floats(const Eight<float>& from, float (&x)[8]) {
  const uint32_t words[8] = {from.q[0].x, from.q[0].y, from.q[0].z, from.q[0].w,
                             from.q[1].x, from.q[1].y, from.q[1].z, from.q[1].w};
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = __uint_as_float(words[i]);
}

__device__ __forceinline__ uint32_t pair(__half, float a, float b) {
  const __half2 both = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ uint32_t pair(__nv_bfloat16, float a, float b) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&both);
}

template <typename T>
__device__ __forceinline__ void store_eight(void* base, int64_t offset, const float (&x)[8]) {
  auto* to = reinterpret_cast<uint4*>(static_cast<T*>(base) + offset);
  if constexpr (sizeof(T) == 4) {
    const auto bits = [&](int i) { return __float_as_uint(x[i]); };
    to[0] = make_uint4(bits(0), bits(1), bits(2), bits(3));
    to[1] = make_uint4(bits(4), bits(5), bits(6), bits(7));
  } else {
    to[0] = make_uint4(pair(T(), x[0], x[1]), pair(T(), x[2], x[3]), pair(T(), x[4], x[5]), pair(T(), x[6], x[7]));
  }
}

__device__ __forceinline__ void store_eight(void* base, int dtype, int64_t offset, const float (&x)[8]) {
  if (dtype == VITQ_F16) store_eight<__half>(base, offset, x);
  else if (dtype == VITQ_BF16) store_eight<__nv_bfloat16>(base, offset, x);
  else store_eight<float>(base, offset, x);
}

// One value of any dtype, by selection instead of branches: unrolled loops stay short.
__device__ __forceinline__ float load_one(const void* base, int dtype, int64_t offset) {
  const uint32_t bits = dtype == VITQ_F32 ? static_cast<const uint32_t*>(base)[offset]
                                          : static_cast<const uint16_t*>(base)[offset];
  const float half = __half2float(__ushort_as_half(uint16_t(bits)));
  return dtype == VITQ_F16 ? half : __uint_as_float(dtype == VITQ_BF16 ? bits << 16 : bits);
}

// Every 32nd value from `offset` on, of which those below `left` exist; the others are 0. All loads before any use.
template <int V>
__device__ __forceinline__ void load_strided(const VitqMatrix& matrix, int64_t offset, int left, float (&x)[V]) {
  uint32_t bits[V];
  if (matrix.dtype == VITQ_F32) {
    const auto* from = static_cast<const uint32_t*>(matrix.data) + offset;
#pragma unroll
    for (int v = 0; v < V; v++) bits[v] = 32 * v < left ? from[32 * v] : 0;
  } else {
    const auto* from = static_cast<const uint16_t*>(matrix.data) + offset;
#pragma unroll
    for (int v = 0; v < V; v++) bits[v] = 32 * v < left ? from[32 * v] : 0;
  }
#pragma unroll
  for (int v = 0; v < V; v++) {
    const float half = __half2float(__ushort_as_half(uint16_t(bits[v])));
    x[v] = matrix.dtype == VITQ_F16 ? half : __uint_as_float(matrix.dtype == VITQ_BF16 ? bits[v] << 16 : bits[v]);
  }
}

__device__ __forceinline__ void store_one(void* base, int dtype, int64_t offset, float x) {
  const uint16_t half = __half_as_ushort(__float2half_rn(x)), brain = __bfloat16_as_ushort(__float2bfloat16_rn(x));
  if (dtype == VITQ_F32) static_cast<float*>(base)[offset] = x;
  else static_cast<uint16_t*>(base)[offset] = dtype == VITQ_F16 ? half : brain;
}

// A feature that stays in float16: finite where x is.
__device__ __forceinline__ __half to_half(float x) {
  const __half largest = __ushort_as_half(0x7BFF);  // 65504
  return __hmax_nan(__hmin_nan(__float2half_rn(x), largest), __hneg(largest));
}

// rows_dynamic.cu
bool takes_dynamic_rows(const VitqRows& a);
int launch_dynamic_rows(const VitqRows& a, cudaStream_t stream);

struct Sum {
  template <typename V>
  __device__ __forceinline__ V operator()(V a, V b) const { return a + b; }
};

struct Least {
  __device__ __forceinline__ float operator()(float a, float b) const { return fminf(a, b); }
};

struct Largest {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Reductions over the lanes of a row, to all of them and always in the same order. A block's warps meet in shared memory,
// in two places by turns so that one barrier is enough: who writes a place again has passed the barrier of the other.
template <bool BLOCK>
struct RowReduce {
  int lanes;
  uint32_t (*shared)[32];
  int turn;

  template <typename V, typename Op>
  __device__ __forceinline__ V operator()(V value, Op op) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1)
      if (BLOCK || offset < lanes) value = op(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
    if constexpr (BLOCK) {
      auto* place = reinterpret_cast<V*>(shared[turn]);
      turn ^= 1;
      if (threadIdx.x % 32 == 0) place[threadIdx.x / 32] = value;
      __syncthreads();
      value = place[0];
      for (int warp = 1; warp < lanes / 32; warp++) value = op(value, place[warp]);
    }
    return value;
  }
};

__device__ __forceinline__ uint32_t first_bytes(int n) {  // a mask of the n first bytes, any n
  return n <= 0 ? 0u : n >= 4 ? 0xFFFFFFFFu : (1u << (8 * n)) - 1u;
}

// Which features four neighbouring code columns hold, of which `left` exist.
__device__ __forceinline__ int4 ordered(const RowsLaunch& p, int column, int left) {
  const int32_t* order = p.a.order + column;
  if (left >= 4 && p.aligned_order) return __ldg(reinterpret_cast<const int4*>(order));
  return make_int4(__ldg(order), left > 1 ? __ldg(order + 1) : -1, left > 2 ? __ldg(order + 2) : -1,
                   left > 3 ? __ldg(order + 3) : -1);
}

// Four codes, of which `left` exist, to their place in a row.
__device__ __forceinline__ void store_codes(const RowsLaunch& p, unsigned row, int column, uint32_t word, int left) {
  auto* out = static_cast<uint8_t*>(p.a.out) + row * p.a.out_stride;
  if (p.a.out_dtype == VITQ_S4) {
    const uint32_t both = __byte_perm(nibbles(word), 0, 0x4420);
    uint8_t* to = out + column / 2;
    if (p.aligned_out && left > 2) {
      *reinterpret_cast<uint16_t*>(to) = uint16_t(both);
    } else {
      to[0] = uint8_t(both);
      if (left > 2) to[1] = uint8_t(both >> 8);
    }
  } else if (p.aligned_out && left >= 4) {
    *reinterpret_cast<uint32_t*>(out + column) = word;
  } else {
    for (int j = 0; j < min(left, 4); j++) out[column + j] = uint8_t(word >> (8 * j));
  }
}

// Four words, each a byte of four rows, to a word of each row.
__device__ __forceinline__ void transpose_bytes(const uint4& four, uint32_t (&word)[4]) {
  const uint32_t low0 = __byte_perm(four.x, four.y, 0x5140), low1 = __byte_perm(four.z, four.w, 0x5140);
  const uint32_t high0 = __byte_perm(four.x, four.y, 0x7362), high1 = __byte_perm(four.z, four.w, 0x7362);
  word[0] = __byte_perm(low0, low1, 0x5410);
  word[1] = __byte_perm(low0, low1, 0x7632);
  word[2] = __byte_perm(high0, high1, 0x5410);
  word[3] = __byte_perm(high0, high1, 0x7632);
}

// The codes of ROWS rows from shared memory to their places, four columns at a time: those of `row` and of each `stride`-th
// row after it. ROWS 1: `codes` are bytes. ROWS 4: they are words, a byte of each row, so that a column is looked for once.
template <int ROWS>
__device__ __forceinline__ void gather(const RowsLaunch& p, const uint8_t* codes, unsigned row, unsigned stride, int count,
                                       int lane) {
  static_assert(ROWS == 1 || ROWS == 4);
  const VitqRows& a = p.a;
  const auto* words = reinterpret_cast<const uint32_t*>(codes);
  const auto inside = [&](int r) { return r < count && row + r * stride < unsigned(a.m); };
  for (int column = 4 * lane; column < a.out_columns; column += 4 * p.lanes) {
    const int left = a.out_columns - column;
    uint32_t word[ROWS];
    if constexpr (ROWS == 1) {
      if (!a.order) {
        word[0] = words[column / 4];
      } else {
        const int4 from = ordered(p, column, left);
        const auto code = [&](int feature) { return feature < 0 ? uint32_t(p.fill) : uint32_t(codes[feature]); };
        const uint32_t low = __byte_perm(code(from.x), code(from.y), 0x0040);
        word[0] = __byte_perm(low, __byte_perm(code(from.z), code(from.w), 0x0040), 0x5410);
      }
    } else {
      uint4 four;
      if (a.order) {
        const int4 from = ordered(p, column, left);
        const auto code = [&](int feature) { return words[feature < 0 ? a.columns : feature]; };  // the fill lies behind the row
        four = make_uint4(code(from.x), code(from.y), code(from.z), code(from.w));
      } else {
        four = *reinterpret_cast<const uint4*>(words + column);
      }
      transpose_bytes(four, word);
    }
    if (left < 4) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) word[r] &= first_bytes(left);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      if (inside(r)) store_codes(p, row + r * stride, column, word[r], left);
  }
}

// Where a lane's code columns come from: words of shared memory, two to a register. Column 4 (lane + i lanes) + j is its
// j-th of piece i; columns that do not exist, and those of order -1, take the fill.
template <int PIECES>
struct Places {
  uint32_t words[PIECES][2];

  __device__ __forceinline__ void find(const RowsLaunch& p, int lane) {
    const auto word = [&](int feature) { return uint32_t(feature < 0 ? p.a.columns : feature); };
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const int column = 4 * (lane + i * p.lanes), left = p.a.out_columns - column;
      const int4 from = left > 0 ? ordered(p, column, left) : make_int4(-1, -1, -1, -1);
      words[i][0] = word(from.x) | word(from.y) << 16;
      words[i][1] = word(from.z) | word(from.w) << 16;
    }
  }
};

// `gather` of four rows whose places wait in registers, whole words at a time: nothing but shared memory is read, all of it
// at once. LayerNorm of 39400 x 384 on an H100: 26 us with reordered codes, 17.6 without. It waits for latencies, 3 warps a scheduler;
// weights in shared memory in place of registers, and 4 warps, took 28 us.
template <int PIECES>
__device__ __forceinline__ void gather_known(const RowsLaunch& p, const Places<PIECES>& places, const uint8_t* codes, unsigned row,
                                             unsigned stride, int count, int lane) {
  const auto* words = reinterpret_cast<const uint32_t*>(codes);
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const int column = 4 * (lane + i * p.lanes);
    const uint32_t low = places.words[i][0], high = places.words[i][1];
    const uint4 four = make_uint4(words[low & 0xFFFF], words[low >> 16], words[high & 0xFFFF], words[high >> 16]);
    uint32_t word[4];
    transpose_bytes(four, word);
    if (column < p.a.out_columns) {
#pragma unroll
      for (int r = 0; r < 4; r++)
        if (r < count && row + r * stride < unsigned(p.a.m))
          *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(p.a.out) + (row + r * stride) * p.a.out_stride + column) = word[r];
    }
  }
}

// The features that stay in float, of one row.
__device__ __forceinline__ void gather_fp(const RowsLaunch& p, const __half* halves, unsigned row, int lane) {
  auto* to = static_cast<__half*>(p.a.fp_out) + int64_t(row) * p.a.fp_columns;
  for (int i = lane; i < p.a.fp_columns; i += p.lanes) {
    const int feature = __ldg(p.a.fp_order + i);
    to[i] = feature < 0 ? __half() : halves[feature];
  }
}

}  // namespace vitq
