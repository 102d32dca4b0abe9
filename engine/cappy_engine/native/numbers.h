// Arithmetic of sizes. It is in an anonymous namespace, because files of one instruction set include it (see kernels.h).
#pragma once

namespace cappy {
namespace {

template <class T>
constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr T larger(T a, T b) {
  return a > b ? a : b;
}
template <class T>
constexpr T divided_up(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace
}  // namespace cappy
