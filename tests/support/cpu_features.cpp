// In place of the kernels' own file of this name, where plain C++ stands for newer instructions (avx512.h): all are there.
#include "cpu_features.h"

#include <unistd.h>

namespace cappy {

size_t processors() { return static_cast<size_t>(sysconf(_SC_NPROCESSORS_ONLN)); }
size_t first_cache_ways() { return 8; }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avxvnni() { return true; }
bool has_avx512vnni() { return true; }
bool has_fast_avx512bf16() { return true; }
bool has_slow_avx512bf16() { return false; }
bool has_amx() { return true; }

}  // namespace cappy
