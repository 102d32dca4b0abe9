// Gelu, x times the normal distribution's integral up to x, for vectors of floats; the error is below 8e-7. Infinity stays
// infinity. Minus infinity gives 0 but for that error, as large negative values do; in the model's functions it gives NaN.
#pragma once
#include <stddef.h>

namespace cappy {
namespace {

// The integral is 0.5 + x * P(x * x) for |x| <= 5.5, and 0 or 1 beyond. P is a least-squares fit, of 15 terms in
// u = x * x * 2 / 5.5^2 - 1. The fit may be off by 6e-8 at -5.5, where the integral is nearly 0.
template <class V>
struct PolynomialGelu {
  inline __attribute__((always_inline)) typename V::F operator()(typename V::F x) const {
    constexpr float LIMIT = 5.5f;
    constexpr float TERMS[] = {4.287615302e-04f,  -1.275264192e-03f, 1.341796946e-03f,  -1.493016607e-03f, 3.880339675e-03f,
                               -7.392245810e-03f, 1.066136360e-02f,  -1.481467020e-02f, 2.023615688e-02f,  -2.607768029e-02f,
                               3.208808601e-02f,  -3.879081830e-02f, 4.773671553e-02f,  -6.417237222e-02f, 1.285519451e-01f};
    x = V::max(V::set(-LIMIT), x);  // the second, if one is not a number
    const typename V::F near = V::min(x, V::set(LIMIT));
    typename V::F u = V::fma(V::mul(near, near), V::set(2 / (LIMIT * LIMIT)), V::set(-1));
    typename V::F sum = V::set(TERMS[0]);
#pragma GCC unroll 16
    for (size_t i = 1; i < sizeof TERMS / sizeof *TERMS; i++) sum = V::fma(sum, u, V::set(TERMS[i]));
    return V::mul(x, V::fma(near, sum, V::set(0.5f)));
  }
};

// max(x, 0) - g(|x|), where g(a) = a * (1 - the integral up to a) is a cubic on each of 31 intervals and 0 behind them
// (Chebyshev's points, a power of a in each row). For vectors that look up 32 floats in an instruction.
constexpr float GELU_TOP = 5.4f;
constexpr float GELU_TERMS[4][32] = {
    {-2.97753893e-08f, -4.41776974e-05f, -7.57585105e-04f, -3.04912683e-03f, -6.21051993e-03f, -6.24256674e-03f, 4.20491723e-03f,
     3.37788500e-02f, 8.89320523e-02f, 1.70522079e-01f, 2.72091329e-01f, 3.80694509e-01f, 4.80028242e-01f, 5.54680288e-01f,
     5.93965948e-01f, 5.94131231e-01f, 5.58445275e-01f, 4.95494008e-01f, 4.16506171e-01f, 3.32653522e-01f, 2.53038198e-01f,
     1.83681265e-01f, 1.27454206e-01f, 8.46586972e-02f, 5.38948998e-02f, 3.29186395e-02f, 1.93087794e-02f, 1.08852508e-02f,
     5.90205658e-03f, 3.07982066e-03f, 1.54757116e-03f, 0},
    {5.00010967e-01f, 5.01176596e-01f, 5.09165943e-01f, 5.24963617e-01f, 5.40763319e-01f, 5.41309893e-01f, 5.09096980e-01f,
     4.31197464e-01f, 3.04863930e-01f, 1.39663935e-01f, -4.45594452e-02f, -2.22946733e-01f, -3.72056276e-01f, -4.75278765e-01f,
     -5.25723457e-01f, -5.26167870e-01f, -4.86673117e-01f, -4.21038270e-01f, -3.43310833e-01f, -2.65214622e-01f, -1.94843337e-01f,
     -1.36515826e-01f, -9.14214849e-02f, -5.86201772e-02f, -3.60416211e-02f, -2.12734807e-02f, -1.20666474e-02f, -6.58295490e-03f,
     -3.45670292e-03f, -1.74819108e-03f, -8.52011901e-04f, 0},
    {-3.99570912e-01f, -4.10119027e-01f, -4.40485895e-01f, -4.77032602e-01f, -5.03437579e-01f, -5.04679263e-01f, -4.71534967e-01f,
     -4.03073251e-01f, -3.06543350e-01f, -1.94982812e-01f, -8.35518613e-02f, 1.41554382e-02f, 8.87878910e-02f, 1.36375815e-01f,
     1.57971084e-01f, 1.58245429e-01f, 1.43673182e-01f, 1.20858818e-01f, 9.53596607e-02f, 7.11117238e-02f, 5.03759496e-02f,
     3.40236686e-02f, 2.19673105e-02f, 1.35862650e-02f, 8.06214381e-03f, 4.59611835e-03f, 2.51990091e-03f, 1.32987648e-03f,
     6.76080992e-04f, 3.31300515e-04f, 1.56574009e-04f, 0},
    {1.15595693e-02f, 4.51896116e-02f, 8.43835101e-02f, 1.12752877e-01f, 1.27507582e-01f, 1.28268823e-01f, 1.16888218e-01f,
     9.68133286e-02f, 7.22095445e-02f, 4.70826402e-02f, 2.46052984e-02f, 6.75969012e-03f, -5.69585385e-03f, -1.30107496e-02f,
     -1.60929598e-02f, -1.61421690e-02f, -1.43496701e-02f, -1.17058828e-02f, -8.91709980e-03f, -6.40723202e-03f, -4.37032618e-03f,
     -2.84204003e-03f, -1.76748773e-03f, -1.05361792e-03f, -6.03069959e-04f, -3.31897463e-04f, -1.75819689e-04f, -8.97317805e-05f,
     -4.41531156e-05f, -2.09595582e-05f, -9.60366651e-06f, 0}};

template <class V>
struct TableGelu {
  typename V::F terms[4][2];

  inline __attribute__((always_inline)) TableGelu() {
    for (size_t i = 0; i < 4; i++) terms[i][0] = V::load(GELU_TERMS[i]), terms[i][1] = V::load(GELU_TERMS[i] + 16);
  }
  inline __attribute__((always_inline)) typename V::F operator()(typename V::F x) const {
    constexpr float WHOLE = 12582912.0f;  // 3 * 2^22: what is added to it is rounded, and is in the lowest bits
    const typename V::F a = V::min(V::abs(x), V::set(GELU_TOP));  // infinity times 0 would not be a number
    const typename V::F place = V::fma(a, V::set(31 / GELU_TOP), V::set(WHOLE));
    auto term = [&](size_t i) __attribute__((always_inline)) { return V::look_up(terms[i], place); };
    const typename V::F g = V::fma(V::fma(V::fma(term(3), a, term(2)), a, term(1)), a, term(0));
    return V::sub(V::max(V::set(0), x), g);  // the second, if one is not a number
  }
};

}  // namespace
}  // namespace cappy
