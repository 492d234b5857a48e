/* Packs one head of K and V into the operand order of vpdpbusd, which multiplies
 * groups of four neighbouring bytes: unsigned first operand, signed second. */
#ifndef VITQ_PACK_H
#define VITQ_PACK_H

#include "common.h"

#ifdef VITQ_X86

#include <string.h>

/* K: [key block of 16][group of 4 channels][16 keys][4 channels], as k + 128 so that K is
 * the unsigned operand and q can be broadcast as it is. Keys and channels past the end are
 * zero bytes; q is zero there too.
 *
 * compensation[j] = -q_zero_point * sum_d k_jd, the one term of
 *   sum (q - zq)(k - zk) = sum q k - zq sum k - zk sum q + D zq zk
 * that differs between keys (see row_offset in attention.c for the others). */
static VITQ_AVX512 void pack_keys(const int8_t *k, int64_t stride, int64_t tokens, int64_t dim, int32_t q_zero_point,
                                  uint8_t *packed, int32_t *compensation) {
    int64_t groups = round_up(dim, 4) / 4, whole = dim / 4;
    for (int64_t block = 0; block < tokens; block += LANES, packed += groups * 64) {
        int64_t keys = min_i64(LANES, tokens - block);
        if (keys < LANES) memset(packed, 0, (size_t)groups * 64);
        for (int64_t j = 0; j < keys; j++) {
            const int8_t *row = k + (block + j) * stride;
            for (int64_t g = 0; g < whole; g++) {
                uint32_t four;
                memcpy(&four, row + 4 * g, 4);
                four ^= 0x80808080u;
                memcpy(packed + g * 64 + j * 4, &four, 4);
            }
            if (whole < groups) {
                uint8_t *last = packed + whole * 64 + j * 4;
                memset(last, 0, 4);
                for (int64_t d = 4 * whole; d < dim; d++) last[d % 4] = (uint8_t)(row[d] + 128);
            }
        }
        __m512i sum = _mm512_setzero_si512(); /* of k + 128 */
        if (q_zero_point)
            for (int64_t g = 0; g < groups; g++)
                sum = _mm512_dpbusd_epi32(sum, _mm512_load_si512(packed + g * 64), _mm512_set1_epi8(1));
        sum = _mm512_sub_epi32(sum, _mm512_set1_epi32((int32_t)(128 * dim)));
        _mm512_store_si512(compensation + block, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-q_zero_point)));
    }
}

/* V: [group of 4 tokens][padded channels][4 tokens], signed; the padding is zero. */
static VITQ_AVX512 void pack_values(const int8_t *v, int64_t stride, int64_t tokens, int64_t dim, int8_t *packed) {
    int64_t padded_dim = round_up(dim, LANES);
    for (int64_t j = 0; j < tokens; j += 4, packed += padded_dim * 4) {
        for (int64_t d = 0; d < padded_dim; d += LANES) {
            __mmask16 lanes = lane_mask(dim - d);
            __m128i row[4];
            for (int64_t i = 0; i < 4; i++)
                row[i] = j + i < tokens ? _mm_maskz_loadu_epi8(lanes, v + (j + i) * stride + d) : _mm_setzero_si128();
            __m128i low01 = _mm_unpacklo_epi8(row[0], row[1]), high01 = _mm_unpackhi_epi8(row[0], row[1]);
            __m128i low23 = _mm_unpacklo_epi8(row[2], row[3]), high23 = _mm_unpackhi_epi8(row[2], row[3]);
            __m128i *out = (__m128i *)(packed + d * 4);
            _mm_store_si128(out + 0, _mm_unpacklo_epi16(low01, low23));
            _mm_store_si128(out + 1, _mm_unpackhi_epi16(low01, low23));
            _mm_store_si128(out + 2, _mm_unpacklo_epi16(high01, high23));
            _mm_store_si128(out + 3, _mm_unpackhi_epi16(high01, high23));
        }
    }
}

#endif
#endif
