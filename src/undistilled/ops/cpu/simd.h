// Eight float32 lanes, the loaders that turn eight stored weights into them, and exp.
//
// Every reduction in this directory runs over v8 in an order fixed by the length alone, so
// that a row's bits do not depend on the other rows, on tile sizes or on the thread count.
// AVX2 machines take the intrinsics; others take GCC/Clang vector extensions, which the
// compiler lowers to what the target has. Compiled with -ffp-contract=off: only fma() fuses.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define HAS_AVX2 1
#endif

typedef int32_t i8x __attribute__((vector_size(32)));
typedef uint8_t c32 __attribute__((vector_size(32)));   // bytes, whatever their sign
#if HAS_AVX2
typedef __m256 v8;
#else
typedef float v8 __attribute__((vector_size(32)));
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE v8 splat(float f) { return v8{f, f, f, f, f, f, f, f}; }
INLINE v8 load(const float* p) { v8 v; memcpy(&v, p, 32); return v; }
INLINE void store(float* p, v8 v) { memcpy(p, &v, 32); }

INLINE v8 fma(v8 a, v8 b, v8 c) {
#if HAS_AVX2
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  v8 r;
  for (int i = 0; i < 8; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}

// The first `count` (0..8) floats at p, zeros behind them; nothing past them is read.
INLINE v8 load_part(const float* p, long count) {
#if HAS_AVX2
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), lane));
#else
  v8 v = splat(0);
  memcpy(&v, p, count * 4);
  return v;
#endif
}
INLINE void store_part(float* p, v8 v, long count) { memcpy(p, &v, count * 4); }

// Lane sum in one fixed tree.
INLINE float sum(v8 v) {
#if HAS_AVX2
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
#else
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}

// out[j] = sum() of the j-th of four, by the same tree.
INLINE void sum_each(v8 a, v8 b, v8 c, v8 d, float* out) {
#if HAS_AVX2
  auto halves = [](v8 x, v8 y) {
    return (__m256d)_mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  };
  __m256d ac = halves(a, c), bd = halves(b, d);
  __m256 pairs = _mm256_add_ps((__m256)_mm256_unpacklo_pd(ac, bd), (__m256)_mm256_unpackhi_pd(ac, bd));
  __m128 ab = _mm256_castps256_ps128(pairs), cd = _mm256_extractf128_ps(pairs, 1);
  _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
#else
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
#endif
}

// The greater lane by lane; b where one of them is NaN.
INLINE v8 max8(v8 a, v8 b) {
#if HAS_AVX2
  return _mm256_max_ps(a, b);
#else
  for (int i = 0; i < 8; i++) b[i] = a[i] > b[i] ? a[i] : b[i];
  return b;
#endif
}

// float16 bits to float32, exact for every finite value.
INLINE float half_to_float(uint16_t h) {
#if HAS_AVX2
  return _cvtsh_ss(h);
#else
  uint32_t bits = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
  float f;
  memcpy(&f, &bits, 4);
  f *= 0x1p112f;
  memcpy(&bits, &f, 4);
  if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= sign;
  memcpy(&f, &bits, 4);
  return f;
#endif
}

// Loaders. BYTES per weight; load(p) gives STEP / 8 vectors in the order of the row.
struct Fp32 {
  static constexpr int STEP = 8, BYTES = 4;
  INLINE void load(const uint8_t* p, v8* w) { w[0] = ::load((const float*)p); }
};

struct Fp16 {
  static constexpr int STEP = 8, BYTES = 2;
  INLINE void load(const uint8_t* p, v8* w) {
#if HAS_AVX2
    w[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    uint16_t h[8];
    memcpy(h, p, 16);
    for (int i = 0; i < 8; i++) w[0][i] = half_to_float(h[i]);
#endif
  }
};

struct Bf16 {
  static constexpr int STEP = 8, BYTES = 2;
  INLINE void load(const uint8_t* p, v8* w) {
#if HAS_AVX2
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
#else
    typedef uint16_t u16x8 __attribute__((vector_size(16)));
    u16x8 h;
    memcpy(&h, p, 16);
    w[0] = (v8)(__builtin_convertvector(h, i8x) << 16);
#endif
  }
};

// Sixteen of them in fewer instructions: the even ones, then the odd ones.
struct Bf16Pair {
  static constexpr int STEP = 16, BYTES = 2;
  INLINE void load(const uint8_t* p, v8* w) {
    i8x both;
    memcpy(&both, p, 32);
    w[0] = (v8)(both << 16);
    w[1] = (v8)(both & (int)0xffff0000);
  }
};

// Sixteen floats in that order.
INLINE void unzip(v8* v) {
#if HAS_AVX2
  __m256d even = (__m256d)_mm256_shuffle_ps(v[0], v[1], 0x88), odd = (__m256d)_mm256_shuffle_ps(v[0], v[1], 0xdd);
  v[0] = (v8)_mm256_permute4x64_pd(even, 0xd8);
  v[1] = (v8)_mm256_permute4x64_pd(odd, 0xd8);
#else
  float x[16];
  memcpy(x, v, 64);
  for (int i = 0; i < 16; i++) v[i % 2][i / 2] = x[i];
#endif
}

// Eight signed (or unsigned) bytes as int32 lanes.
INLINE i8x bytes(const uint8_t* p, bool is_signed) {
#if HAS_AVX2
  __m128i b = _mm_loadl_epi64((const __m128i*)p);
  return (i8x)(is_signed ? _mm256_cvtepi8_epi32(b) : _mm256_cvtepu8_epi32(b));
#else
  typedef uint8_t u8x8 __attribute__((vector_size(8)));
  u8x8 b;
  memcpy(&b, p, 8);
  i8x wide = __builtin_convertvector(b, i8x);
  return is_signed ? wide << 24 >> 24 : wide;
#endif
}

// e4m3fn bits moved into a float16: the value times 2^-8, exact, subnormals included (the
// 2^8 is in the block's scale). The NaN codes 0x7f and 0xff read as +-480.
struct Fp8 {
  static constexpr int STEP = 8, BYTES = 1;
  INLINE void load(const uint8_t* p, v8* w) {
#if HAS_AVX2
    __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p));
    w[0] = _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16((short)0xbfff)));
#else
    w[0] = (v8)(bytes(p, true) << 20 & (int)0x87f00000) * splat(0x1p112f);
#endif
  }
};

// Sixteen of them: fewer instructions for each.
struct Fp8Pair {
  static constexpr int STEP = 16, BYTES = 1;
  INLINE void load(const uint8_t* p, v8* w) {
#if HAS_AVX2
    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
    wide = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xbfff));
    w[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(wide));
    w[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(wide, 1));
#else
    for (int i = 0; i < 2; i++) Fp8::load(p + 8 * i, w + i);
#endif
  }
};

struct Int8 {
  static constexpr int STEP = 8, BYTES = 1;
  INLINE void load(const uint8_t* p, v8* w) { w[0] = __builtin_convertvector(bytes(p, true), v8); }
};

// Sixteen bytes hold 32 codes 0..15: the low nibbles are elements 0..15, the high 16..31.
struct Int4 {
  static constexpr int STEP = 32, BYTES = 0;
  INLINE void load(const uint8_t* p, v8* w) {
    for (int i = 0; i < 2; i++) {
      i8x both = bytes(p + 8 * i, false);
      w[i] = __builtin_convertvector(both & 15, v8);
      w[i + 2] = __builtin_convertvector(both >> 4, v8);
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
#if HAS_AVX2
  x = _mm256_min_ps(_mm256_set1_ps(90), _mm256_max_ps(_mm256_set1_ps(-110), x));
#else
  for (int i = 0; i < 8; i++) x[i] = x[i] < -110 ? -110 : x[i] > 90 ? 90 : x[i];
#endif
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
