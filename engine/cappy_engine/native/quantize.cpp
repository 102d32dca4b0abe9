// The operators QuantizeRotatedRows and its variants: rows of floats to 8 bits, with a scale for each row.
#include "quantize.h"

#include <atomic>
#include <new>

#include "linear.h"
#include "scratch.h"

namespace cappy {
namespace {

class QuantizeRows : public Kernel {
 public:
  QuantizeRows(const RowKernels& kernels, const Preparation& preparation, size_t columns, const Rounding& rounding)
      : kernels_(kernels), preparation_(preparation), columns_(columns), rounding_(rounding) {}

  Error compute(const Call& call) override {
    Tensor x, q, scales;
    if (Error found = call.input(0, &x)) return found;
    const size_t parts = preparation_.is_gated ? 2 : 1;
    if (x.rank == 0) return error("there must be rows to round, not a single value");
    const size_t rows = x.rows(), columns = static_cast<size_t>(x.columns()) / parts;
    const bool is_known = x.columns() == static_cast<int64_t>(columns_ * parts);
    if (!is_known) return error("there are %zu factors for rows of %lld values", columns_, static_cast<long long>(x.columns()));
    x.columns() = static_cast<int64_t>(columns);
    if (Error found = call.output(0, x.shape, x.rank, &q)) return found;
    x.columns() = 1;
    if (Error found = call.output(1, x.shape, x.rank, &scales)) return found;
    return quantize_rows(kernels_, x.as<float>(), rows, columns, preparation_, rounding_, q.as<uint8_t>(), scales.as<float>(),
                         call.parallel())
               ? Error{}
               : error("no memory for a row");
  }

 private:
  const RowKernels& kernels_;
  Preparation preparation_;
  size_t columns_;  // as many as there are factors
  Rounding rounding_;
};

Error create_with(const Node& node, Kernel** kernel, const Preparation& preparation, size_t columns) {
  Rounding rounding = {};
  int64_t steps = 0;
  if (Error found = read_zero_point(node, &rounding.zero_point)) return found;
  if (Error found = node.whole("steps", &steps)) return found;
  if (Error found = node.number("least", &rounding.least)) return found;
  if (steps < 1 || steps > 255) return error("steps must be 1 to 255, not %lld", static_cast<long long>(steps));
  rounding.steps = static_cast<int>(steps);
  if (!(rounding.least > 0)) return error("least must be above 0, not %g", static_cast<double>(rounding.least));
  *kernel = new (std::nothrow) QuantizeRows(chosen_instruction_set()->linear->rows, preparation, columns, rounding);
  return *kernel ? Error{} : error("no memory");
}

// The factors are the input at `place`, the offsets the next one.
Error read_rotation(const Node& node, size_t place, Rotation* rotation, size_t* columns) {
  Tensor factors, offsets;
  if (Error found = node.constant(place, &factors)) return found;
  if (Error found = node.constant(place + 1, &offsets)) return found;
  if (factors.rank != 1) return error("the factors must be a row, not a tensor of rank %zu", factors.rank);
  if (!offsets.is({factors.shape[0]})) return error("there must be as many offsets as factors");
  const int64_t count = factors.shape[0];
  int64_t block = 0;
  if (Error found = node.whole("block", &block)) return found;
  if (block < 1 || (block & (block - 1)) || count % block)
    return error("block must be a power of two that divides %lld, not %lld", static_cast<long long>(count), static_cast<long long>(block));
  *rotation = {factors.as<float>(), offsets.as<float>(), static_cast<size_t>(block)};
  *columns = static_cast<size_t>(count);
  return {};
}

template <bool is_gated>
Error create_rotated(const Node& node, Kernel** kernel) {
  Preparation preparation = {};
  size_t columns = 0;
  preparation.is_gated = is_gated;
  if (Error found = read_rotation(node, 1, &preparation.rotation, &columns)) return found;
  return create_with(node, kernel, preparation, columns);
}

Error create_normed(const Node& node, Kernel** kernel) {
  Preparation preparation = {};
  size_t columns = 0;
  if (Error found = read_rotation(node, 3, &preparation.rotation, &columns)) return found;
  if (Error found = node.number("epsilon", &preparation.epsilon)) return found;
  if (Error found = read_row(node, 1, columns, &preparation.gamma)) return found;
  if (Error found = read_row(node, 2, columns, &preparation.beta)) return found;
  return create_with(node, kernel, preparation, columns);
}

}  // namespace

Error read_zero_point(const Node& node, int* zero_point) {
  int64_t found = 0;
  if (Error failed = node.whole("zero_point", &found)) return failed;
  if (found < 0 || found > 255) return error("zero_point must be 0 to 255, not %lld", static_cast<long long>(found));
  *zero_point = static_cast<int>(found);
  return {};
}

bool quantize_rows(const RowKernels& kernels, const float* x, size_t rows, size_t columns, const Preparation& preparation,
                   const Rounding& rounding, uint8_t* q, float* scales, const Parallel& parallel) {
  const Rotation& rotation = preparation.rotation;
  const size_t given = preparation.is_gated ? 2 * columns : columns;  // values of a row
  const size_t rows_of_a_task = VALUES_OF_A_TASK / (given + 1) + 1;
  std::atomic<bool> is_done{true};
  parallel.each((rows + rows_of_a_task - 1) / rows_of_a_task, [&](size_t task) {
    const size_t end = (task + 1) * rows_of_a_task;
    float* prepared = reinterpret_cast<float*>(take_scratch(columns * sizeof(float)));
    if (!prepared) is_done = false;
    for (size_t r = task * rows_of_a_task; r < rows && r < end && is_done; r++) {
      const float* row = x + r * given;
      if (preparation.is_gated) {
        kernels.gate_row(row, columns, prepared);
        row = prepared;
      }
      if (preparation.gamma) {
        kernels.normalize(row, nullptr, preparation.gamma, preparation.beta, columns, preparation.epsilon, prepared);
        row = prepared;
      }
      kernels.rotate_row(row, rotation, columns, prepared);
      kernels.quantize_row(prepared, columns, rounding, q + r * columns, scales + r);
    }
  });
  return is_done;
}

const Operator QUANTIZE_ROTATED_ROWS = {"QuantizeRotatedRows", 3, {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT}, 2, {ORT_UINT8, ORT_FLOAT},
                                        create_rotated<false>};
const Operator QUANTIZE_GATED_ROWS = {"QuantizeGatedRows", 3, {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT}, 2, {ORT_UINT8, ORT_FLOAT},
                                      create_rotated<true>};
const Operator QUANTIZE_NORMED_ROWS = {"QuantizeNormedRows", 5, {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT}, 2,
                                       {ORT_UINT8, ORT_FLOAT}, create_normed};

}  // namespace cappy
