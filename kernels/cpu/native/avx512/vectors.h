// Vectors of a processor with AVX-512: 16 floats, 16 words of 32 bits, 8 doubles, and masks of their lanes.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

using bf16 = uint16_t;  // the upper half of a float
using Vec = __m512;
using Words = __m512i;
using Mask = __mmask16;

constexpr int LANES = 16;

struct Whole {  // all lanes
    operator Mask() const { return 0xffff; }
};

inline Mask first(long count) { return count >= LANES ? 0xffff : count <= 0 ? 0 : (Mask)((1u << count) - 1); }
inline Mask both(Mask a, Mask b) { return a & b; }
inline Mask without(Mask a, Mask b) { return a & (Mask)~b; }
inline bool any(Mask mask) { return mask; }

inline Vec all(float x) { return _mm512_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec least(Vec a, Vec b) { return _mm512_min_ps(a, b); }  // b where one is NaN
inline Vec greatest(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec nearest(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
inline float sum_of(Vec x) { return _mm512_reduce_add_ps(x); }
inline float greatest_of(Vec x) { return _mm512_reduce_max_ps(x); }

inline Mask is_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask is_not_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }  // also where one is NaN
inline Mask is_nan(Vec x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
inline Vec select(Mask mask, Vec yes, Vec no) { return _mm512_mask_mov_ps(no, mask, yes); }

// p * 2^n for whole n, as bits: 0 where the mask says so. p: 0.5 to 2.
inline Vec times_power(Vec p, Vec n, Mask is_some) {
    Words exponent = _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(is_some, _mm512_castps_si512(p), exponent));
}

inline Vec wide(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

inline __m256i narrow(Vec x) {  // to nearest, ties to even; as torch rounds
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    Words bits = _mm512_castps_si512(x);
    Words odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    Words rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_mask_mov_epi32(rounded, is_nan(x), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}

inline Vec rounded_bf16(Vec x) { return wide(narrow(x)); }
inline Vec of_halves(const void* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }

// Lanes that a mask leaves out are neither read nor written.
inline Vec load(const float* from, Mask mask = 0xffff) { return _mm512_maskz_loadu_ps(mask, from); }
inline Vec load(const bf16* from, Mask mask = 0xffff) { return wide(_mm256_maskz_loadu_epi16(mask, from)); }
inline void store(float* to, Vec x, Mask mask = 0xffff) { _mm512_mask_storeu_ps(to, mask, x); }
inline void store(bf16* to, Vec x, Mask mask = 0xffff) { _mm256_mask_storeu_epi16(to, mask, narrow(x)); }

// --- elements as products take them: floats, or two of bfloat16 in a word ----------------------------------------

inline Words load_words(const void* from, long count) { return _mm512_maskz_loadu_epi32(first(count), from); }
inline void store_words(void* to, Words x) { _mm512_storeu_si512(to, x); }
template <class T> inline void copy_row(T* to, const T* from, long count) { std::memcpy(to, from, count * sizeof(T)); }

// Elements `from` to `from` + 15 of two vectors in turns.
inline Words in_turns(int from) {
    const Words firsts = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    Words each = _mm512_add_epi32(firsts, _mm512_set1_epi32(from));
    return _mm512_or_si512(each, _mm512_slli_epi32(_mm512_add_epi32(each, _mm512_set1_epi32(2 * LANES)), 16));
}

// Up to 32 elements of two rows side by side.
inline void store_pairs(bf16* to, const bf16* a, const bf16* b, long count) {
    __mmask32 mask = count >= 2 * LANES ? ~0u : (1u << count) - 1;
    Words x = _mm512_maskz_loadu_epi16(mask, a), y = _mm512_maskz_loadu_epi16(mask, b);
    store_words(to, _mm512_permutex2var_epi16(x, in_turns(0), y));
    store_words(to + 2 * LANES, _mm512_permutex2var_epi16(x, in_turns(LANES), y));
}

inline void transpose(Words (&rows)[LANES]) {  // 16 x 16
    Words t[LANES];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
