// Eight float32 lanes, the loaders that turn eight stored weights into them, and exp.
//
// Every reduction in this directory runs over v8 in an order fixed by the length alone, so
// that a row's bits do not depend on the other rows, on tile sizes or on the thread count.
// What a set of instructions is asked for lies in one file for each: generic.h is the plain
// one. Compiled with -ffp-contract=off: only fma() fuses.
#pragma once
#include <cstdint>
#include <cstring>
#define INLINE static inline __attribute__((always_inline))

// v8 and i8x are eight lanes of float32 and int32, with the operators of GCC's vectors; c32 is 32 bytes, whatever their
// sign; casts between them keep the bits. Primitives:
//   read<V>(p), store(p, v)        32 bytes at any address
//   load_part(p, count)            the first `count` (0..8) floats at p, zeros behind; nothing past them is read
//   split(low, high)               four lanes of each
//   fma(a, b, c)                   a * b + c, rounded once where the target can
//   sum(v), sum_each(a, b, c, d, out)   of lanes, in one fixed tree
//   greater(a, b), lesser(a, b)    lane by lane; b where one of them is NaN
//   floats(v)                      int32 lanes as float32
//   half_to_float(h)               float16 bits to float32, exact for every finite value
//   from_f16(p), from_u16, from_i8, from_u8   eight stored numbers as lanes
//   from_fp8(p)                    e4m3fn bits moved into a float16: the value times 2^-8; (p, w) sixteen of them
//   unzip(v)                       sixteen floats: the even ones, then the odd ones
//   bf16s(low, high, w)            32 BF16, given as their lower and their upper bytes, as four vectors
//   plane<BITS>(w)                 32 codes of 1, 2 or 4 bits as bytes, see scheme/packing.py; up<BITS>: shifted left
//   Lookup<BITS>.find(codes)       a byte for each of 32 codes
//   dots(w, x, sum)                sum + products of signed bytes, four neighbours a lane; x is never -128
//   narrow(v)                      32 int32 lanes, in four vectors, as bytes
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "avx2.h"
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include "neon.h"
#else
#include "generic.h"
#endif

INLINE v8 splat(float f) { return split(f, f); }
INLINE v8 load(const float* p) { return read<v8>(p); }
INLINE void store_part(float* p, v8 v, long count) {
  if (count == 8) return store(p, v);
  v8 some = v;   // which alone lies in memory
  memcpy(p, &some, count * 4);
}

// Loaders. BYTES per weight; load(p) gives STEP / 8 vectors in the order of the row.
struct Fp32 {
  static constexpr int STEP = 8, BYTES = 4;
  INLINE void load(const uint8_t* p, v8* w) { w[0] = ::load((const float*)p); }
};

struct Fp16 {
  static constexpr int STEP = 8, BYTES = 2;
  INLINE void load(const uint8_t* p, v8* w) { w[0] = from_f16(p); }
};

struct Bf16 {
  static constexpr int STEP = 8, BYTES = 2;
  INLINE void load(const uint8_t* p, v8* w) { w[0] = (v8)(from_u16(p) << 16); }
};

// Sixteen of them in fewer instructions: the even ones, then the odd ones.
struct Bf16Pair {
  static constexpr int STEP = 16, BYTES = 2;
  INLINE void load(const uint8_t* p, v8* w) {
    i8x both = read<i8x>(p);
    w[0] = (v8)(both << 16);
    w[1] = (v8)(both & (int)0xffff0000);
  }
};

// The value times 2^-8, exact, subnormals included (the 2^8 is in the block's scale). The NaN
// codes 0x7f and 0xff read as +-480.
struct Fp8 {
  static constexpr int STEP = 8, BYTES = 1;
  INLINE void load(const uint8_t* p, v8* w) { w[0] = from_fp8(p); }
};

// Sixteen of them: fewer instructions for each.
struct Fp8Pair {
  static constexpr int STEP = 16, BYTES = 1;
  INLINE void load(const uint8_t* p, v8* w) { from_fp8(p, w); }
};

struct Int8 {
  static constexpr int STEP = 8, BYTES = 1;
  INLINE void load(const uint8_t* p, v8* w) { w[0] = floats(from_i8(p)); }
};

// Sixteen bytes hold 32 codes 0..15: the low nibbles are elements 0..15, the high 16..31.
struct Int4 {
  static constexpr int STEP = 32, BYTES = 0;
  INLINE void load(const uint8_t* p, v8* w) {
    for (int i = 0; i < 2; i++) {
      i8x both = from_u8(p + 8 * i);
      w[i] = floats(both & 15);
      w[i + 2] = floats(both >> 4);
    }
  }
};

// Byte offset of element k (a multiple of STEP) in a row.
template <class L> INLINE long at(long k) { return L::BYTES ? k * L::BYTES : k / 2; }

// The vectors of the elements k.. of which only `count` < STEP belong to the row.
template <class L> INLINE void load_tail(const uint8_t* p, long count, v8* w) {
  if (L::BYTES == 4) {
    w[0] = load_part((const float*)p, count);
    return;
  }
  uint8_t padded[32] = {0};
  memcpy(padded, p, L::BYTES ? (count & (L::STEP - 1)) * L::BYTES : 16);
  L::load(padded, w);
}

// exp to about one ulp; underflows to 0, overflows to inf, keeps NaN; exp(0) is exactly 1.
INLINE v8 exp8(v8 x) {
  x = lesser(splat(90), greater(splat(-110), x));
  const v8 magic = splat(0x1.8p23f);
  v8 shifted = fma(x, splat(1.44269504f), magic);
  v8 n = shifted - magic;
  v8 r = fma(n, splat(-0x1.62e4p-1f), x);     // ln 2 in two parts, the first of 16 bits
  r = fma(n, splat(-0x1.7f7d1cp-20f), r);
  v8 p = splat(1.f / 5040);
  p = fma(p, r, splat(1.f / 720));
  p = fma(p, r, splat(1.f / 120));
  p = fma(p, r, splat(1.f / 24));
  p = fma(p, r, splat(1.f / 6));
  p = fma(p, r, splat(.5f));
  p = fma(p, r, splat(1.f));
  p = fma(p, r, splat(1.f));
  i8x k = (i8x)shifted - (i8x)magic, half = k >> 1;
  p = p * (v8)((half + 127) << 23);           // 2^k in two factors: k may be outside a float's
  return p * (v8)((k - half + 127) << 23);
}

INLINE v8 silu8(v8 g) { return g / (splat(1) + exp8(splat(0) - g)); }
