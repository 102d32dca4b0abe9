// The operators Attention and FirstAttention: plan a call's tasks, and share them among the session's threads.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <new>

#include "cpu_features.h"
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
  explicit Plan(const AttentionInput& input) : input_(input) {
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
    const int64_t wanted = divided_up(work, TASKS_OF_A_THREAD * static_cast<int64_t>(processors()));  // of a task
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
      return {pair.first_key + key, keys, pair.first_key + begin, end - begin, head, more_heads};
    }
    const int64_t query = block * queries(pair) / pair.blocks;
    return {pair.first_key,
            pair.length,
            (input_.is_first ? pair.number : pair.first_key) + query,
            (block + 1) * queries(pair) / pair.blocks - query,
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

// For heads of a size that no model has: right, and slow.
void attend_large_heads(const AttentionRows& rows, const AttentionTask& task, AttentionScratch&) {
  const int64_t size = rows.head_size;
  for (int64_t head = task.first_head; head < task.first_head + task.heads; head++)
    for (int64_t q = task.first_query; q < task.first_query + task.queries; q++) {
      const float* query = rows.queries + q * rows.query_stride + head * size;
      float* out = rows.out + q * width_of(rows) + head * size;
      float maximum = -FLT_MAX, total = 0;
      std::fill(out, out + size, 0.f);
      for (int64_t k = task.first_key; k < task.first_key + task.keys; k++) {
        if (rows.window >= 0 && std::abs(k - q) > rows.window) continue;
        const float* key = rows.keys + k * rows.key_stride + head * size;
        float score = 0;
        for (int64_t i = 0; i < size; i++) score += query[i] * key[i];
        score /= sqrtf(static_cast<float>(size));
        const float top = std::max(maximum, score), kept = expf(maximum - top), weight = expf(score - top);
        for (int64_t i = 0; i < size; i++) out[i] = out[i] * kept + weight * key[width_of(rows) + i];
        total = total * kept + weight;
        maximum = top;
      }
      for (int64_t i = 0; i < size; i++) out[i] /= total;
    }
}

Error check(const AttentionInput& input) {
  int64_t left = input.tokens;
  for (int64_t i = 0; i < input.pairs; left -= input.lengths[i++])
    if (input.lengths[i] < (input.is_first ? 1 : 0) || input.lengths[i] > left)
      return error("pair %lld has a length of %lld, and %lld tokens are left", static_cast<long long>(i),
                   static_cast<long long>(input.lengths[i]), static_cast<long long>(left));
  return left == 0 ? Error{} : error("the lengths leave %lld of %lld tokens", static_cast<long long>(left),
                                     static_cast<long long>(input.tokens));
}

class AttentionOperator : public Kernel {
 public:
  AttentionOperator(AttentionKernel kernel, int64_t heads, int64_t window, bool is_first)
      : kernel_(kernel), heads_(heads), window_(window), is_first_(is_first) {}

  Error compute(const Call& call) override {
    Tensor queries, packed, lengths, out;
    const size_t place = is_first_ ? 1 : 0;
    if (Error found = call.input(place, &packed)) return found;
    if (Error found = call.input(place + 1, &lengths)) return found;
    if (packed.rank != 2 || lengths.rank != 1)
      return error("attention takes rows and their lengths, not tensors of rank %zu and %zu", packed.rank, lengths.rank);
    const int64_t parts = is_first_ ? 2 : 3, width = packed.shape[1], hidden = width / parts, tokens = packed.shape[0];
    if (width == 0 || width % (parts * heads_) != 0)
      return error("rows of %lld values are not %lld parts of %lld heads", static_cast<long long>(width),
                   static_cast<long long>(parts), static_cast<long long>(heads_));
    if (is_first_) {
      if (Error found = call.input(0, &queries)) return found;
      if (!queries.is({lengths.shape[0], hidden})) return error("the queries are not one of %lld values for each pair",
                                                                static_cast<long long>(hidden));
    }
    if (Error found = call.output(0, {is_first_ ? lengths.shape[0] : tokens, hidden}, &out)) return found;
    const float* rows = packed.as<float>();
    const AttentionRows first = {queries.as<float>(), hidden, rows, width, out.as<float>(), heads_, hidden / heads_, -1};
    const AttentionRows all = {rows, width, rows + hidden, width, out.as<float>(), heads_, hidden / heads_, window_};
    return attend_pairs({is_first_ ? first : all, tokens, lengths.as<int64_t>(), lengths.shape[0], is_first_}, kernel_,
                        call.parallel());
  }

 private:
  AttentionKernel kernel_;
  int64_t heads_;
  int64_t window_;
  bool is_first_;
};

template <bool is_first, bool is_local>
Error create(const Node& node, Kernel** kernel) {
  int64_t heads = 0;
  if (Error found = node.whole("heads", &heads)) return found;
  if (heads < 1 || heads > 65536) return error("heads must be 1 to 65536, not %lld", static_cast<long long>(heads));
  int64_t window = -1;
  if (is_local)
    if (Error found = node.whole("window", &window)) return found;
  if (is_local && window < 0) return error("window must be 0 or more, not %lld", static_cast<long long>(window));
  *kernel = new (std::nothrow) AttentionOperator(chosen_instruction_set()->attention, heads, window, is_first);
  return *kernel ? Error{} : error("no memory");
}

}  // namespace

Error attend_pairs(const AttentionInput& input, AttentionKernel kernel, const Parallel& parallel) {
  if (Error found = check(input)) return found;
  if (input.rows.head_size > MOST_HEAD_SIZE) kernel = attend_large_heads;
  const Plan plan(input);
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

const Operator ATTENTION = {"Attention", 2, {ORT_FLOAT, ORT_INT64}, 1, {ORT_FLOAT}, create<false, false>};
const Operator FIRST_ATTENTION = {"FirstAttention", 3, {ORT_FLOAT, ORT_FLOAT, ORT_INT64}, 1, {ORT_FLOAT}, create<true, false>};
const Operator LOCAL_ATTENTION = {"LocalAttention", 2, {ORT_FLOAT, ORT_INT64}, 1, {ORT_FLOAT}, create<false, true>};

}  // namespace cappy
