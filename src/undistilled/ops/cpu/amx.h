// Eight tiles of 1 KB and what AMX does with them; Imitated does the same on any processor, for tests.
//   zero<T>(), load<T>(p), store<T>(p)   16 rows of 64 bytes, one behind another
//   meet<C, A, B>()       C[m][n] += the products of 64 bytes of A[m] and those of B for n: four of each row of B
//   meet_bare<C, A, B>()  the same, A's bytes without a sign
#pragma once
#include <cstring>
#include "product.h"

// Every processor with AMX has AVX512_BF16, and a compiler that has that comes with an assembler that knows AMX.
#if HAS_PRODUCTS && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

struct Imitated {
  int32_t tiles[8][16][16];

  template <int T> void zero() { memset(tiles[T], 0, sizeof tiles[T]); }
  template <int T> void load(const void* from) { memcpy(tiles[T], from, sizeof tiles[T]); }
  template <int T> void store(void* to) const { memcpy(to, tiles[T], sizeof tiles[T]); }
  template <int C, int A, int B, class Of> void add() {
    const Of* a = (const Of*)tiles[A];
    const int8_t* b = (const int8_t*)tiles[B];
    for (int m = 0; m < 16; m++)
      for (int n = 0; n < 16; n++)
        for (int k = 0; k < 64; k++) tiles[C][m][n] += a[64 * m + k] * b[64 * (k / 4) + 4 * n + k % 4];
  }
  template <int C, int A, int B> void meet() { add<C, A, B, int8_t>(); }
  template <int C, int A, int B> void meet_bare() { add<C, A, B, uint8_t>(); }
};

#if HAS_AMX
struct Amx {
  struct alignas(64) Shape {      // of palette 1
    uint8_t palette = 1, start = 0, none[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };

  Amx() {
    Shape shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Amx() { asm volatile("tilerelease"); }
  template <int T> INLINE void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
  template <int T> INLINE void load(const void* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(64l), "i"(T) : "memory");
  }
  template <int T> INLINE void store(void* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(64l), "i"(T) : "memory");
  }
  template <int C, int A, int B> INLINE void meet() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
  template <int C, int A, int B> INLINE void meet_bare() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};
#endif
