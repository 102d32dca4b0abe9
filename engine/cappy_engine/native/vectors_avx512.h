// Sixteen floats at a time.
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "gelu.h"

namespace cappy {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  using Gelu = TableGelu<Avx512>;
  static constexpr size_t WIDTH = 16;
  static __mmask16 mask(size_t count) { return static_cast<__mmask16>((1u << count) - 1); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static I set_whole(int x) { return _mm512_set1_epi32(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load_some(const float* p, size_t count) { return _mm512_maskz_loadu_ps(mask(count), p); }
  static I load_whole(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store_some(float* p, F x, size_t count) { _mm512_mask_storeu_ps(p, mask(count), x); }
  static void store_bytes(uint8_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x)); }
  static void store_some_bytes(uint8_t* p, I x, size_t count) { _mm512_mask_cvtepi32_storeu_epi8(p, mask(count), x); }
  static F first(F x, size_t count) { return _mm512_maskz_mov_ps(mask(count), x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F abs(F x) { return _mm512_abs_ps(x); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F look_up(const F* table, F place) {  // of 32 floats, by the lowest bits of a place
    return _mm512_permutex2var_ps(table[0], _mm512_castps_si512(place), table[1]);
  }
  static I add_whole(I a, I b) { return _mm512_add_epi32(a, b); }
  static I round(F x) { return _mm512_cvtps_epi32(x); }
  static F to_floats(I x) { return _mm512_cvtepi32_ps(x); }
  // Lanes that are H apart: their sum in the first, their difference in the second. A product with 1 or -1 is exact.
  template <size_t H>
  static F butterfly(F x) {
    constexpr __mmask16 SECOND = H == 1 ? 0xaaaa : H == 2 ? 0xcccc : H == 4 ? 0xf0f0 : 0xff00;
    const F other = H == 1   ? _mm512_permute_ps(x, 0xb1)
                    : H == 2 ? _mm512_permute_ps(x, 0x4e)
                    : H == 4 ? _mm512_shuffle_f32x4(x, x, 0xb1)
                             : _mm512_shuffle_f32x4(x, x, 0x4e);
    return fma(x, _mm512_mask_mov_ps(set(1), SECOND, set(-1)), other);
  }
  static float sum(F x) { return _mm512_reduce_add_ps(x); }
  static float largest(F x) { return _mm512_reduce_max_ps(x); }
};

}  // namespace
}  // namespace cappy
