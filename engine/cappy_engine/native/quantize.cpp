// The operators QuantizeRows and QuantizePositiveRows: rows of floats to 8 bits, with a scale for each row.
#include <new>

#include "linear.h"

namespace cappy {
namespace {

constexpr size_t VALUES_OF_A_TASK = 32768;  // some microseconds

class QuantizeRows : public Kernel {
 public:
  QuantizeRows(const LinearKernels& kernels, const Rounding& rounding) : kernels_(kernels), rounding_(rounding) {}

  Error compute(const Call& call) override {
    Tensor x, q, scales;
    if (Error found = call.input(0, &x)) return found;
    if (x.rank != 2) return error("QuantizeRows takes rows, not a tensor of rank %zu", x.rank);
    if (Error found = call.output(0, {x.shape[0], x.shape[1]}, &q)) return found;
    if (Error found = call.output(1, {x.shape[0], 1}, &scales)) return found;
    quantize_rows(kernels_, x.as<float>(), x.shape[0], x.shape[1], rounding_, q.as<uint8_t>(), scales.as<float>(),
                  call.parallel());
    return {};
  }

 private:
  const LinearKernels& kernels_;
  Rounding rounding_;
};

Error create(const Node& node, Kernel** kernel) {
  Rounding rounding = {static_cast<int>(node.whole("zero_point", 128)), static_cast<int>(node.whole("steps", 127)),
                       node.number("least", 1e-12f), node.whole("is_signed", 1) != 0};
  if (rounding.zero_point < 0 || rounding.zero_point > 255) return error("zero_point must be 0 to 255, not %d", rounding.zero_point);
  if (rounding.steps < 1 || rounding.steps > 255) return error("steps must be 1 to 255, not %d", rounding.steps);
  if (!(rounding.least > 0)) return error("least must be above 0, not %g", static_cast<double>(rounding.least));
  *kernel = new (std::nothrow) QuantizeRows(*chosen_instruction_set()->linear, rounding);
  return *kernel ? Error{} : error("no memory");
}

}  // namespace

void quantize_rows(const LinearKernels& kernels, const float* x, size_t rows, size_t columns, const Rounding& rounding,
                   uint8_t* q, float* scales, const Parallel& parallel) {
  size_t rows_of_a_task = VALUES_OF_A_TASK / (columns + 1) + 1;
  parallel.each((rows + rows_of_a_task - 1) / rows_of_a_task, [&](size_t task) {
    size_t end = (task + 1) * rows_of_a_task;
    for (size_t r = task * rows_of_a_task; r < rows && r < end; r++)
      kernels.quantize_row(x + r * columns, columns, rounding, q + r * columns, scales + r);
  });
}

const Operator QUANTIZE_ROWS = {"QuantizeRows", 1, {ORT_FLOAT}, 2, {ORT_UINT8, ORT_FLOAT}, create};
const Operator QUANTIZE_POSITIVE_ROWS = {"QuantizePositiveRows", 1, {ORT_FLOAT}, 2, {ORT_UINT8, ORT_FLOAT}, create};

}  // namespace cappy
