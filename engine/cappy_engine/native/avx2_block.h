// A block of products of 8-bit rows with AVX2's vectors, for any way to multiply bytes and add them.
#pragma once
#include <immintrin.h>
#include <string.h>

#include "kernels.h"
#include "vectors_avx2.h"

namespace cappy {
namespace {

inline __attribute__((always_inline)) __m256i everywhere(const uint8_t* four_bytes) {
  int32_t found;
  memcpy(&found, four_bytes, 4);
  return _mm256_set1_epi32(found);
}

// R x 16 sums stay in registers: a step loads two vectors of weights and four bytes of each row. MultiplyAdd adds to each
// of 8 sums the products of four bytes of a row and four weights.
template <class MultiplyAdd, size_t R>
void block(const Block& b) {
  __m256i sums[R][2];
#pragma GCC unroll 8
  for (size_t r = 0; r < R; r++) {
    sums[r][0] = Avx2::load_whole(b.start);
    sums[r][1] = Avx2::load_whole(b.start + 8);
  }
  const uint8_t* rows = b.rows;
  const int8_t *weights = b.panels, *next = b.next;
  const MultiplyAdd multiply_add = {};
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
    next += b.next_step;
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

}  // namespace
}  // namespace cappy
