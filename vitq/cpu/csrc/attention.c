/* Fused attention of int8 codes:
 *
 *   logits = logit_scale * sum_d (q - zq)(k - zk) + bias + mask
 *   e      = exp(logits - row max)                       fp32
 *   p      = rne(e * p_max)                              u8
 *   out    = sum_j p_j (v_j - zv) * v_scale / (p_max * sum_j e_j)
 *
 * Both products are exact int32. K and V of one head are packed once, then ROWS queries
 * at a time pass over them, so the logits and codes of a block stay in L1. */
#include "common.h"
#include "pack.h"
#include "softmax.h"

#include <omp.h>

#ifdef VITQ_X86

#define ROWS 6 /* queries of a block: ROWS x TILE accumulators + TILE operands fit 32 registers */
#define TILE 4 /* vectors across: 64 keys of q.k, 64 channels of p.v */

typedef struct {
    int64_t batch, tokens, heads, dim;
    const int8_t *q, *k, *v;
    int64_t q_strides[3], k_strides[3], v_strides[3]; /* batch, token, head; channels are contiguous */
    const float *logit_scale, *v_scale; /* these five: one a head */
    const int32_t *q_zero, *k_zero, *v_zero;
    int32_t p_max;
    const float *bias; /* [heads, N, N] or NULL */
    int64_t bias_head_stride;
    const float *mask; /* [windows, N, N] or NULL; batch entry b uses b % windows */
    int64_t windows;
    void *out; /* [batch, N, heads * dim] */
    int32_t out_dtype;
    float out_scale; /* the last four: VITQ_U8 only */
    int32_t out_zero_point, out_lo, out_hi;
    int32_t threads;
} vitq_attention_args;

/* What one thread works in. */
typedef struct {
    uint8_t *keys;
    int32_t *compensation;
    int8_t *values;
    int8_t *queries; /* ROWS rows, channels zero-padded to a multiple of 4 */
    int32_t *logits; /* ROWS rows */
    uint8_t *codes;  /* ROWS rows */
    int64_t query_row, score_row; /* row lengths of the last three */
} workspace;

/* Lays the workspace out from `base`; returns its size in bytes (base may be NULL). */
static size_t lay_out(const vitq_attention_args *a, char *base, workspace *w) {
    int64_t keys = round_up(a->tokens, LANES);
    w->query_row = round_up(a->dim, 4);
    w->score_row = keys;
    int64_t sizes[6] = {keys * w->query_row, keys * 4, keys * round_up(a->dim, LANES),
                        ROWS * w->query_row, ROWS * keys * 4, ROWS * keys};
    char *parts[6];
    int64_t used = 0;
    for (int i = 0; i < 6; i++) {
        parts[i] = base ? base + used : NULL;
        used += round_up(sizes[i], 64);
    }
    w->keys = (uint8_t *)parts[0];
    w->compensation = (int32_t *)parts[1];
    w->values = (int8_t *)parts[2];
    w->queries = (int8_t *)parts[3];
    w->logits = (int32_t *)parts[4];
    w->codes = (uint8_t *)parts[5];
    return (size_t)used;
}

VITQ_INLINE __m512i broadcast4(const void *bytes) {
    int32_t four;
    memcpy(&four, bytes, 4);
    return _mm512_set1_epi32(four);
}

/* Accumulators of ROWS queries and `width` key blocks, from key block `block` on. */
VITQ_INLINE void score_tile(const workspace *w, int64_t block, const int width) {
    int64_t groups = w->query_row / 4;
    const uint8_t *keys = w->keys + block * groups * 64;
    __m512i acc[ROWS][TILE];
    for (int t = 0; t < width; t++)
        for (int r = 0; r < ROWS; r++)
            acc[r][t] = _mm512_load_si512(w->compensation + (block + t) * LANES);
    for (int64_t g = 0; g < groups; g++) {
        __m512i key[TILE];
        for (int t = 0; t < width; t++) key[t] = _mm512_load_si512(keys + (t * groups + g) * 64);
        for (int r = 0; r < ROWS; r++) {
            __m512i query = broadcast4(w->queries + r * w->query_row + 4 * g);
            for (int t = 0; t < width; t++) acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], key[t], query);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < width; t++)
            _mm512_store_si512(w->logits + r * w->score_row + (block + t) * LANES, acc[r][t]);
}

static VITQ_AVX512 void score_block(const workspace *w) {
    int64_t blocks = w->score_row / LANES, block = 0;
    for (; block + TILE <= blocks; block += TILE) score_tile(w, block, TILE);
    if (blocks - block == 3) score_tile(w, block, 3);
    if (blocks - block == 2) score_tile(w, block, 2);
    if (blocks - block == 1) score_tile(w, block, 1);
}

/* Where a block of queries is written. */
typedef struct {
    int64_t b, head, first, rows; /* rows <= ROWS */
} query_block;

VITQ_INLINE void store_row(const vitq_attention_args *a, int64_t position, __m512 x, __mmask16 lanes,
                           const quantizer *q) {
    if (a->out_dtype == VITQ_U8)
        _mm_mask_storeu_epi8((uint8_t *)a->out + position, lanes, quantize_lanes(x, q));
    else if (a->out_dtype == VITQ_BF16)
        store_bf16((uint16_t *)a->out + position, x, lanes);
    else
        _mm512_mask_storeu_ps((float *)a->out + position, lanes, x);
}

/* sum_j p_j v_j of ROWS queries for `width` vectors of channels, from channel `d` on. The
 * accumulators leave through memory: indexed by a row count that is not a constant, they
 * would never be registers. */
VITQ_INLINE void value_tile(const workspace *w, int64_t tokens, int64_t group_bytes, int64_t d,
                            int32_t out[ROWS][TILE * LANES], const int width) {
    const int8_t *values = w->values + d * 4;
    __m512i acc[ROWS][TILE];
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < width; t++) acc[r][t] = _mm512_setzero_si512();
    for (int64_t j = 0; j < tokens; j += 4, values += group_bytes) {
        __m512i value[TILE];
        for (int t = 0; t < width; t++) value[t] = _mm512_load_si512(values + t * 64);
        for (int r = 0; r < ROWS; r++) {
            __m512i code = broadcast4(w->codes + r * w->score_row + j);
            for (int t = 0; t < width; t++) acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], code, value[t]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < width; t++) _mm512_store_si512(out[r] + t * LANES, acc[r][t]);
}

VITQ_INLINE void output_row(const vitq_attention_args *a, int64_t head, const int32_t *acc, const softmax_sums *sums,
                            int64_t position, int64_t channels, const quantizer *q) {
    /* a row with no key left (all -inf) gives zeros */
    float total = (float)a->p_max * sums->e_sum;
    __m512 factor = _mm512_set1_ps(total > 0.0f ? a->v_scale[head] / total : 0.0f);
    __m512i shift = _mm512_set1_epi32(sums->p_sum * a->v_zero[head]);
    for (int64_t d = 0; d < channels; d += LANES) {
        __m512i sum = _mm512_sub_epi32(_mm512_load_si512(acc + d), shift);
        store_row(a, position + d, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), factor), lane_mask(channels - d), q);
    }
}

static VITQ_AVX512 void output_block(const vitq_attention_args *a, const workspace *w, const query_block *rows,
                                     const softmax_sums *sums) {
    int32_t acc[ROWS][TILE * LANES] __attribute__((aligned(64)));
    quantizer q = make_quantizer(a->out_scale, a->out_zero_point, a->out_lo, a->out_hi);
    int64_t group_bytes = round_up(a->dim, LANES) * 4;
    for (int64_t d = 0; d < a->dim; d += TILE * LANES) {
        int64_t channels = min_i64(TILE * LANES, a->dim - d);
        if (channels > 3 * LANES)
            value_tile(w, a->tokens, group_bytes, d, acc, 4);
        else if (channels > 2 * LANES)
            value_tile(w, a->tokens, group_bytes, d, acc, 3);
        else if (channels > LANES)
            value_tile(w, a->tokens, group_bytes, d, acc, 2);
        else
            value_tile(w, a->tokens, group_bytes, d, acc, 1);
        for (int64_t r = 0; r < rows->rows; r++) {
            int64_t token = rows->b * a->tokens + rows->first + r;
            output_row(a, rows->head, acc[r], &sums[r], (token * a->heads + rows->head) * a->dim + d, channels, &q);
        }
    }
}

/* The accumulator of row i is sum q (k + 128) - zq sum k. What is missing to
 * sum (q - zq)(k - zk) is the same for every key of the row, so softmax would cancel it,
 * but leaving it out would cost the fp32 logits precision (and one add is free in the fma). */
VITQ_INLINE float row_offset(const vitq_attention_args *a, int64_t head, const int8_t *query, int64_t length) {
    int32_t sum = 0;
    for (int64_t d = 0; d < length; d++) sum += query[d];
    int32_t missing = -(128 + a->k_zero[head]) * sum + (int32_t)a->dim * a->q_zero[head] * a->k_zero[head];
    return (float)missing * a->logit_scale[head];
}

VITQ_INLINE softmax_sums softmax_row(const vitq_attention_args *a, const workspace *w, const query_block *rows,
                                     int64_t r) {
    int64_t query = (rows->first + r) * a->tokens;
    float offset = row_offset(a, rows->head, w->queries + r * w->query_row, w->query_row);
    logit_terms terms = {a->logit_scale[rows->head], offset, NULL, NULL};
    if (a->bias) terms.bias = a->bias + rows->head * a->bias_head_stride + query;
    if (a->mask) terms.mask = a->mask + rows->b % a->windows * a->tokens * a->tokens + query;
    int32_t *row = w->logits + r * w->score_row;
    float maximum = logits_row(row, a->tokens, &terms);
    return probability_row((const float *)row, a->tokens, maximum, (float)a->p_max, w->codes + r * w->score_row);
}

static VITQ_AVX512 void attend_block(const vitq_attention_args *a, const workspace *w, const query_block *rows) {
    const int8_t *q = a->q + rows->b * a->q_strides[0] + rows->first * a->q_strides[1] + rows->head * a->q_strides[2];
    /* rows past the last query keep an earlier block's bytes: computed, never stored */
    for (int64_t r = 0; r < rows->rows; r++)
        memcpy(w->queries + r * w->query_row, q + r * a->q_strides[1], (size_t)a->dim);
    softmax_sums sums[ROWS];
    score_block(w);
    for (int64_t r = 0; r < rows->rows; r++) sums[r] = softmax_row(a, w, rows, r);
    output_block(a, w, rows, sums);
}

/* One head, queries [first, last). */
static VITQ_AVX512 void attend_head(const vitq_attention_args *a, const workspace *w, int64_t head_index,
                                    int64_t first, int64_t last) {
    query_block rows = {head_index / a->heads, head_index % a->heads, first, 0};
    const int8_t *k = a->k + rows.b * a->k_strides[0] + rows.head * a->k_strides[2];
    const int8_t *v = a->v + rows.b * a->v_strides[0] + rows.head * a->v_strides[2];
    pack_keys(k, a->k_strides[1], a->tokens, a->dim, a->q_zero[rows.head], w->keys, w->compensation);
    pack_values(v, a->v_strides[1], a->tokens, a->dim, w->values);
    for (; rows.first < last; rows.first += ROWS) {
        rows.rows = min_i64(ROWS, last - rows.first);
        attend_block(a, w, &rows);
    }
}

/* Heads are split into chunks of queries only when there are too few of them to keep
 * all threads busy evenly, since every chunk packs K and V again. */
static int64_t chunks_per_head(const vitq_attention_args *a) {
    int64_t heads = a->batch * a->heads, wanted = 4 * (int64_t)a->threads;
    if (a->threads == 1 || heads >= wanted) return 1;
    int64_t most = (a->tokens + 4 * ROWS - 1) / (4 * ROWS); /* at least four blocks each */
    return min_i64((wanted + heads - 1) / heads, most);
}

VITQ_API VITQ_AVX512 int32_t vitq_cpu_attention_int8(const vitq_attention_args *a) {
    if (a->threads < 1 || a->tokens < 1 || a->dim < 1) return VITQ_BAD_ARGUMENT;
    workspace layout;
    size_t bytes = lay_out(a, NULL, &layout);
    char *scratch = aligned_alloc(64, bytes * (size_t)a->threads);
    if (!scratch) return VITQ_NO_MEMORY;
    int64_t chunks = chunks_per_head(a);
    int64_t chunk = round_up((a->tokens + chunks - 1) / chunks, ROWS); /* whole blocks */
    chunks = (a->tokens + chunk - 1) / chunk;
    int64_t tasks = a->batch * a->heads * chunks;
#pragma omp parallel num_threads(a->threads) if (tasks > 1)
    {
        workspace w;
        lay_out(a, scratch + bytes * (size_t)omp_get_thread_num(), &w);
        memset(w.queries, 0, (size_t)(ROWS * w.query_row)); /* the channel padding stays zero */
        memset(w.codes, 0, (size_t)(ROWS * w.score_row));
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t first = task % chunks * chunk;
            attend_head(a, &w, task / chunks, first, min_i64(first + chunk, a->tokens));
        }
    }
    free(scratch);
    return VITQ_OK;
}

/* For the tests: the exponential alone. */
VITQ_API VITQ_AVX512 void vitq_cpu_exp(const float *x, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        __mmask16 lanes = lane_mask(n - i);
        _mm512_mask_storeu_ps(y + i, lanes, exp_lanes(_mm512_maskz_loadu_ps(lanes, x + i)));
    }
}

#endif
