#include "bf16.h"
#include "rows.h"
#include "vectors_scalar.h"

namespace cappy {
namespace {

void multiply(const Block& b) {
  const float* start = reinterpret_cast<const float*>(b.start);
  const uint16_t* weights = reinterpret_cast<const uint16_t*>(b.panels);
  for (size_t r = 0; r < b.count; r++)
    for (size_t c = 0; c < PANEL; c++) {
      const float* row = reinterpret_cast<const float*>(b.rows + r * b.row_bytes);
      float sum = start[c];
      for (size_t k = 0; k < b.inner; k++) sum += row[k] * widened(weights + (k / 2 * PANEL + c) * 2 + k % 2);
      reinterpret_cast<float*>(b.sums)[r * PANEL + c] = sum;
    }
}

}  // namespace

const Bf16Kernels BF16_SCALAR = {
    round_wide_row, sizeof(float),
    {4, 1, PANEL, nothing, nothing, multiply, multiply, Rows<Scalar>::activate},
};

}  // namespace cappy
