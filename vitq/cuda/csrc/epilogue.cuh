// What follows the integer product: scales, bias, activation, residual, and the cast or requantization to the output.
// Both GEMM kernels share it.
//
// Weight rows are stored permuted in groups of 32 (layout.py): physical column 8·j + 2·c + e of a group holds its logical
// column 8·c + 2·j + e (j, c in 0..3, e in 0..1). In the accumulators of m16n8 fragments a thread with lane % 4 == c has
// the columns 2·c + e of each of the four fragments j, so it owns eight neighbouring columns of the result: it loads its
// constants and stores its codes or halves as vectors, without shared memory and without shuffles. Four such threads fill
// whole 32-byte sectors of a row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

#include "vitq_cuda.h"

namespace vitq {

// What the epilogue of a kernel can do; a smaller one has fewer registers and branches.
enum Epilogue {
  FLOAT_OUT = 0,      // no activation, optional residual, float out
  CODES_OUT = 1,      // no activation, no residual, codes out (the format is folded into scale and bias)
  ACT_CODES_OUT = 2,  // activation, codes out
  ACT_FLOAT_OUT = 3,  // activation, optional residual, float out
};

inline int epilogue_of(const VitqLinear& p) {
  if (p.out.dtype == VITQ_S8) return p.activation == VITQ_NO_ACTIVATION ? CODES_OUT : ACT_CODES_OUT;
  return p.activation == VITQ_NO_ACTIVATION ? FLOAT_OUT : ACT_FLOAT_OUT;
}

// Runs f(the epilogue that p needs, as a constant).
template <class F>
int with_epilogue(const VitqLinear& p, const F& f) {
  switch (epilogue_of(p)) {
    case FLOAT_OUT: return f(std::integral_constant<int, FLOAT_OUT>{});
    case CODES_OUT: return f(std::integral_constant<int, CODES_OUT>{});
    case ACT_CODES_OUT: return f(std::integral_constant<int, ACT_CODES_OUT>{});
    default: return f(std::integral_constant<int, ACT_FLOAT_OUT>{});
  }
}

constexpr int COLUMNS = 8;  // that a thread owns in each group of 32

// GELU of y = GELU_UNIT·v: y·Φ(y), with Φ(y) ≈ 0.5 + v·Q(v²) for |v| <= 1; beyond that the saturations, which cost nothing,
// give exactly 0 and 1. The error is below 8e-6 of |y| up to |y| = 3.6, where Φ(y) is 1.6e-4 away from 0 or 1 and then
// exactly there, so it serves codes, not floats. Of normally distributed inputs of any width at most 0.025 % of the 8-bit codes differ from those of the exact
// function (tests/cuda/test_gelu.py). 11 instructions of the multiply-add pipe, where erff takes about 30; the special-function
// unit was no faster (two results, at a quarter of an SM's clock rate each).
constexpr float GELU_UNIT = 3.6f;

template <bool TANH>
__device__ __forceinline__ float gelu_of_units(float v) {
  constexpr float erf_[8] = {1.43608165f, -3.0964129f, 5.94230747f, -8.68515396f, 9.33982563f, -6.8839612f, 3.05193186f, -0.604784369f};
  constexpr float tanh_[8] = {1.43606067f, -3.11094737f, 6.07337761f, -9.14213943f, 10.1716681f, -7.73000145f, 3.50913858f, -0.707278967f};
  float u = __saturatef(v * v);
  float r = TANH ? fmaf(tanh_[7], u, tanh_[6]) : fmaf(erf_[7], u, erf_[6]);
#pragma unroll
  for (int i = 5; i >= 0; --i) r = fmaf(r, u, TANH ? tanh_[i] : erf_[i]);
  return v * __saturatef(fmaf(v, r, 0.5f));
}

// The activation of eight values in their own unit. EXACT: for float results, which show errors that codes do not.
template <bool EXACT>
__device__ __forceinline__ void activate8(int activation, float (&y)[COLUMNS]) {
  if (activation == VITQ_GELU) {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      if constexpr (EXACT) y[i] = 0.5f * y[i] * (1.0f + erff(y[i] * 0.70710678f));
      else y[i] = GELU_UNIT * gelu_of_units<false>(y[i] * (1.0f / GELU_UNIT));
    }
  } else if (activation == VITQ_GELU_TANH) {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      if constexpr (EXACT) y[i] = 0.5f * y[i] * (1.0f + tanhf(0.79788456f * (y[i] + 0.044715f * y[i] * y[i] * y[i])));
      else y[i] = GELU_UNIT * gelu_of_units<true>(y[i] * (1.0f / GELU_UNIT));
    }
  } else if (activation == VITQ_RELU) {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) y[i] = fmaxf(y[i], 0.0f);
  }
}

// Four saturated bytes, the first in the low one.
__device__ __forceinline__ uint32_t pack_s8(int a, int b, int c, int d) {
  uint32_t high, all;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(high) : "r"(d), "r"(c), "r"(0));
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(all) : "r"(b), "r"(a), "r"(high));
  return all;
}

// 12582912 = 1.5·2^23: adding it to |v| < 2^22 leaves round-half-even(v) in the low bits of the sum, at a quarter of the
// cost of a conversion instruction. The caller has checked the bound (kernels.py).
constexpr float ROUND_BIAS = 12582912.0f;
constexpr int ROUND_BITS = 0x4B400000;

// The integer in the low bits of a float that ROUND_BIAS was added to; NARROW: at the top of a byte of which `spare` bits are not
// used, so that saturation to a byte is saturation to the fewer bits.
template <bool NARROW>
__device__ __forceinline__ int rounded_code(float biased, int spare) {
  const int code = __float_as_int(biased) - ROUND_BITS;
  return NARROW ? code << spare : code;
}

// Four such codes from the top of their bytes to the bottom, with their signs.
__device__ __forceinline__ uint32_t narrow_bytes(uint32_t bytes, int spare) {
  const uint32_t low = bytes >> spare & 0x01010101u * (0xFFu >> spare), signs = low & 0x01010101u * (0x80u >> spare);
  return low | signs * ((2u << spare) - 2u);  // bits above the sign: those of (sign << 1) to (sign << spare)
}

struct RowAt {
  char* out;
  const char* residual;
  float scale;   // of the row, 1 for static inputs
  bool inside;
};

__device__ __forceinline__ int element_size(int dtype) { return dtype == VITQ_F32 ? 4 : dtype == VITQ_S8 ? 1 : 2; }

__device__ __forceinline__ RowAt row_at(const VitqLinear& p, int row) {
  RowAt at;
  at.inside = row < p.m;
  int safe = at.inside ? row : 0;
  int64_t group = 0, within = safe;
  if (p.rows_per_group < p.m) {
    group = safe / p.rows_per_group;
    within = safe - group * p.rows_per_group;
  }
  at.out = static_cast<char*>(p.out.data) + (group * p.out.group_stride + within * p.out.row_stride) * element_size(p.out.dtype);
  at.residual = p.residual.data == nullptr
                    ? nullptr
                    : static_cast<const char*>(p.residual.data) +
                          (group * p.residual.group_stride + within * p.residual.row_stride) * element_size(p.residual.dtype);
  at.scale = p.row_scale == nullptr ? 1.0f : p.row_scale[safe];
  return at;
}

// Whether eight columns can be moved as vectors: the host checks n, strides and addresses once.
inline bool vectors_fit(const VitqMatrix& x, int n) {
  int size = x.dtype == VITQ_F32 ? 4 : x.dtype == VITQ_S8 ? 1 : 2;
  int bytes = size == 1 ? 8 : 16;
  return x.data == nullptr || (n % COLUMNS == 0 && reinterpret_cast<uintptr_t>(x.data) % bytes == 0 &&
                               x.row_stride * size % bytes == 0 && x.group_stride * size % bytes == 0);
}

__device__ __forceinline__ void load8(const float* from, float (&to)[COLUMNS]) {
  float4 a = __ldg(reinterpret_cast<const float4*>(from)), b = __ldg(reinterpret_cast<const float4*>(from) + 1);
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

// Eight residual values of 16 bits, loaded early so that their latency is hidden; used by `finish8`.
__device__ __forceinline__ uint4 prefetch_residual(const RowAt& at, int column) {
  return *reinterpret_cast<const uint4*>(at.residual + 2 * column);
}

__device__ __forceinline__ void add_halves(uint4 packed, int dtype, float (&y)[COLUMNS]) {
  uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 pair = dtype == VITQ_F16 ? __half22float2(reinterpret_cast<__half2&>(words[i]))
                                    : __bfloat1622float2(reinterpret_cast<__nv_bfloat162&>(words[i]));
    y[2 * i] += pair.x, y[2 * i + 1] += pair.y;
  }
}

__device__ __forceinline__ float load_one(const char* from, int dtype, int column) {
  if (dtype == VITQ_F32) return reinterpret_cast<const float*>(from)[column];
  if (dtype == VITQ_F16) return __half2float(reinterpret_cast<const __half*>(from)[column]);
  return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(from)[column]);
}

__device__ __forceinline__ void add_residual8(const VitqLinear& p, const RowAt& at, int column, bool vectors, float (&y)[COLUMNS]) {
  if (vectors && p.residual.dtype != VITQ_F32) {
    add_halves(prefetch_residual(at, column), p.residual.dtype, y);
  } else {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i)
      if (column + i < p.n) y[i] += load_one(at.residual, p.residual.dtype, column + i);
  }
}

__device__ __forceinline__ uint32_t pack_halves(int dtype, float a, float b) {
  if (dtype == VITQ_F16) {
    __half2 h = __floats2half2_rn(a, b);
    return reinterpret_cast<uint32_t&>(h);
  }
  __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<uint32_t&>(h);
}

__device__ __forceinline__ void store_floats8(const VitqLinear& p, const RowAt& at, int column, bool vectors,
                                              const float (&y)[COLUMNS]) {
  if (vectors && p.out.dtype != VITQ_F32) {
    uint4 v;
    v.x = pack_halves(p.out.dtype, y[0], y[1]), v.y = pack_halves(p.out.dtype, y[2], y[3]);
    v.z = pack_halves(p.out.dtype, y[4], y[5]), v.w = pack_halves(p.out.dtype, y[6], y[7]);
    *reinterpret_cast<uint4*>(at.out + 2 * column) = v;
    return;
  }
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    if (column + i >= p.n) continue;
    if (p.out.dtype == VITQ_F32) reinterpret_cast<float*>(at.out)[column + i] = y[i];
    else if (p.out.dtype == VITQ_F16) reinterpret_cast<__half*>(at.out)[column + i] = __float2half_rn(y[i]);
    else reinterpret_cast<__nv_bfloat16*>(at.out)[column + i] = __float2bfloat16_rn(y[i]);
  }
}

// y: eight values in units of codes, the zero point added already.
__device__ __forceinline__ void store_codes8(const VitqLinear& p, const RowAt& at, int column, bool vectors,
                                             const float (&y)[COLUMNS]) {
  int code[COLUMNS];
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) code[i] = __float_as_int(y[i] + ROUND_BIAS) - ROUND_BITS;
  if (p.qmax < 127) {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) code[i] = min(max(code[i], p.qmin), p.qmax);
  }
  uint2 v = make_uint2(pack_s8(code[0], code[1], code[2], code[3]), pack_s8(code[4], code[5], code[6], code[7]));
  if (vectors) {
    *reinterpret_cast<uint2*>(at.out + column) = v;
    return;
  }
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i)
    if (column + i < p.n) at.out[column + i] = static_cast<char>((i < 4 ? v.x >> (8 * i) : v.y >> (8 * (i - 4))) & 255u);
}

// y: bias, scales, shifts and float segments are in it. `prefetched` holds the residual if `has_prefetched`.
template <int EPILOGUE>
__device__ __forceinline__ void finish8(const VitqLinear& p, const RowAt& at, int column, bool vectors, float (&y)[COLUMNS],
                                        uint4 prefetched = {}, bool has_prefetched = false) {
  if (!at.inside || column >= p.n) return;
  if constexpr (EPILOGUE == ACT_CODES_OUT || EPILOGUE == ACT_FLOAT_OUT) activate8<EPILOGUE == ACT_FLOAT_OUT>(p.activation, y);
  if constexpr (EPILOGUE == FLOAT_OUT || EPILOGUE == ACT_FLOAT_OUT) {
    if (has_prefetched) add_halves(prefetched, p.residual.dtype, y);
    else if (at.residual != nullptr) add_residual8(p, at, column, vectors, y);
    store_floats8(p, at, column, vectors, y);
  } else {
    if constexpr (EPILOGUE == ACT_CODES_OUT) {
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) y[i] = fmaf(y[i], p.out_inverse, p.out_zero);
    }
    store_codes8(p, at, column, vectors, y);
  }
}

// One row's part of a segment: y = fma(acc·r, scale, y). Plain multiplication by the row's scale first, as the reference has it; with a static input r is 1 and changes nothing.
__device__ __forceinline__ void accumulate8(const int (&acc)[COLUMNS], float row_scale, bool has_row_scale,
                                            const float (&scale)[COLUMNS], float (&y)[COLUMNS]) {
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    float value = __int2float_rn(acc[i]);
    if (has_row_scale) value = __fmul_rn(value, row_scale);
    y[i] = fmaf(value, scale[i], y[i]);
  }
}

// The share of what is added to all numbers of a row, before any segment.
__device__ __forceinline__ void shift8(float row_shift, const float (&column_sums)[COLUMNS], float (&y)[COLUMNS]) {
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) y[i] = fmaf(row_shift, column_sums[i], y[i]);
}

}  // namespace vitq
