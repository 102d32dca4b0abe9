// In place of the kernels' own file of this name, where AVX-512 and AMX are plain C++ (avx512.h): there is all but
// AVX-VNNI, whose code the same instruction of AVX-512 tries.
#include "cpu_features.h"

#include <unistd.h>

namespace cappy {

size_t processors() { return static_cast<size_t>(sysconf(_SC_NPROCESSORS_ONLN)); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avxvnni() { return false; }
bool has_avx512vnni() { return true; }
bool has_avx512bf16() { return true; }
bool has_amx() { return true; }

}  // namespace cappy
