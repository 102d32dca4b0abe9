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
  bool has_norm() const { return weights_.gamma != nullptr; }

  // y [rows][columns] of x [rows][inner], which are bytes, or floats for bf16. `residual` is as y, and used with a layer norm
  // only. False if memory is short, which only bf16 needs.
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
  int8_t* packed_ = nullptr;
  int32_t* start_ = nullptr;  // -(zero_point - what the product takes away) * the sum of each column's weights; of bf16 the bias, as floats
  size_t panel_bytes_, panels_;
};

// False if memory is short, which only rotation needs.
bool quantize_rows(const RowKernels& kernels, const float* x, size_t rows, size_t columns, const Rotation& rotation,
                   const Rounding& rounding, uint8_t* q, float* scales, const Parallel& parallel);

// A constant of a value for each column.
Error read_row(const Node& node, size_t input, size_t columns, const float** row);

// The attribute zero_point, of rows of 8 bits.
Error read_zero_point(const Node& node, int* zero_point);

extern const Operator QUANTIZE_ROWS, QUANTIZE_POSITIVE_ROWS, QUANTIZE_ROTATED_ROWS, LINEAR, LINEAR_GELU, LINEAR_NORM, BF16_LINEAR,
    BF16_LINEAR_GELU, BF16_LINEAR_NORM;

}  // namespace cappy
