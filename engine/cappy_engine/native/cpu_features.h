// What the processor has, and the system lets us use.
#pragma once
#include <cstddef>

namespace cappy {

bool has_avx2();        // with FMA
bool has_avx512vnni();  // AVX-512 F, BW, DQ, VL and VNNI
bool has_fast_avx512bf16();  // AVX512-BF16, beside these, that is faster than float32
bool has_slow_avx512bf16();  // the same, slower than float32
bool has_avxvnni();     // AVX-VNNI, beside AVX2
bool has_amx();         // AMX with 8-bit integers and bfloat16, beside AVX-512, and the system's permission, which this asks for

bool has_dotprod();  // SDOT of arm64
bool has_i8mm();     // USMMLA of arm64

size_t processors();        // of the system, at least 1
size_t first_cache_ways();  // lines that may share a place in the first cache; 0 if unknown

}  // namespace cappy
