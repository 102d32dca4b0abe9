// Products of 8-bit rows with AVX2, which multiplies bytes only in pairs that saturate at 16 bits.
#include <immintrin.h>

#include "avx2_block.h"
#include "rows.h"
#include "vectors_avx2.h"

namespace cappy {
namespace {

constexpr size_t ROWS = 5;  // 10 vectors of sums, 2 of weights, and 16 registers in all

// Where no pair of weights can saturate: 32 multiplications in three instructions.
struct MultiplyAdd {
  __m256i ones = _mm256_set1_epi16(1);
  inline __attribute__((always_inline)) void operator()(__m256i& sums, __m256i unsigned_bytes, __m256i signed_bytes) const {
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned_bytes, signed_bytes), ones));
  }
};

// Any weights: 16 bits each before they are multiplied. A vector holds the sums of 4 columns, two halves of each.
template <size_t R>
void wide_block(const Block& b) {
  __m256i sums[R][4];
#pragma GCC unroll 8
  for (size_t r = 0; r < R; r++)
#pragma GCC unroll 4
    for (size_t p = 0; p < 4; p++) sums[r][p] = _mm256_setzero_si256();
  for (size_t k = 0; k < b.inner; k += 4) {
    __m256i q[R];
#pragma GCC unroll 8
    for (size_t r = 0; r < R; r++) {
      int32_t group = 0;
      if (k + 4 <= b.inner)
        memcpy(&group, b.rows + r * b.row_bytes + k, 4);
      else
        memcpy(&group, b.rows + r * b.row_bytes + k, b.inner - k);
      q[r] = _mm256_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(group)));
    }
#pragma GCC unroll 4
    for (size_t p = 0; p < 4; p++) {
      const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b.panels + k * PANEL + p * 16)));
#pragma GCC unroll 8
      for (size_t r = 0; r < R; r++) sums[r][p] = _mm256_add_epi32(sums[r][p], _mm256_madd_epi16(q[r], w));
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < R; r++)
#pragma GCC unroll 4
    for (size_t p = 0; p < 4; p++) {
      const __m128i low = _mm256_castsi256_si128(sums[r][p]), high = _mm256_extracti128_si256(sums[r][p], 1);
      const __m128i start = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b.start + p * 4));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(b.sums + r * PANEL + p * 4), _mm_add_epi32(_mm_hadd_epi32(low, high), start));
    }
}

void multiply(const Block& b) {
  using Function = void (*)(const Block&);
  static constexpr Function BLOCKS[ROWS] = {block<MultiplyAdd, 1>, block<MultiplyAdd, 2>, block<MultiplyAdd, 3>,
                                            block<MultiplyAdd, 4>, block<MultiplyAdd, 5>};
  BLOCKS[b.count - 1](b);
}

void multiply_any(const Block& b) {
  Block part = b;
  for (size_t r = 0; r < b.count; r += 2) {
    part.rows = b.rows + r * b.row_bytes;
    part.sums = b.sums + r * PANEL;
    r + 1 < b.count ? wide_block<2>(part) : wide_block<1>(part);
  }
}

}  // namespace

const LinearKernels LINEAR_AVX2 = {
    Rows<Avx2>::KERNELS,
    {ROWS, 1, PANEL, nothing, nothing, multiply, multiply_any, Rows<Avx2>::finish},
};

}  // namespace cappy
