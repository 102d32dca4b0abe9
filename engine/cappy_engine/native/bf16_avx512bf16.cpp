#include "bf16_dots.h"

namespace cappy {

const Bf16Kernels BF16_AVX512BF16 = {
    round_row, sizeof(uint16_t),
    {ROWS, 1, PANELS* PANEL, nothing, nothing, multiply, multiply, Rows<Avx512>::activate},
};

}  // namespace cappy
