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

// Codes 0..15, from LOWEST on. A group begins with a block of 32.
template <int LOWEST> struct Int4Codes {
  static constexpr int BITS = 4;
  INLINE b32 load(const uint8_t* w, long k) {
    const __m512i FIRST = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512 values = _mm512_cvtepi32_ps(_mm512_add_epi32(FIRST, _mm512_set1_epi32(LOWEST)));
    __m512i table = (__m512i)_mm512_cvtne2ps_pbh(values, values);
    __m128i both = _mm_loadu_si128((const __m128i*)(w + k / 2));
    __m256i codes = _mm256_set_m128i(_mm_srli_epi16(both, 4), both);
    __m512i index = _mm512_cvtepu8_epi16(_mm256_and_si256(codes, _mm256_set1_epi8(15)));
    return (b32)_mm512_permutexvar_epi16(index, table);
  }
  INLINE b32 load_part(const uint8_t* w, long k, long count) {
    return (b32)_mm512_maskz_mov_epi16((1u << count) - 1, (__m512i)load(w, k));
  }
};
