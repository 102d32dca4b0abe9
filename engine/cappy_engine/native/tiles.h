// Eight registers of 16 rows of 64 bytes, which AMX multiplies; or the same in plain C++ (CAPPY_EMULATED_TILES), so that
// the code that uses them is tested where there is no AMX.
#pragma once
#include <stdint.h>
#include <string.h>

#include "bf16.h"

#if !defined(CAPPY_EMULATED_TILES)
#include <immintrin.h>
#endif

namespace cappy {
namespace {

// Sizes of the tiles, as the instruction reads them: bytes and rows of each.
struct alignas(64) TileSizes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

#if !defined(CAPPY_EMULATED_TILES)

inline void set_tiles(const TileSizes& sizes) {
  // gcc 12 believes that the instruction reads 8 bytes; the others may not be written yet.
  __asm__ volatile("" : : "r"(&sizes) : "memory");
  _tile_loadconfig(&sizes);
}
inline void release_tiles() { _tile_release(); }
#define LOAD_TILE(tile, from, stride) _tile_loadd(tile, from, stride)
#define STORE_TILE(tile, to, stride) _tile_stored(tile, to, stride)
#define MULTIPLY_TILES(sums, unsigned_bytes, signed_bytes) _tile_dpbusd(sums, unsigned_bytes, signed_bytes)
#define MULTIPLY_BF16_TILES(sums, left, right) _tile_dpbf16ps(sums, left, right)

#else

struct Tiles {
  TileSizes sizes;
  uint8_t data[8][16][64];
};
thread_local Tiles tiles;

inline void set_tiles(const TileSizes& sizes) {
  tiles.sizes = sizes;
  memset(tiles.data, 0, sizeof tiles.data);
}
inline void release_tiles() { tiles.sizes = {}; }
inline void load_tile(int tile, const void* from, size_t stride) {
  memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
  for (int r = 0; r < tiles.sizes.rows[tile]; r++)
    memcpy(tiles.data[tile][r], static_cast<const uint8_t*>(from) + r * stride, tiles.sizes.bytes[tile]);
}
inline void store_tile(int tile, void* to, size_t stride) {
  for (int r = 0; r < tiles.sizes.rows[tile]; r++)
    memcpy(static_cast<uint8_t*>(to) + r * stride, tiles.data[tile][r], tiles.sizes.bytes[tile]);
}
inline void multiply_tiles(int sums, int left, int right) {
  for (int r = 0; r < tiles.sizes.rows[sums]; r++)
    for (int c = 0; c < tiles.sizes.bytes[sums] / 4; c++) {
      int32_t sum;
      memcpy(&sum, &tiles.data[sums][r][c * 4], 4);
      for (int k = 0; k < tiles.sizes.bytes[left]; k++)
        sum += tiles.data[left][r][k] * static_cast<int8_t>(tiles.data[right][k / 4][c * 4 + k % 4]);
      memcpy(&tiles.data[sums][r][c * 4], &sum, 4);
    }
}
inline void multiply_bf16_tiles(int sums, int left, int right) {
  for (int r = 0; r < tiles.sizes.rows[sums]; r++)
    for (int c = 0; c < tiles.sizes.bytes[sums] / 4; c++) {
      float sum;
      memcpy(&sum, &tiles.data[sums][r][c * 4], 4);
      for (int k = 0; k < tiles.sizes.bytes[left]; k += 2)
        sum += widened(&tiles.data[left][r][k]) * widened(&tiles.data[right][k / 4][c * 4 + k % 4]);
      memcpy(&tiles.data[sums][r][c * 4], &sum, 4);
    }
}
#define LOAD_TILE(tile, from, stride) load_tile(tile, from, stride)
#define STORE_TILE(tile, to, stride) store_tile(tile, to, stride)
#define MULTIPLY_TILES(sums, unsigned_bytes, signed_bytes) multiply_tiles(sums, unsigned_bytes, signed_bytes)
#define MULTIPLY_BF16_TILES(sums, left, right) multiply_bf16_tiles(sums, left, right)

#endif

}  // namespace
}  // namespace cappy
