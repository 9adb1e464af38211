// Products of integers: what their sums are, and INT16 as pairs of words or, on ARM, as two bytes each.
#pragma once
#include "levels.h"

// Sums of integers are exact: 128 codes of 8 bits times INT16 need 30 bits.
struct Integers {
  typedef i8x Sum;
  static constexpr bool SCALED = true;

  INLINE Sum none() { return Sum{}; }
  INLINE v8 total(const Sum& sum) { return floats(sum); }
};

#if HAS_NEON

// NEON multiplies bytes: a code of x is 256 times its upper byte, and its lower one, less 128 so that it has a sign; what
// that takes away is 128 for each of the weight's codes. Four neighbours are a lane of a sum, as they are with words.
struct Words : Integers {
  typedef int16_t Code;
  struct Sum { i8x upper, lower, ones; };
  struct Bytes { c32 upper, lower; };
  static constexpr float LARGEST = 32767;

  INLINE Sum none() { return {i8x{}, i8x{}, i8x{}}; }
  INLINE v8 total(const Sum& s) { return floats((s.upper << 8) + s.lower + (s.ones << 7)); }
  INLINE Bytes part(const Code* x, int i) { return {codes_at(x + 32 * i), codes_at(x + 32 * i + 16)}; }
  INLINE void meet(c32 w, Bytes x, Sum& sum) {
    const c32 one = {vdupq_n_u8(1), vdupq_n_u8(1)};
    sum = {dots(w, x.upper, sum.upper), dots(w, x.lower, sum.lower), dots(w, one, sum.ones)};
  }
  // 32 codes, eight in a vector.
  INLINE void put_bytes(i8x a, i8x b, i8x c, i8x d, Code* to) {
    const i8x v[4] = {a, b, c, d}, above[4] = {a >> 8, b >> 8, c >> 8, d >> 8};
    c32 upper = narrow(above), lower = narrow(v) ^ c32{vdupq_n_u8(128), vdupq_n_u8(128)};
    memcpy(to, &upper, 32), memcpy(to + 16, &lower, 32);
  }
};

struct ToInt16 : Words {
  struct Wide { c32 part[1]; };
  static constexpr long UNIT = 32, SHARE = 4;

  template <bool> INLINE Wide wide(c32 bytes) { return {{bytes}}; }
  INLINE void put(const i8x* v, Code* to) { put_bytes(v[0], v[1], v[2], v[3], to); }
};

// Two blocks of 4 bits: the low nibbles of both, then the high ones. The first block's sums are in lanes 0 to 3, the
// second's in 4 to 7.
struct ToNibbles : Words {
  struct Wide { c32 part[2]; };
  static constexpr long UNIT = 64, SHARE = 2;

  INLINE Wide words(c32 bytes) { return {{bytes & 15, bytes >> 4}}; }   // codes 0..15 as they are
  INLINE Wide words(c32 low, c32 high) { return {{low, high}}; }        // bytes that they became
  INLINE void put(const i8x* v, Code* to) {
    for (int i = 0; i < 2; i++) put_bytes(v[2 * i], v[2 * i + 1], v[2 * i + 4], v[2 * i + 5], to + 32 * i);
  }
};

#else

// Two neighbours of 16 words are a lane of a sum.
struct Words : Integers {
  typedef int16_t Code;
  static constexpr float LARGEST = 32767;

  INLINE c32 part(const Code* x, int i) { return codes_at(x + 16 * i); }
  INLINE void meet(c32 w, c32 x, Sum& sum) {
#if HAS_VNNI
    sum = (i8x)_mm256_dpwssd_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#elif HAS_AVX2
    sum += (i8x)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#else
    int16_t words[2][16];
    memcpy(words[0], &w, 32), memcpy(words[1], &x, 32);
    for (int i = 0; i < 16; i++) sum[i / 2] += words[0][i] * words[1][i];
#endif
  }
};

// Bytes at even places as words, and those at odd ones; SMALL: they have no sign.
template <bool SMALL> INLINE void widen(c32 bytes, c32& even, c32& odd) {
#if HAS_AVX2
  __m256i v = (__m256i)bytes;
  even = (c32)(SMALL ? _mm256_and_si256(v, _mm256_set1_epi16(255)) : _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8));
  odd = (c32)(SMALL ? _mm256_srli_epi16(v, 8) : _mm256_srai_epi16(v, 8));
#else
  int16_t words[2][16];
  for (int i = 0; i < 32; i++) words[i % 2][i / 2] = (int8_t)bytes[i];
  even = codes_at(words[0]), odd = codes_at(words[1]);
#endif
}

// Even codes of a unit, then odd ones: so bytes become words by shifts alone.
struct ToInt16 : Words {
  struct Wide { c32 part[2]; };
  static constexpr long UNIT = 32, SHARE = 4;

  template <bool SMALL> INLINE Wide wide(c32 bytes) {
    Wide w;
    widen<SMALL>(bytes, w.part[0], w.part[1]);
    return w;
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

#if HAS_AVX2
// Unpacked as ToInt16, x in its own order: for crossed.cpp.
struct Crossed : ToInt16 {
  INLINE void put(const i8x* v, Code* to) {
    for (int i = 0; i < 4; i += 2) {
      __m256i words = _mm256_packs_epi32((__m256i)v[i], (__m256i)v[i + 1]);
      _mm256_storeu_si256((__m256i*)(to + 8 * i), _mm256_permute4x64_epi64(words, 0xd8));
    }
  }
};
#endif

// The same for two blocks of 4 bits, whose nibbles are 16 words of four: the words' lowest nibbles, then those above.
// The first block's sums are in lanes 0 to 3, the second's in 4 to 7.
struct ToNibbles : Words {
  struct Wide { c32 part[4]; };
  static constexpr long UNIT = 64, SHARE = 2;

  // Codes 0..15 as they are.
  INLINE Wide words(c32 bytes) {
#if HAS_AVX2
    __m256i v = (__m256i)bytes, few = _mm256_set1_epi16(15);
    return {{(c32)_mm256_and_si256(v, few), (c32)_mm256_and_si256(_mm256_srli_epi16(v, 4), few),
             (c32)_mm256_and_si256(_mm256_srli_epi16(v, 8), few), (c32)_mm256_srli_epi16(v, 12)}};
#else
    int16_t words[4][16];
    for (int i = 0; i < 32; i++)
      for (int j = 0; j < 2; j++) words[i % 2 * 2 + j][i / 2] = bytes[i] >> (4 * j) & 15;
    return {{codes_at(words[0]), codes_at(words[1]), codes_at(words[2]), codes_at(words[3])}};
#endif
  }
  // Bytes that low and high nibbles became.
  INLINE Wide words(c32 low, c32 high) {
    Wide w;
    widen<false>(low, w.part[0], w.part[2]);
    widen<false>(high, w.part[1], w.part[3]);
    return w;
  }
  INLINE void put(const i8x* v, Code* to) {
    Code words[2][32];   // of both blocks: even codes, then odd ones
    for (int b = 0; b < 2; b++) ToInt16::put(v + 4 * b, words[b]);
    for (int i = 0; i < 4; i++)
      for (int b = 0; b < 2; b++) memcpy(to + 16 * i + 8 * b, words[b] + i / 2 * 16 + i % 2 * 8, 16);
  }
};

#endif
