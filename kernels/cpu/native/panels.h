// Rows times panels: what linear.cpp and nibbles.cpp are made of.
#pragma once
#include "linear.h"
#include "products.h"

inline long panels_of(const Weight& w) {
    long width = w.finish == PLAIN ? PANEL : LANES;
    return (w.num_columns + width - 1) / width;
}

template <class T, class Out> inline void finish_row(const Weight& w, long panel, Vec low, Vec high, Out* out) {
    if (w.form == BYTES) {
        const float* scales = (const float*)w.scales + panel * PANEL;
        low = mul(low, load(scales));
        high = mul(high, load(scales + LANES));
    }
    if (w.bias) {
        low = add(low, load(w.bias + panel * PANEL));
        high = add(high, load(w.bias + panel * PANEL + LANES));
    }
    if (w.finish == PLAIN) {
        store(out + panel * PANEL, low, first(w.num_columns - panel * PANEL));
        store(out + panel * PANEL + LANES, high, first(w.num_columns - panel * PANEL - LANES));
        return;
    }
    Vec gate = rounded<T>(low), up = rounded<T>(high);
    gate = rounded<T>(w.finish == SILU_GATED ? silu(gate) : gelu_tanh(gate));
    store(out + panel * LANES, mul(gate, up), first(w.num_columns - panel * LANES));
}

// A group's sums of one row become a part of its whole ones.
struct GroupScales {
    Vec scale[2], shift[2];

    GroupScales(const Weight& w, long panel, long num_groups, long group) {
        const uint8_t* from = (const uint8_t*)w.scales + (panel * num_groups + group) * 4 * 32;
        for (int half = 0; half < 2; ++half)
            scale[half] = of_halves(from + 32 * half), shift[half] = of_halves(from + 64 + 32 * half);
        if constexpr (Nibbles::BASE != 0)
            for (int half = 0; half < 2; ++half) shift[half] = fma(scale[half], all(-Nibbles::BASE), shift[half]);
    }
    Vec added(Vec total, Vec acc, float sum, int half) const {
        return fma(all(sum), shift[half], fma(acc, scale[half], total));
    }
};

template <class W> struct AskAhead {  // for the same steps of what lies so many bytes behind
    const uint8_t* panel;

    void operator()(long step) const {
        const char* from = (const char*)panel + W::panel_bytes(step * W::PER_STEP);
        for (long byte = 0; byte < W::panel_bytes(W::PER_STEP); byte += 64) _mm_prefetch(from + byte, _MM_HINT_T1);
    }
};

// Rows times one panel. next: how far behind it the next one lies, if that is to be asked for. sums: of each row's groups,
// [rows, groups]; NIBBLES only.
template <class W, bool LOOKS_AHEAD, class T, class Out> inline void linear_panel(
    const Weight& w, const uint8_t* panel, long next, long number, const typename W::Row* a, const float* sums, long num_rows,
    Out* out
) {
    long num_groups = w.form == NIBBLES ? w.num_k / w.group : 1, num_steps = w.num_k / num_groups / W::PER_STEP;
    in_passes(num_rows, [&](long begin, auto count) {
        Vec total[count][2] = {};
        if (w.form != NIBBLES) {
            if constexpr (LOOKS_AHEAD) pass<W>(a + begin * w.num_k, w.num_k, panel, num_steps, total, AskAhead<W>{panel + next});
            else pass<W>(a + begin * w.num_k, w.num_k, panel, num_steps, total);
        } else {
            for (long group = 0; group < num_groups; ++group) {
                Vec acc[count][2] = {};
                long from = group * num_steps;
                const uint8_t* part = panel + W::panel_bytes(from * W::PER_STEP);
                const typename W::Row* rows = a + begin * w.num_k + from * W::PER_STEP;
                if constexpr (LOOKS_AHEAD) pass<W>(rows, w.num_k, part, num_steps, acc, AskAhead<W>{part + next});
                else pass<W>(rows, w.num_k, part, num_steps, acc);
                GroupScales scales(w, number, num_groups, group);
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 12
                    for (int row = 0; row < count; ++row) {
                        float sum = sums[(begin + row) * num_groups + group];
                        total[row][half] = scales.added(total[row][half], acc[row][half], sum, half);
                    }
                }
            }
        }
#pragma GCC unroll 12
        for (int row = 0; row < count; ++row)
            finish_row<T>(w, number, total[row][0], total[row][1], out + (begin + row) * w.num_columns);
    }, w.form == NIBBLES ? GROUPED_ROWS : ROWS);
}

inline uint8_t* unpack_room(long num_k) {  // of this thread
    thread_local std::vector<uint8_t> room;
    room.resize(std::max((long)room.size(), Unpacked::panel_bytes(num_k)));
    return room.data();
}

constexpr long GROUP_ROWS = std::min(8, ROWS);  // of one pass, beside a group's scales
constexpr long UNPACK_ROWS = 24;                // more: a panel of whole numbers is unpacked once for all rows

// A few rows times one panel of nibbles: each group is unpacked once for all of them.
template <class T, class Out> inline void linear_groups(
    const Weight& w, const uint8_t* panel, long ahead, long number, const Nibbles::Row* a, const float* sums, long num_rows,
    Out* out
) {
    alignas(64) float totals[UNPACK_ROWS][2][LANES] = {};
    long num_groups = w.num_k / w.group, num_bytes = Nibbles::panel_bytes(w.group);
    uint8_t* part = unpack_room(w.group);
    for (long group = 0; group < num_groups; ++group) {
        const uint8_t* packed = panel + group * num_bytes;
        for (long byte = 0; byte < num_bytes; byte += 64) _mm_prefetch((const char*)packed + ahead + byte, _MM_HINT_T1);
        unpack<Nibbles>(packed, w.group / Nibbles::PER_STEP, part);
        GroupScales scales(w, number, num_groups, group);
        in_passes(num_rows, [&](long begin, auto count) {
            Vec acc[count][2] = {};
            pass<Unpacked>(a + begin * w.num_k + group * w.group, w.num_k, part, w.group / Unpacked::PER_STEP, acc);
#pragma GCC unroll 12
            for (int row = 0; row < count; ++row) {
                float sum = sums[(begin + row) * num_groups + group];
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
                    float* total = totals[begin + row][half];
                    store(total, scales.added(load(total), acc[row][half], sum, half));
                }
            }
        }, GROUP_ROWS);
    }
    for (long row = 0; row < num_rows; ++row)
        finish_row<T>(w, number, load(totals[row][0]), load(totals[row][1]), out + row * w.num_columns);
}

template <class W, class T, class Out> inline void linear_as(
    const Weight& w, const T* a, const float* sums, long num_rows, Out* out
) {
    long num_panels = panels_of(w), num_chunks = (num_rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    bool is_middling = num_rows >= FEWEST_AHEAD && num_rows <= MOST_AHEAD;
    long each = is_middling ? TASKS_AHEAD : TASKS_PER_THREAD;
    long num_parts = std::min(num_panels, Threads::here().size() > 1 ? each * Threads::here().size() : 1);
    long num_groups = w.form == NIBBLES ? w.num_k / w.group : 1;
    Threads::here().run(num_chunks * num_parts, [&](long task) {
        long chunk = task / num_parts, part = task % num_parts;
        long begin = chunk * CHUNK_ROWS, count = std::min((long)CHUNK_ROWS, num_rows - begin);
        const typename W::Row* rows = rows_of<W>(a + begin * w.num_k, count * w.num_k);
        const float* own = sums ? sums + begin * num_groups : nullptr;
        long end = (part + 1) * num_panels / num_parts;
        for (long number = part * num_panels / num_parts; number < end; ++number) {
            const uint8_t* panel = w.panels + number * W::panel_bytes(w.num_k);
            bool looks_ahead = is_middling && number + 1 < end;
            Out* to = out + begin * w.num_columns;
            if constexpr (is_unpacked<W>) {
                if (num_rows > UNPACK_ROWS) {
                    uint8_t* whole = unpack_room(w.num_k);
                    unpack<W>(panel, w.num_k / W::PER_STEP, whole);
                    linear_panel<Unpacked, false, T>(w, whole, 0, number, rows, own, count, to);
                    continue;
                }
            }
            if constexpr (std::is_same_v<W, Nibbles>) {
                if (num_rows > GROUPED_MOST) {
                    linear_groups<T>(w, panel, number + 1 < end ? W::panel_bytes(w.num_k) : 0, number, rows, own, count, to);
                    continue;
                }
            }
            if (looks_ahead) linear_panel<W, true, T>(w, panel, W::panel_bytes(w.num_k), number, rows, own, count, to);
            else linear_panel<W, false, T>(w, panel, 0, number, rows, own, count, to);
        }
    });
}
