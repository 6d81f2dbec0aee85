// Paged attention, causal, grouped-query, reading keys and values where they lie in their blocks.
//
// A task is some new tokens of one sequence with the query heads of one KV head: rows. Keys come in tiles of KEYS
// positions from 0, packed as panels (products.h), and the softmax goes along with them (Milakov and Gimelshein, 2018).
// A tile that a row does not see changes no bit of it, so a row's result depends on its own keys only.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "products.h"

constexpr long KEYS = 64;
constexpr long TASK_ROWS = 8 * ROWS;

struct Span {  // one sequence's new tokens; where its blocks stand in a table of ids, from the one of first_key on
    int64_t row, num_new, start, first_key, table;
};

template <class T> struct Attention {
    const T *q, *k_cache, *v_cache;  // q: [rows, q_stride]; caches: [blocks, num_kv_heads, block_size, head_dim]
    T* out;                          // [rows, num_heads * head_dim]
    const Span* spans;
    const int64_t* tables;
    long num_spans, q_stride, num_heads, num_kv_heads, head_dim, block_size, window;  // window 0: none
    float scale;
};

template <class T> struct Elements;
template <> struct Elements<float> { using Weight = Floats; };
template <> struct Elements<bf16> { using Weight = Pairs; };

template <class T> class AttentionTask {
public:
    using W = typename Elements<T>::Weight;

    struct Scratch {  // of one thread, kept from task to task
        std::vector<T> queries, keys, values, weights;
        std::vector<float> scores, out, highest, sums, factors;
    };

    AttentionTask(const Attention<T>& about, Scratch& mine)
        : about_(about), groups_(about.num_heads / about.num_kv_heads), dim_(about.head_dim),
          width_((about.head_dim + PANEL - 1) / PANEL * PANEL), mine_(mine) {}

    // Tokens `begin` to `end` of a span's new ones, for one KV head.
    void run(const Span& span, long kv_head, long begin, long end) {
        num_rows_ = (end - begin) * groups_;
        take_queries(span, kv_head, begin);
        mine_.out.assign(num_rows_ * width_, 0.0f);
        mine_.highest.assign(num_rows_, -std::numeric_limits<float>::infinity());
        mine_.sums.assign(num_rows_, 0.0f);
        long last = span.start + end;  // one past the last key that any row sees
        long lowest = about_.window ? std::max(span.first_key, span.start + begin - about_.window + 1) : span.first_key;
        for (long key = lowest / KEYS * KEYS; key < last; key += KEYS) {
            pack_tile(span, kv_head, key, lowest, last);
            ask_for(span, kv_head, key + KEYS, last);
            score(span, begin, key);
            weigh();
        }
        put_out(span, kv_head, begin);
    }

private:
    void take_queries(const Span& span, long kv_head, long begin) {
        mine_.queries.resize(num_rows_ * dim_);
        for (long row = 0; row < num_rows_; ++row) {
            long token = span.row + begin + row / groups_, head = kv_head * groups_ + row % groups_;
            std::memcpy(&mine_.queries[row * dim_], about_.q + token * about_.q_stride + head * dim_, dim_ * sizeof(T));
        }
    }

    // Keys as panels of positions, values as panels of dimensions. What nobody sees may be anything: it becomes 0.
    void pack_tile(const Span& span, long kv_head, long key, long lowest, long last) {
        const T *k[KEYS] = {}, *v[KEYS] = {};
        long from = std::max(key, lowest), at = from - span.first_key, size = about_.block_size;
        const int64_t* block = about_.tables + span.table + at / size;
        for (long offset = at % size, place = from - key; place < std::min(KEYS, last - key); ++place, ++offset) {
            if (offset == size) offset = 0, ++block;
            long record = ((*block * about_.num_kv_heads + kv_head) * size + offset) * dim_;
            k[place] = about_.k_cache + record;
            v[place] = about_.v_cache + record;
        }
        mine_.keys.resize(KEYS * dim_);
        mine_.values.resize(KEYS * width_);
        for (long at = 0; at < KEYS; at += LANES)
            pack_keys(k + at, mine_.keys.data() + at / PANEL * PANEL * dim_, at % PANEL);
        pack_values(v);
    }

    // The blocks of a tile are scattered: where there is little to compute, the next one is on its way meanwhile.
    void ask_for(const Span& span, long kv_head, long key, long last) const {
        if (num_rows_ > ROWS) return;
        long size = about_.block_size, bytes = size * dim_ * (long)sizeof(T);
        for (long at = (key - span.first_key) / size; at * size + span.first_key < std::min(key + KEYS, last); ++at) {
            long record = (about_.tables[span.table + at] * about_.num_kv_heads + kv_head) * size * dim_;
            for (long byte = 0; byte < bytes; byte += 64) {
                _mm_prefetch((const char*)(about_.k_cache + record) + byte, _MM_HINT_T1);
                _mm_prefetch((const char*)(about_.v_cache + record) + byte, _MM_HINT_T1);
            }
        }
    }

    // 16 keys into lanes `lane` to `lane` + 15 of each step of a panel.
    void pack_keys(const T* const* k, T* panel, long lane) {
        constexpr long per_step = W::PER_STEP, per_vector = LANES * per_step;
        for (long dim = 0; dim < dim_; dim += per_vector) {
            long count = std::min(per_vector, dim_ - dim);
            __mmask16 mask = first(count / per_step);
            __m512i rows[LANES];
            for (int row = 0; row < LANES; ++row)
                rows[row] = k[row] ? _mm512_maskz_loadu_epi32(mask, k[row] + dim) : _mm512_setzero_si512();
            transpose(rows);
            for (long step = 0; step < count / per_step; ++step)
                _mm512_storeu_si512(panel + (dim / per_step + step) * PANEL * per_step + lane * per_step, rows[step]);
        }
    }

    void pack_values(const T* const* v) {
        for (long column = 0; column < width_; column += PANEL) {
            T* panel = mine_.values.data() + column * KEYS;
            for (long key = 0; key < KEYS; key += W::PER_STEP) pack_step(v + key, column, panel + key * PANEL);
        }
    }

    void pack_step(const T* const* v, long column, T* to) {
        for (long half = 0; half < 2; ++half) {
            long at = column + half * LANES;
            __mmask16 mask = first(dim_ - at);
            if constexpr (W::PER_STEP == 1) {
                store(to + half * LANES, v[0] ? load(v[0] + at, mask) : _mm512_setzero_ps());
            } else {  // two keys' elements side by side
                __m512i a = _mm512_cvtepu16_epi32(words(v[0], at, mask)), b = _mm512_cvtepu16_epi32(words(v[1], at, mask));
                _mm512_storeu_si512(to + half * PANEL, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
            }
        }
    }

    static __m256i words(const bf16* from, long at, __mmask16 mask) {
        return from ? _mm256_maskz_loadu_epi16(mask, from + at) : _mm256_setzero_si256();
    }

    static void transpose(__m512i (&rows)[LANES]) {  // 16 x 16 of 32 bits
        __m512i t[LANES];
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

    // Scores of a tile, as powers of two; -inf where a row does not see.
    void score(const Span& span, long begin, long key) {
        mine_.scores.resize(num_rows_ * KEYS);
        const __m512 scale = _mm512_set1_ps(about_.scale * LOG2_E);
        long position = span.start + begin;  // of the first row
        bool all_seen = key + KEYS <= position + 1 && !about_.window;
        for (long part = 0; part < KEYS; part += PANEL) {
            const uint8_t* panel = (const uint8_t*)(mine_.keys.data() + part * dim_);
            in_passes(num_rows_, [&](long from, auto count) {
                __m512 acc[count][2] = {};
                pass<W>(&mine_.queries[from * dim_], dim_, panel, dim_ / W::PER_STEP, acc);
                float* to = &mine_.scores[from * KEYS + part];
                for (int row = 0; row < count; ++row, to += KEYS) {
                    __m512 low = _mm512_mul_ps(acc[row][0], scale), high = _mm512_mul_ps(acc[row][1], scale);
                    if (!all_seen) {
                        long last = position + (from + row) / groups_ - key - part;
                        low = seen(low, last), high = seen(high, last - LANES);
                    }
                    store(to, low), store(to + LANES, high);
                }
            });
        }
    }

    // -inf beyond place `last`, and before the window that ends there.
    __m512 seen(__m512 scores, long last) const {
        __mmask16 mask = first(last + 1);
        if (about_.window) mask &= (__mmask16)~first(last + 1 - about_.window);
        return _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), mask, scores);
    }

    // Scores become weights; the sums so far are turned to the new highest score, and the tile's are added.
    void weigh() {
        mine_.weights.resize(num_rows_ * KEYS);
        mine_.factors.resize(num_rows_);
        for (long row = 0; row < num_rows_; ++row) {
            const float* own = &mine_.scores[row * KEYS];
            __m512 x[KEYS / LANES], top = load(own);
            for (int part = 0; part < KEYS / LANES; ++part) x[part] = load(own + part * LANES);
            for (int part = 1; part < KEYS / LANES; ++part) top = _mm512_max_ps(top, x[part]);
            float highest = std::max(mine_.highest[row], _mm512_reduce_max_ps(top));
            bool is_seen = highest > -std::numeric_limits<float>::infinity();
            __m512 sum = _mm512_setzero_ps();
            for (int part = 0; part < KEYS / LANES; ++part) {
                __m512 weight = is_seen ? exp2_of(_mm512_sub_ps(x[part], _mm512_set1_ps(highest))) : sum;
                store(&mine_.weights[row * KEYS + part * LANES], weight);
                if (is_seen) sum = _mm512_add_ps(sum, rounded<T>(weight));
            }
            float change = mine_.highest[row] - highest;
            float factor = is_seen && change < 0 ? _mm512_cvtss_f32(exp2_of(_mm512_set1_ps(change))) : 1.0f;
            mine_.sums[row] = mine_.sums[row] * factor + _mm512_reduce_add_ps(sum);
            mine_.highest[row] = highest;
            mine_.factors[row] = factor;
        }
        for (long column = 0; column < width_; column += PANEL) {
            const uint8_t* panel = (const uint8_t*)(mine_.values.data() + column * KEYS);
            in_passes(num_rows_, [&](long from, auto count) {
                __m512 acc[count][2];
                for (int index = 0; index < count; ++index) {
                    __m512 factor = _mm512_set1_ps(mine_.factors[from + index]);
                    for (int half = 0; half < 2; ++half) {
                        float* so_far = &mine_.out[(from + index) * width_ + column + half * LANES];
                        acc[index][half] = _mm512_mul_ps(load(so_far), factor);
                    }
                }
                pass<W>(&mine_.weights[from * KEYS], KEYS, panel, KEYS / W::PER_STEP, acc);
                for (int index = 0; index < count; ++index)
                    for (int half = 0; half < 2; ++half)
                        store(&mine_.out[(from + index) * width_ + column + half * LANES], acc[index][half]);
            });
        }
    }

    void put_out(const Span& span, long kv_head, long begin) {
        for (long row = 0; row < num_rows_; ++row) {
            long token = span.row + begin + row / groups_, head = kv_head * groups_ + row % groups_;
            T* to = about_.out + (token * about_.num_heads + head) * dim_;
            __m512 sum = _mm512_set1_ps(mine_.sums[row]);
            for (long at = 0; at < dim_; at += LANES)
                store(to + at, _mm512_div_ps(load(&mine_.out[row * width_ + at]), sum), first(dim_ - at));
        }
    }

    const Attention<T>& about_;
    const long groups_, dim_, width_;
    long num_rows_ = 0;
    Scratch& mine_;
};

template <class T> inline void attend(const Attention<T>& about) {
    struct Part {
        long span, kv_head, begin, end;
        long work(const Span* spans) const { return (end - begin) * (spans[span].start + end); }
    };
    std::vector<Part> parts;
    long tokens = std::max(1L, TASK_ROWS * about.num_kv_heads / about.num_heads);
    for (long span = 0; span < about.num_spans; ++span)
        for (long begin = 0; begin < about.spans[span].num_new; begin += tokens)
            for (long head = 0; head < about.num_kv_heads; ++head)
                parts.push_back({span, head, begin, std::min(begin + tokens, (long)about.spans[span].num_new)});
    // the longest first, so that threads end together
    std::stable_sort(parts.begin(), parts.end(), [&](const Part& a, const Part& b) {
        return a.work(about.spans) > b.work(about.spans);
    });
    Threads::here().run(parts.size(), [&](long index) {
        thread_local typename AttentionTask<T>::Scratch scratch;
        const Part& part = parts[index];
        AttentionTask<T>(about, scratch).run(about.spans[part.span], part.kv_head, part.begin, part.end);
    });
}
