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
  float group_inverse;         // 1 / group_steps

  // The group of a step: exact, since a step is no nearer than 0.5 to the next group and below 2^20.
  __device__ __forceinline__ int group(int step) const { return static_cast<int>((static_cast<float>(step) + 0.5f) * group_inverse); }
};

// TILES of eight rows of x; ROW_GROUPS of 32 rows of the weight, which share what is read of x.
template <int FORMAT_, bool GROUPED_, int TILES_, int ROW_GROUPS_>
struct Traits {
  static constexpr int FORMAT = FORMAT_, TILES = TILES_, ROW_GROUPS = ROW_GROUPS_;
  static constexpr bool GROUPED = GROUPED_, FLOATS = FORMAT >= W8F16, BF16 = FORMAT >= W8BF16;
  static constexpr bool WIDE = FORMAT == W8A8 || FORMAT == W8F16 || FORMAT == W8BF16;
  static constexpr int VECTORS = FORMAT == W8A8 || FORMAT == W4A4 ? 1 : !FLOATS || WIDE ? 2 : 4;  // of x in a piece, for a lane
  static constexpr int X_PIECE = 64 * VECTORS;     // bytes of x's row
  static constexpr int STEPS = WIDE ? 2 : 4;       // of 32 columns in a piece
  static constexpr int STAGES = ROW_GROUPS == 1 ? 4 : 3, MOST_WARPS = 16 / ROW_GROUPS;
  static constexpr int ROWS = 32 * ROW_GROUPS, WEIGHT_BYTES = 64 * ROWS;
  static constexpr int CONSTANT = FLOATS ? 4 : 1;  // bytes of a multiplier; a zero point has one
  static constexpr int CONSTANT_BYTES = GROUPED ? (CONSTANT + 1) * ROWS : 0;
  static constexpr int PITCH = ROWS + 4;           // of partial sums: no two lanes meet a bank
  using Sum = std::conditional_t<FLOATS, float, int>;

  // Shared memory: queues, then partial sums in their place; results; bias and scale; partial sums of the float16 columns.
  __host__ __device__ static int stage_bytes(int m) { return WEIGHT_BYTES + m * X_PIECE + CONSTANT_BYTES; }
  __host__ __device__ static int partial_bytes(int warps) { return warps * 8 * TILES * PITCH * 4; }
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
__device__ __forceinline__ void copy16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
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

// (a & MASK) ^ b in one instruction, with b in a register.
template <uint32_t MASK>
__device__ __forceinline__ uint32_t masked_xor(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(r) : "r"(a), "n"(MASK), "r"(b));
  return r;
}

// A row's zero point in the form in which it is taken off codes: code - zero is exact in both 16-bit formats. The bits of a code lie below
// the exponent of a power of two, so that is part of it.
template <bool BF16, bool WIDE>
struct ZeroPoint {
  uint32_t low, high;
  __device__ __forceinline__ void set(float zero) {
    if constexpr (WIDE && BF16) low = __float_as_uint(8388736.0f + zero);
    else if constexpr (WIDE) low = bits(__float2half2_rn(1152.0f + zero));
    else if constexpr (BF16) low = bits(__float2bfloat162_rn(136.0f + zero));
    else low = bits(__float2half2_rn(1032.0f + zero)), high = bits(__float2half2_rn(-72.0f - zero));
  }
};

// Less the zero point, the codes of the bytes 2·PART and 2·PART + 1.
template <bool BF16, int PART>
__device__ __forceinline__ uint32_t byte_codes(uint32_t w, const ZeroPoint<BF16, true>& zero) {  // w: bytes + 128
  if constexpr (BF16) {
    const float a = __uint_as_float(__byte_perm(w, 0x4B000000u, 0x7440 + 2 * PART)) - __uint_as_float(zero.low);
    const float b = __uint_as_float(__byte_perm(w, 0x4B000000u, 0x7441 + 2 * PART)) - __uint_as_float(zero.low);
    return __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x7632);
  } else {
    return bits(__hsub2(halves(__byte_perm(w, 0x64646464u, 0x4140 + 0x202 * PART)), halves(zero.low)));
  }
}

// Less the zero point, the codes in the low or high nibbles of the bytes 0 and 2 of w.
template <bool BF16, bool HIGH>
__device__ __forceinline__ uint32_t nibble_codes(uint32_t w, const ZeroPoint<BF16, false>& zero) {
  if constexpr (BF16) return bits(__hsub2(bfloats(masked_xor<0x000F000Fu>(HIGH ? w >> 4 : w, 0x43084308u)), bfloats(zero.low)));
  else if constexpr (!HIGH) return bits(__hsub2(halves(masked_xor<0x000F000Fu>(w, 0x64086408u)), halves(zero.low)));
  else return bits(__hfma2(halves(masked_xor<0x00F000F0u>(w, 0x64806480u)), halves(0x2C002C00u), halves(zero.high)));  // (1024 + 16u)/16 - 72
}

// --- a warp's share ---

template <class T>
struct Sums {
  static constexpr bool WITH_ONES = T::GROUPED && !T::FLOATS;
  typename T::Sum acc[2 * T::ROW_GROUPS][T::TILES][4] = {};  // [m16 tile of the weight][n8 tile of x]
  typename T::Sum total[T::GROUPED ? 2 * T::ROW_GROUPS : 1][T::GROUPED ? T::TILES : 1][4] = {};
  int ones[WITH_ONES ? T::TILES : 1][4] = {};                // sums of x, the same in each row
  ZeroPoint<T::BF16, T::WIDE> zero[T::FLOATS ? 4 * T::ROW_GROUPS : 1];
};

// Products of one piece that lies in shared memory. MASKED: bit i of `steps` says whether its i-th 32 columns count.
template <class T, bool MASKED>
__device__ __forceinline__ void multiply(Sums<T>& s, uint32_t weight, uint32_t x, int m, int lane, uint32_t steps, bool with_ones) {
  constexpr int TILES = T::TILES;
  const int g = lane / 4, c = lane % 4;
  uint32_t w[4 * T::ROW_GROUPS][4];
#pragma unroll
  for (int i = 0; i < 4 * T::ROW_GROUPS; ++i) {
    const uint4 v = read16(weight + (i * 32 + lane) * 16);
    w[i][0] = v.x, w[i][1] = v.y, w[i][2] = v.z, w[i][3] = v.w;
    if constexpr (T::FLOATS && T::WIDE)
#pragma unroll
      for (int k = 0; k < 4; ++k) w[i][k] ^= 0x80808080u;
  }
  const uint32_t mine = T::WIDE ? steps >> c / 2 & 1 : steps >> c / 2 * 2 & 3;
#pragma unroll
  for (int v = 0; v < T::VECTORS; ++v) {
    const bool high = !T::WIDE && T::VECTORS > 1 && v >= T::VECTORS / 2;
    uint32_t b[TILES][4];
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      uint4 r = make_uint4(0, 0, 0, 0);
      if (t * 8 + g < m && (!MASKED || mine >> high & 1)) r = read16(x + ((v * m + t * 8 + g) * 4 + c) * 16);
      b[t][0] = r.x, b[t][1] = r.y, b[t][2] = r.z, b[t][3] = r.w;
    }
    if constexpr (!T::FLOATS) {
#pragma unroll
      for (int half = 0; half < (T::FORMAT == W4A4 ? 2 : 1); ++half) {
        const bool upper = T::FORMAT == W4A4 ? half : high;
        auto code = [&](uint32_t word) { return T::WIDE ? word : upper ? nibbles<true>(word) : nibbles<false>(word); };
        auto input = [&](uint32_t word) { return T::FORMAT != W4A4 ? word : upper ? nibbles<true>(word) : nibbles<false>(word); };
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
#pragma unroll
          for (int j = 0; j < 2 * T::ROW_GROUPS; ++j) {
            const uint32_t a0 = code(w[2 * j][k]), a1 = code(w[2 * j + 1][k]), a2 = code(w[2 * j][k + 1]), a3 = code(w[2 * j + 1][k + 1]);
#pragma unroll
            for (int t = 0; t < TILES; ++t) mma(s.acc[j][t], a0, a1, a2, a3, input(b[t][k]), input(b[t][k + 1]));
          }
          if constexpr (T::GROUPED)
            if (with_ones)
#pragma unroll
              for (int t = 0; t < TILES; ++t) mma(s.ones[t], 0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u, b[t][k], b[t][k + 1]);
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < 2; ++k) {  // four of the vector's eight columns
        const int word = v % 2 * 2 + k;
#pragma unroll
        for (int j = 0; j < 2 * T::ROW_GROUPS; ++j) {
          uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t from = w[2 * j + i][word];
            const auto& zero = s.zero[2 * j + i];
            if constexpr (T::WIDE) a[i] = byte_codes<T::BF16, 0>(from, zero), a[2 + i] = byte_codes<T::BF16, 1>(from, zero);
            else if (high) a[i] = nibble_codes<T::BF16, true>(from, zero), a[2 + i] = nibble_codes<T::BF16, true>(from >> 8, zero);
            else a[i] = nibble_codes<T::BF16, false>(from, zero), a[2 + i] = nibble_codes<T::BF16, false>(from >> 8, zero);
          }
#pragma unroll
          for (int t = 0; t < TILES; ++t) mma<T::BF16>(s.acc[j][t], a[0], a[1], a[2], a[3], b[t][2 * k], b[t][2 * k + 1]);
        }
      }
    }
  }
}

// Each warp's sums, to shared memory: [warp][row of x][row of the weight].
template <class T, class S>
__device__ __forceinline__ void leave(S* partial, const S (&sums)[2 * T::ROW_GROUPS][T::TILES][4], int m, int warp, int lane) {
  const int g = lane / 4, c = lane % 4;
#pragma unroll
  for (int j = 0; j < 2 * T::ROW_GROUPS; ++j)
#pragma unroll
    for (int t = 0; t < T::TILES; ++t)
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        const int column = t * 8 + 2 * c + d % 2;
        if (column < m) partial[(warp * 8 * T::TILES + column) * T::PITCH + j * 16 + g + d / 2 * 8] = sums[j][t][d];
      }
}

// The float16 columns: 64 bytes of rows at a time, straight from memory, while the first pieces of the weight come in.
template <class T>
__device__ __forceinline__ void float_columns(const VitqLinear& p, int row0, int rows, float* partial, int warp, int lane) {
  const int g = lane / 4, c = lane % 4;
  float acc[2 * T::ROW_GROUPS][T::TILES][4] = {};
  const auto vector = [&](const void* data, int64_t row, int64_t stride, int column) {
    return column < p.k_fp ? __ldg(reinterpret_cast<const uint4*>(static_cast<const __half*>(data) + row * stride + column)) : make_uint4(0, 0, 0, 0);
  };
  for (int at = warp * 32; at < p.k_fp; at += blockDim.x) {
    const int column = at + c * 8;
    uint4 b[T::TILES];
#pragma unroll
    for (int t = 0; t < T::TILES; ++t) b[t] = t * 8 + g < p.m ? vector(p.a_fp, t * 8 + g, p.lda_fp, column) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < 2 * T::ROW_GROUPS; ++j) {
      const uint4 low = vector(p.weight_fp, min(row0 + j * 16 + g, rows - 1), p.k_fp, column);
      const uint4 high = vector(p.weight_fp, min(row0 + j * 16 + g + 8, rows - 1), p.k_fp, column);
#pragma unroll
      for (int t = 0; t < T::TILES; ++t) {
        mma<false>(acc[j][t], low.x, high.x, low.y, high.y, b[t].x, b[t].y);
        mma<false>(acc[j][t], low.z, high.z, low.w, high.w, b[t].z, b[t].w);
      }
    }
  }
  leave<T>(partial, acc, p.m, warp, lane);
}

// Four of the block's bias or scale, zeros where there is none.
__device__ __forceinline__ void copy_constants(uint32_t to, const float* from, int column, const Operands& o) {
  const bool exists = from != nullptr && column < o.rows;
  copy16(to, exists ? static_cast<const void*>(from + column) : o.weight, exists ? 16 : 0);
}

// What a warp copies: each `warps`-th piece, so that the warps of a block read neighbours in memory, to the next place of its queue.
template <class T>
struct Copies {
  const char* weight;      // this lane's 16 bytes of the next piece, in the first row of the block that is its own
  int64_t second;          // to the second 32 rows; 0 where there are none
  const char* x;           // its 16 bytes of the next piece of x, in the first row that is its own
  int64_t x_step;          // to its next row
  int x_row;
  int piece;
  uint32_t to, first, end, x_stage;

  __device__ __forceinline__ void start(const Operands& o, int row0, int warp, uint32_t queue, int lane) {
    const int g = lane / 4, c = lane % 4;
    piece = warp;
    weight = o.weight + int64_t(row0 + g) * o.row_bytes + piece * 64 + c * 16;
    second = row0 + 32 < o.rows ? int64_t(32) * o.row_bytes : 0;
    // Lanes share out rows of x by 16 bytes. Of the parts of a piece lane c of a fragment multiplies those with this c, in the order of v.
    constexpr int PARTS = 4 * T::VECTORS;
    const int part = lane % PARTS;
    int own = part, v = 0;
    if constexpr (T::FORMAT == W4A8) own = part / 4 * 2 + part % 2, v = part / 2 % 2;
    else if constexpr (T::VECTORS == 2) own = part / 2, v = part % 2;
    else if constexpr (T::VECTORS == 4) own = part / 8 * 2 + part / 2 % 2, v = part / 4 % 2 * 2 + part % 2;
    x_row = lane / PARTS;
    x = o.x + x_row * o.ldx + piece * T::X_PIECE + part * 16, x_step = 32 / PARTS * o.ldx;
    x_stage = T::WEIGHT_BYTES + ((v * o.m + x_row) * 4 + own) * 16;
    to = first = queue, end = queue + T::STAGES * T::stage_bytes(o.m);
  }

  __device__ __forceinline__ void next(const Operands& o, int row0, int warps, int lane) {
    const int left = o.row_bytes - piece * 64, x_left = o.x_bytes - piece * T::X_PIECE;
    const uint64_t row_step = 8 * static_cast<uint32_t>(o.row_bytes);
    if (left >= 64 && x_left >= T::X_PIECE) {
#pragma unroll
      for (int i = 0; i < 4 * T::ROW_GROUPS; ++i) copy16(to + (i * 32 + lane) * 16, weight + row_step * (i % 4) + (i < 4 ? 0 : second));
#pragma unroll 1
      for (int row = x_row, i = 0; row < o.m; row += 8 / T::VECTORS, ++i) copy16(to + x_stage + i * (8 / T::VECTORS) * 64, x + i * x_step);
    } else {
      const int size = clamp16(left - lane % 4 * 16), x_size = clamp16(x_left - lane % (4 * T::VECTORS) * 16);
#pragma unroll
      for (int i = 0; i < 4 * T::ROW_GROUPS; ++i) copy16(to + (i * 32 + lane) * 16, weight + row_step * (i % 4) + (i < 4 ? 0 : second), size);
#pragma unroll 1
      for (int row = x_row, i = 0; row < o.m; row += 8 / T::VECTORS, ++i) copy16(to + x_stage + i * (8 / T::VECTORS) * 64, x + i * x_step, x_size);
    }
    if constexpr (T::GROUPED) {
      const int64_t at = o.group(piece * T::STEPS) * o.group_stride + row0;
      const uint32_t constants = to + T::WEIGHT_BYTES + o.m * T::X_PIECE + lane * 4;
      const int rows = min(o.rows - row0, T::ROWS);
#pragma unroll
      for (int i = 0; i < T::ROWS * T::CONSTANT / 4; i += 32)
        if (i + lane < rows * T::CONSTANT / 4) copy4(constants + i * 4, o.multiplier + at * T::CONSTANT + (i + lane) * 4);
      if (o.zero != nullptr && lane < rows / 4) copy4(constants + T::ROWS * T::CONSTANT, o.zero + at + lane * 4);
    }
    piece += warps, weight += warps * 64, x += warps * T::X_PIECE;
    to += T::stage_bytes(o.m);
    if (to == end) to = first;
  }
};

// Sums of the block's outputs over k, [row of x][32·ROW_GROUPS columns in logical order], in the shared memory that is returned. `meanwhile` runs
// when the first copies are under way; what it copies has arrived at the end.
template <class T, class F>
__device__ __forceinline__ typename T::Sum* accumulate(const Operands& o, char* shared, int row0, F meanwhile) {
  using Sum = typename T::Sum;
  constexpr int TILES = T::TILES;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4;
  const int pieces = (o.steps + T::STEPS - 1) / T::STEPS;
  const int stage = T::stage_bytes(o.m);
  const uint32_t queue = shared_address(shared) + warp * T::STAGES * stage;

  start_dependents();
  for (int r = 0; r < T::ROWS && row0 + r < o.rows; r += 32) {
    const char* line = o.weight + int64_t(row0 + r + lane) * o.row_bytes;
    const int end = min(o.row_bytes, warps * T::STAGES * 64);
    for (int at = warp * 128; at < end; at += warps * 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(line + at));
  }
  wait_for_kernels_before();

  Copies<T> copies;
  copies.start(o, row0, warp, queue, lane);
#pragma unroll
  for (int i = 0; i < T::STAGES - 1; ++i) {
    if (copies.piece < pieces) copies.next(o, row0, warps, lane);
    commit();
  }
  meanwhile(warp, lane);

  Sums<T> s;
  int group = -1;
  Sum multiplier[T::GROUPED ? T::ROW_GROUPS : 1] = {};
  int zero[T::GROUPED ? T::ROW_GROUPS : 1] = {};
  // the group's sums, times its constants, which lane l holds for row l of each 32
  auto flush = [&] {
    if constexpr (T::GROUPED) {
#pragma unroll
      for (int j = 0; j < 2 * T::ROW_GROUPS; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int from = j % 2 * 16 + h * 8 + g;
          const Sum times = __shfl_sync(~0u, multiplier[j / 2], from);
          int less = 0;
          if constexpr (!T::FLOATS) less = o.zero == nullptr ? 0 : __shfl_sync(~0u, zero[j / 2], from);
#pragma unroll
          for (int t = 0; t < TILES; ++t)
#pragma unroll
            for (int d = 2 * h; d < 2 * h + 2; ++d) {
              Sum& acc = s.acc[j][t][d];
              if constexpr (T::FLOATS) s.total[j][t][d] = fmaf(times, acc, s.total[j][t][d]);
              else s.total[j][t][d] += times * ((acc >> 4) - less * s.ones[t][d % 2]);
              acc = 0;
            }
        }
      if constexpr (!T::FLOATS)
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
          for (int d = 0; d < 4; ++d) s.ones[t][d] = 0;
    }
  };
  // constants [row] of multipliers and zero points, those of the group that begins
  auto enter = [&](const Sum* multipliers, const char* small, const char* zeros, int limit) {
    if constexpr (T::GROUPED) {
#pragma unroll
      for (int r = 0; r < T::ROW_GROUPS; ++r) {
        const int row = min(r * 32 + lane, limit - 1);
        multiplier[r] = T::FLOATS ? multipliers[row] : static_cast<Sum>(reinterpret_cast<const int8_t*>(small)[row]);
        zero[r] = zeros == nullptr ? 0 : reinterpret_cast<const int8_t*>(zeros)[row];
      }
      if constexpr (T::FLOATS)
#pragma unroll
        for (int i = 0; i < 4 * T::ROW_GROUPS; ++i)
          s.zero[i].set(o.zero == nullptr ? 0.0f : static_cast<float>(__shfl_sync(~0u, zero[i / 4], i % 4 * 8 + g)));
    }
  };
  uint32_t at = queue;
  for (int piece = warp; piece < pieces; piece += warps) {
    wait<T::STAGES - 2>();
    __syncwarp();
    if (copies.piece < pieces) copies.next(o, row0, warps, lane);
    commit();
    const uint32_t x = at + T::WEIGHT_BYTES;
    if constexpr (T::GROUPED) {
      const int step0 = piece * T::STEPS, steps = min(o.steps - step0, T::STEPS);
      const int now = o.group(step0);
      int group_end = (now + 1) * o.group_steps;
      if (now != group) {
        if (group >= 0) flush();
        group = now;
        const char* constants = shared + (x - shared_address(shared)) + o.m * T::X_PIECE;
        enter(reinterpret_cast<const Sum*>(constants), constants, o.zero == nullptr ? nullptr : constants + T::CONSTANT * T::ROWS, T::ROWS);
      }
      if (step0 + steps <= group_end) {
        multiply<T, false>(s, at, x, o.m, lane, ~0u, o.zero != nullptr);
      } else {  // groups that begin within the piece
        for (int step = 0; step < steps;) {
          if (step > 0) {
            flush();
            ++group, group_end += o.group_steps;
            const int64_t row = group * o.group_stride + row0;
            enter(reinterpret_cast<const Sum*>(o.multiplier) + row, o.multiplier + row, o.zero == nullptr ? nullptr : o.zero + row, o.rows - row0);
          }
          const int stop = min(group_end - step0, steps);
          multiply<T, true>(s, at, x, o.m, lane, (1u << stop) - (1u << step), o.zero != nullptr);
          step = stop;
        }
      }
    } else {
      multiply<T, false>(s, at, x, o.m, lane, ~0u, false);
    }
    at += stage;
    if (at == queue + T::STAGES * stage) at = queue;
  }
  if (group >= 0) flush();
  wait<0>();
  __syncthreads();
  Sum* const partial = reinterpret_cast<Sum*>(shared);
  if constexpr (T::GROUPED) leave<T>(partial, s.total, o.m, warp, lane);
  else leave<T>(partial, s.acc, o.m, warp, lane);
  __syncthreads();
  Sum* const result = reinterpret_cast<Sum*>(shared + T::results_at(o.m, warps));
  for (int i = threadIdx.x; i < o.m * T::ROWS; i += blockDim.x) {
    const int row = i % T::ROWS, column = i / T::ROWS;
    Sum sum = 0;
#pragma unroll 4
    for (int w = 0; w < warps; ++w) sum += partial[(w * 8 * TILES + column) * T::PITCH + row];
    if constexpr (!T::FLOATS && !T::GROUPED && T::FORMAT != W8A8) sum >>= T::FORMAT == W4A4 ? 8 : 4;
    result[column * T::ROWS + (row & ~31) + row % 8 / 2 * 8 + row % 32 / 8 * 2 + row % 2] = sum;
  }
  __syncthreads();
  return result;
}

// --- kernels ---

template <class T>
__global__ void __launch_bounds__(32 * T::MOST_WARPS) linear_kernel(const __grid_constant__ Operands o, const __grid_constant__ VitqLinear p, const bool vectors) {
  extern __shared__ __align__(128) char shared[];
  const int row0 = blockIdx.x * T::ROWS, warps = blockDim.x / 32;
  float* const constants = reinterpret_cast<float*>(shared + T::constants_at(p.m, warps));
  float* const floats = reinterpret_cast<float*>(shared + T::floats_at(p.m, warps));
  const int* result = accumulate<T>(o, shared, row0, [&](int warp, int lane) {
    if (threadIdx.x < T::ROWS / 2) {
      const bool second = threadIdx.x >= T::ROWS / 4;
      copy_constants(shared_address(constants + threadIdx.x * 4), second ? p.scale : p.bias, row0 + threadIdx.x % (T::ROWS / 4) * 4, o);
    }
    if (p.a_fp != nullptr) float_columns<T>(p, row0, o.rows, floats, warp, lane);
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
        for (int w = 0; w < warps; ++w) sum += floats[(w * 8 * T::TILES + row) * T::PITCH + from];
        y[e] += sum;
      }
    }
    if (p.out.dtype != VITQ_S8) finish8<ACT_FLOAT_OUT>(p, at, row0 + column, vectors, y);
    else if (p.activation == VITQ_NO_ACTIVATION) finish8<CODES_OUT>(p, at, row0 + column, vectors, y);
    else finish8<ACT_CODES_OUT>(p, at, row0 + column, vectors, y);
  }
}

template <class T>
__global__ void __launch_bounds__(32 * T::MOST_WARPS) weight_only_kernel(const __grid_constant__ Operands o, const __grid_constant__ VitqWeightOnly p) {
  extern __shared__ __align__(128) char shared[];
  const int row0 = blockIdx.x * T::ROWS;
  float* const bias = reinterpret_cast<float*>(shared + T::constants_at(p.m, blockDim.x / 32));
  const float* result = accumulate<T>(o, shared, row0, [&](int, int) {
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

// f(Traits) for the sizes of a launch. Many rows of x are read often: where there are blocks enough, for twice the rows of the weight.
template <int FORMAT, bool GROUPED, class F>
int with_traits(const Operands& o, F f) {
  Gpu gpu;
  if (int error = gpu_of_now(gpu)) return error;
  if (o.m <= 8) return f(Traits<FORMAT, GROUPED, 1, 1>{});
  if (o.rows / 64 < gpu.processors) return f(Traits<FORMAT, GROUPED, 2, 1>{});
  return f(Traits<FORMAT, GROUPED, 2, 2>{});
}

// One per file, so that they compile side by side.
int weight_only_f16(const Operands& o, const VitqWeightOnly& p, cudaStream_t stream);
int weight_only_bf16(const Operands& o, const VitqWeightOnly& p, cudaStream_t stream);

template <int WIDE, int NARROW>
int launch_weight_only(const Operands& o, const VitqWeightOnly& p, cudaStream_t stream) {
  const auto run = [&](auto traits) {
    using T = decltype(traits);
    return launch<T>(weight_only_kernel<T>, p.config, false, stream, o, o, p);
  };
  return p.weight_bits == 8 ? with_traits<WIDE, true>(o, run) : with_traits<NARROW, true>(o, run);
}

}  // namespace few
}  // namespace vitq
