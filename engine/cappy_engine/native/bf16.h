// Rows of bfloat16, which is the upper half of a float. Included by one file of each instruction set.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace cappy {
namespace {

// The bits of a float that is rounded to bfloat16, half to even. What is not a number stays so.
inline uint32_t rounded_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const bool is_number = (bits & 0x7fffffff) <= 0x7f800000;
  return (is_number ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000) & 0xffff0000;
}

// The number of two bytes.
inline float widened(const void* bfloat16) {
  uint16_t half;
  memcpy(&half, bfloat16, 2);
  const uint32_t bits = uint32_t{half} << 16;
  float found;
  memcpy(&found, &bits, 4);
  return found;
}

// A row for products of bfloat16.
inline void round_row(const float* x, size_t count, void* row) {
  uint16_t* y = static_cast<uint16_t*>(row);
  for (size_t i = 0; i < count; i++) y[i] = static_cast<uint16_t>(rounded_bits(x[i]) >> 16);
}

// A row for products of floats, of the same values.
inline void round_wide_row(const float* x, size_t count, void* row) {
  uint32_t* y = static_cast<uint32_t*>(row);
  for (size_t i = 0; i < count; i++) y[i] = rounded_bits(x[i]);
}

}  // namespace
}  // namespace cappy
