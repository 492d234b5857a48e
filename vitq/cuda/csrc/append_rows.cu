// New keys and values to the rows of a cache, and what is done to them and to the queries before. Of a few tokens a warp has a row, or a block where there are
// matrices, a lane pairs of neighbouring numbers that lie half a row apart, which rotary positions bring together. Of a prompt's a warp has 16 rows, as the MMA has
// them that multiplies these with a matrix.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "async_copy.cuh"
#include "codes.cuh"
#include "launch.cuh"
#include "mma.cuh"

namespace vitq {
namespace {

constexpr int WARPS = 4, MOST_DIM = 256;
constexpr int SLICES = 4, MOST_MIXED = 128;  // of a matrix: into how many parts its rows may be divided, and how many there may be
constexpr int FEW_TOKENS = 8;  // more are a prompt's
constexpr int TILE_WARPS = 8, TILE_ROWS = 16;  // of a prompt: warps of a block, and the rows of one
constexpr int BLOCKS = 2;                      // of a multiprocessor at once

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
  Scale scale;
  float shift = 0.0f, start = 0.0f, low, high, magic = MAGIC;

  __device__ __forceinline__ RowCodes(int bits, bool symmetric, const float* clip, float lo, float hi) {
    const float qmax = float((1 << (bits - 1)) - 1), qmin = -qmax - 1.0f;
    if (symmetric) {
      const float most = clip ? fmaxf(-lo * clip[0], hi * clip[1]) : fmaxf(-lo, hi);
      scale = make_scale(__fdiv_rn(fmaxf(most, RANGE_MIN), qmax));
      low = qmin * scale.scale, high = qmax * scale.scale;
    } else {
      if (clip) lo = fminf(lo, 0.0f) * clip[0], hi = fmaxf(hi, 0.0f) * clip[1];
      const RowRange range = make_range(lo, hi, qmin, qmax);
      scale = range.s, shift = shift_of(range), start = lo, low = 0.0f, high = range.span, magic = MAGIC + qmin;  // qmin is even: it changes no tie
    }
  }

  // The code, in the low byte of a float's bits, of a number that becomes what it stands for.
  __device__ __forceinline__ float code(float& value) const {
    const float c = __fadd_rn(divide(fminf(fmaxf(__fsub_rn(value, start), low), high), scale), magic);
    value = __fadd_rn(__fmul_rn(__fsub_rn(c, MAGIC), scale.scale), shift);
    return c;
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
    const uint32_t first = __float_as_uint(codes.code(x[0])) & 0xFF, second = __float_as_uint(codes.code(x[1])) & 0xFF;
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

  __device__ Place(Kind kind, int batch, int head, int token) : kind(kind), batch(batch), head(head), token(token) {}
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

// A prompt's rows lie in a warp as an MMA has them: lane 4 g + t has of rows g and g + 8 pairs of neighbours, pair j at the place of what the lane has of the MMA's
// tile of eight columns j. Which columns these are is free, as the matrices' rows and columns are chosen to fit: CHUNK neighbours that are read and written at once,
// and as many half a row behind, which rotary positions bring together.
template <int DIM>
struct Layout {
  static constexpr int PAIRS = DIM / 8, HALF = DIM / 2, CHUNK = HALF % 32 == 0 ? 8 : HALF % 16 == 0 ? 4 : 2;
  static constexpr int GROUPS = HALF / (4 * CHUNK);  // of four chunks, in a half
  static constexpr int PITCH = DIM + 8;              // of a matrix in shared memory
  using Words = std::conditional_t<CHUNK == 8, uint4, std::conditional_t<CHUNK == 4, uint2, uint32_t>>;

  static __device__ __forceinline__ constexpr int pair(int half, int group) { return (half * GROUPS + group) * (CHUNK / 2); }
  static __device__ __forceinline__ constexpr int column(int half, int group, int t) { return half * HALF + CHUNK * (4 * group + t); }
  // Which column of the MMA's a column is: 8 j + 2 t, or the next, of pair j.
  static __device__ __forceinline__ constexpr int order(int column) {
    const int half = column / HALF, rest = column % HALF;
    return 8 * (pair(half, rest / (4 * CHUNK)) + rest % CHUNK / 2) + 2 * (rest / CHUNK % 4) + rest % 2;
  }
};

// What a lane has of a warp's rows.
template <int DIM, class T>
struct Rows {
  using L = Layout<DIM>;
  using Two = typename Pair<T>::Two;
  Two x[2][L::PAIRS];

  // f(first pair of a chunk, its column)
  template <class F>
  static __device__ __forceinline__ void each_chunk(int t, F f) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int group = 0; group < L::GROUPS; ++group) f(L::pair(half, group), L::column(half, group, t));
  }
  // At once: the compiler copies pairs one by one.
  static __device__ __forceinline__ void load_chunk(Two* to, const T* from) {
    const auto raw = *reinterpret_cast<const typename L::Words*>(from);
#pragma unroll
    for (int i = 0; i < L::CHUNK / 2; ++i) to[i] = reinterpret_cast<const Two*>(&raw)[i];
  }
  __device__ __forceinline__ void load(int r, const T* from, int t) {
    each_chunk(t, [&](int pair, int column) { load_chunk(x[r] + pair, from + column); });
  }
  __device__ __forceinline__ void store(int r, T* to, int t) const {
    each_chunk(t, [&](int pair, int column) {
      typename L::Words raw;
#pragma unroll
      for (int i = 0; i < L::CHUNK / 2; ++i) reinterpret_cast<Two*>(&raw)[i] = x[r][pair + i];
      *reinterpret_cast<typename L::Words*>(to + column) = raw;
    });
  }
  __device__ __forceinline__ void rotate(int r, const T* cos, const T* sin, int t) {
#pragma unroll
    for (int group = 0; group < L::GROUPS; ++group) {
      Two c[2][L::CHUNK / 2], s[2][L::CHUNK / 2];
#pragma unroll
      for (int half = 0; half < 2; ++half) load_chunk(c[half], cos + L::column(half, group, t)), load_chunk(s[half], sin + L::column(half, group, t));
#pragma unroll
      for (int i = 0; i < L::CHUNK / 2; ++i) {
        Two &p = x[r][L::pair(0, group) + i], &q = x[r][L::pair(1, group) + i];
        const Two first = __hadd2_rn(__hmul2_rn(p, c[0][i]), __hmul2_rn(__hneg2(q), s[0][i]));
        q = __hadd2_rn(__hmul2_rn(q, c[1][i]), __hmul2_rn(p, s[1][i]));
        p = first;
      }
    }
  }
  // Times a matrix, or its transpose, that `place` brought to shared memory, in place. E: of the matrix; float16 takes numbers up to its largest.
  template <bool TURNED, class E>
  __device__ __forceinline__ void multiply(const E* matrix, int lane) {
    const E* const from = matrix + (TURNED ? (lane % 8 + lane / 16 * 8) * L::PITCH + lane / 8 % 2 * 8 : lane % 16 * L::PITCH + lane / 16 * 8);
    const uint32_t at = uint32_t(__cvta_generic_to_shared(from));
    float y[L::PAIRS][4] = {};
#pragma unroll
    for (int k = 0; k < L::PAIRS; k += 2) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Two& two = x[i % 2][k + i / 2];
        if constexpr (!std::is_same_v<E, T>) a[i] = halves(float(two.x), float(two.y));
        else a[i] = std::is_same_v<E, __half> && !TURNED ? saturated(word(two)) : word(two);
      }
#pragma unroll
      for (int n = 0; n < L::PAIRS; n += 2) {
        uint32_t b[4];
        if constexpr (TURNED) ldmatrix(b, at + 16 * (n * L::PITCH + k));
        else ldmatrix_transposed(b, at + 16 * (k * L::PITCH + n));
        mma(y[n], a, b[0], b[1], E()), mma(y[n + 1], a, b[2], b[3], E());
      }
    }
#pragma unroll
    for (int j = 0; j < L::PAIRS; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) x[r][j].x = T(y[j][2 * r]), x[r][j].y = T(y[j][2 * r + 1]);
  }
  static __device__ __forceinline__ uint32_t word(const Two& two) { return *reinterpret_cast<const uint32_t*>(&two); }
};

// A matrix [DIM, DIM] to shared memory, its rows and columns in the order of `Layout`. A thread has a chunk of every so many rows.
template <int DIM, class E, class From>
__device__ __forceinline__ void place_matrix(const From* from, E* to) {
  using L = Layout<DIM>;
  using Two = typename Pair<E>::Two;
  constexpr int CHUNKS = DIM / L::CHUNK, AT_ONCE = 32 * TILE_WARPS / CHUNKS;
  const int first = threadIdx.x / CHUNKS, column = threadIdx.x % CHUNKS * L::CHUNK;
  if (first >= AT_ONCE) return;
  from += column, to += L::order(column);
#pragma unroll 8
  for (int row = first; row < DIM; row += AT_ONCE) {
    Two two[L::CHUNK / 2];
    if constexpr (sizeof(From) == 4) {
      float numbers[L::CHUNK];
#pragma unroll
      for (int c = 0; c < L::CHUNK; c += 2) *reinterpret_cast<float2*>(numbers + c) = __ldg(reinterpret_cast<const float2*>(from + row * DIM + c));
#pragma unroll
      for (int c = 0; c < L::CHUNK; c += 2) two[c / 2].x = E(numbers[c]), two[c / 2].y = E(numbers[c + 1]);
    } else {
      const auto raw = __ldg(reinterpret_cast<const typename L::Words*>(from + row * DIM));
#pragma unroll
      for (int c = 0; c < L::CHUNK / 2; ++c) two[c] = reinterpret_cast<const Two*>(&raw)[c];
    }
#pragma unroll
    for (int c = 0; c < L::CHUNK / 2; ++c) *reinterpret_cast<Two*>(to + L::order(row) * L::PITCH + 8 * c) = two[c];
  }
}

// The codes of a token's row by the four lanes that have it. x becomes what they stand for.
template <int DIM, class T>
__device__ __forceinline__ void write_codes(typename Pair<T>::Two (&x)[DIM / 8], uint8_t* to, const VitqCacheRows& cache, const float* clip, int t, bool there) {
  using L = Layout<DIM>;
  using Two = typename Pair<T>::Two;
  if (cache.bits > 8) {
    if (there)
      Rows<DIM, T>::each_chunk(t, [&](int pair, int column) {
#pragma unroll
        for (int i = 0; i < L::CHUNK / 2; ++i) reinterpret_cast<Two*>(to + 2 * column)[i] = x[pair + i];
      });
    return;
  }
  Two least = x[0], most = x[0];
#pragma unroll
  for (int i = 1; i < L::PAIRS; ++i) least = __hmin2(least, x[i]), most = __hmax2(most, x[i]);
  Two both;  // the least, and the largest with another sign
  both.x = __hmin(least.x, least.y), both.y = __hneg(__hmax(most.x, most.y));
#pragma unroll
  for (int i = 1; i < 4; i *= 2) {
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, *reinterpret_cast<const uint32_t*>(&both), i);
    both = __hmin2(both, *reinterpret_cast<const Two*>(&other));
  }
  const RowCodes codes(cache.bits, cache.symmetric, clip, float(both.x), -float(both.y));
  if (there && t == 0) {
    reinterpret_cast<float*>(to)[0] = codes.scale.scale;
    if (!cache.symmetric) reinterpret_cast<float*>(to)[1] = codes.shift;
  }
  to += cache.symmetric ? 4 : 8;
  Rows<DIM, T>::each_chunk(t, [&](int pair, int column) {
    uint32_t two[L::CHUNK / 2];  // codes, in bytes
#pragma unroll
    for (int i = 0; i < L::CHUNK / 2; ++i) {
      float a = float(x[pair + i].x), b = float(x[pair + i].y);
      const float first = codes.code(a), second = codes.code(b);
      two[i] = __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x0040);
      x[pair + i].x = T(a), x[pair + i].y = T(b);
    }
    if (!there) return;
    if constexpr (L::CHUNK == 2) {
      if (cache.bits > 4) *reinterpret_cast<uint16_t*>(to + column) = uint16_t(two[0]);
      else to[column / 2] = uint8_t(two[0] & 15 | two[0] >> 4 & 0xF0);
    } else {
      uint32_t four[L::CHUNK / 4];
#pragma unroll
      for (int i = 0; i < L::CHUNK / 4; ++i) four[i] = __byte_perm(two[2 * i], two[2 * i + 1], 0x5410);
      if (cache.bits > 4) {
#pragma unroll
        for (int i = 0; i < L::CHUNK / 4; ++i) reinterpret_cast<uint32_t*>(to + column)[i] = four[i];
      } else {
        const uint32_t word = __byte_perm(nibbles(four[0]), nibbles(four[L::CHUNK / 4 - 1]), 0x6420);
        if constexpr (L::CHUNK == 8) *reinterpret_cast<uint32_t*>(to + column / 2) = word;
        else *reinterpret_cast<uint16_t*>(to + column / 2) = uint16_t(word);
      }
    }
  });
}

// Blocks stay for many pieces, TILE_ROWS tokens of a head. A warp takes the next that no other of its block has: those of keys, of their values and of the queries that
// see them follow one another, so that a multiprocessor multiplies while it reads and writes. Queries are multiplied with their matrix in their own type, which costs
// no more than their rounding; or in their place the numbers of keys with its transpose, as k·(q·inverse) is (k·inverseᵀ)·q: of grouped queries these are fewer.
template <int DIM, class T, bool MIXED>
__global__ void __launch_bounds__(32 * TILE_WARPS, BLOCKS) prompt_kernel(const __grid_constant__ VitqAppendRows a) {
  extern __shared__ uint4 shared[];
  __shared__ int next;
  const int lane = threadIdx.x % 32, t = lane % 4, g = lane / 4;
  constexpr int MATRIX = DIM * Layout<DIM>::PITCH;
  __half* const right = reinterpret_cast<__half*>(shared);
  T* const inverse = reinterpret_cast<T*>(shared) + MATRIX;
  const int kinds = 2 + (a.q ? a.query_heads / a.heads : 0), tiles = (a.tokens + TILE_ROWS - 1) / TILE_ROWS;
  const int64_t all = int64_t(a.batch) * a.heads * tiles * kinds;
  const int last = int(all * (blockIdx.x + 1) / gridDim.x);
  start_dependents();
  if constexpr (MIXED) {  // before the wait: no kernel writes them
    place_matrix<DIM>(static_cast<const __half*>(a.right), right);
    if (a.inverse) place_matrix<DIM>(a.inverse, inverse);
  }
  if (threadIdx.x == 0) next = int(all * blockIdx.x / gridDim.x);
  __syncthreads();
  wait_for_kernels_before();
  const int64_t start = *static_cast<const volatile int64_t*>(a.state);
  const int room = int(max(min(a.room - start, int64_t(a.tokens)), int64_t(0)));  // of these tokens
  while (true) {
    int piece = 0;
    if (lane == 0) piece = atomicAdd(&next, 1);
    piece = __shfl_sync(0xFFFFFFFFu, piece, 0);
    if (piece >= last) break;
    const int tile = piece / kinds, kind = piece - tile * kinds, group = tile / tiles, batch = group / a.heads, head = group - batch * a.heads;
    const Kind is = kind < QUERY ? Kind(kind) : QUERY;
    const auto place = [&](int r) {  // of the lane's row r
      return Place(is, batch, is == QUERY ? head * (kinds - 2) + kind - QUERY : head, (tile - group * tiles) * TILE_ROWS + 8 * r + g);
    };
    Rows<DIM, T> rows;
    const Source<T> source(a, place(0));
    const auto token = [&](int r) { return int64_t(min(place(r).token, a.tokens - 1)); };  // rows that are not there: the last one
    const auto store = [&](int end, auto to) {  // of tokens before `end`
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (place(r).token < end) rows.store(r, to(place(r)), t);
    };
    const auto numbers = [&](const Place& p) { return numbers_place<T>(is == KEY ? a.k_out : a.v_out, a, p); };
#pragma unroll
    for (int r = 0; r < 2; ++r) rows.load(r, source.from + token(r) * source.stride, t);
    if (a.cos && is != VALUE)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t at = batch * a.rotary_strides[0] + token(r) * a.rotary_strides[1];
        rows.rotate(r, static_cast<const T*>(a.cos) + at, static_cast<const T*>(a.sin) + at, t);
      }
    if (is == QUERY) {
      if constexpr (MIXED)
        if (a.inverse && !a.out_turned) rows.template multiply<false>(inverse, lane);
      store(a.tokens, [&](const Place& p) { return query_place<T>(a, p); });
      continue;
    }
    const bool before = is == KEY && a.out_before;
    if (before && a.k_out) store(a.tokens, numbers);
    if constexpr (MIXED)
      if (is == KEY) rows.template multiply<false>(right, lane);
    const VitqCacheRows& cache = is == KEY ? a.keys : a.values;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      write_codes<DIM, T>(rows.x[r], cache_place(cache, place(r), start), cache, is == KEY ? a.key_clip : a.value_clip, t, place(r).token < room);
    if constexpr (MIXED)
      if (is == KEY && a.out_turned) rows.template multiply<true>(inverse, lane);
    if (!before && (is == KEY ? a.k_out : a.v_out)) store(room, numbers);
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

template <int DIM, class T>
int launch_prompt(const VitqAppendRows& a, cudaStream_t stream) {
  Gpu gpu;
  if (const int error = gpu_of_now(gpu)) return error;
  const int shared = ((a.right != nullptr) + (a.inverse != nullptr)) * DIM * Layout<DIM>::PITCH * int(sizeof(T));
  const int blocks = shared ? std::clamp(gpu.shared / shared, 1, BLOCKS) : BLOCKS;
  const int64_t pieces = int64_t(a.batch) * (2 * a.heads + (a.q ? a.query_heads : 0)) * ((a.tokens + TILE_ROWS - 1) / TILE_ROWS);
  const auto kernel = a.right ? prompt_kernel<DIM, T, true> : prompt_kernel<DIM, T, false>;
  if (const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel))) return error;
  return launch_early(kernel, unsigned(std::min<int64_t>(pieces, blocks * gpu.processors)), 32 * TILE_WARPS, shared, stream, a);
}

// More than a few tokens of heads of 64, 80, 96 and 128 numbers of 16 bits, all rows at multiples of 16 bytes; no matrix of queries without that of keys.
template <class T>
bool takes_prompt(const VitqAppendRows& a) {
  return sizeof(T) == 2 && a.tokens > FEW_TOKENS && (a.right || !a.inverse) && (a.dim == 64 || a.dim == 80 || a.dim == 96 || a.dim == 128) && aligned<T>(a, 8);
}

template <class T, int PAIRS>
int launch_rows(const VitqAppendRows& a, cudaStream_t stream) {
  const int64_t heads = 2 * a.heads + (a.q ? a.query_heads : 0), rows = int64_t(a.batch) * a.tokens * heads;
  if (rows > INT32_MAX - WARPS) return VITQ_UNSUPPORTED;
  if constexpr (sizeof(T) == 2 && PAIRS == 1)
    if (takes_prompt<T>(a))
      return a.dim == 64   ? launch_prompt<64, T>(a, stream)
             : a.dim == 80 ? launch_prompt<80, T>(a, stream)
             : a.dim == 96 ? launch_prompt<96, T>(a, stream)
                           : launch_prompt<128, T>(a, stream);
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
  if (a.q && (!a.q_out || a.query_heads < 1 || a.query_heads % a.heads)) return VITQ_BAD_ARGUMENT;
  for (const void* out : {a.q_out, a.k_out, a.v_out})
    if (reinterpret_cast<uintptr_t>(out) % 4 != 0) return VITQ_BAD_ARGUMENT;
  if (a.out_turned && (a.out_before || !a.k_out || !a.right || !a.inverse)) return VITQ_BAD_ARGUMENT;
  if ((a.right || a.inverse) && (a.dim % 8 != 0 || a.dim > MOST_MIXED || !aligned16(a.right) || !aligned16(a.inverse))) return VITQ_UNSUPPORTED;
  if (a.dim < 4 || a.dim % 4 != 0 || a.dim > MOST_DIM) return VITQ_UNSUPPORTED;
  const auto s = static_cast<cudaStream_t>(stream);
  return a.dtype == VITQ_F16 ? launch<__half>(a, s) : a.dtype == VITQ_BF16 ? launch<__nv_bfloat16>(a, s) : launch<float>(a, s);
}
