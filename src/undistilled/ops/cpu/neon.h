// The primitives of simd.h by NEON of AArch64, and by its products of bytes (dotprod) where they are there.
#pragma once
#include <arm_neon.h>
#define HAS_NEON 1
#define ALWAYS __attribute__((always_inline))

// 256 bits as two registers. The compiler would keep a vector of 256 bits in memory, from one operation to the next.
template <class Half, class Lane> struct Pair {
  Half low, high;

  template <class H, class L> ALWAYS explicit operator Pair<H, L>() const { return {(H)low, (H)high}; }   // same bits
  ALWAYS Lane operator[](int i) const {
    constexpr int HERE = 16 / sizeof(Lane);
    return i < HERE ? low[i] : high[i - HERE];
  }
#define EACH(op) ALWAYS friend Pair operator op(Pair a, Pair b) { return {a.low op b.low, a.high op b.high}; }
#define BY(op) ALWAYS friend Pair operator op(Pair a, Lane b) { return {a.low op b, a.high op b}; }
  EACH(+) EACH(-) EACH(*) EACH(/) EACH(&) EACH(|) EACH(^) BY(+) BY(&) BY(<<) BY(>>)
#undef EACH
#undef BY
  ALWAYS Pair& operator+=(Pair b) { return *this = *this + b; }
  ALWAYS Pair& operator^=(Pair b) { return *this = *this ^ b; }
};

typedef Pair<float32x4_t, float> v8;
typedef Pair<int32x4_t, int32_t> i8x;
typedef Pair<uint8x16_t, uint8_t> c32;

template <class V> INLINE V read(const void* p) {
  V v;
  memcpy(&v.low, p, 16), memcpy(&v.high, (const char*)p + 16, 16);
  return v;
}
INLINE void store(float* p, v8 v) { vst1q_f32(p, v.low), vst1q_f32(p + 4, v.high); }
INLINE v8 split(float low, float high) { return {vdupq_n_f32(low), vdupq_n_f32(high)}; }
INLINE v8 fma(v8 a, v8 b, v8 c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
INLINE v8 floats(i8x v) { return {vcvtq_f32_s32(v.low), vcvtq_f32_s32(v.high)}; }

INLINE v8 load_part(const float* p, long count) {
  if (count == 8) return read<v8>(p);
  float all[8] = {};
  memcpy(all, p, count * 4);
  return read<v8>(all);
}

INLINE float sum(v8 v) {
  float32x4_t half = vaddq_f32(v.low, v.high);
  return vpadds_f32(vadd_f32(vget_low_f32(half), vget_high_f32(half)));
}
INLINE void sum_each(v8 a, v8 b, v8 c, v8 d, float* out) {
  auto quarters = [](v8 x, v8 y) {   // two of x, two of y
    float32x4_t p = vaddq_f32(x.low, x.high), q = vaddq_f32(y.low, y.high);
    return vaddq_f32((float32x4_t)vzip1q_f64((float64x2_t)p, (float64x2_t)q),
                     (float32x4_t)vzip2q_f64((float64x2_t)p, (float64x2_t)q));
  };
  vst1q_f32(out, vpaddq_f32(quarters(a, b), quarters(c, d)));
}

// Chosen by comparison: the instructions for it would make NaN of either.
INLINE float32x4_t chosen(uint32x4_t first, float32x4_t a, float32x4_t b) { return vbslq_f32(first, a, b); }
INLINE v8 greater(v8 a, v8 b) {
  return {chosen(vcgtq_f32(a.low, b.low), a.low, b.low), chosen(vcgtq_f32(a.high, b.high), a.high, b.high)};
}
INLINE v8 lesser(v8 a, v8 b) {
  return {chosen(vcltq_f32(a.low, b.low), a.low, b.low), chosen(vcltq_f32(a.high, b.high), a.high, b.high)};
}
INLINE i8x greater(i8x a, i8x b) { return {vmaxq_s32(a.low, b.low), vmaxq_s32(a.high, b.high)}; }

INLINE v8 wide(float16x8_t h) { return {vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)}; }
INLINE i8x wide(int16x8_t v) { return {vmovl_s16(vget_low_s16(v)), vmovl_high_s16(v)}; }
INLINE float half_to_float(uint16_t h) { return vgetq_lane_f32(vcvt_f32_f16((float16x4_t)vdup_n_u16(h)), 0); }
INLINE v8 from_f16(const uint8_t* p) { return wide((float16x8_t)vld1q_u8(p)); }
INLINE i8x from_u16(const uint8_t* p) {
  uint16x8_t h = (uint16x8_t)vld1q_u8(p);
  return {(int32x4_t)vmovl_u16(vget_low_u16(h)), (int32x4_t)vmovl_high_u16(h)};
}
INLINE i8x from_i8(const uint8_t* p) { return wide(vmovl_s8((int8x8_t)vld1_u8(p))); }
INLINE i8x from_u8(const uint8_t* p) { return wide((int16x8_t)vmovl_u8(vld1_u8(p))); }
INLINE v8 from_fp8(const uint8_t* p) {
  return wide((float16x8_t)vandq_s16(vshll_n_s8((int8x8_t)vld1_u8(p), 7), vdupq_n_s16((short)0xbfff)));
}
INLINE void from_fp8(const uint8_t* p, v8* w) { w[0] = from_fp8(p), w[1] = from_fp8(p + 8); }

INLINE void unzip(v8* v) {
  v8 a = v[0], b = v[1];
  v[0] = {vuzp1q_f32(a.low, a.high), vuzp1q_f32(b.low, b.high)};
  v[1] = {vuzp2q_f32(a.low, a.high), vuzp2q_f32(b.low, b.high)};
}
INLINE void bf16s(c32 low, c32 high, v8* w) {
  auto sixteen = [](uint8x16_t l, uint8x16_t h, v8* to) {
    uint8x16_t words[2] = {vzip1q_u8(l, h), vzip2q_u8(l, h)}, none = vdupq_n_u8(0);
    for (int i = 0; i < 2; i++)
      to[i] = {(float32x4_t)vzip1q_u16((uint16x8_t)none, (uint16x8_t)words[i]),
               (float32x4_t)vzip2q_u16((uint16x8_t)none, (uint16x8_t)words[i])};
  };
  sixteen(low.low, high.low, w), sixteen(low.high, high.high, w + 2);
}

template <int BITS> INLINE c32 plane(const uint8_t* w) {
  const uint8x16_t few = vdupq_n_u8((1 << BITS) - 1);
  uint8x16_t low, high;
  if constexpr (BITS == 4) {
    low = vld1q_u8(w), high = vshrq_n_u8(low, 4);
  } else if constexpr (BITS == 2) {
    uint8x8_t b = vld1_u8(w);
    low = vcombine_u8(b, vshr_n_u8(b, 2)), high = vcombine_u8(vshr_n_u8(b, 4), vshr_n_u8(b, 6));
  } else {
    uint32_t four;
    memcpy(&four, w, 4);
    static const int32_t by[8] = {0, -1, -2, -3, -4, -5, -6, -7};   // shifts to the left
    uint32x4_t all = vdupq_n_u32(four);
    low = (uint8x16_t)vshlq_u32(all, vld1q_s32(by)), high = (uint8x16_t)vshlq_u32(all, vld1q_s32(by + 4));
  }
  return {vandq_u8(low, few), vandq_u8(high, few)};
}
template <int BITS> INLINE c32 up(c32 codes) { return {vshlq_n_u8(codes.low, BITS), vshlq_n_u8(codes.high, BITS)}; }

// One instruction finds a byte among 16, 32 or 64.
template <int BITS> struct Lookup {
  static constexpr int TABLES = BITS > 4 ? 1 << (BITS - 4) : 1;
  uint8x16_t tables[TABLES];

  Lookup() {}
  explicit Lookup(const uint8_t* bytes) {
    uint8_t padded[16 * TABLES] = {};
    memcpy(padded, bytes, 1 << BITS);
    for (int t = 0; t < TABLES; t++) tables[t] = vld1q_u8(padded + 16 * t);
  }
  ALWAYS uint8x16_t find(uint8x16_t codes) const {
    if constexpr (TABLES == 1) return vqtbl1q_u8(tables[0], codes);
    else if constexpr (TABLES == 2) return vqtbl2q_u8({{tables[0], tables[1]}}, codes);
    else return vqtbl4q_u8({{tables[0], tables[1], tables[2], tables[3]}}, codes);
  }
  ALWAYS c32 find(c32 codes) const { return {find(codes.low), find(codes.high)}; }
};

INLINE int32x4_t dots(int8x16_t w, int8x16_t x, int32x4_t sum) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, w, x);
#else   // pairs of products have 16 bits
  int32x4_t a = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x))), b = vpaddlq_s16(vmull_high_s8(w, x));
  return vaddq_s32(sum, vpaddq_s32(a, b));
#endif
}
INLINE i8x dots(c32 w, c32 x, i8x sum) {
  return {dots((int8x16_t)w.low, (int8x16_t)x.low, sum.low), dots((int8x16_t)w.high, (int8x16_t)x.high, sum.high)};
}
// The lowest byte of each lane of four.
INLINE c32 narrow(const i8x* v) {
  auto bytes = [](i8x a, i8x b) {
    int16x8_t low = vuzp1q_s16((int16x8_t)a.low, (int16x8_t)a.high);
    int16x8_t high = vuzp1q_s16((int16x8_t)b.low, (int16x8_t)b.high);
    return vuzp1q_u8((uint8x16_t)low, (uint8x16_t)high);
  };
  return {bytes(v[0], v[1]), bytes(v[2], v[3])};
}
