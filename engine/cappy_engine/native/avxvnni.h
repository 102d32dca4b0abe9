// Products of 8-bit rows with AVX-VNNI: 32 multiplications and additions in an instruction, without AVX-512. Included by
// one file for that, and by one that has the same instruction in AVX-512's encoding (CAPPY_EVEX), for tests.
#pragma once
#include <immintrin.h>

#include "avx2_block.h"
#include "rows.h"
#include "vectors_avx2.h"

namespace cappy {
namespace {

constexpr size_t ROWS = 6;  // 12 vectors of sums, 2 of weights, and 16 registers in all

struct MultiplyAdd {
  inline __attribute__((always_inline)) void operator()(__m256i& sums, __m256i unsigned_bytes, __m256i signed_bytes) const {
#if defined(CAPPY_EVEX)
    sums = _mm256_dpbusd_epi32(sums, unsigned_bytes, signed_bytes);
#else
    sums = _mm256_dpbusd_avx_epi32(sums, unsigned_bytes, signed_bytes);
#endif
  }
};

void multiply(const Block& b) {
  using Function = void (*)(const Block&);
  static constexpr Function BLOCKS[ROWS] = {block<MultiplyAdd, 1>, block<MultiplyAdd, 2>, block<MultiplyAdd, 3>,
                                            block<MultiplyAdd, 4>, block<MultiplyAdd, 5>, block<MultiplyAdd, 6>};
  BLOCKS[b.count - 1](b);
}

constexpr LinearKernels KERNELS = {
    Rows<Avx2>::KERNELS,
    {ROWS, 1, PANEL, nothing, nothing, multiply, multiply, Rows<Avx2>::finish},
};

}  // namespace
}  // namespace cappy
