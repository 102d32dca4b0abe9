// Four floats at a time, with NEON, which every arm64 processor has.
#pragma once
#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "gelu.h"

namespace cappy {
namespace {

struct Neon {
  using F = float32x4_t;
  using I = int32x4_t;
  using Gelu = PolynomialGelu<Neon>;
  static constexpr size_t WIDTH = 4;
  static F set(float x) { return vdupq_n_f32(x); }
  static I set_whole(int x) { return vdupq_n_s32(x); }
  static F load(const float* p) { return vld1q_f32(p); }
  static F load_some(const float* p, size_t count) {
    if (count == WIDTH) return load(p);
    float some[WIDTH] = {};
    for (size_t i = 0; i < count; i++) some[i] = p[i];
    return load(some);
  }
  static I load_whole(const int32_t* p) { return vld1q_s32(p); }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static void store_some(float* p, F x, size_t count) {
    if (count == WIDTH) return store(p, x);
    float all[WIDTH];
    store(all, x);
    for (size_t i = 0; i < count; i++) p[i] = all[i];
  }
  static void store_bytes(uint8_t* p, I x) { store_some_bytes(p, x, WIDTH); }
  static void store_some_bytes(uint8_t* p, I x, size_t count) {
    const uint16x4_t words = vqmovun_s32(x);
    const uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(vqmovn_u16(vcombine_u16(words, words))), 0);
    memcpy(p, &bytes, count);
  }
  static F first(F x, size_t count) {
    const int32x4_t places = {0, 1, 2, 3};
    return chosen(vcltq_s32(places, vdupq_n_s32(static_cast<int>(count))), x, set(0));
  }
  static F chosen(uint32x4_t if_true, F a, F b) { return vbslq_f32(if_true, a, b); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F abs(F x) { return vabsq_f32(x); }
  // The second, if one is not a number: NEON's own maximum would not be one either.
  static F max(F a, F b) { return chosen(vcgtq_f32(a, b), a, b); }
  static F min(F a, F b) { return chosen(vcltq_f32(a, b), a, b); }
  static I add_whole(I a, I b) { return vaddq_s32(a, b); }
  static I round(F x) { return vcvtnq_s32_f32(x); }
  static F to_floats(I x) { return vcvtq_f32_s32(x); }
  // Lanes that are H apart: their sum in the first, their difference in the second.
  template <size_t H>
  static F butterfly(F x) {
    constexpr uint32_t MIDDLE_TWO = H == 1 ? ~0u : 0, LAST = ~0u;
    const uint32x4_t second = {0, MIDDLE_TWO, ~MIDDLE_TWO, LAST};
    const F other = H == 1 ? vrev64q_f32(x) : vextq_f32(x, x, 2);
    return chosen(second, sub(other, x), add(other, x));
  }
  static float sum(F x) { return vaddvq_f32(x); }
  static float largest(F x) { return vmaxvq_f32(x); }
};

}  // namespace
}  // namespace cappy
