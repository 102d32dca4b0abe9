// Products of bfloat16 weights with NEON: weights are widened to floats as they are read.
#include "bf16.h"
#include "rows.h"
#include "vectors_neon.h"

namespace cappy {
namespace {

constexpr size_t ROWS = 4;  // 16 vectors of sums, 4 halves of rows, 3 of weights, of 32 registers

template <size_t R>
void block(const Block& b) {
  float32x4_t sums[R][4];
  const float* start = reinterpret_cast<const float*>(b.start);
#pragma GCC unroll 8
  for (size_t r = 0; r < R; r++)
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; v++) sums[r][v] = Neon::load(start + v * 4);
  const float* rows = reinterpret_cast<const float*>(b.rows);
  const size_t stride = b.row_bytes / sizeof(float);
  const int8_t *weights = b.panels, *next = b.next;
  const uint32x4_t upper = vdupq_n_u32(0xffff0000);
  for (size_t left = b.inner / 2; left; left--) {
    __builtin_prefetch(next, 0, 2);
    float32x2_t x[R];
#pragma GCC unroll 8
    for (size_t r = 0; r < R; r++) x[r] = vld1_f32(rows + r * stride);
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; v++) {
      const uint32x4_t w = vreinterpretq_u32_s8(vld1q_s8(weights + v * 16));
      const float32x4_t w0 = vreinterpretq_f32_u32(vshlq_n_u32(w, 16)), w1 = vreinterpretq_f32_u32(vandq_u32(w, upper));
#pragma GCC unroll 8
      for (size_t r = 0; r < R; r++) sums[r][v] = vfmaq_lane_f32(vfmaq_lane_f32(sums[r][v], w0, x[r], 0), w1, x[r], 1);
    }
    rows += 2, weights += 64, next += b.next_step;
  }
  float* found = reinterpret_cast<float*>(b.sums);
#pragma GCC unroll 8
  for (size_t r = 0; r < R; r++)
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; v++) Neon::store(found + r * PANEL + v * 4, sums[r][v]);
}

void multiply(const Block& b) {
  using Function = void (*)(const Block&);
  static constexpr Function BLOCKS[ROWS] = {block<1>, block<2>, block<3>, block<4>};
  BLOCKS[b.count - 1](b);
}

}  // namespace

const Bf16Kernels BF16_NEON = {
    round_wide_row, sizeof(float),
    {ROWS, 1, PANEL, nothing, nothing, multiply, multiply, Rows<Neon>::activate},
};

}  // namespace cappy
