/* Shared by every kernel: the C ABI's constants and the AVX-512 pieces that
 * quantization is made of.
 *
 * The file is compiled for plain x86-64. Each function that uses AVX-512 says so
 * with VITQ_AVX512, so the library loads on any x86-64 machine and the caller
 * asks vitq_cpu_supported() before it calls anything else. */
#ifndef VITQ_COMMON_H
#define VITQ_COMMON_H

#include <stdint.h>

#define VITQ_ABI_VERSION 2
#define VITQ_API __attribute__((visibility("default")))

enum vitq_status { VITQ_OK = 0, VITQ_BAD_ARGUMENT = 1, VITQ_NO_MEMORY = 2 };
enum vitq_dtype { VITQ_FP32 = 0, VITQ_BF16 = 1, VITQ_U8 = 2 };

#if defined(__x86_64__) && defined(__GNUC__)
#define VITQ_X86 1

#include <immintrin.h>
#include <stdlib.h>

#define VITQ_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
/* Inlined by force: callers pass constants (dtype, tile width) that must fold away. */
#define VITQ_INLINE static inline __attribute__((always_inline)) VITQ_AVX512

#define LANES 16 /* fp32 or int32 values in one zmm register */

static inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

static inline int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }

/* Lanes of the vector that starts `remaining` values before the end of a row. */
VITQ_INLINE __mmask16 lane_mask(int64_t remaining) {
    return remaining >= LANES ? (__mmask16)0xFFFF : (__mmask16)((1u << remaining) - 1);
}

VITQ_INLINE __m512 load_floats(const void *row, int dtype, int64_t column, __mmask16 lanes) {
    if (dtype == VITQ_FP32) return _mm512_maskz_loadu_ps(lanes, (const float *)row + column);
    /* bf16 is the upper half of an fp32 */
    __m256i halves = _mm256_maskz_loadu_epi16(lanes, (const uint16_t *)row + column);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

VITQ_INLINE void store_bf16(uint16_t *out, __m512 x, __mmask16 lanes) {
    /* Round half to even on the bit pattern, like torch; avx512_bf16's conversion
     * flushes subnormals and would be one more CPU feature to require. NaN never
     * gets here: attention outputs are finite integers times a finite factor. */
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    _mm256_mask_storeu_epi16(out, lanes, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

/* u8 code = clamp(rne(x / scale) + zero_point, lo, hi), everything in unsigned
 * units (signed code + 128). */
typedef struct {
    __m512 scale, lo, hi;
    __m512i zero_point;
} quantizer;

VITQ_INLINE quantizer make_quantizer(float scale, int32_t zero_point, int32_t lo, int32_t hi) {
    quantizer q = {_mm512_set1_ps(scale), _mm512_set1_ps((float)(lo - zero_point)),
                   _mm512_set1_ps((float)(hi - zero_point)), _mm512_set1_epi32(zero_point)};
    return q;
}

/* Clamping before rounding gives the same code as after it, because the bounds are
 * integers, and keeps huge values inside int32. It divides: multiplying by 1 / scale
 * would move ties. The order of max's operands matters: with a NaN it returns the
 * second, so NaN becomes the code `lo`. */
VITQ_INLINE __m128i quantize_lanes(__m512 x, const quantizer *q) {
    __m512 steps = _mm512_div_ps(x, q->scale);
    steps = _mm512_min_ps(_mm512_max_ps(steps, q->lo), q->hi);
    __m512i code = _mm512_cvt_roundps_epi32(steps, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_cvtepi32_epi8(_mm512_add_epi32(code, q->zero_point));
}

/* Running |x| maximum on the bit patterns: non-negative floats order like integers,
 * and a NaN is larger than infinity there, so it survives as torch's amax lets it. */
VITQ_INLINE __m512i amax_lanes(__m512i amax, __m512 x) {
    return _mm512_max_epu32(amax, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF)));
}

/* RANGE_MIN of vitq/formats.py: keeps the scale of an all-zero row positive. */
#define VITQ_RANGE_MIN 1e-12f

/* Symmetric scale of one row. */
VITQ_INLINE float row_scale(__m512i amax_bits, int32_t qmax) {
    float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)_mm512_reduce_max_epu32(amax_bits))));
    if (amax < VITQ_RANGE_MIN) amax = VITQ_RANGE_MIN; /* false for NaN, which stays */
    return amax / (float)qmax;
}

#endif /* x86-64 */
#endif
