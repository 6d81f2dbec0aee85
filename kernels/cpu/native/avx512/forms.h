// How weights are held on a processor with AVX-512, and rows times a panel of them.
#pragma once
#include "../vectors.h"

constexpr int ROWS = 12;                      // of one pass: 24 accumulators, two vectors of weights
constexpr int GROUPED_ROWS = ROWS / 2;        // of one pass, where sums of groups are accumulators too
constexpr long GROUPED_MOST = GROUPED_ROWS;   // so many rows are multiplied by what is packed, more by what was unpacked
constexpr int CHUNK_ROWS = 16 * ROWS;         // of a task: they stay in the second-level cache while panels go by

struct Step {
    Words low, high;  // columns 0 to 15 and 16 to 31
};

// `at(panel, step)` is one step of a panel.

struct Floats {
    using Row = float;
    static constexpr int PER_STEP = 1;
    static constexpr long panel_bytes(long num_k) { return num_k * PANEL * 4; }
    Step at(const uint8_t* panel, long step) const {
        return {_mm512_loadu_si512(panel + step * 128), _mm512_loadu_si512(panel + step * 128 + 64)};
    }
    static Vec add(Vec sum, Words a, Words b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
};

struct Pairs {  // bfloat16
    using Row = bf16;
    static constexpr int PER_STEP = 2;
    static constexpr long panel_bytes(long num_k) { return num_k * PANEL * 2; }
    Step at(const uint8_t* panel, long step) const { return Floats().at(panel, step); }
    static Vec add(Vec sum, Words a, Words b) {
#ifdef __AVX512BF16__
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
        const Words upper = _mm512_set1_epi32((int)0xffff0000);
        Vec odd_a = _mm512_castsi512_ps(_mm512_and_si512(a, upper));
        Vec odd_b = _mm512_castsi512_ps(_mm512_and_si512(b, upper));
        Vec even_a = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16));
        Vec even_b = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
        return _mm512_fmadd_ps(even_a, even_b, _mm512_fmadd_ps(odd_a, odd_b, sum));
#endif
    }
};

// Whole numbers -127 to 127, each exact in bfloat16. A step's 64 bytes: the bfloat16 of byte i comes to lie where
// unpacking puts it. Their scale is applied to the sum.
struct Bytes {
    using Row = bf16;
    static constexpr int PER_STEP = 2;
    static constexpr long panel_bytes(long num_k) { return num_k * PANEL; }
    static void put(uint8_t* panel, long column, long k, int number) {
        long word = column % LANES * 2 + k % 2;  // unpacking takes bytes 0 to 7 of each 16 into the lower vector
        uint8_t* to = panel + k / 2 * 64 + word / 8 * 16 + column / LANES * 8 + word % 8;
        *to = (uint8_t)(number < 0 ? 0x80 | -number : number);
    }
    static Vec add(Vec sum, Words a, Words b) { return Pairs::add(sum, a, b); }

#ifdef __AVX512VBMI__
    // Sign and magnitude: two tables of 128 bytes hold the halves of each magnitude's bfloat16.
    Words low[2], high[2];

    Bytes() {
        alignas(64) static const Tables made;
        for (int part = 0; part < 2; ++part) {
            low[part] = _mm512_load_si512(made.low + 64 * part);
            high[part] = _mm512_load_si512(made.high + 64 * part);
        }
    }
    Step at(const uint8_t* panel, long step) const {
        Words x = _mm512_loadu_si512(panel + step * 64);
        Words lower = _mm512_permutex2var_epi8(low[0], x, low[1]);
        Words upper = _mm512_permutex2var_epi8(high[0], x, high[1]);
        upper = _mm512_ternarylogic_epi64(upper, x, _mm512_set1_epi8((char)0x80), 0xf8);  // upper | (x & sign)
        return {_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper)};
    }

private:
    struct Tables {
        alignas(64) uint8_t low[128], high[128];
        Tables() {
            for (int n = 0; n < 128; ++n) {
                float value = (float)n;
                uint32_t bits;
                std::memcpy(&bits, &value, 4);
                low[n] = (uint8_t)(bits >> 16);
                high[n] = (uint8_t)(bits >> 24);
            }
        }
    };
#else
    Step at(const uint8_t* panel, long step) const {
        Words x = _mm512_loadu_si512(panel + step * 64);
        Words lower = _mm512_unpacklo_epi8(x, _mm512_setzero_si512());
        Words upper = _mm512_unpackhi_epi8(x, _mm512_setzero_si512());
        return {words(lower), words(upper)};
    }

private:
    static Words words(Words x) {  // sign and magnitude in the lower byte of each 16-bit word
        auto half = [](__m256i part) {
            Words n = _mm512_cvtepu16_epi32(part);
            Words sign = _mm512_slli_epi32(_mm512_and_si512(n, _mm512_set1_epi32(0x80)), 24);
            Vec magnitude = _mm512_cvtepi32_ps(_mm512_and_si512(n, _mm512_set1_epi32(0x7f)));
            return narrow(_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(magnitude), sign)));
        };
        Words low = _mm512_castsi256_si512(half(_mm512_castsi512_si256(x)));
        return _mm512_inserti64x4(low, half(_mm512_extracti64x4_epi64(x, 1)), 1);
    }
#endif
};

// Whole numbers -8 to 7, two of 4 bits in each of a step's 32 bytes: columns 0 to 15 in the lower ones. Each group of k
// has a scale and a shift: w = scale * number + shift.
struct Nibbles {
    using Row = bf16;
    static constexpr int PER_STEP = 2;
    static constexpr long panel_bytes(long num_k) { return num_k * PANEL / 2; }
    static constexpr float BASE = 0.0f;  // what is taken from a number
    static void put(uint8_t* panel, long column, long k, int number) {
        uint8_t* to = panel + k / 2 * 32 + column % LANES * 2 + k % 2;
        uint8_t nibble = (uint8_t)((number + 8) & 15);
        *to = column < LANES ? nibble : (uint8_t)(*to & 15) | (uint8_t)(nibble << 4);
    }
    Step at(const uint8_t* panel, long step) const {
        Words x = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(panel + step * 32)));
        const Words table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
            (short)0xc100, (short)0xc0e0, (short)0xc0c0, (short)0xc0a0, (short)0xc080, (short)0xc040, (short)0xc000,
            (short)0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0
        ));  // -8 to 7 as bfloat16
        return {
            _mm512_permutexvar_epi16(_mm512_and_si512(x, _mm512_set1_epi16(15)), table),
            _mm512_permutexvar_epi16(_mm512_srli_epi16(x, 4), table)
        };
    }
    static Vec add(Vec sum, Words a, Words b) { return Pairs::add(sum, a, b); }
};

// --- the passes -------------------------------------------------------------------------------------------------

template <class W> inline Words spread(const typename W::Row* a) {  // one step of a row, in all lanes
    int32_t bits;
    std::memcpy(&bits, a, 4);
    return _mm512_set1_epi32(bits);
}

// acc[i] += rows i times a panel, over `num_steps` steps. ask(step) may ask for what is read later.
template <class W, int NUM, class Ask = Nothing> inline void pass(
    const typename W::Row* a, long a_stride, const uint8_t* panel, long num_steps, Vec (&acc)[NUM][2],
    const Ask& ask = {}
) {
    const W weights;
    Vec low[NUM], high[NUM];  // copies, so that they stay in registers
#pragma GCC unroll 12
    for (int row = 0; row < NUM; ++row) low[row] = acc[row][0], high[row] = acc[row][1];
    for (long step = 0; step < num_steps; ++step) {
        Step b = weights.at(panel, step);
        ask(step);
#pragma GCC unroll 12
        for (int row = 0; row < NUM; ++row) {
            Words x = spread<W>(a + row * a_stride + step * W::PER_STEP);
            low[row] = W::add(low[row], x, b.low);
            high[row] = W::add(high[row], x, b.high);
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < NUM; ++row) acc[row][0] = low[row], acc[row][1] = high[row];
}

using PackedKeys = Pairs;  // and values, of bfloat16

// Rows as passes over panels of W take them, packed or unpacked.
template <class W, class T> inline const T* rows_of(const T* a, long) { return a; }

// Steps of whole numbers as bfloat16.
using Unpacked = Pairs;
template <class W> constexpr bool is_unpacked = !std::is_same_v<W, Floats> && !std::is_same_v<W, Pairs>;

template <class W> inline void unpack(const uint8_t* from, long num_steps, uint8_t* to) {
    const W weights;
    for (long step = 0; step < num_steps; ++step) {
        Step b = weights.at(from, step);
        _mm512_storeu_si512(to + step * 128, b.low);
        _mm512_storeu_si512(to + step * 128 + 64, b.high);
    }
}
