// The primitives of simd.h by AVX2, FMA and F16C, and by VNNI where it is there.
#pragma once
#include <immintrin.h>
#define HAS_AVX2 1
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define HAS_VNNI 1
#else
#define HAS_VNNI 0
#endif

typedef __m256 v8;
typedef int32_t i8x __attribute__((vector_size(32)));
typedef uint8_t c32 __attribute__((vector_size(32)));

template <class V> INLINE V read(const void* p) { V v; memcpy(&v, p, 32); return v; }
INLINE void store(float* p, v8 v) { memcpy(p, &v, 32); }
INLINE v8 split(float low, float high) { return v8{low, low, low, low, high, high, high, high}; }
INLINE v8 fma(v8 a, v8 b, v8 c) { return _mm256_fmadd_ps(a, b, c); }
INLINE v8 floats(i8x v) { return _mm256_cvtepi32_ps((__m256i)v); }

INLINE v8 load_part(const float* p, long count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), lane));
}

INLINE float sum(v8 v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

INLINE void sum_each(v8 a, v8 b, v8 c, v8 d, float* out) {
  auto halves = [](v8 x, v8 y) {
    return (__m256d)_mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  };
  __m256d ac = halves(a, c), bd = halves(b, d);
  __m256 pairs = _mm256_add_ps((__m256)_mm256_unpacklo_pd(ac, bd), (__m256)_mm256_unpackhi_pd(ac, bd));
  __m128 ab = _mm256_castps256_ps128(pairs), cd = _mm256_extractf128_ps(pairs, 1);
  _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
}

INLINE v8 greater(v8 a, v8 b) { return _mm256_max_ps(a, b); }
INLINE v8 lesser(v8 a, v8 b) { return _mm256_min_ps(a, b); }
INLINE i8x greater(i8x a, i8x b) { return (i8x)_mm256_max_epi32((__m256i)a, (__m256i)b); }

INLINE float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
INLINE v8 from_f16(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE i8x from_u16(const uint8_t* p) { return (i8x)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE i8x from_i8(const uint8_t* p) { return (i8x)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE i8x from_u8(const uint8_t* p) { return (i8x)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }

INLINE v8 from_fp8(const uint8_t* p) {
  __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p));
  return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16((short)0xbfff)));
}
INLINE void from_fp8(const uint8_t* p, v8* w) {
  __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
  wide = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xbfff));
  w[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(wide));
  w[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(wide, 1));
}

INLINE void unzip(v8* v) {
  __m256d even = (__m256d)_mm256_shuffle_ps(v[0], v[1], 0x88), odd = (__m256d)_mm256_shuffle_ps(v[0], v[1], 0xdd);
  v[0] = (v8)_mm256_permute4x64_pd(even, 0xd8);
  v[1] = (v8)_mm256_permute4x64_pd(odd, 0xd8);
}
INLINE void bf16s(c32 low, c32 high, v8* w) {
  __m256i zero = _mm256_setzero_si256(), l = (__m256i)low, h = (__m256i)high;
  for (int i = 0; i < 2; i++) {
    __m256i words = i ? _mm256_unpackhi_epi8(l, h) : _mm256_unpacklo_epi8(l, h);
    __m256i a = _mm256_unpacklo_epi16(zero, words), b = _mm256_unpackhi_epi16(zero, words);
    w[i] = (v8)_mm256_permute2x128_si256(a, b, 0x20);
    w[i + 2] = (v8)_mm256_permute2x128_si256(a, b, 0x31);
  }
}

template <int BITS> INLINE c32 plane(const uint8_t* w) {
  const __m256i few = _mm256_set1_epi8((1 << BITS) - 1);
  if constexpr (BITS == 4) {
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)w));
    return (c32)_mm256_and_si256(_mm256_srlv_epi64(both, _mm256_setr_epi64x(0, 0, 4, 4)), few);
  } else if constexpr (BITS == 2) {
    int64_t eight;
    memcpy(&eight, w, 8);
    return (c32)_mm256_and_si256(_mm256_srlv_epi64(_mm256_set1_epi64x(eight), _mm256_setr_epi64x(0, 2, 4, 6)), few);
  } else {
    int32_t four;
    memcpy(&four, w, 4);
    const __m256i by = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (c32)_mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(four), by), few);
  }
}
template <int BITS> INLINE c32 up(c32 codes) { return (c32)_mm256_slli_epi16((__m256i)codes, BITS); }

// Registers hold 16 bytes, further bits of a code choose among them.
template <int BITS> struct Lookup {
  static constexpr int TABLES = BITS > 4 ? 1 << (BITS - 4) : 1;
  __m256i tables[TABLES];

  Lookup() {}
  explicit Lookup(const uint8_t* bytes) {
    uint8_t padded[16 * TABLES] = {};
    memcpy(padded, bytes, 1 << BITS);
    for (int t = 0; t < TABLES; t++)
      tables[t] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)padded + t));
  }
  INLINE __m256i sign(__m256i codes, int up) { return _mm256_slli_epi16(codes, up); }
  __attribute__((always_inline)) c32 find(c32 of) const {
    __m256i codes = (__m256i)of, found = _mm256_shuffle_epi8(tables[0], codes);
    if constexpr (TABLES > 1) {
      __m256i odd = sign(codes, 3);
      found = _mm256_blendv_epi8(found, _mm256_shuffle_epi8(tables[1], codes), odd);
      if constexpr (TABLES > 2) {
        __m256i above = _mm256_shuffle_epi8(tables[2], codes);
        above = _mm256_blendv_epi8(above, _mm256_shuffle_epi8(tables[3], codes), odd);
        found = _mm256_blendv_epi8(found, above, sign(codes, 2));
      }
    }
    return (c32)found;
  }
};

// A byte of w without its sign meets x with it.
INLINE i8x dots(c32 w, c32 x, i8x sum) {
  __m256i size = _mm256_abs_epi8((__m256i)w), with = _mm256_sign_epi8((__m256i)x, (__m256i)w);
#if HAS_VNNI
  return (i8x)_mm256_dpbusd_epi32((__m256i)sum, size, with);
#else
  return sum + (i8x)_mm256_madd_epi16(_mm256_maddubs_epi16(size, with), _mm256_set1_epi16(1));
#endif
}
INLINE c32 narrow(const i8x* v) {
  __m256i ab = _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]);
  __m256i cd = _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return (c32)_mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order);
}
