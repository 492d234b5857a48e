// Rows of any number of columns, alignment and mixture of dtypes, one value at a time. rows.cu takes the cases that come in
// eights.
#pragma once

#include "launch.cuh"
#include "rows.cuh"

namespace vitq {

constexpr int ANY_THREADS = 256;
constexpr int ANY_COLUMNS = 1024;  // up to which a row lies in the registers of a warp

// What a kernel here makes of a row.
struct AnyRow {
  bool floats, dynamic, ranged, folded, chosen;

  __device__ explicit AnyRow(const VitqRows& a)
      : floats(a.out_dtype != VITQ_S8 && a.out_dtype != VITQ_S4),
        dynamic(!floats && a.row_scale),
        ranged(!floats && a.row_shift),
        folded(!floats && !dynamic && a.norm != VITQ_NO_NORM),
        chosen(dynamic && a.order) {}

  // The norm's result, or x where there is none.
  __device__ __forceinline__ float result(const VitqRows& a, float x, int c, float mean, float rstd) const {
    if (a.norm == VITQ_NO_NORM && !floats) return x;
    const float weight = a.weight ? __ldg(a.weight + c) : 1.0f, bias = a.bias ? __ldg(a.bias + c) : 0.0f;
    return fmaf((x - mean) * rstd, weight, bias);
  }

  __device__ __forceinline__ uint8_t code(const RowsLaunch& p, float y, const Scale& scale, const RowRange& range) const {
    const float code = ranged ? ranged_code(y, range) : dynamic ? symmetric_code(y, scale)
                       : folded ? folded_code(fmaf(y, p.factor, p.code.zero), p.qmin, p.qmax) : static_code(y, p.code);
    return uint8_t(__float_as_uint(code));
  }
};

// One value of a row of x, zero where patch merging has none.
__device__ __forceinline__ float load_x(const RowsLaunch& p, const Place& at, int absent, int c) {
  int64_t along;
  const int part = locate(p, c, along);
  return part & absent ? 0.0f : load_one(p.a.x.data, p.a.x.dtype, at.offset + along);
}

// A block shares a row and reads it again from the caches for each of its passes.
__global__ void __launch_bounds__(ANY_THREADS) rows_any_kernel(const __grid_constant__ RowsLaunch p) {
  start_dependents();
  wait_for_kernels_before();
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ uint32_t meeting[2][32];
  const VitqRows& a = p.a;
  const AnyRow kind(a);
  const int lane = threadIdx.x;
  RowReduce<true> reduce{p.lanes, meeting, 0};
  uint8_t* codes = shared;
  auto* halves = reinterpret_cast<__half*>(codes + p.halves);

  for (unsigned row = blockIdx.x; row < unsigned(a.m); row += gridDim.x) {
    const Place at = place(p, row);
    const int absent = missing(p, at);
    const int64_t residual = a.residual.data ? row_offset(p, a.residual, row) : 0;
    const int64_t sum_row = a.sum.data ? row_offset(p, a.sum, row) : 0;
    const auto value = [&](int c) {
      float x = load_x(p, at, absent, c);
      if (a.residual.data) x = __fadd_rn(x, load_one(a.residual.data, a.residual.dtype, residual + c));
      return x;
    };

    float mean = 0.0f, rstd = 1.0f;
    if (a.norm == VITQ_LAYER_NORM) {
      float sum = 0.0f;
      for (int c = lane; c < a.columns; c += p.lanes) sum += value(c);
      sum = reduce(sum, Sum());
      mean = sum * p.inverse_columns;
      mean = fmaf(fmaf(-mean, float(a.columns), sum), p.inverse_columns, mean);
    }
    if (a.norm != VITQ_NO_NORM) {
      float squares = 0.0f;
      for (int c = lane; c < a.columns; c += p.lanes) {
        const float centred = value(c) - mean;
        squares = fmaf(centred, centred, squares);
      }
      rstd = rsqrtf(fmaf(reduce(squares, Sum()), p.inverse_columns, a.eps));
    }

    Scale scale{};
    RowRange range{};
    if (kind.ranged) {
      float lo = INFINITY, hi = -INFINITY;
      for (int c = lane; c < a.columns; c += p.lanes) {
        if (kind.chosen && !(__ldg(a.counted + c / 8) >> (c % 8) & 1)) continue;
        const float y = kind.result(a, value(c), c, mean, rstd);
        lo = fminf(lo, y), hi = fmaxf(hi, y);
      }
      lo = reduce(lo, Least());
      range = make_range(lo, reduce(hi, Largest()), p.qmin, p.qmax);
      if (lane == 0) a.row_scale[row] = range.s.scale, a.row_shift[row] = shift_of(range);
    } else if (kind.dynamic) {
      float largest = 0.0f;
      for (int c = lane; c < a.columns; c += p.lanes)
        if (!kind.chosen || __ldg(a.counted + c / 8) >> (c % 8) & 1)
          largest = fmaxf(largest, fabsf(kind.result(a, value(c), c, mean, rstd)));
      scale = make_scale(__fdiv_rn(fmaxf(reduce(largest, Largest()), RANGE_MIN), p.qmax));
      if (lane == 0) a.row_scale[row] = scale.scale;
    }
    // Sum and result may lie where x or the residual do: a thread writes what it alone reads, and now for the last time.
    for (int c = lane; c < a.columns; c += p.lanes) {
      const float x = value(c), y = kind.result(a, x, c, mean, rstd);
      if (a.sum.data) store_one(a.sum.data, a.sum.dtype, sum_row + c, x);
      if (kind.floats) {
        store_one(a.out, a.out_dtype, row * a.out_stride + c, y);
        continue;
      }
      if (a.fp_out) halves[c] = to_half(y);
      codes[c] = kind.code(p, y, scale, range);
    }
    if (kind.floats) continue;
    __syncthreads();
    gather<1>(p, codes, row, 0, 1, lane);
    if (a.fp_out) gather_fp(p, halves, row, lane);
    __syncthreads();
  }
}

// Rows of up to 32 V columns, in registers: each warp has its own.
template <int V>
__global__ void __launch_bounds__(ANY_THREADS) rows_any_warp_kernel(const __grid_constant__ RowsLaunch p) {
  start_dependents();
  wait_for_kernels_before();
  extern __shared__ __align__(16) uint8_t shared[];
  const VitqRows& a = p.a;
  const AnyRow kind(a);
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  RowReduce<false> reduce{32, nullptr, 0};
  uint8_t* codes = shared + group * p.slot_bytes;
  auto* halves = reinterpret_cast<__half*>(codes + p.halves);
  const bool plain = !a.order && a.out_dtype == VITQ_S8;  // codes leave as they lie
  const auto used = [&](int v) { return lane + 32 * v < a.columns; };
  const auto done = [&](int v) { return 32 * v >= a.columns; };  // for all lanes

  for (unsigned row = blockIdx.x * (blockDim.x / 32) + group; row < unsigned(a.m); row += gridDim.x * (blockDim.x / 32)) {
    float x[V];
    const Place at = place(p, row);
    const int absent = missing(p, at);
    if (a.merge_width) {
#pragma unroll
      for (int v = 0; v < V; v++) x[v] = used(v) ? load_x(p, at, absent, lane + 32 * v) : 0.0f;
    } else {
      load_strided<V>(a.x, at.offset + lane, a.columns - lane, x);
    }
    if (a.residual.data) {
      float r[V];
      load_strided<V>(a.residual, row_offset(p, a.residual, row) + lane, a.columns - lane, r);
#pragma unroll
      for (int v = 0; v < V; v++) x[v] = __fadd_rn(x[v], r[v]);
    }
    if (a.sum.data) {
      const int64_t to = row_offset(p, a.sum, row) + lane;
#pragma unroll
      for (int v = 0; v < V; v++)
        if (!done(v) && used(v)) store_one(a.sum.data, a.sum.dtype, to + 32 * v, x[v]);
    }

    float mean = 0.0f, rstd = 1.0f;
    if (a.norm == VITQ_LAYER_NORM) {
      float sum = 0.0f;
#pragma unroll
      for (int v = 0; v < V; v++) sum += x[v];
      sum = reduce(sum, Sum());
      mean = sum * p.inverse_columns;
      mean = fmaf(fmaf(-mean, float(a.columns), sum), p.inverse_columns, mean);
    }
    if (a.norm != VITQ_NO_NORM) {
      float squares = 0.0f;
#pragma unroll
      for (int v = 0; v < V; v++) {
        const float centred = used(v) ? x[v] - mean : 0.0f;
        squares = fmaf(centred, centred, squares);
      }
      rstd = rsqrtf(fmaf(reduce(squares, Sum()), p.inverse_columns, a.eps));
    }
#pragma unroll
    for (int v = 0; v < V; v++)
      if (!done(v) && used(v)) x[v] = kind.result(a, x[v], lane + 32 * v, mean, rstd);

    Scale scale{};
    RowRange range{};
    if (kind.ranged) {
      float lo = INFINITY, hi = -INFINITY;
#pragma unroll
      for (int v = 0; v < V; v++) {
        const int c = lane + 32 * v;
        if (!done(v) && used(v) && (!kind.chosen || __ldg(a.counted + c / 8) >> (c % 8) & 1)) lo = fminf(lo, x[v]), hi = fmaxf(hi, x[v]);
      }
      lo = reduce(lo, Least());
      range = make_range(lo, reduce(hi, Largest()), p.qmin, p.qmax);
      if (lane == 0) a.row_scale[row] = range.s.scale, a.row_shift[row] = shift_of(range);
    } else if (kind.dynamic) {
      float largest = 0.0f;
#pragma unroll
      for (int v = 0; v < V; v++) {
        const int c = lane + 32 * v;
        if (!done(v) && used(v) && (!kind.chosen || __ldg(a.counted + c / 8) >> (c % 8) & 1)) largest = fmaxf(largest, fabsf(x[v]));
      }
      scale = make_scale(__fdiv_rn(fmaxf(reduce(largest, Largest()), RANGE_MIN), p.qmax));
      if (lane == 0) a.row_scale[row] = scale.scale;
    }
    if (kind.floats) {
#pragma unroll
      for (int v = 0; v < V; v++)
        if (!done(v) && used(v)) store_one(a.out, a.out_dtype, row * a.out_stride + lane + 32 * v, x[v]);
      continue;
    }
    // Codes lie in shared memory as far from a multiple of 4 as their row in memory does: they leave by words.
    uint8_t* out = static_cast<uint8_t*>(a.out) + row * a.out_stride;
    const int beyond = plain ? int(reinterpret_cast<uintptr_t>(out) % 4) : 0;
#pragma unroll
    for (int v = 0; v < V; v++) {
      if (done(v) || !used(v)) continue;
      if (a.fp_out) halves[lane + 32 * v] = to_half(x[v]);
      codes[beyond + lane + 32 * v] = kind.code(p, x[v], scale, range);
    }
    __syncwarp();
    if (plain) {
      for (int c = 4 * lane - beyond; c < a.columns; c += 128) {
        const uint32_t word = *reinterpret_cast<const uint32_t*>(codes + beyond + c);
        if (c >= 0 && c + 4 <= a.columns) {
          *reinterpret_cast<uint32_t*>(out + c) = word;
        } else {
          for (int j = max(-c, 0); j < min(a.columns - c, 4); j++) out[c + j] = uint8_t(word >> (8 * j));
        }
      }
    } else {
      gather<1>(p, codes, row, 0, 1, lane);
    }
    if (a.fp_out) gather_fp(p, halves, row, lane);
    __syncwarp();
  }
}

}  // namespace vitq
