// Products of 8-bit rows with AVX-VNNI: 32 multiplications and additions in an instruction, without AVX-512.
#include <immintrin.h>

#include "avx2_block.h"
#include "rows.h"
#include "vectors_avx2.h"

namespace cappy {
namespace {

constexpr size_t ROWS = 6;  // 12 vectors of sums, 2 of weights, and 16 registers in all

struct MultiplyAdd {
  inline __attribute__((always_inline)) void operator()(__m256i& sums, __m256i unsigned_bytes, __m256i signed_bytes) const {
    sums = _mm256_dpbusd_avx_epi32(sums, unsigned_bytes, signed_bytes);
  }
};

void multiply(const Block& b) {
  using Function = void (*)(const Block&);
  static constexpr Function BLOCKS[ROWS] = {block<MultiplyAdd, 1>, block<MultiplyAdd, 2>, block<MultiplyAdd, 3>,
                                            block<MultiplyAdd, 4>, block<MultiplyAdd, 5>, block<MultiplyAdd, 6>};
  BLOCKS[b.count - 1](b);
}

}  // namespace

const LinearKernels LINEAR_AVXVNNI = {
    Rows<Avx2>::KERNELS,
    {ROWS, 1, PANEL, nothing, nothing, multiply, multiply, Rows<Avx2>::finish},
};

}  // namespace cappy
