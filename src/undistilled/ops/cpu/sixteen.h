// Sixteen lanes of 32 bits, an output each: a register of AVX-512, or two of AVX2.
//   Lanes, v16            int32, of which halves and bytes are codes; float32
//   lanes_at(p), step_of(x)   64 bytes at any address; 4 bytes of x in every lane
//   few(v, mask), right<N>(v)   the bits of `mask` in each word; words shifted right, zeros above
//   widen(bytes, even, odd)   bytes at even places as words with their sign, and those at odd ones
//   found(lookup, codes)      a byte for each of 64 codes of 4 bits
//   meet_words(w, x, sum)     sum + the products of both words of a lane; plus(a, b)
//   meet_bytes(w, x, sum), whole_bytes(sum)   the same of four bytes, w's without a sign: two words of a lane may hold
//                         the sum, 32767 each; the sum in each lane
//   load16, store16, splat16, times, fma16, floats16   as v8 has them
//   half_precision(p)     16 float16
//   times_256(v)          of each lane
//   down<N>(v), low_bytes_up(v)   words shifted right, their sign above; left by a byte
//   from_halfs(words, out), from_bf16s   both words of each output as floats, side by side, in two v16
//   two_of(x)             two neighbours of x for them
//   halfs_folded(a, b), bf16s_folded   the sums of both of each of 16 outputs
#pragma once
#include "decoders.h"

#if HAS_AVX2
#if HAS_VNNI
#pragma GCC diagnostic ignored "-Wuninitialized"   // GCC 12 sees both inside its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

typedef __m512i Lanes;
typedef __m512 v16;
constexpr int MOST = 12;          // rows of x at a time: their sums wait for none of them

INLINE Lanes lanes_at(const void* p) { return _mm512_loadu_si512(p); }
INLINE void put_lanes(void* p, Lanes v) { _mm512_storeu_si512(p, v); }
INLINE Lanes no_lanes() { return _mm512_setzero_si512(); }
INLINE Lanes step_of(const void* x) {
  int32_t step;
  memcpy(&step, x, 4);
  return _mm512_set1_epi32(step);
}
INLINE Lanes few(Lanes v, short mask) { return _mm512_and_si512(v, _mm512_set1_epi16(mask)); }
template <int N> INLINE Lanes right(Lanes v) { return _mm512_srli_epi16(v, N); }
INLINE void widen(Lanes v, Lanes& even, Lanes& odd) {
  even = _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8);
  odd = _mm512_srai_epi16(v, 8);
}
INLINE Lanes found(const Lookup<4>& of, Lanes codes) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm256_castsi256_si128(of.tables[0])), codes);
}
INLINE void meet_words(Lanes w, Lanes x, Lanes& sum) { sum = _mm512_dpwssd_epi32(sum, w, x); }
INLINE void meet_bytes(Lanes w, Lanes x, Lanes& sum) { sum = _mm512_dpbusd_epi32(sum, w, x); }
INLINE Lanes whole_bytes(Lanes sum) { return sum; }
INLINE Lanes plus(Lanes a, Lanes b) { return _mm512_add_epi32(a, b); }
INLINE Lanes times_256(Lanes v) { return _mm512_slli_epi32(v, 8); }

INLINE v16 load16(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store16(float* p, v16 v) { _mm512_storeu_ps(p, v); }
INLINE v16 splat16(float f) { return _mm512_set1_ps(f); }
INLINE v16 times(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
INLINE v16 fma16(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE v16 floats16(Lanes v) { return _mm512_cvtepi32_ps(v); }
INLINE v16 half_precision(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
template <int N> INLINE Lanes down(Lanes v) { return _mm512_srai_epi16(v, N); }
INLINE Lanes low_bytes_up(Lanes v) { return _mm512_slli_epi16(v, 8); }
INLINE v16 two_of(const float* x) {
  double both;
  memcpy(&both, x, 8);
  return (v16)_mm512_set1_pd(both);
}
INLINE void from_halfs(Lanes words, v16* out) {
  out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
  out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
}
INLINE v16 halfs_folded(v16 a, v16 b) {
  const __m512i EVEN = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_add_ps(_mm512_permutex2var_ps(a, EVEN, b),
                       _mm512_permutex2var_ps(a, _mm512_add_epi32(EVEN, _mm512_set1_epi32(1)), b));
}
INLINE void from_bf16s(Lanes words, v16* out) {
  out[0] = (v16)_mm512_unpacklo_epi16(no_lanes(), words);
  out[1] = (v16)_mm512_unpackhi_epi16(no_lanes(), words);
}
INLINE v16 bf16s_folded(v16 a, v16 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}
#define ALONE(sum) asm("" : "+v"(sum))

#else

struct Lanes { __m256i of[2]; };
struct v16 { v8 of[2]; };
constexpr int MOST = 6;           // rows of x at a time: their sums, a pair's codes and a pair of x fill 15 registers

template <class F> INLINE Lanes each_half(F f) { return {{f(0), f(1)}}; }
template <class F> INLINE v16 each_eight(F f) { return {{f(0), f(1)}}; }

INLINE Lanes lanes_at(const void* p) {
  return each_half([&](int i) { return _mm256_loadu_si256((const __m256i*)p + i); });
}
INLINE void put_lanes(void* p, Lanes v) {   // apart: a copy of the whole would go by way of other registers
  for (int i = 0; i < 2; i++) _mm256_storeu_si256((__m256i*)p + i, v.of[i]);
}
INLINE Lanes no_lanes() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
INLINE Lanes step_of(const void* x) {
  int32_t step;
  memcpy(&step, x, 4);
  __m256i v = _mm256_set1_epi32(step);
  return {{v, v}};
}
INLINE Lanes few(Lanes v, short mask) {
  return each_half([&](int i) { return _mm256_and_si256(v.of[i], _mm256_set1_epi16(mask)); });
}
template <int N> INLINE Lanes right(Lanes v) {
  return each_half([&](int i) { return _mm256_srli_epi16(v.of[i], N); });
}
INLINE void widen(Lanes v, Lanes& even, Lanes& odd) {
  even = each_half([&](int i) { return _mm256_srai_epi16(_mm256_slli_epi16(v.of[i], 8), 8); });
  odd = each_half([&](int i) { return _mm256_srai_epi16(v.of[i], 8); });
}
INLINE Lanes found(const Lookup<4>& of, Lanes codes) {
  return each_half([&](int i) { return _mm256_shuffle_epi8(of.tables[0], codes.of[i]); });
}
INLINE void meet_words(Lanes w, Lanes x, Lanes& sum) {
  sum = each_half([&](int i) { return _mm256_add_epi32(sum.of[i], _mm256_madd_epi16(w.of[i], x.of[i])); });
}
INLINE void meet_bytes(Lanes w, Lanes x, Lanes& sum) {
  sum = each_half([&](int i) { return _mm256_add_epi16(sum.of[i], _mm256_maddubs_epi16(w.of[i], x.of[i])); });
}
INLINE Lanes whole_bytes(Lanes sum) {
  return each_half([&](int i) { return _mm256_madd_epi16(sum.of[i], _mm256_set1_epi16(1)); });
}
INLINE Lanes plus(Lanes a, Lanes b) {
  return each_half([&](int i) { return _mm256_add_epi32(a.of[i], b.of[i]); });
}
INLINE Lanes times_256(Lanes v) {
  return each_half([&](int i) { return _mm256_slli_epi32(v.of[i], 8); });
}

INLINE v16 load16(const float* p) { return {{load(p), load(p + 8)}}; }
INLINE void store16(float* p, v16 v) { store(p, v.of[0]), store(p + 8, v.of[1]); }
INLINE v16 splat16(float f) { return {{splat(f), splat(f)}}; }
INLINE v16 times(v16 a, v16 b) {
  return each_eight([&](int i) { return a.of[i] * b.of[i]; });
}
INLINE v16 fma16(v16 a, v16 b, v16 c) {
  return each_eight([&](int i) { return fma(a.of[i], b.of[i], c.of[i]); });
}
INLINE v16 floats16(Lanes v) {
  return each_eight([&](int i) { return _mm256_cvtepi32_ps(v.of[i]); });
}
INLINE v16 half_precision(const uint8_t* p) { return {{from_f16(p), from_f16(p + 16)}}; }
template <int N> INLINE Lanes down(Lanes v) {
  return each_half([&](int i) { return _mm256_srai_epi16(v.of[i], N); });
}
INLINE Lanes low_bytes_up(Lanes v) {
  return each_half([&](int i) { return _mm256_slli_epi16(v.of[i], 8); });
}
INLINE v16 two_of(const float* x) {
  v8 v = (v8)_mm256_broadcast_sd((const double*)x);
  return {{v, v}};
}
INLINE void from_halfs(Lanes words, v16* out) {
  for (int i = 0; i < 2; i++)
    out[i] = {{_mm256_cvtph_ps(_mm256_castsi256_si128(words.of[i])),
               _mm256_cvtph_ps(_mm256_extracti128_si256(words.of[i], 1))}};
}
INLINE v16 bf16s_folded(v16 a, v16 b) {
  return {{_mm256_hadd_ps(a.of[0], a.of[1]), _mm256_hadd_ps(b.of[0], b.of[1])}};
}
INLINE v16 halfs_folded(v16 a, v16 b) {
  v16 v = bf16s_folded(a, b);
  return each_eight([&](int i) { return (v8)_mm256_permute4x64_pd((__m256d)v.of[i], 0xd8); });
}
INLINE void from_bf16s(Lanes words, v16* out) {
  const __m256i zero = _mm256_setzero_si256();
  for (int i = 0; i < 2; i++)
    out[i] = {{(v8)_mm256_unpacklo_epi16(zero, words.of[i]), (v8)_mm256_unpackhi_epi16(zero, words.of[i])}};
}
#define ALONE(sum) asm("" : "+x"(sum.of[0]), "+x"(sum.of[1]))

#endif
#endif
