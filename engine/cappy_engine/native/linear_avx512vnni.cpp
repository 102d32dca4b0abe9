// Products of 8-bit rows with AVX-512 VNNI: 64 multiplications and additions in an instruction, two in a cycle.
#include <immintrin.h>

#include "rows.h"
#include "vectors_avx512.h"

namespace cappy {
namespace {

constexpr size_t ROWS = 12, PANELS = 2;

inline int32_t four(const uint8_t* p) {
  int32_t found;
  memcpy(&found, p, 4);
  return found;
}

// R x 32 sums stay in registers; each step loads 2 vectors of weights and one 4-byte group of each row.
template <size_t R>
void block(const Block& b) {
  __m512i sums[R][PANELS];
  for (size_t r = 0; r < R; r++)
    for (size_t p = 0; p < PANELS; p++) sums[r][p] = _mm512_loadu_si512(b.start + p * PANEL);
  const uint8_t* rows = b.rows;
  const int8_t* first = b.panels;
  const int8_t* second = b.panels + b.panel_bytes;
  const int8_t* next = b.next;
  auto step = [&](auto&& group) __attribute__((always_inline)) {
    __m512i w0 = _mm512_loadu_si512(first), w1 = _mm512_loadu_si512(second);
#pragma GCC unroll 32
    for (size_t r = 0; r < R; r++) {
      __m512i q = _mm512_set1_epi32(group(r));
      sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], q, w0);
      sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], q, w1);
    }
    first += 64;
    second += 64;
  };
  for (size_t k = b.inner / 4; k; k--) {
    _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
    next += 64;
    step([&](size_t r) __attribute__((always_inline)) { return four(rows + r * b.row_bytes); });
    rows += 4;
  }
  if (size_t left = b.inner % 4) {
    int32_t last[R] = {};
    for (size_t r = 0; r < R; r++) memcpy(&last[r], rows + r * b.row_bytes, left);
    step([&](size_t r) __attribute__((always_inline)) { return last[r]; });
  }
  for (size_t r = 0; r < R; r++)
    for (size_t p = 0; p < PANELS; p++) _mm512_storeu_si512(b.sums + (r * PANELS + p) * PANEL, sums[r][p]);
}

void multiply(const Block& b) {
  using Function = void (*)(const Block&);
  static constexpr Function BLOCKS[] = {block<1>, block<2>, block<3>, block<4>,  block<5>,  block<6>,
                                        block<7>, block<8>, block<9>, block<10>, block<11>, block<12>};
  BLOCKS[b.count - 1](b);
}

}  // namespace

const LinearKernels LINEAR_AVX512VNNI = {
    Rows<Avx512>::quantize_row, ROWS, PANELS* PANEL, multiply, multiply, Rows<Avx512>::finish, Rows<Avx512>::normalize,
};

}  // namespace cappy
