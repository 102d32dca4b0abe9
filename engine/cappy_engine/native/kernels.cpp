#include "kernels.h"

#include <atomic>
#include <cstring>

#include "cpu_features.h"

namespace cappy {
namespace {

const InstructionSet SETS[] = {  // the best first
#if defined(__x86_64__)
    {"avx512", has_avx512vnni, &LINEAR_AVX512VNNI},
    {"avx2", has_avx2, &LINEAR_AVX2},
#endif
    {"scalar", [] { return true; }, &LINEAR_SCALAR},
};

std::atomic<const InstructionSet*> chosen{nullptr};

}  // namespace

const InstructionSet* find_instruction_set(const char* name) {
  for (const InstructionSet& set : SETS)
    if (strcmp(set.name, name) == 0) return set.is_usable() ? &set : nullptr;
  return nullptr;
}

const InstructionSet* chosen_instruction_set() {
  if (const InstructionSet* set = chosen.load()) return set;
  for (const InstructionSet& set : SETS)
    if (set.is_usable()) return &set;
  return nullptr;
}

bool choose_instruction_set(const char* name) {
  const InstructionSet* found = find_instruction_set(name);
  if (found) chosen.store(found);
  return found != nullptr;
}

const char* usable_instruction_sets() {
  static const struct Names {
    char text[128] = "";
    Names() {
      for (const InstructionSet& set : SETS)
        if (set.is_usable()) strcat(strcat(text, *text ? " " : ""), set.name);
    }
  } names;
  return names.text;
}

}  // namespace cappy
