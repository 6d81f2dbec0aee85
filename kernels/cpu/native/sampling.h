// The next token of each row, as engine/sampler.py chooses it: the greatest logit, or, of those that top-k, top-p and
// min-p leave, the greatest of logit / temperature + Gumbel noise. In double precision throughout, as there.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <vector>

#include "layers.h"
#include "threads.h"
#include "vectors.h"

struct Draws {  // of each row
    const double *temperatures, *top_p, *min_p;  // 0: the greatest; 1: off; 0: off
    const int64_t *top_k, *keys, *positions;     // 0: off; of the noise; of the new token
};

constexpr double NEVER = -std::numeric_limits<double>::infinity();
constexpr double MOST_NOISE = 23.0;  // -log(-log(1 - 2^-33)) is 22.87

constexpr long BLOCK = 64;  // tokens whose noise is made at once: four of a counter, 16 counters in a vector

inline void multiply_wide(__m512i x, uint32_t by, __m512i& high, __m512i& low) {
    __m512i factor = _mm512_set1_epi64(by);
    __m512i even = _mm512_mul_epu32(x, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
    low = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
    high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
}

// Philox4x32-10 (Salmon et al., 2011) with the counters (token / 4, position, 0, 0): the noise of BLOCK tokens.
inline void philox(uint32_t out[BLOCK], long token, uint32_t position, uint64_t key) {
    // in the order in which the last lines lay them side by side
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i a = _mm512_add_epi32(_mm512_set1_epi32((int)(token >> 2)), order), b = _mm512_set1_epi32((int)position);
    __m512i c = _mm512_setzero_si512(), d = c, left, right, low_left, low_right;
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
    __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(ab, cd));
    _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(ab, cd));
    ab = _mm512_unpackhi_epi32(a, b), cd = _mm512_unpackhi_epi32(c, d);
    _mm512_storeu_si512(out + 32, _mm512_unpacklo_epi64(ab, cd));
    _mm512_storeu_si512(out + 48, _mm512_unpackhi_epi64(ab, cd));
}

inline double gumbel(uint32_t bits) { return -std::log(-std::log(((double)bits + 0.5) * 0x1p-32)); }

// Which of 8 tokens could come to `best` with their noise? Noise exceeds d with a probability below exp(-d), so only
// where 1 - u is below that: its leading bit tells nearly always, and the logarithms are left for a few tokens of a row.
inline __mmask8 may_reach(__m512d x, const uint32_t* noise, __m512d best) {
    __m256i bits = _mm256_loadu_si256((const __m256i*)noise);
    __m256i zeros = _mm256_lzcnt_epi32(_mm256_xor_si256(bits, _mm256_set1_epi32(-1)));
    __m512d most = _mm512_cvtepi32_pd(_mm256_add_epi32(zeros, _mm256_set1_epi32(1)));
    most = _mm512_mul_pd(most, _mm512_set1_pd(0.6931471805599454));  // ln 2, rounded up
    return _mm512_cmp_pd_mask(_mm512_add_pd(x, most), best, _CMP_GE_OQ);
}

struct Kept {  // tokens that may be chosen: those above edge, and those at it up to an id
    double edge = NEVER;
    long last = std::numeric_limits<long>::max();
    bool has(double x, long id) const { return x > edge || (x == edge && id <= last && x > NEVER); }
};

// e^x to about one unit in the last place, for x from -700 to 0: Taylor's series of e^r, |r| at most ln 2 / 2.
inline __m512d exp_of(__m512d x) {
    __m512d n = _mm512_roundscale_pd(_mm512_mul_pd(x, _mm512_set1_pd(1.4426950408889634)), _MM_FROUND_TO_NEAREST_INT);
    __m512d r = _mm512_fnmadd_pd(n, _mm512_set1_pd(0x1.62e42fefa39efp-1), x);
    r = _mm512_fnmadd_pd(n, _mm512_set1_pd(0x1.abc9e3b39803fp-56), r);  // the rest of ln 2
    constexpr double series[] = {1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040,
                                 1. / 720,       1. / 120,      1. / 24,      1. / 6,      1. / 2,     1.,          1.};
    __m512d sum = _mm512_set1_pd(1. / 6227020800);
    for (double one : series) sum = _mm512_fmadd_pd(sum, r, _mm512_set1_pd(one));
    return _mm512_scalef_pd(sum, n);
}

struct Weights {  // of tokens, and in which bucket each lies: by how far it is from the greatest
    static constexpr int PER_UNIT = 8, BUCKETS = 50 * PER_UNIT;  // what is e^-50 as likely is lost in the sum's rounding
    std::vector<double> weights;
    std::vector<int32_t> buckets;
    double mass[BUCKETS + 1];

    void fill(const std::vector<double>& x, double top, double least) {
        long size = x.size();
        weights.resize(size + 8);
        buckets.resize(size + 8);
        const __m512d base = _mm512_set1_pd(top), lowest = _mm512_set1_pd(least), none = _mm512_set1_pd(BUCKETS);
        for (long at = 0; at < size; at += 8) {
            __mmask8 mask = size - at >= 8 ? 0xff : (__mmask8)((1u << (size - at)) - 1);
            __m512d value = _mm512_mask_loadu_pd(_mm512_set1_pd(NEVER), mask, x.data() + at);
            __m512d below = _mm512_mul_pd(_mm512_sub_pd(base, value), _mm512_set1_pd(PER_UNIT));
            __mmask8 counts = _mm512_cmp_pd_mask(value, lowest, _CMP_GE_OQ) & _mm512_cmp_pd_mask(below, none, _CMP_LT_OQ);
            __m512d weight = exp_of(_mm512_maskz_sub_pd(counts, value, base));
            _mm512_storeu_pd(weights.data() + at, _mm512_maskz_mov_pd(counts, weight));
            __m256i bucket = _mm512_cvttpd_epi32(_mm512_mask_mov_pd(none, counts, below));
            _mm256_storeu_si256((__m256i*)(buckets.data() + at), bucket);
        }
        std::fill(mass, mass + BUCKETS + 1, 0.0);
        for (long id = 0; id < size; ++id) mass[buckets[id]] += weights[id];
    }
};

// The smallest set of most likely tokens whose probability reaches p. Sorted is only the bucket where it does.
inline Kept nucleus(const std::vector<double>& x, double top, double least, double p) {
    static thread_local Weights room;
    static thread_local std::vector<std::pair<double, long>> order;
    Weights& own = room;
    std::vector<std::pair<double, long>>& sorted = order;
    own.fill(x, top, least);
    double total = 0, before = 0;
    for (int at = 0; at < Weights::BUCKETS; ++at) total += own.mass[at];
    Kept kept{least};
    for (int at = 0; at < Weights::BUCKETS; ++at) {
        if ((before + own.mass[at]) / total < p) {
            before += own.mass[at];
            continue;
        }
        sorted.clear();
        for (long id = 0; id < (long)x.size(); ++id)
            if (own.buckets[id] == at) sorted.push_back({-x[id], id});
        std::sort(sorted.begin(), sorted.end());
        for (auto& [value, id] : sorted) {
            kept = {-value, id};
            before += own.weights[id];
            if (before / total >= p) return kept;
        }
    }
    return Kept{least};
}

inline long greatest_logit(const float* logits, long size) {  // of equal ones the first; a NaN shows
    __m512 most = _mm512_set1_ps((float)NEVER);
    __mmask16 is_none = 0;
    each_vector(size, [&](long at, __mmask16 mask) {
        __m512 value = load(logits + at, mask);
        is_none |= _mm512_mask_cmp_ps_mask(mask, value, value, _CMP_UNORD_Q);
        most = _mm512_mask_max_ps(most, mask, most, value);
    });
    float wanted = _mm512_reduce_max_ps(most);
    for (long id = 0; id < size; ++id)
        if (is_none ? logits[id] != logits[id] : logits[id] == wanted) return id;
    return 0;
}

// x = logits / temperature, -inf where that is no number; tops: the greatest of each BLOCK.
inline void scale_logits(
    const float* logits, long size, double temperature, std::vector<double>& x, std::vector<double>& tops
) {
    x.resize(size);
    tops.assign((size + BLOCK - 1) / BLOCK, NEVER);
    const __m512d divisor = _mm512_set1_pd(temperature), never = _mm512_set1_pd(NEVER);
    for (long first = 0; first < size; first += BLOCK) {
        __m512d most = never;
        for (long at = first; at < std::min(first + BLOCK, size); at += 8) {
            __mmask8 mask = size - at >= 8 ? 0xff : (__mmask8)((1u << (size - at)) - 1);
            __m512d value = _mm512_div_pd(_mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, logits + at)), divisor);
            value = _mm512_mask_mov_pd(value, _mm512_cmp_pd_mask(value, value, _CMP_UNORD_Q), never);
            _mm512_mask_storeu_pd(x.data() + at, mask, value);
            most = _mm512_mask_max_pd(most, mask, most, value);
        }
        tops[first / BLOCK] = _mm512_reduce_max_pd(most);
    }
}

inline double kth(std::vector<double>& x, long k) {
    std::nth_element(x.begin(), x.begin() + (k - 1), x.end(), std::greater<>());
    return x[k - 1];
}

// The k-th greatest of x. That of the tops is not above it, so it is among the few from there on.
inline double kth_of(const std::vector<double>& x, const std::vector<double>& tops, long k, std::vector<double>& few) {
    few = tops;
    double least = k <= (long)tops.size() ? kth(few, k) : NEVER;
    few.clear();
    std::copy_if(x.begin(), x.end(), std::back_inserter(few), [=](double value) { return value >= least; });
    return kth(few, k);
}

inline long choose_token(const float* logits, long size, const Draws& draws, long row) {
    double temperature = draws.temperatures[row], p = draws.top_p[row], share = draws.min_p[row];
    if (temperature == 0) return greatest_logit(logits, size);
    static thread_local std::vector<double> room[3];
    std::vector<double> &x = room[0], &tops = room[1], &few = room[2];  // found once: each look at the thread's is a call
    scale_logits(logits, size, temperature, x, tops);
    long k = draws.top_k[row], found = std::max_element(tops.begin(), tops.end()) - tops.begin();
    found = std::find(x.begin() + found * BLOCK, x.end(), tops[found]) - x.begin();
    double top = x[found];
    Kept kept;
    if (k > 0 && k < size) kept.edge = kth_of(x, tops, k, few);
    if (p < 1) kept = nucleus(x, top, kept.edge, p);
    if (share > 0 && top + std::log(share) > kept.edge) kept = {top + std::log(share)};
    uint32_t noise[BLOCK];
    uint32_t position = (uint32_t)draws.positions[row];
    uint64_t key = (uint64_t)draws.keys[row];
    philox(noise, found / BLOCK * BLOCK, position, key);
    double best = top + gumbel(noise[found % BLOCK]);
    for (long first = 0; first < size; first += BLOCK) {
        if (tops[first / BLOCK] + MOST_NOISE < best || tops[first / BLOCK] < kept.edge) continue;
        philox(noise, first, position, key);
        for (long at = first; at < std::min(first + BLOCK, size); at += 8) {
            __mmask8 inside = size - at >= 8 ? 0xff : (__mmask8)((1u << (size - at)) - 1);
            __m512d own = _mm512_mask_loadu_pd(_mm512_set1_pd(NEVER), inside, x.data() + at);
            for (unsigned left = may_reach(own, noise + (at - first), _mm512_set1_pd(best)); left; left &= left - 1) {
                long id = at + std::countr_zero(left);
                if (!kept.has(x[id], id)) continue;
                double value = x[id] + gumbel(noise[id - first]);
                if (value > best || (value == best && id < found)) best = value, found = id;
            }
        }
    }
    return found;
}

// logits: [num_rows, size]; out: [num_rows]
inline void choose_tokens(const float* logits, long num_rows, long size, const Draws& draws, int64_t* out) {
    Threads::here().run(num_rows, [&](long row) { out[row] = choose_token(logits + row * size, size, draws, row); });
}
