// Vectors of a processor with AVX2, two registers each: 16 floats, 16 words of 32 bits, and masks of their lanes.
// It computes in floats throughout: bfloat16 is how weights, keys and values are held.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;  // the upper half of a float

constexpr int LANES = 16;

struct Vec {
    __m256 low, high;
};

struct Words {
    __m256i low, high;
};

struct Mask {  // all bits of a lane or none
    __m256i low, high;
};

struct Whole {  // all lanes
    operator Mask() const { return {_mm256_set1_epi32(-1), _mm256_set1_epi32(-1)}; }
};

inline Mask first(long count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i limit = _mm256_set1_epi32((int)std::clamp(count, 0L, (long)LANES));
    return {_mm256_cmpgt_epi32(limit, lanes), _mm256_cmpgt_epi32(limit, _mm256_add_epi32(lanes, _mm256_set1_epi32(8)))};
}
inline Mask both(Mask a, Mask b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
inline Mask without(Mask a, Mask b) { return {_mm256_andnot_si256(b.low, a.low), _mm256_andnot_si256(b.high, a.high)}; }
inline bool any(Mask mask) { return _mm256_movemask_epi8(_mm256_or_si256(mask.low, mask.high)); }

inline Vec all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Vec least(Vec a, Vec b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }  // b where one is NaN
inline Vec greatest(Vec a, Vec b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Vec nearest(Vec x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, mode), _mm256_round_ps(x.high, mode)};
}

inline float sum_of(Vec x) {
    __m256 both = _mm256_add_ps(x.low, x.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float greatest_of(Vec x) {
    __m256 both = _mm256_max_ps(x.low, x.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

template <int HOW> inline Mask compared(Vec a, Vec b) {
    return {
        _mm256_castps_si256(_mm256_cmp_ps(a.low, b.low, HOW)), _mm256_castps_si256(_mm256_cmp_ps(a.high, b.high, HOW))
    };
}
inline Mask is_less(Vec a, Vec b) { return compared<_CMP_LT_OQ>(a, b); }
inline Mask is_not_less(Vec a, Vec b) { return compared<_CMP_NLT_UQ>(a, b); }  // also where one is NaN
inline Mask is_nan(Vec x) { return compared<_CMP_UNORD_Q>(x, x); }
inline Vec select(Mask mask, Vec yes, Vec no) {
    return {
        _mm256_blendv_ps(no.low, yes.low, _mm256_castsi256_ps(mask.low)),
        _mm256_blendv_ps(no.high, yes.high, _mm256_castsi256_ps(mask.high))
    };
}

// p * 2^n for whole n, as bits: 0 where the mask says so. p: 0.5 to 2.
inline Vec times_power(Vec p, Vec n, Mask is_some) {
    auto half = [](__m256 p, __m256 n, __m256i is_some) {
        __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
        return _mm256_castsi256_ps(_mm256_and_si256(is_some, _mm256_add_epi32(_mm256_castps_si256(p), exponent)));
    };
    return {half(p.low, n.low, is_some.low), half(p.high, n.high, is_some.high)};
}

// --- loads and stores ---------------------------------------------------------------------------------------------

inline __m256 wide(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }

inline __m256i rounded_words(__m256 x) {  // the upper halves: to nearest, ties to even; as torch rounds
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256 is_none = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(is_none));
}

inline __m256i narrow(Vec x) {
    __m256i low = _mm256_srli_epi32(rounded_words(x.low), 16), high = _mm256_srli_epi32(rounded_words(x.high), 16);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
}

inline Vec rounded_bf16(Vec x) {
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
    return {
        _mm256_castsi256_ps(_mm256_and_si256(rounded_words(x.low), upper)),
        _mm256_castsi256_ps(_mm256_and_si256(rounded_words(x.high), upper))
    };
}

inline Vec of_halves(const void* from) {
    const __m128i* at = (const __m128i*)from;
    return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
}

inline Vec load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Vec load(const bf16* from) {
    const __m128i* at = (const __m128i*)from;
    return {wide(_mm_loadu_si128(at)), wide(_mm_loadu_si128(at + 1))};
}
inline void store(float* to, Vec x) { _mm256_storeu_ps(to, x.low), _mm256_storeu_ps(to + 8, x.high); }
inline void store(bf16* to, Vec x) { _mm256_storeu_si256((__m256i*)to, narrow(x)); }

template <class T> inline Vec load(const T* from, Whole) { return load(from); }
template <class T> inline void store(T* to, Vec x, Whole) { store(to, x); }

// Lanes that a mask leaves out are neither read nor written. Of bfloat16 only the first may be meant.
inline Vec load(const float* from, Mask mask) {
    return {_mm256_maskload_ps(from, mask.low), _mm256_maskload_ps(from + 8, mask.high)};
}
inline void store(float* to, Vec x, Mask mask) {
    _mm256_maskstore_ps(to, mask.low, x.low), _mm256_maskstore_ps(to + 8, mask.high, x.high);
}

inline long count_of(Mask mask) {
    auto lanes = [](__m256i half) { return _mm256_movemask_ps(_mm256_castsi256_ps(half)); };
    return __builtin_popcount((unsigned)(lanes(mask.low) | lanes(mask.high) << 8));
}
inline Vec load(const bf16* from, Mask mask) {
    long count = count_of(mask);
    if (count == LANES) return load(from);
    bf16 part[LANES] = {};
    std::memcpy(part, from, count * sizeof(bf16));
    return load(part);
}
inline void store(bf16* to, Vec x, Mask mask) {
    long count = count_of(mask);
    if (count == LANES) return store(to, x);
    bf16 part[LANES];
    store(part, x);
    std::memcpy(to, part, count * sizeof(bf16));
}

// --- elements as products take them: floats -----------------------------------------------------------------------

inline Words load_words(const float* from, long count) {
    Vec x = count >= LANES ? load(from) : load(from, first(count));
    return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)};
}
inline Words load_words(const bf16* from, long count) {
    Vec x = count >= LANES ? load(from) : load(from, first(count));
    return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)};
}
inline void store_words(void* to, Words x) {
    _mm256_storeu_si256((__m256i*)to, x.low), _mm256_storeu_si256((__m256i*)to + 1, x.high);
}
inline void copy_row(float* to, const float* from, long count) { std::memcpy(to, from, count * sizeof(float)); }
inline void copy_row(float* to, const bf16* from, long count) {
    long at = 0;
    for (; at + LANES <= count; at += LANES) store(to + at, load(from + at));
    if (at < count) store(to + at, load(from + at, first(count - at)), first(count - at));
}

inline void transpose(__m256i (&rows)[8]) {  // 8 x 8
    __m256i t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        rows[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        rows[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        rows[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        rows[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2x128_si256(rows[i], rows[i + 4], 0x20);
        t[i + 4] = _mm256_permute2x128_si256(rows[i], rows[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) rows[i] = t[i];
}

inline void transpose(Words (&rows)[LANES]) {  // 16 x 16, as four of 8 x 8
    __m256i part[8];
    for (int i = 0; i < 8; ++i) part[i] = rows[i].low;
    transpose(part);
    for (int i = 0; i < 8; ++i) rows[i].low = part[i];
    for (int i = 0; i < 8; ++i) part[i] = rows[8 + i].high;
    transpose(part);
    for (int i = 0; i < 8; ++i) rows[8 + i].high = part[i];
    __m256i other[8];
    for (int i = 0; i < 8; ++i) part[i] = rows[i].high, other[i] = rows[8 + i].low;
    transpose(part);
    transpose(other);
    for (int i = 0; i < 8; ++i) rows[i].high = other[i], rows[8 + i].low = part[i];
}
