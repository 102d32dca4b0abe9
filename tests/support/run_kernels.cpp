// Runs one kernel on what it reads from stdin, and writes the result to stdout: for processors that only an emulator has.
//
//   run_kernels sets
//   run_kernels quantize SET ROWS COLUMNS ZERO_POINT STEPS LEAST IS_SIGNED   < x                                > q scales
//   run_kernels linear SET ROWS INNER COLUMNS ZERO_POINT IS_GELU HAS_NORM IS_PACKED EPSILON
//       < q scales weights scales bias [residual gamma beta]                                                    > y
//   run_kernels attention SET IS_FIRST HEADS HEAD_SIZE LENGTH...             < [queries] packed                 > y
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "attention.h"
#include "linear.h"

extern "C" const char* cappy_instruction_sets();
extern "C" int cappy_quantize_rows(const char*, const float*, int64_t, int64_t, const cappy::Rounding*, uint8_t*, float*);
extern "C" int cappy_linear(const char*, const cappy::LinearWeights*, const uint8_t*, const float*, int64_t, const float*, float*);
extern "C" int cappy_attention(const char*, const cappy::AttentionInput*);

template <class T>
std::vector<T> read(size_t count) {
  std::vector<T> values(count);
  if (fread(values.data(), sizeof(T), count, stdin) != count) {
    fputs("stdin is too short\n", stderr);
    exit(2);
  }
  return values;
}

template <class T>
void write(const std::vector<T>& values) {
  fwrite(values.data(), sizeof(T), values.size(), stdout);
}

int main(int count, char** words) {
  auto whole = [&](int place) { return strtol(words[place], nullptr, 10); };
  auto number = [&](int place) { return strtof(words[place], nullptr); };
  if (count == 2 && !strcmp(words[1], "sets")) {
    puts(cappy_instruction_sets());
    return 0;
  }
  if (count == 9 && !strcmp(words[1], "quantize")) {
    size_t rows = whole(3), columns = whole(4);
    cappy::Rounding rounding = {static_cast<int>(whole(5)), static_cast<int>(whole(6)), number(7), whole(8) != 0};
    auto x = read<float>(rows * columns);
    std::vector<uint8_t> q(rows * columns);
    std::vector<float> scales(rows);
    if (!cappy_quantize_rows(words[2], x.data(), rows, columns, &rounding, q.data(), scales.data())) return 1;
    write(q);
    write(scales);
    return 0;
  }
  if (count > 6 && !strcmp(words[1], "attention")) {
    bool is_first = whole(3) != 0;
    int64_t heads = whole(4), head_size = whole(5), hidden = heads * head_size, tokens = 0;
    std::vector<int64_t> lengths;
    for (int place = 6; place < count; place++) lengths.push_back(whole(place));
    for (int64_t length : lengths) tokens += length;
    int64_t pairs = static_cast<int64_t>(lengths.size()), stride = (is_first ? 2 : 3) * hidden;
    auto queries = read<float>(is_first ? pairs * hidden : 0);
    auto packed = read<float>(tokens * stride);
    std::vector<float> y((is_first ? pairs : tokens) * hidden);
    cappy::AttentionRows rows = {packed.data(), stride, packed.data() + hidden, stride, y.data(), heads, head_size};
    if (is_first) rows.queries = queries.data(), rows.query_stride = hidden, rows.keys = packed.data();
    cappy::AttentionInput input = {rows, tokens, lengths.data(), pairs, is_first};
    if (!cappy_attention(words[2], &input)) return 1;
    write(y);
    return 0;
  }
  if (count == 11 && !strcmp(words[1], "linear")) {
    size_t rows = whole(3), inner = whole(4), columns = whole(5);
    auto q = read<uint8_t>(rows * inner);
    auto scales = read<float>(rows);
    auto weights = read<int8_t>(inner * columns);
    auto weight_scales = read<float>(columns), bias = read<float>(columns);
    size_t norm = whole(8) ? columns : 0;
    auto residual = read<float>(rows * norm), gamma = read<float>(norm), beta = read<float>(norm);
    cappy::LinearWeights linear = {};
    linear.weights = weights.data();
    linear.inner = inner;
    linear.columns = columns;
    linear.scales = weight_scales.data();
    linear.bias = bias.data();
    linear.zero_point = static_cast<int>(whole(6));
    linear.is_gelu = whole(7) != 0;
    linear.is_packed = whole(9) != 0;
    linear.epsilon = number(10);
    if (norm) linear.gamma = gamma.data(), linear.beta = beta.data();
    std::vector<float> y(rows * columns);
    if (!cappy_linear(words[2], &linear, q.data(), scales.data(), rows, norm ? residual.data() : nullptr, y.data())) return 1;
    write(y);
    return 0;
  }
  fputs("sets, quantize, linear or attention, with the words that the source lists\n", stderr);
  return 2;
}
