// Attention with vectors of 4 floats, in the compiler's own vectors: SSE2 on every x86-64, NEON on arm64.
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "attention_tiles.h"

namespace cappy {
namespace {

struct Lanes4 {
  typedef float Vector __attribute__((vector_size(16)));
  typedef int32_t Whole __attribute__((vector_size(16)));
  static constexpr int64_t lanes = 4, rows = 6;
  static constexpr bool by_fours = false;

  static Vector all(float x) { return Vector{x, x, x, x}; }
  static Vector load(const float* p) {
    Vector x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, Vector x) { __builtin_memcpy(p, &x, sizeof x); }
  static Vector add(Vector a, Vector b) { return a + b; }
  static Vector sub(Vector a, Vector b) { return a - b; }
  static Vector mul(Vector a, Vector b) { return a * b; }
#if defined(__aarch64__)
  static Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
#else
  static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
#endif
  static Vector max(Vector a, Vector b) { return chosen(a > b, a, b); }
  static float first(Vector x) { return x[0]; }
  static void largest_of_four(const Vector* x, float* found) {
    for (int i = 0; i < 4; i++) found[i] = larger(larger(x[i][0], x[i][2]), larger(x[i][1], x[i][3]));
  }
  static void sum_of_four(const Vector* x, float* found) {
    for (int i = 0; i < 4; i++) found[i] = (x[i][0] + x[i][2]) + (x[i][1] + x[i][3]);
  }
  static Vector chosen(Whole if_true, Vector a, Vector b) {
    return reinterpret_cast<Vector>((if_true & reinterpret_cast<Whole>(a)) | (~if_true & reinterpret_cast<Whole>(b)));
  }

  static Vector exp2(Vector x) {
    const Vector to_whole = all(0x1.8p23f);  // adding it leaves a whole number in the lowest bits
    const Vector moved = x + to_whole;
    const Vector f = x - (moved - to_whole);
    const Vector y = exp2_of_part<Lanes4>(f);
    typedef uint32_t Bits __attribute__((vector_size(16)));
    const Bits power = reinterpret_cast<Bits>(moved) << 23;
    const Vector found = reinterpret_cast<Vector>(reinterpret_cast<Bits>(y) + power);
    return chosen(x != x, x, chosen(x < all(LEAST_POWER), all(0.f), found));
  }

  // Floats d to d + 3 of 4 rows: four vectors, one behind the other at `stride`.
  static void transpose_four(const float* const* from, int64_t d, float* to, int64_t stride) {
    for (int i = 0; i < 4; i++)
      store(to + i * stride, Vector{from[0][d + i], from[1][d + i], from[2][d + i], from[3][d + i]});
  }
};

}  // namespace

void attention_scalar(const AttentionRows& rows, const AttentionTask& task, AttentionScratch& scratch) {
  attend<Lanes4>(rows, task, scratch);
}

}  // namespace cappy
