// What x becomes for products by tiles (integer.cpp): how a row lies, and how UNIT of its inputs meet as many codes.
#pragma once
#include "int16.h"

// All: Code, of x; UNIT inputs, SHARE such units to a scale; Wide, a unit's codes of a weight as they meet x,
// which wide() makes of bytes; Sum, in eight lanes of four neighbours each, to which meet() adds a unit's products and
// of which total() makes floats.

struct ToInt8 : Integers {
  typedef int8_t Code;
  struct Wide { c32 part[1]; };
  static constexpr long UNIT = 32, SHARE = 1;
  static constexpr float LARGEST = 127;

  template <bool> INLINE Wide wide(c32 bytes) { return {{bytes}}; }
  INLINE c32 part(const Code* x, int) { return codes_at(x); }
  INLINE void meet(c32 w, c32 x, Sum& sum) { sum = dots(w, x, sum); }
  INLINE void put(const i8x* v, Code* to) {   // 8 codes in each of four vectors
    c32 codes = narrow(v);
    memcpy(to, &codes, 32);
  }
};

#if HAS_AVX2
// Of each four neighbours the order 0, 2, 1, 3, as codes have it that lie across: for coarse.cpp.
struct Coarse : ToInt8 {
  INLINE void put(const i8x* v, Code* to) {
    const long first = 0x0705060403010200, next = first + 0x0808080808080808;
    const __m256i order = _mm256_setr_epi64x(first, next, first, next);
    _mm256_storeu_si256((__m256i*)to, _mm256_shuffle_epi8((__m256i)narrow(v), order));
  }
};
#endif

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
  if (a.kind == ACROSS) return a.tiling.codes[0].bits == 4 ? lanes(a.groups()) : 0;
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
