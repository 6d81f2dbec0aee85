// Compiled with -O3: sums of groups stay in registers.
#include "panels.h"

static std::vector<float> group_sums(const bf16* a, long num_rows, long num_k, long group) {
    std::vector<float> sums(num_rows * num_k / group);
    for (long index = 0; index < (long)sums.size(); ++index) {
        Vec sum = all(0.0f);
        for (long k = 0; k < group; k += LANES) sum = add(sum, load(a + index * group + k));
        sums[index] = sum_of(sum);
    }
    return sums;
}

void linear_nibbles(const Weight& w, const bf16* a, long num_rows, float* out) {
    linear_as<Nibbles>(w, a, group_sums(a, num_rows, w.num_k, w.group).data(), num_rows, out);
}

void linear_nibbles(const Weight& w, const bf16* a, long num_rows, bf16* out) {
    linear_as<Nibbles>(w, a, group_sums(a, num_rows, w.num_k, w.group).data(), num_rows, out);
}
