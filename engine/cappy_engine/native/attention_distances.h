// Disentangled attention (DeBERTa): what the distance of a key from its query adds to their score.
//
// That is scale * (query * keys[d] + key * queries[d]), where row d is the distance's. Both are products of matrices, because
// near queries have near rows: MOST_NEIGHBOURS queries and some panel of keys need few of them.
#pragma once
#include <cstdint>

#include "attention.h"
#include "attention_products.h"
#include "numbers.h"

namespace cappy {
namespace {

// Rows of distances, from the first to the last.
struct DistanceRange {
  int64_t first;
  int64_t last;
};

inline DistanceRange range_of(const int32_t* rows, int64_t count) {
  int32_t first = rows[0], last = rows[0];
  for (int64_t i = 1; i < count; i++) {
    first = smaller(first, rows[i]);
    last = larger(last, rows[i]);
  }
  return {first, last};
}

// The rows of a query's distances to all keys: of query r of `queries`, the one to key k is at [k].
inline const int32_t* rows_of_query(const AttentionScratch& s, int64_t queries, int64_t r) {
  return s.distance_rows + (queries - 1 - r);
}

// Queries of a task whose distances scratch holds, and the keys that they are for.
struct Neighbours {
  int64_t queries;  // at most MOST_NEIGHBOURS
  int64_t place;    // of the first query, counted from the first key
  int64_t keys;     // which are packed
};

// Multiplies all keys by the queries of the distances that they need, into a panel of (distances, keys) for each panel.
template <class L>
void multiply_keys(const AttentionRows& rows, const Neighbours& near, const float* queries, int64_t distances, AttentionScratch& s) {
  float scale[MOST_ROWS];
  for (int64_t r = 0; r < L::rows; r++) scale[r] = LOG2_E * rows.scale;
  DistanceRange ranges[MOST_KEYS / (2 * L::lanes)];
  for (int64_t key = 0, p = 0; key < near.keys; key += 2 * L::lanes, p++) {
    const int64_t count = smaller(2 * L::lanes, near.keys - key);
    ranges[p] = range_of(s.distance_rows + key, near.queries - 1 + count);
    s.first_distance[p] = static_cast<int32_t>(ranges[p].first / L::rows * L::rows);
  }
  for (int64_t first = 0; first < distances; first += L::rows) {
    const int64_t count = smaller<int64_t>(L::rows, distances - first);
    for (int64_t r = 0; r < count; r++)
      copy<L>(queries + (first + r) * rows.head_size, s.queries + r * SCRATCH_STRIDE, rows.head_size);
    for (int64_t key = 0, p = 0; key < near.keys; key += 2 * L::lanes, p++) {
      if (first + count <= ranges[p].first || first > ranges[p].last) continue;
      const int64_t width = panel_width<L>(key, near.keys);
      float* to = s.of_keys + key * MOST_DISTANCES_OF_A_KEY + (first - s.first_distance[p]) * width;
      multiply_rows<L>(count, width, s.queries, s.keys + key * rows.head_size, rows.head_size, {to, width, scale, nullptr});
    }
  }
}

// Prepares scratch for `add_distances` of these queries; their keys are packed. It takes the place of s.queries.
template <class L>
void prepare_distances(const AttentionRows& rows, const Neighbours& near, int64_t head, AttentionScratch& s) {
  const AttentionDistances& given = rows.distances;
  const int64_t count = near.keys + near.queries - 1;
  const int64_t* from = given.rows + given.farthest - near.place - (near.queries - 1);
  for (int64_t i = 0; i < count; i++) s.distance_rows[i] = static_cast<int32_t>(from[i]);
  const DistanceRange range = range_of(s.distance_rows, count);
  for (int64_t i = 0; i < count; i++) s.distance_rows[i] -= static_cast<int32_t>(range.first);
  const int64_t begin = (head * given.count + range.first) * rows.head_size, distances = range.last - range.first + 1;
  pack_keys<L>({given.keys + begin, rows.head_size, distances, rows.head_size, 0, nullptr}, {}, s.distance_keys);
  s.distances = distances;
  multiply_keys<L>(rows, near, given.queries + begin, distances, s);
}

// Adds to the scores of `count` queries, from number `first` of the prepared ones on; s.queries holds them.
template <class L>
void add_distances(const AttentionRows& rows, const Neighbours& near, int64_t first, int64_t count, AttentionScratch& s) {
  float scale[MOST_ROWS];
  for (int64_t r = 0; r < count; r++) scale[r] = LOG2_E * rows.scale;
  const DistanceRange range = range_of(rows_of_query(s, near.queries, first + count - 1), near.keys + count - 1);
  for (int64_t d = range.first / (2 * L::lanes) * (2 * L::lanes); d <= range.last; d += 2 * L::lanes)
    multiply_rows<L>(count, panel_width<L>(d, s.distances), s.queries, s.distance_keys + d * rows.head_size, rows.head_size,
                     {s.of_queries + d, OF_QUERIES_STRIDE, scale, nullptr});
  for (int64_t r = 0; r < count; r++) {
    const int32_t* places = rows_of_query(s, near.queries, first + r);
    const float* of_query = s.of_queries + r * OF_QUERIES_STRIDE;
    float* scores = s.weights + r * SCRATCH_STRIDE;
    for (int64_t key = 0, p = 0; key < near.keys; key += 2 * L::lanes, p++) {
      const int64_t width = panel_width<L>(key, near.keys), end = smaller(key + width, near.keys);
      const float* of_keys = s.of_keys + key * MOST_DISTANCES_OF_A_KEY;
      const int64_t skipped = s.first_distance[p] * width + key;
      for (int64_t k = key; k < end; k++) scores[k] += of_query[places[k]] + of_keys[places[k] * width + k - skipped];
    }
  }
}

}  // namespace
}  // namespace cappy
