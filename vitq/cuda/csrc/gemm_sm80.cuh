// The general integer GEMM: mma.sync on tiles that cp.async brings to shared memory in several stages. Everything that
// VitqLinear describes runs here, on every GPU from sm_80 on; gemm_sm80.cu checks arguments and picks a tile, the
// gemm_sm80_*.cu hold the instances.
//
// Order of the float sums: bias, the shift of the row, integer segments ascending, the fp16 segment last.
//
// 4-bit inputs and weights are both packed in plain order, low nibble first (layout.py's plain = True); 4-bit weights for
// 8-bit inputs in its 64-blocks.
//
// A k-step is 32 bytes of a row for every operand type (32 s8, 64 s4 or 16 halves), and the fragments of all of them lie
// alike: ldmatrix moves 8 rows of 16 bytes, and thread lane gets bytes 4·(lane % 4) .. + 3 of row lane / 4, which is what
// m16n8k32.s8, m16n8k64.s4 and m16n8k16.f16 take. So one loader and one addressing serve all formats; positions along k are
// counted in bytes of a.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "epilogue.cuh"

namespace vitq {
namespace sm80 {

// Rows x columns of the result that a block and a warp compute, bytes of a's row in a stage, how many warps share a
// warp tile by splitting k, stages, and the blocks of an SM for which registers are limited.
struct Tile {
  int bm, bn, bk, wm, wn, k_split, stages, blocks;
  __host__ __device__ constexpr int warps_m() const { return bm / wm; }
  __host__ __device__ constexpr int warps_n() const { return bn / wn; }
  __host__ __device__ constexpr int threads() const { return 32 * warps_m() * warps_n() * k_split; }
  // Segments keep float sums beside the integers: twice the accumulators, and each segment's integers must be whole.
  constexpr bool takes_segments() const { return k_split == 1 && wm * wn <= 64 * 32; }
};

// vitq/cuda/tuning.py names these by their index.
constexpr Tile TILES[] = {
    {128, 256, 64, 64, 64, 1, 4, 1},  // 0: long k and many rows
    {128, 128, 64, 64, 64, 1, 4, 2},  // 1
    {128, 128, 64, 64, 32, 1, 4, 2},  // 2
    {128, 96, 64, 32, 96, 1, 4, 3},   // 3: n = 96·i, as the widths of small ViTs
    {64, 128, 64, 32, 64, 1, 4, 3},   // 4
    {64, 64, 128, 32, 32, 1, 3, 4},   // 5
    {64, 32, 128, 32, 32, 2, 4, 4},   // 6: one or a few images: more blocks, and more warps to hide latency in each
    {32, 64, 128, 32, 32, 2, 4, 4},   // 7
    {32, 32, 256, 32, 32, 4, 4, 3},   // 8
    {16, 32, 256, 16, 32, 4, 6, 3},   // 9: a few rows: bound by reading the weight, so many loads in flight
    {16, 64, 128, 16, 32, 2, 6, 3},   // 10
};
constexpr int TILE_COUNT = sizeof(TILES) / sizeof(TILES[0]);

enum Format {
  W8A8 = 0,
  W4A8 = 1,         // weights in the 64-blocks of layout.py, widened in registers to 16 times the code
  W4A4_NATIVE = 2,  // both packed in plain order (low nibble first), on the s4 tensor cores of sm_80 .. sm_89
  W4A4_WIDE = 3,    // the same operands, both widened: for GPUs that emulate s4 (sm_90: 18 times slower than s8)
};

constexpr int ANY_EPILOGUE = -1;  // decided at run time; for kernels that are too rare for an instance each

// --- instructions ---

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes, of which the first `size` are read and the rest is zero; nothing is read from `from` if size is 0.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int size) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_s4(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The integer accumulators hold the bits of floats meanwhile.
__device__ __forceinline__ void mma_f16(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float f[4] = {__int_as_float(d[0]), __int_as_float(d[1]), __int_as_float(d[2]), __int_as_float(d[3])};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(f[0]), "+f"(f[1]), "+f"(f[2]), "+f"(f[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = __float_as_int(f[i]);
}

// Codes of four bits to bytes that hold 16 times the code: `low` those in the low nibbles.
__device__ __forceinline__ uint32_t widen_low(uint32_t w) { return (w << 4) & 0xF0F0F0F0u; }
__device__ __forceinline__ uint32_t widen_high(uint32_t w) { return w & 0xF0F0F0F0u; }

// Which 16-byte chunks of a row of BYTES bytes are exchanged, so that the eight rows of an 8 x 16-byte matrix meet all 32
// banks: the chunk's number is xor-ed with this.
template <int BYTES>
__device__ __forceinline__ int swizzle(int row) {
  if constexpr (BYTES >= 128) return row & 7;
  else return (row / (128 / BYTES)) & (BYTES / 16 - 1);
}

// --- sizes ---

template <int CONFIG, int FORMAT, int EPILOGUE, bool SEGMENTS>
struct Sizes {
  static constexpr Tile T = TILES[CONFIG];
  static constexpr int A_ROW = T.bk;                               // bytes of a row in a stage
  static constexpr int B_ROW = FORMAT == W4A8 ? T.bk / 2 : T.bk;
  static constexpr int A_BYTES = T.bm * A_ROW;
  static constexpr int B_BYTES = T.bn * (SEGMENTS ? A_ROW : B_ROW);  // the fp16 segment has rows of A_ROW bytes
  static constexpr int STAGE = A_BYTES + B_BYTES;
  // bias, then scale (and zero) of each segment
  static constexpr int CONSTANT_ROWS = SEGMENTS ? 2 + VITQ_MAX_SEGMENTS : 2;
  static constexpr int BYTES = T.stages * STAGE + CONSTANT_ROWS * T.bn * 4;
  static constexpr int MI = T.wm / 16, NJ = T.wn / 8, GROUPS = T.wn / 32;
  static constexpr int WARP_TILES = T.warps_m() * T.warps_n();
  static constexpr int STEPS = T.bk / 32 / T.k_split;              // k-steps of a warp in a stage
  static constexpr bool FLOATS = EPILOGUE == FLOAT_OUT || EPILOGUE == ACT_FLOAT_OUT || EPILOGUE == ANY_EPILOGUE;
  // The residual takes registers: without the one block less, wide warp tiles would spill.
  static constexpr int BLOCKS = SEGMENTS ? (T.threads() > 128 ? 1 : 2) : FLOATS && GROUPS == 3 ? T.blocks - 1 : T.blocks;

  static_assert(T.bm % T.wm == 0 && T.bn % T.wn == 0 && T.wm % 16 == 0 && T.wn % 32 == 0, "");
  static_assert(STEPS >= 1 && (STEPS & (STEPS - 1)) == 0 && (FORMAT != W4A8 || STEPS % 2 == 0), "");
  static_assert(T.k_split == 1 || T.threads() * (T.wm * T.wn / 32) * 4 <= T.stages * STAGE, "partial sums must fit");
  static_assert((2 * MI) % T.k_split == 0 || T.k_split % (2 * MI) == 0, "");
  static_assert(BYTES <= 99 * 1024, "what a block of sm_86 and sm_89 has");
};

// --- from global to shared memory ---

// The part of an operand's tile that one thread copies: a column of 16-byte chunks, every STEP-th row.
template <int ROWS, int BYTES, int THREADS>
struct Copier {
  static constexpr int CHUNKS = BYTES / 16, STEP = THREADS / CHUNKS, COUNT = (ROWS + STEP - 1) / STEP;
  static_assert(THREADS % CHUNKS == 0 && STEP % 8 == 0, "all rows of a thread are swizzled alike");
  const char* from;   // first row's first chunk
  int64_t stride;     // bytes between its rows
  uint32_t to;        // offset in the stage
  int column;         // bytes into the row
  uint32_t rows;      // bit i: the i-th row exists

  __device__ __forceinline__ void start(const void* data, int64_t row_bytes, int first, int limit, int thread) {
    int row = thread / CHUNKS, chunk = thread % CHUNKS;
    from = static_cast<const char*>(data) + (first + row) * row_bytes + chunk * 16;
    stride = STEP * row_bytes;
    to = row * BYTES + ((chunk ^ swizzle<BYTES>(row)) * 16);
    column = chunk * 16;
    rows = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) rows |= static_cast<uint32_t>(first + row + i * STEP < limit) << i;
  }

  // `position`: bytes from the row's start to the tile; `size`: how many of this thread's 16 bytes to read.
  __device__ __forceinline__ void copy(uint32_t stage, int position, int size) const {
    const char* source = from + position;
    int row = threadIdx.x / CHUNKS;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (ROWS % STEP == 0 || i + 1 < COUNT || row + i * STEP < ROWS)
        copy_async(stage + to + i * STEP * BYTES, source + i * stride, (rows >> i & 1) ? size : 0);
    }
  }
};

// Where along k a tile is: segments follow each other, the fp16 segment last. Bytes of a's row.
template <int CONFIG, int FORMAT>
struct Walk {
  static constexpr int A_BITS = FORMAT >= W4A4_NATIVE ? 4 : 8;
  int segment, begin, end, at;

  __device__ __forceinline__ void enter(const VitqLinear& p, int s) {
    segment = s;
    if (s < p.segments) {
      begin = s == 0 ? 0 : p.segment_ends[s - 1] / 8 * A_BITS;
      end = p.segment_ends[s] / 8 * A_BITS;
      // packed weights come in whole 64-blocks; what lies before the segment meets zeros in a
      at = FORMAT == W4A8 ? begin & ~63 : begin;
    } else {
      begin = at = 0;
      end = 2 * p.k_fp;
    }
  }
  // true when the tile just left was the segment's last
  __device__ __forceinline__ bool advance(const VitqLinear& p) {
    at += TILES[CONFIG].bk;
    if (at < end) return false;
    enter(p, segment + 1);
    return true;
  }
};

__device__ __forceinline__ int clamp16(int bytes) { return min(max(bytes, 0), 16); }

// --- one stage of products ---

// `between` is called when the first fragments are on their way: what it does (the next stage's copies) hides their latency.
template <class S, int FORMAT, class F>
__device__ __forceinline__ void multiply(int (&acc)[S::MI][S::NJ][4], uint32_t a_from, uint32_t b_from, F between) {
  constexpr int PACKED = FORMAT == W4A8 ? 2 : 1;  // k-steps that one load of weights holds
#pragma unroll
  for (int step = 0; step < S::STEPS; step += PACKED) {
    uint32_t b[S::NJ / 2][4];
#pragma unroll
    for (int j = 0; j < S::NJ / 2; ++j) load_matrices(b[j], (b_from ^ (step / PACKED * 32)) + j * 16 * S::B_ROW);
#pragma unroll
    for (int half = 0; half < PACKED; ++half) {
      uint32_t a[S::MI][4];
#pragma unroll
      for (int i = 0; i < S::MI; ++i) load_matrices(a[i], (a_from ^ ((step + half) * 32)) + i * 16 * S::A_ROW);
      if (step == 0 && half == 0) between();
#pragma unroll
      for (int j = 0; j < S::NJ; ++j) {
        uint32_t b0 = b[j / 2][j % 2 * 2], b1 = b[j / 2][j % 2 * 2 + 1];
        if constexpr (FORMAT == W4A8) {
          b0 = half == 0 ? widen_low(b0) : widen_high(b0);
          b1 = half == 0 ? widen_low(b1) : widen_high(b1);
        }
#pragma unroll
        for (int i = 0; i < S::MI; ++i) {
          if constexpr (FORMAT == W4A4_NATIVE) {
            mma_s4(acc[i][j], a[i], b0, b1);
          } else if constexpr (FORMAT == W4A4_WIDE) {
            // the order of k does not matter as long as both have it: even k first, then odd k
            uint32_t even[4] = {widen_low(a[i][0]), widen_low(a[i][1]), widen_low(a[i][2]), widen_low(a[i][3])};
            uint32_t odd[4] = {widen_high(a[i][0]), widen_high(a[i][1]), widen_high(a[i][2]), widen_high(a[i][3])};
            mma_s8(acc[i][j], even, widen_low(b0), widen_low(b1));
            mma_s8(acc[i][j], odd, widen_high(b0), widen_high(b1));
          } else {
            mma_s8(acc[i][j], a[i], b0, b1);
          }
        }
      }
    }
  }
}

template <class S>
__device__ __forceinline__ void multiply_halves(int (&acc)[S::MI][S::NJ][4], uint32_t a_from, uint32_t b_from) {
#pragma unroll
  for (int step = 0; step < S::STEPS; ++step) {
    uint32_t b[S::NJ / 2][4];
#pragma unroll
    for (int j = 0; j < S::NJ / 2; ++j) load_matrices(b[j], (b_from ^ (step * 32)) + j * 16 * S::A_ROW);
#pragma unroll
    for (int i = 0; i < S::MI; ++i) {
      uint32_t a[4];
      load_matrices(a, (a_from ^ (step * 32)) + i * 16 * S::A_ROW);
#pragma unroll
      for (int j = 0; j < S::NJ; ++j) mma_f16(acc[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// The exact sum: widened operands are 16 times the codes each, and every accumulator a multiple of that. The largest,
// 128·128·k, fits 32 bits for k < 2^17 in all formats: 8-bit operands reach -128, and so do widened 4-bit ones.
template <int FORMAT>
__device__ __forceinline__ int exact(int acc) {
  return FORMAT == W4A8 ? acc >> 4 : FORMAT == W4A4_WIDE ? acc >> 8 : acc;
}

__device__ __forceinline__ void read8(const float* from, float (&to)[COLUMNS]) {
  float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

// f(0 as a constant), .., f(N - 1): unlike #pragma unroll this cannot be refused, which would move the accumulators to memory.
template <int N, int I = 0, class F>
__device__ __forceinline__ void unrolled(F&& f) {
  if constexpr (I < N) {
    f(std::integral_constant<int, I>{});
    unrolled<N, I + 1>(f);
  }
}

template <int EPILOGUE>
__device__ __forceinline__ void finish(const VitqLinear& p, const RowAt& at, int column, bool vectors, float (&y)[COLUMNS],
                                       uint4 prefetched, bool has_prefetched) {
  if constexpr (EPILOGUE == ANY_EPILOGUE) {
    if (p.out.dtype != VITQ_S8) finish8<ACT_FLOAT_OUT>(p, at, column, vectors, y, prefetched, has_prefetched);
    else if (p.activation == VITQ_NO_ACTIVATION) finish8<CODES_OUT>(p, at, column, vectors, y);
    else finish8<ACT_CODES_OUT>(p, at, column, vectors, y);
  } else {
    finish8<EPILOGUE>(p, at, column, vectors, y, prefetched, has_prefetched);
  }
}

// Blocks in the order of their index take GROUP row tiles by all column tiles, column by column: those that run at a time
// share rows of a and weights in L2.
template <int CONFIG>
__device__ __forceinline__ void place_block(const VitqLinear& p, int& m0, int& n0) {
  constexpr uint32_t GROUP = 8;
  constexpr Tile T = TILES[CONFIG];
  uint32_t tiles_m = (p.m + T.bm - 1) / T.bm, tiles_n = (p.n + T.bn - 1) / T.bn, block = blockIdx.x;
  uint32_t group = block / (GROUP * tiles_n), first = group * GROUP, count = min(GROUP, tiles_m - first);
  uint32_t within = block - first * tiles_n, column = within / count;
  m0 = static_cast<int>(first + within - column * count) * T.bm;
  n0 = static_cast<int>(column) * T.bn;
}

// --- the kernel ---

template <int CONFIG, int FORMAT, int EPILOGUE, bool SEGMENTS>
__global__ void __launch_bounds__(TILES[CONFIG].threads(), Sizes<CONFIG, FORMAT, EPILOGUE, SEGMENTS>::BLOCKS)
    linear_kernel(const __grid_constant__ VitqLinear p, const bool vectors) {
  using S = Sizes<CONFIG, FORMAT, EPILOGUE, SEGMENTS>;
  constexpr Tile T = TILES[CONFIG];
  constexpr int THREADS = T.threads(), ROW_PAIRS = 2 * S::MI;
  extern __shared__ __align__(1024) char shared[];
  float* const constants = reinterpret_cast<float*>(shared + T.stages * S::STAGE);
  const uint32_t stages = shared_address(shared);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int k_part = warp / S::WARP_TILES, warp_tile = warp % S::WARP_TILES;
  const int warp_m = warp_tile / T.warps_n() * T.wm, warp_n = warp_tile % T.warps_n() * T.wn;
  int m0, n0;
  place_block<CONFIG>(p, m0, n0);
  const int n_pad = (p.n + 31) / 32 * 32;

  {  // constants come with the first stage
    constexpr int CHUNKS = T.bn / 4;
    const int count = SEGMENTS ? 1 + p.segments + (p.column_sums != nullptr) : 2;
    for (int i = thread; i < count * CHUNKS; i += THREADS) {
      int which = i / CHUNKS, column = i % CHUNKS * 4;
      const float* from = which == 0 ? p.bias : which <= p.segments ? p.scale + int64_t(which - 1) * n_pad
                                                                    : p.column_sums;
      bool exists = from != nullptr && n0 + column < n_pad;
      copy_async(shared_address(constants + which * T.bn + column), exists ? from + n0 + column : p.scale, exists ? 16 : 0);
    }
  }

  const bool prefetch = S::FLOATS && vectors && p.residual.data != nullptr && p.residual.dtype != VITQ_F32;
  if (prefetch && T.k_split == 1) {  // from memory to L2 while the products run
    constexpr int LINES = (T.bn + 63) / 64;
    for (int i = thread; i < T.bm * LINES; i += THREADS) {
      RowAt at = row_at(p, m0 + i / LINES);
      int column = n0 + i % LINES * 64;
      if (at.inside && column < p.n) asm volatile("prefetch.global.L2 [%0];" ::"l"(at.residual + 2 * column));
    }
  }

  Copier<T.bm, S::A_ROW, THREADS> a;
  Copier<T.bn, S::B_ROW, THREADS> b;
  a.start(p.a, p.lda, m0, p.m, thread);
  constexpr int A_BITS = Walk<CONFIG, FORMAT>::A_BITS;
  const int b_row_bytes = FORMAT == W8A8 ? p.k : p.k / 2;
  b.start(p.weight, b_row_bytes, n0, n_pad, thread);
  const int a_row_bytes = (p.a_columns * A_BITS + 7) / 8;

  Walk<CONFIG, FORMAT> ahead;
  const int walk_end = SEGMENTS ? p.segments + (p.a_fp != nullptr) : 1;
  int tiles;
  if constexpr (SEGMENTS) {
    ahead.enter(p, 0);
    tiles = 0;
    for (int s = 0; s < walk_end; ++s) {
      Walk<CONFIG, FORMAT> w;
      w.enter(p, s);
      tiles += (w.end - w.at + T.bk - 1) / T.bk;
    }
  } else {
    ahead.segment = ahead.begin = ahead.at = 0;
    ahead.end = p.k / 8 * A_BITS;
    tiles = (ahead.end + T.bk - 1) / T.bk;
  }

  // fetches the next tile of k into a stage
  auto fetch = [&](int stage) {
    uint32_t a_to = stages + stage * S::STAGE, b_to = a_to + S::A_BYTES;
    if constexpr (SEGMENTS) {
      if (ahead.segment >= walk_end) return;
      if (ahead.segment == p.segments) {
        Copier<T.bm, S::A_ROW, THREADS> a_fp;
        Copier<T.bn, S::A_ROW, THREADS> b_fp;
        a_fp.start(p.a_fp, 2 * p.lda_fp, m0, p.m, thread);
        b_fp.start(p.weight_fp, 2 * int64_t(p.k_fp), n0, n_pad, thread);
        int size = clamp16(2 * p.k_fp - ahead.at - a_fp.column);
        a_fp.copy(a_to, ahead.at, size);
        b_fp.copy(b_to, ahead.at, size);
      } else {
        int at = ahead.at + a.column;
        a.copy(a_to, ahead.at, at >= ahead.begin && at < ahead.end ? clamp16(a_row_bytes - at) : 0);
        int b_at = FORMAT == W4A8 ? ahead.at / 2 : ahead.at;
        b.copy(b_to, b_at, clamp16(b_row_bytes - b_at - b.column));
      }
      ahead.advance(p);
    } else {
      if (ahead.at >= ahead.end) return;
      a.copy(a_to, ahead.at, clamp16(a_row_bytes - ahead.at - a.column));
      int b_at = FORMAT == W4A8 ? ahead.at / 2 : ahead.at;
      b.copy(b_to, b_at, clamp16(b_row_bytes - b_at - b.column));
      ahead.at += T.bk;
    }
  };

  // Rows of matrices that this lane addresses for ldmatrix. a: x4 is rows 0-7, 8-15 of the left 16 bytes, then of the right.
  // b: columns 0-7 left and right, then columns 8-15.
  const uint32_t k_offset = k_part * S::STEPS * 32;
  const uint32_t a_offset = (warp_m + lane % 16) * S::A_ROW + (((lane / 16) ^ swizzle<S::A_ROW>(lane % 16)) * 16 ^ k_offset);
  const int b_row = lane % 8 + lane / 16 * 8, b_chunk = lane / 8 % 2;
  const uint32_t b_offset = S::A_BYTES + (warp_n + b_row) * S::B_ROW +
                            ((b_chunk ^ swizzle<S::B_ROW>(b_row)) * 16 ^ (FORMAT == W4A8 ? k_offset / 2 : k_offset));

  int acc[S::MI][S::NJ][4] = {};
  float sums[SEGMENTS ? ROW_PAIRS : 1][SEGMENTS ? S::GROUPS : 1][COLUMNS];
  Walk<CONFIG, FORMAT> here;
  if constexpr (SEGMENTS) here.enter(p, 0);

  // adds a segment's sums to the float ones and clears them
  auto flush = [&](int segment) {
#pragma unroll
    for (int r = 0; r < ROW_PAIRS; ++r) {
      int row = m0 + warp_m + r * 8 + lane / 4, safe = row < p.m ? row : 0;
      float row_scale = p.row_scale == nullptr ? 1.0f : __ldg(p.row_scale + safe);
      const bool shifted = segment == 0 && p.column_sums != nullptr;
      const float row_shift = shifted ? __ldg(p.row_shift + safe) : 0.0f;
#pragma unroll
      for (int g = 0; g < S::GROUPS; ++g) {
        const float* at = constants + warp_n + g * 32 + lane % 4 * COLUMNS;
        float(&y)[COLUMNS] = sums[r][g];
        if (segment == 0) read8(at, y);
        int whole[COLUMNS];
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
          int& from = acc[r / 2][g * 4 + i / 2][r % 2 * 2 + i % 2];
          whole[i] = from;
          from = 0;
        }
        if (segment == p.segments) {
#pragma unroll
          for (int i = 0; i < COLUMNS; ++i) y[i] += __int_as_float(whole[i]);
          continue;
        }
        float scale[COLUMNS];
        if (shifted) {
          read8(at + (1 + p.segments) * T.bn, scale);
          shift8(row_shift, scale, y);
        }
        read8(at + (1 + segment) * T.bn, scale);
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) whole[i] = exact<FORMAT>(whole[i]);
        accumulate8(whole, row_scale, p.row_scale != nullptr, scale, y);
      }
    }
  };

#pragma unroll
  for (int i = 0; i < T.stages - 1; ++i) {
    fetch(i);
    commit_copies();
  }
  int stage = 0, stage_ahead = T.stages - 1;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<T.stages - 2>();
    __syncthreads();
    auto fetch_ahead = [&] {
      fetch(stage_ahead);
      commit_copies();
    };
    uint32_t from = stages + stage * S::STAGE;
    if constexpr (SEGMENTS) {
      int segment = here.segment;
      if (segment == p.segments) {
        const uint32_t b_fp = S::A_BYTES + (warp_n + b_row) * S::A_ROW + ((b_chunk ^ swizzle<S::A_ROW>(b_row)) * 16);
        fetch_ahead();
        multiply_halves<S>(acc, from + a_offset, from + b_fp);
      } else {
        multiply<S, FORMAT>(acc, from + a_offset, from + b_offset, fetch_ahead);
      }
      if (here.advance(p)) flush(segment);
    } else {
      multiply<S, FORMAT>(acc, from + a_offset, from + b_offset, fetch_ahead);
    }
    stage = stage + 1 == T.stages ? 0 : stage + 1;
    stage_ahead = stage_ahead + 1 == T.stages ? 0 : stage_ahead + 1;
  }

  const int column = n0 + warp_n + lane % 4 * COLUMNS, row0 = m0 + warp_m + lane / 4;
  const float* mine = constants + warp_n + lane % 4 * COLUMNS;

  if constexpr (T.k_split > 1) {
    // Every warp leaves its partial sums in shared memory, then adds up its share of the rows; integers, so any order is exact.
    int2* partial = reinterpret_cast<int2*>(shared);
    constexpr int PER_WARP = ROW_PAIRS * S::NJ * 32;
    __syncthreads();
    int2* to = partial + warp * PER_WARP + lane;
#pragma unroll
    for (int r = 0; r < ROW_PAIRS; ++r)
#pragma unroll
      for (int j = 0; j < S::NJ; ++j)
        to[(r * S::NJ + j) * 32] = make_int2(acc[r / 2][j][r % 2 * 2], acc[r / 2][j][r % 2 * 2 + 1]);
    __syncthreads();
#pragma unroll
    for (int r = k_part; r < ROW_PAIRS; r += T.k_split) {
      RowAt at = row_at(p, row0 + r * 8);
#pragma unroll
      for (int g = 0; g < S::GROUPS; ++g) {
        int whole[COLUMNS] = {};
#pragma unroll
        for (int part = 0; part < T.k_split; ++part)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            int2 two = partial[(part * S::WARP_TILES + warp_tile) * PER_WARP + (r * S::NJ + g * 4 + j) * 32 + lane];
            whole[2 * j] += two.x, whole[2 * j + 1] += two.y;
          }
        float y[COLUMNS], scale[COLUMNS];
        read8(mine + g * 32, y);
        read8(mine + T.bn + g * 32, scale);
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) whole[i] = exact<FORMAT>(whole[i]);
        accumulate8(whole, at.scale, p.row_scale != nullptr, scale, y);
        finish<EPILOGUE>(p, at, column + g * 32, vectors, y, uint4{}, false);
      }
    }
    return;
  }

  // The residual of a row is requested while the row before it is finished; out may be the same memory, but a thread
  // reads there only what it writes later itself.
  RowAt at[ROW_PAIRS];
  uint4 residual[ROW_PAIRS][S::GROUPS];
  auto request = [&](int r) {
    at[r] = row_at(p, row0 + r * 8);
#pragma unroll
    for (int g = 0; g < S::GROUPS; ++g) {
      const int first = column + g * 32;
      residual[r][g] = S::FLOATS && prefetch && at[r].inside && first < p.n ? prefetch_residual(at[r], first) : uint4{};
    }
  };
  float bias[S::GROUPS][COLUMNS], scale[S::GROUPS][COLUMNS];
  if constexpr (!SEGMENTS) {
#pragma unroll
    for (int g = 0; g < S::GROUPS; ++g) {
      read8(mine + g * 32, bias[g]);
      read8(mine + T.bn + g * 32, scale[g]);
    }
  }
  request(0);
  unrolled<ROW_PAIRS>([&](auto index) {
    constexpr int r = decltype(index)::value;
    if (r + 1 < ROW_PAIRS) request(r + 1);
#pragma unroll
    for (int g = 0; g < S::GROUPS; ++g) {
      if constexpr (SEGMENTS) {
        finish<EPILOGUE>(p, at[r], column + g * 32, vectors, sums[r][g], residual[r][g], prefetch);
      } else {
        int whole[COLUMNS];
        float y[COLUMNS];
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
          whole[i] = exact<FORMAT>(acc[r / 2][g * 4 + i / 2][r % 2 * 2 + i % 2]);
          y[i] = bias[g][i];
        }
        accumulate8(whole, at[r].scale, p.row_scale != nullptr, scale[g], y);
        finish<EPILOGUE>(p, at[r], column + g * 32, vectors, y, residual[r][g], prefetch);
      }
    }
  });
}

// --- launch ---

template <int CONFIG, int FORMAT, int EPILOGUE, bool SEGMENTS>
int launch(const VitqLinear& p, cudaStream_t stream) {
  using S = Sizes<CONFIG, FORMAT, EPILOGUE, SEGMENTS>;
  constexpr Tile T = TILES[CONFIG];
  auto kernel = linear_kernel<CONFIG, FORMAT, EPILOGUE, SEGMENTS>;
  if (S::BYTES > 48 * 1024) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::BYTES);
    if (error != cudaSuccess) return error;
  }
  int64_t blocks = ((int64_t(p.m) + T.bm - 1) / T.bm) * ((int64_t(p.n) + T.bn - 1) / T.bn);
  if (blocks > INT32_MAX) return VITQ_UNSUPPORTED;
  bool vectors = vectors_fit(p.out, p.n) && vectors_fit(p.residual, p.n);
  kernel<<<static_cast<unsigned>(blocks), T.threads(), S::BYTES, stream>>>(p, vectors);
  return cudaGetLastError();
}

// One per file, so that they compile side by side. `tile` is in 0 .. TILE_COUNT - 1; VITQ_UNSUPPORTED if there is no such kernel.
int linear_w8a8(const VitqLinear& p, int tile, cudaStream_t stream);
int linear_w4a8(const VitqLinear& p, int tile, cudaStream_t stream);
int linear_w4a4(const VitqLinear& p, int tile, bool native, cudaStream_t stream);
int linear_segments(const VitqLinear& p, int tile, cudaStream_t stream);
int linear_segments_w4a4(const VitqLinear& p, int tile, bool native, cudaStream_t stream);

// Runs f(tile as a constant) for the tile of that number.
template <int CONFIG = 0, class F>
int with_tile(int tile, F f) {
  if constexpr (CONFIG < TILE_COUNT) {
    if (tile == CONFIG) return f(std::integral_constant<int, CONFIG>{});
    return with_tile<CONFIG + 1>(tile, f);
  } else {
    return VITQ_UNSUPPORTED;
  }
}

template <int FORMAT>
int launch_plain(const VitqLinear& p, int tile, cudaStream_t stream) {
  return with_tile(tile, [&](auto config) -> int {
    constexpr int C = decltype(config)::value;
    return with_epilogue(p, [&](auto epilogue) { return launch<C, FORMAT, decltype(epilogue)::value, false>(p, stream); });
  });
}

template <int FORMAT>
int launch_segments(const VitqLinear& p, int tile, cudaStream_t stream) {
  return with_tile(tile, [&](auto config) -> int {
    constexpr int C = decltype(config)::value;
    if constexpr (TILES[C].takes_segments()) return launch<C, FORMAT, ANY_EPILOGUE, true>(p, stream);
    else return VITQ_UNSUPPORTED;
  });
}

}  // namespace sm80
}  // namespace vitq
