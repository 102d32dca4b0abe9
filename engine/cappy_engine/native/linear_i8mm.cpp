// Products of 8-bit rows with USMMLA: 32 multiplications and additions in an instruction, of two rows by two columns.
#if !defined(__clang__)  // in gcc, the flags that zig knows leave out what its intrinsics ask for
#pragma GCC target("arch=armv8.2-a+i8mm")
#endif
#include <arm_neon.h>

#include "rows.h"
#include "vectors_neon.h"

namespace cappy {
namespace {

constexpr size_t PAIRS = 5;    // 20 vectors of sums, 4 of weights, and rows that are being loaded, of 32 registers
constexpr size_t COLUMNS = 8;  // at once: half of a panel
constexpr size_t STEP = 8;     // values of a row, two groups of a column

// The weights of 8 columns, two in a vector: `first` and `second` are the groups of the first column.
struct Columns {
  int8x16_t of_two[4];
  inline __attribute__((always_inline)) Columns(const int8_t* first, const int8_t* second) {
#pragma GCC unroll 2
    for (size_t v = 0; v < 2; v++) {
      const int32x4_t a = vreinterpretq_s32_s8(vld1q_s8(first + v * 16)), b = vreinterpretq_s32_s8(vld1q_s8(second + v * 16));
      of_two[2 * v] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
      of_two[2 * v + 1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
    }
  }
};

inline __attribute__((always_inline)) uint8x16_t two_rows(const uint8_t* first, const uint8_t* second) {
  return vcombine_u8(vld1_u8(first), vld1_u8(second));
}

// A vector of sums has those of two rows: two columns of the first, and the same of the second.
template <size_t P>
inline __attribute__((always_inline)) void store_sums(const Block& b, size_t first_column, const int32x4_t (&sums)[P][4]) {
#pragma GCC unroll 8
  for (size_t p = 0; p < P; p++)
#pragma GCC unroll 2
    for (size_t v = 0; v < 2; v++) {
      const size_t column = first_column + v * 4;
      const int64x2_t left = vreinterpretq_s64_s32(sums[p][2 * v]), right = vreinterpretq_s64_s32(sums[p][2 * v + 1]);
      const int32x4_t start = vld1q_s32(b.start + column);
      int32_t* to = b.sums + 2 * p * PANEL + column;
      vst1q_s32(to, vaddq_s32(vreinterpretq_s32_s64(vzip1q_s64(left, right)), start));
      if (2 * p + 1 < b.count) vst1q_s32(to + PANEL, vaddq_s32(vreinterpretq_s32_s64(vzip2q_s64(left, right)), start));
    }
}

// P pairs of rows by 8 columns; of an odd number of rows the last is taken twice.
template <size_t P>
void block(const Block& b, size_t first_column) {
  int32x4_t sums[P][4];
  const uint8_t* rows[2 * P];
#pragma GCC unroll 8
  for (size_t p = 0; p < P; p++) {
    rows[2 * p] = b.rows + 2 * p * b.row_bytes;
    rows[2 * p + 1] = b.rows + (2 * p + 1 < b.count ? 2 * p + 1 : 2 * p) * b.row_bytes;
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; v++) sums[p][v] = vdupq_n_s32(0);
  }
  const int8_t* weights = b.panels + first_column * 4;
  const int8_t* next = b.next + (first_column ? b.next_step : 0);  // every other one: the other half brings the others
  size_t k = 0;
  for (; k + STEP <= b.inner; k += STEP) {
    __builtin_prefetch(next, 0, 2);
    const Columns columns(weights, weights + 64);
#pragma GCC unroll 8
    for (size_t p = 0; p < P; p++) {
      const uint8x16_t q = two_rows(rows[2 * p] + k, rows[2 * p + 1] + k);
#pragma GCC unroll 4
      for (size_t v = 0; v < 4; v++) sums[p][v] = vusmmlaq_s32(sums[p][v], q, columns.of_two[v]);
    }
    weights += 128, next += 2 * b.next_step;
  }
  if (const size_t left = b.inner - k) {  // no byte behind a row is read, and no group behind the last
    constexpr int8_t ZEROS[32] = {};
    const Columns columns(weights, left > 4 ? weights + 64 : ZEROS);
#pragma GCC unroll 8
    for (size_t p = 0; p < P; p++) {
      uint8_t last[2][STEP] = {};
      for (size_t r = 0; r < 2; r++) memcpy(last[r], rows[2 * p + r] + k, left);
      const uint8x16_t q = two_rows(last[0], last[1]);
#pragma GCC unroll 4
      for (size_t v = 0; v < 4; v++) sums[p][v] = vusmmlaq_s32(sums[p][v], q, columns.of_two[v]);
    }
  }
  store_sums<P>(b, first_column, sums);
}

void multiply(const Block& b) {
  using Function = void (*)(const Block&, size_t);
  static constexpr Function BLOCKS[PAIRS] = {block<1>, block<2>, block<3>, block<4>, block<5>};
  for (size_t column = 0; column < PANEL; column += COLUMNS) BLOCKS[(b.count - 1) / 2](b, column);
}

}  // namespace

const LinearKernels LINEAR_I8MM = {
    Rows<Neon>::KERNELS,
    {2 * PAIRS, 2, PANEL, nothing, nothing, multiply, multiply, Rows<Neon>::finish},
};

}  // namespace cappy
