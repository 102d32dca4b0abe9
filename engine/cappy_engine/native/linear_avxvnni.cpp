#include "avxvnni.h"

namespace cappy {

const LinearKernels LINEAR_AVXVNNI = KERNELS;

}  // namespace cappy
