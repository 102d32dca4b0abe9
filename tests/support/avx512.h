// Instructions of AVX-512 and AVX-VNNI that the kernels use, in plain C++: their code runs, and is watched by sanitizers, on processors
// that have none. Included before a kernel's file; the names are found in its namespace before those of immintrin.h.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

// A compiler may have these as macros.
#undef _mm256_dpbusd_avx_epi32
#undef _mm512_cmp_ps_mask
#undef _mm512_insertf32x4
#undef _mm512_permute_ps
#undef _mm512_roundscale_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_ps
#undef _mm512_slli_epi32

namespace cappy {
namespace {

// The values of a vector, one by one.
template <class T, class Vector>
struct Lanes {
  T at[sizeof(Vector) / sizeof(T)];
  Lanes() = default;
  Lanes(Vector x) { memcpy(at, &x, sizeof x); }
  operator Vector() const {
    Vector found;
    memcpy(&found, at, sizeof found);
    return found;
  }
};
using Floats = Lanes<float, __m512>;
using Wholes = Lanes<int32_t, __m512i>;

template <class L, class Body>
inline L made(Body&& body) {
  L found;
  for (int i = 0; i < 16; i++) found.at[i] = body(i);
  return found;
}

template <class To, class From>
inline To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To found;
  memcpy(&found, &x, sizeof found);
  return found;
}

inline __m512 _mm512_castpd_ps(__m512d x) { return same_bits<__m512>(x); }
inline __m512d _mm512_castps_pd(__m512 x) { return same_bits<__m512d>(x); }
inline __m512 _mm512_castsi512_ps(__m512i x) { return same_bits<__m512>(x); }
inline __m512i _mm512_castps_si512(__m512 x) { return same_bits<__m512i>(x); }
inline __m512 _mm512_castps128_ps512(__m128 x) {
  Floats found = {};
  memcpy(found.at, &x, sizeof x);
  return found;
}
inline __m128 _mm512_castps512_ps128(__m512 x) {
  __m128 found;
  memcpy(&found, &x, sizeof found);
  return found;
}
inline float _mm512_cvtss_f32(__m512 x) { return Floats(x).at[0]; }

typedef int32_t WholeVector __attribute__((vector_size(64)));
inline __m512 _mm512_set1_ps(float x) { return x - __m512{}; }
inline __m512i _mm512_set1_epi32(int x) { return same_bits<__m512i>(x - WholeVector{}); }

inline __m512 _mm512_loadu_ps(const void* p) {
  __m512 found;
  memcpy(&found, p, sizeof found);
  return found;
}
inline __m512i _mm512_loadu_si512(const void* p) {
  __m512i found;
  memcpy(&found, p, sizeof found);
  return found;
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  Floats found = {};
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) memcpy(found.at + i, static_cast<const float*>(p) + i, sizeof(float));
  return found;
}
inline void _mm512_storeu_ps(void* p, __m512 x) { memcpy(p, &x, sizeof x); }
inline void _mm512_storeu_si512(void* p, __m512i x) { memcpy(p, &x, sizeof x); }
inline void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 x) {
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) memcpy(static_cast<float*>(p) + i, Floats(x).at + i, sizeof(float));
}
inline __m128i _mm512_cvtepi32_epi8(__m512i x) {
  Lanes<int8_t, __m128i> found;
  for (int i = 0; i < 16; i++) found.at[i] = static_cast<int8_t>(Wholes(x).at[i]);
  return found;
}
inline void _mm512_mask_cvtepi32_storeu_epi8(void* p, __mmask16 mask, __m512i x) {
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) static_cast<int8_t*>(p)[i] = static_cast<int8_t>(Wholes(x).at[i]);
}

inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Floats x = a, y = b, z = c;
  return made<Floats>([&](int i) { return fmaf(x.at[i], y.at[i], z.at[i]); });
}
// The second is taken where one is not a number.
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  const Floats x = a, y = b;
  return made<Floats>([&](int i) { return x.at[i] > y.at[i] ? x.at[i] : y.at[i]; });
}
inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
  const Floats x = a, y = b;
  return made<Floats>([&](int i) { return x.at[i] < y.at[i] ? x.at[i] : y.at[i]; });
}
inline __m512 _mm512_abs_ps(__m512 x) {
  return made<Floats>([&](int i) { return fabsf(Floats(x).at[i]); });
}
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 x) {
  return made<Floats>([&](int i) { return mask >> i & 1 ? Floats(x).at[i] : 0; });
}
inline __m512 _mm512_mask_mov_ps(__m512 others, __mmask16 mask, __m512 a) {
  const Floats x = others, y = a;
  return made<Floats>([&](int i) { return mask >> i & 1 ? y.at[i] : x.at[i]; });
}
// Only "not less, or not ordered".
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int) {
  const Floats x = a, y = b;
  int found = 0;
  for (int i = 0; i < 16; i++) found |= (x.at[i] < y.at[i] ? 0 : 1) << i;
  return static_cast<__mmask16>(found);
}
// Only to the nearest whole number.
inline __m512 _mm512_roundscale_ps(__m512 x, int) {
  return made<Floats>([&](int i) { return nearbyintf(Floats(x).at[i]); });
}
inline __m512 _mm512_maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 b) {
  const Floats x = a, y = b;
  return made<Floats>([&](int i) { return mask >> i & 1 ? x.at[i] * exp2f(floorf(y.at[i])) : 0; });
}
// Sums and largest values of lanes that are 8, 4, 2 and 1 apart.
template <class Fold>
inline float folded(__m512 x, Fold&& fold) {
  Floats found = x;
  for (int apart = 8; apart; apart /= 2)
    for (int i = 0; i < apart; i++) found.at[i] = fold(found.at[i], found.at[i + apart]);
  return found.at[0];
}
inline float _mm512_reduce_add_ps(__m512 x) {
  return folded(x, [](float a, float b) { return a + b; });
}
inline float _mm512_reduce_max_ps(__m512 x) {
  return folded(x, [](float a, float b) { return a > b ? a : b; });
}

inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  const Wholes x = a, y = b;
  return made<Wholes>([&](int i) { return x.at[i] + y.at[i]; });
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_slli_epi32(__m512i x, unsigned count) {
  return made<Wholes>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(Wholes(x).at[i]) << count); });
}
inline __m512i _mm512_cvtps_epi32(__m512 x) {  // INT32_MIN where a number does not fit
  return made<Wholes>([&](int i) {
    const float value = Floats(x).at[i];
    return fabsf(value) < 2147483648.0f ? static_cast<int32_t>(nearbyintf(value)) : INT32_MIN;
  });
}
inline __m512 _mm512_cvtepi32_ps(__m512i x) {
  return made<Floats>([&](int i) { return static_cast<float>(Wholes(x).at[i]); });
}
inline __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i unsigned_bytes, __m512i signed_bytes) {
  const Lanes<uint8_t, __m512i> x = unsigned_bytes;
  const Lanes<int8_t, __m512i> y = signed_bytes;
  Wholes found = sums;
  for (int i = 0; i < 64; i++) found.at[i / 4] += x.at[i] * y.at[i];
  return found;
}
inline __m256i _mm256_dpbusd_avx_epi32(__m256i sums, __m256i unsigned_bytes, __m256i signed_bytes) {
  const Lanes<uint8_t, __m256i> x = unsigned_bytes;
  const Lanes<int8_t, __m256i> y = signed_bytes;
  Lanes<int32_t, __m256i> found = sums;
  for (int i = 0; i < 32; i++) found.at[i / 4] += x.at[i] * y.at[i];
  return found;
}
inline __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {  // the second of each two bfloat16 first
  const Lanes<uint32_t, __m512bh> x = a, y = b;
  Floats found = sums;
  for (int shift = 0; shift <= 16; shift += 16)
    for (int i = 0; i < 16; i++)
      found.at[i] = fmaf(same_bits<float>(x.at[i] << shift & 0xffff0000u), same_bits<float>(y.at[i] << shift & 0xffff0000u), found.at[i]);
  return found;
}

// Lane i of a result is lane of(i) of 32 floats.
template <class Of>
inline __m512 picked(__m512 a, __m512 b, Of&& of) {
  const Floats x = a, y = b;
  return made<Floats>([&](int i) { return (of(i) < 16 ? x : y).at[of(i) % 16]; });
}
inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i places, __m512 b) {
  return picked(a, b, [&](int i) { return Wholes(places).at[i] & 31; });
}
inline __m512 _mm512_permute_ps(__m512 x, int order) {
  return picked(x, x, [&](int i) { return i / 4 * 4 + (order >> i % 4 * 2 & 3); });
}
inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int order) {
  return picked(a, b, [&](int i) { return i % 4 / 2 * 16 + i / 4 * 4 + (order >> i % 4 * 2 & 3); });
}
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
  return picked(a, b, [&](int i) { return i / 8 * 16 + (order >> i / 4 * 2 & 3) * 4 + i % 4; });
}
inline __m512 _mm512_insertf32x4(__m512 x, __m128 four, int place) {
  return picked(x, _mm512_castps128_ps512(four), [&](int i) { return i / 4 == place ? 16 + i % 4 : i; });
}
inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  return picked(a, b, [](int i) { return i % 2 * 16 + i / 4 * 4 + i % 4 / 2; });
}
inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  return picked(a, b, [](int i) { return i % 2 * 16 + i / 4 * 4 + 2 + i % 4 / 2; });
}
inline __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) {
  return _mm512_castps_pd(picked(_mm512_castpd_ps(a), _mm512_castpd_ps(b), [](int i) { return i % 4 / 2 * 16 + i / 4 * 4 + i % 2; }));
}
inline __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) {
  return _mm512_castps_pd(picked(_mm512_castpd_ps(a), _mm512_castpd_ps(b), [](int i) { return i % 4 / 2 * 16 + i / 4 * 4 + 2 + i % 2; }));
}

}  // namespace
}  // namespace cappy
