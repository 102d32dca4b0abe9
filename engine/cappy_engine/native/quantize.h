// Rows of floats to 8 bits, with a scale for each row.
#pragma once
#include "kernels.h"
#include "operators.h"

namespace cappy {

// `columns` are those of the result. Takes memory for a row; false if there is none.
bool quantize_rows(const RowKernels& kernels, const float* x, size_t rows, size_t columns, const Preparation& preparation,
                   const Rounding& rounding, uint8_t* q, float* scales, const Parallel& parallel);

// The attribute zero_point, of rows of 8 bits.
Error read_zero_point(const Node& node, int* zero_point);

extern const Operator QUANTIZE_ROTATED_ROWS, QUANTIZE_NORMED_ROWS, QUANTIZE_GATED_ROWS;

}  // namespace cappy
