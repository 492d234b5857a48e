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
  // kronecker.cu, kronecker_left.cu and kronecker_sm90.cu
  Divisor by_row;    // vectors of a row of X
  bool fours;        // kronecker_sm90.cu: vectors are of four numbers, since rows of X hold an odd number of these
  int32_t rows, columns, right_tiles, left_tiles;  // of X; steps of 16 of the first and the second product's sums
  int32_t items, warps, groups;  // pieces of a token that one warp works on; warps of a token and tokens of a block
  int32_t pitch;     // halves of a row of X in shared memory; kronecker_sm90.cu: of a piece of eight columns
  int32_t left, tokens, token_bytes, scratch;  // places in shared memory
  int32_t staged, stages, stage_bytes;  // rows to come, from a token's place on; 0 stages where there is no room
  // Whether a team works on what the stages happen to hold, and writes nothing, before it waits for the kernels before. Of few rows each is on a multiprocessor that
  // has not seen the kernel's instructions for long, and weights have driven them from the L2: for a token of Llama-2-7B norms with 64 x 64 took 5.0 us after what
  // was before them and take 4.2 (H200). A gate comes after the largest product, whose blocks leave no room to start early: it
  // took 6.7 us, and 9.8 with a rehearsal. Where kernels do not start early there is no time for one.
  bool rehearses;
};

// kronecker.cu
int launch_kronecker(TransformedLaunch& p, cudaStream_t stream);
int plan_kronecker(TransformedLaunch& p, int processors, int shared);
// kronecker_left.cu and kronecker_sm90.cu, of a launch that is planned; VITQ_UNSUPPORTED where kronecker.cu is for it
int launch_kronecker_left(const TransformedLaunch& p, cudaStream_t stream);
struct Gpu;
int launch_kronecker_sm90(TransformedLaunch p, const Gpu& gpu, cudaStream_t stream);

// By the special-function unit, within a few units of float32's last place, which the rounding after it hides.
__device__ __forceinline__ float sigmoid(float x) {
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-1.44269504f * x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
  return inverse;
}

template <int GATE>
__device__ __forceinline__ float activated(float x) {
  if constexpr (GATE == VITQ_SILU) return x * sigmoid(x);
  else if constexpr (GATE == VITQ_GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  else if constexpr (GATE == VITQ_GELU_TANH) return x * sigmoid(1.59576912f * fmaf(0.044715f * x * x, x, x));  // (1 + tanh(z)) / 2
  else return fmaxf(x, 0.0f);
}

// act(gate)·up as torch gives it for tensors of T: each rounded to T. The product of two 16-bit numbers is rounded once.
__device__ __forceinline__ uint32_t product(__half, float a, float b, uint32_t up) {
  const __half2 y = __hmul2(__floats2half2_rn(a, b), *reinterpret_cast<const __half2*>(&up));
  return *reinterpret_cast<const uint32_t*>(&y);
}
__device__ __forceinline__ uint32_t product(__nv_bfloat16, float a, float b, uint32_t up) {
  const __nv_bfloat162 y = __hmul2(__floats2bfloat162_rn(a, b), *reinterpret_cast<const __nv_bfloat162*>(&up));
  return *reinterpret_cast<const uint32_t*>(&y);
}

template <int GATE, class T>
__device__ __forceinline__ void gate_eight(Eight<T>& gate, const Eight<T>& up) {
  float x[8];
  to_floats(gate, x);
#pragma unroll
  for (int w = 0; w < 8; ++w) x[w] = activated<GATE>(x[w]);
  if constexpr (sizeof(T) == 4) {
    float y[8];
    to_floats(up, y);
    const auto bits = [&](int w) { return __float_as_uint(x[w] * y[w]); };
    gate.q[0] = make_uint4(bits(0), bits(1), bits(2), bits(3)), gate.q[1] = make_uint4(bits(4), bits(5), bits(6), bits(7));
  } else {
    const uint4 u = up.q[0];
    gate.q[0] = make_uint4(product(T(), x[0], x[1], u.x), product(T(), x[2], x[3], u.y), product(T(), x[4], x[5], u.z), product(T(), x[6], x[7], u.w));
  }
}

// In place of the gate.
template <class T>
__device__ __forceinline__ void apply_gate(Eight<T>& gate, const Eight<T>& up, int activation) {
  if (activation == VITQ_SILU) gate_eight<VITQ_SILU>(gate, up);
  else if (activation == VITQ_GELU) gate_eight<VITQ_GELU>(gate, up);
  else if (activation == VITQ_GELU_TANH) gate_eight<VITQ_GELU_TANH>(gate, up);
  else gate_eight<VITQ_RELU>(gate, up);
}

// Eight values of a row from `at` on, of which those up to column `columns` exist; the others are 0.
template <class T, bool EIGHTS>
__device__ __forceinline__ Eight<T> read_eight(const T* row, int at, int columns) {
  Eight<T> raw;
  if constexpr (EIGHTS) {
    load_eight<T>(raw, row, at);
  } else {
    alignas(16) T x[8];
#pragma unroll
    for (int w = 0; w < 8; ++w) x[w] = at + w < columns ? row[at + w] : T(0.0f);
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); ++i) raw.q[i] = reinterpret_cast<const uint4*>(x)[i];
  }
  return raw;
}

// The same of act(gate)·up.
template <class T, bool EIGHTS, class Arguments>
__device__ __forceinline__ Eight<T> read_gated(const Arguments& a, const T* row, int at) {
  Eight<T> gate = read_eight<T, EIGHTS>(row, at, a.columns);
  apply_gate<T>(gate, read_eight<T, EIGHTS>(row + a.columns, at, a.columns), a.gate);
  return gate;
}

// (x - mean)·rstd·weight + bias of the columns from `at` on.
template <bool EIGHTS, class Arguments>
__device__ __forceinline__ void normalise(const Arguments& a, float (&x)[8], int at, float mean, float rstd) {
  const auto constants = [&](const float* from, float otherwise, float (&to)[8]) {
#pragma unroll
    for (int w = 0; w < 8; ++w) to[w] = otherwise;
    if (!from) return;
    if constexpr (EIGHTS) {
      Eight<float> raw;
      load_eight<float>(raw, from, at);
      to_floats(raw, to);
    } else {
#pragma unroll
      for (int w = 0; w < 8; ++w) to[w] = at + w < a.columns ? from[at + w] : 0.0f;
    }
  };
  float weight[8], bias[8];
  constants(a.weight, 1.0f, weight), constants(a.bias, 0.0f, bias);
#pragma unroll
  for (int w = 0; w < 8; ++w) x[w] = fmaf((x[w] - mean) * rstd, weight[w], bias[w]);
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

__device__ __forceinline__ float2 clip_of(const VitqTransformedRows& a) { return a.clip ? make_float2(a.clip[0], a.clip[1]) : make_float2(1.0f, 1.0f); }

// Of a row's least and largest value, as vitq/quantizers/uniform.py has it.
__device__ __forceinline__ ClippedRange clipped_range(const TransformedLaunch& p, const float2& clip, float lo, float hi) {
  if (p.a.row_shift) {
    if (p.a.clip) lo = __fmul_rn(fminf(lo, 0.0f), clip.x), hi = __fmul_rn(fmaxf(hi, 0.0f), clip.y);
    const RowRange range = make_range(lo, hi, p.qmin, p.qmax);
    return {range.s, lo, 0.0f, range.span, MAGIC + p.qmin, shift_of(range)};  // qmin is even: it changes no tie
  }
  const float most = fmaxf(__fmul_rn(-lo, clip.x), __fmul_rn(hi, clip.y));
  const Scale s = make_scale(__fdiv_rn(fmaxf(most, RANGE_MIN), p.qmax));
  return {s, 0.0f, p.qmin * s.scale, p.qmax * s.scale, MAGIC, 0.0f};
}

__device__ __forceinline__ void store_range(const TransformedLaunch& p, unsigned row, const ClippedRange& range) {
  p.a.row_scale[row] = range.s.scale;
  if (p.a.row_shift) p.a.row_shift[row] = range.shift;
}

__device__ __forceinline__ float clamped(float x, const ClippedRange& r) { return fminf(fmaxf(__fsub_rn(x, r.start), r.low), r.high); }

// store(f), where f(x) is the code of x by a rounded quotient: one multiplication in place of an exact division, which makes no difference in kind where x is a sum
// that was rounded itself.
template <class Store>
__device__ __forceinline__ void with_rounded_codes(const TransformedLaunch& p, const ClippedRange& range, const Store& store) {
  if (p.a.row_shift) store([&](float x) { return fmaf(clamped(x, range), range.s.inverse, range.magic); });
  else store([&](float x) { return fmaf(fminf(fmaxf(x, range.low), range.high), range.s.inverse, MAGIC); });
}

}  // namespace vitq
