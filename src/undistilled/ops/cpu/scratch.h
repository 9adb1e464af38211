// Memory of a thread that grows to what it needs and stays for its next tile: fresh memory would be cleared each time.
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
};
