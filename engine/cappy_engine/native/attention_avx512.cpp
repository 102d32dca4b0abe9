// Attention with vectors of 16 floats; compiled for AVX-512 (F, BW, DQ, VL).
#include <immintrin.h>

#include "attention_tiles.h"

namespace cappy {
namespace {

struct Lanes16 {
  using Vector = __m512;
  static constexpr int64_t lanes = 16, rows = 12;  // 12 x 2 sums, 2 columns and a broadcast: 27 of 32 registers
  static constexpr bool by_fours = false;

  static Vector all(float x) { return _mm512_set1_ps(x); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector x) { _mm512_storeu_ps(p, x); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static float first(Vector x) { return _mm512_cvtss_f32(x); }

  static void largest_of_four(const Vector* x, float* found) { fold<max>(x, found); }
  static void sum_of_four(const Vector* x, float* found) { fold<add>(x, found); }

  // found[i] becomes the fold of x[i]: four vectors are first folded into one.
  template <Vector (*f)(Vector, Vector)>
  static void fold(const Vector* x, float* found) {
    const Vector a = f(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const Vector b = f(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    Vector y = f(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));  // each quarter: x[0] x[1] x[2] x[3]
    y = f(y, _mm512_shuffle_f32x4(y, y, 0x4e));
    y = f(y, _mm512_shuffle_f32x4(y, y, 0xb1));
    _mm_storeu_ps(found, _mm512_castps512_ps128(y));
  }

  static Vector exp2(Vector x) {
    const __mmask16 counts = _mm512_cmp_ps_mask(x, all(LEAST_POWER), _CMP_NLT_UQ);  // and NaN
    const Vector whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vector f = sub(x, whole);
    const Vector y = exp2_of_part<Lanes16>(f);
    return _mm512_maskz_scalef_ps(counts, y, whole);
  }

  // Floats d to d + 3 of 16 rows: four vectors, one behind the other at `stride`.
  static void transpose_four(const float* const* from, int64_t d, float* to, int64_t stride) {
    Vector rows[4];  // rows[i] has rows i, 4 + i, 8 + i and 12 + i
    for (int i = 0; i < 4; i++) {
      Vector x = _mm512_castps128_ps512(_mm_loadu_ps(from[i] + d));
      x = _mm512_insertf32x4(x, _mm_loadu_ps(from[4 + i] + d), 1);
      x = _mm512_insertf32x4(x, _mm_loadu_ps(from[8 + i] + d), 2);
      rows[i] = _mm512_insertf32x4(x, _mm_loadu_ps(from[12 + i] + d), 3);
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(rows[0], rows[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2], rows[3]));
    const __m512d c = _mm512_castps_pd(_mm512_unpackhi_ps(rows[0], rows[1]));
    const __m512d e = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2], rows[3]));
    store(to, _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)));
    store(to + stride, _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    store(to + 2 * stride, _mm512_castpd_ps(_mm512_unpacklo_pd(c, e)));
    store(to + 3 * stride, _mm512_castpd_ps(_mm512_unpackhi_pd(c, e)));
  }
};

}  // namespace

void attention_avx512(const AttentionRows& rows, const AttentionTask& task, AttentionScratch& scratch) {
  attend<Lanes16>(rows, task, scratch);
}

}  // namespace cappy
