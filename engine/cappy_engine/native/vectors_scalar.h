// One float at a time, in plain C++: for processors without any known instruction set, and for tests of the others.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "gelu.h"

namespace cappy {
namespace {

struct Scalar {
  using F = float;
  using I = int32_t;
  using Gelu = PolynomialGelu<Scalar>;
  static constexpr size_t WIDTH = 1;
  static F set(float x) { return x; }
  static I set_whole(int x) { return x; }
  static F load(const float* p) { return *p; }
  static F load_some(const float* p, size_t) { return *p; }
  static I load_whole(const int32_t* p) { return *p; }
  static void store(float* p, F x) { *p = x; }
  static void store_some(float* p, F x, size_t) { *p = x; }
  static void store_bytes(uint8_t* p, I x) { *p = static_cast<uint8_t>(x); }
  static void store_some_bytes(uint8_t* p, I x, size_t) { *p = static_cast<uint8_t>(x); }
  static F first(F x, size_t) { return x; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F abs(F x) { return fabsf(x); }
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static I add_whole(I a, I b) { return a + b; }
  static I round(F x) { return static_cast<I>(nearbyintf(x)); }
  static F to_floats(I x) { return static_cast<float>(x); }
  static float sum(F x) { return x; }
  static float largest(F x) { return x; }
};

}  // namespace
}  // namespace cappy
