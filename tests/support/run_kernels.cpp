// Runs a function of the kernels' library on what it reads from stdin, and writes the result to stdout: for processors
// that only an emulator has. Nothing of a C++ library is used, which zig would have to compile first.
//
//   run_kernels LIBRARY sets
//   run_kernels LIBRARY quantize SET ROWS COLUMNS IS_GATED HAS_NORM EPSILON BLOCK ZERO_POINT STEPS LEAST
//       < x [gamma beta] factors offsets                                                                   > q scales
//   run_kernels LIBRARY linear SET ROWS INNER COLUMNS ZERO_POINT IS_GELU HAS_RESIDUAL HAS_NORM IS_PACKED EPSILON
//       < q scales weights scales bias [residual] [gamma beta]                                             > y
//   run_kernels LIBRARY bf16 SET ROWS INNER COLUMNS IS_GELU HAS_RESIDUAL HAS_NORM EPSILON
//       < x weights bias [residual] [gamma beta]                                                           > y
//   run_kernels LIBRARY gate SET ROWS COUNT  < x                                                           > y
//   run_kernels LIBRARY attention SET IS_FIRST HEADS HEAD_SIZE WINDOW DISTANCES FARTHEST SCALE PLACES LENGTH...
//       < [queries] packed [keys queries rows of distances] [cosines sines of places]                      > y
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "gate.h"
#include "linear.h"
#include "quantize.h"

namespace {

template <class T>
T* room(size_t count) {
  if (T* found = static_cast<T*>(calloc(count + 1, sizeof(T)))) return found;
  fputs("no memory\n", stderr);
  exit(2);
}

template <class T>
T* read(size_t count) {
  T* values = room<T>(count);
  if (fread(values, sizeof(T), count, stdin) == count) return values;
  fputs("stdin is too short\n", stderr);
  exit(2);
}

template <class T>
void write(const T* values, size_t count) {
  fwrite(values, sizeof(T), count, stdout);
}

template <class... T>
auto find(void* library, const char* name) {
  if (void* found = dlsym(library, name)) return reinterpret_cast<int (*)(T...)>(found);
  fprintf(stderr, "%s\n", dlerror());
  exit(2);
}

}  // namespace

int main(int count, char** words) {
  auto whole = [&](int place) { return strtol(words[place], nullptr, 10); };
  auto number = [&](int place) { return strtof(words[place], nullptr); };
  auto is = [&](int least, const char* what) { return count >= least && !strcmp(words[2], what); };
  void* library = count > 2 ? dlopen(words[1], RTLD_NOW) : nullptr;
  if (!library) {
    fprintf(stderr, "%s\n", count > 2 ? dlerror() : "which library, and sets, quantize, linear, bf16, gate or attention?");
    return 2;
  }
  if (is(3, "sets")) {
    puts(reinterpret_cast<const char* (*)()>(dlsym(library, "cappy_instruction_sets"))());
    return 0;
  }
  if (is(13, "quantize")) {
    size_t rows = whole(4), columns = whole(5), block = whole(9);
    cappy::Rounding rounding = {static_cast<int>(whole(10)), static_cast<int>(whole(11)), number(12)};
    cappy::Preparation before = {};
    before.is_gated = whole(6) != 0;
    before.epsilon = number(8);
    auto x = read<float>(rows * columns * (before.is_gated ? 2 : 1));
    if (whole(7)) before.gamma = read<float>(columns), before.beta = read<float>(columns);
    before.rotation.factors = read<float>(columns);
    before.rotation.offsets = read<float>(columns);
    before.rotation.block = block;
    auto q = room<uint8_t>(rows * columns);
    auto scales = room<float>(rows);
    auto quantize = find<const char*, const float*, int64_t, int64_t, const cappy::Preparation*, const cappy::Rounding*, uint8_t*, float*>(library, "cappy_quantize_rows");
    if (!quantize(words[3], x, rows, columns, &before, &rounding, q, scales)) return 1;
    write(q, rows * columns);
    write(scales, rows);
    return 0;
  }
  if (is(6, "gate")) {
    size_t rows = whole(4), columns = whole(5);
    auto x = read<float>(rows * 2 * columns);
    auto y = room<float>(rows * columns);
    auto gate = find<const char*, const float*, int64_t, int64_t, float*>(library, "cappy_gate_rows");
    if (!gate(words[3], x, rows, columns, y)) return 1;
    write(y, rows * columns);
    return 0;
  }
  if (is(13, "attention")) {
    bool is_first = whole(4) != 0;
    int64_t heads = whole(5), head_size = whole(6), hidden = heads * head_size, pairs = count - 12, tokens = 0;
    auto lengths = room<int64_t>(pairs);
    for (int64_t pair = 0; pair < pairs; pair++) tokens += lengths[pair] = whole(static_cast<int>(12 + pair));
    int64_t stride = (is_first ? 2 : 3) * hidden, results = (is_first ? pairs : tokens) * hidden;
    auto queries = read<float>(is_first ? pairs * hidden : 0);
    auto packed = read<float>(tokens * stride);
    auto y = room<float>(results);
    cappy::AttentionDistances distances = {nullptr, nullptr, nullptr, whole(9), whole(8)};
    if (distances.count) {
      distances.keys = read<float>(distances.count * hidden);
      distances.queries = read<float>(distances.count * hidden);
      distances.rows = read<int64_t>(2 * distances.farthest + 1);
    }
    cappy::AttentionAngles angles = {nullptr, nullptr, whole(11), head_size / 2};
    if (angles.places) {
      angles.cosines = read<float>(angles.places * angles.half);
      angles.sines = read<float>(angles.places * angles.half);
    }
    cappy::AttentionRows rows = {packed, stride, packed + hidden, stride, y, heads, head_size, whole(7), number(10), distances, angles};
    if (is_first) rows.queries = queries, rows.query_stride = hidden, rows.keys = packed;
    cappy::AttentionInput input = {rows, tokens, lengths, pairs, is_first};
    if (!find<const char*, const cappy::AttentionInput*>(library, "cappy_attention")(words[3], &input)) return 1;
    write(y, results);
    return 0;
  }
  if (is(11, "bf16")) {
    size_t rows = whole(4), inner = whole(5), columns = whole(6), residuals = whole(8) ? rows * columns : 0;
    size_t norm = whole(9) ? columns : 0;
    auto x = read<float>(rows * inner);
    cappy::LinearWeights linear = {};
    linear.weights = read<int8_t>(2 * inner * columns);
    linear.bias = read<float>(columns);
    auto residual = read<float>(residuals), gamma = read<float>(norm), beta = read<float>(norm);
    if (norm) linear.gamma = gamma, linear.beta = beta;
    linear.has_residual = residuals != 0;
    linear.inner = inner;
    linear.columns = columns;
    linear.is_gelu = whole(7) != 0;
    linear.is_packed = linear.is_bf16 = true;
    linear.epsilon = number(10);
    auto y = room<float>(rows * columns);
    auto run = find<const char*, const cappy::LinearWeights*, const void*, const float*, int64_t, const float*, float*>(library, "cappy_linear");
    if (!run(words[3], &linear, x, nullptr, rows, residuals ? residual : nullptr, y)) return 1;
    write(y, rows * columns);
    return 0;
  }
  if (is(13, "linear")) {
    size_t rows = whole(4), inner = whole(5), columns = whole(6), residuals = whole(9) ? rows * columns : 0;
    size_t norm = whole(10) ? columns : 0;
    auto q = read<uint8_t>(rows * inner);
    auto scales = read<float>(rows);
    cappy::LinearWeights linear = {};
    linear.weights = read<int8_t>(inner * columns);
    linear.scales = read<float>(columns);
    linear.bias = read<float>(columns);
    auto residual = read<float>(residuals), gamma = read<float>(norm), beta = read<float>(norm);
    if (norm) linear.gamma = gamma, linear.beta = beta;
    linear.has_residual = residuals != 0;
    linear.inner = inner;
    linear.columns = columns;
    linear.zero_point = static_cast<int>(whole(7));
    linear.is_gelu = whole(8) != 0;
    linear.is_packed = whole(11) != 0;
    linear.epsilon = number(12);
    auto y = room<float>(rows * columns);
    auto run = find<const char*, const cappy::LinearWeights*, const void*, const float*, int64_t, const float*, float*>(library, "cappy_linear");
    if (!run(words[3], &linear, q, scales, rows, residuals ? residual : nullptr, y)) return 1;
    write(y, rows * columns);
    return 0;
  }
  fputs("which function: sets, quantize, linear, bf16, gate or attention, with the words that the source lists?\n", stderr);
  return 2;
}
