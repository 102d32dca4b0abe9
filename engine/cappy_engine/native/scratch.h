// Memory that a thread works in.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cappy {

// At least `bytes` for the calling thread, aligned for vectors; null if memory is short. The next call takes the same
// memory, or more: it grows, stays for the thread's next runs, and is freed when the thread ends.
uint8_t* take_scratch(size_t bytes);

}  // namespace cappy
