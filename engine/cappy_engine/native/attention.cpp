// Plans the tasks of a call of attention, and shares them among the session's threads.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdlib>

#include "kernels.h"
#include "numbers.h"
#include "operators.h"
#include "scratch.h"

namespace cappy {
namespace {

constexpr int64_t TASKS_OF_A_THREAD = 4;  // threads end together, though one was late
// A task has at least so many queries: its keys and values are arranged anew, which costs as much as 7 queries.
constexpr int64_t FEWEST_QUERIES = 48;
// Queries with a window come in blocks of so many, counted from the pair's first: a pair's sums are the same in any company.
constexpr int64_t LOCAL_QUERIES = 64;

struct Pair {
  int64_t number;
  int64_t first_key;
  int64_t length;
  int64_t groups;  // of heads
  int64_t blocks;  // of queries
  size_t first_task;

  int64_t work_of_a_head(int64_t queries) const { return length * (queries + 64); }  // products of a query and a key
};

// Cuts a call into tasks of about equal work: several heads of a short pair, some queries of a long one.
class Plan {
 public:
  Plan(const AttentionInput& input, size_t threads) : input_(input) {
    pairs_ = static_cast<Pair*>(malloc(sizeof(Pair) * static_cast<size_t>(input.pairs + 1)));
    if (!pairs_) return;
    const int64_t heads = input.rows.heads;
    int64_t work = 0;
    for (int64_t i = 0, key = 0; i < input.pairs; key += input.lengths[i++])
      if (input.lengths[i] > 0) {
        pairs_[count_] = {i, key, input.lengths[i], 0, 0, 0};
        work += work_of_a_head(pairs_[count_]) * heads;
        count_++;
      }
    std::sort(pairs_, pairs_ + count_, [](const Pair& a, const Pair& b) {  // what is short fills the gaps at the end
      return a.length != b.length ? a.length > b.length : a.number < b.number;
    });
    const int64_t wanted = divided_up(work, TASKS_OF_A_THREAD * static_cast<int64_t>(threads));  // of a task
    for (Pair* pair = pairs_; pair < pairs_ + count_; pair++) {
      const int64_t head = work_of_a_head(*pair);
      const int64_t most_blocks = std::max<int64_t>(1, queries(*pair) / FEWEST_QUERIES);
      pair->groups = divided_up(heads, std::max<int64_t>(1, wanted / head));
      pair->blocks = std::max(divided_up(queries(*pair), MOST_QUERIES), std::min(most_blocks, divided_up(head, wanted)));
      if (is_local(*pair)) pair->blocks = divided_up(pair->length, LOCAL_QUERIES);
      pair->first_task = tasks_;
      tasks_ += static_cast<size_t>(pair->groups * pair->blocks);
    }
  }
  ~Plan() { free(pairs_); }
  Plan(const Plan&) = delete;

  bool is_ready() const { return pairs_ != nullptr; }  // false if memory is short
  size_t tasks() const { return tasks_; }
  AttentionTask task(size_t number) const {
    const Pair& pair = *(std::upper_bound(pairs_, pairs_ + count_, number,
                                          [](size_t task, const Pair& each) { return task < each.first_task; }) - 1);
    const int64_t place = static_cast<int64_t>(number - pair.first_task), heads = input_.rows.heads;
    const int64_t group = place / pair.blocks, block = place % pair.blocks;
    const int64_t head = group * heads / pair.groups, more_heads = (group + 1) * heads / pair.groups - head;
    if (is_local(pair)) {
      const int64_t begin = block * LOCAL_QUERIES, end = std::min(begin + LOCAL_QUERIES, pair.length);
      const int64_t key = std::max<int64_t>(0, begin - input_.rows.window);
      const int64_t keys = std::min(end + input_.rows.window, pair.length) - key;
      return {pair.first_key + key, keys, pair.first_key + begin, end - begin, begin - key, key, head, more_heads};
    }
    const int64_t query = block * queries(pair) / pair.blocks;
    return {pair.first_key,
            pair.length,
            (input_.is_first ? pair.number : pair.first_key) + query,
            (block + 1) * queries(pair) / pair.blocks - query,
            query,
            0,
            head,
            more_heads};
  }

 private:
  int64_t queries(const Pair& pair) const { return input_.is_first ? 1 : pair.length; }
  bool is_local(const Pair& pair) const {  // false where the window holds the whole pair
    return input_.rows.window >= 0 && input_.rows.window < pair.length - 1;
  }
  int64_t work_of_a_head(const Pair& pair) const {
    if (!is_local(pair)) return pair.work_of_a_head(queries(pair));
    return pair.length * (2 * input_.rows.window + 2 * LOCAL_QUERIES);
  }

  const AttentionInput& input_;
  Pair* pairs_;
  int64_t count_ = 0;
  size_t tasks_ = 0;
};

float product(const float* a, const float* b, int64_t count) {
  float sum = 0;
  for (int64_t i = 0; i < count; i++) sum += a[i] * b[i];
  return sum;
}

// Value i of a head's query or key, turned if there are angles.
float turned(const AttentionAngles& angles, int64_t place, const float* x, int64_t i) {
  if (!angles.cosines) return x[i];
  const int64_t half = angles.half, angle = place * half + i % half;
  return i < half ? x[i] * angles.cosines[angle] - x[half + i] * angles.sines[angle]
                  : x[i] * angles.cosines[angle] + x[i - half] * angles.sines[angle];
}

// For heads of a size, and tables of distances, that no model has: right, and slow.
void attend_odd_heads(const AttentionRows& rows, const AttentionTask& task, AttentionScratch&) {
  const int64_t size = rows.head_size;
  const AttentionDistances& distances = rows.distances;
  for (int64_t head = task.first_head; head < task.first_head + task.heads; head++)
    for (int64_t q = 0; q < task.queries; q++) {
      const float* query = rows.queries + (task.first_query + q) * rows.query_stride + head * size;
      float* out = rows.out + (task.first_query + q) * width_of(rows) + head * size;
      float maximum = -FLT_MAX, total = 0;
      std::fill(out, out + size, 0.f);
      for (int64_t k = 0; k < task.keys; k++) {
        const int64_t distance = k - (task.place + q);
        if (rows.window >= 0 && std::abs(distance) > rows.window) continue;
        const float* key = rows.keys + (task.first_key + k) * rows.key_stride + head * size;
        float score = 0;
        for (int64_t i = 0; i < size; i++)
          score += turned(rows.angles, task.key_place + task.place + q, query, i) * turned(rows.angles, task.key_place + k, key, i);
        if (distances.keys) {
          const int64_t row = (head * distances.count + distances.rows[distances.farthest + distance]) * size;
          score += product(query, distances.keys + row, size) + product(key, distances.queries + row, size);
        }
        score *= rows.scale;
        const float top = std::max(maximum, score), kept = expf(maximum - top), weight = expf(score - top);
        for (int64_t i = 0; i < size; i++) out[i] = out[i] * kept + weight * key[width_of(rows) + i];
        total = total * kept + weight;
        maximum = top;
      }
      for (int64_t i = 0; i < size; i++) out[i] /= total;
    }
}

Error check_lengths(const AttentionInput& input) {
  int64_t left = input.tokens;
  for (int64_t i = 0; i < input.pairs; left -= input.lengths[i++])
    if (input.is_first && input.lengths[i] == 0)
      return error("pair %lld has no tokens, so it has no first one", static_cast<long long>(i));
    else if (input.lengths[i] < 0 || input.lengths[i] > left)
      return error("pair %lld has a length of %lld, and %lld tokens are left", static_cast<long long>(i),
                   static_cast<long long>(input.lengths[i]), static_cast<long long>(left));
  return left == 0 ? Error{} : error("the lengths leave %lld of %lld tokens", static_cast<long long>(left),
                                     static_cast<long long>(input.tokens));
}

Error check_distances(const AttentionInput& input) {
  const AttentionDistances& distances = input.rows.distances;
  for (int64_t i = 0; i < input.pairs; i++)
    if (input.lengths[i] - 1 > distances.farthest)
      return error("pair %lld has %lld tokens, and there are rows for distances of at most %lld", static_cast<long long>(i),
                   static_cast<long long>(input.lengths[i]), static_cast<long long>(distances.farthest));
  for (int64_t i = 0; i < 2 * distances.farthest + 1; i++)
    if (distances.rows[i] < 0 || distances.rows[i] >= distances.count)
      return error("a distance has row %lld of %lld", static_cast<long long>(distances.rows[i]),
                   static_cast<long long>(distances.count));
  return {};
}

Error check_angles(const AttentionInput& input) {
  for (int64_t i = 0; i < input.pairs; i++)
    if (input.lengths[i] > input.rows.angles.places)
      return error("pair %lld has %lld tokens, and there are angles for %lld", static_cast<long long>(i),
                   static_cast<long long>(input.lengths[i]), static_cast<long long>(input.rows.angles.places));
  return {};
}

// Whether neighbours have rows that are at most 1 apart: then `prepare_distances` has room for them.
bool is_smooth(const AttentionDistances& distances) {
  for (int64_t i = 0; i < 2 * distances.farthest; i++)
    if (std::abs(distances.rows[i + 1] - distances.rows[i]) > 1) return false;
  return true;
}

}  // namespace

Error attend_pairs(AttentionInput input, AttentionKernel kernel, const Parallel& parallel) {
  input.rows.window = smaller(input.rows.window, input.tokens);  // means the same, and sums with it cannot overflow
  if (Error found = check_lengths(input)) return found;
  const AttentionDistances& distances = input.rows.distances;
  if (distances.keys)
    if (Error found = check_distances(input)) return found;
  if (input.rows.angles.cosines)
    if (Error found = check_angles(input)) return found;
  if (input.rows.head_size > MOST_HEAD_SIZE || (distances.keys && !is_smooth(distances))) kernel = attend_odd_heads;
  const Plan plan(input, parallel.threads);
  if (!plan.is_ready()) return error("no memory for a plan of %lld pairs", static_cast<long long>(input.pairs));
  if (plan.tasks() == 0) return {};
  std::atomic<size_t> next{0};
  std::atomic<bool> is_short{false};
  parallel.each(plan.tasks(), [&](size_t) {  // in the plan's order, whatever order the threads are called in
    const size_t number = next.fetch_add(1, std::memory_order_relaxed);
    if (uint8_t* scratch = take_scratch(sizeof(AttentionScratch)))
      kernel(input.rows, plan.task(number), *reinterpret_cast<AttentionScratch*>(scratch));
    else
      is_short = true;
  });
  return is_short ? error("no memory for %zu bytes of scratch", sizeof(AttentionScratch)) : Error{};
}

}  // namespace cappy
