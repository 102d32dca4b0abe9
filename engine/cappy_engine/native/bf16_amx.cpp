#define CAPPY_BF16
#include "amx.h"
#include "bf16.h"
#include "vectors_avx512.h"

namespace cappy {

const Bf16Kernels BF16_AMX = {
    round_row, sizeof(uint16_t),
    {BLOCK, TILE, BLOCK, begin, end, multiply, multiply, Rows<Avx512>::activate},
};

}  // namespace cappy
