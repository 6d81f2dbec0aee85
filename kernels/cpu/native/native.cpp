// What Python calls (library.py). Pointers are of contiguous tensors.
#include "attention.h"
#include "decoder.h"
#include "layers.h"
#include "linear.h"
#include "sampling.h"

#pragma GCC visibility push(default)

extern "C" {

void set_threads(int count) { Threads::here().resize(count); }
void pin_threads(const int* cores, int count) { Threads::here().pin(cores, count); }

long panel_bytes_of(const Weight* w) { return packed_bytes(*w); }

void pack_panels(const Weight* w, const void* from, uint8_t* to) { pack_weight(*w, from, to); }

void multiply(const Weight* w, const void* a, long num_rows, void* out, int is_float) {
    return is_float ? linear(*w, a, num_rows, (float*)out) : linear(*w, a, num_rows, (bf16*)out);
}

void add_rms_norm_float(
    float* hidden, const float* added, const float* weight, float* out, long num_rows, long width, float eps, int is_wide
) {
    add_rms_norm(hidden, added, weight, out, num_rows, width, eps, is_wide);
}

void add_rms_norm_bf16(
    bf16* hidden, const bf16* added, const float* weight, bf16* out, long num_rows, long width, float eps, int is_wide
) {
    add_rms_norm(hidden, added, weight, out, num_rows, width, eps, is_wide);
}

void rope_store_float(float* qkv, const Store<float>* to) { rope_store(qkv, *to); }
void rope_store_bf16(bf16* qkv, const Store<bf16>* to) { rope_store(qkv, *to); }
void attend_float(const Attention<float>* about) { attend(*about); }
void attend_bf16(const Attention<bf16>* about) { attend(*about); }

void run_layers_float(const Layer<float>* layers, long count, Pass<float>* step) { run_layers(layers, count, step); }
void run_layers_bf16(const Layer<bf16>* layers, long count, Pass<bf16>* step) { run_layers(layers, count, step); }

void choose(const float* logits, long num_rows, long size, const Draws* draws, int64_t* out) {
    choose_tokens(logits, num_rows, size, *draws, out);
}

}  // extern "C"

#pragma GCC visibility pop
