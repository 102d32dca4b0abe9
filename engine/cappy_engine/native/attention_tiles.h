// One task of attention, for any width of vector: softmax(scale q k^T) v. attention_products.h says what `L` gives.
//
// Scores are kept in units of log2: exp2 needs no multiplication, and the scale is in the same factor.
#pragma once
#include <cstdint>

#include "attention.h"
#include "attention_distances.h"
#include "attention_products.h"

namespace cappy {
namespace {

constexpr float LOWEST = -3.402823466e+38f;
constexpr float LEAST_POWER = -100.f;  // exp2 of less is 0: weights that small would be slow, and count for nothing
// 2^x on [-1/2, 1/2], 1 + x * (...): relative error below 1e-7.
constexpr float EXP2_1 = 0x1.62e42ap-1f, EXP2_2 = 0x1.ebf9bcp-3f, EXP2_3 = 0x1.c6b752p-5f, EXP2_4 = 0x1.3cea88p-7f,
                EXP2_5 = 0x1.5bba14p-10f;

// exp2 of -1/2 to 1/2.
template <class L>
inline __attribute__((always_inline)) typename L::Vector exp2_of_part(typename L::Vector x) {
  typename L::Vector y = L::fma(x, L::all(EXP2_5), L::all(EXP2_4));
  y = L::fma(y, x, L::all(EXP2_3));
  y = L::fma(y, x, L::all(EXP2_2));
  y = L::fma(y, x, L::all(EXP2_1));
  return L::fma(y, x, L::all(1.f));
}

// Turns the scores of R queries into weights, exp2(score - maximum), and gives the maxima and the sums of the weights.
// Rows go together, because each waits for its maximum. Behind a row's `count` scores is room for a whole vector.
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
  int64_t pair_place;  // of the first query in its pair
  int64_t place;       // of the first query, counted from the block's first key; may be negative
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

// `near` are the queries whose distances are prepared, and `neighbour` is the number of the block's first among them.
template <class L>
void attend_block(const AttentionRows& rows, const QueryBlock& block, const Neighbours& near, int64_t neighbour,
                  const float* queries, float* out, AttentionScratch& s) {
  float scale[MOST_ROWS], kept[MOST_ROWS];
  for (int64_t r = 0; r < block.queries; r++) {
    const float* query = queries + r * rows.query_stride;
    if (rows.angles.cosines)
      turn<L>(query, rows.angles, block.pair_place + r, s.queries + r * SCRATCH_STRIDE);
    else
      copy<L>(query, s.queries + r * SCRATCH_STRIDE, rows.head_size);
    scale[r] = LOG2_E * rows.scale;
  }
  for (int64_t key = 0; key < block.keys; key += 2 * L::lanes)
    multiply_rows<L>(block.queries, panel_width<L>(key, block.keys), s.queries, s.keys + key * rows.head_size,
                     rows.head_size, {s.weights + key, SCRATCH_STRIDE, scale, nullptr});
  if (rows.distances.keys) add_distances<L>(rows, near, neighbour, block.queries, s);
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

// Brings the next head's part of some rows into the second cache, while this head is computed. Rows lie pages apart, where no
// processor looks ahead by itself.
inline void bring_closer(const float* part, int64_t stride, int64_t first, int64_t end, int64_t width) {
  for (int64_t r = first; r < end; r++)
    for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(part + r * stride + i, 0, 2);
}

template <class L>
void attend_head(const AttentionRows& rows, const AttentionTask& task, int64_t head, AttentionScratch& s) {
  const bool has_next = head + 1 < task.first_head + task.heads && task.keys <= MOST_KEYS;
  const float* keys = rows.keys + task.first_key * rows.key_stride + head * rows.head_size;
  const float* queries = rows.queries + task.first_query * rows.query_stride + head * rows.head_size;
  float* out = rows.out + task.first_query * width_of(rows) + head * rows.head_size;
  const int64_t columns = divided_up(rows.head_size, L::lanes) * L::lanes;
  const int64_t most_keys = smaller(MOST_KEYS, MOST_HELD / columns / MOST_PANEL * MOST_PANEL);
  const int64_t blocks = divided_up(task.queries, L::rows);
  for (int64_t q = 0; q < task.queries; q++) s.maximum[q] = LOWEST;
  for (int64_t key = 0; key < task.keys; key += most_keys, keys += most_keys * rows.key_stride) {
    const int64_t count = smaller(most_keys, task.keys - key);
    pack_keys<L>({keys, rows.key_stride, count, rows.head_size, task.key_place + key, s.turned}, rows.angles, s.keys);
    pack_values<L>(keys + width_of(rows), rows.key_stride, count, rows.head_size, s.values);
    Neighbours near = {0, 0, count};
    int64_t first_near = 0;
    for (int64_t b = 0; b < blocks; b++) {  // of nearly equal size, because a block of few rows wastes the multipliers
      const int64_t first = b * task.queries / blocks, block = (b + 1) * task.queries / blocks - first;
      const int64_t place = task.place + first - key;
      if (rows.distances.keys && first == first_near + near.queries) {
        const int64_t end = smaller(b + MOST_NEIGHBOURS / L::rows, blocks) * task.queries / blocks;
        first_near = first;
        near = {end - first, place, count};
        prepare_distances<L>(rows, near, head, s);
      }
      if (has_next) {
        const int64_t width = rows.head_size, near_key = first * count / task.queries, end = (first + block) * count / task.queries;
        bring_closer(queries + width, rows.query_stride, first, first + block, width);
        bring_closer(keys + width, rows.key_stride, near_key, end, width);
        bring_closer(keys + width + width_of(rows), rows.key_stride, near_key, end, width);
      }
      const bool is_last = key + count == task.keys;
      const int64_t pair_place = task.key_place + task.place + first;
      attend_block<L>(rows, {first, block, count, key == 0, is_last, pair_place, place}, near, first - first_near,
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
