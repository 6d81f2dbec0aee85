// Vectors of 16 lanes: what all processors share. Each kind has its own of the same names (avx512/, avx2/).
#pragma once
#include <type_traits>

#if defined(__AVX512BW__) && defined(__AVX512CD__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define HAS_AVX512
#endif

#ifdef HAS_AVX512
#include "avx512/vectors.h"
#else
#include "avx2/vectors.h"
#endif

constexpr int PANEL = 2 * LANES;  // columns of a weight that are held together
constexpr float LOG2_E = 1.44269504f;

struct Nothing {
    void operator()(long) const {}
};

// What a value is after it was stored as T.
template <class T> inline Vec rounded(Vec x);
template <> inline Vec rounded<float>(Vec x) { return x; }
template <> inline Vec rounded<bf16>(Vec x) { return rounded_bf16(x); }

// 2^x to about one unit in the last place, for x up to 127 and above that as for 127; 0 below -126, also for -inf; NaN
// for NaN, which is why it comes second in min and max.
// Taylor's series of 2^r; n goes into the exponent as a whole number, since scalef is slow where it over- or underflows.
inline Vec exp2_of(Vec x) {
    const Vec lowest = all(-126.0f);
    Mask is_some = is_not_less(x, lowest);
    x = least(all(127.0f), greatest(lowest, x));
    Vec n = nearest(x), r = sub(x, n);
    Vec p = all(1.5403530e-4f);
    p = fma(p, r, all(1.3333558e-3f));
    p = fma(p, r, all(9.6181291e-3f));
    p = fma(p, r, all(5.5504109e-2f));
    p = fma(p, r, all(2.4022651e-1f));
    p = fma(p, r, all(6.9314718e-1f));
    p = fma(p, r, all(1.0f));
    return times_power(p, n, is_some);
}

inline Vec silu(Vec x) {
    Vec power = exp2_of(mul(x, all(-LOG2_E)));
    return div(x, add(all(1.0f), power));
}

// gelu's tanh approximation (Hendrycks and Gimpel, 2016) as g / (1 + exp(-2u)), u = sqrt(2 / pi) (g + 0.044715 g^3).
inline Vec gelu_tanh(Vec x) {
    Vec inner = fma(mul(x, x), all(0.044715f), all(1.0f));
    inner = mul(mul(inner, x), all(-1.5957691216057308f * LOG2_E));
    return div(x, add(all(1.0f), exp2_of(inner)));
}
