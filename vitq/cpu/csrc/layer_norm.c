/* LayerNorm over the last dimension, quantized on the way out: the fp32 result of a
 * row lives in L1 only. */
#include "common.h"

#include <math.h>
#include <omp.h>

#ifdef VITQ_X86

/* scales == NULL: static scale; otherwise one symmetric scale a row, as in quantize.c. */
typedef struct {
    const void *x;
    int64_t rows, columns, row_stride;
    int32_t dtype;
    const float *weight, *bias; /* either may be NULL */
    float eps;
    float scale;
    int32_t zero_point, lo, hi;
    uint8_t *codes;
    float *scales;
    int32_t threads;
} vitq_layer_norm_args;

/* Copies the row to fp32 and returns its mean. Two accumulators hide the add's latency. */
VITQ_INLINE float load_row(const void *x, int dtype, int64_t columns, float *row) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int64_t c = 0; c < columns; c += 2 * LANES) {
        __m512 a = load_floats(x, dtype, c, lane_mask(columns - c));
        __m512 b = _mm512_setzero_ps();
        if (c + LANES < columns) b = load_floats(x, dtype, c + LANES, lane_mask(columns - c - LANES));
        _mm512_store_ps(row + c, a);
        _mm512_store_ps(row + c + LANES, b);
        even = _mm512_add_ps(even, a);
        odd = _mm512_add_ps(odd, b);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(even, odd)) / (float)columns;
}

/* Subtracts the mean in place and returns the (biased) variance of the centred row. */
VITQ_INLINE float centre_row(float *row, int64_t columns, float mean) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    __m512 shift = _mm512_set1_ps(mean);
    for (int64_t c = 0; c < columns; c += 2 * LANES) {
        int64_t left = columns - c;
        /* the padding must stay zero: it is part of the sum of squares */
        __m512 a = _mm512_maskz_sub_ps(lane_mask(left), _mm512_load_ps(row + c), shift);
        __mmask16 second = left > LANES ? lane_mask(left - LANES) : (__mmask16)0;
        __m512 b = _mm512_maskz_sub_ps(second, _mm512_load_ps(row + c + LANES), shift);
        _mm512_store_ps(row + c, a);
        _mm512_store_ps(row + c + LANES, b);
        even = _mm512_fmadd_ps(a, a, even);
        odd = _mm512_fmadd_ps(b, b, odd);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(even, odd)) / (float)columns;
}

VITQ_INLINE __m512 affine(const vitq_layer_norm_args *a, const float *row, int64_t c, __m512 rstd, __mmask16 lanes) {
    __m512 y = _mm512_mul_ps(_mm512_load_ps(row + c), rstd);
    if (a->weight) y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(lanes, a->weight + c));
    if (a->bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(lanes, a->bias + c));
    return y;
}

static VITQ_AVX512 void static_row(const vitq_layer_norm_args *a, const float *row, float rstd, uint8_t *codes) {
    quantizer q = make_quantizer(a->scale, a->zero_point, a->lo, a->hi);
    for (int64_t c = 0; c < a->columns; c += LANES) {
        __mmask16 lanes = lane_mask(a->columns - c);
        __m512 y = affine(a, row, c, _mm512_set1_ps(rstd), lanes);
        _mm_mask_storeu_epi8(codes + c, lanes, quantize_lanes(y, &q));
    }
}

static VITQ_AVX512 float dynamic_row(const vitq_layer_norm_args *a, float *row, float rstd, uint8_t *codes) {
    __m512i amax = _mm512_setzero_si512();
    for (int64_t c = 0; c < a->columns; c += LANES) {
        __m512 y = affine(a, row, c, _mm512_set1_ps(rstd), lane_mask(a->columns - c));
        _mm512_store_ps(row + c, y);
        amax = amax_lanes(amax, y);
    }
    float scale = row_scale(amax, a->hi - a->zero_point);
    quantizer q = make_quantizer(scale, a->zero_point, a->lo, a->hi);
    for (int64_t c = 0; c < a->columns; c += LANES)
        _mm_mask_storeu_epi8(codes + c, lane_mask(a->columns - c), quantize_lanes(_mm512_load_ps(row + c), &q));
    return scale;
}

static VITQ_AVX512 void normalize_one(const vitq_layer_norm_args *a, int64_t index, float *row) {
    const char *x = (const char *)a->x + index * a->row_stride * (a->dtype == VITQ_FP32 ? 4 : 2);
    float mean = a->dtype == VITQ_FP32 ? load_row(x, VITQ_FP32, a->columns, row)
                                       : load_row(x, VITQ_BF16, a->columns, row);
    float rstd = 1.0f / sqrtf(centre_row(row, a->columns, mean) + a->eps);
    uint8_t *codes = a->codes + index * a->columns;
    if (a->scales)
        a->scales[index] = dynamic_row(a, row, rstd, codes);
    else
        static_row(a, row, rstd, codes);
}

VITQ_API VITQ_AVX512 int32_t vitq_cpu_layer_norm_quantize(const vitq_layer_norm_args *a) {
    if (a->threads < 1 || (a->dtype != VITQ_FP32 && a->dtype != VITQ_BF16)) return VITQ_BAD_ARGUMENT;
    int64_t padded = round_up(a->columns, 2 * LANES);
    float *scratch = aligned_alloc(64, (size_t)(padded * a->threads) * sizeof(float));
    if (!scratch) return VITQ_NO_MEMORY;
#pragma omp parallel for schedule(static) num_threads(a->threads) if (a->rows * a->columns > 16384)
    for (int64_t row = 0; row < a->rows; row++) normalize_one(a, row, scratch + padded * omp_get_thread_num());
    free(scratch);
    return VITQ_OK;
}

#endif
