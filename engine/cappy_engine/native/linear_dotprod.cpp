// Products of 8-bit rows with SDOT: 16 multiplications and additions in an instruction.
#if !defined(__clang__)  // in gcc, the flags that zig knows leave out what its intrinsics ask for
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include "neon_bytes.h"
#include "rows.h"
#include "vectors_neon.h"

namespace cappy {
namespace {

constexpr size_t ROWS = 5;  // 20 vectors of sums, 5 of rows, 4 of weights, of 32 registers

// Adds the products of a group of each column, and of group LANE of each row's bytes.
template <int LANE, size_t R>
inline __attribute__((always_inline)) void add_group(int32x4_t (&sums)[R][4], const int8x16_t (&q)[R], const int8_t*& weights) {
#pragma GCC unroll 4
  for (size_t v = 0; v < 4; v++) {
    const int8x16_t w = vld1q_s8(weights + v * 16);
#pragma GCC unroll 8
    for (size_t r = 0; r < R; r++) sums[r][v] = vdotq_laneq_s32(sums[r][v], w, q[r], LANE);
  }
  weights += 64;
  // The next weights are loaded behind these products, or gcc loads so many before that there are no registers left.
  __asm__ volatile("" : "+r"(weights), "+w"(sums[R - 1][3]));
}

// R x 16 sums stay in registers: a step loads 16 bytes of each row, and 16 vectors of weights.
template <size_t R>
void block(const Block& b) {
  int32x4_t sums[R][4];
#pragma GCC unroll 8
  for (size_t r = 0; r < R; r++)
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; v++) sums[r][v] = vld1q_s32(b.start + v * 4);
  const uint8_t* rows = b.rows;
  const int8_t *weights = b.panels, *next = b.next;
  int8x16_t q[R];
  for (size_t left = b.inner / (4 * GROUP); left; left--) {
#pragma GCC unroll 8
    for (size_t r = 0; r < R; r++) q[r] = less_128(vld1q_u8(rows + r * b.row_bytes));
#pragma GCC unroll 4
    for (size_t line = 0; line < 4; line++) __builtin_prefetch(next + line * b.next_step, 0, 2);
    add_group<0, R>(sums, q, weights);
    add_group<1, R>(sums, q, weights);
    add_group<2, R>(sums, q, weights);
    add_group<3, R>(sums, q, weights);
    rows += 4 * GROUP, next += 4 * b.next_step;
  }
  for (size_t left = b.inner / GROUP % 4; left; left--) {
#pragma GCC unroll 8
    for (size_t r = 0; r < R; r++) q[r] = everywhere(rows + r * b.row_bytes);
    add_group<0, R>(sums, q, weights);
    rows += GROUP;
  }
  if (const size_t left = b.inner % GROUP) {  // no byte behind a row is read
#pragma GCC unroll 8
    for (size_t r = 0; r < R; r++) q[r] = last_everywhere(rows + r * b.row_bytes, left);
    add_group<0, R>(sums, q, weights);
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < R; r++)
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; v++) vst1q_s32(b.sums + r * PANEL + v * 4, sums[r][v]);
}

void multiply(const Block& b) {
  using Function = void (*)(const Block&);
  static constexpr Function BLOCKS[ROWS] = {block<1>, block<2>, block<3>, block<4>, block<5>};
  BLOCKS[b.count - 1](b);
}

}  // namespace

const LinearKernels LINEAR_DOTPROD = {
    Rows<Neon>::KERNELS,
    {ROWS, 1, PANEL, nothing, nothing, multiply, multiply, Rows<Neon>::finish, TAKEN_AWAY},
};

}  // namespace cappy
