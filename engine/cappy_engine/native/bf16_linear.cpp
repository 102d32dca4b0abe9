// The operators with bfloat16 weights.
#include <new>

#include "kernels.h"
#include "linear.h"

namespace cappy {
namespace {

constexpr size_t RESIDUAL = 3;  // its place among the inputs

class Bf16LinearKernel : public Kernel {
 public:
  Bf16LinearKernel(const InstructionSet& set, const LinearWeights& weights) : linear_(set, weights) {}
  bool is_ready() const { return linear_.is_ready(); }

  Error compute(const Call& call) override {
    Tensor x, residual, y;
    if (Error found = call.input(0, &x)) return found;
    const size_t rows = x.rows();
    if (x.rank == 0 || static_cast<size_t>(x.columns()) != linear_.inner()) return error("Bf16Linear takes rows of %zu values", linear_.inner());
    const float* values = x.as<float>();
    x.columns() = static_cast<int64_t>(linear_.columns());
    if (linear_.has_residual()) {
      if (Error found = call.input(RESIDUAL, &residual)) return found;
      if (!residual.is(x.shape, x.rank)) return error("Bf16Linear takes a residual of its result's shape");
    }
    if (Error found = call.output(0, x.shape, x.rank, &y)) return found;
    const bool is_done = linear_.run(values, nullptr, rows, residual.as<float>(), y.as<float>(), call.parallel());
    return is_done ? Error{} : error("no memory for rows");
  }

 private:
  Linear linear_;
};

template <Then THEN>
Error create(const Node& node, Kernel** kernel) {
  Tensor w;
  if (Error found = node.constant(1, &w)) return found;
  if (w.rank != 4 || w.shape[2] != PANEL || w.shape[3] != 2) return error("the weights of Bf16Linear must be [columns / 16, inner / 2, 16, 2]");
  LinearWeights weights = {};
  weights.weights = w.as<int8_t>();
  weights.is_packed = weights.is_bf16 = true;
  weights.inner = w.shape[1] * 2;
  weights.columns = w.shape[0] * PANEL;
  if (weights.inner == 0) return error("rows must have at least one value");
  if (Error found = read_row(node, 2, weights.columns, &weights.bias)) return found;
  if (Error found = read_then(node, THEN, RESIDUAL, &weights)) return found;
  Bf16LinearKernel* made = new (std::nothrow) Bf16LinearKernel(*chosen_instruction_set(), weights);
  *kernel = made;
  return made && made->is_ready() ? Error{} : error("no memory for a linear layer's bias");
}

}  // namespace

const Operator BF16_LINEAR = {"Bf16Linear", 3, {ORT_FLOAT, ORT_BFLOAT16, ORT_FLOAT}, 1, {ORT_FLOAT}, create<Then::NOTHING>};
const Operator BF16_LINEAR_GELU = {"Bf16LinearGelu", 3, {ORT_FLOAT, ORT_BFLOAT16, ORT_FLOAT}, 1, {ORT_FLOAT}, create<Then::GELU>};
const Operator BF16_LINEAR_ADD = {"Bf16LinearAdd", 4, {ORT_FLOAT, ORT_BFLOAT16, ORT_FLOAT, ORT_FLOAT}, 1, {ORT_FLOAT}, create<Then::ADD>};
const Operator BF16_LINEAR_NORM = {"Bf16LinearNorm", 6, {ORT_FLOAT, ORT_BFLOAT16, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT}, 1, {ORT_FLOAT},
                                   create<Then::NORM>};

}  // namespace cappy
