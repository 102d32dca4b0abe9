// Products of bfloat16 rows with AVX512-BF16: 32 multiplications and additions in an instruction.
#include <immintrin.h>

#include "bf16.h"
#include "rows.h"
#include "vectors_avx512.h"

namespace cappy {
namespace {

constexpr size_t ROWS = 12, PANELS = 2;
constexpr size_t AHEAD = 1024;  // bytes of a panel between what is multiplied and what is brought into the first cache

inline __attribute__((always_inline)) __m512 add_dots(__m512 sums, __m512i x, __m512i w) {
  return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
}

// R x 32 sums stay in registers: a step loads two vectors of weights and two values of each row.
template <size_t R>
void block(const Block& b) {
  __m512 sums[R][PANELS];
  const float* start = reinterpret_cast<const float*>(b.start);
#pragma GCC unroll 16
  for (size_t r = 0; r < R; r++) {
    sums[r][0] = _mm512_loadu_ps(start);
    sums[r][1] = _mm512_loadu_ps(start + PANEL);
  }
  const size_t once = b.row_bytes, twice = 2 * once, thrice = 3 * once;
  const uint8_t *rows0 = b.rows, *rows4 = rows0 + 4 * once, *rows8 = rows4 + 4 * once;
  const int8_t *first = b.panels, *second = first + b.panel_bytes, *next = b.next;
  auto row = [&](size_t r) __attribute__((always_inline)) {
    return (r < 4 ? rows0 : r < 8 ? rows4 : rows8) + (r % 4 == 0 ? 0 : r % 4 == 1 ? once : r % 4 == 2 ? twice : thrice);
  };
  for (size_t left = b.inner / 2; left; left--) {
    const __m512i w0 = _mm512_loadu_si512(first), w1 = _mm512_loadu_si512(second);
    _mm_prefetch(first + AHEAD, _MM_HINT_T0);
    _mm_prefetch(second + AHEAD, _MM_HINT_T0);
    _mm_prefetch(next, _MM_HINT_T1);
#pragma GCC unroll 16
    for (size_t r = 0; r < R; r++) {
      int32_t pair;
      memcpy(&pair, row(r), 4);
      const __m512i x = _mm512_set1_epi32(pair);
      sums[r][0] = add_dots(sums[r][0], x, w0);
      sums[r][1] = add_dots(sums[r][1], x, w1);
    }
    rows0 += 4, rows4 += 4, rows8 += 4;
    first += 64, second += 64, next += b.next_step;
  }
  float* found = reinterpret_cast<float*>(b.sums);
#pragma GCC unroll 16
  for (size_t r = 0; r < R; r++) {
    _mm512_storeu_ps(found + r * 2 * PANEL, sums[r][0]);
    _mm512_storeu_ps(found + r * 2 * PANEL + PANEL, sums[r][1]);
  }
}

void multiply(const Block& b) {
  using Function = void (*)(const Block&);
  static constexpr Function BLOCKS[ROWS] = {block<1>, block<2>, block<3>, block<4>,  block<5>,  block<6>,
                                            block<7>, block<8>, block<9>, block<10>, block<11>, block<12>};
  BLOCKS[b.count - 1](b);
}

}  // namespace

const Bf16Kernels BF16_AVX512BF16 = {
    round_row, sizeof(uint16_t),
    {ROWS, 1, PANELS* PANEL, nothing, nothing, multiply, multiply, Rows<Avx512>::activate},
};

}  // namespace cappy
