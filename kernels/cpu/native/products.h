// Products of rows with packed weights: out[row, n] = sum over k of a[row, k] * w[n, k].
//
// A weight is packed as panels of 32 columns (rows of w), k after k: two vectors of floats, or of pairs of bfloat16.
// Each result is one chain of fused multiply-adds in rising k (of integers in groups: a chain per group, then a chain
// of scaled groups), whatever rows are computed with it and on however many threads: bits do not depend on the batch.
#pragma once
#include <algorithm>
#include <vector>

#include "threads.h"
#include "vectors.h"
#ifdef HAS_AVX512
#include "avx512/forms.h"
#else
#include "avx2/forms.h"
#endif

constexpr long TASKS_PER_THREAD = 6;
constexpr long TASKS_AHEAD = 2;  // of a thread, where panels are asked for: the first of each is not
constexpr long FEWEST_AHEAD = 5, MOST_AHEAD = 256;  // rows: with fewer the processor sees what comes, with more it has time

// Calls `with` with a compile-time count, 1 to ROWS.
template <int COUNT = 1, class With> inline void counted(long count, const With& with) {
    if (count == COUNT) return with(std::integral_constant<int, COUNT>());
    if constexpr (COUNT < ROWS) counted<COUNT + 1>(count, with);
}

// Rows in passes of nearly equal counts: body(first, count as a constant).
template <class Body> inline void in_passes(long num_rows, const Body& body, long most = ROWS) {
    long num_passes = (num_rows + most - 1) / most;
    for (long index = 0; index < num_passes; ++index) {
        long begin = index * num_rows / num_passes, end = (index + 1) * num_rows / num_passes;
        counted(end - begin, [&](auto count) { body(begin, count); });
    }
}
