#include "rows.h"
#include "vectors_scalar.h"

namespace cappy {
namespace {

void multiply(const Block& b) {
  for (size_t r = 0; r < b.count; r++)
    for (size_t c = 0; c < PANEL; c++) {
      int32_t sum = b.start[c];
      for (size_t k = 0; k < b.inner; k++) sum += b.rows[r * b.row_bytes + k] * b.panels[(k / 4 * PANEL + c) * 4 + k % 4];
      b.sums[r * PANEL + c] = sum;
    }
}

}  // namespace

const LinearKernels LINEAR_SCALAR = {
    Rows<Scalar>::KERNELS,
    {4, 1, PANEL, nothing, nothing, multiply, multiply, Rows<Scalar>::finish},
};

}  // namespace cappy
