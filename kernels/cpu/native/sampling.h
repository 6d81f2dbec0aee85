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
#ifdef HAS_AVX512
#include "avx512/sampling.h"
#else
#include "avx2/sampling.h"
#endif

struct Draws {  // of each row
    const double *temperatures, *top_p, *min_p;  // 0: the greatest; 1: off; 0: off
    const int64_t *top_k, *keys, *positions;     // 0: off; of the noise; of the new token
};

constexpr double NEVER = -std::numeric_limits<double>::infinity();
constexpr double MOST_NOISE = 23.0;  // -log(-log(1 - 2^-33)) is 22.87

constexpr long BLOCK = 64;  // tokens whose noise is made at once: four of a counter, 16 counters in a vector

inline double gumbel(uint32_t bits) { return -std::log(-std::log(((double)bits + 0.5) * 0x1p-32)); }

struct Kept {  // tokens that may be chosen: those above edge, and those at it up to an id
    double edge = NEVER;
    long last = std::numeric_limits<long>::max();
    bool has(double x, long id) const { return x > edge || (x == edge && id <= last && x > NEVER); }
};

// e^x to about one unit in the last place, for x from -700 to 0: Taylor's series of e^r, |r| at most ln 2 / 2.
inline Doubles exp_of(Doubles x) {
    Doubles n = nearest(mul(x, all(1.4426950408889634)));
    Doubles r = fnma(n, all(0x1.62e42fefa39efp-1), x);
    r = fnma(n, all(0x1.abc9e3b39803fp-56), r);  // the rest of ln 2
    constexpr double series[] = {1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040,
                                 1. / 720,       1. / 120,      1. / 24,      1. / 6,      1. / 2,     1.,          1.};
    Doubles sum = all(1. / 6227020800);
    for (double one : series) sum = fma(sum, r, all(one));
    return times_power(sum, n);
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
        const Doubles base = all(top), lowest = all(least), none = all((double)BUCKETS);
        for (long at = 0; at < size; at += 8) {
            Doubles value = load(x.data() + at, first_doubles(size - at), all(NEVER));
            Doubles below = mul(sub(base, value), all((double)PER_UNIT));
            DoubleMask counts = both(is_least(value, lowest), is_less(below, none));
            Doubles weight = exp_of(select(counts, sub(value, base), all(0.0)));
            store(weights.data() + at, select(counts, weight, all(0.0)));
            store_whole(buckets.data() + at, select(counts, below, none));
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
    Vec most = all((float)NEVER), nans = all(0.0f);
    each_vector(size, [&](long at, auto mask) {
        Vec value = select(mask, load(logits + at, mask), most);
        nans = add(nans, select(is_nan(value), value, all(0.0f)));
        most = greatest(value, most);
    });
    bool is_none = any(is_nan(nans));
    float wanted = greatest_of(most);
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
    const Doubles divisor = all(temperature), never = all(NEVER);
    for (long first = 0; first < size; first += BLOCK) {
        Doubles most = never;
        for (long at = first; at < std::min(first + BLOCK, size); at += 8) {
            DoubleMask mask = first_doubles(size - at);
            Doubles value = div(load_floats(logits + at, mask), divisor);
            value = select(is_nan(value), never, value);
            store(x.data() + at, value, mask);
            most = raised(most, mask, value);
        }
        tops[first / BLOCK] = greatest_of(most);
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
            Doubles own = load(x.data() + at, first_doubles(size - at), all(NEVER));
            for (unsigned left = may_reach(own, noise + (at - first), best); left; left &= left - 1) {
                long id = at + std::countr_zero(left);
                if (id >= size || !kept.has(x[id], id)) continue;
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
