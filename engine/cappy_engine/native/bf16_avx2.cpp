// Products of bfloat16 weights with AVX2: weights are widened to floats as they are read.
#include <immintrin.h>

#include "bf16.h"
#include "rows.h"
#include "vectors_avx2.h"

namespace cappy {
namespace {

constexpr size_t ROWS = 5;  // 10 vectors of sums, 4 of weights and a row's value, in 16 registers

template <size_t R>
void block(const Block& b) {
  __m256 sums[R][2];
  const float* start = reinterpret_cast<const float*>(b.start);
#pragma GCC unroll 8
  for (size_t r = 0; r < R; r++) {
    sums[r][0] = Avx2::load(start);
    sums[r][1] = Avx2::load(start + 8);
  }
  const float* rows = reinterpret_cast<const float*>(b.rows);
  const size_t stride = b.row_bytes / sizeof(float);
  const int8_t *weights = b.panels, *next = b.next;
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  auto add = [&](size_t place, __m256i w0, __m256i w1) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (size_t r = 0; r < R; r++) {
      const __m256 x = _mm256_set1_ps(rows[r * stride + place]);
      sums[r][0] = _mm256_fmadd_ps(x, _mm256_castsi256_ps(w0), sums[r][0]);
      sums[r][1] = _mm256_fmadd_ps(x, _mm256_castsi256_ps(w1), sums[r][1]);
    }
  };
  for (size_t left = b.inner / 2; left; left--) {
    const __m256i w0 = Avx2::load_bytes(weights), w1 = Avx2::load_bytes(weights + 32);
    _mm_prefetch(next, _MM_HINT_T1);
    add(0, _mm256_slli_epi32(w0, 16), _mm256_slli_epi32(w1, 16));
    add(1, _mm256_and_si256(w0, upper), _mm256_and_si256(w1, upper));
    rows += 2, weights += 64, next += b.next_step;
  }
  float* found = reinterpret_cast<float*>(b.sums);
#pragma GCC unroll 8
  for (size_t r = 0; r < R; r++) {
    Avx2::store(found + r * PANEL, sums[r][0]);
    Avx2::store(found + r * PANEL + 8, sums[r][1]);
  }
}

void multiply(const Block& b) {
  using Function = void (*)(const Block&);
  static constexpr Function BLOCKS[ROWS] = {block<1>, block<2>, block<3>, block<4>, block<5>};
  BLOCKS[b.count - 1](b);
}

}  // namespace

const Bf16Kernels BF16_AVX2 = {
    round_wide_row, sizeof(float),
    {ROWS, 1, PANEL, nothing, nothing, multiply, multiply, Rows<Avx2>::activate},
};

}  // namespace cappy
