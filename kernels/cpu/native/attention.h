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

struct Part {  // tokens `begin` to `end` of a span's new ones, for one KV head
    long span, kv_head, begin, end;
};

template <class T> struct Elements;
template <> struct Elements<float> { using Weight = Floats; };
template <> struct Elements<bf16> { using Weight = PackedKeys; };

template <class T> class AttentionTask {
public:
    using W = typename Elements<T>::Weight;
    using E = typename W::Row;  // what a processor computes with

    struct Scratch {  // of one thread, kept from task to task
        std::vector<T> zeros;
        std::vector<E> queries, keys, values;
        std::vector<float> out, highest, sums;
        alignas(64) E weights[ROWS * KEYS];  // of the rows of one pass, as what follows
        alignas(64) float scores[ROWS * KEYS], parts[ROWS * LANES], tops[LANES], factors[LANES];
    };

    AttentionTask(const Attention<T>& about, Scratch& mine)
        : about_(about), groups_(about.num_heads / about.num_kv_heads), dim_(about.head_dim),
          width_((about.head_dim + PANEL - 1) / PANEL * PANEL), mine_(mine) {
        mine_.zeros.resize(dim_);
        mine_.keys.resize(KEYS * dim_);
        mine_.values.resize(KEYS * width_);
    }

    // One part after the other; the first tile of each is on its way while the one before is computed.
    void run(const Part* parts, long count) {
        Tile tile = tile_at(parts[0], first_tile(parts[0]));
        for (long index = 0; index < count; ++index) run(parts[index], index + 1 < count ? parts + index + 1 : nullptr, tile);
    }

private:
    struct Tile {  // where each position's key and value lie; zeros where nobody sees it
        const T *k[KEYS], *v[KEYS];
    };

    void run(const Part& part, const Part* next, Tile& tile) {
        const Span& span = about_.spans[part.span];
        num_rows_ = (part.end - part.begin) * groups_;
        take_queries(span, part.kv_head, part.begin);
        mine_.out.assign(num_rows_ * width_, 0.0f);
        mine_.highest.assign(num_rows_, -std::numeric_limits<float>::infinity());
        mine_.sums.assign(num_rows_, 0.0f);
        long last = span.start + part.end;  // one past the last key that any row sees
        for (long key = first_tile(part); key < last; key += KEYS) {
            Tile following = key + KEYS < last ? tile_at(part, key + KEYS) : next ? tile_at(*next, first_tile(*next)) : tile;
            if (num_rows_ > ROWS) {
                pack(tile, following.k, following.v);
                in_passes(num_rows_, [&](long from, auto count) { add_tile<count>(span, part.begin, key, from, Nothing()); });
            } else {
                pack(tile, following.k, nullptr);
                counted(num_rows_, [&](auto count) {
                    add_tile<count>(span, part.begin, key, 0, Values{following.v, dim_, 0});
                });
            }
            tile = following;
        }
        put_out(span, part.kv_head, part.begin);
    }

    struct Values {  // of the next tile, asked for line by line
        const T* const* v;
        long dim, line;
        static constexpr long PER_LINE = 64 / (long)sizeof(T);

        void operator()(long step) const {
            long at = line + step, per_key = dim / PER_LINE;
            if (at < KEYS * per_key) _mm_prefetch((const char*)(v[at / per_key] + at % per_key * PER_LINE), _MM_HINT_T1);
        }
    };

    template <int COUNT, class Ask> void add_tile(const Span& span, long begin, long key, long from, Ask ask) {
        score<COUNT>(span, begin, key, from, ask);
        weigh(from, COUNT);
        add_values<COUNT>(from, ask);
    }

    long lowest_key(const Part& part) const {  // that any row sees
        const Span& span = about_.spans[part.span];
        return about_.window ? std::max(span.first_key, span.start + part.begin - about_.window + 1) : span.first_key;
    }

    long first_tile(const Part& part) const { return lowest_key(part) / KEYS * KEYS; }

    void take_queries(const Span& span, long kv_head, long begin) {
        mine_.queries.resize(num_rows_ * dim_);
        for (long row = 0; row < num_rows_; ++row) {
            long token = span.row + begin + row / groups_, head = kv_head * groups_ + row % groups_;
            copy_row(&mine_.queries[row * dim_], about_.q + token * about_.q_stride + head * dim_, dim_);
        }
    }

    Tile tile_at(const Part& part, long key) const {
        const Span& span = about_.spans[part.span];
        long size = about_.block_size, from = std::max(key, lowest_key(part)), at = from - span.first_key;
        long end = std::min(KEYS, span.start + part.end - key), place = 0;
        const int64_t* block = about_.tables + span.table + at / size;
        Tile tile;
        for (; place < from - key; ++place) tile.k[place] = tile.v[place] = mine_.zeros.data();
        for (long offset = at % size; place < end; ++place, ++offset) {
            if (offset == size) offset = 0, ++block;
            long record = ((*block * about_.num_kv_heads + part.kv_head) * size + offset) * dim_;
            tile.k[place] = about_.k_cache + record;
            tile.v[place] = about_.v_cache + record;
        }
        for (; place < KEYS; ++place) tile.k[place] = tile.v[place] = mine_.zeros.data();
        return tile;
    }

    // Keys as panels of positions, values as panels of dimensions. Those of the next tile are asked for one by one
    // meanwhile: blocks are scattered, and a processor takes only so many requests at once.
    void pack(const Tile& tile, const T* const* next_k, const T* const* next_v) {
        for (long at = 0; at < KEYS; at += LANES)
            pack_keys(tile.k + at, next_k + at, mine_.keys.data() + at / PANEL * PANEL * dim_, at % PANEL);
        pack_values(tile.v, next_v);
    }

    // 16 keys into lanes `lane` to `lane` + 15 of each step of a panel.
    void pack_keys(const T* const* k, const T* const* next, E* panel, long lane) {
        constexpr long per_step = W::PER_STEP, per_vector = LANES * per_step;
        for (long dim = 0; dim < dim_; dim += per_vector) {
            long count = std::min(per_vector, dim_ - dim);
            Words rows[LANES];
            for (int row = 0; row < LANES; ++row) {
                rows[row] = load_words(k[row] + dim, count / per_step);
                _mm_prefetch((const char*)(next[row] + dim), _MM_HINT_T1);
            }
            transpose(rows);
            for (long step = 0; step < count / per_step; ++step)
                store_words(panel + (dim / per_step + step) * PANEL * per_step + lane * per_step, rows[step]);
        }
    }

    void pack_values(const T* const* v, const T* const* next) {
        for (long column = 0; column < width_; column += PANEL) {
            E* panel = mine_.values.data() + column * KEYS;
            for (long key = 0; key < KEYS; key += W::PER_STEP) {
                pack_step(v + key, column, panel + key * PANEL);
                for (int each = 0; next && each < W::PER_STEP; ++each)
                    for (long byte = 0; byte < PANEL * (long)sizeof(T); byte += 64)
                        _mm_prefetch((const char*)(next[key + each] + column) + byte, _MM_HINT_T1);
            }
        }
    }

    void pack_step(const T* const* v, long column, E* to) {
        if constexpr (W::PER_STEP == 1) {
            store(to, load(v[0] + column, first(dim_ - column)));
            store(to + LANES, load(v[0] + column + LANES, first(dim_ - column - LANES)));
        } else {
            store_pairs(to, v[0] + column, v[1] + column, dim_ - column);
        }
    }

    // Scores of some rows, as powers of two; -inf where a row does not see.
    template <int COUNT, class Ask> void score(const Span& span, long begin, long key, long from, Ask& ask) {
        const Vec scale = all(about_.scale * LOG2_E);
        long position = span.start + begin;  // of the first row
        bool all_seen = key + KEYS <= position + 1 && !about_.window;
        for (long part = 0; part < KEYS; part += PANEL) {
            Vec acc[COUNT][2] = {};
            const uint8_t* panel = (const uint8_t*)(mine_.keys.data() + part * dim_);
            pass<W>(&mine_.queries[from * dim_], dim_, panel, dim_ / W::PER_STEP, acc, ask);
            if constexpr (!std::is_same_v<Ask, Nothing>) ask.line += dim_ / W::PER_STEP;
            float* to = mine_.scores + part;
            for (int row = 0; row < COUNT; ++row, to += KEYS) {
                Vec low = mul(acc[row][0], scale), high = mul(acc[row][1], scale);
                if (!all_seen) {
                    long last = position + (from + row) / groups_ - key - part;
                    low = seen(low, last), high = seen(high, last - LANES);
                }
                store(to, low), store(to + LANES, high);
            }
        }
    }

    // -inf beyond place `last`, and before the window that ends there.
    Vec seen(Vec scores, long last) const {
        Mask mask = first(last + 1);
        if (about_.window) mask = without(mask, first(last + 1 - about_.window));
        return select(mask, scores, all(-std::numeric_limits<float>::infinity()));
    }

    // Scores become weights; the sums so far are turned to the new highest score, and the tile's are added. In loops over
    // rows that do not wait for one another: a row's own maximum, powers and sum do.
    void weigh(long from, long count) {
        raise_highest(from, count);
        for (long row = 0; row < count; ++row) {
            const float* own = mine_.scores + row * KEYS;
            bool is_seen = mine_.highest[from + row] > -std::numeric_limits<float>::infinity();
            Vec highest = all(mine_.highest[from + row]), sum = all(0.0f);
            for (int part = 0; part < KEYS / LANES; ++part) {
                Vec weight = is_seen ? exp2_of(sub(load(own + part * LANES), highest)) : sum;
                store(mine_.weights + row * KEYS + part * LANES, weight);
                if (is_seen) sum = add(sum, rounded<E>(weight));
            }
            store(mine_.parts + row * LANES, sum);
        }
        for (long row = 0; row < count; ++row) {
            float& sum = mine_.sums[from + row];
            sum = sum * mine_.factors[row] + sum_of(load(mine_.parts + row * LANES));
        }
    }

    // The highest score of each row so far, and what sums of before are to be multiplied by.
    void raise_highest(long from, long count) {
        for (long row = 0; row < count; ++row) {
            const float* own = mine_.scores + row * KEYS;
            Vec top = load(own);
            for (int part = 1; part < KEYS / LANES; ++part) top = greatest(top, load(own + part * LANES));
            mine_.tops[row] = greatest_of(top);
        }
        const Vec none = all(-std::numeric_limits<float>::infinity()), one = all(1.0f);
        Vec before = load(&mine_.highest[from], first(count));
        Vec highest = greatest(load(mine_.tops), before), change = sub(before, highest);
        Mask is_raised = both(is_less(none, highest), is_less(change, all(0.0f)));
        store(mine_.factors, select(is_raised, exp2_of(change), one));
        store(&mine_.highest[from], highest, first(count));
    }

    template <int COUNT, class Ask> void add_values(long from, Ask& ask) {
        for (long column = 0; column < width_; column += PANEL) {
            const uint8_t* panel = (const uint8_t*)(mine_.values.data() + column * KEYS);
            Vec acc[COUNT][2];
            float* so_far = &mine_.out[from * width_ + column];
            for (int row = 0; row < COUNT; ++row) {
                Vec factor = all(mine_.factors[row]);
                for (int half = 0; half < 2; ++half)
                    acc[row][half] = mul(load(so_far + row * width_ + half * LANES), factor);
            }
            pass<W>(mine_.weights, KEYS, panel, KEYS / W::PER_STEP, acc, ask);
            if constexpr (!std::is_same_v<Ask, Nothing>) ask.line += KEYS / W::PER_STEP;
            for (int row = 0; row < COUNT; ++row)
                for (int half = 0; half < 2; ++half) store(so_far + row * width_ + half * LANES, acc[row][half]);
        }
    }

    void put_out(const Span& span, long kv_head, long begin) {
        for (long row = 0; row < num_rows_; ++row) {
            long token = span.row + begin + row / groups_, head = kv_head * groups_ + row % groups_;
            T* to = about_.out + (token * about_.num_heads + head) * dim_;
            Vec sum = all(mine_.sums[row]);
            for (long at = 0; at < dim_; at += LANES)
                store(to + at, div(load(&mine_.out[row * width_ + at]), sum), first(dim_ - at));
        }
    }

    const Attention<T>& about_;
    const long groups_, dim_, width_;
    long num_rows_ = 0;
    Scratch& mine_;
};

template <class T> inline void attend(const Attention<T>& about) {
    std::vector<Part> parts;
    long tokens = std::max(1L, TASK_ROWS * about.num_kv_heads / about.num_heads);
    for (long span = 0; span < about.num_spans; ++span)
        for (long begin = 0; begin < about.spans[span].num_new; begin += tokens)
            for (long head = 0; head < about.num_kv_heads; ++head)
                parts.push_back({span, head, begin, std::min(begin + tokens, (long)about.spans[span].num_new)});
    // the longest first, so that threads end together
    auto work = [&](const Part& part) { return (part.end - part.begin) * (about.spans[part.span].start + part.end); };
    std::stable_sort(parts.begin(), parts.end(), [&](const Part& a, const Part& b) { return work(a) > work(b); });
    long count = parts.size(), num_tasks = std::min(count, TASKS_PER_THREAD * Threads::here().size());
    Threads::here().run(num_tasks, [&](long index) {
        thread_local typename AttentionTask<T>::Scratch scratch;
        long begin = index * count / num_tasks, end = (index + 1) * count / num_tasks;
        AttentionTask<T>(about, scratch).run(parts.data() + begin, end - begin);
    });
}
