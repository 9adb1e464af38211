// What a unit of stored codes becomes for products by tiles: at<X>() makes what meets X of BLOCK bytes, part<X>() of
// the first `some` codes of them, zeros behind. Values are (bytes + least) times `unit`.
#pragma once
#include "activations.h"

// As far as a unit is 32 bytes; where they are SMALL they are no more than 127 and not negative.
template <class W, bool SMALL> struct ByBytes {
  template <class X> INLINE typename X::Wide at(const W& w, const uint8_t* from) {
    return X::template wide<SMALL>(w.load(from));
  }
};

// As far as units are whole as they are stored.
template <class W> struct Filled {
  template <class X> INLINE typename X::Wide part(const W& w, const uint8_t* from, long) {
    return W::template at<X>(w, from);
  }
};

struct Plain : ByBytes<Plain, false> {   // INT8, FP8
  static constexpr long BLOCK = QUANTUM;
  static constexpr float unit = 1, least = 0;
  INLINE c32 load(const uint8_t* w) { return codes_at(w); }
  template <class X> INLINE typename X::Wide part(const Plain& w, const uint8_t* from, long some) {
    uint8_t padded[QUANTUM] = {0};
    memcpy(padded, from, some);
    return at<X>(w, padded);
  }
};

// Levels as whole numbers of a unit.
template <int BITS> struct Whole {
  static constexpr float least = 0;
  float unit = 1;
  Lookup<BITS> lookup;

  explicit Whole(const float* levels) {
    uint8_t bytes[1 << BITS];
    auto whole = [&](int i) { return levels[i] / unit == (float)(int)(levels[i] / unit); };
    for (int i = 0; i < 1 << BITS; i++)
      while (!whole(i)) unit /= 2;
    for (int i = 0; i < 1 << BITS; i++) bytes[i] = (uint8_t)(int)(levels[i] / unit);
    lookup = Lookup<BITS>(bytes);
  }
};

// Levels that are one apart: codes are multiplied as they are.
struct Steps {
  static constexpr float unit = 1;
  float least;

  explicit Steps(const float* levels) : least(levels[0]) {}
  INLINE bool suits(const float* levels, int count) {
    for (int i = 0; i < count; i++)
      if (levels[i] != levels[0] + i) return false;
    return true;
  }
};

template <int BITS> struct Decoded : Whole<BITS>, ByBytes<Decoded<BITS>, false>, Filled<Decoded<BITS>> {
  static constexpr long BLOCK = 4 * BITS;
  using Whole<BITS>::Whole;
  __attribute__((always_inline)) c32 load(const uint8_t* w) const { return this->lookup.find(codes_of<BITS>(w)); }
};

template <int BITS> struct Counted : Steps, ByBytes<Counted<BITS>, true>, Filled<Counted<BITS>> {
  static constexpr long BLOCK = 4 * BITS;
  using Steps::Steps;
  INLINE c32 load(const uint8_t* w) { return codes_of<BITS>(w); }
};

// The same two for two blocks of 4 bits at once.
struct DecodedNibbles : Whole<4>, Filled<DecodedNibbles> {
  static constexpr long BLOCK = 32;
  using Whole<4>::Whole;
  template <class X> INLINE typename X::Wide at(const DecodedNibbles& w, const uint8_t* from) {
    c32 both = codes_at(from), few = both & 15, above = both >> 4;
    return X::words(w.lookup.find(few), w.lookup.find(above));
  }
};

struct CountedNibbles : Steps, Filled<CountedNibbles> {
  static constexpr long BLOCK = 32;
  using Steps::Steps;
  template <class X> INLINE typename X::Wide at(const CountedNibbles&, const uint8_t* from) {
    return X::words(codes_at(from));
  }
};

// Codes that are unpacked already.
template <class Of> struct Unpacked : Filled<Unpacked<Of>> {
  static constexpr long BLOCK = sizeof(typename Of::Wide);
  template <class X> INLINE typename X::Wide at(const Unpacked&, const uint8_t* from) {
    return *(const typename X::Wide*)from;
  }
};

// Calls f with the decoder of a width, as it meets X.
template <class X, class F> INLINE void with_decoder(const Matrix& a, const Codes& c, F f) {
  if constexpr (X::UNIT == 2 * QUANTUM) {
    Steps::suits(c.levels, 16) ? f(CountedNibbles(c.levels)) : f(made_of<DecodedNibbles>(c.levels));
  } else {
    if (!X::SCALED || a.kind != CODED) return f(Plain());
    with_bits(c.bits, [&](auto bits) {
      constexpr int BITS = decltype(bits)::value;
      summed(a) && Steps::suits(c.levels, 1 << BITS) ? f(Counted<BITS>(c.levels)) : f(made_of<Decoded<BITS>>(c.levels));
    });
  }
}
