#define CAPPY_EMULATED_TILES
#define CAPPY_BF16
#include "amx.h"
#include "bf16.h"
#include "vectors_scalar.h"

namespace cappy {

const Bf16Kernels BF16_AMX_EMULATED = {
    round_row, sizeof(uint16_t),
    {BLOCK, TILE, BLOCK, begin, end, multiply, multiply, Rows<Scalar>::activate},
};

}  // namespace cappy
