// Products of few rows (up to VITQ_FEW_ROWS), which take as long as reading the weight does. A block computes the outputs of one or two groups
// of 32 rows of the weight; its warps divide the columns among themselves and add up at the end.
//
// The weight is the m16 operand of mma.sync and the input the n8 one, so eight rows of the input cost as much as one. Lane 4·g + c of a fragment
// holds parts of row g of both operands, and any order of k will do as long as both have it: a lane reads 16 bytes of a row of the weight, which
// are its part of several steps of k, and of the input just the columns that those are. So nothing is exchanged between lanes, and each lane
// copies to shared memory (a queue of pieces of k, without a barrier) what it will read itself. Only constants of groups are shared in a warp.
//
// With groups of columns the sums of one are multiplied with their constants when it ends: total += multiplier·(sum - zero·sum of the input),
// the latter from one more product, with ones. Integers are exact in any order; floats are added in an order that the launch fixes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "epilogue.cuh"
#include "launch.cuh"

namespace vitq {
namespace few {

enum Format { W8A8, W4A8, W4A4, W8F16, W4F16, W8BF16, W4BF16 };

// What a kernel reads, in bytes; pieces of k are 64 bytes of a row of the weight.
struct Operands {
  const char* x;
  int64_t ldx;
  int x_bytes;                 // of a row that exist
  const char* weight;
  int row_bytes, rows;         // of the weight, rows padded to 32
  int m, steps;                // 32 columns each, as far as x has any
  const char* multiplier;      // int8 or float [groups, rows]
  const char* zero;            // int8 [groups, rows] or null
  int64_t group_stride;        // elements
  int group_steps;
};

template <int FORMAT, bool GROUPED, int TILES>
struct Traits {
  static constexpr bool FLOATS = FORMAT >= W8F16, BF16 = FORMAT >= W8BF16, WIDE = FORMAT == W8A8 || FORMAT == W8F16 || FORMAT == W8BF16;
  static constexpr int VECTORS = FORMAT == W8A8 || FORMAT == W4A4 ? 1 : !FLOATS || WIDE ? 2 : 4;  // of x in a piece, for a lane
  static constexpr int X_PIECE = 64 * VECTORS;     // bytes of x's row
  static constexpr int STEPS = WIDE ? 2 : 4;       // of 32 columns in a piece
  static constexpr int ROW_GROUPS = TILES;         // more rows of x, more of the weight that share what is read of them
  static constexpr int STAGES = TILES == 1 ? 4 : 3, MOST_WARPS = 16 / TILES;
  static constexpr int ROWS = 32 * ROW_GROUPS, WEIGHT_BYTES = 64 * ROWS;
  static constexpr int CONSTANT_BYTES = !GROUPED ? 0 : FLOATS ? 5 * ROWS : 2 * ROWS;
  static constexpr int PITCH = ROWS + 4;           // of partial sums: no two lanes meet a bank
  using Sum = std::conditional_t<FLOATS, float, int>;

  __host__ __device__ static int stage_bytes(int m) { return WEIGHT_BYTES + m * X_PIECE + (CONSTANT_BYTES + 15) / 16 * 16; }
  __host__ __device__ static int partial_bytes(int warps) { return warps * 8 * TILES * PITCH * 4; }
  // Shared memory: queues, then partial sums in their place; results; bias and scale; partial sums of the float16 columns.
  __host__ __device__ static int results_at(int m, int warps) {
    const int queues = warps * STAGES * stage_bytes(m), partial = partial_bytes(warps);
    return queues > partial ? queues : partial;
  }
  __host__ __device__ static int constants_at(int m, int warps) { return results_at(m, warps) + 8 * TILES * ROWS * 4; }
  __host__ __device__ static int floats_at(int m, int warps) { return constants_at(m, warps) + 2 * ROWS * 4; }
  static int shared_bytes(int m, int warps, bool fp) { return floats_at(m, warps) + (fp ? partial_bytes(warps) : 0); }
};

// --- instructions ---

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ int clamp16(int bytes) { return min(max(bytes, 0), 16); }

// 16 bytes, of which the first `size` are read and the rest is zero.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, int size) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}
__device__ __forceinline__ void copy4(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

__device__ __forceinline__ uint4 read16(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
  return v;
}

__device__ __forceinline__ void mma(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <bool BF16>
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (BF16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A kernel may start while the one before it still runs, to fetch its weight into the L2, which changes nothing that anyone can see;
// this waits for all that the others have written. (On sm_80 kernels start one after the other.)
__device__ __forceinline__ void start_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_kernels_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- codes to what is multiplied ---

// Bytes that hold 16 times the codes of the low or high nibbles.
template <bool HIGH>
__device__ __forceinline__ uint32_t nibbles(uint32_t w) { return (HIGH ? w : w << 4) & 0xF0F0F0F0u; }

template <class T>
__device__ __forceinline__ uint32_t bits(T v) { return reinterpret_cast<uint32_t&>(v); }
__device__ __forceinline__ __half2 halves(uint32_t v) { return reinterpret_cast<__half2&>(v); }
__device__ __forceinline__ __nv_bfloat162 bfloats(uint32_t v) { return reinterpret_cast<__nv_bfloat162&>(v); }

// Codes of the bytes 2·PART and 2·PART + 1, exactly: put below the exponent of a power of two, which is subtracted.
template <bool BF16, int PART>
__device__ __forceinline__ uint32_t byte_codes(uint32_t w) {
  const uint32_t u = w ^ 0x80808080u;
  if constexpr (BF16) {
    const float a = __uint_as_float(__byte_perm(u, 0x4B000000u, 0x7440 + 2 * PART)) - 8388736.0f;
    const float b = __uint_as_float(__byte_perm(u, 0x4B000000u, 0x7441 + 2 * PART)) - 8388736.0f;
    return __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x7632);
  } else {
    return bits(__hsub2(halves(__byte_perm(u, 0x64646464u, 0x4140 + 0x202 * PART)), halves(0x64806480u)));
  }
}

// Codes in the low or high nibbles of the bytes PART and PART + 2.
template <bool BF16, bool HIGH, int PART>
__device__ __forceinline__ uint32_t nibble_codes(uint32_t w) {
  constexpr int SHIFT = 8 * PART + (BF16 && HIGH ? 4 : 0);
  w >>= SHIFT;
  if constexpr (BF16) return bits(__hsub2(bfloats((w & 0x000F000Fu) ^ 0x43084308u), bfloats(0x43084308u)));
  else if constexpr (!HIGH) return bits(__hsub2(halves((w & 0x000F000Fu) ^ 0x64086408u), halves(0x64086408u)));
  else return bits(__hfma2(halves((w & 0x00F000F0u) ^ 0x64806480u), halves(0x2C002C00u), halves(0xD480D480u)));  // (1024 + 16u)/16 - 72
}

// --- a warp's share ---

template <class T, int TILES, bool GROUPED>
struct Sums {
  T acc[2 * TILES][TILES][4] = {};                                     // [m16 tile of the weight][n8 tile of x]
  T total[GROUPED ? 2 * TILES : 1][GROUPED ? TILES : 1][4] = {};
  T ones[GROUPED ? TILES : 1][4] = {};                                 // sums of x, the same in each row
};

// Products of one piece that lies in shared memory. Bit i of `steps`: whether its i-th 32 columns count.
template <int FORMAT, bool GROUPED, int TILES>
__device__ __forceinline__ void multiply(Sums<typename Traits<FORMAT, GROUPED, TILES>::Sum, TILES, GROUPED>& s, uint32_t weight, uint32_t x, int m,
                                         int lane, uint32_t steps, bool with_ones) {
  using T = Traits<FORMAT, GROUPED, TILES>;
  const int g = lane / 4, c = lane % 4;
  uint32_t w[4 * TILES][4];
#pragma unroll
  for (int i = 0; i < 4 * TILES; ++i) {
    const uint4 v = read16(weight + (i * 32 + lane) * 16);
    w[i][0] = v.x, w[i][1] = v.y, w[i][2] = v.z, w[i][3] = v.w;
  }
  const uint32_t mine = T::WIDE ? steps >> c / 2 & 1 : steps >> c / 2 * 2 & 3;
#pragma unroll
  for (int v = 0; v < T::VECTORS; ++v) {
    const bool high = !T::WIDE && T::VECTORS > 1 && v >= T::VECTORS / 2;
    uint32_t b[TILES][4];
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      uint4 r = make_uint4(0, 0, 0, 0);
      if (t * 8 + g < m && (!GROUPED || mine >> high & 1)) r = read16(x + ((v * m + t * 8 + g) * 4 + c) * 16);
      b[t][0] = r.x, b[t][1] = r.y, b[t][2] = r.z, b[t][3] = r.w;
    }
    if constexpr (!T::FLOATS) {
#pragma unroll
      for (int half = 0; half < (FORMAT == W4A4 ? 2 : 1); ++half) {
        const bool upper = FORMAT == W4A4 ? half : high;
        auto code = [&](uint32_t word) { return T::WIDE ? word : upper ? nibbles<true>(word) : nibbles<false>(word); };
        auto input = [&](uint32_t word) { return FORMAT != W4A4 ? word : upper ? nibbles<true>(word) : nibbles<false>(word); };
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
#pragma unroll
          for (int t = 0; t < TILES; ++t) {
            const uint32_t b0 = input(b[t][k]), b1 = input(b[t][k + 1]);
#pragma unroll
            for (int j = 0; j < 2 * TILES; ++j)
              mma(s.acc[j][t], code(w[2 * j][k]), code(w[2 * j + 1][k]), code(w[2 * j][k + 1]), code(w[2 * j + 1][k + 1]), b0, b1);
            if constexpr (GROUPED)
              if (with_ones) mma(s.ones[t], 0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u, b0, b1);
          }
        }
      }
    } else {
      constexpr uint32_t ONES = T::BF16 ? 0x3F803F80u : 0x3C003C00u;
#pragma unroll
      for (int k = 0; k < 2; ++k) {  // four of the vector's eight columns
        uint32_t first[TILES], second[TILES];
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
          first[t] = b[t][2 * k], second[t] = b[t][2 * k + 1];
          if constexpr (!T::WIDE) {  // in the order of nibble_codes
            const uint32_t even = __byte_perm(first[t], second[t], 0x5410);
            second[t] = __byte_perm(first[t], second[t], 0x7632), first[t] = even;
          }
          if constexpr (GROUPED)
            if (with_ones) mma<T::BF16>(s.ones[t], ONES, ONES, ONES, ONES, first[t], second[t]);
        }
        const int word = v % 2 * 2 + k;
#pragma unroll
        for (int j = 0; j < 2 * TILES; ++j) {
          uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t from = w[2 * j + i][word];
            if constexpr (T::WIDE) a[i] = byte_codes<T::BF16, 0>(from), a[2 + i] = byte_codes<T::BF16, 1>(from);
            else if (high) a[i] = nibble_codes<T::BF16, true, 0>(from), a[2 + i] = nibble_codes<T::BF16, true, 1>(from);
            else a[i] = nibble_codes<T::BF16, false, 0>(from), a[2 + i] = nibble_codes<T::BF16, false, 1>(from);
          }
#pragma unroll
          for (int t = 0; t < TILES; ++t) mma<T::BF16>(s.acc[j][t], a[0], a[1], a[2], a[3], first[t], second[t]);
        }
      }
    }
  }
}

// Each warp's sums, to shared memory: [warp][row of x][row of the weight].
template <class S, int TILES, int PITCH>
__device__ __forceinline__ void leave(S* partial, const S (&sums)[2 * TILES][TILES][4], int m, int warp, int lane) {
  const int g = lane / 4, c = lane % 4;
#pragma unroll
  for (int j = 0; j < 2 * TILES; ++j)
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        const int column = t * 8 + 2 * c + d % 2;
        if (column < m) partial[(warp * 8 * TILES + column) * PITCH + j * 16 + g + d / 2 * 8] = sums[j][t][d];
      }
}

// The float16 columns: 64 bytes of rows at a time, straight from memory, while the first pieces of the weight come in.
template <int TILES, int PITCH>
__device__ __forceinline__ void float_columns(const VitqLinear& p, int row0, int rows, float* partial, int warp, int lane) {
  const int g = lane / 4, c = lane % 4;
  float acc[2 * TILES][TILES][4] = {};
  const auto vector = [&](const void* data, int64_t row, int64_t stride, int column) {
    return column < p.k_fp ? __ldg(reinterpret_cast<const uint4*>(static_cast<const __half*>(data) + row * stride + column)) : make_uint4(0, 0, 0, 0);
  };
  for (int at = warp * 32; at < p.k_fp; at += blockDim.x) {
    const int column = at + c * 8;
    uint4 b[TILES];
#pragma unroll
    for (int t = 0; t < TILES; ++t) b[t] = t * 8 + g < p.m ? vector(p.a_fp, t * 8 + g, p.lda_fp, column) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < 2 * TILES; ++j) {
      const uint4 low = vector(p.weight_fp, min(row0 + j * 16 + g, rows - 1), p.k_fp, column);
      const uint4 high = vector(p.weight_fp, min(row0 + j * 16 + g + 8, rows - 1), p.k_fp, column);
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        mma<false>(acc[j][t], low.x, high.x, low.y, high.y, b[t].x, b[t].y);
        mma<false>(acc[j][t], low.z, high.z, low.w, high.w, b[t].z, b[t].w);
      }
    }
  }
  leave<float, TILES, PITCH>(partial, acc, p.m, warp, lane);
}

// Four of the block's bias or scale, zeros where there is none.
__device__ __forceinline__ void copy_constants(uint32_t to, const float* from, int column, const Operands& o) {
  const bool exists = from != nullptr && column < o.rows;
  copy16(to, exists ? static_cast<const void*>(from + column) : o.weight, exists ? 16 : 0);
}

// Sums of the block's outputs over k, [row of x][32·ROW_GROUPS columns in logical order], in the shared memory that is returned. `meanwhile` runs
// when the first copies are under way; what it copies has arrived at the end.
template <int FORMAT, bool GROUPED, int TILES, class F>
__device__ __forceinline__ typename Traits<FORMAT, GROUPED, TILES>::Sum* accumulate(const Operands& o, char* shared, int row0, F meanwhile) {
  using T = Traits<FORMAT, GROUPED, TILES>;
  using Sum = typename T::Sum;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int g = lane / 4, c = lane % 4;
  const int pieces = (o.steps + T::STEPS - 1) / T::STEPS;
  const int first = static_cast<int>(int64_t(pieces) * warp / warps), last = static_cast<int>(int64_t(pieces) * (warp + 1) / warps);
  const int x_stage = o.m * T::X_PIECE, stage = T::stage_bytes(o.m);
  const uint32_t queue = shared_address(shared) + warp * T::STAGES * stage;

  const char* from[4 * TILES];
#pragma unroll
  for (int i = 0; i < 4 * TILES; ++i) from[i] = o.weight + int64_t(min(row0 + 8 * i + g, o.rows - 1)) * o.row_bytes + c * 16;
  start_dependents();
  {
    const char* line = o.weight + int64_t(min(row0 + lane, o.rows - 1)) * o.row_bytes;
    const int end = min(last, first + T::STAGES) * 64;
    for (int at = first * 64; at < end; at += 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(line + at));
    if constexpr (TILES > 1)
      for (int at = first * 64; at < end; at += 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(o.weight + int64_t(min(row0 + 32 + lane, o.rows - 1)) * o.row_bytes + at));
  }
  wait_for_kernels_before();

  const int x_lane = FORMAT == W8A8 || FORMAT == W4A4 ? 16 * c : FORMAT == W4A8 ? 64 * (c / 2) + 16 * (c % 2) : T::WIDE ? 32 * c : 128 * (c / 2) + 32 * (c % 2);
  auto fetch = [&](int piece) {
    const uint32_t to = queue + (piece - first) % T::STAGES * stage;
    const int size = clamp16(o.row_bytes - piece * 64 - c * 16);
#pragma unroll
    for (int i = 0; i < 4 * TILES; ++i) copy16(to + (i * 32 + lane) * 16, size ? from[i] + piece * 64 : o.weight, size);
    if constexpr (GROUPED) {
      const int64_t at = (piece * T::STEPS / o.group_steps) * o.group_stride + row0;
      const uint32_t constants = to + T::WEIGHT_BYTES + x_stage;
      constexpr int BYTES = T::FLOATS ? 4 : 1, WORDS = T::ROWS * BYTES / 4;
      const int existing = (o.rows - row0) * BYTES / 4;
      for (int i = lane; i < WORDS; i += 32)
        if (i < existing) copy4(constants + i * 4, o.multiplier + at * BYTES + i * 4);
      if (o.zero != nullptr && lane < T::ROWS / 4 && lane < (o.rows - row0) / 4) copy4(constants + WORDS * 4 + lane * 4, o.zero + at + lane * 4);
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int v = 0; v < T::VECTORS; ++v) {
        const int row = t * 8 + g;
        const int at = piece * T::X_PIECE + x_lane + (FORMAT == W4A8 ? 32 * v : T::VECTORS == 4 ? v / 2 * 64 + v % 2 * 16 : 16 * v);
        const int bytes = clamp16(o.x_bytes - at);
        if (row < o.m) copy16(to + T::WEIGHT_BYTES + ((v * o.m + row) * 4 + c) * 16, bytes ? o.x + row * o.ldx + at : o.x, bytes);
      }
  };
#pragma unroll
  for (int i = 0; i < T::STAGES - 1; ++i) {
    if (first + i < last) fetch(first + i);
    commit();
  }
  meanwhile(warp, lane);

  Sums<Sum, TILES, GROUPED> s;
  int group = -1;
  Sum multiplier[GROUPED ? TILES : 1] = {};
  int zero[GROUPED ? TILES : 1] = {};
  // the group's sums, times its constants, which lane l holds for row l of each 32
  auto flush = [&] {
    if constexpr (GROUPED) {
#pragma unroll
      for (int j = 0; j < 2 * TILES; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Sum times = __shfl_sync(~0u, multiplier[j / 2], j % 2 * 16 + h * 8 + g);
          const Sum less = static_cast<Sum>(__shfl_sync(~0u, zero[j / 2], j % 2 * 16 + h * 8 + g));
#pragma unroll
          for (int t = 0; t < TILES; ++t)
#pragma unroll
            for (int d = 2 * h; d < 2 * h + 2; ++d) {
              Sum& acc = s.acc[j][t][d];
              if constexpr (T::FLOATS) s.total[j][t][d] = fmaf(times, fmaf(-less, s.ones[t][d % 2], acc), s.total[j][t][d]);
              else s.total[j][t][d] += times * ((T::WIDE ? acc : acc >> 4) - less * s.ones[t][d % 2]);
              acc = 0;
            }
        }
#pragma unroll
      for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int d = 0; d < 4; ++d) s.ones[t][d] = 0;
    }
  };
  for (int piece = first; piece < last; ++piece) {
    wait<T::STAGES - 2>();
    __syncwarp();
    if (piece + T::STAGES - 1 < last) fetch(piece + T::STAGES - 1);
    commit();
    const uint32_t at = queue + (piece - first) % T::STAGES * stage;
    if constexpr (GROUPED) {
      const char* constants = shared + (at - shared_address(shared)) + T::WEIGHT_BYTES + x_stage;
      const int step0 = piece * T::STEPS, steps = min(o.steps - step0, T::STEPS);
      for (int step = 0; step < steps;) {
        const int now = (step0 + step) / o.group_steps, end = min((now + 1) * o.group_steps - step0, steps);
        if (now != group) {
          if (group >= 0) flush();
          group = now;
#pragma unroll
          for (int r = 0; r < TILES; ++r) {
            const int row = r * 32 + lane;
            if (step == 0) {
              multiplier[r] = T::FLOATS ? reinterpret_cast<const Sum*>(constants)[row] : static_cast<Sum>(reinterpret_cast<const int8_t*>(constants)[row]);
              zero[r] = o.zero == nullptr ? 0 : reinterpret_cast<const int8_t*>(constants)[(T::FLOATS ? 4 : 1) * T::ROWS + row];
            } else {  // a group that starts within a piece
              const int64_t in = now * o.group_stride + min(row0 + row, o.rows - 1);
              multiplier[r] = T::FLOATS ? reinterpret_cast<const Sum*>(o.multiplier)[in] : static_cast<Sum>(reinterpret_cast<const int8_t*>(o.multiplier)[in]);
              zero[r] = o.zero == nullptr ? 0 : reinterpret_cast<const int8_t*>(o.zero)[in];
            }
          }
        }
        multiply<FORMAT, GROUPED, TILES>(s, at, at + T::WEIGHT_BYTES, o.m, lane, (1u << end) - (1u << step), o.zero != nullptr);
        step = end;
      }
    } else {
      multiply<FORMAT, GROUPED, TILES>(s, at, at + T::WEIGHT_BYTES, o.m, lane, ~0u, false);
    }
  }
  if (group >= 0) flush();
  wait<0>();
  __syncthreads();
  Sum* const partial = reinterpret_cast<Sum*>(shared);
  if constexpr (GROUPED) leave<Sum, TILES, T::PITCH>(partial, s.total, o.m, warp, lane);
  else leave<Sum, TILES, T::PITCH>(partial, s.acc, o.m, warp, lane);
  __syncthreads();
  Sum* const result = reinterpret_cast<Sum*>(shared + T::results_at(o.m, warps));
  for (int i = threadIdx.x; i < o.m * T::ROWS; i += blockDim.x) {
    const int row = i % T::ROWS, column = i / T::ROWS;
    Sum sum = 0;
    for (int w = 0; w < warps; ++w) sum += partial[(w * 8 * TILES + column) * T::PITCH + row];
    if constexpr (!T::FLOATS && !GROUPED && FORMAT != W8A8) sum >>= FORMAT == W4A4 ? 8 : 4;
    result[column * T::ROWS + (row & ~31) + row % 8 / 2 * 8 + row % 32 / 8 * 2 + row % 2] = sum;
  }
  __syncthreads();
  return result;
}

// --- kernels ---

template <int FORMAT, bool GROUPED, int TILES>
__global__ void __launch_bounds__(32 * Traits<FORMAT, GROUPED, TILES>::MOST_WARPS)
    linear_kernel(const __grid_constant__ Operands o, const __grid_constant__ VitqLinear p, const bool vectors) {
  using T = Traits<FORMAT, GROUPED, TILES>;
  extern __shared__ __align__(128) char shared[];
  const int row0 = blockIdx.x * T::ROWS, warps = blockDim.x / 32;
  float* const constants = reinterpret_cast<float*>(shared + T::constants_at(p.m, warps));
  float* const floats = reinterpret_cast<float*>(shared + T::floats_at(p.m, warps));
  const int* result = accumulate<FORMAT, GROUPED, TILES>(o, shared, row0, [&](int warp, int lane) {
    if (threadIdx.x < T::ROWS / 2) {
      const bool second = threadIdx.x >= T::ROWS / 4;
      copy_constants(shared_address(constants + threadIdx.x * 4), second ? p.scale : p.bias, row0 + threadIdx.x % (T::ROWS / 4) * 4, o);
    }
    if (p.a_fp != nullptr) float_columns<TILES, T::PITCH>(p, row0, o.rows, floats, warp, lane);
  });
  for (int i = threadIdx.x; i < p.m * T::ROWS / COLUMNS; i += blockDim.x) {
    const int row = i / (T::ROWS / COLUMNS), column = i % (T::ROWS / COLUMNS) * COLUMNS;
    const RowAt at = row_at(p, row);
    int whole[COLUMNS];
    float scale[COLUMNS], y[COLUMNS];
#pragma unroll
    for (int e = 0; e < COLUMNS; ++e) whole[e] = result[row * T::ROWS + column + e], y[e] = constants[column + e], scale[e] = constants[T::ROWS + column + e];
    accumulate8(whole, at.scale, p.row_scale != nullptr, scale, y);
    // A zero point of the weight would be one fmaf here, y[e] = fmaf(its term of the column, its term of the row, y[e]).
    if (p.a_fp != nullptr) {
#pragma unroll
      for (int e = 0; e < COLUMNS; ++e) {  // the column's place in its 32: columns 8·c + 2·j + e of the result are 8·j + 2·c + e of the weight
        const int from = (column & ~31) + e / 2 * 8 + column % 32 / 8 * 2 + e % 2;
        float sum = 0;
        for (int w = 0; w < warps; ++w) sum += floats[(w * 8 * TILES + row) * T::PITCH + from];
        y[e] += sum;
      }
    }
    if (p.out.dtype != VITQ_S8) finish8<ACT_FLOAT_OUT>(p, at, row0 + column, vectors, y);
    else if (p.activation == VITQ_NO_ACTIVATION) finish8<CODES_OUT>(p, at, row0 + column, vectors, y);
    else finish8<ACT_CODES_OUT>(p, at, row0 + column, vectors, y);
  }
}

template <int FORMAT, int TILES>
__global__ void __launch_bounds__(32 * Traits<FORMAT, true, TILES>::MOST_WARPS)
    weight_only_kernel(const __grid_constant__ Operands o, const __grid_constant__ VitqWeightOnly p) {
  using T = Traits<FORMAT, true, TILES>;
  extern __shared__ __align__(128) char shared[];
  const int row0 = blockIdx.x * T::ROWS;
  float* const bias = reinterpret_cast<float*>(shared + T::constants_at(p.m, blockDim.x / 32));
  const float* result = accumulate<FORMAT, true, TILES>(o, shared, row0, [&](int, int) {
    if (threadIdx.x < T::ROWS / 4) copy_constants(shared_address(bias + threadIdx.x * 4), p.bias, row0 + threadIdx.x * 4, o);
  });
  for (int i = threadIdx.x; i < p.m * T::ROWS; i += blockDim.x) {
    const int row = i / T::ROWS, column = i % T::ROWS;
    if (row0 + column >= p.n) continue;
    const int64_t at = row * p.out_stride + row0 + column;
    const float y = result[i] + bias[column];
    if (p.out_dtype == VITQ_F32) static_cast<float*>(p.out)[at] = y;
    else if (p.out_dtype == VITQ_F16) static_cast<__half*>(p.out)[at] = __float2half_rn(y);
    else static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16_rn(y);
  }
}

// --- launch ---

constexpr int CONFIGS = 6;  // 4, 8 or 16 warps; from 3 on the kernel may start before the one before it ends

// Enough warps to have the memory busy, as few as that takes, so that fewer sums meet at the end; -1 where none fits.
template <class T>
int choose(const Operands& o, bool fp, const Gpu& gpu) {
  const int blocks = (o.rows + T::ROWS - 1) / T::ROWS, pieces = (o.steps + T::STEPS - 1) / T::STEPS;
  int best = -1;
  for (int i = 0; 4 << i <= T::MOST_WARPS; ++i) {
    const int warps = 4 << i;
    if (T::shared_bytes(o.m, warps, fp) > gpu.shared || (best >= 0 && (warps / 2 >= pieces || blocks * warps / 2 >= gpu.processors * 14))) break;
    best = i;
  }
  return best;
}

template <class T, class... Arguments>
int launch(void (*kernel)(Arguments...), int config, bool fp, cudaStream_t stream, const Operands& o, Arguments... arguments) {
  Gpu gpu;
  if (int error = gpu_of_now(gpu)) return error;
  if (config < -1 || config >= CONFIGS) return VITQ_BAD_ARGUMENT;
  if (config == -1 && (config = choose<T>(o, fp, gpu)) >= 0) config += 3;
  if (config < 0) return VITQ_UNSUPPORTED;
  const int warps = 4 << config % 3, bytes = T::shared_bytes(o.m, warps, fp);
  if (warps > T::MOST_WARPS || bytes > gpu.shared) return VITQ_UNSUPPORTED;
  if (bytes > 48 * 1024)
    if (cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel))) return error;
  cudaLaunchConfig_t how = {};
  how.gridDim = dim3((o.rows + T::ROWS - 1) / T::ROWS), how.blockDim = dim3(32 * warps), how.dynamicSmemBytes = bytes, how.stream = stream;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization, early.val.programmaticStreamSerializationAllowed = 1;
  if (gpu.major >= 9 && config >= 3) how.attrs = &early, how.numAttrs = 1;
  return cudaLaunchKernelEx(&how, kernel, arguments...);
}

// One per file, so that they compile side by side.
int weight_only_f16(const Operands& o, const VitqWeightOnly& p, cudaStream_t stream);
int weight_only_bf16(const Operands& o, const VitqWeightOnly& p, cudaStream_t stream);

template <int WIDE, int NARROW>
int launch_weight_only(const Operands& o, const VitqWeightOnly& p, cudaStream_t stream) {
  const auto run = [&](auto format, auto tiles) {
    constexpr int FORMAT = decltype(format)::value, TILES = decltype(tiles)::value;
    return launch<Traits<FORMAT, true, TILES>>(weight_only_kernel<FORMAT, TILES>, p.config, false, stream, o, o, p);
  };
  using std::integral_constant;
  if (p.weight_bits == 8) return p.m <= 8 ? run(integral_constant<int, WIDE>{}, integral_constant<int, 1>{}) : run(integral_constant<int, WIDE>{}, integral_constant<int, 2>{});
  return p.m <= 8 ? run(integral_constant<int, NARROW>{}, integral_constant<int, 1>{}) : run(integral_constant<int, NARROW>{}, integral_constant<int, 2>{});
}

}  // namespace few
}  // namespace vitq
