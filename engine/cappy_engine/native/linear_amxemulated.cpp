#define CAPPY_EMULATED_TILES
#include "amx.h"
#include "vectors_scalar.h"

namespace cappy {

const LinearKernels LINEAR_AMX_EMULATED = {
    Rows<Scalar>::KERNELS,
    {BLOCK, TILE, BLOCK, begin, end, multiply, multiply, Rows<Scalar>::finish},
};

}  // namespace cappy
