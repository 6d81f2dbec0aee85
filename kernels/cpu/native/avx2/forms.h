// How weights are held on a processor with AVX2, and rows times a panel of them. Rows are floats, and so is what is
// computed: an element of a weight becomes one on its way.
#pragma once
#include <vector>

#include "../vectors.h"

constexpr int ROWS = 6;                // of one pass: 12 accumulators, two vectors of weights, one element of a row
constexpr int GROUPED_ROWS = ROWS;     // of one pass, where groups have sums of their own: those are in memory
constexpr long GROUPED_MOST = 24;      // so many rows are multiplied by what is packed, more by what was unpacked
constexpr int CHUNK_ROWS = 16 * ROWS;  // of a task: they stay in the second-level cache while panels go by

// `eight(panel, step, each, part)`: columns 8 * part to 8 * part + 7 of a panel, at element `each` of a step.

struct Floats {
    using Row = float;
    static constexpr int PER_STEP = 1;
    static constexpr long panel_bytes(long num_k) { return num_k * PANEL * 4; }
    static __m256 eight(const uint8_t* panel, long step, int, int part) {
        return _mm256_loadu_ps((const float*)(panel + step * 128) + 8 * part);
    }
};

struct Pairs {  // bfloat16, a column's two of a step in one word
    using Row = float;
    static constexpr int PER_STEP = 2;
    static constexpr long panel_bytes(long num_k) { return num_k * PANEL * 2; }
    static __m256 eight(const uint8_t* panel, long step, int each, int part) {
        __m256i x = _mm256_loadu_si256((const __m256i*)(panel + step * 128) + part);
        return _mm256_castsi256_ps(each ? _mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000)) : _mm256_slli_epi32(x, 16));
    }
};

// Whole numbers -127 to 127: a step's 64 bytes are 32 columns of one k, then of the next. Their scale is applied to the
// sum.
struct Bytes {
    using Row = float;
    static constexpr int PER_STEP = 2;
    static constexpr long panel_bytes(long num_k) { return num_k * PANEL; }
    static void put(uint8_t* panel, long column, long k, int number) { panel[k * PANEL + column] = (uint8_t)(int8_t)number; }
    static __m256 eight(const uint8_t* panel, long step, int each, int part) {
        __m128i x = _mm_loadl_epi64((const __m128i*)(panel + step * 64 + each * PANEL + 8 * part));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
    }
};

// Whole numbers -8 to 7 as 0 to 15: a column's eight of a step in the 4 bits each of one word. Each group of k has a scale
// and a shift: w = scale * number + shift. All but the last of a word stay where they are, 16 or 256 or so times as great:
// the elements of rows that they meet are so much smaller (`rows_of`), which changes no bit of a product, but of elements
// below 2^-100 or so.
struct Nibbles {
    using Row = float;
    static constexpr int PER_STEP = 8;
    static constexpr float BASE = 8.0f;  // what is taken from a number
    static constexpr long panel_bytes(long num_k) { return num_k * PANEL / 2; }
    static void put(uint8_t* panel, long column, long k, int number) {
        uint8_t* to = panel + k / 8 * 128 + column * 4 + k % 8 / 2;
        uint8_t nibble = (uint8_t)((number + 8) & 15);
        *to = k % 2 ? (uint8_t)(*to & 15) | (uint8_t)(nibble << 4) : nibble;
    }
    static __m256 eight(const uint8_t* panel, long step, int each, int part) {
        __m256i x = _mm256_loadu_si256((const __m256i*)(panel + step * 128) + part);
        return _mm256_cvtepi32_ps(each == 7 ? _mm256_srli_epi32(x, 28) : _mm256_and_si256(x, _mm256_set1_epi32(15 << 4 * each)));
    }
};

using PackedKeys = Floats;  // and values, of bfloat16

// acc[i] += rows i times parts `FIRST` to `FIRST + COUNT - 1` of a panel, eight columns each.
template <class W, int NUM, int FIRST, int COUNT, class Ask> inline void sweep(
    const float* a, long a_stride, const uint8_t* panel, long num_steps, __m256 (&acc)[NUM][4], const Ask& ask
) {
    __m256 sums[NUM][COUNT];  // copies, so that they stay in registers
#pragma GCC unroll 12
    for (int row = 0; row < NUM; ++row)
#pragma GCC unroll 4
        for (int part = 0; part < COUNT; ++part) sums[row][part] = acc[row][FIRST + part];
    for (long step = 0; step < num_steps; ++step) {
        ask(step);
#pragma GCC unroll 8
        for (int each = 0; each < W::PER_STEP; ++each) {
            __m256 b[COUNT];
#pragma GCC unroll 4
            for (int part = 0; part < COUNT; ++part) b[part] = W::eight(panel, step, each, FIRST + part);
#pragma GCC unroll 12
            for (int row = 0; row < NUM; ++row) {
                __m256 x = _mm256_broadcast_ss(a + row * a_stride + step * W::PER_STEP + each);
#pragma GCC unroll 4
                for (int part = 0; part < COUNT; ++part) sums[row][part] = _mm256_fmadd_ps(x, b[part], sums[row][part]);
            }
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < NUM; ++row)
#pragma GCC unroll 4
        for (int part = 0; part < COUNT; ++part) acc[row][FIRST + part] = sums[row][part];
}

// acc[i] += rows i times a panel, over `num_steps` steps: at once while its sums fit the registers, else one half after
// the other. ask(step) may ask for what is read later.
template <class W, int NUM, class Ask = Nothing> inline void pass(
    const float* a, long a_stride, const uint8_t* panel, long num_steps, Vec (&acc)[NUM][2], const Ask& ask = {}
) {
    auto& parts = reinterpret_cast<__m256(&)[NUM][4]>(acc);
    if constexpr (NUM <= 2) {
        sweep<W, NUM, 0, 4>(a, a_stride, panel, num_steps, parts, ask);
    } else {
        sweep<W, NUM, 0, 2>(a, a_stride, panel, num_steps, parts, ask);
        sweep<W, NUM, 2, 2>(a, a_stride, panel, num_steps, parts, Nothing());
    }
}

inline float* row_room(long count) {  // of this thread, until it asks again
    static thread_local std::vector<float> room;
    if ((long)room.size() < count) room.resize(count);
    return room.data();
}

// Rows as passes over panels of W take them, packed or unpacked.
template <class W> inline const float* rows_of(const float* a, long) { return a; }
template <class W> inline const float* rows_of(const bf16* a, long count) {
    float* room = row_room(count);
    copy_row(room, a, count);
    if (!std::is_same_v<W, Nibbles>) return room;
    const __m256 shares = _mm256_setr_ps(1.0f, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1.0f);
    for (long at = 0; at < count; at += 8) _mm256_storeu_ps(room + at, _mm256_mul_ps(_mm256_loadu_ps(room + at), shares));
    return room;
}

// Steps of what is held in less as floats.
using Unpacked = Floats;
template <class W> constexpr bool is_unpacked = true;  // floats, too: beside the rows in the second-level cache

template <class W> inline void unpack(const uint8_t* from, long num_steps, uint8_t* to) {
    for (long step = 0; step < num_steps; ++step)
#pragma GCC unroll 8
        for (int each = 0; each < W::PER_STEP; ++each, to += 128)
#pragma GCC unroll 4
            for (int part = 0; part < 4; ++part) _mm256_storeu_ps((float*)to + 8 * part, W::eight(from, step, each, part));
}
