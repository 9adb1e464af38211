// The primitives of simd.h in GCC's and Clang's vector extensions, which the compiler lowers to what the target has.
#pragma once

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i8x __attribute__((vector_size(32)));
typedef uint8_t c32 __attribute__((vector_size(32)));

template <class V> INLINE V read(const void* p) { V v; memcpy(&v, p, 32); return v; }
INLINE void store(float* p, v8 v) { memcpy(p, &v, 32); }
INLINE v8 split(float low, float high) { return v8{low, low, low, low, high, high, high, high}; }
INLINE v8 floats(i8x v) { return __builtin_convertvector(v, v8); }

INLINE v8 fma(v8 a, v8 b, v8 c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  v8 r;
  for (int i = 0; i < 8; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}

INLINE v8 load_part(const float* p, long count) {
  v8 v = {};
  memcpy(&v, p, count * 4);
  return v;
}

INLINE float sum(v8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
INLINE void sum_each(v8 a, v8 b, v8 c, v8 d, float* out) {
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}

INLINE v8 greater(v8 a, v8 b) {
  for (int i = 0; i < 8; i++) b[i] = a[i] > b[i] ? a[i] : b[i];
  return b;
}
INLINE v8 lesser(v8 a, v8 b) {
  for (int i = 0; i < 8; i++) b[i] = a[i] < b[i] ? a[i] : b[i];
  return b;
}
INLINE i8x greater(i8x a, i8x b) { return a > b ? a : b; }

INLINE float half_to_float(uint16_t h) {
  uint32_t bits = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
  float f;
  memcpy(&f, &bits, 4);
  f *= 0x1p112f;
  memcpy(&bits, &f, 4);
  if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= sign;
  memcpy(&f, &bits, 4);
  return f;
}
INLINE v8 from_f16(const uint8_t* p) {
  uint16_t h[8];
  v8 v;
  memcpy(h, p, 16);
  for (int i = 0; i < 8; i++) v[i] = half_to_float(h[i]);
  return v;
}
INLINE i8x from_u16(const uint8_t* p) {
  typedef uint16_t u16x8 __attribute__((vector_size(16)));
  u16x8 h;
  memcpy(&h, p, 16);
  return __builtin_convertvector(h, i8x);
}
INLINE i8x from_u8(const uint8_t* p) {
  typedef uint8_t u8x8 __attribute__((vector_size(8)));
  u8x8 b;
  memcpy(&b, p, 8);
  return __builtin_convertvector(b, i8x);
}
INLINE i8x from_i8(const uint8_t* p) { return from_u8(p) << 24 >> 24; }
INLINE v8 from_fp8(const uint8_t* p) { return (v8)(from_i8(p) << 20 & (int)0x87f00000) * 0x1p112f; }
INLINE void from_fp8(const uint8_t* p, v8* w) { w[0] = from_fp8(p), w[1] = from_fp8(p + 8); }

INLINE void unzip(v8* v) {
  float x[16];
  memcpy(x, v, 64);
  for (int i = 0; i < 16; i++) v[i % 2][i / 2] = x[i];
}
INLINE void bf16s(c32 low, c32 high, v8* w) {
  for (int i = 0; i < 32; i++) {
    uint32_t bits = (uint32_t)low[i] << 16 | (uint32_t)high[i] << 24;
    float f;
    memcpy(&f, &bits, 4);
    w[i / 8][i % 8] = f;
  }
}

template <int BITS> INLINE c32 plane(const uint8_t* w) {
  uint8_t codes[32];
  for (int i = 0; i < 32; i++) codes[i] = w[i % (4 * BITS)] >> (i / (4 * BITS) * BITS) & ((1 << BITS) - 1);
  return read<c32>(codes);
}
template <int BITS> INLINE c32 up(c32 codes) { return codes << BITS; }

template <int BITS> struct Lookup {
  uint8_t bytes[1 << BITS];

  Lookup() {}
  explicit Lookup(const uint8_t* from) { memcpy(bytes, from, 1 << BITS); }
  c32 find(c32 codes) const {
    c32 found;
    for (int i = 0; i < 32; i++) found[i] = bytes[codes[i]];
    return found;
  }
};

INLINE i8x dots(c32 w, c32 x, i8x sum) {
  for (int i = 0; i < 32; i++) sum[i / 4] += (int8_t)w[i] * (int8_t)x[i];
  return sum;
}
INLINE c32 narrow(const i8x* v) {
  c32 codes;
  for (int i = 0; i < 32; i++) codes[i] = (uint8_t)v[i / 8][i % 8];
  return codes;
}
