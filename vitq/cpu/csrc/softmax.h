/* One row of softmax: int32 q.k accumulators in, u8 probability codes out. */
#ifndef VITQ_SOFTMAX_H
#define VITQ_SOFTMAX_H

#include "common.h"

#ifdef VITQ_X86

#include <math.h>

/* exp(x) for x <= 0, relative error below 2e-7. Zero below -87 (the true value is
 * under 2e-38 there, next to a row maximum of 1), which avoids subnormals and takes
 * in -inf; NaN gives zero too. exp(0) is exactly 1. */
VITQ_INLINE __m512 exp_lanes(__m512 x) {
    __mmask16 nonzero = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    /* r = x - n ln2, in two parts so that the product n * hi is exact */
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    /* minimax of (e^r - 1 - r) / r^2 on |r| <= ln2 / 2, weighted for relative error */
    __m512 p = _mm512_set1_ps(0x1.6a23cep-10f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.123a2p-7f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.5558f2p-5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.555492p-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0x1.fffffcp-2f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_maskz_scalef_ps(nonzero, p, n);
}

/* logit = accumulator * scale + offset + bias + mask. The bias and mask rows may be NULL. */
typedef struct {
    float scale, offset;
    const float *bias, *mask;
} logit_terms;

typedef struct {
    float e_sum;     /* sum of exp(logit - max) */
    int32_t p_sum;   /* sum of the codes */
} softmax_sums;

/* Turns accumulators into fp32 logits in place (the same bytes) and returns their maximum. */
VITQ_INLINE float logits_row(int32_t *row, int64_t tokens, const logit_terms *t) {
    __m512 scale = _mm512_set1_ps(t->scale), offset = _mm512_set1_ps(t->offset);
    __m512 maximum = _mm512_set1_ps(-INFINITY);
    for (int64_t j = 0; j < tokens; j += LANES) {
        __mmask16 lanes = lane_mask(tokens - j);
        __m512 logit = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(row + j)), scale, offset);
        if (t->bias) logit = _mm512_add_ps(logit, _mm512_maskz_loadu_ps(lanes, t->bias + j));
        if (t->mask) logit = _mm512_add_ps(logit, _mm512_maskz_loadu_ps(lanes, t->mask + j));
        /* keys past the end get no weight */
        logit = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), lanes, logit);
        /* a NaN (from a NaN bias) leaves the maximum alone: max returns its second operand */
        maximum = _mm512_max_ps(logit, maximum);
        _mm512_store_ps((float *)row + j, logit);
    }
    return _mm512_reduce_max_ps(maximum);
}

/* codes = rne(exp(logit - maximum) * p_max). When every logit is -inf, logit - maximum
 * is NaN, so that all codes and both sums are zero. */
VITQ_INLINE softmax_sums probability_row(const float *logits, int64_t tokens, float maximum, float p_max,
                                         uint8_t *codes) {
    __m512 shift = _mm512_set1_ps(maximum), top = _mm512_set1_ps(p_max);
    __m512 e_sum = _mm512_setzero_ps();
    __m512i p_sum = _mm512_setzero_si512();
    for (int64_t j = 0; j < tokens; j += LANES) {
        __m512 e = exp_lanes(_mm512_sub_ps(_mm512_load_ps(logits + j), shift));
        __m512i p = _mm512_cvt_roundps_epi32(_mm512_mul_ps(e, top), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        e_sum = _mm512_add_ps(e_sum, e);
        p_sum = _mm512_add_epi32(p_sum, p);
        _mm_store_si128((__m128i *)(codes + j), _mm512_cvtepi32_epi8(p));
    }
    softmax_sums sums = {_mm512_reduce_add_ps(e_sum), _mm512_reduce_add_epi32(p_sum)};
    return sums;
}

#endif
#endif
