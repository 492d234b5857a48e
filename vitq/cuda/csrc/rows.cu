// Rows of floats to codes (or floats) in one pass over memory: (x + residual) -> norm -> columns -> codes.
//
// A row lies in the registers of its lanes: 4 to 32 of a warp, so that a warp takes several short rows, or a whole block.
// Threads stay for many rows: weight and bias wait in registers, folded with 1 / scale and the zero point, and the next rows
// come into shared memory while one is worked on, each vector to the thread that asked for it, so that none waits for another.
// x + residual is a float32 sum, which the norm reads unrounded.
#include <algorithm>
#include <limits>

#include <cuda_runtime.h>

#include "rows.cuh"
#include "rows_any.cuh"
#include "launch.cuh"

namespace vitq {
namespace {

constexpr int MOST_COLUMNS = 32768;
constexpr int MOST_MERGED = 3072;  // columns of a block that is not wide

// Which threads share a row: some of a warp; a block, up to 4096 columns; or a block of up to 1024 threads, whose registers
// then hold no weights.
enum Lanes { WARP, BLOCK, WIDE };
constexpr int THREADS = 128;

// Float32 needs more than the 64 registers of 1024 threads.
constexpr int wide_threads(int bytes) { return bytes == 4 ? 512 : 1024; }

// How codes come about. FOLDED: a norm, or none, whose result is folded into static codes or stored as float. DIVIDED: no
// norm, static or dynamic, by division. NORMED: dynamic, after a norm.
enum Mode { FOLDED, DIVIDED, NORMED };

// Rows that each group of lanes has under way. LayerNorm of 39400 x 384 on an H200: 15.5 us with 2, 16.4 with 3, 16.9 with 4.
constexpr int DEPTH = 2;

// Blocks of a multiprocessor, so that ptxas keeps to 65536 / (THREADS * blocks) registers.
constexpr int resident(int vectors, Mode mode, bool staged) {
  return (mode == DIVIDED ? 5 : vectors < 4 ? 4 : 3) - (staged && vectors == 3);
}

// T: float type of x, residual and sum. V: vectors of 8 neighbouring columns a lane. STAGED: codes go through shared memory to
// be reordered or stored unaligned.
template <typename T, int V, Lanes LANES, Mode MODE, bool STAGED>
__device__ __forceinline__ void rows_body(const RowsLaunch& p) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ uint32_t meeting[2][32];
  constexpr bool ALL = LANES != WARP, EXACT = MODE != FOLDED;
  constexpr int W = 8, Q = sizeof(T) / 2, STAGES = DEPTH;
  constexpr bool HOIST = LANES != WIDE && MODE != DIVIDED;
  constexpr int TOGETHER = LANES == WIDE ? 1 : 4;  // rows whose codes are reordered at once
  const VitqRows& a = p.a;
  const int lane = ALL ? threadIdx.x : threadIdx.x & (p.lanes - 1);
  const int group = ALL ? 0 : threadIdx.x >> p.lane_shift;
  const unsigned together = ALL ? 1 : blockDim.x >> p.lane_shift, stride = gridDim.x * together;
  int first = lane * W, step = p.lanes * W;
  const bool floats = !EXACT && a.out_dtype != VITQ_S8 && a.out_dtype != VITQ_S4;
  const bool dynamic = MODE == NORMED || (EXACT && a.row_scale), ranged = EXACT && a.row_shift;
  const int norm = MODE == DIVIDED ? VITQ_NO_NORM : a.norm;
  RowReduce<ALL> reduce{p.lanes, meeting, 0};

  const auto column = [&](int v) { return first + v * step; };
  const auto used = [&](int v) { return column(v) < a.columns; };

  // Where a lane's columns lie from a row's start, and 4 bits for each vector that must meet none of a row's `absent` ones:
  // its neighbour's dy and dx, whether the lane has no such columns, and 1.
  // Rows that a wide block takes are never merged ones.
  [[maybe_unused]] int64_t places[LANES == WIDE ? 1 : V];
  uint32_t traits = 0;
  if constexpr (LANES != WIDE) {
#pragma unroll
    for (int v = 0; v < V; v++) traits |= uint32_t(locate(p, column(v), places[v]) | 4 * !used(v) | 8) << (4 * v);
  }
  const auto along = [&](int v) -> int64_t {
    if constexpr (LANES == WIDE) return column(v);
    else return places[v];
  };
  const auto start_of = [&](unsigned row) { return LANES == WIDE ? Place{row_offset(p, a.x, row), 0, 0} : place(p, row); };
  const auto absent = [&](unsigned row, const Place& at) -> uint32_t {
    return row >= unsigned(a.m) ? 15 : LANES == WIDE ? 4 : 4 | missing(p, at);
  };
  const auto there = [&](int v, uint32_t none) {
    return LANES == WIDE ? none != 15 && used(v) : !(traits >> (4 * v) & none);
  };

  const uint32_t ring = uint32_t(__cvta_generic_to_shared(shared)) + p.ring + 16 * threadIdx.x;
  const uint32_t pitch = 16 * blockDim.x, part = V * Q * pitch, stage_bytes = a.residual.data ? 2 * part : part;
  const auto fetch_one = [&](const void* base, int64_t from, uint32_t to, uint32_t none) {
#pragma unroll
    for (int v = 0; v < V; v++) {
      const bool exists = there(v, none);
      const auto* q = reinterpret_cast<const uint4*>(static_cast<const T*>(base) + (exists ? from + along(v) : 0));
#pragma unroll
      for (int i = 0; i < Q; i++) copy_async(to + (v * Q + i) * pitch, q + i, exists);
    }
  };
  const auto fetch = [&](unsigned row, uint32_t to) {
    const Place at = start_of(row);
    const uint32_t none = absent(row, at);
    fetch_one(a.x.data, at.offset, to, none);
    if (a.residual.data) fetch_one(a.residual.data, row_offset(p, a.residual, row), to + part, none);
    commit_copies();
  };
  const bool direct = LANES == WIDE && p.direct;
  unsigned start = blockIdx.x * together;
  if (!direct) {
#pragma unroll
    for (int i = 0; i < STAGES; i++) fetch(start + group + i * stride, ring + i * stage_bytes);
  }

  uint8_t* codes = shared + group * p.slot_bytes;
  auto* halves = reinterpret_cast<__half*>(codes + p.halves);
  if (STAGED && TOGETHER == 4 && lane == 0) reinterpret_cast<uint32_t*>(codes)[a.columns] = p.fill * 0x01010101u;
  const bool chosen = STAGED && dynamic && a.order;  // a dynamic scale is that of the columns in `order` alone

  const float shift = EXACT || floats ? 0.0f : p.code.zero;
  float weight[HOIST ? V : 1][W], bias[HOIST ? V : 1][W];
  if constexpr (HOIST) {
    const auto constants = [&](const float* from, float otherwise, float (&to)[V][W]) {
#pragma unroll
      for (int v = 0; v < V; v++) {
        Eight<float> raw;
#pragma unroll
        for (int w = 0; w < W; w++) to[v][w] = otherwise;
        if (from && used(v)) load_eight<float>(raw, from, column(v)), to_floats(raw, to[v]);
      }
    };
    constants(a.weight, 1.0f, weight);
    constants(a.bias, 0.0f, bias);
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
      for (int w = 0; w < W; w++) {  // columns that do not exist stay 0
        weight[v][w] = used(v) ? weight[v][w] * p.factor : 0.0f;
        bias[v][w] = used(v) ? fmaf(bias[v][w], p.factor, shift) : 0.0f;
      }
  }

  uint32_t gathered[STAGED && TOGETHER == 4 ? V : 1][W];  // codes of the last rows, a byte each
  // Whether each column's feature waits in registers.
  const bool known = STAGED && TOGETHER == 4 && a.order && a.out_dtype == VITQ_S8 && p.aligned_out && a.out_columns % 4 == 0 &&
                     a.out_columns <= V * W * p.lanes;
  Places<STAGED && TOGETHER == 4 ? 2 * V : 1> places_of_codes;
  if (known) places_of_codes.find(p, lane);
  int count = 0, stage = 0;
  for (; start < unsigned(a.m); start += stride) {  // the same for all threads of a block: they meet in reductions
    const unsigned row = start + group;
    const bool inside = row < unsigned(a.m);
    float x[V][W];
    // Else the compiler keeps each vector's place in registers through all rows, and spills.
    if constexpr (LANES == WIDE) asm volatile("" : "+r"(first), "+r"(step));
    if (!direct) {
      wait_copies<STAGES - 1>();
      const uint32_t from = ring + stage * stage_bytes;
      const auto read = [&](int v, uint32_t at, float (&to)[W]) {
        Eight<T> raw;
#pragma unroll
        for (int i = 0; i < Q; i++) raw.q[i] = load_shared(at + (v * Q + i) * pitch);
        to_floats(raw, to);
      };
#pragma unroll
      for (int v = 0; v < V; v++) read(v, from, x[v]);
      if (a.residual.data) {
#pragma unroll
        for (int v = 0; v < V; v++) {
          float r[W];
          read(v, from + part, r);
#pragma unroll
          for (int w = 0; w < W; w++) x[v][w] = __fadd_rn(x[v][w], r[w]);
        }
      }
      fetch(row + STAGES * stride, from);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    } else {
      const Place at = start_of(row);
      const uint32_t none = absent(row, at);
      const auto read = [&](int v, const void* base, int64_t from, float (&to)[W]) {
        Eight<T> raw;
#pragma unroll
        for (auto& q : raw.q) clear(q);
        if (there(v, none)) load_eight<T>(raw, base, from + along(v));
        to_floats(raw, to);
      };
#pragma unroll
      for (int v = 0; v < V; v++) read(v, a.x.data, at.offset, x[v]);
      if (a.residual.data) {
        const int64_t from = row_offset(p, a.residual, row);
#pragma unroll
        for (int v = 0; v < V; v++) {
          float r[W];
          read(v, a.residual.data, from, r);
#pragma unroll
          for (int w = 0; w < W; w++) x[v][w] = __fadd_rn(x[v][w], r[w]);
        }
      }
    }
    if (a.sum.data) {
      const int64_t to = row_offset(p, a.sum, row);
#pragma unroll
      for (int v = 0; v < V; v++)
        if (inside && used(v)) store_eight<T>(a.sum.data, to + column(v), x[v]);
    }

    float rstd = 1.0f;
    if (norm != VITQ_NO_NORM) {
      if (norm == VITQ_LAYER_NORM) {
        float sum = 0.0f;
#pragma unroll
        for (int v = 0; v < V; v++) {
          float piece = x[v][0];  // short chains of additions, side by side
#pragma unroll
          for (int w = 1; w < W; w++) piece += x[v][w];
          sum += piece;
        }
        sum = reduce(sum, Sum());
        float mean = sum * p.inverse_columns;
        mean = fmaf(fmaf(-mean, float(a.columns), sum), p.inverse_columns, mean);
#pragma unroll
        for (int v = 0; v < V; v++) {
          const float here = used(v) ? mean : 0.0f;  // columns that do not exist stay 0
#pragma unroll
          for (int w = 0; w < W; w++) x[v][w] -= here;
        }
      }
      // The squares of the differences, not E[x²] − E[x]²: a ViT's residual stream has channels far from zero.
      float squares = 0.0f;
#pragma unroll
      for (int v = 0; v < V; v++) {
        float piece = x[v][0] * x[v][0];
#pragma unroll
        for (int w = 1; w < W; w++) piece = fmaf(x[v][w], x[v][w], piece);
        squares += piece;
      }
      rstd = rsqrtf(fmaf(reduce(squares, Sum()), p.inverse_columns, a.eps));
    }
    if constexpr (HOIST) {
#pragma unroll
      for (int v = 0; v < V; v++)
#pragma unroll
        for (int w = 0; w < W; w++) x[v][w] = fmaf(x[v][w] * rstd, weight[v][w], bias[v][w]);
    } else if constexpr (MODE != DIVIDED) {
#pragma unroll
      for (int v = 0; v < V; v++) {
        if (!used(v)) continue;
#pragma unroll
        for (int w = 0; w < W; w += 4) {
          float4 here = make_float4(1.0f, 1.0f, 1.0f, 1.0f), there = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          if (a.weight) here = __ldg(reinterpret_cast<const float4*>(a.weight + column(v) + w));
          if (a.bias) there = __ldg(reinterpret_cast<const float4*>(a.bias + column(v) + w));
          const auto apply = [&](int i, float weight, float bias) {
            x[v][w + i] = fmaf(x[v][w + i] * rstd, weight * p.factor, fmaf(bias, p.factor, shift));
          };
          apply(0, here.x, there.x), apply(1, here.y, there.y), apply(2, here.z, there.z), apply(3, here.w, there.w);
        }
      }
    }

    if constexpr (!EXACT) {
      if (floats) {
#pragma unroll
        for (int v = 0; v < V; v++)
          if (inside && used(v)) store_eight(a.out, a.out_dtype, row * a.out_stride + column(v), x[v]);
        continue;
      }
    }

    if constexpr (STAGED) {
      if (a.fp_out) {
#pragma unroll
        for (int v = 0; v < V; v++) {
          if (!used(v)) continue;
          __half y[W];  // folded results back to the norm's own
#pragma unroll
          for (int w = 0; w < W; w++) y[w] = to_half(EXACT ? x[v][w] : (x[v][w] - p.code.zero) * a.scale);
          const auto* words = reinterpret_cast<const uint32_t*>(y);
          *reinterpret_cast<uint4*>(halves + column(v)) = make_uint4(words[0], words[1], words[2], words[3]);
        }
        if constexpr (TOGETHER == 4) {
          if constexpr (ALL) __syncthreads(); else __syncwarp();
          if (inside) gather_fp(p, halves, row, lane);
          if constexpr (ALL) __syncthreads(); else __syncwarp();
        }
      }
    }

    Scale scale{};
    RowRange range{};
    if constexpr (EXACT) {
      if (ranged) {
        float lo = INFINITY, hi = -INFINITY;
#pragma unroll
        for (int v = 0; v < V; v++) {
          if (!used(v)) continue;
          const uint32_t bits = chosen ? __ldg(a.counted + column(v) / 8) : 0xFF;
#pragma unroll
          for (int w = 0; w < W; w++)
            if (bits >> w & 1) lo = fminf(lo, x[v][w]), hi = fmaxf(hi, x[v][w]);
        }
        lo = reduce(lo, Least());
        range = make_range(lo, reduce(hi, Largest()), p.qmin, p.qmax);
        if (inside && lane == 0) a.row_scale[row] = range.s.scale, a.row_shift[row] = shift_of(range);
      } else if (dynamic) {
        float largest = 0.0f;
#pragma unroll
        for (int v = 0; v < V; v++) {
          if (chosen) {
            if (!used(v)) continue;
            const uint32_t bits = __ldg(a.counted + column(v) / 8);
#pragma unroll
            for (int w = 0; w < W; w++) largest = fmaxf(largest, bits >> w & 1 ? fabsf(x[v][w]) : 0.0f);
          } else {
#pragma unroll
            for (int w = 0; w < W; w++) largest = fmaxf(largest, fabsf(x[v][w]));
          }
        }
        scale = make_scale(__fdiv_rn(fmaxf(reduce(largest, Largest()), RANGE_MIN), p.qmax));
        if (inside && lane == 0) a.row_scale[row] = scale.scale;
      }
    }

    const bool packed = a.out_dtype == VITQ_S4;
    auto* out = static_cast<uint8_t*>(a.out) + row * a.out_stride;
#pragma unroll
    for (int v = 0; v < V; v++) {
      float code[W];
      if constexpr (!EXACT) {
#pragma unroll
        for (int w = 0; w < W; w++) code[w] = folded_code(x[v][w], p.qmin, p.qmax);
      } else if (ranged) {
#pragma unroll
        for (int w = 0; w < W; w++) code[w] = ranged_code(x[v][w], range);
      } else if (dynamic) {
#pragma unroll
        for (int w = 0; w < W; w++) code[w] = symmetric_code(x[v][w], scale);
      } else {
#pragma unroll
        for (int w = 0; w < W; w++) code[w] = static_code(x[v][w], p.code);
      }
      if constexpr (STAGED && TOGETHER == 4) {
#pragma unroll
        for (int w = 0; w < W; w++) gathered[v][w] = __byte_perm(gathered[v][w], __float_as_uint(code[w]), 0x4321);
        continue;
      }
      const uint2 word = make_uint2(pack_codes(code[0], code[1], code[2], code[3]),
                                    pack_codes(code[4], code[5], code[6], code[7]));
      if constexpr (STAGED) {
        if (used(v)) *reinterpret_cast<uint2*>(codes + column(v)) = word;
      } else if (inside && used(v)) {
        if (packed) *reinterpret_cast<uint32_t*>(out + column(v) / 2) = __byte_perm(nibbles(word.x), nibbles(word.y), 0x6420);
        else *reinterpret_cast<uint2*>(out + column(v)) = word;
      }
    }
    if constexpr (STAGED) {
      if constexpr (TOGETHER == 4) {
        count++;
        if (count < 4 && start + stride < unsigned(a.m)) continue;
        const int late = 8 * (4 - count);
#pragma unroll
        for (int v = 0; v < V; v++) {
          if (!used(v)) continue;
          auto* to = reinterpret_cast<uint4*>(codes + 4 * column(v));
          const auto& g = gathered[v];
          to[0] = make_uint4(g[0] >> late, g[1] >> late, g[2] >> late, g[3] >> late);
          to[1] = make_uint4(g[4] >> late, g[5] >> late, g[6] >> late, g[7] >> late);
        }
      } else {
        count = 1;
      }
      if constexpr (ALL) __syncthreads(); else __syncwarp();
      const unsigned oldest = row - (count - 1) * stride;
      if constexpr (TOGETHER == 4) {
        if (known) gather_known(p, places_of_codes, codes, oldest, stride, count, lane);
        else gather<TOGETHER>(p, codes, oldest, stride, count, lane);
      } else {
        gather<TOGETHER>(p, codes, oldest, stride, count, lane);
        if (a.fp_out && inside) gather_fp(p, halves, row, lane);
      }
      if constexpr (ALL) __syncthreads(); else __syncwarp();
      count = 0;
    }
  }
  if (!direct) wait_copies<0>();
}

template <typename T, int V, Lanes LANES, Mode MODE, bool STAGED>
__global__ void __launch_bounds__(LANES == WIDE ? wide_threads(sizeof(T)) : THREADS,
                                  LANES == WIDE ? 1 : resident(V, MODE, STAGED))
rows_kernel(const __grid_constant__ RowsLaunch p) {
  start_dependents();
  wait_for_kernels_before();
  rows_body<T, V, LANES, MODE, STAGED>(p);
}

int launch(void (*kernel)(RowsLaunch), const RowsLaunch& p, int threads, int shared, cudaStream_t stream) {
  int device, processors, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  // More than 48 KB must be asked for, of which the kernel's own variables take a few hundred bytes; sm_86 and sm_89 have 99 KB,
  // less than the longest rows with fp_order need.
  if (!error && shared > 47 * 1024) error = allow_shared(reinterpret_cast<const void*>(kernel));
  if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared);
  if (error) return error;
  if (!resident) return VITQ_UNSUPPORTED;
  const int together = threads / p.lanes;
  const int64_t blocks = (int64_t(p.a.m) + together - 1) / together;
  return launch_early(kernel, unsigned(std::min<int64_t>(blocks, int64_t(processors) * resident)), threads, shared, stream, p);
}

template <typename T, Mode MODE>
int choose(const RowsLaunch& p, Lanes lanes, int vectors, bool staged, int threads, int shared, cudaStream_t stream) {
  void (*kernel)(RowsLaunch);
  if (lanes == WARP) {
    kernel = staged ? (vectors == 2 ? rows_kernel<T, 2, WARP, MODE, true> : rows_kernel<T, 3, WARP, MODE, true>)
             : vectors == 3 ? rows_kernel<T, 3, WARP, MODE, false> : rows_kernel<T, 4, WARP, MODE, false>;
  } else if (lanes == BLOCK) {
    kernel = staged ? (vectors == 2 ? rows_kernel<T, 2, BLOCK, MODE, true> : rows_kernel<T, 3, BLOCK, MODE, true>)
             : vectors == 3 ? rows_kernel<T, 3, BLOCK, MODE, false> : rows_kernel<T, 4, BLOCK, MODE, false>;
  } else {
    kernel = staged ? rows_kernel<T, 4, WIDE, MODE, true> : rows_kernel<T, 4, WIDE, MODE, false>;
  }
  return launch(kernel, p, threads, shared, stream);
}

bool is_float(int dtype) { return dtype == VITQ_F32 || dtype == VITQ_F16 || dtype == VITQ_BF16; }
int width(int dtype) { return dtype == VITQ_F32 ? 4 : 2; }
bool aligned(const void* pointer, int64_t bytes) { return uintptr_t(pointer) % bytes == 0; }

// Rows that can be read and written 16 bytes at a time.
bool vectors_of(const VitqMatrix& matrix, bool flat) {
  const int each = 16 / width(matrix.dtype);
  return aligned(matrix.data, 16) && matrix.row_stride % each == 0 && (flat || matrix.group_stride % each == 0);
}

int check(const VitqRows& a) {
  const bool codes = a.out_dtype == VITQ_S8 || a.out_dtype == VITQ_S4;
  if (a.m < 0 || a.columns < 1 || a.columns > MOST_COLUMNS || a.out_columns < 0) return VITQ_BAD_ARGUMENT;
  if (!is_float(a.x.dtype) || !(codes || is_float(a.out_dtype))) return VITQ_BAD_ARGUMENT;
  if (a.norm < VITQ_NO_NORM || a.norm > VITQ_RMS_NORM) return VITQ_BAD_ARGUMENT;
  if (!a.order && a.out_columns != a.columns) return VITQ_BAD_ARGUMENT;
  if (a.residual.data && !is_float(a.residual.dtype)) return VITQ_BAD_ARGUMENT;
  if (a.sum.data && !is_float(a.sum.dtype)) return VITQ_BAD_ARGUMENT;
  if (a.merge_width < 0 || (a.merge_width > 0 && (a.merge_height < 1 || a.columns % 4))) return VITQ_BAD_ARGUMENT;
  if (a.merge_width > 0 && (a.residual.data || a.sum.data)) return VITQ_UNSUPPORTED;
  if (codes && a.order && a.row_scale && !a.counted) return VITQ_BAD_ARGUMENT;
  if (a.row_shift && (!a.row_scale || !a.out_columns || a.qmin >= 0 || a.qmax != -a.qmin - 1 || a.qmin & a.qmax)) return VITQ_BAD_ARGUMENT;
  if (a.fp_out && (a.fp_columns < 0 || (a.fp_columns && !a.fp_order))) return VITQ_BAD_ARGUMENT;
  if (!codes && (a.order || a.fp_out || a.row_scale)) return VITQ_UNSUPPORTED;
  if (codes) {
    const int limit = a.out_dtype == VITQ_S4 ? 8 : 128;
    if (a.qmin < -limit || a.qmax >= limit || a.qmin > a.qmax || (a.row_scale && a.qmax < 1)) return VITQ_BAD_ARGUMENT;
    // Beyond these 1 / scale, or its product with a value, leaves the range of float32.
    if (!a.row_scale && !(a.scale >= 0x1p-100f && a.scale <= 0x1p100f)) return VITQ_BAD_ARGUMENT;
    if (!a.row_scale && (a.zero < -(1 << 20) || a.zero > 1 << 20)) return VITQ_BAD_ARGUMENT;
  }
  if (a.m && (!a.x.data || (!a.out && a.out_columns))) return VITQ_BAD_ARGUMENT;
  return 0;
}

// Norms of few rows with ranges of their own, which take less time with a block a row: transformed_rows.cu's.
bool few_norms(const VitqRows& a) {
  return a.norm && a.row_scale && a.out_dtype == VITQ_S8 && a.m <= FEW_BLOCK_ROWS && (a.rows_per_group <= 0 || a.m <= a.rows_per_group) && !a.order &&
         !a.fp_out && !a.merge_width && !a.residual.data && !a.sum.data && a.qmax == -a.qmin - 1 && !(a.qmin & a.qmax);
}

int launch_few_norms(const VitqRows& a, void* stream) {
  VitqTransformedRows b{};
  b.x = a.x.data, b.x_stride = a.x.row_stride, b.x_dtype = a.x.dtype, b.m = a.m, b.columns = a.columns;
  b.norm = a.norm, b.weight = a.weight, b.bias = a.bias, b.eps = a.eps, b.qmin = a.qmin, b.qmax = a.qmax;
  b.out = static_cast<int8_t*>(a.out), b.out_stride = a.out_stride, b.row_scale = a.row_scale, b.row_shift = a.row_shift;
  return vitq_transformed_rows(&b, stream);
}

}  // namespace
}  // namespace vitq

// Codes of `order` -1 are those of the value 0: clamp(zero), or 0 with a dynamic scale; fp_order -1 is 0 too.
extern "C" int vitq_rows(const VitqRows* args, void* stream_) {
  using namespace vitq;
  if (!args) return VITQ_BAD_ARGUMENT;
  const VitqRows& a = *args;
  if (const int error = check(a)) return error;
  if (!a.m) return 0;
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (takes_dynamic_rows(a)) return launch_dynamic_rows(a, stream);
  if (few_norms(a)) return launch_few_norms(a, stream_);
  const bool codes = a.out_dtype == VITQ_S8 || a.out_dtype == VITQ_S4, packed = a.out_dtype == VITQ_S4;
  const bool dynamic = codes && a.row_scale, exact = codes && (dynamic || a.norm == VITQ_NO_NORM);

  RowsLaunch p{};
  p.a = a;
  if (codes && !dynamic) p.code = make_static(a.scale, a.zero, a.qmin, a.qmax);
  p.factor = codes && !exact ? p.code.s.inverse : 1.0f;
  p.inverse_columns = 1.0f / float(a.columns);
  p.qmin = float(a.qmin);
  p.qmax = float(a.qmax);
  p.fill = dynamic ? 0 : std::clamp(a.zero, a.qmin, a.qmax) & 0xFF;
  const auto flat = [&](const VitqMatrix& matrix) {
    return !matrix.data || matrix.group_stride == a.rows_per_group * matrix.row_stride;
  };
  p.by_group = divisor(std::max(a.rows_per_group, 1));
  p.by_merge_width = divisor((a.merge_width + 1) / 2 + !a.merge_width);
  p.by_merge_height = divisor((a.merge_height + 1) / 2 + (a.merge_height < 1));
  p.flat = a.rows_per_group <= 0 || a.rows_per_group >= a.m || (flat(a.x) && flat(a.residual) && flat(a.sum));
  p.aligned_order = aligned(a.order, 16);

  const auto same = [&](const VitqMatrix& matrix) {
    return !matrix.data || (matrix.dtype == a.x.dtype && vectors_of(matrix, p.flat));
  };
  const bool merged = a.merge_width > 0;
  bool eights = a.columns % (merged ? 32 : 8) == 0 && (merged ? aligned(a.x.data, 16) : vectors_of(a.x, p.flat)) &&
                same(a.residual) && same(a.sum) && aligned(a.weight, 16) && aligned(a.bias, 16);
  eights &= a.columns <= (merged ? MOST_MERGED : 32 * wide_threads(width(a.x.dtype)));
  bool staged = a.order || a.fp_out;
  if (codes) {
    const int whole = packed ? 4 : 8;  // bytes of eight codes
    p.aligned_out = aligned(a.out, whole / 2) && a.out_stride % (whole / 2) == 0;
    staged |= !aligned(a.out, whole) || a.out_stride % whole;
  } else {
    eights &= aligned(a.out, 16) && a.out_stride * width(a.out_dtype) % 16 == 0;
  }

  int device, processors, most;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error) return error;

  Lanes kind = WARP;
  int vectors = 4, threads = THREADS;
  if (eights) {
    // 3 vectors a lane fit 96, 192, 384, 768 and 1536 columns without idle lanes; 4, or 2 where codes are staged, the powers of 2.
    const int pieces = a.columns / 8;
    const auto lanes = [&](int each) {
      int n = 4;
      while (n < 32 && n * each < pieces) n *= 2;
      return n * each >= pieces ? n : (pieces + 32 * each - 1) / (32 * each) * 32;
    };
    const int two = lanes(2), three = lanes(3), four = lanes(4);
    const bool fits = three <= THREADS && (staged || ((three <= 32 || four > 32) && 3 * three <= 4 * four));
    vectors = staged && two <= THREADS && 2 * two < 3 * three ? 2 : fits ? 3 : 4;
    p.lanes = vectors == 2 ? two : fits ? three : four;
    kind = p.lanes <= 32 ? WARP : p.lanes <= THREADS && (fits || !staged) ? BLOCK : WIDE;
  } else {
    staged = true;
    kind = a.columns <= ANY_COLUMNS ? WARP : WIDE;
    p.lanes = kind == WARP ? 32 : ANY_THREADS;
  }
  if (kind != WARP) threads = p.lanes;
  else while (threads > 32 && int64_t(a.m) * p.lanes < int64_t(processors) * threads) threads /= 2;  // few rows: all processors
  while (1 << p.lane_shift < p.lanes) p.lane_shift++;

  const auto round = [](int bytes) { return (bytes + 15) / 16 * 16; };
  int shared = 0;
  if (staged && codes) {
    p.halves = round(eights && kind != WIDE ? 4 * a.columns + 4 : a.columns + 4);
    p.slot_bytes = p.halves + (a.fp_out ? round(2 * a.columns) : 0);
    shared = threads / p.lanes * p.slot_bytes;
  }
  if (!eights) {
    void (*kernel)(RowsLaunch) = kind == WIDE ? rows_any_kernel
                                 : a.columns <= ANY_COLUMNS / 2 ? rows_any_warp_kernel<16> : rows_any_warp_kernel<32>;
    return launch(kernel, p, threads, shared, stream);
  }
  const auto run = [&](auto type) {
    using T = decltype(type);
    const int ring = DEPTH * vectors * threads * 8 * int(sizeof(T)) * (a.residual.data ? 2 : 1);
    p.direct = kind == WIDE && shared + ring > most - 1024;
    p.ring = shared;
    const int all = p.direct ? shared : shared + ring;
    return !exact ? choose<T, FOLDED>(p, kind, vectors, staged, threads, all, stream)
           : a.norm == VITQ_NO_NORM ? choose<T, DIVIDED>(p, kind, vectors, staged, threads, all, stream)
                                    : choose<T, NORMED>(p, kind, vectors, staged, threads, all, stream);
  };
  return a.x.dtype == VITQ_F16 ? run(__half()) : a.x.dtype == VITQ_BF16 ? run(__nv_bfloat16()) : run(float());
}
