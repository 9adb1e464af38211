// Decoders (strip.h) of INT8 and codes of 4 bits that lie across, for x rounded to INT16: a step is a pair of inputs,
// two words of a lane. fours() has a step of four inputs, bytes of a lane in the order 0, 2, 1, 3.
#pragma once
#include "strip.h"

#if HAS_AVX2

struct Eights {
  static constexpr float unit = 1, least = 0;
  typedef Fp32 Scale;
  static constexpr long BLOCK = 512;
  template <class F> INLINE void each(const Eights&, const uint8_t* w, F f) {
    UNROLL for (int q = 0; q < 8; q++) {
      Lanes even, odd;
      widen(lanes_at(w + 64 * q), even, odd);
      f(2 * q, even), f(2 * q + 1, odd);
    }
  }
  template <class F> INLINE void fours(const Eights&, const uint8_t* w, F f) {
    UNROLL for (int q = 0; q < 8; q++) f(q, lanes_at(w + 64 * q));
  }
};

struct CountedPairs : CountedFours {
  using CountedFours::CountedFours;
  template <class F> INLINE void each(const CountedPairs&, const uint8_t* w, F f) {
    UNROLL for (int q = 0; q < 4; q++) {
      Lanes v = lanes_at(w + 64 * q);
      f(4 * q, few(v, 15)), f(4 * q + 1, few(right<8>(v), 15));
      f(4 * q + 2, few(right<4>(v), 15)), f(4 * q + 3, right<12>(v));
    }
  }
  template <class F> INLINE void fours(const CountedPairs&, const uint8_t* w, F f) {
    UNROLL for (int q = 0; q < 4; q++) {
      Lanes v = lanes_at(w + 64 * q);
      f(2 * q, few(v, 0x0f0f)), f(2 * q + 1, few(right<4>(v), 0x0f0f));
    }
  }
};

struct DecodedFours : Whole<4> {
  using Whole<4>::Whole;
  typedef void Scale;   // of any format
  static constexpr long BLOCK = 256;
  template <class F> INLINE void each(const DecodedFours& w, const uint8_t* from, F f) {
    UNROLL for (int q = 0; q < 4; q++) {
      Lanes v = lanes_at(from + 64 * q), even, odd;
      widen(found(w.lookup, few(v, 0x0f0f)), even, odd);
      f(4 * q, even), f(4 * q + 1, odd);
      widen(found(w.lookup, few(right<4>(v), 0x0f0f)), even, odd);
      f(4 * q + 2, even), f(4 * q + 3, odd);
    }
  }
  template <class F> INLINE void fours(const DecodedFours& w, const uint8_t* from, F f) {
    UNROLL for (int q = 0; q < 4; q++) {
      Lanes v = lanes_at(from + 64 * q);
      f(2 * q, found(w.lookup, few(v, 0x0f0f))), f(2 * q + 1, found(w.lookup, few(right<4>(v), 0x0f0f)));
    }
  }
};

template <class F> void with_codes(const Matrix& a, F f) {
  const Codes& c = a.tiling.codes[0];
  if (c.bits == 8) return f(Eights());
  Steps::suits(c.levels, 16) ? f(CountedPairs(c.levels)) : f(made_of<DecodedFours>(c.levels));
}

#endif
