// How a tile of the Hopper GEMM is described, and what its warpgroups do with their part: products, and the epilogue on the
// accumulators. gemm_sm90.cuh holds the kernel around it.
#pragma once

#include "epilogue.cuh"
#include "sm90.cuh"

namespace vitq::sm90 {

// Columns of a tile, warpgroups that compute, 64-row pieces each of them has, how tiles are walked, and bits of the weight.
template <int COLUMNS_, int GROUPS_, int PIECES_, bool RESIDENT_, int WEIGHT_BITS_ = 8>
struct Tile {
  static constexpr int N = COLUMNS_, GROUPS = GROUPS_, PIECES = PIECES_;
  static constexpr bool RESIDENT = RESIDENT_, PACKED = WEIGHT_BITS_ == 4;
  static_assert(!PACKED || (!RESIDENT && GROUPS == 2 && N <= 128), "packed weights stream past two warpgroups");
  // Of packed weights: pieces that each warp that widens them has under way.
  static constexpr int PACKED_BYTES = N * 64, PACKED_DEPTH = !PACKED ? 0 : N * PIECES >= 256 ? 1 : N == 128 ? 2 : 4;
  static constexpr int GROUP_ROWS = 64 * PIECES;
  static constexpr int ROWS = RESIDENT ? GROUP_ROWS : GROUP_ROWS * GROUPS;  // of one pass through the ring
  static constexpr int A_BYTES = ROWS * 128, B_BYTES = N * 128;            // a stage: 128 bytes of K
  static constexpr int STAGE_BYTES = RESIDENT ? A_BYTES : A_BYTES + B_BYTES;
  static constexpr int THREADS = 128 * (GROUPS + 1);
  // A block has 168 for each thread of three warpgroups, 128 for each of four: asking for more would wait for ever.
  static constexpr int COMPUTE_REGISTERS = PACKED ? 208 : GROUPS == 2 ? 232 : 160, LOAD_REGISTERS = PACKED ? 88 : GROUPS == 2 ? 40 : 32;
  static_assert(GROUPS * COMPUTE_REGISTERS + LOAD_REGISTERS <= (GROUPS == 2 ? 3 * 168 : 4 * 128), "registers of a block");
};

constexpr int MAX_STAGES = 12;
constexpr int WIDENERS = 3;  // warps that widen packed weights
constexpr int MAX_PACKED = 4 * WIDENERS;
constexpr int MAX_RESIDENT = 16;  // 128-byte pieces of K

struct Problem {
  VitqLinear p;
  int row_tiles, column_tiles;
  int k_tiles, k_tiles_fp;  // pieces of 128 bytes: of K, and of the fp16 columns
  int stages;
  int spare_bits;  // of a byte, where codes of fewer than 8 bits are written
  bool vectors, plain;
  float out_units, out_biased;  // codes of GELU's units; the zero point with ROUND_BIAS added
};

// Whether the epilogue is straight-line code: 16-bit or code output in vectors, no row scales but where they are in its sums already.
inline bool plain_epilogue(const VitqLinear& p, bool scaled = false) {
  if ((p.row_scale != nullptr && !scaled) || !vectors_fit(p.out, p.n) || !vectors_fit(p.residual, p.n)) return false;
  if (p.out.dtype == VITQ_S8) return p.activation != VITQ_RELU;
  return p.activation == VITQ_NO_ACTIVATION && p.out.dtype != VITQ_F32 &&
         (p.residual.data == nullptr || p.residual.dtype == p.out.dtype);
}

struct Barriers {
  uint64_t full[MAX_STAGES], empty[MAX_STAGES], weights[MAX_RESIDENT], packed[MAX_PACKED];
};

// Where a ring of `stages` slots is.
struct Ring {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next(int stages) {
    if (++slot == stages) slot = 0, parity ^= 1;
  }
  __device__ __forceinline__ void skip(int count, int stages) {
    slot += count % stages;
    parity ^= (count / stages) & 1;
    if (slot >= stages) slot -= stages, parity ^= 1;
  }
};

// How K is divided. PAIR: two integer segments with symmetric weights and a plain epilogue, each with accumulators of its own.
// MIXED: one integer segment, whose sums become floats in their own registers, before fp16 columns are added there; shifted rows.
// ANY: up to VITQ_MAX_SEGMENTS, fp16 columns, shifted rows; one segment's integers after the other's go to float sums.
enum Segments { ONE, PAIR, MIXED, ANY };

// What codes of packed weights without multipliers are multiplied with: they stay at the top of their bytes. Sums of up to 2^17 products still
// fit 32 bits, and a power of two changes no float but its exponent.
constexpr float PACKED_UNIT = 16.0f;

// Floats of a tile's constants in shared memory: scales of each segment, of MIXED the weight's column sums, then biases.
template <class T, Segments SEGMENTS>
constexpr int CONSTANTS = T::N * (SEGMENTS == PAIR || SEGMENTS == MIXED ? 3 : 2);

template <class T, int EPILOGUE, Segments SEGMENTS>
struct Consumer {
  const Problem& problem;
  const VitqLinear& p;
  int thread, c;  // of the warpgroup; lane % 4
  uint32_t acc[T::PIECES][T::N / 2];
  uint32_t first[SEGMENTS == PAIR ? T::PIECES : 1][SEGMENTS == PAIR ? T::N / 2 : 1];  // the first segment's
  static constexpr bool TOTAL = SEGMENTS == ANY || SEGMENTS == MIXED;
  float total[TOTAL ? T::PIECES : 1][TOTAL ? T::N / 2 : 1];

  __device__ Consumer(const Problem& problem, int thread) : problem(problem), p(problem.p), thread(thread), c(thread % 4) {}

  __device__ __forceinline__ int row_of(int first_row, int piece, int half) const {
    return first_row + piece * 64 + (thread / 32) * 16 + (thread % 32) / 4 + 8 * half;
  }

  // One piece of K: four k-steps. What lies beyond K was filled up with zeros.
  __device__ __forceinline__ void multiply(const char* a, const char* b, bool accumulate) {
    uint64_t da = operand(a), db = operand(b);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int i = 0; i < T::PIECES; ++i) mma<T::N>(da + i * (8192 >> 4) + s * STEP, db + s * STEP, acc[i], accumulate || s > 0);
    }
  }

  // One piece of K of which the first STEPS k-steps are the first segment's and the others begin the second one's.
  template <int STEPS>
  __device__ __forceinline__ void multiply_both(const char* a, const char* b, bool accumulate) {
    uint64_t da = operand(a), db = operand(b);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int i = 0; i < T::PIECES; ++i) {
        if (s < STEPS) mma<T::N>(da + i * (8192 >> 4) + s * STEP, db + s * STEP, first[i], accumulate || s > 0);
        else mma<T::N>(da + i * (8192 >> 4) + s * STEP, db + s * STEP, acc[i], s > STEPS);
      }
    }
  }

  // One k-step.
  __device__ __forceinline__ void multiply_step(const char* a, const char* b, bool accumulate) {
    uint64_t da = operand(a), db = operand(b);
#pragma unroll
    for (int i = 0; i < T::PIECES; ++i) mma<T::N>(da + i * (8192 >> 4), db, acc[i], accumulate);
  }

  __device__ __forceinline__ void multiply_halves(const char* a, const char* b) {
    uint64_t da = operand(a), db = operand(b);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int i = 0; i < T::PIECES; ++i) mma<T::N>(da + i * (8192 >> 4) + s * STEP, db + s * STEP, total[i], true);
    }
  }

  __device__ __forceinline__ void fence() {
#pragma unroll
    for (int i = 0; i < T::PIECES; ++i) pin(acc[i]);
    if constexpr (SEGMENTS == PAIR) {
#pragma unroll
      for (int i = 0; i < T::PIECES; ++i) pin(first[i]);
    }
    if constexpr (SEGMENTS == ANY) fence_total();
  }

  __device__ __forceinline__ void fence_total() {
#pragma unroll
    for (int i = 0; i < T::PIECES; ++i) pin(total[i]);
  }

  // The eight neighbouring columns of a thread.
  template <int P, int W>
  __device__ __forceinline__ static int (&codes8(const uint32_t (&from)[P][W], int piece, int group, int half,
                                                 int (&v)[COLUMNS]))[COLUMNS] {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[2 * j] = static_cast<int>(from[piece][(4 * group + j) * 4 + 2 * half]);
      v[2 * j + 1] = static_cast<int>(from[piece][(4 * group + j) * 4 + 2 * half + 1]);
    }
    return v;
  }

  // The scale, 1 without any, and the shift of a thread's two rows in each piece.
  __device__ __forceinline__ void row_constants(int first_row, float (&scale)[T::PIECES][2], float (&shift)[T::PIECES][2]) const {
#pragma unroll
    for (int i = 0; i < T::PIECES; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = min(row_of(first_row, i, h), p.m - 1);
        scale[i][h] = p.row_scale == nullptr ? 1.0f : p.row_scale[row];
        shift[i][h] = p.column_sums == nullptr ? 0.0f : p.row_shift[row];
      }
    }
  }

  __device__ __forceinline__ void start_total(int first_row, int first_column) {
    float row_scale[T::PIECES][2], row_shift[T::PIECES][2];
    row_constants(first_row, row_scale, row_shift);
#pragma unroll
    for (int g = 0; g < T::N / 32; ++g) {
      const int column = first_column + 32 * g + COLUMNS * c;
      float bias[COLUMNS] = {}, sums[COLUMNS] = {};
      if (p.bias != nullptr && column < p.n) load8(p.bias + column, bias);
      if (p.column_sums != nullptr && column < p.n) load8(p.column_sums + column, sums);
#pragma unroll
      for (int i = 0; i < T::PIECES; ++i) {
#pragma unroll
        for (int x = 0; x < 16; ++x) {
          const int at = 2 * (x / 4) + x % 2;
          total[i][16 * g + x] = fmaf(row_shift[i][x / 2 % 2], sums[at], bias[at]);
        }
      }
    }
  }

  // The integer sums, scaled, with bias and shift, as floats in the registers where they are.
  __device__ __forceinline__ void to_total(const float* constants, int first_row) {
    float row_scale[T::PIECES][2], row_shift[T::PIECES][2];
    row_constants(first_row, row_scale, row_shift);
#pragma unroll
    for (int g = 0; g < T::N / 32; ++g) {
      const float* from = constants + 32 * g + COLUMNS * c;
      float scale[COLUMNS], sums[COLUMNS], bias[COLUMNS];
      shared8(from, scale), shared8(from + T::N, sums), shared8(from + 2 * T::N, bias);
#pragma unroll
      for (int i = 0; i < T::PIECES; ++i) {
#pragma unroll
        for (int x = 0; x < 16; ++x) {
          const int at = 2 * (x / 4) + x % 2, h = x / 2 % 2;
          const float start = fmaf(row_shift[i][h], sums[at], bias[at]);
          const float product = __fmul_rn(__int2float_rn(static_cast<int>(acc[i][16 * g + x])), row_scale[i][h]);
          total[i][16 * g + x] = fmaf(product, scale[at], start);
        }
      }
    }
  }

  // Adds the integer product of segment s, scaled, to the float totals.
  __device__ __forceinline__ void flush(int s, int first_row, int first_column) {
    int64_t n_pad = (p.n + 31) / 32 * 32;
    const float* scales = p.scale + s * n_pad;
    float row_scale[T::PIECES][2], row_shift[T::PIECES][2];
    row_constants(first_row, row_scale, row_shift);
#pragma unroll
    for (int g = 0; g < T::N / 32; ++g) {
      int column = first_column + 32 * g + COLUMNS * c;
      if (column >= p.n) continue;
      float scale[COLUMNS];
      load8(scales + column, scale);
#pragma unroll
      for (int i = 0; i < T::PIECES; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          int v[COLUMNS];
          float y[COLUMNS];
#pragma unroll
          for (int x = 0; x < COLUMNS; ++x) y[x] = total[i][16 * g + 4 * (x / 2) + 2 * h + x % 2];
          accumulate8(codes8(acc, i, g, h, v), row_scale[i][h], p.row_scale != nullptr, scale, y);
#pragma unroll
          for (int x = 0; x < COLUMNS; ++x) total[i][16 * g + 4 * (x / 2) + 2 * h + x % 2] = y[x];
        }
      }
    }
  }

  // --- a tile without exceptions, in straight-line code --------------------------------------------------------------
  // See `plain_epilogue`. Conditions inside of the loops would keep the compiler from interleaving the groups of columns, and
  // one warp a scheduler then waits for its own latencies: DeiT-S fc1 with GELU took 112 us so on an H200, of which 60 were
  // waiting.

  static constexpr bool CODES = EPILOGUE == CODES_OUT || EPILOGUE == ACT_CODES_OUT;
  static constexpr bool PREFETCH = EPILOGUE == FLOAT_OUT && SEGMENTS == ONE && T::GROUPS == 2 && T::PIECES * T::N <= 128;
  uint4 residual[PREFETCH ? T::N / 32 : 1][2];

  // Loads the residual while the last products run, if the accumulators leave registers for it.
  __device__ __forceinline__ void prefetch(int first_row, int first_column) {
    if constexpr (PREFETCH) {
      if (p.residual.data == nullptr || !problem.plain) return;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        RowAt at = row_at(p, row_of(first_row, 0, h));
#pragma unroll
        for (int g = 0; g < T::N / 32; ++g) {
          int column = first_column + 32 * g + COLUMNS * c;
          residual[g][h] = at.inside && column < p.n ? prefetch_residual(at, column) : uint4{};
        }
      }
    }
  }

  // Eight columns of a thread's two rows in 64. Their constants are read once: shared memory is busy with the operands.
  template <int DTYPE, bool RESIDUAL, bool TANH, bool NARROW>
  __device__ __forceinline__ void finish_group(const float* constants, const RowAt (&at)[2], int piece, int g, int first_column) {
    const int local = 32 * g + COLUMNS * c, column = first_column + local;
    float scale[COLUMNS], y[2][COLUMNS];
    if constexpr (TOTAL) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int x = 0; x < COLUMNS; ++x) y[h][x] = total[piece][16 * g + 4 * (x / 2) + 2 * h + x % 2];
    } else {
      shared8(constants + CONSTANTS<T, SEGMENTS> - T::N + local, y[0]);  // the bias
#pragma unroll
      for (int x = 0; x < COLUMNS; ++x) y[1][x] = y[0][x];
      const auto add = [&](const auto& products, int segment) {
        shared8(constants + T::N * segment + local, scale);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          int v[COLUMNS];
          codes8(products, piece, g, h, v);
#pragma unroll
          for (int x = 0; x < COLUMNS; ++x) y[h][x] = fmaf(__int2float_rn(v[x]), scale[x], y[h][x]);
        }
      };
      if constexpr (SEGMENTS == PAIR) add(first, 0);
      add(acc, SEGMENTS == PAIR);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool store = column < p.n && at[h].inside;
      if constexpr (CODES) {
        int code[COLUMNS];
#pragma unroll
        for (int x = 0; x < COLUMNS; ++x) {
          float biased;
          if constexpr (EPILOGUE == ACT_CODES_OUT) {
            biased = fmaf(gelu_of_units<TANH>(y[h][x]), problem.out_units, problem.out_biased);
            if constexpr (NARROW) biased = fminf(biased, ROUND_BIAS + 1024.0f);  // nothing else bounds what is shifted
          } else {
            biased = y[h][x] + ROUND_BIAS;
          }
          code[x] = rounded_code<NARROW>(biased, problem.spare_bits);
        }
        uint2 packed = make_uint2(pack_s8(code[0], code[1], code[2], code[3]), pack_s8(code[4], code[5], code[6], code[7]));
        if constexpr (NARROW) packed = make_uint2(narrow_bytes(packed.x, problem.spare_bits), narrow_bytes(packed.y, problem.spare_bits));
        if (store) *reinterpret_cast<uint2*>(at[h].out + column) = packed;
      } else {
        if constexpr (RESIDUAL) {
          uint4 other = {};
          if constexpr (PREFETCH) other = residual[g][h];
          else if (store) other = prefetch_residual(at[h], column);
          add_halves(other, DTYPE, y[h]);
        }
        uint4 packed = make_uint4(pack_halves(DTYPE, y[h][0], y[h][1]), pack_halves(DTYPE, y[h][2], y[h][3]),
                                  pack_halves(DTYPE, y[h][4], y[h][5]), pack_halves(DTYPE, y[h][6], y[h][7]));
        if (store) *reinterpret_cast<uint4*>(at[h].out + 2 * column) = packed;
      }
    }
  }

  template <int DTYPE, bool RESIDUAL, bool TANH, bool NARROW = false>
  __device__ __forceinline__ void finish_plain(const float* constants, int first_row, int first_column) {
#pragma unroll
    for (int i = 0; i < T::PIECES; ++i) {
      const RowAt at[2] = {row_at(p, row_of(first_row, i, 0)), row_at(p, row_of(first_row, i, 1))};
#pragma unroll
      for (int g = 0; g < T::N / 32; ++g) finish_group<DTYPE, RESIDUAL, TANH, NARROW>(constants, at, i, g, first_column);
    }
  }

  // --- any tile ------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void finish_any(int first_row, int first_column) {
    const bool has_row_scale = p.row_scale != nullptr;
#pragma unroll
    for (int i = 0; i < T::PIECES; ++i) {
      RowAt at[2] = {row_at(p, row_of(first_row, i, 0)), row_at(p, row_of(first_row, i, 1))};
#pragma unroll
      for (int g = 0; g < T::N / 32; ++g) {
        const int column = first_column + 32 * g + COLUMNS * c;
        if (column >= p.n) continue;
        float scale[COLUMNS], bias[COLUMNS] = {};
        if constexpr (SEGMENTS == ONE) {
          load8(p.scale + column, scale);
          if (p.bias != nullptr) load8(p.bias + column, bias);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float y[COLUMNS];
          if constexpr (TOTAL) {
#pragma unroll
            for (int x = 0; x < COLUMNS; ++x) y[x] = total[i][16 * g + 4 * (x / 2) + 2 * h + x % 2];
          } else {
            int v[COLUMNS];
#pragma unroll
            for (int x = 0; x < COLUMNS; ++x) y[x] = bias[x];
            accumulate8(codes8(acc, i, g, h, v), at[h].scale, has_row_scale, scale, y);
          }
          finish8<EPILOGUE>(p, at[h], column, problem.vectors, y);
        }
      }
    }
  }

  // constants: scales and biases of the tile's columns, in shared memory.
  __device__ __forceinline__ void finish(const float* constants, int first_row, int first_column) {
    if constexpr (EPILOGUE == FLOAT_OUT || (EPILOGUE != ACT_FLOAT_OUT && !TOTAL)) {
      if (SEGMENTS == PAIR || problem.plain) {
        if constexpr (EPILOGUE == CODES_OUT) {
          if (problem.spare_bits) finish_plain<VITQ_S8, false, false, true>(constants, first_row, first_column);
          else finish_plain<VITQ_S8, false, false>(constants, first_row, first_column);
        } else if constexpr (EPILOGUE == ACT_CODES_OUT) {
          const bool gelu = p.activation == VITQ_GELU;
          if (problem.spare_bits) {
            if (gelu) finish_plain<VITQ_S8, false, false, true>(constants, first_row, first_column);
            else finish_plain<VITQ_S8, false, true, true>(constants, first_row, first_column);
          } else {
            if (gelu) finish_plain<VITQ_S8, false, false>(constants, first_row, first_column);
            else finish_plain<VITQ_S8, false, true>(constants, first_row, first_column);
          }
        } else if (p.residual.data != nullptr) {
          if (p.out.dtype == VITQ_F16) finish_plain<VITQ_F16, true, false>(constants, first_row, first_column);
          else finish_plain<VITQ_BF16, true, false>(constants, first_row, first_column);
        } else {
          if (p.out.dtype == VITQ_F16) finish_plain<VITQ_F16, false, false>(constants, first_row, first_column);
          else finish_plain<VITQ_BF16, false, false>(constants, first_row, first_column);
        }
        return;
      }
    }
    if constexpr (SEGMENTS != PAIR) finish_any(first_row, first_column);
  }

  __device__ __forceinline__ static void shared8(const float* from, float (&to)[COLUMNS]) {
    float4 a = *reinterpret_cast<const float4*>(from), b = *(reinterpret_cast<const float4*>(from) + 1);
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
  }
};

// Scales and biases of a tile's columns into shared memory, by `threads` threads; in GELU's units where it follows.
template <class T, int EPILOGUE, Segments SEGMENTS>
__device__ __forceinline__ void load_constants(const VitqLinear& p, float* to, int first_column, int thread, int threads) {
  constexpr float UNIT = EPILOGUE == ACT_CODES_OUT && SEGMENTS != MIXED ? 1.0f / GELU_UNIT : 1.0f;
  const float unit = T::PACKED && p.multiplier == nullptr ? UNIT / PACKED_UNIT : UNIT;
  const int64_t n_pad = (p.n + 31) / 32 * 32;
  for (int i = thread; i < T::N; i += threads) {
    const int column = first_column + i;
    const bool inside = column < p.n;
    to[i] = inside ? __ldg(p.scale + column) * unit : 0.0f;
    if (SEGMENTS == PAIR) to[T::N + i] = inside ? __ldg(p.scale + n_pad + column) * UNIT : 0.0f;
    if (SEGMENTS == MIXED) to[T::N + i] = inside && p.column_sums != nullptr ? __ldg(p.column_sums + column) : 0.0f;
    to[CONSTANTS<T, SEGMENTS> - T::N + i] = inside && p.bias != nullptr ? __ldg(p.bias + column) * UNIT : 0.0f;
  }
}

}  // namespace vitq::sm90
