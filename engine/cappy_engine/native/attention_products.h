// Products of a few rows with many others, which lie in panels of columns: for any width of vector.
//
// A set of instructions gives `Lanes`: a vector, its arithmetic, how many rows it multiplies at once, and the transposition
// of keys. Everything here has internal linkage: each instruction set has its own copy, compiled with its own flags.
// Nothing of the standard library is called, because the linker keeps one copy of an inline function, and might keep AVX-512's.
#pragma once
#include <cstdint>

#include "attention.h"
#include "numbers.h"

namespace cappy {
namespace {

// The numbers of rows from 1 to N, as a type: CountTo<3>::Type is Counts<1, 2, 3>.
template <int... R>
struct Counts {};
template <int N, int... R>
struct CountTo : CountTo<N - 1, N, R...> {};
template <int... R>
struct CountTo<0, R...> {
  using Type = Counts<R...>;
};

constexpr int64_t ROWS_AHEAD = 8;  // a row is brought closer while the one so many rows before it is read

template <class L>
void copy(const float* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + L::lanes <= count; i += L::lanes) L::store(to + i, L::load(from + i));
  for (; i < count; i++) to[i] = from[i];
}

// How many columns the panel has that begins at `column`: the last is narrow if one vector holds the rest.
template <class L>
int64_t panel_width(int64_t column, int64_t columns) {
  return columns - column <= L::lanes ? L::lanes : 2 * L::lanes;
}

// Turns a head's query or key, the row of the token at `place` in its pair.
template <class L>
void turn(const float* x, const AttentionAngles& angles, int64_t place, float* y) {
  const int64_t half = angles.half;
  const float *cosines = angles.cosines + place * half, *sines = angles.sines + place * half;
  int64_t i = 0;
  for (; i + L::lanes <= half; i += L::lanes) {
    const typename L::Vector first = L::load(x + i), second = L::load(x + half + i);
    const typename L::Vector cosine = L::load(cosines + i), sine = L::load(sines + i);
    L::store(y + i, L::sub(L::mul(first, cosine), L::mul(second, sine)));
    L::store(y + half + i, L::add(L::mul(second, cosine), L::mul(first, sine)));
  }
  for (; i < half; i++) {
    const float first = x[i], second = x[half + i];
    y[i] = first * cosines[i] - second * sines[i];
    y[half + i] = second * cosines[i] + first * sines[i];
  }
}

// Keys of a pair: `place` is that of the first. Room for the keys of a vector is in `turned`, if there are angles.
struct Keys {
  const float* first;
  int64_t stride;
  int64_t count;
  int64_t head_size;
  int64_t place;
  float* turned;
};

// Transposes the keys into panels of (head size, width). Behind the last key of a panel stands the last key again.
template <class L>
void pack_keys(const Keys& keys, const AttentionAngles& angles, float* panels) {
  const int64_t count = keys.count, head_size = keys.head_size;
  for (int64_t first = 0; first < count; first += L::lanes) {
    const int64_t panel = first / (2 * L::lanes) * (2 * L::lanes);
    const int64_t width = panel_width<L>(panel, count);
    float* to = panels + panel * head_size + (first - panel);
    const float* from[L::lanes];
    for (int64_t i = 0; i < L::lanes; i++) {
      const int64_t number = smaller(first + i, count - 1);
      from[i] = keys.first + number * keys.stride;
      if (!angles.cosines) continue;
      turn<L>(from[i], angles, keys.place + number, keys.turned + i * head_size);
      from[i] = keys.turned + i * head_size;
    }
    int64_t d = 0;
    for (; d + 4 <= head_size; d += 4) L::transpose_four(from, d, to + d * width, width);
    for (; d < head_size; d++)
      for (int64_t i = 0; i < L::lanes; i++) to[d * width + i] = from[i][d];
  }
}

// Copies the values into panels of (keys, width). Behind the last column of a panel stand zeros. Rows lie pages apart: each is
// read once, and those that follow are brought closer meanwhile.
template <class L>
void pack_values(const float* values, int64_t stride, int64_t count, int64_t head_size, float* panels) {
  for (int64_t i = 0; i < count; i++, values += stride) {
    for (int64_t column = 0; column < head_size; column += 2 * L::lanes) {
      const int64_t width = panel_width<L>(column, head_size);
      const int64_t filled = smaller(width, head_size - column);
      float* to = panels + column * count + i * width;
      __builtin_prefetch(values + ROWS_AHEAD * stride + column);
      if (filled == 2 * L::lanes) {
        const typename L::Vector first = L::load(values + column), second = L::load(values + column + L::lanes);
        L::store(to, first);
        L::store(to + L::lanes, second);
        continue;
      }
      copy<L>(values + column, to, filled);
      for (int64_t c = filled; c < width; c++) to[c] = 0;
    }
  }
}

// What becomes of a product: c = scale[row] * product + kept[row] * (the old c); without `kept` the old c does not count.
struct Destination {
  float* c;
  int64_t stride;
  const float* scale;
  const float* kept;
};

// Multiplies R rows of scratch, (R, depth), by a panel, (depth, V vectors). The sums stay in registers.
template <class L, int R, int V>
void multiply(const float* a, const float* panel, int64_t depth, const Destination& to) {
  typename L::Vector sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sums[r][v] = L::all(0.f);
  int64_t k = 0;
  if constexpr (L::by_fours)
    for (; k + 4 <= depth; k += 4, a += 4, panel += 4 * V * L::lanes) L::template add_fours<R, V>(a, panel, sums);
  for (; k < depth; k++, a++, panel += V * L::lanes) {
    typename L::Vector columns[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) columns[v] = L::load(panel + v * L::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const typename L::Vector x = L::all(a[r * SCRATCH_STRIDE]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sums[r][v] = L::fma(x, columns[v], sums[r][v]);
    }
  }
  const Destination d = to;  // a copy that no store can change
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const typename L::Vector scale = L::all(d.scale[r]);
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sums[r][v] = L::mul(sums[r][v], scale);
  }
  if (d.kept) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const typename L::Vector kept = L::all(d.kept[r]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sums[r][v] = L::fma(kept, L::load(d.c + r * d.stride + v * L::lanes), sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) L::store(d.c + r * d.stride + v * L::lanes, sums[r][v]);
}

// `multiply` for each number of rows: rows[0] has one row.
template <class L, int V, class RowCounts = typename CountTo<L::rows>::Type>
struct Multiply;
template <class L, int V, int... R>
struct Multiply<L, V, Counts<R...>> {
  static constexpr void (*rows[])(const float*, const float*, int64_t, const Destination&) = {multiply<L, R, V>...};
};

template <class L>
void multiply_rows(int64_t rows, int64_t width, const float* a, const float* panel, int64_t depth, const Destination& to) {
  (width == L::lanes ? Multiply<L, 1>::rows : Multiply<L, 2>::rows)[rows - 1](a, panel, depth, to);
}

}  // namespace
}  // namespace cappy
