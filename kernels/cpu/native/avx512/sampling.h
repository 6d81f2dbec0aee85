// Eight doubles, and the noise of tokens, on a processor with AVX-512.
#pragma once
#include "vectors.h"

using Doubles = __m512d;
using DoubleMask = __mmask8;

inline DoubleMask first_doubles(long count) { return count >= 8 ? 0xff : (DoubleMask)((1u << count) - 1); }
inline Doubles all(double x) { return _mm512_set1_pd(x); }
inline Doubles sub(Doubles a, Doubles b) { return _mm512_sub_pd(a, b); }
inline Doubles mul(Doubles a, Doubles b) { return _mm512_mul_pd(a, b); }
inline Doubles div(Doubles a, Doubles b) { return _mm512_div_pd(a, b); }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
inline Doubles fnma(Doubles a, Doubles b, Doubles c) { return _mm512_fnmadd_pd(a, b, c); }  // c - a b
inline Doubles nearest(Doubles x) { return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT); }
inline Doubles times_power(Doubles x, Doubles n) { return _mm512_scalef_pd(x, n); }
inline double greatest_of(Doubles x) { return _mm512_reduce_max_pd(x); }

inline DoubleMask both(DoubleMask a, DoubleMask b) { return a & b; }
inline DoubleMask is_less(Doubles a, Doubles b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
inline DoubleMask is_least(Doubles a, Doubles b) { return _mm512_cmp_pd_mask(a, b, _CMP_GE_OQ); }
inline DoubleMask is_nan(Doubles x) { return _mm512_cmp_pd_mask(x, x, _CMP_UNORD_Q); }
inline Doubles select(DoubleMask mask, Doubles yes, Doubles no) { return _mm512_mask_mov_pd(no, mask, yes); }
inline Doubles raised(Doubles most, DoubleMask mask, Doubles x) { return _mm512_mask_max_pd(most, mask, most, x); }

// Lanes that a mask leaves out are neither read nor written.
inline Doubles load(const double* from, DoubleMask mask, Doubles without) { return _mm512_mask_loadu_pd(without, mask, from); }
inline Doubles load_floats(const float* from, DoubleMask mask) { return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, from)); }
inline void store(double* to, Doubles x, DoubleMask mask = 0xff) { _mm512_mask_storeu_pd(to, mask, x); }
inline void store_whole(int32_t* to, Doubles x) { _mm256_storeu_si256((__m256i*)to, _mm512_cvttpd_epi32(x)); }

inline void multiply_wide(Words x, uint32_t by, Words& high, Words& low) {
    Words factor = _mm512_set1_epi64(by);
    Words even = _mm512_mul_epu32(x, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
    low = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
    high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
}

// Philox4x32-10 (Salmon et al., 2011) with the counters (token / 4, position, 0, 0): the noise of 64 tokens.
inline void philox(uint32_t out[64], long token, uint32_t position, uint64_t key) {
    // in the order in which the last lines lay them side by side
    const Words order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    Words a = _mm512_add_epi32(_mm512_set1_epi32((int)(token >> 2)), order), b = _mm512_set1_epi32((int)position);
    Words c = _mm512_setzero_si512(), d = c, left, right, low_left, low_right;
    uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; ++round) {
        multiply_wide(a, 0xD2511F53u, left, low_left);
        multiply_wide(c, 0xCD9E8D57u, right, low_right);
        a = _mm512_xor_si512(_mm512_xor_si512(right, b), _mm512_set1_epi32((int)low));
        c = _mm512_xor_si512(_mm512_xor_si512(left, d), _mm512_set1_epi32((int)high));
        b = low_right;
        d = low_left;
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
    Words ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(ab, cd));
    _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(ab, cd));
    ab = _mm512_unpackhi_epi32(a, b), cd = _mm512_unpackhi_epi32(c, d);
    _mm512_storeu_si512(out + 32, _mm512_unpacklo_epi64(ab, cd));
    _mm512_storeu_si512(out + 48, _mm512_unpackhi_epi64(ab, cd));
}

// Which of 8 tokens could come to `best` with their noise? Noise exceeds d with a probability below exp(-d), so only
// where 1 - u is below that: its leading bit tells nearly always, and the logarithms are left for a few tokens of a row.
inline unsigned may_reach(Doubles x, const uint32_t* noise, double best) {
    __m256i bits = _mm256_loadu_si256((const __m256i*)noise);
    __m256i zeros = _mm256_lzcnt_epi32(_mm256_xor_si256(bits, _mm256_set1_epi32(-1)));
    Doubles most = _mm512_cvtepi32_pd(_mm256_add_epi32(zeros, _mm256_set1_epi32(1)));
    most = _mm512_mul_pd(most, _mm512_set1_pd(0.6931471805599454));  // ln 2, rounded up
    return _mm512_cmp_pd_mask(_mm512_add_pd(x, most), all(best), _CMP_GE_OQ);
}
