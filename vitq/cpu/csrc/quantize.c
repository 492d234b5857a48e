/* Rows of fp32 or bf16 values to u8 codes. */
#include "common.h"

#ifdef VITQ_X86

VITQ_INLINE void quantize_row(const void *x, int dtype, int64_t columns, const quantizer *q, uint8_t *codes) {
    for (int64_t c = 0; c < columns; c += LANES) {
        __mmask16 lanes = lane_mask(columns - c);
        _mm_mask_storeu_epi8(codes + c, lanes, quantize_lanes(load_floats(x, dtype, c, lanes), q));
    }
}

VITQ_INLINE float dynamic_row_scale(const void *x, int dtype, int64_t columns, int32_t qmax) {
    __m512i amax = _mm512_setzero_si512();
    for (int64_t c = 0; c < columns; c += LANES)
        amax = amax_lanes(amax, load_floats(x, dtype, c, lane_mask(columns - c)));
    return row_scale(amax, qmax);
}

/* scales == NULL: static scale. Otherwise each row gets its own symmetric scale,
 * amax / (hi - zero_point), written to scales[row]; `scale` is then not read. */
typedef struct {
    const void *x;
    int64_t rows, columns, row_stride;
    int32_t dtype;
    float scale;
    int32_t zero_point, lo, hi;
    uint8_t *codes;
    float *scales;
    int32_t threads;
} vitq_quantize_args;

VITQ_INLINE void quantize_one(const vitq_quantize_args *a, int64_t row, int dtype) {
    const char *x = (const char *)a->x + row * a->row_stride * (dtype == VITQ_FP32 ? 4 : 2);
    float scale = a->scale;
    if (a->scales) scale = a->scales[row] = dynamic_row_scale(x, dtype, a->columns, a->hi - a->zero_point);
    quantizer q = make_quantizer(scale, a->zero_point, a->lo, a->hi);
    quantize_row(x, dtype, a->columns, &q, a->codes + row * a->columns);
}

VITQ_API VITQ_AVX512 int32_t vitq_cpu_quantize_rows(const vitq_quantize_args *a) {
    if (a->threads < 1 || (a->dtype != VITQ_FP32 && a->dtype != VITQ_BF16)) return VITQ_BAD_ARGUMENT;
#pragma omp parallel for schedule(static) num_threads(a->threads) if (a->rows * a->columns > 32768)
    for (int64_t row = 0; row < a->rows; row++) {
        if (a->dtype == VITQ_FP32)
            quantize_one(a, row, VITQ_FP32);
        else
            quantize_one(a, row, VITQ_BF16);
    }
    return VITQ_OK;
}

#endif
