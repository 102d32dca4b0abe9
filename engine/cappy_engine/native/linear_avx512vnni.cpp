// Products of 8-bit rows with AVX-512 VNNI: 64 multiplications and additions in an instruction, two in a cycle.
#include <immintrin.h>

#include "rows.h"
#include "vectors_avx512.h"

namespace cappy {
namespace {

constexpr size_t ROWS = 12, PANELS = 2;
constexpr size_t AHEAD = 1024;  // bytes of a panel between what is multiplied and what is brought into the first cache

inline __attribute__((always_inline)) __m512i everywhere(const uint8_t* four_bytes) {
  int32_t found;
  memcpy(&found, four_bytes, 4);
  return _mm512_set1_epi32(found);
}

// R x 32 sums stay in registers: a step loads two vectors of weights and four bytes of each row. Loops over sums are
// unrolled to the last, or the compiler keeps them in memory.
template <size_t R>
void block(const Block& b) {
  __m512i sums[R][PANELS];
#pragma GCC unroll 16
  for (size_t r = 0; r < R; r++) {
    sums[r][0] = _mm512_loadu_si512(b.start);
    sums[r][1] = _mm512_loadu_si512(b.start + PANEL);
  }
  const size_t once = b.row_bytes, twice = 2 * once, thrice = 3 * once;
  const uint8_t *rows0 = b.rows, *rows4 = rows0 + 4 * once, *rows8 = rows4 + 4 * once;
  const int8_t *first = b.panels, *second = first + b.panel_bytes, *next = b.next;
  auto row = [&](size_t r) __attribute__((always_inline)) {
    return (r < 4 ? rows0 : r < 8 ? rows4 : rows8) + (r % 4 == 0 ? 0 : r % 4 == 1 ? once : r % 4 == 2 ? twice : thrice);
  };
  auto step = [&](size_t group) __attribute__((always_inline)) {
    const __m512i w0 = _mm512_loadu_si512(first + group * 64), w1 = _mm512_loadu_si512(second + group * 64);
    _mm_prefetch(first + group * 64 + AHEAD, _MM_HINT_T0);
    _mm_prefetch(second + group * 64 + AHEAD, _MM_HINT_T0);
    _mm_prefetch(next + group * b.next_step, _MM_HINT_T1);
#pragma GCC unroll 16
    for (size_t r = 0; r < R; r++) {
      const __m512i q = everywhere(row(r) + group * 4);
      sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], q, w0);
      sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], q, w1);
    }
  };
  auto move = [&](size_t groups) __attribute__((always_inline)) {
    rows0 += groups * 4, rows4 += groups * 4, rows8 += groups * 4;
    first += groups * 64, second += groups * 64, next += groups * b.next_step;
  };
  for (size_t left = b.inner / 8; left; left--) {
    step(0);
    step(1);
    move(2);
  }
  if (b.inner % 8 >= 4) {
    step(0);
    move(1);
  }
  if (const size_t left = b.inner % 4) {  // no byte behind a row is read; the weights there are zeros
    const __m512i w0 = _mm512_loadu_si512(first), w1 = _mm512_loadu_si512(second);
#pragma GCC unroll 16
    for (size_t r = 0; r < R; r++) {
      uint8_t last[4] = {};
      memcpy(last, row(r), left);
      const __m512i q = everywhere(last);
      sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], q, w0);
      sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], q, w1);
    }
  }
#pragma GCC unroll 16
  for (size_t r = 0; r < R; r++) {
    _mm512_storeu_si512(b.sums + r * 2 * PANEL, sums[r][0]);
    _mm512_storeu_si512(b.sums + r * 2 * PANEL + PANEL, sums[r][1]);
  }
}

void multiply(const Block& b) {
  using Function = void (*)(const Block&);
  static constexpr Function BLOCKS[ROWS] = {block<1>, block<2>, block<3>, block<4>,  block<5>,  block<6>,
                                            block<7>, block<8>, block<9>, block<10>, block<11>, block<12>};
  BLOCKS[b.count - 1](b);
}

}  // namespace

const LinearKernels LINEAR_AVX512VNNI = {
    Rows<Avx512>::KERNELS,
    {ROWS, 1, PANELS* PANEL, nothing, nothing, multiply, multiply, Rows<Avx512>::finish},
};

}  // namespace cappy
