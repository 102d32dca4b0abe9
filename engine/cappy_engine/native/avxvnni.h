// Products of 8-bit rows with AVX-VNNI: 32 multiplications and additions in an instruction, without AVX-512. Included by
// one file for that, and by one that has the same instruction in AVX-512's encoding (CAPPY_EVEX), for tests.
#pragma once
#include <immintrin.h>

#include "rows.h"
#include "vectors_avx2.h"

namespace cappy {
namespace {

constexpr size_t ROWS = 6;  // 12 vectors of sums, 2 of weights, and 16 registers in all

inline __attribute__((always_inline)) void multiply_add(__m256i& sums, __m256i unsigned_bytes, __m256i signed_bytes) {
#if defined(CAPPY_EVEX)
  __asm__("vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(unsigned_bytes), "x"(signed_bytes));
#else
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(unsigned_bytes), "x"(signed_bytes));
#endif
}

inline __attribute__((always_inline)) __m256i everywhere(const uint8_t* four_bytes) {
  int32_t found;
  memcpy(&found, four_bytes, 4);
  return _mm256_set1_epi32(found);
}

template <size_t R>
void block(const Block& b) {
  __m256i sums[R][2];
#pragma GCC unroll 8
  for (size_t r = 0; r < R; r++) {
    sums[r][0] = Avx2::load_whole(b.start);
    sums[r][1] = Avx2::load_whole(b.start + 8);
  }
  const uint8_t* rows = b.rows;
  const int8_t *weights = b.panels, *next = b.next ? b.next : b.panels;
  auto step = [&](auto&& group) __attribute__((always_inline)) {
    const __m256i w0 = Avx2::load_bytes(weights), w1 = Avx2::load_bytes(weights + 32);
#pragma GCC unroll 8
    for (size_t r = 0; r < R; r++) {
      const __m256i q = group(r);
      multiply_add(sums[r][0], q, w0);
      multiply_add(sums[r][1], q, w1);
    }
    weights += 64;
  };
  for (size_t left = b.inner / 4; left; left--) {
    _mm_prefetch(next, _MM_HINT_T1);
    step([&](size_t r) __attribute__((always_inline)) { return everywhere(rows + r * b.row_bytes); });
    rows += 4;
    next += 64;
  }
  if (const size_t left = b.inner % 4)  // no byte behind a row is read; the weights there are zeros
    step([&](size_t r) __attribute__((always_inline)) {
      uint8_t last[4] = {};
      memcpy(last, rows + r * b.row_bytes, left);
      return everywhere(last);
    });
#pragma GCC unroll 8
  for (size_t r = 0; r < R; r++) {
    Avx2::store_whole(b.sums + r * PANEL, sums[r][0]);
    Avx2::store_whole(b.sums + r * PANEL + 8, sums[r][1]);
  }
}

void multiply(const Block& b) {
  using Function = void (*)(const Block&);
  static constexpr Function BLOCKS[ROWS] = {block<1>, block<2>, block<3>, block<4>, block<5>, block<6>};
  BLOCKS[b.count - 1](b);
}

constexpr LinearKernels KERNELS = {
    Rows<Avx2>::quantize_row, Rows<Avx2>::rotate_row,
    ROWS, 1, PANEL, nothing, nothing, multiply, multiply, Rows<Avx2>::finish, Rows<Avx2>::normalize,
};

}  // namespace
}  // namespace cappy
