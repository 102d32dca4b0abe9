// The operators QuantizeRows, QuantizePositiveRows and QuantizeRotatedRows: rows of floats to 8 bits, with a scale for each row.
#include <atomic>
#include <new>

#include "linear.h"
#include "scratch.h"

namespace cappy {
namespace {

class QuantizeRows : public Kernel {
 public:
  QuantizeRows(const RowKernels& kernels, const Rotation& rotation, size_t columns, const Rounding& rounding)
      : kernels_(kernels), rotation_(rotation), columns_(columns), rounding_(rounding) {}

  Error compute(const Call& call) override {
    Tensor x, q, scales;
    if (Error found = call.input(0, &x)) return found;
    if (x.rank == 0) return error("QuantizeRows takes rows, not a single value");
    const size_t rows = x.rows(), columns = static_cast<size_t>(x.columns());
    if (rotation_.factors && columns != columns_) return error("there are %zu factors for rows of %zu values", columns_, columns);
    if (Error found = call.output(0, x.shape, x.rank, &q)) return found;
    x.columns() = 1;
    if (Error found = call.output(1, x.shape, x.rank, &scales)) return found;
    return quantize_rows(kernels_, x.as<float>(), rows, columns, rotation_, rounding_, q.as<uint8_t>(), scales.as<float>(),
                         call.parallel())
               ? Error{}
               : error("no memory for a row");
  }

 private:
  const RowKernels& kernels_;
  Rotation rotation_;
  size_t columns_;  // as many as there are factors
  Rounding rounding_;
};

// Whose maximum counts is in the operator's name. The attribute is_signed says the same to readers of the file.
Error create_with(const Node& node, Kernel** kernel, bool is_signed, const Rotation& rotation, size_t columns) {
  Rounding rounding = {0, 0, 0, is_signed};
  int64_t steps = 0;
  if (Error found = read_zero_point(node, &rounding.zero_point)) return found;
  if (Error found = node.whole("steps", &steps)) return found;
  if (Error found = node.number("least", &rounding.least)) return found;
  if (steps < 1 || steps > 255) return error("steps must be 1 to 255, not %lld", static_cast<long long>(steps));
  rounding.steps = static_cast<int>(steps);
  if (!(rounding.least > 0)) return error("least must be above 0, not %g", static_cast<double>(rounding.least));
  *kernel = new (std::nothrow) QuantizeRows(chosen_instruction_set()->linear->rows, rotation, columns, rounding);
  return *kernel ? Error{} : error("no memory");
}

template <bool is_signed>
Error create(const Node& node, Kernel** kernel) {
  return create_with(node, kernel, is_signed, {nullptr, nullptr, 0}, 0);
}

Error create_rotated(const Node& node, Kernel** kernel) {
  Tensor factors, offsets;
  if (Error found = node.constant(1, &factors)) return found;
  if (Error found = node.constant(2, &offsets)) return found;
  if (factors.rank != 1) return error("the factors must be a row, not a tensor of rank %zu", factors.rank);
  if (!offsets.is({factors.shape[0]})) return error("there must be as many offsets as factors");
  const int64_t columns = factors.shape[0];
  int64_t block = 0;
  if (Error found = node.whole("block", &block)) return found;
  if (block < 1 || (block & (block - 1)) || columns % block)
    return error("block must be a power of two that divides %lld, not %lld", static_cast<long long>(columns), static_cast<long long>(block));
  return create_with(node, kernel, true, {factors.as<float>(), offsets.as<float>(), static_cast<size_t>(block)}, columns);
}

}  // namespace

Error read_zero_point(const Node& node, int* zero_point) {
  int64_t found = 0;
  if (Error failed = node.whole("zero_point", &found)) return failed;
  if (found < 0 || found > 255) return error("zero_point must be 0 to 255, not %lld", static_cast<long long>(found));
  *zero_point = static_cast<int>(found);
  return {};
}

bool quantize_rows(const RowKernels& kernels, const float* x, size_t rows, size_t columns, const Rotation& rotation,
                   const Rounding& rounding, uint8_t* q, float* scales, const Parallel& parallel) {
  size_t rows_of_a_task = VALUES_OF_A_TASK / (columns + 1) + 1;
  std::atomic<bool> is_done{true};
  parallel.each((rows + rows_of_a_task - 1) / rows_of_a_task, [&](size_t task) {
    size_t end = (task + 1) * rows_of_a_task;
    float* rotated = rotation.factors ? reinterpret_cast<float*>(take_scratch(columns * sizeof(float))) : nullptr;
    if (rotation.factors && !rotated) is_done = false;
    for (size_t r = task * rows_of_a_task; r < rows && r < end && is_done; r++) {
      const float* row = x + r * columns;
      if (rotated) {
        kernels.rotate_row(row, rotation, columns, rotated);
        row = rotated;
      }
      kernels.quantize_row(row, columns, rounding, q + r * columns, scales + r);
    }
  });
  return is_done;
}

const Operator QUANTIZE_ROWS = {"QuantizeRows", 1, {ORT_FLOAT}, 2, {ORT_UINT8, ORT_FLOAT}, create<true>};
const Operator QUANTIZE_POSITIVE_ROWS = {"QuantizePositiveRows", 1, {ORT_FLOAT}, 2, {ORT_UINT8, ORT_FLOAT}, create<false>};
const Operator QUANTIZE_ROTATED_ROWS = {"QuantizeRotatedRows", 3, {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT}, 2, {ORT_UINT8, ORT_FLOAT}, create_rotated};

}  // namespace cappy
