// Eight floats at a time.
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "gelu.h"

namespace cappy {
namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  using Gelu = PolynomialGelu<Avx2>;
  static constexpr size_t WIDTH = 8;
  static I mask(size_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static F set(float x) { return _mm256_set1_ps(x); }
  static I set_whole(int x) { return _mm256_set1_epi32(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load_some(const float* p, size_t count) { return count == WIDTH ? load(p) : _mm256_maskload_ps(p, mask(count)); }
  static I load_whole(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I load_bytes(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_whole(int32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void store_some(float* p, F x, size_t count) { count == WIDTH ? store(p, x) : _mm256_maskstore_ps(p, mask(count), x); }
  static __m128i bytes(I x) {
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    return _mm_packus_epi16(words, words);
  }
  static void store_bytes(uint8_t* p, I x) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes(x)); }
  static void store_some_bytes(uint8_t* p, I x, size_t count) {
    alignas(16) uint8_t all[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(all), bytes(x));
    for (size_t i = 0; i < count; i++) p[i] = all[i];
  }
  static F first(F x, size_t count) { return _mm256_and_ps(x, _mm256_castsi256_ps(mask(count))); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F abs(F x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static I add_whole(I a, I b) { return _mm256_add_epi32(a, b); }
  static I round(F x) { return _mm256_cvtps_epi32(x); }
  static F to_floats(I x) { return _mm256_cvtepi32_ps(x); }
  // Lanes that are H apart: their sum in the first, their difference in the second. A product with 1 or -1 is exact.
  template <size_t H>
  static F butterfly(F x) {
    constexpr int SECOND = H == 1 ? 0xaa : H == 2 ? 0xcc : 0xf0;
    const F other = H == 1   ? _mm256_permute_ps(x, 0xb1)
                    : H == 2 ? _mm256_permute_ps(x, 0x4e)
                             : _mm256_permute2f128_ps(x, x, 1);
    return fma(x, _mm256_blend_ps(set(1), set(-1), SECOND), other);
  }
  static float sum(F x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
  }
  static float largest(F x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
  }
};

}  // namespace
}  // namespace cappy
