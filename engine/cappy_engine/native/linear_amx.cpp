#include "amx.h"
#include "vectors_avx512.h"

namespace cappy {

const LinearKernels LINEAR_AMX = {
    Rows<Avx512>::KERNELS,
    {BLOCK, TILE, BLOCK, begin, end, multiply, multiply, Rows<Avx512>::finish},
};

}  // namespace cappy
