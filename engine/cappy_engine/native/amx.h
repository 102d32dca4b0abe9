// Products of 8-bit rows with AMX: 16 x 16 sums of 64 products each in an instruction; or of bfloat16 ones (CAPPY_BF16),
// of 32 products. Included by files for the processor's tiles and for emulated ones; each names its vectors and its table.
#pragma once
#include "rows.h"
#include "tiles.h"

namespace cappy {
namespace {

constexpr size_t TILE = 16, BLOCK = 2 * TILE, DEPTH = 64;  // DEPTH in bytes of a row

#if defined(CAPPY_BF16)
#define MULTIPLY(sums, rows, weights) MULTIPLY_BF16_TILES(sums, rows, weights)
constexpr size_t VALUE_BYTES = 2;
#else
#define MULTIPLY(sums, rows, weights) MULTIPLY_TILES(sums, rows, weights)
constexpr size_t VALUE_BYTES = 1;
#endif

// Tiles 0 to 3 are sums (rows, rows, then the columns of each), 4 and 5 rows, 6 and 7 weights.
TileSizes sizes(size_t first_rows, size_t second_rows) {
  TileSizes found;
  for (int tile = 0; tile < 8; tile++) {
    const bool is_second = tile == 2 || tile == 3 || tile == 5;
    found.bytes[tile] = 64;
    found.rows[tile] = static_cast<uint8_t>(tile >= 6 ? TILE : is_second ? second_rows : first_rows);
  }
  return found;
}

void begin() { set_tiles(sizes(TILE, TILE)); }
void end() { release_tiles(); }

template <bool HAS_SECOND>
void multiply_whole(const Block& b) {
  const int8_t *left = b.panels, *right = b.panels + b.panel_bytes;
  const uint8_t *first = b.rows, *second = b.rows + TILE * b.row_bytes;
  LOAD_TILE(0, b.start, 0);  // each row from the same place
  LOAD_TILE(1, b.start + PANEL, 0);
  if (HAS_SECOND) {
    LOAD_TILE(2, b.start, 0);
    LOAD_TILE(3, b.start + PANEL, 0);
  }
  for (size_t k = 0; k + DEPTH <= b.inner * VALUE_BYTES; k += DEPTH) {
    LOAD_TILE(4, first + k, b.row_bytes);
    LOAD_TILE(6, left + k * PANEL, 64);
    MULTIPLY(0, 4, 6);
    LOAD_TILE(7, right + k * PANEL, 64);
    MULTIPLY(1, 4, 7);
    if (HAS_SECOND) {
      LOAD_TILE(5, second + k, b.row_bytes);
      MULTIPLY(2, 5, 6);
      MULTIPLY(3, 5, 7);
    }
  }
  STORE_TILE(0, b.sums, BLOCK * 4);
  STORE_TILE(1, b.sums + PANEL, BLOCK * 4);
  if (HAS_SECOND) {
    STORE_TILE(2, b.sums + TILE * BLOCK, BLOCK * 4);
    STORE_TILE(3, b.sums + TILE * BLOCK + PANEL, BLOCK * 4);
  }
}

#if defined(CAPPY_BF16)

// The last products of rows that are no multiple of 64 bytes long; the models' are.
void multiply_rest(const Block& b) {
  float* sums = reinterpret_cast<float*>(b.sums);
  for (size_t r = 0; r < b.count; r++)
    for (size_t c = 0; c < BLOCK; c++) {
      const int8_t* panel = b.panels + c / PANEL * b.panel_bytes + c % PANEL * 4;
      for (size_t k = b.inner * 2 / DEPTH * DEPTH; k < b.inner * 2; k += 2)
        sums[r * BLOCK + c] += widened(b.rows + r * b.row_bytes + k) * widened(panel + k / 4 * PANEL * 4 + k % 4);
    }
}

#else

// The last products of rows that are no multiple of 64 long; the models' are.
void multiply_rest(const Block& b) {
  for (size_t r = 0; r < b.count; r++)
    for (size_t c = 0; c < BLOCK; c++) {
      const int8_t* panel = b.panels + c / PANEL * b.panel_bytes + c % PANEL * 4;
      for (size_t k = b.inner / DEPTH * DEPTH; k < b.inner; k++)
        b.sums[r * BLOCK + c] += b.rows[r * b.row_bytes + k] * panel[k / 4 * PANEL * 4 + k % 4];
    }
}

#endif

void multiply(const Block& b) {
  const bool has_second = b.count > TILE, is_full = b.count % TILE == 0;
  if (!is_full) set_tiles(sizes(has_second ? TILE : b.count, has_second ? b.count - TILE : TILE));
  has_second ? multiply_whole<true>(b) : multiply_whole<false>(b);
  if (!is_full) begin();
  if (b.inner * VALUE_BYTES % DEPTH) multiply_rest(b);
}

}  // namespace
}  // namespace cappy
