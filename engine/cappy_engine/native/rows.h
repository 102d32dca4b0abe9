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

  static float maximum(const float* x, size_t count) {
    F most[4] = {V::set(0), V::set(0), V::set(0), V::set(0)}, odd = V::set(0), zero = V::set(0);
    auto take = [&](F value, F& most) {
      odd = V::fma(value, zero, odd);  // not a number, as soon as a value is infinite or not a number
      most = V::max(V::abs(value), most);
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
    float most = maximum(x, count);
    most = most < rounding.least ? rounding.least : most;
    *scale = most * static_cast<float>(1.0 / rounding.steps);
    const F inverse = V::set(1.0f / *scale), low = V::set(static_cast<float>(-rounding.zero_point)),
            high = V::set(static_cast<float>(255 - rounding.zero_point));
    const I zero_point = V::set_whole(rounding.zero_point);
    each(count, [&](size_t i, size_t left) {
      __builtin_prefetch(x + count + i);  // the next row, while this one is in the first cache
      F value = left == W ? V::load(x + i) : V::load_some(x + i, left);
      value = V::min(V::max(V::mul(value, inverse), low), high);  // max() takes the second if one is not a number
      I whole = V::add_whole(V::round(value), zero_point);
      left == W ? V::store_bytes(q + i, whole) : V::store_some_bytes(q + i, whole, left);
    });
  }

  // Rotates a row, perhaps in its place: in log2(block) steps of sums and differences, of neighbours first.
  static void rotate_row(const float* x, const Rotation& rotation, size_t count, float* y) {
    const float *factors = rotation.factors, *offsets = rotation.offsets;
    const size_t block = rotation.block;
    if (block % W != 0) {
      for (size_t i = 0; i < count; i++) y[i] = x[i] * factors[i] + offsets[i];
      for (size_t apart = 1; apart < block; apart *= 2)
        for (size_t i = 0; i < count; i++)
          if (!(i & apart)) {
            const float first = y[i], second = y[i + apart];
            y[i] = first + second, y[i + apart] = first - second;
          }
      return;
    }
    const size_t part = block < 8 * W ? block : 8 * W;
    for (size_t i = 0; i < count; i += part) {
      if (part == 8 * W) rotate_part<8>(x + i, factors + i, offsets + i, y + i);
      if (part == 4 * W) rotate_part<4>(x + i, factors + i, offsets + i, y + i);
      if (part == 2 * W) rotate_part<2>(x + i, factors + i, offsets + i, y + i);
      if (part == W) rotate_part<1>(x + i, factors + i, offsets + i, y + i);
    }
    for (size_t apart = part; apart < block; apart *= 2)
      for (size_t start = 0; start < count; start += 2 * apart)
        for (size_t i = start; i < start + apart; i += W) {
          const F first = V::load(y + i), second = V::load(y + i + apart);
          V::store(y + i, V::add(first, second)), V::store(y + i + apart, V::sub(first, second));
        }
  }

  // The same for N vectors, which stay in registers.
  template <size_t N>
  static inline __attribute__((always_inline)) void rotate_part(const float* x, const float* factors, const float* offsets, float* y) {
    F values[N];
#pragma GCC unroll 8
    for (size_t j = 0; j < N; j++) {
      F value = V::add(V::mul(V::load(x + j * W), V::load(factors + j * W)), V::load(offsets + j * W));
      if constexpr (W > 1) value = V::template butterfly<1>(value);
      if constexpr (W > 2) value = V::template butterfly<2>(value);
      if constexpr (W > 4) value = V::template butterfly<4>(value);
      if constexpr (W > 8) value = V::template butterfly<8>(value);
      values[j] = value;
    }
#pragma GCC unroll 3
    for (size_t apart = 1; apart < N; apart *= 2)
#pragma GCC unroll 8
      for (size_t j = 0; j < N; j++)
        if (!(j & apart)) {
          const F first = values[j], second = values[j + apart];
          values[j] = V::add(first, second), values[j + apart] = V::sub(first, second);
        }
#pragma GCC unroll 8
    for (size_t j = 0; j < N; j++) V::store(y + j * W, values[j]);
  }

  enum class After { NOTHING, GELU, RESIDUAL };

  template <After AFTER>
  static void finish_as(const Finish& f) {
    const typename V::Gelu gelu;
    auto finished = [&](const int32_t* sums, F column_scale, F row_scale, F bias) __attribute__((always_inline)) {
      F value = V::mul(V::to_floats(V::load_whole(sums)), column_scale);  // sums have room for whole vectors
      value = V::add(V::mul(value, row_scale), bias);
      return AFTER == After::GELU ? gelu(value) : value;
    };
    size_t i = 0;
    for (; i + 2 * W <= f.columns; i += 2 * W) {
      const F scale0 = V::load(f.column_scales + i), scale1 = V::load(f.column_scales + i + W);
      const F bias0 = V::load(f.bias + i), bias1 = V::load(f.bias + i + W);
      for (size_t r = 0; r < f.rows; r++) {
        const F row_scale = V::set(f.row_scales[r]);
        const int32_t* sums = f.sums + r * f.sums_stride + i;
        const size_t place = r * f.y_stride + i;
        F first = finished(sums, scale0, row_scale, bias0), second = finished(sums + W, scale1, row_scale, bias1);
        if (AFTER == After::RESIDUAL) {
          first = V::add(first, V::load(f.residual + place));
          second = V::add(second, V::load(f.residual + place + W));
        }
        V::store(f.y + place, first);
        V::store(f.y + place + W, second);
      }
    }
    for (; i < f.columns; i += W) {
      const size_t left = f.columns - i < W ? f.columns - i : W;
      const F scale = V::load_some(f.column_scales + i, left), bias = V::load_some(f.bias + i, left);
      for (size_t r = 0; r < f.rows; r++) {
        const size_t place = r * f.y_stride + i;
        F value = finished(f.sums + r * f.sums_stride + i, scale, V::set(f.row_scales[r]), bias);
        if (AFTER == After::RESIDUAL) value = V::add(value, V::load_some(f.residual + place, left));
        V::store_some(f.y + place, value, left);
      }
    }
  }

  template <After AFTER>
  static void activate_as(const Finish& f) {
    const typename V::Gelu gelu;
    for (size_t r = 0; r < f.rows; r++)
      each(f.columns, [&](size_t i, size_t left) __attribute__((always_inline)) {
        F value = V::load_some(reinterpret_cast<const float*>(f.sums) + r * f.sums_stride + i, left);
        if (AFTER == After::GELU) value = gelu(value);
        if (AFTER == After::RESIDUAL) value = V::add(value, V::load_some(f.residual + r * f.y_stride + i, left));
        V::store_some(f.y + r * f.y_stride + i, value, left);
      });
  }

  static void activate(const Finish& f) {
    (f.is_gelu ? activate_as<After::GELU> : f.residual ? activate_as<After::RESIDUAL> : activate_as<After::NOTHING>)(f);
  }

  static void finish(const Finish& f) {
    (f.is_gelu ? finish_as<After::GELU> : f.residual ? finish_as<After::RESIDUAL> : finish_as<After::NOTHING>)(f);
  }

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

  static void normalize(const float* x, const float* residual, const float* gamma, const float* beta, size_t count, float epsilon, float* y) {
    const float* row = residual ? y : x;
    const float all = static_cast<float>(count);
    const float mean = sum(count, [&](size_t i, size_t left) __attribute__((always_inline)) {
      F value = V::load_some(x + i, left);
      if (!residual) return value;
      value = V::add(value, V::load_some(residual + i, left));
      V::store_some(y + i, value, left);
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
      V::store_some(y + i, value, left);
    });
  }

  // The Gelu of each value in the first half of a row, times the one in the second.
  static void gate_row(const float* x, size_t count, float* y) {
    const typename V::Gelu gelu;
    each(count, [&](size_t i, size_t left) __attribute__((always_inline)) {
      const F active = gelu(V::load_some(x + i, left));
      V::store_some(y + i, V::mul(active, V::load_some(x + count + i, left)), left);
    });
  }

  static constexpr RowKernels KERNELS = {quantize_row, rotate_row, normalize, gate_row};
};

}  // namespace
}  // namespace cappy
