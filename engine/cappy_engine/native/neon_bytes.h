// Bytes of rows as the products with NEON's signed multiplications read them: 128 less, so that they are signed, too.
#pragma once
#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace cappy {
namespace {

constexpr int TAKEN_AWAY = 128;  // as Product names it
constexpr size_t GROUP = 4;      // neighbours of a column that lie together in packed weights

inline __attribute__((always_inline)) int8x16_t less_128(uint8x16_t bytes) {
  return vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(0x80)));
}

// Four bytes, over and over.
inline __attribute__((always_inline)) int8x16_t everywhere(const uint8_t* four_bytes) {
  uint32_t found;
  memcpy(&found, four_bytes, GROUP);
  return less_128(vreinterpretq_u8_u32(vdupq_n_u32(found)));
}

// The same with the last bytes of a row, and what multiplies weights that are zeros behind them.
inline __attribute__((always_inline)) int8x16_t last_everywhere(const uint8_t* bytes, size_t count) {
  uint8_t last[GROUP] = {};
  memcpy(last, bytes, count);
  return everywhere(last);
}

}  // namespace
}  // namespace cappy
