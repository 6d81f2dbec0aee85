// Eight doubles, and the noise of tokens, on a processor with AVX2.
#pragma once
#include <bit>

#include "vectors.h"

struct Doubles {
    __m256d low, high;
};

struct DoubleMask {  // all bits of a lane or none
    __m256i low, high;
};

inline DoubleMask first_doubles(long count) {
    const __m256i lanes = _mm256_setr_epi64x(0, 1, 2, 3), limit = _mm256_set1_epi64x(count);
    return {_mm256_cmpgt_epi64(limit, lanes), _mm256_cmpgt_epi64(limit, _mm256_add_epi64(lanes, _mm256_set1_epi64x(4)))};
}
inline Doubles all(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
inline Doubles sub(Doubles a, Doubles b) { return {_mm256_sub_pd(a.low, b.low), _mm256_sub_pd(a.high, b.high)}; }
inline Doubles mul(Doubles a, Doubles b) { return {_mm256_mul_pd(a.low, b.low), _mm256_mul_pd(a.high, b.high)}; }
inline Doubles div(Doubles a, Doubles b) { return {_mm256_div_pd(a.low, b.low), _mm256_div_pd(a.high, b.high)}; }
inline Doubles fma(Doubles a, Doubles b, Doubles c) {
    return {_mm256_fmadd_pd(a.low, b.low, c.low), _mm256_fmadd_pd(a.high, b.high, c.high)};
}
inline Doubles fnma(Doubles a, Doubles b, Doubles c) {  // c - a b
    return {_mm256_fnmadd_pd(a.low, b.low, c.low), _mm256_fnmadd_pd(a.high, b.high, c.high)};
}
inline Doubles nearest(Doubles x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_pd(x.low, mode), _mm256_round_pd(x.high, mode)};
}
inline Doubles times_power(Doubles x, Doubles n) {  // 2^n for whole n of -1022 to 1023
    auto half = [](__m256d x, __m256d n) {
        __m256i exponent = _mm256_slli_epi64(_mm256_cvtepi32_epi64(_mm_add_epi32(_mm256_cvtpd_epi32(n), _mm_set1_epi32(1023))), 52);
        return _mm256_mul_pd(x, _mm256_castsi256_pd(exponent));
    };
    return {half(x.low, n.low), half(x.high, n.high)};
}
inline double greatest_of(Doubles x) {
    __m256d both = _mm256_max_pd(x.low, x.high);
    __m128d two = _mm_max_pd(_mm256_castpd256_pd128(both), _mm256_extractf128_pd(both, 1));
    return _mm_cvtsd_f64(_mm_max_sd(two, _mm_unpackhi_pd(two, two)));
}

template <int HOW> inline DoubleMask compared(Doubles a, Doubles b) {
    return {
        _mm256_castpd_si256(_mm256_cmp_pd(a.low, b.low, HOW)), _mm256_castpd_si256(_mm256_cmp_pd(a.high, b.high, HOW))
    };
}
inline DoubleMask both(DoubleMask a, DoubleMask b) {
    return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}
inline DoubleMask is_less(Doubles a, Doubles b) { return compared<_CMP_LT_OQ>(a, b); }
inline DoubleMask is_least(Doubles a, Doubles b) { return compared<_CMP_GE_OQ>(a, b); }
inline DoubleMask is_nan(Doubles x) { return compared<_CMP_UNORD_Q>(x, x); }
inline Doubles select(DoubleMask mask, Doubles yes, Doubles no) {
    return {
        _mm256_blendv_pd(no.low, yes.low, _mm256_castsi256_pd(mask.low)),
        _mm256_blendv_pd(no.high, yes.high, _mm256_castsi256_pd(mask.high))
    };
}
inline Doubles raised(Doubles most, DoubleMask mask, Doubles x) {
    return select(mask, {_mm256_max_pd(most.low, x.low), _mm256_max_pd(most.high, x.high)}, most);
}

// Lanes that a mask leaves out are neither read nor written.
inline Doubles load(const double* from, DoubleMask mask, Doubles without) {
    return select(mask, {_mm256_maskload_pd(from, mask.low), _mm256_maskload_pd(from + 4, mask.high)}, without);
}
inline Doubles load_floats(const float* from, DoubleMask mask) {
    auto lanes = [](__m256i half) {  // the lower word of each
        return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(half, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6)));
    };
    return {
        _mm256_cvtps_pd(_mm_maskload_ps(from, lanes(mask.low))), _mm256_cvtps_pd(_mm_maskload_ps(from + 4, lanes(mask.high)))
    };
}
inline void store(double* to, Doubles x) { _mm256_storeu_pd(to, x.low), _mm256_storeu_pd(to + 4, x.high); }
inline void store(double* to, Doubles x, DoubleMask mask) {
    _mm256_maskstore_pd(to, mask.low, x.low), _mm256_maskstore_pd(to + 4, mask.high, x.high);
}
inline void store_whole(int32_t* to, Doubles x) {
    _mm_storeu_si128((__m128i*)to, _mm256_cvttpd_epi32(x.low)), _mm_storeu_si128((__m128i*)(to + 4), _mm256_cvttpd_epi32(x.high));
}

inline void multiply_wide(__m256i x, uint32_t by, __m256i& high, __m256i& low) {
    __m256i factor = _mm256_set1_epi64x(by);
    __m256i even = _mm256_mul_epu32(x, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}

// Philox4x32-10 (Salmon et al., 2011) with the counters (token / 4, position, 0, 0): the noise of 64 tokens, of which
// eight counters make half.
inline void philox(uint32_t out[64], long token, uint32_t position, uint64_t key) {
    for (int half = 0; half < 2; ++half, out += 32) {
        // in the order in which the last lines lay them side by side
        const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
        __m256i a = _mm256_add_epi32(_mm256_set1_epi32((int)(token >> 2) + 8 * half), order), b = _mm256_set1_epi32((int)position);
        __m256i c = _mm256_setzero_si256(), d = c, left, right, low_left, low_right;
        uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32);
        for (int round = 0; round < 10; ++round) {
            multiply_wide(a, 0xD2511F53u, left, low_left);
            multiply_wide(c, 0xCD9E8D57u, right, low_right);
            a = _mm256_xor_si256(_mm256_xor_si256(right, b), _mm256_set1_epi32((int)low));
            c = _mm256_xor_si256(_mm256_xor_si256(left, d), _mm256_set1_epi32((int)high));
            b = low_right;
            d = low_left;
            low += 0x9E3779B9u;
            high += 0xBB67AE85u;
        }
        __m256i* to = (__m256i*)out;
        __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
        _mm256_storeu_si256(to, _mm256_unpacklo_epi64(ab, cd));
        _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(ab, cd));
        ab = _mm256_unpackhi_epi32(a, b), cd = _mm256_unpackhi_epi32(c, d);
        _mm256_storeu_si256(to + 2, _mm256_unpacklo_epi64(ab, cd));
        _mm256_storeu_si256(to + 3, _mm256_unpackhi_epi64(ab, cd));
    }
}

// Which of 8 tokens could come to `best` with their noise? Noise exceeds d with a probability below exp(-d), so only
// where 1 - u is below that: its leading bit tells nearly always, and the logarithms are left for a few tokens of a row.
inline unsigned may_reach(Doubles x, const uint32_t* noise, double best) {
    alignas(32) double most[8];
    for (int lane = 0; lane < 8; ++lane) most[lane] = (std::countl_one(noise[lane]) + 1) * 0.6931471805599454;  // ln 2, rounded up
    const __m256d limit = _mm256_set1_pd(best);
    auto half = [&](__m256d x, const double* more) {
        return (unsigned)_mm256_movemask_pd(_mm256_cmp_pd(_mm256_add_pd(x, _mm256_load_pd(more)), limit, _CMP_GE_OQ));
    };
    return half(x.low, most) | half(x.high, most + 4) << 4;
}
