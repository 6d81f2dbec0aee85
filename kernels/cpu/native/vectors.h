// Vectors of 16 lanes: types, conversions, exp, sums in a fixed order.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

using bf16 = uint16_t;  // the upper half of a float

constexpr int LANES = 16;
constexpr float LOG2_E = 1.44269504f;

inline __m512 wide(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

inline __m256i narrow(__m512 x) {  // to nearest, ties to even; as torch rounds
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}

inline __mmask16 first(long count) { return count >= LANES ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1); }

// Lanes that a mask leaves out are neither read nor written.
inline __m512 load(const float* from, __mmask16 mask = 0xffff) { return _mm512_maskz_loadu_ps(mask, from); }
inline __m512 load(const bf16* from, __mmask16 mask = 0xffff) { return wide(_mm256_maskz_loadu_epi16(mask, from)); }
inline void store(float* to, __m512 x, __mmask16 mask = 0xffff) { _mm512_mask_storeu_ps(to, mask, x); }
inline void store(bf16* to, __m512 x, __mmask16 mask = 0xffff) { _mm256_mask_storeu_epi16(to, mask, narrow(x)); }

// What a value is after it was stored as T.
template <class T> inline __m512 rounded(__m512 x);
template <> inline __m512 rounded<float>(__m512 x) { return x; }
template <> inline __m512 rounded<bf16>(__m512 x) { return wide(narrow(x)); }

// 2^x to about one unit in the last place, for x up to 127 and above that as for 127; 0 below -126, also for -inf; NaN
// for NaN, which is why it comes second in min and max.
// Taylor's series of 2^r; n goes into the exponent as a whole number, since scalef is slow where it over- or underflows.
inline __m512 exp2_of(__m512 x) {
    const __m512 lowest = _mm512_set1_ps(-126.0f);
    __mmask16 is_some = _mm512_cmp_ps_mask(x, lowest, _CMP_NLT_UQ);
    x = _mm512_min_ps(_mm512_set1_ps(127.0f), _mm512_max_ps(lowest, x));
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    __m512i exponent = _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(is_some, _mm512_castps_si512(p), exponent));
}

inline __m512 silu(__m512 x) {
    __m512 power = exp2_of(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), power));
}

// gelu's tanh approximation (Hendrycks and Gimpel, 2016) as g / (1 + exp(-2u)), u = sqrt(2 / pi) (g + 0.044715 g^3).
inline __m512 gelu_tanh(__m512 x) {
    __m512 inner = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
    inner = _mm512_mul_ps(_mm512_mul_ps(inner, x), _mm512_set1_ps(-1.5957691216057308f * LOG2_E));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exp2_of(inner)));
}
