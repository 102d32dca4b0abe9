// The operator GeGlu: one half of a row, after Gelu, times the other.
#include "gate.h"

#include <new>

#include "numbers.h"

namespace cappy {
namespace {

class GeGlu : public Kernel {
 public:
  explicit GeGlu(const RowKernels& kernels) : kernels_(kernels) {}

  Error compute(const Call& call) override {
    Tensor x, y;
    if (Error found = call.input(0, &x)) return found;
    if (x.rank == 0 || x.columns() % 2 != 0) return error("GeGlu takes rows of two halves");
    const size_t rows = x.rows(), count = static_cast<size_t>(x.columns() /= 2);
    if (Error found = call.output(0, x.shape, x.rank, &y)) return found;
    gate_rows(kernels_, x.as<float>(), rows, count, y.as<float>(), call.parallel());
    return {};
  }

 private:
  const RowKernels& kernels_;
};

Error create(const Node&, Kernel** kernel) {
  *kernel = new (std::nothrow) GeGlu(chosen_instruction_set()->linear->rows);
  return *kernel ? Error{} : error("no memory");
}

}  // namespace

void gate_rows(const RowKernels& kernels, const float* x, size_t rows, size_t count, float* y, const Parallel& parallel) {
  const size_t rows_of_a_task = VALUES_OF_A_TASK / (2 * count + 1) + 1;
  parallel.each(divided_up(rows, rows_of_a_task), [&](size_t task) {
    for (size_t r = task * rows_of_a_task, end = smaller(r + rows_of_a_task, rows); r < end; r++)
      kernels.gate_row(x + r * 2 * count, count, y + r * count);
  });
}

const Operator GE_GLU = {"GeGlu", 1, {ORT_FLOAT}, 1, {ORT_FLOAT}, create};

}  // namespace cappy
