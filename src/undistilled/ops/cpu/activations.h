// What x becomes for products by tiles (integer.cpp): how a row lies, and how UNIT of its inputs meet as many codes.
#pragma once
#include "levels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define HAS_VNNI 1
#else
#define HAS_VNNI 0
#endif

// All: Code, of x; UNIT inputs, SHARE such units to a scale; Wide, a unit's codes of a weight as they meet x,
// which wide() makes of bytes; Sum, in eight lanes of four neighbours each, to which meet() adds a unit's products and
// of which total() makes floats.

// Sums of integers are exact: 128 codes of 8 bits times INT16 need 30 bits.
struct Integers {
  typedef i8x Sum;
  static constexpr bool SCALED = true;

  INLINE Sum none() { return Sum{}; }
  INLINE v8 total(const Sum& sum) { return __builtin_convertvector(sum, v8); }
};

struct ToInt8 : Integers {
  typedef int8_t Code;
  struct Wide { c32 part[1]; };
  static constexpr long UNIT = 32, SHARE = 1;
  static constexpr float LARGEST = 127;

  template <bool> INLINE Wide wide(c32 bytes) { return {{bytes}}; }
  INLINE c32 part(const Code* x, int) { return codes_at(x); }
  INLINE void meet(c32 w, c32 x, Sum& sum) {
#if HAS_AVX2   // a byte of w without its sign meets x with it
    __m256i size = _mm256_abs_epi8((__m256i)w), with = _mm256_sign_epi8((__m256i)x, (__m256i)w);
#if HAS_VNNI
    sum = (i8x)_mm256_dpbusd_epi32((__m256i)sum, size, with);
#else
    sum += (i8x)_mm256_madd_epi16(_mm256_maddubs_epi16(size, with), _mm256_set1_epi16(1));
#endif
#else
    for (int i = 0; i < 32; i++) sum[i / 4] += (int8_t)w[i] * (int8_t)x[i];
#endif
  }
  // 8 codes in each of four vectors.
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

// Not rounded at all, for FP8. A code's bits moved into a float32 are its value times 2^-120, a subnormal where the code
// is one (and 0 where a program has subnormals flushed); x, which must be less than 2^64, is multiplied by TIMES, or
// products would be subnormals too, and scales by what is left. Of four neighbours the last is the first to come out of
// a register, so x lies in that order: 32 inputs in four vectors.
struct AsFloats {
  typedef float Code;
  struct Wide { v8 part[4]; };
  struct Sum { v8 of[2]; };
  static constexpr long UNIT = 32, SHARE = 1l << 40;
  static constexpr bool SCALED = false;
  static constexpr float TIMES = 0x1p64f, REST = 0x1p56f;

  INLINE Sum none() { return {splat(0), splat(0)}; }
  template <bool> INLINE Wide wide(c32 bytes) {
    Wide w;
    UNROLL for (int i = 0; i < 4; i++) w.part[i] = (v8)((i8x)bytes << (8 * i) >> 4 & (int)0x87f00000);
    return w;
  }
  INLINE v8 part(const Code* x, int i) { return load(x + 8 * i); }
  INLINE void meet(v8 w, v8 x, Sum& sum) {   // two sums in turn: one would wait for itself
    v8 next = fma(w, x, sum.of[0]);
    sum = {sum.of[1], next};
  }
  INLINE v8 total(const Sum& sum) { return sum.of[0] + sum.of[1]; }
};

constexpr long LANES = 8;

INLINE long lanes(long count) { return (count + LANES - 1) / LANES * LANES; }
INLINE long padded(const Matrix& a) {
  return a.kind == CODED ? a.tiling.padded : (a.k + QUANTUM - 1) / QUANTUM * QUANTUM;
}

// Sums of x that its product may need: over groups of codes that count from their least level, or have minimums.
INLINE long summed(const Matrix& a) {
  return a.kind == CODED && !a.tiling.order.at && a.group >= QUANTUM ? lanes(a.groups()) : 0;
}

template <class X> struct Row {   // of x, rounded
  const typename X::Code* codes;
  const float *scales, *sums;     // of SHARE units; of x over the matrix' groups

  Row() {}
  Row(const Matrix& a, const void* at)
      : codes((const typename X::Code*)at), scales((const float*)(codes + padded(a))), sums(scales + shares(a)) {}
  static long shares(const Matrix& a) {
    constexpr long SHARE = X::UNIT * X::SHARE;
    return X::SCALED ? (padded(a) + SHARE - 1) / SHARE : 0;
  }
  static long bytes(const Matrix& a) {
    return padded(a) * (long)sizeof(typename X::Code) + 4 * (shares(a) + summed(a));
  }
};

// Calls f with the way in which x meets a matrix.
template <class F> INLINE auto with_activations(const Matrix& a, F f) {
  const Tiling& t = a.tiling;
  bool in_order = a.kind == CODED && t.widths == 1 && !t.order.at, pairs = a.group % 64 == 0 || a.group == 32;
  if (a.rounds == TO_ORDER) return f(AsFloats());
  if (a.rounds == TO_INT8) return f(ToInt8());
  return in_order && pairs && t.codes[0].bits == 4 && t.padded % 64 == 0 ? f(ToNibbles()) : f(ToInt16());
}
