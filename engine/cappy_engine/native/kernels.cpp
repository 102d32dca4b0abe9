#include "kernels.h"

#include <pthread.h>

#include <cstring>

#include "cpu_features.h"

namespace cappy {
namespace {

const InstructionSet SETS[] = {  // the best first
#if defined(__x86_64__)
    {"amx", has_amx, &LINEAR_AMX, &BF16_AMX, attention_avx512},
    {"avx512bf16", has_fast_avx512bf16, &LINEAR_AVX512VNNI, &BF16_AVX512BF16, attention_avx512},
    {"avx512", has_avx512vnni, &LINEAR_AVX512VNNI, &BF16_AVX512, attention_avx512},
    {"avx512bf16", has_slow_avx512bf16, &LINEAR_AVX512VNNI, &BF16_AVX512BF16, attention_avx512},
    {"avxvnni", has_avxvnni, &LINEAR_AVXVNNI, &BF16_AVX2, attention_avx2},
    {"avx2", has_avx2, &LINEAR_AVX2, &BF16_AVX2, attention_avx2},
#elif defined(__aarch64__)
    {"i8mm", has_i8mm, &LINEAR_I8MM, &BF16_NEON, attention_neon},
    {"dotprod", has_dotprod, &LINEAR_DOTPROD, &BF16_NEON, attention_neon},
    {"neon", [] { return true; }, &LINEAR_NEON, &BF16_NEON, attention_neon},
#endif
    {"scalar", [] { return true; }, &LINEAR_SCALAR, &BF16_SCALAR, attention_scalar},
    {"amx_emulated", [] { return true; }, &LINEAR_AMX_EMULATED, &BF16_AMX_EMULATED, attention_scalar},  // that for AMX, slowly
};

thread_local const InstructionSet* chosen = nullptr;
thread_local size_t threads_chosen = 0;

}  // namespace

const InstructionSet* find_instruction_set(const char* name) {
  for (const InstructionSet& set : SETS)
    if (strcmp(set.name, name) == 0 && set.is_usable()) return &set;
  return nullptr;
}

const InstructionSet* chosen_instruction_set() {
  if (chosen) return chosen;
  for (const InstructionSet& set : SETS)
    if (set.is_usable()) return &set;
  return nullptr;
}

bool choose_instruction_set(const char* name) {
  const InstructionSet* found = find_instruction_set(name);
  if (found) chosen = found;
  return found != nullptr;
}

size_t chosen_threads() { return threads_chosen ? threads_chosen : processors(); }

void choose_threads(size_t threads) { threads_chosen = threads; }

const char* usable_instruction_sets() {
  static char names[128];
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, [] {
    for (const InstructionSet& set : SETS)
      if (set.is_usable()) strcat(strcat(names, *names ? " " : ""), set.name);
  });
  return names;
}

}  // namespace cappy
