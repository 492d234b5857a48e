// New keys and values to the rows of a cache, and what is done to them and to the queries before. Of a few tokens a warp has a row, or a block where there are
// matrices, a lane pairs of neighbouring numbers that lie half a row apart, which rotary positions bring together. Of a prompt's a lane has eight neighbours, and
// a warp multiplies 16 rows with a matrix at once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "async_copy.cuh"
#include "codes.cuh"
#include "launch.cuh"

namespace vitq {
namespace {

constexpr int WARPS = 4, MOST_DIM = 256;
constexpr int SLICES = 4, MOST_MIXED = 128;  // of a matrix: into how many parts its rows may be divided, and how many there may be
constexpr int FEW_TOKENS = 8;  // more are a prompt's
constexpr int TILE_WARPS = 8, TILE_ROWS = 16;  // of a prompt: a warp's rows that are multiplied at once
constexpr int CHUNK = 128, MIXED_CHUNK = 256;  // a block's tokens; the second where there are matrices, and keys for all processors

template <class T>
struct Pair;
template <>
struct Pair<float> {
  using Two = float2;
};
template <>
struct Pair<__half> {
  using Two = __half2;
};
template <>
struct Pair<__nv_bfloat16> {
  using Two = __nv_bfloat162;
};

template <class T>
__device__ __forceinline__ float rounded(float x) { return float(T(x)); }
template <>
__device__ __forceinline__ float rounded<__half>(float x) { return __half2float(__float2half_rn(x)); }
template <>
__device__ __forceinline__ float rounded<__nv_bfloat16>(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

__device__ __forceinline__ float in_half(float x) { return fminf(fmaxf(x, -65504.0f), 65504.0f); }

__device__ __forceinline__ float largest(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, i));
  return x;
}

// A lane's numbers 64·i + 2·lane and the next, of the first half of a row and of the second.
template <int PAIRS>
struct Lane {
  float x[PAIRS][2][2];
};

// f(numbers, where they are): those that the lane has.
template <int PAIRS, class F>
__device__ __forceinline__ void each(Lane<PAIRS>& row, int dim, int lane, F f) {
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    const int at = 64 * i + 2 * lane;
    if (at < dim / 2) f(row.x[i][0], at), f(row.x[i][1], at + dim / 2);
  }
}

template <class T, int PAIRS>
__device__ __forceinline__ void load(Lane<PAIRS>& row, const T* from, bool paired, int dim, int lane) {
  each(row, dim, lane, [&](float (&x)[2], int at) {
    if (paired) {
      const auto two = *reinterpret_cast<const typename Pair<T>::Two*>(from + at);
      x[0] = float(two.x), x[1] = float(two.y);
    } else {
      x[0] = float(from[at]), x[1] = float(from[at + 1]);
    }
  });
}

template <class T>
__device__ __forceinline__ void write_two(T* to, float x, float y) {
  typename Pair<T>::Two two;
  two.x = T(x), two.y = T(y);
  *reinterpret_cast<typename Pair<T>::Two*>(to) = two;
}

template <class T, int PAIRS>
__device__ __forceinline__ void store(Lane<PAIRS>& row, T* to, int dim, int lane) {
  each(row, dim, lane, [&](const float (&x)[2], int at) {
    if constexpr (sizeof(T) == 4)  // rows of a cache lie at multiples of 4 bytes
      to[at] = x[0], to[at + 1] = x[1];
    else
      write_two(to + at, x[0], x[1]);
  });
}

template <class T, int PAIRS>
__device__ __forceinline__ void rotate(Lane<PAIRS>& row, const T* cos, const T* sin, bool paired, int dim, int lane) {
  Lane<PAIRS> c, s;
  load(c, cos, paired, dim, lane), load(s, sin, paired, dim, lane);
#pragma unroll
  for (int i = 0; i < PAIRS; ++i)
    if (64 * i + 2 * lane < dim / 2)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float p = row.x[i][0][j], q = row.x[i][1][j];
        row.x[i][0][j] = rounded<T>(__fadd_rn(rounded<T>(__fmul_rn(p, c.x[i][0][j])), rounded<T>(__fmul_rn(-q, s.x[i][0][j]))));
        row.x[i][1][j] = rounded<T>(__fadd_rn(rounded<T>(__fmul_rn(q, c.x[i][1][j])), rounded<T>(__fmul_rn(p, s.x[i][1][j]))));
      }
}

// x, which all warps of the block have, times a matrix [dim, dim] in shared memory, dim up to MOST_MIXED. Warps and lanes share the rows of the matrix, a lane
// has neighbouring columns of 16 bytes.
template <class M>
__device__ __forceinline__ void multiply(Lane<1>& x, const M* matrix, int dim, int warp, int lane, float (&shared)[WARPS * SLICES + 1][MOST_MIXED]) {
  constexpr int COLUMNS = 16 / sizeof(M), ALL = WARPS * SLICES;
  const int groups = dim / COLUMNS, slices = min(32 / groups, SLICES), slice = lane / groups, first = lane % groups * COLUMNS;
  if (warp == 0) each(x, dim, lane, [&](float (&v)[2], int at) { shared[ALL][at] = v[0], shared[ALL][at + 1] = v[1]; });
  __syncthreads();
  if (slice < slices) {
    float sums[COLUMNS] = {};
#pragma unroll 8
    for (int k = warp * slices + slice; k < dim; k += WARPS * slices) {
      const uint4 raw = *reinterpret_cast<const uint4*>(matrix + k * dim + first);
      const float one = shared[ALL][k];
      const M* const numbers = reinterpret_cast<const M*>(&raw);
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) sums[j] = fmaf(one, float(numbers[j]), sums[j]);
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) shared[warp * slices + slice][first + j] = sums[j];
  }
  __syncthreads();
  each(x, dim, lane, [&](float (&v)[2], int at) {
    v[0] = v[1] = 0.0f;
    for (int s = 0; s < WARPS * slices; ++s) v[0] += shared[s][at], v[1] += shared[s][at + 1];
  });
}

// As quantizers/uniform.py: what the least and the largest number of a row make of its codes.
struct RowCodes {
  RowRange range;
  Scale scale;
  float shift, low, high;
  bool symmetric;

  __device__ __forceinline__ RowCodes(int bits, bool symmetric, const float* clip, float lo, float hi) : shift(0.0f), symmetric(symmetric) {
    const float qmax = float((1 << (bits - 1)) - 1), qmin = -qmax - 1.0f;
    if (symmetric) {
      const float most = clip ? fmaxf(-lo * clip[0], hi * clip[1]) : fmaxf(-lo, hi);
      scale = make_scale(__fdiv_rn(fmaxf(most, RANGE_MIN), qmax));
      low = qmin * scale.scale, high = qmax * scale.scale;
    } else {
      if (clip) lo = fminf(lo, 0.0f) * clip[0], hi = fmaxf(hi, 0.0f) * clip[1];
      range = make_range(lo, hi, qmin, qmax), scale = range.s, shift = shift_of(range);
    }
  }

  // The code, in the low byte of a float's bits, of a number that becomes what it stands for.
  template <bool SYMMETRIC>
  __device__ __forceinline__ float code(float& value) const {
    const float c = SYMMETRIC ? symmetric_code(fminf(fmaxf(value, low), high), scale) : ranged_code(value, range);
    value = __fadd_rn(__fmul_rn(__fsub_rn(c, MAGIC), scale.scale), shift);
    return c;
  }
  __device__ __forceinline__ uint32_t code(float& value) const {
    return __float_as_uint(symmetric ? code<true>(value) : code<false>(value)) & 0xFF;
  }
};

// Codes of a row, which becomes what they stand for.
template <int PAIRS>
__device__ __forceinline__ void write_codes(Lane<PAIRS>& row, uint8_t* to, const VitqCacheRows& rows, const float* clip, int dim, int lane) {
  float lo = INFINITY, hi = -INFINITY;
  each(row, dim, lane, [&](float (&x)[2], int) { lo = fminf(lo, fminf(x[0], x[1])), hi = fmaxf(hi, fmaxf(x[0], x[1])); });
  const RowCodes codes(rows.bits, rows.symmetric, clip, -largest(-lo), largest(hi));
  if (lane == 0) reinterpret_cast<float*>(to)[0] = codes.scale.scale;
  if (lane == 1 && !rows.symmetric) reinterpret_cast<float*>(to)[1] = codes.shift;
  to += rows.symmetric ? 4 : 8;
  each(row, dim, lane, [&](float (&x)[2], int at) {
    const uint32_t first = codes.code(x[0]), second = codes.code(x[1]);
    if (rows.bits > 4)
      *reinterpret_cast<uint16_t*>(to + at) = uint16_t(first | second << 8);
    else
      to[at / 2] = uint8_t(first & 15 | second << 4);
  });
}

enum Kind { KEY, VALUE, QUERY };

// Of which token of which head a row is.
struct Place {
  Kind kind;
  int batch, head, token;

  __device__ Place(const VitqAppendRows& a, int head_of_all, int batch, int token) : batch(batch), token(token) {
    kind = head_of_all < a.heads ? KEY : head_of_all < 2 * a.heads ? VALUE : QUERY;
    head = head_of_all - (kind == KEY ? 0 : kind == VALUE ? a.heads : 2 * a.heads);
  }
};

// Where the numbers of a head's first token are, and how far from one token's to the next.
template <class T>
struct Source {
  const T* from;
  int64_t stride;

  __device__ __forceinline__ Source(const VitqAppendRows& a, const Place& p) {
    const int64_t* strides = p.kind == KEY ? a.k_strides : p.kind == VALUE ? a.v_strides : a.q_strides;
    from = static_cast<const T*>(p.kind == KEY ? a.k : p.kind == VALUE ? a.v : a.q) + p.batch * strides[0] + p.head * strides[1];
    stride = strides[2];
  }
};

// Where a row of q_out, of k_out or v_out, and of the cache begins.
template <class T>
__device__ __forceinline__ T* query_place(const VitqAppendRows& a, const Place& p) {
  return static_cast<T*>(a.q_out) + ((int64_t(p.batch) * a.tokens + p.token) * a.query_heads + p.head) * a.dim;
}
template <class T>
__device__ __forceinline__ T* numbers_place(void* out, const VitqAppendRows& a, const Place& p) {
  return static_cast<T*>(out) + ((int64_t(p.batch) * a.heads + p.head) * a.tokens + p.token) * a.dim;
}
__device__ __forceinline__ uint8_t* cache_place(const VitqCacheRows& cache, const Place& p, int64_t start) {
  return static_cast<uint8_t*>(cache.rows) + p.batch * cache.strides[0] + p.head * cache.strides[1] + (start + p.token) * cache.strides[2];
}

template <class T, int PAIRS>
__device__ __forceinline__ void load_rotated(Lane<PAIRS>& row, const VitqAppendRows& a, const Place& p, int lane) {
  const Source<T> source(a, p);
  row = {};
  load(row, source.from + p.token * source.stride, a.paired, a.dim, lane);
  if (a.cos && p.kind != VALUE) {
    const int64_t at = p.batch * a.rotary_strides[0] + p.token * a.rotary_strides[1];
    rotate(row, static_cast<const T*>(a.cos) + at, static_cast<const T*>(a.sin) + at, a.paired, a.dim, lane);
  }
}

// The numbers of a row before matrices and codes, where they are asked for.
template <class T, int PAIRS>
__device__ __forceinline__ void write_before(Lane<PAIRS>& row, const VitqAppendRows& a, const Place& p, int lane) {
  if (p.kind == KEY && a.k_out && a.out_before) store(row, numbers_place<T>(a.k_out, a, p), a.dim, lane);
}

// The row to its place. start: tokens that were there before.
template <class T, int PAIRS>
__device__ __forceinline__ void write_row(Lane<PAIRS>& row, const VitqAppendRows& a, const Place& p, int64_t start, int lane) {
  if (p.kind == QUERY) {
    store(row, query_place<T>(a, p), a.dim, lane);
    return;
  }
  if (start + p.token >= a.room) return;
  const VitqCacheRows& cache = p.kind == KEY ? a.keys : a.values;
  uint8_t* to = cache_place(cache, p, start);
  if (cache.bits > 8)
    store(row, reinterpret_cast<T*>(to), a.dim, lane);
  else
    write_codes(row, to, cache, p.kind == KEY ? a.key_clip : a.value_clip, a.dim, lane);
  void* const out = p.kind == VALUE ? a.v_out : a.out_before ? nullptr : a.k_out;
  if (out) store(row, numbers_place<T>(out, a, p), a.dim, lane);
}

// The last block counts the tokens: all others have read how many there were.
__device__ __forceinline__ void count_tokens(const VitqAppendRows& a, int64_t start) {
  if (!a.advance) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    auto* const state = reinterpret_cast<unsigned long long*>(a.state);
    if (atomicAdd(state + 1, 1ull) == gridDim.x - 1) state[1] = 0, state[0] = start + a.tokens;
  }
}

template <class T, bool MIXED, int PAIRS>
__global__ void __launch_bounds__(32 * WARPS) append_kernel(const __grid_constant__ VitqAppendRows a) {
  __shared__ float mixed[MIXED ? WARPS * SLICES + 1 : 1][MOST_MIXED];
  extern __shared__ uint4 shared[];  // the matrix
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int heads = 2 * a.heads + (a.q ? a.query_heads : 0);
  const int row = MIXED ? blockIdx.x : blockIdx.x * WARPS + warp;
  const Place place(a, row / a.tokens % heads, row / a.tokens / heads, row % a.tokens);
  start_dependents();
  if constexpr (MIXED) {  // before the wait: no kernel writes it
    const void* const matrix = place.kind == KEY ? a.right : place.kind == QUERY ? a.inverse : nullptr;
    const int bytes = matrix ? a.dim * a.dim * (place.kind == KEY ? 2 : 4) : 0;
    for (int i = 16 * threadIdx.x; i < bytes; i += 16 * blockDim.x)
      copy_async(uint32_t(__cvta_generic_to_shared(shared)) + i, static_cast<const uint8_t*>(matrix) + i, true);
    commit_copies();
  }
  prefetch(a.key_clip, 8), prefetch(a.value_clip, 8);
  wait_for_kernels_before();
  const int64_t start = *static_cast<const volatile int64_t*>(a.state);
  if (place.batch < a.batch) {
    Lane<PAIRS> x;
    load_rotated<T>(x, a, place, lane);
    if (!MIXED || warp == 0) write_before<T>(x, a, place, lane);
    if constexpr (MIXED) {
      wait_copies<0>();
      __syncthreads();
      if (place.kind == KEY && a.right) {
        each(x, a.dim, lane, [&](float (&v)[2], int) { for (float& one : v) one = rounded<__half>(in_half(one)); });
        multiply(x, reinterpret_cast<const __half*>(shared), a.dim, warp, lane, mixed);
      } else if (place.kind == QUERY && a.inverse) {
        multiply(x, reinterpret_cast<const float*>(shared), a.dim, warp, lane, mixed);
      }
      each(x, a.dim, lane, [&](float (&v)[2], int) { for (float& one : v) one = rounded<T>(one); });
    }
    if (!MIXED || warp == 0) write_row<T>(x, a, place, start, lane);  // the first one writes
  }
  count_tokens(a, start);
}

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(uint32_t(__cvta_generic_to_shared(from))) : "memory");
}

__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(uint32_t(__cvta_generic_to_shared(from))) : "memory");
}

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// TILE_ROWS rows of E, a row `pitch` apart, times a matrix at the same pitch, or with TURNED its transpose -> rows of T in their place.
template <class E, class T, bool TURNED>
__device__ __forceinline__ void multiply_rows(E* rows, const E* matrix, int dim, int pitch, int lane) {
  constexpr int MOST = MOST_MIXED / 16;
  uint32_t a[MOST][4];
#pragma unroll
  for (int k = 0; k < MOST; ++k)
    if (16 * k < dim) ldmatrix(a[k], rows + lane % 16 * pitch + 16 * k + lane / 16 * 8);
  __syncwarp();
  T* const out = reinterpret_cast<T*>(rows) + lane / 4 * pitch + lane % 4 * 2;
  constexpr int BOTH = 2;  // steps of 16 columns at once, so that four sums grow side by side
  for (int n = 0; n < dim; n += 16 * BOTH) {
    float sums[BOTH][2][4] = {};
#pragma unroll
    for (int k = 0; k < MOST; ++k)
      if (16 * k < dim) {
#pragma unroll
        for (int i = 0; i < BOTH; ++i) {
          const int column = min(n + 16 * i, dim - 16);
          uint32_t b[4];
          if (TURNED) ldmatrix(b, matrix + (column + lane % 8 + lane / 16 * 8) * pitch + 16 * k + lane / 8 % 2 * 8);
          else ldmatrix_transposed(b, matrix + (16 * k + lane % 16) * pitch + column + lane / 16 * 8);
          mma(sums[i][0], a[k], b[0], b[1], E()), mma(sums[i][1], a[k], b[2], b[3], E());
        }
      }
#pragma unroll
    for (int i = 0; i < BOTH; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          write_two(out + 8 * half * pitch + min(n + 16 * i, dim - 16) + 8 * j, sums[i][j][2 * half], sums[i][j][2 * half + 1]);
  }
  __syncwarp();
}

// Eight neighbouring numbers of a row.
template <class T>
struct alignas(16) Eight {
  typename Pair<T>::Two two[4];
};

// At once: the compiler copies pairs one by one.
template <class T>
__device__ __forceinline__ Eight<T> load_eight(const T* from) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  return *reinterpret_cast<const Eight<T>*>(&raw);
}
template <class T>
__device__ __forceinline__ void store_eight(T* to, const Eight<T>& x) { *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&x); }

// Where a lane is in a warp's rows: `lanes` of them have a row.
struct Spot {
  int lanes, row, at;  // at: which eight numbers
  int half, near[4];   // the lanes that have those half a row behind, around its end, and 1, 2, 4 and 8

  __device__ __forceinline__ Spot(int dim, int lane) : lanes(dim / 8), row(lane / lanes), at(lane % lanes) {
    const auto behind = [&](int count) { return row * lanes + (at + count) % lanes; };
    half = behind(lanes / 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) near[i] = behind(1 << i);
  }
};

template <class T>
__device__ __forceinline__ void rotate(Eight<T>& x, const Eight<T>& cos, const Eight<T>& sin, const Spot& spot) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t raw = __shfl_sync(0xFFFFFFFFu, *reinterpret_cast<const uint32_t*>(&x.two[i]), spot.half);
    auto other = *reinterpret_cast<const typename Pair<T>::Two*>(&raw);
    if (spot.at < spot.lanes / 2) other = __hneg2(other);
    x.two[i] = __hadd2_rn(__hmul2_rn(x.two[i], cos.two[i]), __hmul2_rn(other, sin.two[i]));
  }
}

template <class T>
__device__ __forceinline__ Eight<__half> in_half(const Eight<T>& x) {
  Eight<__half> y;
#pragma unroll
  for (int i = 0; i < 4; ++i) y.two[i] = __floats2half2_rn(in_half(float(x.two[i].x)), in_half(float(x.two[i].y)));
  return y;
}

// Where the rows of a head's first token go: to the cache, and as numbers. start: tokens that were there before.
template <class T>
struct Target {
  uint8_t* rows;
  T* numbers;  // or null, if they are to be turned back
  int64_t row_bytes, stride;
  int bits, room;  // room: of these tokens
  bool query, symmetric;
  const float* clip;

  __device__ __forceinline__ Target(const VitqAppendRows& a, Place p, int64_t start) {
    p.token = 0;
    const VitqCacheRows& cache = p.kind == KEY ? a.keys : a.values;
    bits = cache.bits, symmetric = cache.symmetric, clip = p.kind == KEY ? a.key_clip : a.value_clip;
    rows = cache_place(cache, p, start), row_bytes = cache.strides[2];
    query = p.kind == QUERY;
    room = query ? a.tokens : int(max(min(a.room - start, int64_t(a.tokens)), int64_t(0)));
    void* const out = p.kind == VALUE ? a.v_out : a.out_before || a.out_turned ? nullptr : a.k_out;
    numbers = query ? query_place<T>(a, p) : out ? numbers_place<T>(out, a, p) : nullptr;
    stride = query ? int64_t(a.query_heads) * a.dim : a.dim;
  }
};

// The codes of a token's row, of keys or values, by the lanes that have it. x becomes what they stand for.
template <class T>
__device__ __forceinline__ void write_codes(Eight<T>& x, const Target<T>& target, int token, const Spot& spot, bool there) {
  uint8_t* to = target.rows + token * target.row_bytes;
  if (target.bits > 8) {
    uint32_t* const words = reinterpret_cast<uint32_t*>(to + 16 * spot.at);
    if (there)
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = *reinterpret_cast<const uint32_t*>(&x.two[i]);
  } else {
    using Two = typename Pair<T>::Two;
    Two least = __hmin2(__hmin2(x.two[0], x.two[1]), __hmin2(x.two[2], x.two[3])), most = __hmax2(__hmax2(x.two[0], x.two[1]), __hmax2(x.two[2], x.two[3]));
    Two both;  // the least, and the largest with another sign
    both.x = __hmin(least.x, least.y), both.y = __hneg(__hmax(most.x, most.y));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t other = __shfl_sync(0xFFFFFFFFu, *reinterpret_cast<const uint32_t*>(&both), spot.near[i]);
      both = __hmin2(both, *reinterpret_cast<const Two*>(&other));
    }
    const RowCodes codes(target.bits, target.symmetric, target.clip, float(both.x), -float(both.y));
    uint32_t bytes[2];
    const auto convert = [&](auto symmetric) {
      constexpr bool SYMMETRIC = decltype(symmetric)::value;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float c[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Two& two = x.two[2 * half + i / 2];
          float y = float(i % 2 ? two.y : two.x);
          c[i] = codes.template code<SYMMETRIC>(y);
          (i % 2 ? two.y : two.x) = T(y);
        }
        bytes[half] = pack_codes(c[0], c[1], c[2], c[3]);
      }
    };
    if (target.symmetric) convert(std::true_type());
    else convert(std::false_type());
    if (there) {
      float* const constants = reinterpret_cast<float*>(to);
      if (spot.at == 0) constants[0] = codes.scale.scale;
      if (spot.at == 1 && !target.symmetric) constants[1] = codes.shift;
      uint32_t* const words = reinterpret_cast<uint32_t*>(to + (target.symmetric ? 4 : 8));
      if (target.bits > 4)
        words[2 * spot.at] = bytes[0], words[2 * spot.at + 1] = bytes[1];
      else
        words[spot.at] = __byte_perm(nibbles(bytes[0]), nibbles(bytes[1]), 0x6420);
    }
  }
}

// As write_row, by all lanes of a warp; there: those that have a row.
template <class T>
__device__ __forceinline__ void write_row(Eight<T>& x, const Target<T>& target, int token, const Spot& spot, bool there) {
  there = there && token < target.room;
  if (!target.query) write_codes(x, target, token, spot, there);
  if (target.numbers && there) store_eight(target.numbers + token * target.stride + 8 * spot.at, x);
}

// A prompt's rows: a block has `chunk` tokens of a head. Queries are multiplied with their matrix in their own type, which costs no more than their rounding; or
// in their place the numbers of keys with its transpose, as k·(q·inverse) is (k·inverseᵀ)·q: of grouped queries these are fewer.
template <class T, bool MIXED>
__global__ void __launch_bounds__(32 * TILE_WARPS, MIXED ? 2 : 3) prompt_kernel(const __grid_constant__ VitqAppendRows a, int chunk) {
  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pitch = a.dim + 8;
  const int heads = 2 * a.heads + (a.q ? a.query_heads : 0), chunks = (a.tokens + chunk - 1) / chunk;
  const int first = blockIdx.x % chunks * chunk, end = min(first + chunk, a.tokens);
  const Place place(a, blockIdx.x / chunks % heads, blockIdx.x / chunks / heads, 0);
  const Spot spot(a.dim, lane);
  const int per_warp = 32 / spot.lanes;
  T* const tile = reinterpret_cast<T*>(shared) + warp * TILE_ROWS * pitch;
  T* const matrix = reinterpret_cast<T*>(shared) + TILE_WARPS * TILE_ROWS * pitch;
  __half* const matrix_half = reinterpret_cast<__half*>(matrix);
  constexpr int BATCH = 2;  // how often a lane reads before it writes
  T* const back = matrix + a.dim * pitch;
  const bool turned = MIXED && a.out_turned && place.kind == KEY;
  const bool mixed = MIXED && (place.kind == KEY ? a.right != nullptr : place.kind == QUERY && a.inverse != nullptr && !a.out_turned);
  start_dependents();
  if (mixed) {
    const auto fetch_inverse = [&](T* to, int i, int at) {
      const float4 x = __ldg(reinterpret_cast<const float4*>(a.inverse + i));
      write_two(to + at, x.x, x.y), write_two(to + at + 2, x.z, x.w);
    };
#pragma unroll 8
    for (int i = 4 * threadIdx.x; i < a.dim * a.dim; i += 4 * blockDim.x) {
      const int at = i / a.dim * pitch + i % a.dim;
      if (place.kind == KEY)
        *reinterpret_cast<uint2*>(matrix_half + at) = __ldg(reinterpret_cast<const uint2*>(static_cast<const __half*>(a.right) + i));
      if (place.kind == QUERY || turned) fetch_inverse(turned ? back : matrix, i, at);
    }
    __syncthreads();
  }
  wait_for_kernels_before();
  const int64_t start = *static_cast<const volatile int64_t*>(a.state);
  const Source<T> source(a, place);
  const Target<T> target(a, place, start);
  const T* const from = source.from + 8 * spot.at;
  T* const before = place.kind == KEY && a.out_before && a.k_out ? numbers_place<T>(a.k_out, a, place) : nullptr;  // where keys go before the rest
  T* const back_to = turned ? numbers_place<T>(a.k_out, a, place) : nullptr;
  const bool rotary = a.cos && place.kind != VALUE;
  const T* const cos = static_cast<const T*>(a.cos) + place.batch * a.rotary_strides[0] + 8 * spot.at;
  const T* const sin = static_cast<const T*>(a.sin) + place.batch * a.rotary_strides[0] + 8 * spot.at;
  for (int row = first + warp * TILE_ROWS; row < end; row += TILE_WARPS * TILE_ROWS) {
    const int rows = min(TILE_ROWS, end - row);
    for (int i = 0; i < rows; i += BATCH * per_warp) {
      Eight<T> x[BATCH], c[BATCH], s[BATCH];
#pragma unroll
      for (int j = 0; j < BATCH; ++j) {  // lanes without a row read the last one's
        const int64_t token = row + min(i + j * per_warp + min(spot.row, per_warp - 1), rows - 1);
        x[j] = load_eight(from + token * source.stride);
        if (rotary) c[j] = load_eight(cos + token * a.rotary_strides[1]), s[j] = load_eight(sin + token * a.rotary_strides[1]);
      }
#pragma unroll
      for (int j = 0; j < BATCH; ++j) {
        const int own = i + j * per_warp + spot.row;
        const bool there = spot.row < per_warp && own < rows;
        const int token = row + own;
        if (rotary) rotate(x[j], c[j], s[j], spot);
        if (before && there) store_eight(before + int64_t(token) * a.dim + 8 * spot.at, x[j]);
        if (!mixed) write_row(x[j], target, token, spot, there);
        else if (there && place.kind == KEY) store_eight(reinterpret_cast<__half*>(tile) + own * pitch + 8 * spot.at, in_half(x[j]));
        else if (there) store_eight(tile + own * pitch + 8 * spot.at, x[j]);
      }
    }
    if (!mixed) continue;
    __syncwarp();
    if (place.kind == KEY)
      multiply_rows<__half, T, false>(reinterpret_cast<__half*>(tile), matrix_half, a.dim, pitch, lane);
    else
      multiply_rows<T, T, false>(tile, matrix, a.dim, pitch, lane);
#pragma unroll 2
    for (int i = 0; i < rows; i += per_warp) {
      const int own = i + spot.row;
      const bool there = spot.row < per_warp && own < rows;
      T* const at = tile + min(own, TILE_ROWS - 1) * pitch + 8 * spot.at;
      Eight<T> x = load_eight(at);
      write_row(x, target, row + own, spot, there);
      if (turned && there) store_eight(at, x);
    }
    __syncwarp();
    if (!turned) continue;
    multiply_rows<T, T, true>(tile, back, a.dim, pitch, lane);
    for (int own = spot.row; own < rows && spot.row < per_warp; own += per_warp)
      store_eight(back_to + (row + own) * target.stride + 8 * spot.at, load_eight(tile + own * pitch + 8 * spot.at));
    __syncwarp();
  }
  count_tokens(a, start);
}

// Whether `count` neighbours of every row, and of what comes of it, can be read and written at once.
template <class T>
bool aligned(const VitqAppendRows& a, int count) {
  const auto even = [&](const void* p, const int64_t* strides, int dims) {
    bool all = reinterpret_cast<uintptr_t>(p) % (count * sizeof(T)) == 0;
    for (int i = 0; i < dims; ++i) all = all && strides[i] % count == 0;
    return !p || all;
  };
  return even(a.k, a.k_strides, 3) && even(a.v, a.v_strides, 3) && even(a.q, a.q_strides, 3) && even(a.cos, a.rotary_strides, 2) &&
         even(a.sin, a.rotary_strides, 2) && even(a.q_out, nullptr, 0) && even(a.k_out, nullptr, 0) && even(a.v_out, nullptr, 0);
}

template <class T>
int launch_prompt(const VitqAppendRows& a, int64_t heads, cudaStream_t stream) {
  Gpu gpu;
  if (const int error = gpu_of_now(gpu)) return error;
  const bool mixed = a.right || a.inverse;
  const bool many = int64_t(a.batch) * a.heads * (a.tokens / MIXED_CHUNK) >= gpu.processors;
  const int chunk = mixed && many ? MIXED_CHUNK : CHUNK, shared = mixed ? (TILE_WARPS * TILE_ROWS + (a.out_turned ? 2 : 1) * a.dim) * (a.dim + 8) * int(sizeof(T)) : 0;
  const int64_t blocks = a.batch * heads * ((a.tokens + chunk - 1) / chunk);
  if (blocks > INT32_MAX) return VITQ_UNSUPPORTED;
  const auto kernel = mixed ? prompt_kernel<T, true> : prompt_kernel<T, false>;
  if (mixed)
    if (const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel))) return error;
  return launch_early(kernel, unsigned(blocks), 32 * TILE_WARPS, shared, stream, a, chunk);
}

template <class T, int PAIRS>
int launch_rows(const VitqAppendRows& a, cudaStream_t stream) {
  const int64_t heads = 2 * a.heads + (a.q ? a.query_heads : 0), rows = int64_t(a.batch) * a.tokens * heads;
  if (rows > INT32_MAX - WARPS) return VITQ_UNSUPPORTED;
  if constexpr (sizeof(T) == 2 && PAIRS == 1)
    if (a.tokens > FEW_TOKENS && a.dim % 16 == 0 && aligned<T>(a, 8)) return launch_prompt<T>(a, heads, stream);
  if (a.out_turned) return VITQ_UNSUPPORTED;
  if constexpr (PAIRS == 1)
    if (a.right || a.inverse) {
      if (const cudaError_t error = allow_shared(reinterpret_cast<const void*>(append_kernel<T, true, 1>))) return error;
      return launch_early(append_kernel<T, true, 1>, unsigned(rows), 32 * WARPS, a.dim * a.dim * (a.inverse ? 4 : 2), stream, a);
    }
  return launch_early(append_kernel<T, false, PAIRS>, unsigned((rows + WARPS - 1) / WARPS), 32 * WARPS, 0, stream, a);
}

template <class T>
int launch(const VitqAppendRows& args, cudaStream_t stream) {
  VitqAppendRows a = args;
  a.paired = aligned<T>(a, 2);
  return a.dim <= 128 ? launch_rows<T, 1>(a, stream) : launch_rows<T, 2>(a, stream);
}

}  // namespace
}  // namespace vitq

extern "C" int vitq_append_rows(const VitqAppendRows* args, void* stream) {
  using namespace vitq;
  const VitqAppendRows& a = *args;
  if (a.batch < 1 || a.heads < 1 || a.tokens < 1 || a.room < 1 || !a.state || !a.k || !a.v || !a.keys.rows || !a.values.rows) return VITQ_BAD_ARGUMENT;
  if (a.q && (!a.q_out || a.query_heads < 1)) return VITQ_BAD_ARGUMENT;
  for (const void* out : {a.q_out, a.k_out, a.v_out})
    if (reinterpret_cast<uintptr_t>(out) % 4 != 0) return VITQ_BAD_ARGUMENT;
  if (a.out_turned && (a.out_before || !a.k_out || !a.right || !a.inverse)) return VITQ_BAD_ARGUMENT;
  if ((a.right || a.inverse) && (a.dim % 8 != 0 || a.dim > MOST_MIXED || !aligned16(a.right) || !aligned16(a.inverse))) return VITQ_UNSUPPORTED;
  if (a.dim < 4 || a.dim % 4 != 0 || a.dim > MOST_DIM) return VITQ_UNSUPPORTED;
  const auto s = static_cast<cudaStream_t>(stream);
  return a.dtype == VITQ_F16 ? launch<__half>(a, s) : a.dtype == VITQ_BF16 ? launch<__nv_bfloat16>(a, s) : launch<float>(a, s);
}
