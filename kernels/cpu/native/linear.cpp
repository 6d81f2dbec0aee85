// Compiled with -O2: with -O3 the same inner loop comes to lie where it is 7 % slower (gcc 12, Zen 4).
#include "panels.h"

template <class Out> inline void linear_any(const Weight& w, const void* a, long num_rows, Out* out) {
    switch (w.form) {
        case FLOATS: return linear_as<Floats>(w, (const float*)a, nullptr, num_rows, out);
        case PAIRS: return linear_as<Pairs>(w, (const bf16*)a, nullptr, num_rows, out);
        case BYTES: return linear_as<Bytes>(w, (const bf16*)a, nullptr, num_rows, out);
        case NIBBLES: return linear_nibbles(w, (const bf16*)a, num_rows, out);
    }
}

// --- packing ----------------------------------------------------------------------------------------------------

// The row of w [rows, num_k] that a panel's column is; -1: none. Where gated, the lower half of w is gates.
inline long row_of(const Weight& w, long panel, long column) {
    long at = w.finish == PLAIN ? panel * PANEL + column : panel * LANES + column % LANES;
    if (at >= w.num_columns) return -1;
    return w.finish == PLAIN || column < LANES ? at : w.num_columns + at;
}

template <class T> inline void pack(const Weight& w, const T* from, uint8_t* to) {
    const int per_step = w.form == FLOATS ? Floats::PER_STEP : Pairs::PER_STEP;
    Threads::here().run(panels_of(w), [&](long panel) {
        for (long column = 0; column < PANEL; ++column) {
            long row = row_of(w, panel, column);
            for (long k = 0; k < w.num_k; ++k) {
                T value = row < 0 ? T() : from[row * w.num_k + k];
                switch (w.form) {
                    case BYTES: Bytes::put(to + panel * Bytes::panel_bytes(w.num_k), column, k, (int)value); break;
                    case NIBBLES: Nibbles::put(to + panel * Nibbles::panel_bytes(w.num_k), column, k, (int)value); break;
                    default: {
                        long step = k / per_step, at = column * per_step + k % per_step;  // of the elements of a step
                        std::memcpy(to + (panel * w.num_k / per_step + step) * 128 + at * sizeof(T), &value, sizeof(T));
                    }
                }
            }
        }
    });
}

void linear(const Weight& w, const void* a, long num_rows, float* out) { linear_any(w, a, num_rows, out); }
void linear(const Weight& w, const void* a, long num_rows, bf16* out) { linear_any(w, a, num_rows, out); }

long packed_bytes(const Weight& w) {
    long num_panels = panels_of(w);
    switch (w.form) {
        case FLOATS: return num_panels * Floats::panel_bytes(w.num_k);
        case PAIRS: return num_panels * Pairs::panel_bytes(w.num_k);
        case BYTES: return num_panels * Bytes::panel_bytes(w.num_k);
        default: return num_panels * Nibbles::panel_bytes(w.num_k);
    }
}

void pack_weight(const Weight& w, const void* from, uint8_t* to) {
    switch (w.form) {
        case FLOATS: return pack(w, (const float*)from, to);
        case PAIRS: return pack(w, (const bf16*)from, to);
        default: return pack(w, (const int8_t*)from, to);
    }
}
