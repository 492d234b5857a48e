// Products of few rows (up to VITQ_FEW_ROWS), which take as long as reading the weight does. A block computes the outputs of 32 rows of the
// weight; its warps divide the columns among themselves and add up at the end.
//
// The weight is the m16 operand of mma.sync and the input the n8 one, so eight rows of the input cost as much as one. Lane 4·g + c of a fragment
// holds parts of row g of both operands, and any order of k will do as long as both have it: a lane reads 16 bytes of a row of the weight, which
// are its part of several steps of k, and of the input just the columns that those are. So the weight comes from memory into registers, the next
// pieces of k on their way while one is multiplied, without barriers or exchange between lanes. (The same by cp.async through shared memory was
// slower on an H200, by half with float inputs: those copies and the reads from shared memory wait for one another.)
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
  int m, steps;                // rows of x; steps of 32 columns, as far as x has any
  const char* multiplier;      // int8 or float [groups, rows]
  const char* zero;            // int8 [groups, rows] or null
  int64_t group_stride;        // elements
  int group_steps;
  int x_at, x_pitch;           // where x lies in shared memory, and the bytes between its rows there
  float group_inverse;         // 1 / group_steps

  // The group of a step: exact, since a step is no nearer than 0.5 to the next group and below 2^20.
  __device__ __forceinline__ int group(int step) const { return static_cast<int>((static_cast<float>(step) + 0.5f) * group_inverse); }
};

// TILES of eight rows of x. SHARED: a block copies x to shared memory first, where it is not too large, so that registers are left for the weight.
template <int FORMAT_, bool GROUPED_, int TILES_, bool SHARED_>
struct Traits {
  static constexpr int FORMAT = FORMAT_, TILES = TILES_;
  static constexpr bool SHARED = SHARED_;
  static constexpr bool GROUPED = GROUPED_, FLOATS = FORMAT >= W8F16, BF16 = FORMAT >= W8BF16;
  static constexpr bool WIDE = FORMAT == W8A8 || FORMAT == W8F16 || FORMAT == W8BF16;
  static constexpr int VECTORS = FORMAT == W8A8 || FORMAT == W4A4 ? 1 : !FLOATS || WIDE ? 2 : 4;  // of x in a piece, for a lane
  static constexpr int X_PIECE = 64 * VECTORS;     // bytes of x's row
  static constexpr int STEPS = WIDE ? 2 : 4;       // of 32 columns in a piece
  static constexpr bool AHEAD = !GROUPED;          // whether x is fetched as far ahead as the weight: it takes registers
  static constexpr int DEPTH = TILES == 1 ? 3 : 2;  // pieces in registers
  static constexpr int X_PAD = FORMAT == W4A8 ? 32 : 64;  // rows of x in shared memory start at different banks
  static constexpr int PITCH = 32 + 4;             // of partial sums: no two lanes meet a bank
  using Sum = std::conditional_t<FLOATS, float, int>;

  // Shared memory: partial sums; results; bias, scale and column sums; partial sums of the float16 columns.
  __host__ __device__ static int partial_bytes(int warps) { return warps * 8 * TILES * PITCH * 4; }
  __host__ __device__ static int constants_at(int warps) { return partial_bytes(warps) + 8 * TILES * 32 * 4; }
  __host__ __device__ static int floats_at(int warps) { return constants_at(warps) + 3 * 32 * 4; }
  static int shared_bytes(int warps, bool fp) { return floats_at(warps) + (fp ? partial_bytes(warps) : 0); }
};

// --- instructions ---

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ int clamp16(int bytes) { return min(max(bytes, 0), 16); }

// 16 bytes, of which the first `size` are read and the rest is zero.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, int size) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Of the weight, which is read once; a kernel before may have written it, widened.
__device__ __forceinline__ uint4 stream16(const char* from) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}
// Of the input, which kernels before may have written while this one had started.
__device__ __forceinline__ uint4 read16(const char* from) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
  return v;
}
__device__ __forceinline__ uint4 read16(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
  return v;
}
// Its first `size` bytes, zeros after them.
__device__ __forceinline__ uint4 read_part(const char* from, int size) {
  uint4 v = make_uint4(0, 0, 0, 0);
#pragma unroll 1
  for (int i = size - 1; i >= 0; --i) {
    v.w = v.w << 8 | v.z >> 24, v.z = v.z << 8 | v.y >> 24, v.y = v.y << 8 | v.x >> 24;
    v.x = v.x << 8 | *reinterpret_cast<const volatile uint8_t*>(from + i);
  }
  return v;
}

__device__ __forceinline__ void mma(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <bool BF16>
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (BF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
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
__device__ __forceinline__ uint32_t zero_point(int zero) {
  const float z = static_cast<float>(zero);
  if constexpr (WIDE && BF16) return __float_as_uint(8388736.0f + z);
  else if constexpr (WIDE) return bits(__float2half2_rn(1152.0f + z));
  else if constexpr (BF16) return bits(__float2bfloat162_rn(136.0f + z));
  else return bits(__float2half2_rn(1032.0f + z));
}
// The float16 one for high nibbles, from that for low ones: -72 - zero.
__device__ __forceinline__ uint32_t zero_of_high(uint32_t low) { return bits(__hsub2(halves(0x63806380u), halves(low))); }

// Less the zero point, the codes of the bytes 2·PART and 2·PART + 1.
template <bool BF16, int PART>
__device__ __forceinline__ uint32_t byte_codes(uint32_t w, uint32_t zero) {  // w: bytes + 128
  if constexpr (BF16) {
    const float a = __uint_as_float(__byte_perm(w, 0x4B000000u, 0x7440 + 2 * PART)) - __uint_as_float(zero);
    const float b = __uint_as_float(__byte_perm(w, 0x4B000000u, 0x7441 + 2 * PART)) - __uint_as_float(zero);
    return __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x7632);
  } else {
    return bits(__hsub2(halves(__byte_perm(w, 0x64646464u, 0x4140 + 0x202 * PART)), halves(zero)));
  }
}

// Less the zero point, the codes in the low or high nibbles of the bytes 0 and 2 of w.
template <bool BF16, bool HIGH>
__device__ __forceinline__ uint32_t nibble_codes(uint32_t w, uint32_t zero) {
  if constexpr (BF16) return bits(__hsub2(bfloats(masked_xor<0x000F000Fu>(HIGH ? w >> 4 : w, 0x43084308u)), bfloats(zero)));
  else if constexpr (!HIGH) return bits(__hsub2(halves(masked_xor<0x000F000Fu>(w, 0x64086408u)), halves(zero)));
  else return bits(__hfma2(halves(masked_xor<0x00F000F0u>(w, 0x64806480u)), halves(0x2C002C00u), halves(zero)));  // (1024 + 16u)/16 - 72 - zero
}

// --- a warp's share ---

template <class T>
struct Sums {
  static constexpr bool WITH_ONES = T::GROUPED && !T::FLOATS;
  typename T::Sum acc[2][T::TILES][4] = {};    // [m16 tile of the weight][n8 tile of x]
  typename T::Sum total[T::GROUPED ? 2 : 1][T::GROUPED ? T::TILES : 1][4] = {};
  int ones[WITH_ONES ? T::TILES : 1][4] = {};  // sums of x, the same in each row
  // Of the group at hand, for the rows g, g + 8, g + 16 and g + 24 of the weight.
  typename T::Sum multiplier[T::GROUPED ? 4 : 1];
  int less[WITH_ONES ? 4 : 1];
  uint32_t zero[T::FLOATS ? 4 : 1];            // zero_point
};

// What a lane holds of a piece of k: of four rows of the weight, of x, and the constants of the group in which the piece begins.
template <class T>
struct Piece {
  uint4 weight[4];
  uint4 x[T::AHEAD ? T::TILES : 1][T::AHEAD ? T::VECTORS : 1];
  uint4 multiplier;
  uint32_t zero;
};

// Where a lane reads.
template <class T>
struct Source {
  const char* weight;
  uint32_t row_step;  // bytes to the row that is 8 further
  const char* x;
  uint32_t shared_x;
  int c, g, lane_at;  // of x: bytes into its piece

  __device__ __forceinline__ Source(const Operands& o, const char* shared, int row0, int lane) : c(lane % 4), g(lane / 4) {
    weight = o.weight + int64_t(row0 + g) * o.row_bytes + c * 16, row_step = 8 * o.row_bytes;
    lane_at = T::VECTORS == 1 ? 16 * c : T::FORMAT == W4A8 ? 64 * (c / 2) + 16 * (c % 2) : T::WIDE ? 32 * c : 128 * (c / 2) + 32 * (c % 2);
    x = o.x + g * o.ldx + lane_at, shared_x = shared_address(shared) + o.x_at + g * o.x_pitch + lane_at;
  }

  __device__ __forceinline__ uint4 input(const Operands& o, int piece, int tile, int v) const {
    const int at = piece * T::X_PIECE + (T::FORMAT == W4A8 ? 32 * v : T::VECTORS == 4 ? v / 2 * 64 + v % 2 * 16 : 16 * v);
    if constexpr (T::SHARED) return g < o.m ? read16(shared_x + at) : make_uint4(0, 0, 0, 0);
    const int left = o.x_bytes - at - lane_at;
    const char* from = x + (tile == 0 ? 0 : 8 * o.ldx) + at;
    if (tile * 8 + g >= o.m || left <= 0) return make_uint4(0, 0, 0, 0);
    return left >= 16 ? read16(from) : read_part(from, left);
  }

  __device__ __forceinline__ void load(const Operands& o, int row0, int piece, Piece<T>& to) const {
    const bool exists = o.row_bytes - piece * 64 - c * 16 > 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) to.weight[i] = exists ? stream16(weight + uint64_t(row_step) * i + piece * 64) : make_uint4(0, 0, 0, 0);
    if constexpr (T::AHEAD)
#pragma unroll
      for (int t = 0; t < T::TILES; ++t)
#pragma unroll
        for (int v = 0; v < T::VECTORS; ++v) to.x[t][v] = input(o, piece, t, v);
    if constexpr (T::GROUPED) constants(o, row0, o.group(piece * T::STEPS), to);
  }

  __device__ __forceinline__ void constants(const Operands& o, int row0, int group, Piece<T>& to) const {
    const int64_t at = group * o.group_stride + row0 + 4 * g;
    if constexpr (T::FLOATS) to.multiplier = __ldg(reinterpret_cast<const uint4*>(o.multiplier + 4 * at));
    else to.multiplier.x = __ldg(reinterpret_cast<const uint32_t*>(o.multiplier + at));
    to.zero = o.zero == nullptr ? 0 : __ldg(reinterpret_cast<const uint32_t*>(o.zero + at));
  }
};

// A group begins.
template <class T>
__device__ __forceinline__ void enter(Sums<T>& s, const Piece<T>& p) {
  const uint32_t words[4] = {p.multiplier.x, p.multiplier.y, p.multiplier.z, p.multiplier.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int zero = static_cast<int8_t>(p.zero >> (8 * i));
    if constexpr (T::FLOATS) s.multiplier[i] = __uint_as_float(words[i]), s.zero[i] = zero_point<T::BF16, T::WIDE>(zero);
    else s.multiplier[i] = static_cast<int8_t>(words[0] >> (8 * i)), s.less[i] = zero;
  }
}

// And ends.
template <class T>
__device__ __forceinline__ void leave_group(Sums<T>& s) {
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int t = 0; t < T::TILES; ++t)
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        const int row = 2 * j + d / 2;
        if constexpr (T::FLOATS) s.total[j][t][d] = fmaf(s.multiplier[row], s.acc[j][t][d], s.total[j][t][d]);
        else s.total[j][t][d] += s.multiplier[row] * ((s.acc[j][t][d] >> 4) - s.less[row] * s.ones[t][d % 2]);
        s.acc[j][t][d] = 0;
      }
  if constexpr (!T::FLOATS)
#pragma unroll
    for (int t = 0; t < T::TILES; ++t)
#pragma unroll
      for (int d = 0; d < 4; ++d) s.ones[t][d] = 0;
}

// Products of one piece. MASKED: bit i of `steps` says whether its i-th 32 columns count.
template <class T, bool MASKED>
__device__ __forceinline__ void multiply(Sums<T>& s, const Piece<T>& p, const Source<T>& source, const Operands& o, int piece, uint32_t steps) {
  constexpr int TILES = T::TILES;
  uint32_t w[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    w[i][0] = p.weight[i].x, w[i][1] = p.weight[i].y, w[i][2] = p.weight[i].z, w[i][3] = p.weight[i].w;
    if constexpr (T::FLOATS && T::WIDE)
#pragma unroll
      for (int k = 0; k < 4; ++k) w[i][k] ^= 0x80808080u;
  }
  uint32_t zero[4];
  if constexpr (T::FLOATS)
#pragma unroll
    for (int i = 0; i < 4; ++i) zero[i] = s.zero[i];
  const uint32_t mine = T::WIDE ? steps >> source.c / 2 & 1 : steps >> source.c / 2 * 2 & 3;
#pragma unroll
  for (int v = 0; v < T::VECTORS; ++v) {
    const bool high = !T::WIDE && T::VECTORS > 1 && v >= T::VECTORS / 2;
    if constexpr (T::FLOATS && !T::WIDE && !T::BF16)
      if (v == T::VECTORS / 2)
#pragma unroll
        for (int i = 0; i < 4; ++i) zero[i] = zero_of_high(zero[i]);
    uint32_t b[TILES][4];
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      uint4 r;
      if constexpr (T::AHEAD) r = p.x[t][v];
      else r = source.input(o, piece, t, v);
      if (MASKED && !(mine >> high & 1)) r = make_uint4(0, 0, 0, 0);
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
          for (int j = 0; j < 2; ++j) {
            const uint32_t a0 = code(w[2 * j][k]), a1 = code(w[2 * j + 1][k]), a2 = code(w[2 * j][k + 1]), a3 = code(w[2 * j + 1][k + 1]);
#pragma unroll
            for (int t = 0; t < TILES; ++t) mma(s.acc[j][t], a0, a1, a2, a3, input(b[t][k]), input(b[t][k + 1]));
          }
          if constexpr (T::GROUPED)
            if (o.zero != nullptr)
#pragma unroll
              for (int t = 0; t < TILES; ++t) mma(s.ones[t], 0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u, b[t][k], b[t][k + 1]);
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < 2; ++k) {  // four of the vector's eight columns
        const int word = v % 2 * 2 + k;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t from = w[2 * j + i][word];
            const uint32_t off = zero[2 * j + i];
            if constexpr (T::WIDE) a[i] = byte_codes<T::BF16, 0>(from, off), a[2 + i] = byte_codes<T::BF16, 1>(from, off);
            else if (high) a[i] = nibble_codes<T::BF16, true>(from, off), a[2 + i] = nibble_codes<T::BF16, true>(from >> 8, off);
            else a[i] = nibble_codes<T::BF16, false>(from, off), a[2 + i] = nibble_codes<T::BF16, false>(from >> 8, off);
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
__device__ __forceinline__ void leave(S* partial, const S (&sums)[2][T::TILES][4], int m, int warp, int lane) {
  const int g = lane / 4, c = lane % 4;
#pragma unroll
  for (int j = 0; j < 2; ++j)
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
  float acc[2][T::TILES][4] = {};
  const auto vector = [&](const void* data, int64_t row, int64_t stride, int column) {
    return column < p.k_fp ? read16(reinterpret_cast<const char*>(static_cast<const __half*>(data) + row * stride + column)) : make_uint4(0, 0, 0, 0);
  };
  for (int at = warp * 32; at < p.k_fp; at += blockDim.x) {
    const int column = at + c * 8;
    uint4 b[T::TILES];
#pragma unroll
    for (int t = 0; t < T::TILES; ++t) b[t] = t * 8 + g < p.m ? vector(p.a_fp, t * 8 + g, p.lda_fp, column) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
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

// Four of the block's constants, zeros where there are none.
__device__ __forceinline__ void copy_constants(uint32_t to, const float* from, int column, const Operands& o) {
  const bool exists = from != nullptr && column < o.rows;
  copy16(to, exists ? static_cast<const void*>(from + column) : o.weight, exists ? 16 : 0);
}

// Sums of the block's outputs over k, [row of x][32 columns in logical order], in the shared memory that is returned. `meanwhile` runs when the
// first pieces are under way; what it copies has arrived at the end. A warp takes each `warps`-th piece, so that a block reads neighbours.
template <class T, class F>
__device__ __forceinline__ typename T::Sum* accumulate(const Operands& o, char* shared, int row0, F meanwhile) {
  using Sum = typename T::Sum;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int pieces = (o.steps + T::STEPS - 1) / T::STEPS;

  start_dependents();
  {
    const char* line = o.weight + int64_t(row0 + lane) * o.row_bytes;
    const int end = min(o.row_bytes, warps * 4 * 64);
    for (int at = warp * 128; at < end; at += warps * 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(line + at));
  }
  wait_for_kernels_before();

  const Source<T> source(o, shared, row0, lane);
  Piece<T> held[T::DEPTH];
#pragma unroll
  for (int i = 0; i < T::DEPTH - 1; ++i)
    if (warp + i * warps < pieces) source.load(o, row0, warp + i * warps, held[i]);
  meanwhile(warp, lane);
  if constexpr (T::SHARED) {
    for (int row = 0; row < o.m; ++row)
      for (int at = threadIdx.x * 16; at < pieces * T::X_PIECE; at += blockDim.x * 16)
        copy16(shared_address(shared) + o.x_at + row * o.x_pitch + at, at < o.x_bytes ? o.x + row * o.ldx + at : o.x, clamp16(o.x_bytes - at));
    wait_for_copies();
    __syncthreads();
  }

  Sums<T> s;
  // Groups end with their piece here, or before: what continues in the next one has the same constants there.
  const auto consume = [&](int piece, Piece<T>& p) {
    if constexpr (T::GROUPED) {
      const int step0 = piece * T::STEPS, steps = min(o.steps - step0, T::STEPS);
      int group = o.group(step0), group_end = (group + 1) * o.group_steps;
      enter(s, p);
      if (step0 + steps <= group_end) {
        multiply<T, false>(s, p, source, o, piece, ~0u);
      } else {
#pragma unroll 1
        for (int step = 0;;) {
          const int stop = min(group_end - step0, steps);
          multiply<T, true>(s, p, source, o, piece, (1u << stop) - (1u << step));
          if (stop == steps) break;
          leave_group(s);
          step = stop, ++group, group_end += o.group_steps;
          source.constants(o, row0, group, p);
          enter(s, p);
        }
      }
      leave_group(s);
    } else {
      multiply<T, false>(s, p, source, o, piece, ~0u);
    }
  };
  for (int piece = warp; piece < pieces;) {
#pragma unroll
    for (int i = 0; i < T::DEPTH; ++i) {
      if (piece < pieces) {
        if (const int next = piece + (T::DEPTH - 1) * warps; next < pieces) source.load(o, row0, next, held[(i + T::DEPTH - 1) % T::DEPTH]);
        consume(piece, held[i]);
        piece += warps;
      }
    }
  }
  Sum* const partial = reinterpret_cast<Sum*>(shared);
  if constexpr (T::GROUPED) leave<T>(partial, s.total, o.m, warp, lane);
  else leave<T>(partial, s.acc, o.m, warp, lane);
  wait_for_copies();
  __syncthreads();
  Sum* const result = reinterpret_cast<Sum*>(shared + T::partial_bytes(warps));
  for (int i = threadIdx.x; i < o.m * 32; i += blockDim.x) {
    const int row = i % 32, column = i / 32;
    Sum sum = 0;
#pragma unroll 4
    for (int w = 0; w < warps; ++w) sum += partial[(w * 8 * T::TILES + column) * T::PITCH + row];
    if constexpr (!T::FLOATS && !T::GROUPED && T::FORMAT != W8A8) sum >>= T::FORMAT == W4A4 ? 8 : 4;
    result[column * 32 + row % 8 / 2 * 8 + row / 8 * 2 + row % 2] = sum;
  }
  __syncthreads();
  return result;
}

// --- kernels ---

constexpr int THREADS = 512;  // the most of a block

template <class T>
__global__ void __launch_bounds__(THREADS)
    linear_kernel(const __grid_constant__ Operands o, const __grid_constant__ VitqLinear p, const bool vectors) {
  extern __shared__ __align__(128) char shared[];
  const int row0 = blockIdx.x * 32, warps = blockDim.x / 32;
  float* const constants = reinterpret_cast<float*>(shared + T::constants_at(warps));
  float* const floats = reinterpret_cast<float*>(shared + T::floats_at(warps));
  // A thread that finishes eight outputs reads what else that takes while the products run.
  static_assert(8 * T::TILES * 32 / COLUMNS <= 4 * 32, "a block of 4 warps has a thread for each");
  const int row = threadIdx.x / (32 / COLUMNS), column = threadIdx.x % (32 / COLUMNS) * COLUMNS;
  RowAt at;
  float shift = 0.0f;
  uint4 residual;
  const bool early = vectors && p.residual.data != nullptr && p.residual.dtype != VITQ_F32;
  const int* result = accumulate<T>(o, shared, row0, [&](int warp, int lane) {
    if (threadIdx.x < 3 * 32 / 4) {
      const int which = threadIdx.x / (32 / 4);
      copy_constants(shared_address(constants + threadIdx.x * 4), which == 0 ? p.bias : which == 1 ? p.scale : p.column_sums,
                     row0 + threadIdx.x % (32 / 4) * 4, o);
    }
    if (row < p.m) {
      at = row_at(p, row);
      if (p.column_sums != nullptr) shift = p.row_shift[row];
      if (early && row0 + column < p.n) residual = prefetch_residual(at, row0 + column);
    }
    if (p.a_fp != nullptr) float_columns<T>(p, row0, o.rows, floats, warp, lane);
  });
  if (row < p.m) {
    int whole[COLUMNS];
    float scale[COLUMNS], y[COLUMNS];
#pragma unroll
    for (int e = 0; e < COLUMNS; ++e) whole[e] = result[row * 32 + column + e], y[e] = constants[column + e], scale[e] = constants[32 + column + e];
    if (p.column_sums != nullptr) {
      float sums[COLUMNS];
#pragma unroll
      for (int e = 0; e < COLUMNS; ++e) sums[e] = constants[2 * 32 + column + e];
      shift8(shift, sums, y);
    }
    accumulate8(whole, at.scale, p.row_scale != nullptr, scale, y);
    if (p.a_fp != nullptr) {
#pragma unroll
      for (int e = 0; e < COLUMNS; ++e) {  // the column's place in its 32: columns 8·c + 2·j + e of the result are 8·j + 2·c + e of the weight
        const int from = e / 2 * 8 + column / 8 * 2 + e % 2;
        float sum = 0;
        for (int w = 0; w < warps; ++w) sum += floats[(w * 8 * T::TILES + row) * T::PITCH + from];
        y[e] += sum;
      }
    }
    if (p.out.dtype != VITQ_S8) finish8<ACT_FLOAT_OUT>(p, at, row0 + column, vectors, y, residual, early);
    else if (p.activation == VITQ_NO_ACTIVATION) finish8<CODES_OUT>(p, at, row0 + column, vectors, y);
    else finish8<ACT_CODES_OUT>(p, at, row0 + column, vectors, y);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS) weight_only_kernel(const __grid_constant__ Operands o, const __grid_constant__ VitqWeightOnly p) {
  extern __shared__ __align__(128) char shared[];
  const int row0 = blockIdx.x * 32;
  float* const bias = reinterpret_cast<float*>(shared + T::constants_at(blockDim.x / 32));
  const float* result = accumulate<T>(o, shared, row0, [&](int, int) {
    if (threadIdx.x < 32 / 4) copy_constants(shared_address(bias + threadIdx.x * 4), p.bias, row0 + threadIdx.x * 4, o);
  });
  for (int i = threadIdx.x; i < p.m * 32; i += blockDim.x) {
    const int row = i / 32, column = i % 32;
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
constexpr int SHARED_X = 58 * 1024;  // the most of x that a block copies: all fits the 99 KB of sm_86 and sm_89

// As many warps as take the fewest rounds: of pieces, and of blocks, each of which costs about as much as three pieces. 16 warps of a multiprocessor
// find registers.
inline int choose(int blocks, int pieces, const Gpu& gpu) {
  int best = 0, fewest = INT32_MAX;
  for (int config = 0; config < 3; ++config) {
    const int warps = 4 << config, slots = gpu.processors * (THREADS / 32 / warps);
    const int rounds = (blocks + slots - 1) / slots * ((pieces + warps - 1) / warps + 3);
    if (rounds < fewest) best = config, fewest = rounds;
  }
  return best;
}

template <class T, class... Arguments>
int launch(void (*kernel)(Operands, Arguments...), int config, bool fp, cudaStream_t stream, Operands o, Arguments... arguments) {
  Gpu gpu;
  if (int error = gpu_of_now(gpu)) return error;
  if (config < -1 || config >= CONFIGS) return VITQ_BAD_ARGUMENT;
  const int blocks = o.rows / 32, pieces = (o.steps + T::STEPS - 1) / T::STEPS;
  if (config == -1) config = 3 + choose(blocks, pieces, gpu);
  const int warps = 4 << config % 3;
  o.x_at = T::shared_bytes(warps, fp), o.x_pitch = pieces * T::X_PIECE + T::X_PAD;
  const int bytes = o.x_at + (T::SHARED ? o.m * o.x_pitch : 0);
  if (bytes > gpu.shared) return VITQ_UNSUPPORTED;
  if (bytes > 48 * 1024)
    if (cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel))) return error;
  if (config >= 3) return launch_early(kernel, blocks, 32 * warps, bytes, stream, o, arguments...);
  kernel<<<blocks, 32 * warps, bytes, stream>>>(o, arguments...);
  return cudaGetLastError();
}

template <int FORMAT, bool GROUPED, class F>
int with_traits(const Operands& o, F f) {
  if (o.m > 8) return f(Traits<FORMAT, GROUPED, 2, false>{});
  if constexpr (GROUPED)
    if (int64_t(o.m) * (o.x_bytes + 512) <= SHARED_X) return f(Traits<FORMAT, GROUPED, 1, true>{});
  return f(Traits<FORMAT, GROUPED, 1, false>{});
}

// One per file, so that they compile side by side.
int weight_only_f16(const Operands& o, const VitqWeightOnly& p, cudaStream_t stream);
int weight_only_bf16(const Operands& o, const VitqWeightOnly& p, cudaStream_t stream);

template <int WIDE, int NARROW>
int launch_weight_only(const Operands& o, const VitqWeightOnly& p, cudaStream_t stream) {
  const auto run = [&](auto traits) {
    using T = decltype(traits);
    return launch<T>(weight_only_kernel<T>, p.config, false, stream, o, p);
  };
  return p.weight_bits == 8 ? with_traits<WIDE, true>(o, run) : with_traits<NARROW, true>(o, run);
}

}  // namespace few
}  // namespace vitq
