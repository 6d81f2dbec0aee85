// Linear layers over packed weights.
#pragma once
#include "vectors.h"

enum Form : long { FLOATS, PAIRS, BYTES, NIBBLES };
enum Finish : long { PLAIN, SILU_GATED, GELU_GATED };

struct Weight {  // as linear.py has it
    const uint8_t* panels;
    const void* scales;    // BYTES: floats, [columns of panels]; NIBBLES: halves, panel by panel and group by group 32
                           // scales and 32 shifts
    const float* bias;     // [columns of panels], or null
    long form, num_k, num_columns, group;  // num_columns: of the result, half the panels' where gated
    long finish;
};

long packed_bytes(const Weight& w);

// from: [rows, num_k] of floats, bfloat16, or whole numbers of one byte; to: panels.
void pack_weight(const Weight& w, const void* from, uint8_t* to);

// a: [num_rows, num_k] -> out: [num_rows, num_columns]
void linear(const Weight& w, const void* a, long num_rows, float* out);
void linear(const Weight& w, const void* a, long num_rows, bf16* out);
void linear_nibbles(const Weight& w, const bf16* a, long num_rows, float* out);
void linear_nibbles(const Weight& w, const bf16* a, long num_rows, bf16* out);
