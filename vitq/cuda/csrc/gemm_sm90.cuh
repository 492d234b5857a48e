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

#include "gemm_sm90_packed.cuh"
#include "gemm_sm90_tile.cuh"
#include "launch.cuh"

namespace vitq::sm90 {

// Tiles in bands of eight row tiles, so that blocks that run at the same time share rows and weights in the L2.
__device__ __forceinline__ void tile_at(int index, int row_tiles, int column_tiles, int& row_tile, int& column_tile) {
  constexpr int BAND = 8;
  int band = index / (BAND * column_tiles), inside = index - band * BAND * column_tiles;
  int height = min(BAND, row_tiles - band * BAND);
  column_tile = inside / height;
  row_tile = band * BAND + inside - column_tile * height;
}

template <class T, int EPILOGUE, Segments SEGMENTS>
__global__ void __launch_bounds__(T::THREADS, 1)
    gemm(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
         const __grid_constant__ CUtensorMap a_fp_map, const __grid_constant__ CUtensorMap b_fp_map,
         const __grid_constant__ Problem problem) {
  extern __shared__ char raw[];
  char* memory = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
  const int all_k_tiles = problem.k_tiles + problem.k_tiles_fp;
  char* resident = memory;
  char* ring = memory + (T::RESIDENT ? all_k_tiles * T::B_BYTES : 0);
  char* packed = ring + problem.stages * T::STAGE_BYTES;
  float* constants = reinterpret_cast<float*>(packed + WIDENERS * T::PACKED_DEPTH * T::PACKED_BYTES);  // two buffers of scales and biases
  Barriers* bars = reinterpret_cast<Barriers*>(constants + 2 * CONSTANTS<T, SEGMENTS>);

  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int stages = problem.stages, row_tiles = problem.row_tiles, column_tiles = problem.column_tiles;

  if (threadIdx.x == 0) {
    prefetch_map(&a_map);
    prefetch_map(&b_map);
    for (int i = 0; i < stages; ++i) {
      barrier_init(&bars->full[i], T::PACKED ? 1 + 32 : 1);  // who loads, and the lanes of the warp that widens
      barrier_init(&bars->empty[i], T::RESIDENT ? 4 : 4 * T::GROUPS);  // a thread of each warp that reads it
    }
    if (T::RESIDENT)
      for (int i = 0; i < all_k_tiles; ++i) barrier_init(&bars->weights[i], 1);
    for (int i = 0; i < WIDENERS * T::PACKED_DEPTH; ++i) barrier_init(&bars->packed[i], 1);
    barrier_init_done();
  }
  start_dependents();
  wait_for_kernels_before();
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
    if (T::PACKED && thread >= 32) {
      if constexpr (T::PACKED) {
        widen_pieces<T>(problem, b_map, *bars, packed, ring, count, [&](int i) {
          int row_tile, column;
          locate(i, row_tile, column);
          return column;
        });
      }
    } else if (thread == 0 && count > 0) {
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
          const bool widened = T::PACKED && !fp;  // other warps bring the weight's part
          barrier_expect(&bars->full[at.slot], widened ? T::A_BYTES : T::STAGE_BYTES);
          load_box(a, &bars->full[at.slot], slot, k, row_tile * T::ROWS);
          if (!T::RESIDENT && !widened) load_box(b, &bars->full[at.slot], slot + T::A_BYTES, k, column * T::N);
          if (T::PACKED && fp) barrier_arrive(&bars->full[at.slot], 32);
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
      load_constants<T, EPILOGUE, SEGMENTS>(problem.p, constants, column_tile * T::N, threadIdx.x, 128 * T::GROUPS);
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
        float* buffer = constants + (i % 2) * CONSTANTS<T, SEGMENTS>;
        load_constants<T, EPILOGUE, SEGMENTS>(problem.p, buffer, first_column, threadIdx.x, 128 * T::GROUPS);
        named_sync(8, 128 * T::GROUPS);
        tile_constants = buffer;
      } else {
        // Its turn at the tensor cores. The waits on the ring rely on it too: a parity can only be told from the one before
        // if no warpgroup runs ahead of another.
        if (i > 0) named_sync(1 + warpgroup, 256);
      }
      if constexpr (SEGMENTS == ANY) work.start_total(first_row, first_column);
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
      // One piece more, while the one before it is still under way.
      auto product = [&](int kt, auto multiply) {
        next_piece(kt, a, b);
        cute::warpgroup_arrive();
        multiply();
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<1>();
        if (kt > 0) release(previous);
        previous = at.slot;
        at.next(stages);
      };
      auto rest = [&](int kt) {
        for (; kt < problem.k_tiles; ++kt) product(kt, [&] { work.multiply(a, b, true); });
      };
      if constexpr (SEGMENTS == ONE || SEGMENTS == MIXED) {
        next_piece(0, a, b);
        work.fence();
        cute::warpgroup_arrive();
        work.multiply(a, b, false);
        cute::warpgroup_commit_batch();
        at.next(stages);
        rest(1);
        if constexpr (SEGMENTS == MIXED) {
          cute::warpgroup_wait<0>();
          work.fence();
          release(previous);
          work.to_total(tile_constants, first_row);
          work.fence_total();
          for (int kt = problem.k_tiles; kt < all_k_tiles; ++kt) {
            next_piece(kt, a, b);
            cute::warpgroup_arrive();
            work.multiply_halves(a, b);
            cute::warpgroup_commit_batch();
            cute::warpgroup_wait<1>();
            if (kt > problem.k_tiles) release(previous);
            previous = at.slot;
            at.next(stages);
          }
        }
      } else if constexpr (SEGMENTS == PAIR) {
        // Pieces of the first segment, one that both share, and those of the second.
        const int whole = problem.p.segment_ends[0] / 128, steps = problem.p.segment_ends[0] / 32 % 4;
        work.fence();
        int kt = 0;
        for (; kt < whole; ++kt) product(kt, [&] { work.template multiply_both<4>(a, b, kt > 0); });
        product(kt, [&] {
          switch (steps) {
            case 0: work.template multiply_both<0>(a, b, false); break;
            case 1: work.template multiply_both<1>(a, b, whole > 0); break;
            case 2: work.template multiply_both<2>(a, b, whole > 0); break;
            default: work.template multiply_both<3>(a, b, whole > 0);
          }
        });
        rest(kt + 1);
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
      if constexpr (SEGMENTS == MIXED) {
        cute::warpgroup_wait<0>();
        work.fence_total();
        if (problem.k_tiles_fp) release(previous);
      } else if constexpr (SEGMENTS != ANY) {
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

// What boxes of a matrix hold of its rows: 128 bytes of codes or halves, or 64 of packed codes, swizzled by as many.
enum Boxes { CODES, HALVES, PACKED_CODES };
int encode_map(CUtensorMap* map, const void* data, Boxes boxes, int64_t rows, int64_t columns, int64_t row_bytes, int box_rows);
int shared_memory_limit();
int multiprocessors();

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

template <class T, int EPILOGUE, Segments SEGMENTS>
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
  for (problem.spare_bits = 0; p.qmax < 127 >> problem.spare_bits;) ++problem.spare_bits;
  problem.vectors = vectors_fit(p.out, p.n) && vectors_fit(p.residual, p.n);
  problem.plain = plain_epilogue(p, SEGMENTS == MIXED || SEGMENTS == ANY);
  const int all = problem.k_tiles + problem.k_tiles_fp;
  if (T::RESIDENT && all > MAX_RESIDENT) return VITQ_UNSUPPORTED;
  const int fixed = 1024 + (T::RESIDENT ? all * T::B_BYTES : 0) + WIDENERS * T::PACKED_DEPTH * T::PACKED_BYTES +
                    2 * CONSTANTS<T, SEGMENTS> * int(sizeof(float)) + int(sizeof(Barriers));
  problem.stages = (shared_memory_limit() - fixed) / T::STAGE_BYTES;
  if (problem.stages < (T::RESIDENT ? 3 : 2)) return VITQ_UNSUPPORTED;
  if (problem.stages > MAX_STAGES) problem.stages = MAX_STAGES;
  const int shared = fixed + problem.stages * T::STAGE_BYTES;

  const int64_t n_pad = (p.n + 31) / 32 * 32;
  CUtensorMap a, b, a_fp, b_fp;
  // A box may not be larger than its matrix in bytes of a row only where the matrix is narrower than 128 bytes; TMA fills up.
  int error = encode_map(&a, p.a, CODES, p.m, p.a_columns, p.lda, T::ROWS);
  const int64_t row_bytes = T::PACKED ? p.k / 2 : p.k;
  if (!error) error = encode_map(&b, p.weight, T::PACKED ? PACKED_CODES : CODES, n_pad, row_bytes, row_bytes, T::N);
  if (!error && problem.k_tiles_fp) {
    error = encode_map(&a_fp, p.a_fp, HALVES, p.m, p.k_fp, p.lda_fp * 2, T::ROWS);
    if (!error) error = encode_map(&b_fp, p.weight_fp, HALVES, n_pad, p.k_fp, int64_t(p.k_fp) * 2, T::N);
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
  cudaError_t status = allow_shared(reinterpret_cast<const void*>(kernel));
  if (status != cudaSuccess) return status;
  return launch_early(kernel, blocks, T::THREADS, shared, stream, a, b, a_fp, b_fp, problem);
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
using Packed10 = Tile<128, 2, 2, false, 4>;
using Packed11 = Tile<128, 2, 1, false, 4>;
using Packed12 = Tile<64, 2, 1, false, 4>;

int launch_float(const VitqLinear& p, int config, cudaStream_t stream);
int launch_codes(const VitqLinear& p, int config, cudaStream_t stream);
int launch_act_codes(const VitqLinear& p, int config, cudaStream_t stream);
int launch_act_float(const VitqLinear& p, int config, cudaStream_t stream);
int launch_segments(const VitqLinear& p, int config, cudaStream_t stream);
int launch_mixed(const VitqLinear& p, int config, cudaStream_t stream);
int launch_packed(const VitqLinear& p, int config, cudaStream_t stream);

template <int EPILOGUE>
int launch_config(const VitqLinear& p, int config, cudaStream_t stream) {
  switch (config) {
    case 0: return launch<Config0, EPILOGUE, ONE>(p, stream);
    case 1: return launch<Config1, EPILOGUE, ONE>(p, stream);
    case 2: return launch<Config2, EPILOGUE, ONE>(p, stream);
    case 3: return launch<Config3, EPILOGUE, ONE>(p, stream);
    case 4: return launch<Config4, EPILOGUE, ONE>(p, stream);
    case 5: return launch<Config5, EPILOGUE, ONE>(p, stream);
    case 6: return launch<Config6, EPILOGUE, ONE>(p, stream);
    case 7: return launch<Config7, EPILOGUE, ONE>(p, stream);
    case 8: return launch<Config8, EPILOGUE, ONE>(p, stream);
    case 9: return launch<Config9, EPILOGUE, ONE>(p, stream);
    case 10: return launch<Config10, EPILOGUE, ONE>(p, stream);
    case 11: return launch<Config11, EPILOGUE, ONE>(p, stream);
    case 12: return launch<Config12, EPILOGUE, ONE>(p, stream);
    default: return VITQ_UNSUPPORTED;
  }
}

}  // namespace vitq::sm90
