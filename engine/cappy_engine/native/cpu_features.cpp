#include "cpu_features.h"

#include <unistd.h>

#include <atomic>
#include <cstdint>

namespace cappy {

size_t processors() {
  static std::atomic<long> found{0};
  if (!found) {
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    found = online > 1 ? online : 1;
  }
  return static_cast<size_t>(found);
}

size_t first_cache_ways() {
#ifdef _SC_LEVEL1_DCACHE_ASSOC
  const long ways = sysconf(_SC_LEVEL1_DCACHE_ASSOC);
  return ways > 0 ? static_cast<size_t>(ways) : 0;
#else
  return 0;
#endif
}

}  // namespace cappy

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>

namespace cappy {
namespace {

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t part) {
  Registers found;
  if (!__get_cpuid_count(leaf, part, &found.a, &found.b, &found.c, &found.d)) return {};
  return found;
}

bool bit(uint32_t bits, int place) { return bits >> place & 1; }

// True if the system saves these registers when it switches threads (XCR0).
bool saves(uint64_t wanted) {
  if (!bit(cpuid(1, 0).c, 27)) return false;  // OSXSAVE
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return ((uint64_t{high} << 32 | low) & wanted) == wanted;
}

constexpr uint64_t YMM = 0x6, ZMM = 0xe6;

}  // namespace

bool has_avx2() {
  Registers basic = cpuid(1, 0), more = cpuid(7, 0);
  return saves(YMM) && bit(basic.c, 12) && bit(basic.c, 28) && bit(more.b, 5);  // FMA, AVX, AVX2
}

bool has_avx512vnni() {
  Registers more = cpuid(7, 0);
  bool has_512 = bit(more.b, 16) && bit(more.b, 17) && bit(more.b, 30) && bit(more.b, 31);  // F, DQ, BW, VL
  return has_avx2() && saves(ZMM) && has_512 && bit(more.c, 11);
}

bool has_amx() {
  constexpr uint64_t TILES = 0x60000;  // XTILECFG and XTILEDATA
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM of Linux 5.16
  const uint32_t features = cpuid(7, 0).d;
  const bool has_tiles = bit(features, 22) && bit(features, 24) && bit(features, 25);  // of bf16, any, of int8
  if (!has_avx512vnni() || !has_tiles || !saves(TILES)) return false;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

bool has_avxvnni() { return has_avx2() && bit(cpuid(7, 1).a, 4); }

namespace {

bool has_avx512bf16() { return has_avx512vnni() && bit(cpuid(7, 1).a, 5); }

// Intel's server cores have AMX for bfloat16 since Sapphire Rapids, the first with AVX512-FP16. Their VDPBF16PS takes two
// cycles, and four multiply-adds of floats compute twice as much in that time. Virtual machines may hide AMX.
bool is_made_for_amx() {
  constexpr uint32_t INTEL = 0x756e6547;  // "Genu" of "GenuineIntel"
  return cpuid(0, 0).b == INTEL && bit(cpuid(7, 0).d, 23);
}

}  // namespace

bool has_fast_avx512bf16() { return has_avx512bf16() && !is_made_for_amx(); }

bool has_slow_avx512bf16() { return has_avx512bf16() && is_made_for_amx(); }

}  // namespace cappy

#elif defined(__aarch64__)
#include <sys/auxv.h>

namespace cappy {

bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }  // HWCAP_ASIMDDP

bool has_i8mm() {
  constexpr unsigned long HWCAPS2 = 26;  // AT_HWCAP2, which not every C library's headers have
  return getauxval(HWCAPS2) >> 13 & 1;   // HWCAP2_I8MM
}

}  // namespace cappy

#endif
