// Memory that grows to what is asked for and stays for the next time: fresh memory would be cleared each time.
#pragma once
#include <cstdlib>

struct Scratch {
  void* held = nullptr;
  long size = 0;
  ~Scratch() { free(held); }
  void* of(long bytes) {
    if (bytes <= size) return held;
    free(held);
    return held = aligned_alloc(64, size = (bytes + 4095) / 4096 * 4096);
  }
  void keep(long most) {
    if (size <= most) return;
    free(held);
    held = nullptr;
    size = 0;
  }
};

// Cuts pieces of scratch, each on a line of the cache: to be counted, and with the same calls to be placed.
struct Cutter {
  char* at = nullptr;
  template <class T> T* take(long count) {
    T* piece = (T*)at;
    at += (count * (long)sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};
