// Softmax attention inside each pair. The tokens of all pairs lie one after another, without padding.
//
// attention_operators.cpp has the operators; attention.cpp cuts a call into tasks and shares them among the threads;
// attention_tiles.h computes a task, compiled once for each instruction set (attention_scalar.cpp, and so on).
#pragma once
#include <cstdint>

namespace cappy {

struct Error;     // operators.h, whose inline functions a file for one instruction set must not have
struct Parallel;
struct Operator;

// What distances add to the scores of disentangled attention: see DisentangledAttention in the exporter's attention_operators.py.
struct AttentionDistances {
  const float* keys;      // (heads, count, head size); null: distances add nothing
  const float* queries;   // as many
  const int64_t* rows;    // 2 * farthest + 1 numbers of them: rows[farthest + k - q] is for query q and key k
  int64_t farthest;
  int64_t count;
};

// Rotary positions: values i and half + i of a head's query or key are the coordinates of a point, which is turned by angle i
// of the token's place in its pair.
struct AttentionAngles {
  const float* cosines;  // (places, half); null: nothing is turned
  const float* sines;    // as many
  int64_t places;
  int64_t half;  // of the head's size
};

// Rows of floats: a query, a key, a value and a result are `heads * head_size` wide. Strides count floats.
struct AttentionRows {
  const float* queries;
  int64_t query_stride;
  const float* keys;  // a token's value stands behind its key
  int64_t key_stride;
  float* out;  // a row for each query
  int64_t heads;
  int64_t head_size;
  int64_t window;  // a query sees keys at most so many places before and behind it; negative: all of the pair
  float scale;     // of a query's product with a key
  AttentionDistances distances;
  AttentionAngles angles;
};

namespace {
inline int64_t width_of(const AttentionRows& rows) { return rows.heads * rows.head_size; }
}  // namespace

// Some queries of one pair, in some heads.
struct AttentionTask {
  int64_t first_key;
  int64_t keys;  // all of the pair, or those that some of the queries see
  int64_t first_query;
  int64_t queries;  // at most MOST_QUERIES
  int64_t place;      // of the first query, counted from the first key
  int64_t key_place;  // of the first key in its pair
  int64_t first_head;
  int64_t heads;
};

constexpr int64_t MOST_QUERIES = 512;    // of a task
constexpr int64_t MOST_KEYS = 512;       // held at once; a longer pair comes in blocks of keys
constexpr int64_t MOST_HELD = 512 * 64;  // floats: keys held at once times the head's size
constexpr int64_t MOST_HEAD_SIZE = 512;
constexpr int64_t MOST_ROWS = 12;   // of queries multiplied at once
constexpr int64_t MOST_PANEL = 32;  // columns multiplied at once
// Floats between two rows of scratch: 33 cache lines, so that 12 rows fall on different sets of the L1 cache.
constexpr int64_t SCRATCH_STRIDE = MOST_KEYS + 16;


constexpr float LOG2_E = 1.4426950408889634f;  // scores are kept in units of log2

// Disentangled attention prepares the distances of so many queries at once. Neighbours in the table of distances have rows
// at most 1 apart, so few rows are needed: a panel's keys need MOST_NEIGHBOURS + MOST_PANEL - 1, in blocks of MOST_ROWS.
constexpr int64_t MOST_NEIGHBOURS = 48;
constexpr int64_t MOST_DISTANCES_OF_A_KEY = MOST_NEIGHBOURS + MOST_PANEL + 2 * MOST_ROWS;
constexpr int64_t OF_QUERIES_STRIDE = MOST_KEYS + MOST_NEIGHBOURS + MOST_PANEL;  // 37 cache lines

// What one thread works in: 310 KB, which stay in a core's L2 cache. Behind them is room for distances, 540 KB, which
// only disentangled attention touches.
struct alignas(64) AttentionScratch {
  float keys[MOST_HELD];    // panels of (head size, keys of the panel)
  float values[MOST_HELD];  // panels of (keys, columns of the panel)
  float queries[MOST_ROWS * SCRATCH_STRIDE];
  float weights[MOST_ROWS * SCRATCH_STRIDE];  // scores, then their exponentials
  float context[MOST_ROWS * MOST_PANEL];
  float maximum[MOST_QUERIES];  // of a query's scores so far
  float total[MOST_QUERIES];    // of its weights so far

  float distance_keys[MOST_HELD + (MOST_NEIGHBOURS + MOST_PANEL) * MOST_HEAD_SIZE];  // panels of (head size, distances)
  float of_keys[MOST_KEYS * MOST_DISTANCES_OF_A_KEY];  // panels of (distances, keys of the panel)
  float of_queries[MOST_ROWS * OF_QUERIES_STRIDE];     // (queries, distances)
  int32_t distance_rows[MOST_KEYS + MOST_NEIGHBOURS];  // counted from the first that is packed
  int32_t first_distance[MOST_KEYS / 4];               // of each panel of of_keys
  int64_t distances;                                   // packed in distance_keys

  float turned[MOST_PANEL / 2 * MOST_HEAD_SIZE];  // keys before they are packed, where angles turn them
};

using AttentionKernel = void (*)(const AttentionRows&, const AttentionTask&, AttentionScratch&);
void attention_scalar(const AttentionRows&, const AttentionTask&, AttentionScratch&);
#if defined(__x86_64__)
void attention_avx2(const AttentionRows&, const AttentionTask&, AttentionScratch&);
void attention_avx512(const AttentionRows&, const AttentionTask&, AttentionScratch&);
#elif defined(__aarch64__)
void attention_neon(const AttentionRows&, const AttentionTask&, AttentionScratch&);
#endif

// Computes `rows.out` for `pairs` pairs, whose lengths must sum to `tokens`. Each token has a query, or each pair one.
struct AttentionInput {
  AttentionRows rows;
  int64_t tokens;
  const int64_t* lengths;
  int64_t pairs;
  bool is_first;  // one query of each pair
};
Error attend_pairs(AttentionInput input, AttentionKernel kernel, const Parallel& parallel);

extern const Operator ATTENTION, FIRST_ATTENTION, DISENTANGLED_ATTENTION, FIRST_DISENTANGLED_ATTENTION, ROTARY_ATTENTION,
    FIRST_ROTARY_ATTENTION, LOCAL_ROTARY_ATTENTION;

}  // namespace cappy
