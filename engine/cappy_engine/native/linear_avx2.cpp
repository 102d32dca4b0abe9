// Products of 8-bit rows with AVX2, which multiplies bytes only in pairs that saturate at 16 bits.
#include <immintrin.h>

#include "rows.h"
#include "vectors_avx2.h"

namespace cappy {
namespace {

constexpr size_t ROWS = 4;

inline int32_t four(const uint8_t* p) {
  int32_t found;
  memcpy(&found, p, 4);
  return found;
}

// Where no pair of weights can saturate: 32 multiplications in three instructions.
template <size_t R>
void block(const Block& b) {
  __m256i sums[R][2];
  for (size_t r = 0; r < R; r++)
    for (size_t p = 0; p < 2; p++) sums[r][p] = Avx2::load_whole(b.start + p * 8);
  const uint8_t* rows = b.rows;
  const int8_t* weights = b.panels;
  const __m256i ones = _mm256_set1_epi16(1);
  auto step = [&](auto&& group) __attribute__((always_inline)) {
    __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights)),
            w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + 32));
#pragma GCC unroll 8
    for (size_t r = 0; r < R; r++) {
      __m256i q = _mm256_set1_epi32(group(r));
      sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(_mm256_maddubs_epi16(q, w0), ones));
      sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(_mm256_maddubs_epi16(q, w1), ones));
    }
    weights += 64;
  };
  for (size_t k = b.inner / 4; k; k--) {
    step([&](size_t r) __attribute__((always_inline)) { return four(rows + r * b.row_bytes); });
    rows += 4;
  }
  if (size_t left = b.inner % 4) {
    int32_t last[R] = {};
    for (size_t r = 0; r < R; r++) memcpy(&last[r], rows + r * b.row_bytes, left);
    step([&](size_t r) __attribute__((always_inline)) { return last[r]; });
  }
  for (size_t r = 0; r < R; r++)
    for (size_t p = 0; p < 2; p++) _mm256_storeu_si256(reinterpret_cast<__m256i*>(b.sums + r * PANEL + p * 8), sums[r][p]);
}

// Any weights: 16 bits each before they are multiplied. A register holds 4 columns, two half sums of each.
template <size_t R>
void wide_block(const Block& b) {
  __m256i sums[R][4];
  for (size_t r = 0; r < R; r++)
    for (size_t p = 0; p < 4; p++) sums[r][p] = _mm256_setzero_si256();
  for (size_t k = 0; k < b.inner; k += 4) {
    size_t count = b.inner - k < 4 ? b.inner - k : 4;
    __m256i q[R];
    for (size_t r = 0; r < R; r++) {
      int32_t group = 0;
      memcpy(&group, b.rows + r * b.row_bytes + k, count);
      q[r] = _mm256_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(group)));
    }
    for (size_t p = 0; p < 4; p++) {
      __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b.panels + k * PANEL + p * 16)));
      for (size_t r = 0; r < R; r++) sums[r][p] = _mm256_add_epi32(sums[r][p], _mm256_madd_epi16(q[r], w));
    }
  }
  for (size_t r = 0; r < R; r++)
    for (size_t p = 0; p < 4; p++) {
      __m128i low = _mm256_castsi256_si128(sums[r][p]), high = _mm256_extracti128_si256(sums[r][p], 1);
      __m128i start = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b.start + p * 4));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(b.sums + r * PANEL + p * 4), _mm_add_epi32(_mm_hadd_epi32(low, high), start));
    }
}

void multiply(const Block& b) {
  using Function = void (*)(const Block&);
  static constexpr Function BLOCKS[] = {block<1>, block<2>, block<3>, block<4>};
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
    Rows<Avx2>::quantize_row, ROWS, PANEL, multiply, multiply_any, Rows<Avx2>::finish, Rows<Avx2>::normalize,
};

}  // namespace cappy
