// One task of attention, for any width of vector: softmax(q k^T / sqrt(head size)) v.
//
// A set of instructions gives `Lanes`: a vector, its arithmetic, how many rows it multiplies at once, and the transposition
// of keys. Everything here has internal linkage: each instruction set has its own copy, compiled with its own flags.
// Nothing of the standard library is called, for the linker keeps one copy of an inline function, and might keep AVX-512's.
//
// Scores are kept in units of log2: exp2 needs no multiplication, and 1 / sqrt(head size) is in the same factor.
#pragma once
#include <cstdint>

#include "attention.h"
#include "numbers.h"

namespace cappy {
namespace {

constexpr float LOWEST = -3.402823466e+38f;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LEAST_POWER = -100.f;  // exp2 of less is 0: weights that small would be slow, and count for nothing
// 2^x on [-1/2, 1/2], 1 + x * (...): relative error below 1e-7.
constexpr float EXP2_1 = 0x1.62e42ap-1f, EXP2_2 = 0x1.ebf9bcp-3f, EXP2_3 = 0x1.c6b752p-5f, EXP2_4 = 0x1.3cea88p-7f,
                EXP2_5 = 0x1.5bba14p-10f;

// The numbers of rows from 1 to N, as a type: CountTo<3>::Type is Counts<1, 2, 3>.
template <int... R>
struct Counts {};
template <int N, int... R>
struct CountTo : CountTo<N - 1, N, R...> {};
template <int... R>
struct CountTo<0, R...> {
  using Type = Counts<R...>;
};

// exp2 of -1/2 to 1/2.
template <class L>
inline __attribute__((always_inline)) typename L::Vector exp2_of_part(typename L::Vector x) {
  typename L::Vector y = L::fma(x, L::all(EXP2_5), L::all(EXP2_4));
  y = L::fma(y, x, L::all(EXP2_3));
  y = L::fma(y, x, L::all(EXP2_2));
  y = L::fma(y, x, L::all(EXP2_1));
  return L::fma(y, x, L::all(1.f));
}

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

// Transposes the keys into panels of (head size, width). Behind the last key of a panel stands the last key again.
template <class L>
void pack_keys(const float* keys, int64_t stride, int64_t count, int64_t head_size, float* panels) {
  for (int64_t first = 0; first < count; first += L::lanes) {
    const int64_t panel = first / (2 * L::lanes) * (2 * L::lanes);
    const int64_t width = panel_width<L>(panel, count);
    float* to = panels + panel * head_size + (first - panel);
    const float* from[L::lanes];
    for (int64_t i = 0; i < L::lanes; i++) from[i] = keys + smaller(first + i, count - 1) * stride;
    int64_t d = 0;
    for (; d + 4 <= head_size; d += 4) L::transpose_four(from, d, to + d * width, width);
    for (; d < head_size; d++)
      for (int64_t i = 0; i < L::lanes; i++) to[d * width + i] = from[i][d];
  }
}

// Copies the values into panels of (keys, width). Behind the last column of a panel stand zeros.
template <class L>
void pack_values(const float* values, int64_t stride, int64_t count, int64_t head_size, float* panels) {
  for (int64_t column = 0; column < head_size; column += 2 * L::lanes) {
    const int64_t width = panel_width<L>(column, head_size);
    const int64_t filled = smaller(width, head_size - column);
    float* to = panels + column * count;
    for (int64_t i = 0; i < count; i++, to += width) {
      copy<L>(values + i * stride + column, to, filled);
      for (int64_t c = filled; c < width; c++) to[c] = 0;
    }
  }
}

// What becomes of a product: c = scale[row] * product, and kept[row] * c is added if `kept` is given.
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

// Turns the scores of R queries into weights, exp2(score - maximum), and gives the maxima and the sums of the weights.
// Rows go together, for each waits for its maximum. Behind a row's `count` scores is room for a whole vector.
template <class L, int R>
void weigh(float* scores, int64_t count, float* maxima, float* totals) {
  const int64_t whole = divided_up(count, L::lanes) * L::lanes;
  typename L::Vector tops[4], sums[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++) {
    for (int64_t i = count; r < R && i < whole; i++) scores[r * SCRATCH_STRIDE + i] = -__builtin_inff();
    tops[r] = L::all(r < R ? maxima[r] : LOWEST);
    sums[r] = L::all(0.f);
  }
  for (int64_t i = 0; i < whole; i += L::lanes)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) tops[r] = L::max(L::load(scores + r * SCRATCH_STRIDE + i), tops[r]);
  float found[4];
  L::largest_of_four(tops, found);
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) tops[r] = L::all(maxima[r] = found[r]);
  for (int64_t i = 0; i < whole; i += L::lanes) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      float* place = scores + r * SCRATCH_STRIDE + i;
      const typename L::Vector weights = L::exp2(L::sub(L::load(place), tops[r]));
      L::store(place, weights);
      sums[r] = L::add(sums[r], weights);
    }
  }
  L::sum_of_four(sums, found);
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) totals[r] = found[r];
}

template <class L>
void weigh_rows(int64_t rows, float* scores, int64_t count, float* maxima, float* totals) {
  constexpr void (*by_rows[])(float*, int64_t, float*, float*) = {weigh<L, 1>, weigh<L, 2>, weigh<L, 3>, weigh<L, 4>};
  for (int64_t r = 0; r < rows; r += 4)
    by_rows[smaller(int64_t{4}, rows - r) - 1](scores + r * SCRATCH_STRIDE, count, maxima + r, totals + r);
}

// A block of queries against a block of keys, which are packed.
struct QueryBlock {
  int64_t first;  // counted from the task's first
  int64_t queries;
  int64_t keys;
  bool is_first;  // block of keys
  bool is_last;
  int64_t place;  // of the first query, counted from the first key
};

// Scores of keys outside of the queries' windows become those of no weight.
inline void hide_far_keys(const QueryBlock& block, int64_t window, float* scores) {
  for (int64_t r = 0; r < block.queries; r++, scores += SCRATCH_STRIDE) {
    const int64_t before = smaller(block.place + r - window, block.keys);
    for (int64_t k = 0; k < before; k++) scores[k] = -__builtin_inff();
    const int64_t behind = block.place + r + window + 1;
    for (int64_t k = behind < 0 ? 0 : behind; k < block.keys; k++) scores[k] = -__builtin_inff();
  }
}

// Multiplies weights by values into `out`, scaled as the sums of weights ask.
template <class L>
void add_values(const AttentionRows& rows, const QueryBlock& block, float* out, const Destination& scales, AttentionScratch& s) {
  const int64_t hidden = width_of(rows);
  for (int64_t column = 0; column < rows.head_size; column += 2 * L::lanes) {
    const int64_t width = panel_width<L>(column, rows.head_size);
    const int64_t filled = smaller(width, rows.head_size - column);
    const float* panel = s.values + column * block.keys;
    if (filled == width) {
      multiply_rows<L>(block.queries, width, s.weights, panel, block.keys,
                       {out + column, hidden, scales.scale, scales.kept});
      continue;
    }
    if (scales.kept)
      for (int64_t r = 0; r < block.queries; r++) copy<L>(out + r * hidden + column, s.context + r * width, filled);
    multiply_rows<L>(block.queries, width, s.weights, panel, block.keys, {s.context, width, scales.scale, scales.kept});
    for (int64_t r = 0; r < block.queries; r++) copy<L>(s.context + r * width, out + r * hidden + column, filled);
  }
}

template <class L>
void attend_block(const AttentionRows& rows, const QueryBlock& block, const float* queries, float* out, AttentionScratch& s) {
  float scale[MOST_ROWS], kept[MOST_ROWS];
  for (int64_t r = 0; r < block.queries; r++) {
    copy<L>(queries + r * rows.query_stride, s.queries + r * SCRATCH_STRIDE, rows.head_size);
    scale[r] = LOG2_E / __builtin_sqrtf(static_cast<float>(rows.head_size));
  }
  for (int64_t key = 0; key < block.keys; key += 2 * L::lanes)
    multiply_rows<L>(block.queries, panel_width<L>(key, block.keys), s.queries, s.keys + key * rows.head_size,
                     rows.head_size, {s.weights + key, SCRATCH_STRIDE, scale, nullptr});
  if (rows.window >= 0) hide_far_keys(block, rows.window, s.weights);
  float* maxima = s.maximum + block.first;
  float* totals = s.total + block.first;
  float before[MOST_ROWS], sums[MOST_ROWS];
  for (int64_t r = 0; r < block.queries; r++) before[r] = maxima[r];
  weigh_rows<L>(block.queries, s.weights, block.keys, maxima, sums);
  for (int64_t r = 0; r < block.queries; r++) {
    kept[r] = block.is_first ? 0.f : L::first(L::exp2(L::all(before[r] - maxima[r])));
    totals[r] = block.is_first ? sums[r] : totals[r] * kept[r] + sums[r];
    scale[r] = block.is_last ? 1.f / totals[r] : 1.f;
    kept[r] *= scale[r];
  }
  add_values<L>(rows, block, out, {nullptr, 0, scale, block.is_first ? nullptr : kept}, s);
}

template <class L>
void attend_head(const AttentionRows& rows, const AttentionTask& task, int64_t head, AttentionScratch& s) {
  const float* keys = rows.keys + task.first_key * rows.key_stride + head * rows.head_size;
  const float* queries = rows.queries + task.first_query * rows.query_stride + head * rows.head_size;
  float* out = rows.out + task.first_query * width_of(rows) + head * rows.head_size;
  const int64_t columns = divided_up(rows.head_size, L::lanes) * L::lanes;
  const int64_t most_keys = smaller(MOST_KEYS, MOST_HELD / columns / MOST_PANEL * MOST_PANEL);
  const int64_t blocks = divided_up(task.queries, L::rows);
  for (int64_t q = 0; q < task.queries; q++) s.maximum[q] = LOWEST;
  for (int64_t key = 0; key < task.keys; key += most_keys, keys += most_keys * rows.key_stride) {
    const int64_t count = smaller(most_keys, task.keys - key);
    pack_keys<L>(keys, rows.key_stride, count, rows.head_size, s.keys);
    pack_values<L>(keys + width_of(rows), rows.key_stride, count, rows.head_size, s.values);
    for (int64_t b = 0; b < blocks; b++) {  // of nearly equal size, for a block of few rows wastes the multipliers
      const int64_t first = b * task.queries / blocks, block = (b + 1) * task.queries / blocks - first;
      const int64_t place = task.first_query + first - task.first_key - key;
      attend_block<L>(rows, {first, block, count, key == 0, key + count == task.keys, place},
                      queries + first * rows.query_stride, out + first * width_of(rows), s);
    }
  }
}

template <class L>
void attend(const AttentionRows& rows, const AttentionTask& task, AttentionScratch& s) {
  static_assert(L::rows <= MOST_ROWS && 2 * L::lanes <= MOST_PANEL, "scratch has room for them");
  for (int64_t head = task.first_head; head < task.first_head + task.heads; head++) attend_head<L>(rows, task, head, s);
}

}  // namespace
}  // namespace cappy
