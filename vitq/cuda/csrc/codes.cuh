// Floats to integer codes, exactly as vitq/quantizers/uniform.py rounds: clamp(rint(x / scale) + zero), a true float32 division
// and half to even. Nothing here uses the quarter-rate conversions between float and int.
#pragma once

#include <cmath>
#include <cstdint>

namespace vitq {

// x + MAGIC leaves no bits for a fraction: the sum's low byte is rint(x)'s low byte, for |x| < 2^22.
constexpr float MAGIC = 12582912.0f;  // 1.5 · 2^23
constexpr float RANGE_MIN = 1e-12f;   // vitq.formats.RANGE_MIN

// A scale with 1 / scale in two floats: `inverse` correctly rounded, `rest` what is left of it.
struct Scale {
  float scale, inverse, rest;
};

__host__ __device__ inline Scale make_scale(float scale) {
#ifdef __CUDA_ARCH__
  const float inverse = __fdiv_rn(1.0f, scale);
#else
  const float inverse = 1.0f / scale;
#endif
  return {scale, inverse, fmaf(-inverse, scale, 1.0f) * inverse};
}

// What a static quantizer needs. Clamping x to [lo, hi] = (qmin - zero)·scale .. (qmax - zero)·scale clamps the code: the
// quotient of a bound is far closer than 0.5 to its integer, so it rounds to it, and rounding is monotone.
struct StaticCodes {
  Scale s;
  float lo, hi, zero;
};

inline StaticCodes make_static(float scale, int zero, int qmin, int qmax) {
  return {make_scale(scale), float(qmin - zero) * scale, float(qmax - zero) * scale, float(zero)};
}

// n / d for n < 2^31 by a multiplication (Granlund and Montgomery 1994).
struct Divisor {
  uint32_t multiplier, shift;
#ifdef __CUDACC__
  __device__ __forceinline__ uint32_t divide(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
#endif
};

inline Divisor divisor(uint32_t d) {
  uint32_t shift = 0;
  while ((uint64_t(1) << shift) < d) shift++;
  return {uint32_t((((uint64_t(1) << shift) - d) << 32) / d + 1), shift};
}

#ifdef __CUDACC__

// The correctly rounded x / scale in 4 operations where __fdiv_rn takes about 9 and a branch. The first two give a quotient
// within one unit of the last place, whose remainder is exact; one correction by the correctly rounded inverse then rounds
// correctly (Markstein 1990). |x / scale| must not overflow.
__device__ __forceinline__ float divide(float x, const Scale& s) {
  const float quotient = fmaf(x, s.inverse, __fmul_rn(x, s.rest));
  return fmaf(fmaf(-quotient, s.scale, x), s.inverse, quotient);
}

// The code is the low byte of the result's bits.
__device__ __forceinline__ float static_code(float x, const StaticCodes& c) {
  return __fadd_rn(__fadd_rn(divide(fminf(fmaxf(x, c.lo), c.hi), c.s), MAGIC), c.zero);
}

// The code of x where |x| <= qmax · scale already, so that nothing needs a clamp.
__device__ __forceinline__ float symmetric_code(float x, const Scale& s) { return __fadd_rn(divide(x, s), MAGIC); }

// What a dynamic asymmetric quantizer needs of a row: its least value and how far the largest is from it.
struct RowRange {
  Scale s;
  float lo, span, zero;  // zero: the code of lo
};

__device__ __forceinline__ RowRange make_range(float lo, float hi, float qmin, float qmax) {
  const float span = __fsub_rn(hi, lo);
  return {make_scale(__fdiv_rn(fmaxf(span, RANGE_MIN), qmax - qmin)), lo, span, qmin};
}

// What is added to code · scale: scale · -qmin is exact, -qmin being a power of 2.
__device__ __forceinline__ float shift_of(const RowRange& r) { return fmaf(-r.zero, r.s.scale, r.lo); }

__device__ __forceinline__ float ranged_code(float x, const RowRange& r) {
  return __fadd_rn(__fadd_rn(divide(fminf(fmaxf(__fsub_rn(x, r.lo), 0.0f), r.span), r.s), MAGIC), r.zero);
}

// The code of a value that is already divided and shifted.
__device__ __forceinline__ float folded_code(float y, float qmin, float qmax) {
  return __fadd_rn(fminf(fmaxf(y, qmin), qmax), MAGIC);
}

__device__ __forceinline__ uint32_t pack_codes(float a, float b, float c, float d) {
  const uint32_t low = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040);
  const uint32_t high = __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// Four codes to two bytes, low nibble first: bytes 0 and 2 of the result.
__device__ __forceinline__ uint32_t nibbles(uint32_t codes) {
  return (codes & 0x000F000Fu) | ((codes >> 4) & 0x00F000F0u);
}

#endif
}  // namespace vitq
