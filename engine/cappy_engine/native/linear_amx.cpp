#include "amx.h"
#include "vectors_avx512.h"

namespace cappy {

const LinearKernels LINEAR_AMX = {
    Rows<Avx512>::quantize_row, Rows<Avx512>::rotate_row,
    {BLOCK, TILE, BLOCK, begin, end, multiply, multiply, Rows<Avx512>::finish}, Rows<Avx512>::normalize,
};

}  // namespace cappy
