#define CAPPY_EVEX
#include "avxvnni.h"

namespace cappy {

const LinearKernels LINEAR_AVXVNNI_EVEX = KERNELS;

}  // namespace cappy
