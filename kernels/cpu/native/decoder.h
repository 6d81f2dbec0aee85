// Dense layers one after the other in one call: what engine/models/decoder.py does, without its way through Python.
#pragma once
#include "attention.h"
#include "layers.h"
#include "linear.h"

template <class T> struct Layer {  // norms that a family has not are null
    const Weight *qkv, *out, *gate_up, *down;
    const float *attention_norm, *q_norm, *k_norm, *attention_out_norm, *mlp_norm, *mlp_out_norm;
    T *k_cache, *v_cache;
    long group;  // of Step's
};

struct Group {  // what its layers read of a step
    const int64_t *block_ids, *tables;
    const Span* spans;
    const float *cos, *sin;
    long num_spans, window;
};

template <class T> struct Pass {
    T *hidden, *x, *added;  // [num_rows, width]; x: room for what is normed
    const int64_t* positions;
    const Group* groups;
    long num_rows, width, num_heads, num_kv_heads, head_dim, block_size;
    float scale, eps;
    int is_wide, has_added;  // has_added: `added` is yet to be added to `hidden`
};

template <class T> struct Rooms {
    std::vector<T> qkv, attended, gated;
};

template <class T> inline void run_layer(const Layer<T>& layer, Pass<T>& step, Rooms<T>& rooms) {
    const Group& group = step.groups[layer.group];
    long rows = step.num_rows, heads = step.num_heads * step.head_dim;
    auto normed = [&](T* x, const float* weight) {
        if (weight) add_rms_norm<T>(x, nullptr, weight, x, rows, step.width, step.eps, step.is_wide);
    };
    add_rms_norm<T>(
        step.hidden, step.has_added ? step.added : nullptr, layer.attention_norm, step.x, rows, step.width, step.eps,
        step.is_wide
    );
    rooms.qkv.resize(rows * layer.qkv->num_columns);
    linear(*layer.qkv, step.x, rows, rooms.qkv.data());
    rope_store<T>(rooms.qkv.data(), {
        layer.q_norm, layer.k_norm, layer.k_cache, layer.v_cache, step.positions, group.block_ids, group.cos, group.sin,
        rows, rows, step.num_heads, step.num_kv_heads, step.head_dim, step.block_size, step.eps, step.is_wide
    });
    rooms.attended.resize(rows * heads);
    attend<T>({
        rooms.qkv.data(), layer.k_cache, layer.v_cache, rooms.attended.data(), group.spans, group.tables,
        group.num_spans, layer.qkv->num_columns, step.num_heads, step.num_kv_heads, step.head_dim, step.block_size,
        group.window, step.scale
    });
    linear(*layer.out, rooms.attended.data(), rows, step.added);
    normed(step.added, layer.attention_out_norm);
    add_rms_norm<T>(step.hidden, step.added, layer.mlp_norm, step.x, rows, step.width, step.eps, step.is_wide);
    rooms.gated.resize(rows * layer.gate_up->num_columns);
    linear(*layer.gate_up, step.x, rows, rooms.gated.data());
    linear(*layer.down, rooms.gated.data(), rows, step.added);
    normed(step.added, layer.mlp_out_norm);
    step.has_added = 1;
}

template <class T> inline void run_layers(const Layer<T>* layers, long count, Pass<T>* step) {
    static thread_local Rooms<T> rooms;
    for (long index = 0; index < count; ++index) run_layer(layers[index], *step, rooms);
}
