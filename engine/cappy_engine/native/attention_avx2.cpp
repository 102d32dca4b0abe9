// Attention with vectors of 8 floats; compiled for AVX2 and FMA.
#include <immintrin.h>

#include "attention_tiles.h"

namespace cappy {
namespace {

struct Lanes8 {
  using Vector = __m256;
  static constexpr int64_t lanes = 8, rows = 6;  // 6 x 2 sums, 2 columns and a broadcast: 15 of 16 registers
  static constexpr bool by_fours = false;

  static Vector all(float x) { return _mm256_set1_ps(x); }
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector x) { _mm256_storeu_ps(p, x); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
  static Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
  static float first(Vector x) { return _mm256_cvtss_f32(x); }
  static void largest_of_four(const Vector* x, float* found) { fold<max>(x, found); }
  static void sum_of_four(const Vector* x, float* found) { fold<add>(x, found); }

  // found[i] becomes the fold of x[i]: four vectors are first folded into one.
  template <Vector (*f)(Vector, Vector)>
  static void fold(const Vector* x, float* found) {
    const Vector a = f(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
    const Vector b = f(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
    Vector y = f(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));  // each half: x[0] x[1] x[2] x[3]
    y = f(y, _mm256_permute2f128_ps(y, y, 1));
    _mm_storeu_ps(found, _mm256_castps256_ps128(y));
  }

  static Vector exp2(Vector x) {
    const Vector counts = _mm256_cmp_ps(x, all(LEAST_POWER), _CMP_NLT_UQ);  // and NaN
    const Vector whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vector f = sub(x, whole);
    const Vector y = exp2_of_part<Lanes8>(f);
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);  // 0 where x is NaN
    return _mm256_and_ps(counts, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power)));
  }

  // Floats d to d + 3 of 8 rows: four vectors, one behind the other at `stride`.
  static void transpose_four(const float* const* from, int64_t d, float* to, int64_t stride) {
    Vector rows[4];  // rows[i] has rows i and 4 + i
    for (int i = 0; i < 4; i++)
      rows[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from[i] + d)), _mm_loadu_ps(from[4 + i] + d), 1);
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(rows[0], rows[1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpacklo_ps(rows[2], rows[3]));
    const __m256d c = _mm256_castps_pd(_mm256_unpackhi_ps(rows[0], rows[1]));
    const __m256d e = _mm256_castps_pd(_mm256_unpackhi_ps(rows[2], rows[3]));
    store(to, _mm256_castpd_ps(_mm256_unpacklo_pd(a, b)));
    store(to + stride, _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    store(to + 2 * stride, _mm256_castpd_ps(_mm256_unpacklo_pd(c, e)));
    store(to + 3 * stride, _mm256_castpd_ps(_mm256_unpackhi_pd(c, e)));
  }
};

}  // namespace

void attention_avx2(const AttentionRows& rows, const AttentionTask& task, AttentionScratch& scratch) {
  attend<Lanes8>(rows, task, scratch);
}

}  // namespace cappy
