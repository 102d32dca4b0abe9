// What is done to whole rows, written once for vectors of any width. Included by one file of each instruction set.
//
// V has F (floats), I (as many int32) and WIDTH, and the operations that are called here. Sums that are compared with
// other kernels' are in the order of their functions in the model: multiply, then add, never fused.
#pragma once
#include <math.h>
#include <string.h>

#include "kernels.h"

namespace cappy {
namespace {

// x times the normal distribution's integral up to x, which is 0.5 + x * P(x * x) for |x| <= 5.5, and 0 or 1 beyond.
// P is a least-squares fit, of 15 terms in u = x * x * 2 / 5.5^2 - 1: the error of the whole is below 8e-7.
template <class V>
inline __attribute__((always_inline)) typename V::F gelu(typename V::F x) {
  constexpr float LIMIT = 5.5f;
  constexpr float TERMS[] = {4.287615302e-04f,  -1.275264192e-03f, 1.341796946e-03f,  -1.493016607e-03f, 3.880339675e-03f,
                             -7.392245810e-03f, 1.066136360e-02f,  -1.481467020e-02f, 2.023615688e-02f,  -2.607768029e-02f,
                             3.208808601e-02f,  -3.879081830e-02f, 4.773671553e-02f,  -6.417237222e-02f, 1.285519451e-01f};
  typename V::F near = V::min(V::max(x, V::set(-LIMIT)), V::set(LIMIT));
  typename V::F u = V::fma(V::mul(near, near), V::set(2 / (LIMIT * LIMIT)), V::set(-1));
  typename V::F sum = V::set(TERMS[0]);
#pragma GCC unroll 16
  for (size_t i = 1; i < sizeof TERMS / sizeof *TERMS; i++) sum = V::fma(sum, u, V::set(TERMS[i]));
  return V::mul(x, V::fma(near, sum, V::set(0.5f)));
}

void nothing() {}  // for kernels that need neither `begin` nor `end`

template <class V>
struct Rows {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr size_t W = V::WIDTH;

  // Calls body(place, count) for every vector of a row; count is less than W for the last only.
  template <class Body>
  static inline __attribute__((always_inline)) void each(size_t count, Body&& body) {
    size_t i = 0;
    for (; i + W <= count; i += W) body(i, W);
    if (i < count) body(i, count - i);
  }

  static float maximum(const float* x, size_t count, bool is_signed) {
    F most[4] = {V::set(0), V::set(0), V::set(0), V::set(0)}, odd = V::set(0), zero = V::set(0);
    auto take = [&](F value, F& most) {
      odd = V::fma(value, zero, odd);  // not a number, as soon as a value is infinite or not a number
      most = V::max(is_signed ? V::abs(value) : value, most);
    };
    size_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W)
      for (size_t j = 0; j < 4; j++) take(V::load(x + i + j * W), most[j]);
    each(count - i, [&](size_t j, size_t left) { take(V::load_some(x + i + j, left), most[0]); });
    float found = V::largest(V::max(V::max(most[0], most[1]), V::max(most[2], most[3])));
    if (isnan(V::sum(odd)))
      for (size_t j = 0; j < count; j++)
        if (isnan(x[j])) return x[j];
    return found;
  }

  static void quantize_row(const float* x, size_t count, const Rounding& rounding, uint8_t* q, float* scale) {
    float most = maximum(x, count, rounding.is_signed);
    most = most < rounding.least ? rounding.least : most;
    *scale = most * static_cast<float>(1.0 / rounding.steps);
    const F inverse = V::set(1.0f / *scale), low = V::set(static_cast<float>(-rounding.zero_point)),
            high = V::set(static_cast<float>(255 - rounding.zero_point));
    const I zero_point = V::set_whole(rounding.zero_point);
    each(count, [&](size_t i, size_t left) {
      F value = left == W ? V::load(x + i) : V::load_some(x + i, left);
      value = V::min(V::max(V::mul(value, inverse), low), high);  // max() takes the second if one is not a number
      I whole = V::add_whole(V::round(value), zero_point);
      left == W ? V::store_bytes(q + i, whole) : V::store_some_bytes(q + i, whole, left);
    });
  }

  template <bool IS_GELU>
  static void finish_as(const Finish& f) {
    for (size_t r = 0; r < f.rows; r++) {
      const int32_t* sums = f.sums + r * f.sums_stride;
      float* y = f.y + r * f.y_stride;
      const F row_scale = V::set(f.row_scales[r]);
      each(f.columns, [&](size_t i, size_t left) {
        bool whole = left == W;
        F column_scale = whole ? V::load(f.column_scales + i) : V::load_some(f.column_scales + i, left);
        F bias = whole ? V::load(f.bias + i) : V::load_some(f.bias + i, left);
        F value = V::mul(V::to_floats(V::load_whole(sums + i)), column_scale);  // sums have room for whole vectors
        value = V::add(V::mul(value, row_scale), bias);
        if (IS_GELU) value = gelu<V>(value);
        whole ? V::store(y + i, value) : V::store_some(y + i, value, left);
      });
    }
  }

  static void finish(const Finish& f) { f.is_gelu ? finish_as<true>(f) : finish_as<false>(f); }

  // Sums body(place, count) over a row, in four parts: an addition need not wait for the one before it.
  template <class Body>
  static inline __attribute__((always_inline)) float sum(size_t count, Body&& body) {
    F sums[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
    size_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W) {
      sums[0] = V::add(sums[0], body(i, W));
      sums[1] = V::add(sums[1], body(i + W, W));
      sums[2] = V::add(sums[2], body(i + 2 * W, W));
      sums[3] = V::add(sums[3], body(i + 3 * W, W));
    }
    each(count - i, [&](size_t j, size_t left) { sums[0] = V::add(sums[0], body(i + j, left)); });
    return V::sum(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
  }

  static void normalize(float* row, const float* residual, const float* gamma, const float* beta, size_t count, float epsilon) {
    const float all = static_cast<float>(count);
    const float mean = sum(count, [&](size_t i, size_t left) __attribute__((always_inline)) {
      F value = V::add(V::load_some(row + i, left), V::load_some(residual + i, left));
      V::store_some(row + i, value, left);
      return value;
    }) / all;
    const F middle = V::set(mean);
    const float variance = sum(count, [&](size_t i, size_t left) __attribute__((always_inline)) {
      F value = V::sub(V::load_some(row + i, left), middle);
      if (left < W) value = V::first(value, left);
      return V::mul(value, value);
    }) / all;
    const F factor = V::set(1.0f / sqrtf(variance + epsilon));
    each(count, [&](size_t i, size_t left) __attribute__((always_inline)) {
      F value = V::mul(V::sub(V::load_some(row + i, left), middle), factor);
      value = V::add(V::mul(value, V::load_some(gamma + i, left)), V::load_some(beta + i, left));
      V::store_some(row + i, value, left);
    });
  }
};

}  // namespace
}  // namespace cappy
