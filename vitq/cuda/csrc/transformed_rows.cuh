// Parts of the kernels that make rows before they quantize them (transformed_rows.cu, kronecker.cu): gates, and what a row's range makes of it.
#pragma once

#include "rows.cuh"

namespace vitq {

// What the host adds to the arguments.
struct TransformedLaunch {
  VitqTransformedRows a;
  float qmin, qmax, inverse_columns;
  bool eights;       // x can be read 16 bytes at a time, and rows of X hold whole groups of eight
  bool words;        // codes can be written four at a time
  // kronecker.cu
  Divisor by_row;    // vectors of a row of X
  int32_t rows, right_tiles, left_tiles, row_tiles;  // rows of X; steps of 16 of the first and the second product's sums, and of X's rows
  int32_t items, warps, groups;  // pieces of a token that one warp works on; warps of a token and tokens of a block
  int32_t pitch;     // halves of a row of X in shared memory
  int32_t left, tokens, token_bytes, staged, scratch;  // places in shared memory; staged: of the row to come, from a token's place on, or 0
};

// kronecker.cu
int launch_kronecker(TransformedLaunch& p, cudaStream_t stream);
int plan_kronecker(TransformedLaunch& p, int processors, int shared);

__device__ __forceinline__ float rounded(__half, float x) { return __half2float(__float2half_rn(x)); }
__device__ __forceinline__ float rounded(__nv_bfloat16, float x) { return __bfloat162float(__float2bfloat16_rn(x)); }
__device__ __forceinline__ float rounded(float, float x) { return x; }

// x / (1 + exp(-factor)), by the special-function unit: within a few units of float32's last place, which the rounding after it hides.
__device__ __forceinline__ float times_sigmoid(float x, float factor) { return __fdividef(x, 1.0f + __expf(fminf(-factor, 80.0f))); }

__device__ __forceinline__ float activated(float x, int gate) {
  if (gate == VITQ_SILU) return times_sigmoid(x, x);
  if (gate == VITQ_GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  if (gate == VITQ_GELU_TANH) return times_sigmoid(x, 1.59576912f * fmaf(0.044715f * x * x, x, x));  // (1 + tanh(z)) / 2 is sigmoid(2 z)
  return fmaxf(x, 0.0f);
}

// act(gate)·up as torch gives it for tensors of T, in place of the gate.
template <class T, int N>
__device__ __forceinline__ void apply_gate(float (&x)[N], const float (&up)[N], int gate) {
#pragma unroll
  for (int w = 0; w < N; ++w) x[w] = rounded(T(), rounded(T(), activated(x[w], gate)) * up[w]);
}

// Floats as integers of the same order, and back.
__device__ __forceinline__ int order_of(float x) {
  const int bits = __float_as_int(x);
  return bits ^ (bits >> 31 & 0x7FFFFFFF);
}
__device__ __forceinline__ float of_order(int key) { return __int_as_float(key ^ (key >> 31 & 0x7FFFFFFF)); }

// The code of x is the low byte of clamp(x - start, low, high) / scale + magic.
struct ClippedRange {
  Scale s;
  float start, low, high, magic, shift;
};

// Of a row's least and largest value, as vitq/quantizers/uniform.py has it.
__device__ __forceinline__ ClippedRange clipped_range(const TransformedLaunch& p, float lo, float hi) {
  const float* clip = p.a.clip;
  if (p.a.row_shift) {
    if (clip) lo = __fmul_rn(fminf(lo, 0.0f), clip[0]), hi = __fmul_rn(fmaxf(hi, 0.0f), clip[1]);
    const RowRange range = make_range(lo, hi, p.qmin, p.qmax);
    return {range.s, lo, 0.0f, range.span, MAGIC + p.qmin, shift_of(range)};  // qmin is even: it changes no tie
  }
  const float most = clip ? fmaxf(__fmul_rn(-lo, clip[0]), __fmul_rn(hi, clip[1])) : fmaxf(-lo, hi);
  const Scale s = make_scale(__fdiv_rn(fmaxf(most, RANGE_MIN), p.qmax));
  return {s, 0.0f, p.qmin * s.scale, p.qmax * s.scale, MAGIC, 0.0f};
}

__device__ __forceinline__ void store_range(const TransformedLaunch& p, unsigned row, const ClippedRange& range) {
  p.a.row_scale[row] = range.s.scale;
  if (p.a.row_shift) p.a.row_shift[row] = range.shift;
}

__device__ __forceinline__ float clamped(float x, const ClippedRange& r) { return fminf(fmaxf(__fsub_rn(x, r.start), r.low), r.high); }

}  // namespace vitq
