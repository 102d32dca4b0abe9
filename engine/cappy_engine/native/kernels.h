// The functions that each instruction set has of its own, and the table that holds them.
//
// A file whose name ends in an instruction set (linear_avx2.cpp) is compiled with its flags, and holds nothing that
// another file could share: no inline function of a header outside of an anonymous namespace, no template of the
// standard library. The linker keeps one copy of what is shared, and that one may use instructions that are not there.
#pragma once
#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace cappy {

// How a row of floats becomes 8 bits: `steps` above `zero_point` stand for its largest size, which is at least `least`.
struct Rounding {
  int zero_point;
  int steps;
  float least;
};

// What is done to a row before: each value times its factor plus its offset, then each block times the Hadamard matrix of
// 1 and -1.
struct Rotation {
  const float* factors;  // one for each value of a row
  const float* offsets;  // as many
  size_t block;          // a power of two that divides the values of a row
};

// What a row goes through before it is rounded, in this order.
struct Preparation {
  bool is_gated;       // the row has a second half, by which the Gelu of the first is multiplied
  const float* gamma;  // of a layer norm, or null: none
  const float* beta;
  float epsilon;
  Rotation rotation;
};

constexpr size_t PANEL = 16;  // columns that lie together in packed weights: [columns / 16][inner / 4][16][4]; in bf16 2 in place of 4

// A block of a product: up to block_rows rows by block_columns columns. In a product of bfloat16 weights, rows are as
// round_row gives them, and `start` and `sums` are floats.
struct Block {
  const uint8_t* rows;      // the first of `count` rows
  size_t row_bytes;         // from one row to the next
  size_t count;
  size_t inner;             // values of a row
  const int8_t* panels;     // packed weights of the first panel
  size_t panel_bytes;       // from one panel to the next
  const int32_t* start;     // block_columns sums to start from
  int32_t* sums;            // [count][block_columns]
  const int8_t* next;       // where to prefetch meanwhile, for each group of four values of a row (two of bfloat16)
  size_t next_step;         // bytes from one place to the next; no place is read
};

// What becomes of a block's sums: y = act(sums * column_scales * row_scales + bias), or that plus a residual; y = act(sums)
// of bfloat16's, which start from the bias.
struct Finish {
  const int32_t* sums;
  size_t sums_stride;
  size_t rows, columns;
  const float* row_scales;
  const float* column_scales;
  const float* bias;
  bool is_gelu;
  const float* residual;  // added to what has no Gelu, or null: a row stands as far from the next as in y
  float* y;
  size_t y_stride;
};

struct Product {
  size_t block_rows;     // at most MAX_BLOCK_ROWS
  size_t row_step;       // fewer rows take as long as a multiple of this
  size_t block_columns;  // a multiple of PANEL, at most MAX_BLOCK_COLUMNS
  void (*begin)();  // before a task's first `multiply`, and `end` after its last
  void (*end)();
  void (*multiply)(const Block& block);
  void (*multiply_any)(const Block& block);  // where weights are such that `multiply` would saturate
  void (*finish)(const Finish& finish);
  int taken_away = 0;  // from each byte of a row, before it is multiplied: `start` is for such bytes
};
constexpr size_t MAX_BLOCK_ROWS = 32, MAX_BLOCK_COLUMNS = 64;

// What is done to whole rows of floats (rows.h).
struct RowKernels {
  void (*quantize_row)(const float* x, size_t count, const Rounding& rounding, uint8_t* q, float* scale);
  void (*rotate_row)(const float* x, const Rotation& rotation, size_t count, float* y);
  // y is the layer norm of x plus a residual, or of x where that is null; x may be y.
  void (*normalize)(const float* x, const float* residual, const float* gamma, const float* beta, size_t count, float epsilon, float* y);
  void (*gate_row)(const float* x, size_t count, float* y);  // x has 2 * count values
};

constexpr size_t VALUES_OF_A_TASK = 32768;  // of rows that go through RowKernels: some microseconds

struct LinearKernels {
  RowKernels rows;
  Product product;
};

// For bfloat16 weights: a row is rounded to it, and written as values of value_bytes that the product reads.
struct Bf16Kernels {
  void (*round_row)(const float* x, size_t count, void* row);
  size_t value_bytes;
  Product product;
};

extern const LinearKernels LINEAR_SCALAR, LINEAR_AMX_EMULATED;
extern const Bf16Kernels BF16_SCALAR, BF16_AMX_EMULATED;
#if defined(__x86_64__)
extern const LinearKernels LINEAR_AVX2, LINEAR_AVXVNNI, LINEAR_AVX512VNNI, LINEAR_AMX;
extern const Bf16Kernels BF16_AVX2, BF16_AVX512, BF16_AVX512BF16, BF16_AMX;
#elif defined(__aarch64__)
extern const LinearKernels LINEAR_NEON, LINEAR_DOTPROD, LINEAR_I8MM;
extern const Bf16Kernels BF16_NEON;
#endif

struct InstructionSet {
  const char* name;  // as CAPPY_KERNELS names it
  bool (*is_usable)();
  const LinearKernels* linear;
  const Bf16Kernels* bf16;
  AttentionKernel attention;
};

const InstructionSet* find_instruction_set(const char* name);  // null if unknown or not usable here
const InstructionSet* chosen_instruction_set();                // the best, unless this thread has chosen another one
bool choose_instruction_set(const char* name);                 // for kernels that this thread makes from now on
size_t chosen_threads();                                       // of their session: work is split for so many
void choose_threads(size_t threads);                           // 0: one for each processor of the system
const char* usable_instruction_sets();                         // "avx512 avx2 scalar": the best first

}  // namespace cappy
