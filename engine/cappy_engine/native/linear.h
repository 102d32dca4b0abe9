// Linear layers on 8-bit or bfloat16 rows: packed weights, and the product's parts that threads take.
#pragma once
#include "kernels.h"
#include "operators.h"

namespace cappy {

// What a model says of a linear layer; the arrays are the caller's, and stay as they are.
struct LinearWeights {
  const int8_t* weights;  // [inner][columns], or packed: [columns / 16][inner / 4][16][4]; bf16: [columns / 16][inner / 2][16][2]
  bool is_packed;  // bf16 must be
  bool is_bf16;    // then rows are floats, and there are neither scales nor a zero point
  size_t inner, columns;
  const float* scales;  // [columns]
  const float* bias;    // [columns]
  int zero_point;
  bool is_gelu;
  bool has_residual;  // it is added; with a layer norm, before that
  const float* gamma;  // [columns], or null: no layer norm
  const float* beta;
  float epsilon;
};

class Linear {
 public:
  Linear(const InstructionSet& set, const LinearWeights& weights);
  ~Linear();
  Linear(const Linear&) = delete;
  bool is_ready() const { return start_ && (weights_.is_packed || packed_); }  // false if memory is short
  size_t inner() const { return weights_.inner; }
  size_t columns() const { return weights_.columns; }
  bool has_residual() const { return weights_.has_residual; }

  // y [rows][columns] of x [rows][inner], which are bytes, or floats for bf16. `residual` is as y, and read if the layer has
  // one. Only bf16 takes memory; false if there is none.
  bool run(const void* x, const float* scales, size_t rows, const float* residual, float* y, const Parallel& parallel) const;

 private:
  struct Parts;
  struct Rows {
    const uint8_t* first;  // null if memory is short
    size_t bytes;          // from one row to the next
  };
  void run_part(const Parts& parts, size_t task) const;
  Rows rows_of(const void* x, size_t first, size_t count) const;
  void start_from_zero_points(const int8_t* packed);
  void pack();

  const LinearKernels& kernels_;
  const Bf16Kernels* bf16_;  // null: weights are bytes
  const Product& product_;
  LinearWeights weights_;
  bool may_saturate_ = false;
  bool do_rows_collide_;  // those of a block, in the first cache, if they are a multiple of 2 KB apart
  int8_t* packed_ = nullptr;
  int32_t* start_ = nullptr;  // -(zero_point - what the product takes away) * the sum of each column's weights; of bf16 the bias, as floats
  size_t panel_bytes_, panels_;
};

// What an operator does to a product with its bias.
enum class Then { NOTHING, GELU, ADD, NORM };

// Reads what the operator needs for that: a layer norm's gamma and beta stand behind the residual, the input `residual`.
Error read_then(const Node& node, Then then, size_t residual, LinearWeights* weights);

// A constant of a value for each column.
Error read_row(const Node& node, size_t input, size_t columns, const float** row);

extern const Operator LINEAR, LINEAR_ADD, LINEAR_GELU, LINEAR_NORM, BF16_LINEAR, BF16_LINEAR_ADD, BF16_LINEAR_GELU, BF16_LINEAR_NORM;

}  // namespace cappy
