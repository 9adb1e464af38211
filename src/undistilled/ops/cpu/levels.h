// Codes of 2 to 6 bits as bytes, and look-ups of a byte for each of 32.
#pragma once
#include "coded.h"

INLINE c32 codes_at(const void* p) { c32 v; memcpy(&v, p, 32); return v; }

#if HAS_AVX2

// Bytes shifted right by 0, STEP, 2 * STEP ... in turn, those of a copy of the plane each.
template <int BITS> INLINE __m256i plane(const uint8_t* w) {
  const __m256i few = _mm256_set1_epi8((1 << BITS) - 1);
  if constexpr (BITS == 4) {
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)w));
    return _mm256_and_si256(_mm256_srlv_epi64(both, _mm256_setr_epi64x(0, 0, 4, 4)), few);
  } else if constexpr (BITS == 2) {
    int64_t eight;
    memcpy(&eight, w, 8);
    return _mm256_and_si256(_mm256_srlv_epi64(_mm256_set1_epi64x(eight), _mm256_setr_epi64x(0, 2, 4, 6)), few);
  } else {
    int32_t four;
    memcpy(&four, w, 4);
    const __m256i by = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(four), by), few);
  }
}

// The 32 codes of a block, in their order.
template <int BITS> INLINE c32 codes_of(const uint8_t* w) {
  constexpr int REST = BITS - MAIN[BITS];
  __m256i codes = plane<MAIN[BITS]>(w);
  if constexpr (REST > 0)
    codes = _mm256_or_si256(codes, _mm256_slli_epi16(plane<REST>(w + 4 * MAIN[BITS]), MAIN[BITS]));
  return (c32)codes;
}

// A byte for every code: registers hold 16, further bits of a code choose among them.
template <int BITS> struct Lookup {
  static constexpr int TABLES = BITS > 4 ? 1 << (BITS - 4) : 1;
  __m256i tables[TABLES];

  Lookup() {}
  explicit Lookup(const uint8_t* bytes) {
    uint8_t padded[16 * TABLES] = {};
    memcpy(padded, bytes, 1 << BITS);
    for (int t = 0; t < TABLES; t++)
      tables[t] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)padded + t));
  }
  INLINE __m256i sign(__m256i codes, int up) { return _mm256_slli_epi16(codes, up); }
  __attribute__((always_inline)) c32 find(c32 of) const {
    __m256i codes = (__m256i)of, found = _mm256_shuffle_epi8(tables[0], codes);
    if constexpr (TABLES > 1) {
      __m256i odd = sign(codes, 3);
      found = _mm256_blendv_epi8(found, _mm256_shuffle_epi8(tables[1], codes), odd);
      if constexpr (TABLES > 2) {
        __m256i above = _mm256_shuffle_epi8(tables[2], codes);
        above = _mm256_blendv_epi8(above, _mm256_shuffle_epi8(tables[3], codes), odd);
        found = _mm256_blendv_epi8(found, above, sign(codes, 2));
      }
    }
    return (c32)found;
  }
};

#else

template <int BITS> INLINE c32 codes_of(const uint8_t* w) {
  constexpr int REST = BITS - MAIN[BITS];
  uint8_t codes[QUANTUM] = {};
  auto plane = [&](int bits, int up) {
    for (int j = 0; j < 8 / bits; j++)
      for (int i = 0; i < 4 * bits; i++) codes[j * 4 * bits + i] |= (w[i] >> (bits * j) & ((1 << bits) - 1)) << up;
    w += 4 * bits;
  };
  plane(MAIN[BITS], 0);
  if (REST) plane(REST ? REST : 1, MAIN[BITS]);
  return codes_at(codes);
}

template <int BITS> struct Lookup {
  uint8_t bytes[1 << BITS];

  Lookup() {}
  explicit Lookup(const uint8_t* from) { memcpy(bytes, from, 1 << BITS); }
  c32 find(c32 codes) const {
    c32 found;
    for (int i = 0; i < QUANTUM; i++) found[i] = bytes[codes[i]];
    return found;
  }
};

#endif
