// Memory that grows to what is asked for and stays for the next time: fresh memory would be cleared each time.
#pragma once
#include <cstdlib>
#ifdef __linux__
#include <sys/mman.h>
#endif

constexpr long HUGE_PAGE = 2 << 20;

struct Scratch {
  void* held = nullptr;
  long size = 0;
  ~Scratch() { free(held); }
  void* of(long bytes) {
    if (bytes <= size) return held;
    free(held);
    const long page = bytes < 2 * HUGE_PAGE ? 4096 : HUGE_PAGE;   // a pool gives up what is larger, and takes it anew
    held = aligned_alloc(page, size = (bytes + page - 1) / page * page);
#ifdef __linux__
    if (page == HUGE_PAGE) madvise(held, size, MADV_HUGEPAGE);
#endif
    return held;
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
