// Stored codes as BF16, 32 at a time and exact: what product.cpp multiplies.
#pragma once
#include <immintrin.h>
#include "simd.h"

typedef __m512bh b32;   // 32 BF16

// Loaders of 32 codes from the k-th of a row on, and of the first `count` < 32 of them, zeros behind.
struct AsBf16 {
  typedef uint16_t Code;
  static constexpr int BITS = 16;
  INLINE b32 load(const uint8_t* w, long k) { return (b32)_mm512_loadu_si512((const Code*)w + k); }
  INLINE b32 load_part(const uint8_t* w, long k, long count) {
    return (b32)_mm512_maskz_loadu_epi16((1u << count) - 1, (const Code*)w + k);
  }
};

template <class B> struct Bytes {
  static constexpr int BITS = 8;
  INLINE b32 load(const uint8_t* w, long k) { return B::wide(_mm256_loadu_si256((const __m256i*)(w + k))); }
  INLINE b32 load_part(const uint8_t* w, long k, long count) {
    return B::wide(_mm256_maskz_loadu_epi8((1u << count) - 1, w + k));
  }
};

struct Int8Codes : Bytes<Int8Codes> {
  INLINE b32 wide(__m128i low, __m128i high) {
    auto floats = [](__m128i v) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(v)); };
    return _mm512_cvtne2ps_pbh(floats(high), floats(low));
  }
  INLINE b32 wide(__m256i v) { return wide(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)); }
  INLINE b32 load(const uint8_t* w, long k) {   // halves straight from memory: an instruction less of six
    return wide(_mm_loadu_si128((const __m128i*)(w + k)), _mm_loadu_si128((const __m128i*)(w + k + 16)));
  }
};

// As simd.h's Fp8: through float16, the value times 2^-8.
struct Fp8Codes : Bytes<Fp8Codes> {
  INLINE b32 wide(__m256i v) {
    __m512i half = _mm512_slli_epi16(_mm512_cvtepi8_epi16(v), 7);
    half = _mm512_and_si512(half, _mm512_set1_epi16((short)0xbfff));
    __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    return _mm512_cvtne2ps_pbh(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), low);
  }
};

// Position p of a register gets code FIRST[p] of 32: 128 bits of even codes, then of odd ones, of the first and second
// half of the block in turn. So lie 16 bytes of nibbles when each 128 bits are shifted by 4 more, and 8 bytes of pairs
// of bits when each 64 bits are shifted by 2 more; see scheme/packing.py.
constexpr uint16_t FIRST[32] = {0, 2, 4, 6, 8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                1, 3, 5, 7, 9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};

// 32 codes of 2 to 6 bits as their levels, in the order of FIRST.
template <int BITS> struct Decoder {
  static constexpr int FOUR = BITS >= 4, REST = BITS - (FOUR ? 4 : 2);   // planes: 4 or 2 bits, and the rest
  __m512i low, high, shifts, rest;   // levels by the 5 lowest bits of a word: of the first half, of the second

  explicit Decoder(const float* levels) {
    constexpr int HALF = REST ? 1 << (BITS - 1) : 0, REACH = (REST ? HALF : 1 << BITS) - 1;
    float low_levels[32], high_levels[32];
    uint16_t by[32], of_rest[32];
    for (int i = 0; i < 32; i++) {
      low_levels[i] = levels[i & REACH];
      high_levels[i] = levels[HALF + (i & REACH)];
      by[i] = FOUR ? i / 8 * 4 : i / 4 * 2;
      of_rest[i] = REST == 1 ? 1 << (i / 16 * 8 + FIRST[i] / 4) : i / 4 * 2;
    }
    auto table = [](const float* f) {
      return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(f + 16), _mm512_loadu_ps(f));
    };
    low = table(low_levels);
    high = table(high_levels);
    shifts = _mm512_loadu_si512(by);
    rest = _mm512_loadu_si512(of_rest);
  }
  __attribute__((always_inline)) b32 load(const uint8_t* w) const {
    int64_t eight;
    int32_t four;
    if constexpr (!FOUR) memcpy(&eight, w, 8);
    __m512i bytes = FOUR ? _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)w)) : _mm512_set1_epi64(eight);
    __m512i index = _mm512_srlv_epi16(bytes, shifts);
    if constexpr (REST == 0) return (b32)_mm512_permutexvar_epi16(index, low);
    const uint8_t* plane = w + (FOUR ? 16 : 8);
    if constexpr (REST == 1) {
      memcpy(&four, plane, 4);
      __mmask32 second = _mm512_test_epi16_mask(_mm512_set1_epi32(four), rest);
      return (b32)_mm512_mask_permutexvar_epi16(_mm512_permutexvar_epi16(index, low), second, index, high);
    }
    memcpy(&eight, plane, 8);
    __m512i above = _mm512_slli_epi16(_mm512_srlv_epi16(_mm512_set1_epi64(eight), rest), 4);
    index = _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), index, above, 0xca);   // 15 ? index : above, by bits
    return (b32)_mm512_permutex2var_epi16(low, index, high);
  }
};
