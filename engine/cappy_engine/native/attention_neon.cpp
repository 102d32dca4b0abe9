// Attention with NEON's vectors of 4 floats.
#include <arm_neon.h>

#include "attention_tiles.h"

namespace cappy {
namespace {

struct LanesNeon {
  using Vector = float32x4_t;
  static constexpr int64_t lanes = 4, rows = 9;  // 9 x 2 sums, 8 of columns, 1 of a row: 27 of 32 registers
  static constexpr bool by_fours = true;

  static Vector all(float x) { return vdupq_n_f32(x); }
  static Vector load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Vector x) { vst1q_f32(p, x); }
  static Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
  static Vector sub(Vector a, Vector b) { return vsubq_f32(a, b); }
  static Vector mul(Vector a, Vector b) { return vmulq_f32(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
  static Vector max(Vector a, Vector b) { return vmaxnmq_f32(a, b); }  // the other, if one is not a number
  static float first(Vector x) { return vgetq_lane_f32(x, 0); }
  static void largest_of_four(const Vector* x, float* found) {
    store(found, vpmaxnmq_f32(vpmaxnmq_f32(x[0], x[1]), vpmaxnmq_f32(x[2], x[3])));
  }
  static void sum_of_four(const Vector* x, float* found) {
    store(found, vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])));
  }

  // Adds four values of each of R rows times four rows of a panel: a load for four values, where a broadcast is one for each.
  template <int R, int V>
  static inline __attribute__((always_inline)) void add_fours(const float* a, const float* panel, Vector (&sums)[R][V]) {
    Vector columns[4][V];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) columns[k][v] = load(panel + (k * V + v) * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Vector x = load(a + r * SCRATCH_STRIDE);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        sums[r][v] = vfmaq_laneq_f32(sums[r][v], columns[0][v], x, 0);
        sums[r][v] = vfmaq_laneq_f32(sums[r][v], columns[1][v], x, 1);
        sums[r][v] = vfmaq_laneq_f32(sums[r][v], columns[2][v], x, 2);
        sums[r][v] = vfmaq_laneq_f32(sums[r][v], columns[3][v], x, 3);
      }
    }
  }

  static Vector exp2(Vector x) {
    const uint32x4_t is_nothing = vcltq_f32(x, all(LEAST_POWER));  // not NaN
    const Vector whole = vrndnq_f32(x);
    const Vector y = exp2_of_part<LanesNeon>(sub(x, whole));
    const int32x4_t power = vshlq_n_s32(vcvtq_s32_f32(whole), 23);  // 0 where x is NaN
    const int32x4_t found = vaddq_s32(vreinterpretq_s32_f32(y), power);
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_s32(found), is_nothing));
  }

  // Floats d to d + 3 of 4 rows: four vectors, one behind the other at `stride`.
  static void transpose_four(const float* const* from, int64_t d, float* to, int64_t stride) {
    const Vector x[4] = {load(from[0] + d), load(from[1] + d), load(from[2] + d), load(from[3] + d)};
    const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(x[0], x[1])), b = vreinterpretq_f64_f32(vtrn2q_f32(x[0], x[1]));
    const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(x[2], x[3])), e = vreinterpretq_f64_f32(vtrn2q_f32(x[2], x[3]));
    store(to, vreinterpretq_f32_f64(vtrn1q_f64(a, c)));
    store(to + stride, vreinterpretq_f32_f64(vtrn1q_f64(b, e)));
    store(to + 2 * stride, vreinterpretq_f32_f64(vtrn2q_f64(a, c)));
    store(to + 3 * stride, vreinterpretq_f32_f64(vtrn2q_f64(b, e)));
  }
};

}  // namespace

void attention_neon(const AttentionRows& rows, const AttentionTask& task, AttentionScratch& scratch) {
  attend<LanesNeon>(rows, task, scratch);
}

}  // namespace cappy
