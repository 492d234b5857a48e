// The integer GEMM for Hopper: TMA loads by one warp, warpgroup MMA and the epilogue by two or three warpgroups, persistent.
//
// Two ways to walk the tiles:
// - RESIDENT: a block keeps the weights of its columns, all of K, in shared memory and streams activations past them. Each
//   warpgroup works on a tile of its own; they take turns at the tensor cores, so that the epilogue of one runs beside the
//   products of another. For the small K of a ViT, where the epilogue costs as much as the products and where loading the
//   weights again for every tile would be bound by the L2 (128 x 128 tiles would read 64 bytes a clock and SM from it; it
//   gives about 25).
// - streaming: warpgroups share a tile and both operands pass through the ring. For larger K, where the epilogue hardly
//   counts. (Clusters of two blocks that share loads by multicast took 1.5 times as long at 8192 x 8192 x 8192.)
//
// What bounds it: at full rate the multiply-adds of an epilogue and the running MMA of another warpgroup slow each other down
// (together they take the one's time and 60 % of the other's), so an epilogue is never free. GELU costs as much as K = 700.
#pragma once

#include <cuda_runtime.h>

#include "epilogue.cuh"
#include "sm90.cuh"

namespace vitq::sm90 {

// Columns of a tile, warpgroups that compute, 64-row pieces each of them has, and how tiles are walked.
template <int COLUMNS_, int GROUPS_, int PIECES_, bool RESIDENT_>
struct Tile {
  static constexpr int N = COLUMNS_, GROUPS = GROUPS_, PIECES = PIECES_;
  static constexpr bool RESIDENT = RESIDENT_;
  static constexpr int GROUP_ROWS = 64 * PIECES;
  static constexpr int ROWS = RESIDENT ? GROUP_ROWS : GROUP_ROWS * GROUPS;  // of one pass through the ring
  static constexpr int A_BYTES = ROWS * 128, B_BYTES = N * 128;            // a stage: 128 bytes of K
  static constexpr int STAGE_BYTES = RESIDENT ? A_BYTES : A_BYTES + B_BYTES;
  static constexpr int THREADS = 128 * (GROUPS + 1);
  static constexpr int COMPUTE_REGISTERS = GROUPS == 2 ? 232 : 160, LOAD_REGISTERS = GROUPS == 2 ? 40 : 32;
};

constexpr int MAX_STAGES = 12;
constexpr int MAX_RESIDENT = 16;  // 128-byte pieces of K

struct Problem {
  VitqLinear p;
  int row_tiles, column_tiles;
  int k_tiles, k_tiles_fp;  // pieces of 128 bytes: of K, and of the fp16 columns
  int stages;
  bool vectors;
  float out_units, out_biased;  // codes of GELU's units; the zero point with ROUND_BIAS added
};

struct Barriers {
  uint64_t full[MAX_STAGES], empty[MAX_STAGES], weights[MAX_RESIDENT];
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

// Tiles in bands of eight row tiles, so that blocks that run at the same time share rows and weights in the L2.
__device__ __forceinline__ void tile_at(int index, int row_tiles, int column_tiles, int& row_tile, int& column_tile) {
  constexpr int BAND = 8;
  int band = index / (BAND * column_tiles), inside = index - band * BAND * column_tiles;
  int height = min(BAND, row_tiles - band * BAND);
  column_tile = inside / height;
  row_tile = band * BAND + inside - column_tile * height;
}

template <class T, int EPILOGUE, bool SEGMENTS>
struct Consumer {
  const Problem& problem;
  const VitqLinear& p;
  int thread, c;  // of the warpgroup; lane % 4
  uint32_t acc[T::PIECES][T::N / 2];
  float total[SEGMENTS ? T::PIECES : 1][SEGMENTS ? T::N / 2 : 1];

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
    if constexpr (SEGMENTS) {
#pragma unroll
      for (int i = 0; i < T::PIECES; ++i) pin(total[i]);
    }
  }

  __device__ __forceinline__ int (&codes8(int piece, int group, int half, int (&v)[COLUMNS]))[COLUMNS] {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[2 * j] = static_cast<int>(acc[piece][(4 * group + j) * 4 + 2 * half]);
      v[2 * j + 1] = static_cast<int>(acc[piece][(4 * group + j) * 4 + 2 * half + 1]);
    }
    return v;
  }

  __device__ __forceinline__ void start_total(int first_column) {
#pragma unroll
    for (int g = 0; g < T::N / 32; ++g) {
      int column = first_column + 32 * g + COLUMNS * c;
      float bias[COLUMNS] = {};
      if (p.bias != nullptr && column < p.n) load8(p.bias + column, bias);
#pragma unroll
      for (int i = 0; i < T::PIECES; ++i) {
#pragma unroll
        for (int x = 0; x < 16; ++x) total[i][16 * g + x] = bias[2 * (x / 4) + x % 2];
      }
    }
  }

  // Adds the integer product of segment s, scaled, to the float totals.
  __device__ __forceinline__ void flush(int s, int first_row, int first_column) {
    int64_t n_pad = (p.n + 31) / 32 * 32;
    const float *scales = p.scale + s * n_pad, *zeros = p.zero == nullptr ? nullptr : p.zero + s * n_pad;
    float row_scale[T::PIECES][2];
    int row_sum[T::PIECES][2];
#pragma unroll
    for (int i = 0; i < T::PIECES; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int64_t row = min(row_of(first_row, i, h), p.m - 1);
        row_scale[i][h] = p.row_scale == nullptr ? 1.0f : __ldg(p.row_scale + row);
        row_sum[i][h] = zeros == nullptr ? 0 : __ldg(p.row_sums + row * p.segments + s);
      }
    }
#pragma unroll
    for (int g = 0; g < T::N / 32; ++g) {
      int column = first_column + 32 * g + COLUMNS * c;
      if (column >= p.n) continue;
      float scale[COLUMNS], zero[COLUMNS];
      load8(scales + column, scale);
      if (zeros != nullptr) load8(zeros + column, zero);
#pragma unroll
      for (int i = 0; i < T::PIECES; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          int v[COLUMNS];
          float y[COLUMNS];
#pragma unroll
          for (int x = 0; x < COLUMNS; ++x) y[x] = total[i][16 * g + 4 * (x / 2) + 2 * h + x % 2];
          accumulate8(codes8(i, g, h, v), row_scale[i][h], p.row_scale != nullptr, scale, y);
          if (zeros != nullptr) subtract_zero8(row_sum[i][h], row_scale[i][h], zero, y);
#pragma unroll
          for (int x = 0; x < COLUMNS; ++x) total[i][16 * g + 4 * (x / 2) + 2 * h + x % 2] = y[x];
        }
      }
    }
  }

  // --- a tile without exceptions, in straight-line code --------------------------------------------------------------
  // 16-bit or code output in vectors, no row scales. Conditions inside of the loops would keep the compiler from
  // interleaving the groups of columns, and one warp a scheduler then waits for its own latencies: DeiT-S fc1 with GELU took
  // 112 us so on an H200, of which 60 were waiting.

  static constexpr bool CODES = EPILOGUE == CODES_OUT || EPILOGUE == ACT_CODES_OUT;
  static constexpr bool PREFETCH = EPILOGUE == FLOAT_OUT && !SEGMENTS && T::GROUPS == 2 && T::PIECES * T::N <= 128;
  uint4 residual[PREFETCH ? T::N / 32 : 1][2];

  __device__ __forceinline__ bool plain() const {
    if (SEGMENTS || EPILOGUE == ACT_FLOAT_OUT || !problem.vectors || p.row_scale != nullptr) return false;
    if constexpr (CODES) return p.qmax == 127 && (EPILOGUE == CODES_OUT || p.activation != VITQ_RELU);
    return p.out.dtype != VITQ_F32 && (p.residual.data == nullptr || p.residual.dtype == p.out.dtype);
  }

  // Loads the residual while the last products run, if the accumulators leave registers for it.
  __device__ __forceinline__ void prefetch(int first_row, int first_column) {
    if constexpr (PREFETCH) {
      if (p.residual.data == nullptr || !plain()) return;
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

  // Eight columns of one of a thread's two rows in 64.
  template <int DTYPE, bool RESIDUAL, bool TANH>
  __device__ __forceinline__ void finish_group(const float* constants, const RowAt& at, int piece, int g, int half,
                                               int first_column) {
    const int local = 32 * g + COLUMNS * c, column = first_column + local;
    const bool store = column < p.n && at.inside;
    float scale[COLUMNS], bias[COLUMNS];
    shared8(constants + local, scale);
    shared8(constants + T::N + local, bias);
    int v[COLUMNS];
    float y[COLUMNS];
    codes8(piece, g, half, v);
#pragma unroll
    for (int x = 0; x < COLUMNS; ++x) y[x] = fmaf(__int2float_rn(v[x]), scale[x], bias[x]);
    if constexpr (CODES) {
      int code[COLUMNS];
#pragma unroll
      for (int x = 0; x < COLUMNS; ++x) {
        float biased;
        if constexpr (EPILOGUE == ACT_CODES_OUT) biased = fmaf(gelu_of_units<TANH>(y[x]), problem.out_units, problem.out_biased);
        else biased = y[x] + ROUND_BIAS;
        code[x] = __float_as_int(biased) - ROUND_BITS;
      }
      uint2 packed = make_uint2(pack_s8(code[0], code[1], code[2], code[3]), pack_s8(code[4], code[5], code[6], code[7]));
      if (store) *reinterpret_cast<uint2*>(at.out + column) = packed;
    } else {
      if constexpr (RESIDUAL) {
        uint4 other = {};
        if constexpr (PREFETCH) other = residual[g][half];
        else if (store) other = prefetch_residual(at, column);
        add_halves(other, DTYPE, y);
      }
      uint4 packed = make_uint4(pack_halves(DTYPE, y[0], y[1]), pack_halves(DTYPE, y[2], y[3]),
                                pack_halves(DTYPE, y[4], y[5]), pack_halves(DTYPE, y[6], y[7]));
      if (store) *reinterpret_cast<uint4*>(at.out + 2 * column) = packed;
    }
  }

  template <int DTYPE, bool RESIDUAL, bool TANH>
  __device__ __forceinline__ void finish_plain(const float* constants, int first_row, int first_column) {
#pragma unroll
    for (int i = 0; i < T::PIECES; ++i) {
      const RowAt at[2] = {row_at(p, row_of(first_row, i, 0)), row_at(p, row_of(first_row, i, 1))};
#pragma unroll
      for (int g = 0; g < T::N / 32; ++g) {
        finish_group<DTYPE, RESIDUAL, TANH>(constants, at[0], i, g, 0, first_column);
        finish_group<DTYPE, RESIDUAL, TANH>(constants, at[1], i, g, 1, first_column);
      }
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
        if constexpr (!SEGMENTS) {
          load8(p.scale + column, scale);
          if (p.bias != nullptr) load8(p.bias + column, bias);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float y[COLUMNS];
          if constexpr (SEGMENTS) {
#pragma unroll
            for (int x = 0; x < COLUMNS; ++x) y[x] = total[i][16 * g + 4 * (x / 2) + 2 * h + x % 2];
          } else {
            int v[COLUMNS];
#pragma unroll
            for (int x = 0; x < COLUMNS; ++x) y[x] = bias[x];
            accumulate8(codes8(i, g, h, v), at[h].scale, has_row_scale, scale, y);
          }
          finish8<EPILOGUE>(p, at[h], column, problem.vectors, y);
        }
      }
    }
  }

  // constants: scales and biases of the tile's columns, in shared memory.
  __device__ __forceinline__ void finish(const float* constants, int first_row, int first_column) {
    if constexpr (!SEGMENTS && EPILOGUE != ACT_FLOAT_OUT) {
      if (plain()) {
        if constexpr (EPILOGUE == CODES_OUT) {
          finish_plain<VITQ_S8, false, false>(constants, first_row, first_column);
        } else if constexpr (EPILOGUE == ACT_CODES_OUT) {
          if (p.activation == VITQ_GELU) finish_plain<VITQ_S8, false, false>(constants, first_row, first_column);
          else finish_plain<VITQ_S8, false, true>(constants, first_row, first_column);
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
    finish_any(first_row, first_column);
  }

  __device__ __forceinline__ static void shared8(const float* from, float (&to)[COLUMNS]) {
    float4 a = *reinterpret_cast<const float4*>(from), b = *(reinterpret_cast<const float4*>(from) + 1);
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
  }
};

// Scales and biases of a tile's columns into shared memory, by `threads` threads; in GELU's units where it follows.
template <int N, int EPILOGUE>
__device__ __forceinline__ void load_constants(const VitqLinear& p, float* to, int first_column, int thread, int threads) {
  constexpr float UNIT = EPILOGUE == ACT_CODES_OUT ? 1.0f / GELU_UNIT : 1.0f;
  for (int i = thread; i < N; i += threads) {
    int column = first_column + i;
    bool inside = column < p.n;
    to[i] = inside ? __ldg(p.scale + column) * UNIT : 0.0f;
    to[N + i] = inside && p.bias != nullptr ? __ldg(p.bias + column) * UNIT : 0.0f;
  }
}

template <class T, int EPILOGUE, bool SEGMENTS>
__global__ void __launch_bounds__(T::THREADS, 1)
    gemm(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
         const __grid_constant__ CUtensorMap a_fp_map, const __grid_constant__ CUtensorMap b_fp_map,
         const __grid_constant__ Problem problem) {
  extern __shared__ char raw[];
  char* memory = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
  const int all_k_tiles = problem.k_tiles + problem.k_tiles_fp;
  char* resident = memory;
  char* ring = memory + (T::RESIDENT ? all_k_tiles * T::B_BYTES : 0);
  float* constants = reinterpret_cast<float*>(ring + problem.stages * T::STAGE_BYTES);  // two buffers of scales and biases
  Barriers* bars = reinterpret_cast<Barriers*>(constants + 4 * T::N);

  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int stages = problem.stages, row_tiles = problem.row_tiles, column_tiles = problem.column_tiles;

  if (threadIdx.x == 0) {
    prefetch_map(&a_map);
    prefetch_map(&b_map);
    for (int i = 0; i < stages; ++i) {
      barrier_init(&bars->full[i], 1);
      barrier_init(&bars->empty[i], T::RESIDENT ? 4 : 4 * T::GROUPS);  // a thread of each warp that reads it
    }
    if (T::RESIDENT)
      for (int i = 0; i < all_k_tiles; ++i) barrier_init(&bars->weights[i], 1);
    barrier_init_done();
  }
  __syncthreads();

  // What this block works on. Resident: one column of tiles, every `step`-th row tile. Streaming: every `step`-th tile of all.
  int column_tile = 0, first = 0, step = 1, count = 0;
  if constexpr (T::RESIDENT) {
    column_tile = blockIdx.x % column_tiles;
    first = blockIdx.x / column_tiles;
    step = gridDim.x / column_tiles;
    count = first < row_tiles ? (row_tiles - first + step - 1) / step : 0;
  } else {
    first = blockIdx.x;
    step = gridDim.x;
    count = (row_tiles * column_tiles - first + step - 1) / step;
  }
  auto locate = [&](int i, int& row_tile, int& column) {
    if constexpr (T::RESIDENT) {
      row_tile = first + i * step;
      column = column_tile;
    } else {
      tile_at(first + i * step, row_tiles, column_tiles, row_tile, column);
    }
  };

  if (warpgroup == T::GROUPS) {  // the last warpgroup loads
    give_registers<T::LOAD_REGISTERS>();
    if (thread == 0 && count > 0) {
      Ring at;
      bool first_tile = true;
      for (int i = 0; i < count; ++i) {
        int row_tile, column;
        locate(i, row_tile, column);
        for (int kt = 0; kt < all_k_tiles; ++kt) {
          const bool fp = kt >= problem.k_tiles;
          const int k = fp ? (kt - problem.k_tiles) * 64 : kt * 128;
          const CUtensorMap *a = fp ? &a_fp_map : &a_map, *b = fp ? &b_fp_map : &b_map;
          if (T::RESIDENT && first_tile) {
            barrier_expect(&bars->weights[kt], T::B_BYTES);
            load_box(b, &bars->weights[kt], resident + kt * T::B_BYTES, k, column * T::N);
          }
          barrier_wait(&bars->empty[at.slot], at.parity ^ 1);
          char* slot = ring + at.slot * T::STAGE_BYTES;
          barrier_expect(&bars->full[at.slot], T::STAGE_BYTES);
          load_box(a, &bars->full[at.slot], slot, k, row_tile * T::ROWS);
          if constexpr (!T::RESIDENT) load_box(b, &bars->full[at.slot], slot + T::A_BYTES, k, column * T::N);
          at.next(stages);
        }
        first_tile = false;
      }
    }
  } else {
    take_registers<T::COMPUTE_REGISTERS>();
    Consumer<T, EPILOGUE, SEGMENTS> work(problem, thread);
    Ring at;
    auto release = [&](int slot) {
      if (thread % 32 == 0) barrier_arrive(&bars->empty[slot]);
    };
    if constexpr (T::RESIDENT) {
      load_constants<T::N, EPILOGUE>(problem.p, constants, column_tile * T::N, threadIdx.x, 128 * T::GROUPS);
      named_sync(8, 128 * T::GROUPS);
      at.skip(warpgroup * all_k_tiles, stages);
    }
    constexpr int STRIDE = T::RESIDENT ? T::GROUPS : 1;
    for (int i = T::RESIDENT ? warpgroup : 0; i < count; i += STRIDE) {
      int row_tile, column;
      locate(i, row_tile, column);
      const int first_row = row_tile * T::ROWS + (T::RESIDENT ? 0 : warpgroup * T::GROUP_ROWS), first_column = column * T::N;
      const float* tile_constants = constants;
      if constexpr (!T::RESIDENT) {
        // Two buffers: whoever writes buffer i % 2 has passed the barrier of tile i − 1, and so has everybody left tile i − 2.
        float* buffer = constants + (i % 2) * 2 * T::N;
        load_constants<T::N, EPILOGUE>(problem.p, buffer, first_column, threadIdx.x, 128 * T::GROUPS);
        named_sync(8, 128 * T::GROUPS);
        tile_constants = buffer;
      } else {
        // Its turn at the tensor cores. The waits on the ring rely on it too: a parity can only be told from the one before
        // if no warpgroup runs ahead of another.
        if (i > 0) named_sync(1 + warpgroup, 256);
      }
      if constexpr (SEGMENTS) work.start_total(first_column);
      // Waits for the next piece of K; where it lies.
      auto next_piece = [&](int kt, const char*& a, const char*& b) {
        if (T::RESIDENT && i < T::GROUPS) barrier_wait(&bars->weights[kt], 0);
        barrier_wait(&bars->full[at.slot], at.parity);
        const char* slot = ring + at.slot * T::STAGE_BYTES;
        a = slot + (T::RESIDENT ? 0 : warpgroup * T::GROUP_ROWS * 128);
        b = T::RESIDENT ? resident + kt * T::B_BYTES : slot + T::A_BYTES;
      };
      const char *a, *b;
      int previous = at.slot;
      if constexpr (!SEGMENTS) {
        next_piece(0, a, b);
        work.fence();
        cute::warpgroup_arrive();
        work.multiply(a, b, false);
        cute::warpgroup_commit_batch();
        at.next(stages);
        for (int kt = 1; kt < problem.k_tiles; ++kt) {
          next_piece(kt, a, b);
          cute::warpgroup_arrive();
          work.multiply(a, b, true);
          cute::warpgroup_commit_batch();
          cute::warpgroup_wait<1>();
          release(previous);
          previous = at.slot;
          at.next(stages);
        }
      } else {
        int segment = 0;
        bool accumulate = false;
        for (int kt = 0; kt < all_k_tiles; ++kt) {
          next_piece(kt, a, b);
          if (kt >= problem.k_tiles) {
            work.fence();
            cute::warpgroup_arrive();
            work.multiply_halves(a, b);
            cute::warpgroup_commit_batch();
            cute::warpgroup_wait<0>();
            work.fence();
          } else {
            // A segment may end at any k-step; its product then leaves the accumulators.
            const int steps = min(4, problem.p.k / 32 - 4 * kt);
            for (int s = 0; s < steps; ++s) {
              cute::warpgroup_arrive();
              work.multiply_step(a + 32 * s, b + 32 * s, accumulate);
              cute::warpgroup_commit_batch();
              accumulate = true;
              if (4 * kt + s + 1 == problem.p.segment_ends[segment] / 32) {
                cute::warpgroup_wait<0>();
                work.fence();
                work.flush(segment++, first_row, first_column);
                work.fence();
                accumulate = false;
              }
            }
            cute::warpgroup_wait<0>();
          }
          release(at.slot);
          at.next(stages);
        }
      }
      if constexpr (T::RESIDENT) {
        if (i + 1 < count) named_arrive(1 + (warpgroup + 1) % T::GROUPS, 256);
        at.skip((T::GROUPS - 1) * all_k_tiles, stages);
      }
      if constexpr (!SEGMENTS) {
        work.prefetch(first_row, first_column);
        cute::warpgroup_wait<0>();
        work.fence();
        release(previous);
      }
      work.finish(tile_constants, first_row, first_column);
    }
  }
}

// --- the host's side ----------------------------------------------------------------------------------------------------

int encode_map(CUtensorMap* map, const void* data, bool halves, int64_t rows, int64_t columns, int64_t row_bytes, int box_rows);
int shared_memory_limit();
int multiprocessors();

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

template <class T, int EPILOGUE, bool SEGMENTS>
int launch(const VitqLinear& p, cudaStream_t stream) {
  Problem problem;
  problem.p = p;
  if (problem.p.rows_per_group <= 0) problem.p.rows_per_group = p.m;
  problem.row_tiles = ceil_div(p.m, T::ROWS);
  problem.column_tiles = ceil_div(p.n, T::N);
  problem.k_tiles = ceil_div(p.k, 128);
  problem.k_tiles_fp = p.a_fp == nullptr ? 0 : ceil_div(p.k_fp, 64);
  problem.out_units = p.out_inverse * GELU_UNIT;
  problem.out_biased = p.out_zero + ROUND_BIAS;
  problem.vectors = vectors_fit(p.out, p.n) && vectors_fit(p.residual, p.n);
  const int all = problem.k_tiles + problem.k_tiles_fp;
  if (T::RESIDENT && all > MAX_RESIDENT) return VITQ_UNSUPPORTED;
  const int fixed = 1024 + (T::RESIDENT ? all * T::B_BYTES : 0) + 4 * T::N * int(sizeof(float)) + int(sizeof(Barriers));
  problem.stages = (shared_memory_limit() - fixed) / T::STAGE_BYTES;
  if (problem.stages < (T::RESIDENT ? 3 : 2)) return VITQ_UNSUPPORTED;
  if (problem.stages > MAX_STAGES) problem.stages = MAX_STAGES;
  const int shared = fixed + problem.stages * T::STAGE_BYTES;

  const int64_t n_pad = (p.n + 31) / 32 * 32;
  CUtensorMap a, b, a_fp, b_fp;
  // A box may not be larger than its matrix in bytes of a row only where the matrix is narrower than 128 bytes; TMA fills up.
  int error = encode_map(&a, p.a, false, p.m, p.a_columns, p.lda, T::ROWS);
  if (!error) error = encode_map(&b, p.weight, false, n_pad, p.k, p.k, T::N);
  if (!error && problem.k_tiles_fp) {
    error = encode_map(&a_fp, p.a_fp, true, p.m, p.k_fp, p.lda_fp * 2, T::ROWS);
    if (!error) error = encode_map(&b_fp, p.weight_fp, true, n_pad, p.k_fp, int64_t(p.k_fp) * 2, T::N);
  } else {
    a_fp = a, b_fp = b;
  }
  if (error) return error;

  const int sms = multiprocessors();
  int blocks;
  if (T::RESIDENT) {
    int slots = sms / problem.column_tiles;
    // no more blocks than there is work for: each warpgroup of a block takes a tile
    if (slots > problem.row_tiles) slots = problem.row_tiles;
    blocks = problem.column_tiles * (slots < 1 ? 1 : slots);
  } else {
    int64_t tiles = int64_t(problem.row_tiles) * problem.column_tiles;
    blocks = static_cast<int>(tiles < sms ? tiles : sms);
  }
  auto kernel = gemm<T, EPILOGUE, SEGMENTS>;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status != cudaSuccess) return status;
  kernel<<<blocks, T::THREADS, shared, stream>>>(a, b, a_fp, b_fp, problem);
  return cudaGetLastError();
}

// Tiles by configuration number; gemm_sm90.cu documents them and tuning.py names them.
using Config0 = Tile<192, 2, 1, true>;
using Config1 = Tile<128, 2, 1, true>;
using Config2 = Tile<256, 2, 1, true>;
using Config3 = Tile<96, 2, 1, true>;
using Config4 = Tile<64, 2, 1, true>;
using Config5 = Tile<128, 2, 2, true>;
using Config6 = Tile<192, 3, 1, true>;
using Config7 = Tile<128, 3, 1, true>;
using Config8 = Tile<256, 2, 1, false>;
using Config9 = Tile<192, 2, 1, false>;
using Config10 = Tile<128, 2, 2, false>;
using Config11 = Tile<128, 2, 1, false>;
using Config12 = Tile<64, 2, 1, false>;
constexpr int CONFIGS = 13;

int launch_float(const VitqLinear& p, int config, cudaStream_t stream);
int launch_codes(const VitqLinear& p, int config, cudaStream_t stream);
int launch_act_codes(const VitqLinear& p, int config, cudaStream_t stream);
int launch_act_float(const VitqLinear& p, int config, cudaStream_t stream);
int launch_segments(const VitqLinear& p, int config, cudaStream_t stream);

template <int EPILOGUE>
int launch_config(const VitqLinear& p, int config, cudaStream_t stream) {
  switch (config) {
    case 0: return launch<Config0, EPILOGUE, false>(p, stream);
    case 1: return launch<Config1, EPILOGUE, false>(p, stream);
    case 2: return launch<Config2, EPILOGUE, false>(p, stream);
    case 3: return launch<Config3, EPILOGUE, false>(p, stream);
    case 4: return launch<Config4, EPILOGUE, false>(p, stream);
    case 5: return launch<Config5, EPILOGUE, false>(p, stream);
    case 6: return launch<Config6, EPILOGUE, false>(p, stream);
    case 7: return launch<Config7, EPILOGUE, false>(p, stream);
    case 8: return launch<Config8, EPILOGUE, false>(p, stream);
    case 9: return launch<Config9, EPILOGUE, false>(p, stream);
    case 10: return launch<Config10, EPILOGUE, false>(p, stream);
    case 11: return launch<Config11, EPILOGUE, false>(p, stream);
    case 12: return launch<Config12, EPILOGUE, false>(p, stream);
    default: return VITQ_UNSUPPORTED;
  }
}

}  // namespace vitq::sm90
