// Rows times panels: what linear.cpp and nibbles.cpp are made of.
#pragma once
#include "linear.h"
#include "products.h"

inline long panels_of(const Weight& w) {
    long width = w.finish == PLAIN ? PANEL : LANES;
    return (w.num_columns + width - 1) / width;
}

template <class T, class Out> inline void finish_row(const Weight& w, long panel, __m512 low, __m512 high, Out* out) {
    if (w.form == BYTES) {
        const float* scales = (const float*)w.scales + panel * PANEL;
        low = _mm512_mul_ps(low, load(scales));
        high = _mm512_mul_ps(high, load(scales + LANES));
    }
    if (w.bias) {
        low = _mm512_add_ps(low, load(w.bias + panel * PANEL));
        high = _mm512_add_ps(high, load(w.bias + panel * PANEL + LANES));
    }
    if (w.finish == PLAIN) {
        store(out + panel * PANEL, low, first(w.num_columns - panel * PANEL));
        store(out + panel * PANEL + LANES, high, first(w.num_columns - panel * PANEL - LANES));
        return;
    }
    __m512 gate = rounded<T>(low), up = rounded<T>(high);
    gate = rounded<T>(w.finish == SILU_GATED ? silu(gate) : gelu_tanh(gate));
    store(out + panel * LANES, _mm512_mul_ps(gate, up), first(w.num_columns - panel * LANES));
}

// Rows times one panel. next: how far behind it the next one lies, if that is to be asked for. sums: of each row's groups,
// [rows, groups]; NIBBLES only.
template <class W, bool LOOKS_AHEAD, class T, class Out> inline void linear_panel(
    const Weight& w, const uint8_t* panel, long next, long number, const T* a, const float* sums, long num_rows, Out* out
) {
    long num_groups = w.form == NIBBLES ? w.num_k / w.group : 1, num_steps = w.num_k / num_groups / W::PER_STEP;
    in_passes(num_rows, [&](long begin, auto count) {
        __m512 total[count][2] = {};
        if (w.form != NIBBLES) {
            pass<W, LOOKS_AHEAD>(a + begin * w.num_k, w.num_k, panel, num_steps, total, next);
        } else {
            for (long group = 0; group < num_groups; ++group) {
                __m512 acc[count][2] = {};
                long from = group * num_steps;
                const uint8_t* part = panel + W::panel_bytes(from * W::PER_STEP);
                const T* rows = a + begin * w.num_k + from * W::PER_STEP;
                pass<W, LOOKS_AHEAD>(rows, w.num_k, part, num_steps, acc, next);
                const __m256i* scales = (const __m256i*)w.scales + (number * num_groups + group) * 4;
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
                    __m512 scale = _mm512_cvtph_ps(scales[half]), shift = _mm512_cvtph_ps(scales[2 + half]);
#pragma GCC unroll 12
                    for (int row = 0; row < count; ++row) {
                        __m512 sum = _mm512_set1_ps(sums[(begin + row) * num_groups + group]);
                        total[row][half] = _mm512_fmadd_ps(acc[row][half], scale, total[row][half]);
                        total[row][half] = _mm512_fmadd_ps(sum, shift, total[row][half]);
                    }
                }
            }
        }
#pragma GCC unroll 12
        for (int row = 0; row < count; ++row)
            finish_row<T>(w, number, total[row][0], total[row][1], out + (begin + row) * w.num_columns);
    }, w.form == NIBBLES ? ROWS / 2 : ROWS);  // a group's sums and the whole ones: twice the accumulators
}

// One panel of whole numbers as bfloat16.
template <class W> inline const uint8_t* unpacked(const uint8_t* panel, long num_k) {
    thread_local std::vector<uint8_t> space;
    space.resize(Pairs::panel_bytes(num_k));
    const W weights;
    for (long step = 0; step < num_k / 2; ++step) {
        Step b = weights.at(panel, step);
        _mm512_storeu_si512(space.data() + step * 128, b.low);
        _mm512_storeu_si512(space.data() + step * 128 + 64, b.high);
    }
    return space.data();
}

constexpr long UNPACK_ROWS = 24;  // more: a panel of whole numbers is unpacked once for all rows

template <class W, class T, class Out> inline void linear_as(
    const Weight& w, const T* a, const float* sums, long num_rows, Out* out
) {
    long num_panels = panels_of(w), num_chunks = (num_rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    long num_parts = std::min(num_panels, Threads::here().size() > 1 ? TASKS_PER_THREAD * Threads::here().size() : 1);
    long num_groups = w.form == NIBBLES ? w.num_k / w.group : 1;
    Threads::here().run(num_chunks * num_parts, [&](long task) {
        long chunk = task / num_parts, part = task % num_parts;
        long begin = chunk * CHUNK_ROWS, count = std::min((long)CHUNK_ROWS, num_rows - begin);
        const float* own = sums ? sums + begin * num_groups : nullptr;
        long end = (part + 1) * num_panels / num_parts;
        for (long number = part * num_panels / num_parts; number < end; ++number) {
            const uint8_t* panel = w.panels + number * W::panel_bytes(w.num_k);
            bool looks_ahead = num_rows >= FEWEST_AHEAD && num_rows <= MOST_AHEAD && number + 1 < end;
            const T* rows = a + begin * w.num_k;
            Out* to = out + begin * w.num_columns;
            if constexpr (!std::is_same_v<W, Floats> && !std::is_same_v<W, Pairs>) {
                if (num_rows > UNPACK_ROWS) {
                    linear_panel<Pairs, false>(w, unpacked<W>(panel, w.num_k), 0, number, rows, own, count, to);
                    continue;
                }
            }
            if (looks_ahead) linear_panel<W, true>(w, panel, W::panel_bytes(w.num_k), number, rows, own, count, to);
            else linear_panel<W, false>(w, panel, 0, number, rows, own, count, to);
        }
    });
}
