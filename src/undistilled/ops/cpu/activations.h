// What x becomes for products by tiles (integer.cpp): how it lies and meets 32 codes of a weight.
#pragma once
#include "levels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define HAS_VNNI 1
#else
#define HAS_VNNI 0
#endif

// All: Code, of x; Wide, 32 codes of a weight as they meet x, which wide() makes of bytes; Sum, of a tile, to which
// meet() adds 32 products in eight lanes, of four neighbours each, and which total() makes floats of.

// Those of integers: bytes are -128..127 or, where SMALL, 0..127; dot() is exact; put() writes 32 codes of x, 8 in each
// of four vectors.
template <class X> struct Scaled {
  typedef v8 Sum;
  static constexpr bool SCALED = true;

  INLINE Sum none() { return splat(0); }
  template <class Wide, class Code> INLINE void meet(const Wide& w, const Code* x, float scale, Sum& sum) {
    sum = fma(__builtin_convertvector(X::dot(w, x), v8), splat(scale), sum);
  }
  INLINE v8 total(const Sum& sum) { return sum; }
};

struct ToInt8 : Scaled<ToInt8> {
  typedef int8_t Code;
  typedef c32 Wide;
  static constexpr float LARGEST = 127;

  template <bool> INLINE Wide wide(c32 bytes) { return bytes; }
  INLINE i8x dot(const Wide& w, const Code* x) {
#if HAS_AVX2   // a byte of w without its sign meets x with it
    __m256i size = _mm256_abs_epi8((__m256i)w), with = _mm256_sign_epi8((__m256i)codes_at(x), (__m256i)w);
#if HAS_VNNI
    return (i8x)_mm256_dpbusd_epi32(_mm256_setzero_si256(), size, with);
#else
    return (i8x)_mm256_madd_epi16(_mm256_maddubs_epi16(size, with), _mm256_set1_epi16(1));
#endif
#else
    i8x total = {};
    for (int i = 0; i < 32; i++) total[i / 4] += (int8_t)w[i] * x[i];
    return total;
#endif
  }
  INLINE void put(const i8x* v, Code* to) {
#if HAS_AVX2
    __m256i ab = _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]);
    __m256i cd = _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order));
#else
    for (int i = 0; i < 32; i++) to[i] = (Code)v[i / 8][i % 8];
#endif
  }
};

// Even codes of a block, then odd ones: so bytes become words by shifts alone.
struct ToInt16 : Scaled<ToInt16> {
  typedef int16_t Code;
  struct Wide { c32 even, odd; };
  static constexpr float LARGEST = 32767;

  template <bool SMALL> INLINE Wide wide(c32 bytes) {
#if HAS_AVX2
    __m256i v = (__m256i)bytes;
    if (SMALL) return {(c32)_mm256_and_si256(v, _mm256_set1_epi16(255)), (c32)_mm256_srli_epi16(v, 8)};
    return {(c32)_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), (c32)_mm256_srai_epi16(v, 8)};
#else
    int16_t words[2][16];
    for (int i = 0; i < 32; i++) words[i % 2][i / 2] = (int8_t)bytes[i];
    return {codes_at(words[0]), codes_at(words[1])};
#endif
  }
  INLINE i8x dot(const Wide& w, const Code* x) {
#if HAS_VNNI
    __m256i even = _mm256_madd_epi16((__m256i)w.even, (__m256i)codes_at(x));
    return (i8x)_mm256_dpwssd_epi32(even, (__m256i)w.odd, (__m256i)codes_at(x + 16));
#elif HAS_AVX2
    return (i8x)_mm256_madd_epi16((__m256i)w.even, (__m256i)codes_at(x)) +
           (i8x)_mm256_madd_epi16((__m256i)w.odd, (__m256i)codes_at(x + 16));
#else
    int16_t words[2][16];
    memcpy(words, &w, 64);
    i8x total = {};
    for (int i = 0; i < 32; i++) total[i % 16 / 2] += words[i / 16][i % 16] * x[i];
    return total;
#endif
  }
  INLINE void put(const i8x* v, Code* to) {
#if HAS_AVX2
    auto pack = [](i8x a, i8x b) {   // words in order
      return _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)a, (__m256i)b), 0xd8);
    };
    __m256i a = pack(v[0], v[1]), b = pack(v[2], v[3]);
    auto low = [](__m256i w) { return (i8x)_mm256_srai_epi32(_mm256_slli_epi32(w, 16), 16); };
    auto high = [](__m256i w) { return (i8x)_mm256_srai_epi32(w, 16); };
    _mm256_storeu_si256((__m256i*)to, pack(low(a), low(b)));
    _mm256_storeu_si256((__m256i*)(to + 16), pack(high(a), high(b)));
#else
    for (int i = 0; i < 32; i++) to[i % 2 * 16 + i / 2] = (Code)v[i / 8][i % 8];
#endif
  }
};

// Not rounded at all, for FP8. A code's bits moved into a float32 are its value times 2^-120, a subnormal where the code
// is one (and 0 where a program has subnormals flushed); x, which must be less than 2^64, is multiplied by it, or products would be subnormals too, and UNIT by what is left. Of four neighbours the
// last is the first to come out of a register, so x lies in that order: 32 inputs in four vectors.
struct AsFloats {
  typedef float Code;
  struct Wide { v8 part[4]; };
  struct Sum { v8 of[2]; };
  static constexpr bool SCALED = false;
  static constexpr float TIMES = 0x1p64f, UNIT = 0x1p56f;

  INLINE Sum none() { return {splat(0), splat(0)}; }
  template <bool> INLINE Wide wide(c32 bytes) {
    Wide w;
    UNROLL for (int i = 0; i < 4; i++) w.part[i] = (v8)((i8x)bytes << (8 * i) >> 4 & (int)0x87f00000);
    return w;
  }
  INLINE void meet(const Wide& w, const Code* x, float, Sum& sum) {
    UNROLL for (int i = 0; i < 4; i++) sum.of[i % 2] = fma(w.part[i], load(x + 8 * i), sum.of[i % 2]);
  }
  INLINE v8 total(const Sum& sum) { return sum.of[0] + sum.of[1]; }
};
