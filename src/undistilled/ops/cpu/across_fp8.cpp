// Products of rows of x with FP8 blocks whose outputs lie side by side (FP8_ACROSS): as across.cpp, in float32.
//
// A code's bits moved into a BF16 are its value times 2^-120, and into a float16 times 2^-8, subnormals too; float32 is
// made of the first by zeros below it, of the second by an instruction. That one takes AMD's processors twice the time;
// on the first, which may be float32's subnormals, Intel's take a hundred times as long for a product. All else is the
// same, the bits of results too unless x is below 2^-60 or so. Nothing of x is rounded. Two inputs of an output lie in
// neighbouring lanes, each with a sum of its own; 16 outputs share a scale for each 128 inputs.
#include <cstdlib>
#include "across.h"
#include "panel.h"
#include "scratch.h"
#include "sixteen.h"

#if HAS_AVX2

namespace {

struct ByBf16 {
  static constexpr float TIMES = AsFloats::TIMES, REST = AsFloats::REST;   // of x, and of scales
  INLINE void floats(Lanes top, v16* out) { from_bf16s(few(down<4>(top), (short)0x87f0), out); }
  INLINE v16 folded(const v16* sum) { return bf16s_folded(sum[0], sum[1]); }
};

struct ByHalf {
  static constexpr float TIMES = 1, REST = 256;
  INLINE void floats(Lanes top, v16* out) { from_halfs(few(down<1>(top), (short)0xbf80), out); }
  INLINE v16 folded(const v16* sum) { return halfs_folded(sum[0], sum[1]); }
};

template <class F> INLINE auto with_floats(F f) {
  static const bool halfs = __builtin_cpu_is("intel");
  return halfs ? f(ByHalf()) : f(ByBf16());
}

constexpr long GROUP = 128;       // inputs that share a scale
#if HAS_VNNI
constexpr int SOME = 8;           // rows of x at a time
#else
constexpr int SOME = 3;
#endif

typedef v16 Pairs[2];   // of 16 outputs, with two inputs each

// Calls f(first input, codes of it and the next) for the four inputs of a vector.
template <class W, class F> INLINE void each_pair(const uint8_t* at, F f) {
  Lanes v = lanes_at(at);
  Pairs w;
  W::floats(low_bytes_up(v), w);
  f(0, w);
  W::floats(v, w);
  f(2, w);
}

struct Strip {   // 16 outputs
  const Matrix& a;
  long n;
  const uint8_t* codes() const { return a.values.at + n * a.k; }
  float scale(long g) const { return ((const float*)a.scales.at)[n / 128 * a.groups() + g]; }
};

template <int MR> INLINE void clear(Pairs (&sum)[MR]) {
  UNROLL for (int m = 0; m < MR; m++) sum[m][0] = sum[m][1] = splat16(0);
}

INLINE void meet(const v16* w, const float* x, Pairs& sum) {
  v16 both = two_of(x);
  UNROLL for (int j = 0; j < 2; j++) sum[j] = fma16(w[j], both, sum[j]);
}

// totals = the strip times a row of x, as codes leave a register.
template <class W> void straight(const Strip& s, const float* x, float* totals) {
  const uint8_t* at = s.codes();
  v16 total = splat16(0);
  Pairs sum[1];
  for (long k = 0; k < s.a.k;) {
    v16 f = splat16(s.scale(k / GROUP) * W::REST);
    clear(sum);
    for (long end = k + GROUP < s.a.k ? k + GROUP : s.a.k; k < end; k += 4, at += LINE) {
      __builtin_prefetch(at + NEAR, 0, 2);
      each_pair<W>(at, [&](int i, const v16* w) { meet(w, x + k + i, sum[0]); });
    }
    total = fma16(W::folded(sum[0]), f, total);
  }
  store16(totals, total);
}

// totals[m] += MR rows of x from input k on times a group's unpacked codes.
template <class W, int MR>
__attribute__((noinline)) void block(const float (*w)[2][OUTPUTS], long k, long count, v16 f, const float* const* x,
                                     float (*totals)[OUTPUTS]) {
  Pairs sum[MR];
  clear(sum);
  for (long i = k; i < k + count; i += 2, w++) {
    Pairs codes = {load16((*w)[0]), load16((*w)[1])};
    UNROLL for (int m = 0; m < MR; m++) meet(codes, x[m] + i, sum[m]);
  }
  UNROLL for (int m = 0; m < MR; m++)
    store16(totals[m], fma16(W::folded(sum[m]), f, load16(totals[m])));
}

template <class W, int MR>
void blocks(const float (*w)[2][OUTPUTS], long k, long count, v16 f, const float* const* x, long rows,
            float (*totals)[OUTPUTS]) {
  for (; rows >= MR; rows -= MR, x += MR, totals += MR) block<W, MR>(w, k, count, f, x, totals);
  if constexpr (MR > 1)
    if (rows) blocks<W, MR - 1>(w, k, count, f, x, rows, totals);
}

template <class W> void sliced(const Strip& s, const float* const* x, long rows, float (*totals)[OUTPUTS]) {
  alignas(64) float w[GROUP / 2][2][OUTPUTS];
  const uint8_t* at = s.codes();
  memset(totals, 0, rows * sizeof *totals);
  for (long k = 0; k < s.a.k; k += GROUP) {
    long count = s.a.k - k < GROUP ? s.a.k - k : GROUP;
    for (long i = 0; i < count; i += 4, at += LINE)
      each_pair<W>(at, [&](int j, const v16* codes) {
        for (int half = 0; half < 2; half++) store16(w[(i + j) / 2][half], codes[half]);
      });
    blocks<W, SOME>(w, k, count, splat16(s.scale(k / GROUP) * W::REST), x, rows, totals);
  }
}

thread_local Scratch scratch;

}  // namespace

void arrange_fp8(const Matrix& a, const float* x, uint16_t* out) {
  with_floats([&](auto w) {
    for (long i = 0; i < a.k; i += LANES) store((float*)out + i, load(x + i) * splat(w.TIMES));
  });
}

void product_fp8(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y) {
  float (*totals)[OUTPUTS] = (float(*)[OUTPUTS])scratch.of(rows * sizeof *totals);
  with_floats([&](auto w) {
    typedef decltype(w) W;
    for (long end = n + count; n < end; n += OUTPUTS) {
      Strip s = {a, n};
      rows == 1 ? straight<W>(s, (const float*)x[0], *totals) : sliced<W>(s, (const float* const*)x, rows, totals);
      for (long m = 0; m < rows; m++) memcpy(y[m] + n, totals[m], sizeof *totals);
    }
  });
}

#else

void arrange_fp8(const Matrix&, const float*, uint16_t*) { abort(); }
void product_fp8(const Matrix&, long, long, const uint16_t* const*, long, float* const*) { abort(); }

#endif
