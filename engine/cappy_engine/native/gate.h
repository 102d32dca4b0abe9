// Gated rows: one half of a row, after Gelu, times the other.
#pragma once
#include "kernels.h"
#include "operators.h"

namespace cappy {

// Rows of 2 * count values become rows of count.
void gate_rows(const RowKernels& kernels, const float* x, size_t rows, size_t count, float* y, const Parallel& parallel);

extern const Operator GE_GLU;

}  // namespace cappy
