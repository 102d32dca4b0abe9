#include "linear.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu_features.h"
#include "numbers.h"
#include "quantize.h"
#include "scratch.h"

namespace cappy {
namespace {

// A task's weights are read again for each block of rows, and its rows for each block of weights: each stay in the second cache.
constexpr size_t MOST_BYTES_OF_ROWS = 256 * 1024, MOST_BYTES_OF_WEIGHTS = 640 * 1024;
// Fewer rows are multiplied by all of the first panels before the next ones, which then stay in the first cache.
constexpr size_t MANY_ROWS = 48;
// Of more rows, a chunk of so many weights stays in the second cache, and the next chunk, which is brought there meanwhile.
constexpr size_t BYTES_OF_A_CHUNK = 128 * 1024;
// Tasks are some for each thread, so that threads end together, and not too short for what it takes to hand one out (1 to 2 us).
constexpr size_t TASKS_OF_A_THREAD = 4, LEAST_PRODUCTS_OF_A_TASK = 2 << 20;
constexpr size_t MOST_ROW_PARTS_SPLIT = 64;
// Where the first cache has at most so many ways, the rows of a block push each other out of it.
constexpr size_t FEW_WAYS = 8;
constexpr size_t FLOATS_OF_A_LINE = 16;  // of a cache

}  // namespace

Linear::Linear(const InstructionSet& set, const LinearWeights& weights)
    : kernels_(*set.linear), bf16_(weights.is_bf16 ? set.bf16 : nullptr), product_(bf16_ ? bf16_->product : kernels_.product), weights_(weights) {
  panel_bytes_ = divided_up(weights.inner, size_t{weights.is_bf16 ? 2u : 4u}) * PANEL * 4;
  panels_ = divided_up(weights.columns, PANEL);
  const size_t ways = first_cache_ways();
  do_rows_collide_ = ways <= FEW_WAYS || product_.block_rows > ways;
  if (!weights.is_packed) pack();
  const int8_t* packed = weights.is_packed ? weights.weights : packed_;
  size_t room = divided_up(panels_ * PANEL, MAX_BLOCK_COLUMNS) * MAX_BLOCK_COLUMNS;
  start_ = static_cast<int32_t*>(calloc(room, sizeof(int32_t)));
  if (!start_ || !packed) return;
  bf16_ ? static_cast<void>(memcpy(start_, weights.bias, weights.columns * sizeof(float))) : start_from_zero_points(packed);
}

void Linear::start_from_zero_points(const int8_t* packed) {
  constexpr size_t PAIRS = 2 * PANEL;  // of weights in a group of four rows; loops over them become vectors
  const int zero_point = weights_.zero_point - product_.taken_away;
  int16_t most[PAIRS] = {}, least[PAIRS] = {};
  for (size_t p = 0; p < panels_; p++) {
    int32_t sums[PAIRS] = {};
    for (const int8_t *group = packed + p * panel_bytes_, *end = group + panel_bytes_; group < end; group += 2 * PAIRS) {
      int16_t both[PAIRS];
      memcpy(both, group, sizeof both);
      for (size_t i = 0; i < PAIRS; i++) {
        // One byte of a pair is its half above, the other the half below, whichever comes first in memory.
        const int16_t first = static_cast<int16_t>(both[i] >> 8), second = static_cast<int16_t>(static_cast<int16_t>(both[i] * 256) >> 8);
        const int16_t sum = static_cast<int16_t>(first + second);
        const int16_t above = static_cast<int16_t>((first > 0 ? first : 0) + (second > 0 ? second : 0));
        const int16_t below = static_cast<int16_t>(sum - above);
        most[i] = above > most[i] ? above : most[i];
        least[i] = below < least[i] ? below : least[i];
        sums[i] += sum;
      }
    }
    for (size_t i = 0; i < PAIRS; i++) start_[p * PANEL + i / 2] -= zero_point * sums[i];
  }
  for (size_t i = 0; i < PAIRS; i++) may_saturate_ |= most[i] * 255 > INT16_MAX || least[i] * 255 < INT16_MIN;
}

Linear::~Linear() {
  free(packed_);
  free(start_);
}

void Linear::pack() {
  packed_ = static_cast<int8_t*>(aligned_alloc(64, larger(panels_ * panel_bytes_, size_t{64})));
  if (!packed_) return;
  memset(packed_, 0, panels_ * panel_bytes_);
  for (size_t k = 0; k < weights_.inner; k++)
    for (size_t c = 0; c < weights_.columns; c++)
      packed_[c / PANEL * panel_bytes_ + (k / 4 * PANEL + c % PANEL) * 4 + k % 4] = weights_.weights[k * weights_.columns + c];
}

// A run's parts: each of `row_parts` times `column_parts` is a task.
struct Linear::Parts {
  const void* x;
  const float* scales;
  size_t rows;
  const float* residual;
  float* y;
  size_t row_parts, rows_of_a_part;
  size_t column_parts, columns_of_a_part;
  std::atomic<size_t>* finished;  // column parts of each row part; null if there is one
  std::atomic<bool>* is_short_of_memory;
};

bool Linear::run(const void* x, const float* scales, size_t rows, const float* residual, float* y, const Parallel& parallel) const {
  if (rows == 0 || weights_.columns == 0) return true;
  std::atomic<bool> is_short_of_memory{false};
  Parts parts = {x, scales, rows, residual, y, 0, 0, 0, 0, nullptr, &is_short_of_memory};
  const size_t step = product_.block_rows, blocks = divided_up(weights_.columns, product_.block_columns);
  const size_t row_bytes = weights_.inner * (bf16_ ? bf16_->value_bytes : 1);
  const size_t wanted = smaller(rows * weights_.inner * weights_.columns / LEAST_PRODUCTS_OF_A_TASK + 1, TASKS_OF_A_THREAD * parallel.threads);
  const size_t fewest_column_parts = larger(size_t{1}, smaller(divided_up(panels_ * panel_bytes_, MOST_BYTES_OF_WEIGHTS), blocks));
  const size_t fewest_row_parts = divided_up(rows, larger(MOST_BYTES_OF_ROWS / (row_bytes + 1), step));
  parts.row_parts = larger(fewest_row_parts, smaller(divided_up(wanted, fewest_column_parts), rows / MANY_ROWS));
  parts.rows_of_a_part = divided_up(divided_up(rows, parts.row_parts), step) * step;
  parts.row_parts = divided_up(rows, parts.rows_of_a_part);
  parts.column_parts = larger(fewest_column_parts, smaller(divided_up(wanted, parts.row_parts), blocks));
  if (parts.row_parts > MOST_ROW_PARTS_SPLIT) parts.column_parts = 1;
  parts.columns_of_a_part = divided_up(blocks, parts.column_parts) * product_.block_columns;
  parts.column_parts = divided_up(weights_.columns, parts.columns_of_a_part);
  std::atomic<size_t> finished[MOST_ROW_PARTS_SPLIT] = {};
  if (parts.column_parts > 1) parts.finished = finished;
  // Neighbours in time share columns: their weights are in the caches.
  parallel.each(parts.row_parts * parts.column_parts, [&](size_t task) { run_part(parts, task); });
  return !is_short_of_memory;
}

// The rows as the product reads them: apart where those of a block would not all stay in the first cache.
Linear::Rows Linear::rows_of(const void* x, size_t first, size_t count) const {
  const size_t inner = weights_.inner;
  if (bf16_) {
    const size_t bytes = inner * bf16_->value_bytes + 64;
    uint8_t* rounded = take_scratch(count * bytes);
    for (size_t r = 0; r < count && rounded; r++)
      bf16_->round_row(static_cast<const float*>(x) + (first + r) * inner, inner, rounded + r * bytes);
    return {rounded, bytes};
  }
  const uint8_t* q = static_cast<const uint8_t*>(x) + first * inner;
  uint8_t* copy = inner % 2048 == 0 && count > 4 && do_rows_collide_ ? take_scratch(count * (inner + 64)) : nullptr;
  if (!copy) return {q, inner};
  for (size_t r = 0; r < count; r++) memcpy(copy + r * (inner + 64), q + r * inner, inner);
  return {copy, inner + 64};
}

void Linear::run_part(const Parts& parts, size_t task) const {
  const size_t row_part = task % parts.row_parts, inner = weights_.inner, columns = weights_.columns;
  const size_t first_row = row_part * parts.rows_of_a_part, rows = smaller(parts.rows_of_a_part, parts.rows - first_row);
  const size_t first = task / parts.row_parts * parts.columns_of_a_part, end = smaller(first + parts.columns_of_a_part, columns);
  const size_t width = product_.block_columns;
  const size_t blocks = divided_up(rows, product_.block_rows);
  const size_t rows_of_a_block = divided_up(divided_up(rows, blocks), product_.row_step) * product_.row_step;
  const int8_t* packed = weights_.is_packed ? weights_.weights : packed_;
  const Rows given = rows_of(parts.x, first_row, rows);
  if (!given.first) {
    *parts.is_short_of_memory = true;
    return;
  }
  auto multiply = may_saturate_ ? product_.multiply_any : product_.multiply;
  product_.begin();
  alignas(64) int32_t sums[MAX_BLOCK_ROWS * MAX_BLOCK_COLUMNS];
  auto block = [&](size_t r, size_t c, const int8_t* next, size_t next_step) {
    const size_t count = smaller(rows_of_a_block, rows - r), row = first_row + r;
    // The last block may have fewer panels: it then takes the first one again, and nobody reads those sums.
    const size_t panel_bytes = c / PANEL + width / PANEL <= panels_ ? panel_bytes_ : 0;
    const float* y = parts.y + row * columns + c;
    for (size_t i = 0; i < count; i++)  // prefetched, because memory that is not in the cache is read before it is written
      for (size_t j = 0; j < smaller(width, columns - c); j += FLOATS_OF_A_LINE) __builtin_prefetch(y + i * columns + j, 1);
    multiply({given.first + r * given.bytes, given.bytes, count, inner, packed + c / PANEL * panel_bytes_, panel_bytes, start_ + c, sums,
              next, next_step});
    const size_t place = row * columns + c;
    const float* added = weights_.has_residual && !weights_.gamma ? parts.residual + place : nullptr;
    const float *row_scales = bf16_ ? nullptr : parts.scales + row, *column_scales = bf16_ ? nullptr : weights_.scales + c;
    product_.finish({sums, width, count, smaller(width, columns - c), row_scales, column_scales, weights_.bias + c,
                     weights_.is_gelu, added, parts.y + place, columns});
  };
  // All rows are multiplied by a chunk of the columns, and bring the next chunk's weights meanwhile: each block its share.
  const size_t groups = larger(panel_bytes_ / 64, size_t{1}), block_bytes = groups * 64 * (width / PANEL);
  const size_t most = rows > MANY_ROWS ? larger(BYTES_OF_A_CHUNK / block_bytes, size_t{1}) * width : width;
  for (size_t c = first, chunk = width; c < end;) {
    const size_t behind = smaller(c + chunk, end);
    chunk = smaller(2 * chunk, most);  // nobody brought the first one's weights, so it is short
    const int8_t* next = packed + behind / PANEL * panel_bytes_;
    const size_t next_bytes = (divided_up(smaller(behind + chunk, end), PANEL) - behind / PANEL) * panel_bytes_;
    const size_t share = divided_up(next_bytes, divided_up(rows, rows_of_a_block) * divided_up(behind - c, width) * groups);
    for (size_t r = 0; r < rows; r += rows_of_a_block)
      for (size_t column = c; column < behind; column += width, next += share * groups) block(r, column, next, share);
    c = behind;
  }
  product_.end();
  if (!weights_.gamma) return;
  // The thread that ends the last part of these rows normalizes them.
  if (parts.finished && parts.finished[row_part].fetch_add(1) + 1 < parts.column_parts) return;
  for (size_t r = first_row; r < first_row + rows; r++) {
    const float* residual = parts.residual ? parts.residual + r * columns : nullptr;
    kernels_.rows.normalize(parts.y + r * columns, residual, weights_.gamma, weights_.beta, columns, weights_.epsilon, parts.y + r * columns);
  }
}

Error read_row(const Node& node, size_t input, size_t columns, const float** row) {
  Tensor tensor;
  if (Error found = node.constant(input, &tensor)) return found;
  if (!tensor.is({static_cast<int64_t>(columns)})) return error("input %zu must have %zu values", input, columns);
  *row = tensor.as<float>();
  return {};
}

Error read_then(const Node& node, Then then, size_t residual, LinearWeights* weights) {
  weights->is_gelu = then == Then::GELU;
  weights->has_residual = then == Then::ADD || then == Then::NORM;
  if (then != Then::NORM) return {};
  if (Error found = node.number("epsilon", &weights->epsilon)) return found;
  if (Error found = read_row(node, residual + 1, weights->columns, &weights->gamma)) return found;
  return read_row(node, residual + 2, weights->columns, &weights->beta);
}

namespace {

constexpr size_t RESIDUAL = 5;  // its place among the inputs

class LinearKernel : public Kernel {
 public:
  LinearKernel(const InstructionSet& set, const LinearWeights& weights) : linear_(set, weights) {}
  bool is_ready() const { return linear_.is_ready(); }

  Error compute(const Call& call) override {
    Tensor q, scales, residual, y;
    if (Error found = call.input(0, &q)) return found;
    if (Error found = call.input(1, &scales)) return found;
    const size_t rows = q.rows();
    if (q.rank == 0 || static_cast<size_t>(q.columns()) != linear_.inner()) return error("Linear takes rows of %zu values", linear_.inner());
    q.columns() = 1;
    if (!scales.is(q.shape, q.rank)) return error("Linear takes one scale for each of %zu rows", rows);
    q.columns() = static_cast<int64_t>(linear_.columns());
    if (linear_.has_residual()) {
      if (Error found = call.input(RESIDUAL, &residual)) return found;
      if (!residual.is(q.shape, q.rank)) return error("Linear takes a residual of its result's shape");
    }
    if (Error found = call.output(0, q.shape, q.rank, &y)) return found;
    linear_.run(q.data, scales.as<float>(), rows, residual.as<float>(), y.as<float>(), call.parallel());
    return {};
  }

 private:
  Linear linear_;
};

template <Then THEN>
Error create(const Node& node, Kernel** kernel) {
  Tensor w;
  if (Error found = node.constant(2, &w)) return found;
  bool is_packed = w.rank == 4 && w.shape[2] == PANEL && w.shape[3] == 4;
  if (w.rank != 2 && !is_packed) return error("the weights of Linear must be [inner, columns] or [columns / 16, inner / 4, 16, 4]");
  LinearWeights weights = {};
  weights.weights = w.as<int8_t>();
  weights.is_packed = is_packed;
  weights.inner = is_packed ? w.shape[1] * 4 : w.shape[0];
  weights.columns = is_packed ? w.shape[0] * PANEL : w.shape[1];
  if (Error found = read_zero_point(node, &weights.zero_point)) return found;
  if (weights.inner == 0) return error("rows must have at least one value");
  if (weights.inner > (1u << 16)) return error("sums of more than 65536 products of 8 bits may not fit in 32");
  if (Error found = read_row(node, 3, weights.columns, &weights.scales)) return found;
  if (Error found = read_row(node, 4, weights.columns, &weights.bias)) return found;
  if (Error found = read_then(node, THEN, RESIDUAL, &weights)) return found;
  LinearKernel* made = new (std::nothrow) LinearKernel(*chosen_instruction_set(), weights);
  *kernel = made;
  return made && made->is_ready() ? Error{} : error("no memory for a linear layer's weights");
}

}  // namespace

const Operator LINEAR = {"Linear", 5, {ORT_UINT8, ORT_FLOAT, ORT_INT8, ORT_FLOAT, ORT_FLOAT}, 1, {ORT_FLOAT}, create<Then::NOTHING>};
const Operator LINEAR_GELU = {"LinearGelu", 5, {ORT_UINT8, ORT_FLOAT, ORT_INT8, ORT_FLOAT, ORT_FLOAT}, 1, {ORT_FLOAT}, create<Then::GELU>};
const Operator LINEAR_ADD = {"LinearAdd", 6, {ORT_UINT8, ORT_FLOAT, ORT_INT8, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT}, 1, {ORT_FLOAT},
                             create<Then::ADD>};
const Operator LINEAR_NORM = {"LinearNorm", 8,
                              {ORT_UINT8, ORT_FLOAT, ORT_INT8, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT}, 1, {ORT_FLOAT},
                              create<Then::NORM>};

}  // namespace cappy
