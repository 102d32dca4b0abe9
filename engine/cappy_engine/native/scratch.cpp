#include "scratch.h"

#include <pthread.h>

#include <cstdlib>

namespace cappy {
namespace {

struct alignas(64) Room {
  size_t bytes;  // behind this
};

// Not a thread_local object with a destructor, which would need a C++ library.
pthread_once_t once = PTHREAD_ONCE_INIT;
pthread_key_t key;
bool has_key = false;

}  // namespace

uint8_t* take_scratch(size_t bytes) {
  pthread_once(&once, [] { has_key = pthread_key_create(&key, free) == 0; });
  if (!has_key) return nullptr;
  Room* room = static_cast<Room*>(pthread_getspecific(key));
  if (!room || room->bytes < bytes) {
    free(room);
    bytes = (bytes + 4095) / 4096 * 4096;
    room = static_cast<Room*>(aligned_alloc(alignof(Room), sizeof(Room) + bytes));
    if (room) room->bytes = bytes;
    if (pthread_setspecific(key, room) != 0) {
      free(room);
      return nullptr;
    }
  }
  return room ? reinterpret_cast<uint8_t*>(room + 1) : nullptr;
}

}  // namespace cappy
