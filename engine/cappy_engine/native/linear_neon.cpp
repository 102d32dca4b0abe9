// Products of 8-bit rows with NEON as every arm64 processor has it: bytes are multiplied to 16 bits, and pairs of these added.
#include "neon_bytes.h"
#include "rows.h"
#include "vectors_neon.h"

namespace cappy {
namespace {

constexpr size_t ROWS = 2;  // 16 vectors of sums, two for four columns; 2 of rows, 1 of weights and products, of 32 registers

template <size_t R>
inline __attribute__((always_inline)) void add_group(int32x4_t (&sums)[R][8], const int8x16_t (&q)[R], const int8_t* weights) {
#pragma GCC unroll 4
  for (size_t v = 0; v < 4; v++) {
    const int8x16_t w = vld1q_s8(weights + v * 16);
#pragma GCC unroll 2
    for (size_t r = 0; r < R; r++) {
      sums[r][2 * v] = vpadalq_s16(sums[r][2 * v], vmull_s8(vget_low_s8(w), vget_low_s8(q[r])));
      sums[r][2 * v + 1] = vpadalq_s16(sums[r][2 * v + 1], vmull_high_s8(w, q[r]));
    }
  }
}

template <size_t R>
void block(const Block& b) {
  int32x4_t sums[R][8];
#pragma GCC unroll 2
  for (size_t r = 0; r < R; r++)
#pragma GCC unroll 8
    for (size_t v = 0; v < 8; v++) sums[r][v] = vdupq_n_s32(0);
  const uint8_t* rows = b.rows;
  const int8_t *weights = b.panels, *next = b.next;
  int8x16_t q[R];
  for (size_t left = b.inner / GROUP; left; left--) {
    __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 2
    for (size_t r = 0; r < R; r++) q[r] = everywhere(rows + r * b.row_bytes);
    add_group<R>(sums, q, weights);
    rows += GROUP, weights += 64, next += b.next_step;
  }
  if (const size_t left = b.inner % GROUP) {  // no byte behind a row is read
#pragma GCC unroll 2
    for (size_t r = 0; r < R; r++) q[r] = last_everywhere(rows + r * b.row_bytes, left);
    add_group<R>(sums, q, weights);
  }
#pragma GCC unroll 2
  for (size_t r = 0; r < R; r++)
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; v++)
      vst1q_s32(b.sums + r * PANEL + v * 4, vaddq_s32(vpaddq_s32(sums[r][2 * v], sums[r][2 * v + 1]), vld1q_s32(b.start + v * 4)));
}

void multiply(const Block& b) { b.count == 1 ? block<1>(b) : block<2>(b); }

}  // namespace

const LinearKernels LINEAR_NEON = {
    Rows<Neon>::KERNELS,
    {ROWS, 1, PANEL, nothing, nothing, multiply, multiply, Rows<Neon>::finish, TAKEN_AWAY},
};

}  // namespace cappy
