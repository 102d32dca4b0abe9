// Linear layers on 8-bit rows: packed weights, and the product's parts that threads take.
#pragma once
#include "kernels.h"
#include "operators.h"

namespace cappy {

// What a model says of a linear layer; the arrays are the caller's, and stay as they are.
struct LinearWeights {
  const int8_t* weights;  // [inner][columns], or packed: [columns / 16][inner / 4][16][4]
  bool is_packed;
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
  Linear(const LinearKernels& kernels, const LinearWeights& weights);
  ~Linear();
  Linear(const Linear&) = delete;
  bool is_ready() const { return start_ && (weights_.is_packed || packed_); }  // false if memory is short
  size_t inner() const { return weights_.inner; }
  size_t columns() const { return weights_.columns; }
  bool has_norm() const { return weights_.gamma != nullptr; }

  // y [rows][columns] of q [rows][inner]; `residual` is as y, and used with a layer norm only.
  void run(const uint8_t* q, const float* scales, size_t rows, const float* residual, float* y, const Parallel& parallel) const;

 private:
  struct Parts;
  void run_part(const Parts& parts, size_t task) const;
  void pack();

  const LinearKernels& kernels_;
  LinearWeights weights_;
  bool may_saturate_ = false;
  int8_t* packed_ = nullptr;
  int32_t* start_ = nullptr;  // -zero_point * the sum of each column's weights
  size_t panel_bytes_, panels_;
};

// False if memory is short, which only rotation needs.
bool quantize_rows(const LinearKernels& kernels, const float* x, size_t rows, size_t columns, const Rotation& rotation,
                   const Rounding& rounding, uint8_t* q, float* scales, const Parallel& parallel);

// The attribute zero_point, of rows of 8 bits.
Error read_zero_point(const Node& node, int* zero_point);

extern const Operator QUANTIZE_ROWS, QUANTIZE_POSITIVE_ROWS, QUANTIZE_ROTATED_ROWS, LINEAR, LINEAR_GELU, LINEAR_NORM;

}  // namespace cappy
