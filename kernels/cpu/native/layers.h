// The pointwise parts of a layer; rows are shared out among threads. Each rounds where kernels/reference/layers.py does.
#pragma once
#include <cmath>

#include "threads.h"
#include "vectors.h"

constexpr long FEW = 1 << 14;  // elements that one thread is done with before another has woken

template <class Work> inline void each_row(long num_rows, long width, const Work& work) {
    long parts = num_rows * width < FEW ? 1 : std::min(num_rows, 4L * Threads::here().size());
    Threads::here().run(parts, [&](long part) {
        for (long row = part * num_rows / parts; row < (part + 1) * num_rows / parts; ++row) work(row);
    });
}

// work(at, mask) for each vector of a row.
template <class Work> inline void each_vector(long width, const Work& work) {
    long at = 0;
    for (; at + LANES <= width; at += LANES) work(at, Whole());
    if (at < width) work(at, first(width - at));
}

template <class T> inline void normed_row(T* out, const T* x, const float* weight, long width, float eps, bool is_wide) {
    Vec squares = all(0.0f);
    each_vector(width, [&](long at, auto mask) {
        Vec value = load(x + at, mask);
        squares = fma(value, value, squares);
    });
    float mean = sum_of(squares) / (float)width;
    Vec scale = all(1.0f / std::sqrt(mean + eps));
    each_vector(width, [&](long at, auto mask) {
        Vec value = mul(load(x + at, mask), scale);
        if (!is_wide) value = rounded<T>(value);
        store(out + at, mul(value, load(weight + at, mask)), mask);
    });
}

// hidden += added (where there is any); out = norm of hidden. All [num_rows, width].
template <class T> inline void add_rms_norm(
    T* hidden, const T* added, const float* weight, T* out, long num_rows, long width, float eps, bool is_wide
) {
    each_row(num_rows, width, [&](long row) {
        T* own = hidden + row * width;
        if (added) {
            const T* other = added + row * width;
            each_vector(width, [&](long at, auto mask) {
                store(own + at, add(load(own + at, mask), load(other + at, mask)), mask);
            });
        }
        if (out) normed_row(out + row * width, own, weight, width, eps, is_wide);
    });
}

template <class T> struct Store {  // where new keys and values go, and what happens to q and k before
    const float *q_norm, *k_norm;  // [head_dim], or null
    T *k_cache, *v_cache;          // [blocks, num_kv_heads, block_size, head_dim]
    const int64_t *positions, *block_ids;  // [num_rows], [num_tokens]
    const float *cos, *sin;                // [max_context, head_dim / 2]
    long num_rows, num_tokens, num_heads, num_kv_heads, head_dim, block_size;
    float eps;
    int is_wide;
};

template <class T> inline void rope_head(T* x, const float* cos, const float* sin, long half) {
    each_vector(half, [&](long at, auto mask) {
        Vec a = load(x + at, mask), b = load(x + half + at, mask), c = load(cos + at, mask), s = load(sin + at, mask);
        store(x + at, sub(mul(a, c), mul(b, s)), mask);
        store(x + half + at, add(mul(b, c), mul(a, s)), mask);
    });
}

// qkv: [num_rows, (num_heads + 2 num_kv_heads) head_dim]; q and k are turned in place, k and v of tokens are stored.
template <class T> inline void rope_store(T* qkv, const Store<T>& to) {
    long num_turned = to.num_heads + to.num_kv_heads, width = (num_turned + to.num_kv_heads) * to.head_dim;
    each_row(to.num_rows, width, [&](long row) {
        T* own = qkv + row * width;
        long half = to.head_dim / 2, position = to.positions[row];
        for (long head = 0; head < num_turned; ++head) {
            T* x = own + head * to.head_dim;
            const float* norm = head < to.num_heads ? to.q_norm : to.k_norm;
            if (norm) normed_row(x, x, norm, to.head_dim, to.eps, to.is_wide);
            rope_head(x, to.cos + position * half, to.sin + position * half, half);
        }
        if (row >= to.num_tokens) return;  // padding
        for (long head = 0; head < to.num_kv_heads; ++head) {
            long place = (to.block_ids[row] * to.num_kv_heads + head) * to.block_size + position % to.block_size;
            const T* k = own + (to.num_heads + head) * to.head_dim;
            std::memcpy(to.k_cache + place * to.head_dim, k, to.head_dim * sizeof(T));
            std::memcpy(to.v_cache + place * to.head_dim, k + to.num_kv_heads * to.head_dim, to.head_dim * sizeof(T));
        }
    });
}
