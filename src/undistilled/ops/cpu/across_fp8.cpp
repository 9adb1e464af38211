// Products of rows of x with FP8 blocks whose outputs lie side by side (FP8_ACROSS): as across.cpp, in float32.
//
// A code's bits moved into a float32 are its value times 2^-120 (activations.h, AsFloats): two shifts and a mask, exact,
// and no products of x are rounded. Outputs of 16 share a scale for each 128 inputs. Of a lane's four codes the first and
// third to come out go to one sum, the others to another: one alone would wait for itself.
#include <cstdlib>
#include "across.h"
#include "panel.h"
#include "scratch.h"
#include "sixteen.h"

void arrange_fp8(const Matrix& a, const float* x, uint16_t* out) {
  for (long i = 0; i < a.k; i += LANES) store((float*)out + i, load(x + i) * splat(AsFloats::TIMES));
}

#if HAS_AVX2

namespace {

constexpr long GROUP = 128;       // inputs that share a scale
constexpr int PLACE[] = {3, 1, 2, 0};   // the input of a lane's codes, from the highest byte on
#if HAS_VNNI
constexpr int SOME = 8;           // rows of x at a time
#else
constexpr int SOME = 3;
#endif

// Calls f(input, codes of 16 outputs as floats) for the four of a vector, in one order.
template <class F> INLINE void each_float(const uint8_t* at, F f) {
  Lanes v = lanes_at(at);
  f(0, PLACE[0], float_bits<0>(v)), f(1, PLACE[1], float_bits<8>(v));
  f(0, PLACE[2], float_bits<16>(v)), f(1, PLACE[3], float_bits<24>(v));
}

struct Strip {   // 16 outputs
  const Matrix& a;
  long n;
  const uint8_t* codes() const { return a.values.at + n * a.k; }
  v16 scale(long g) const {
    return splat16(((const float*)a.scales.at)[n / 128 * a.groups() + g] * AsFloats::REST);
  }
};

template <int MR> INLINE void clear(v16 (&sum)[MR][2]) {
  UNROLL for (int m = 0; m < MR; m++) sum[m][0] = sum[m][1] = splat16(0);
}

// totals[m] += the strip times a row of x, as codes leave a register.
void straight(const Strip& s, const float* x, float* totals) {
  const uint8_t* at = s.codes();
  v16 total = splat16(0), sum[1][2];
  for (long k = 0; k < s.a.k;) {
    v16 f = s.scale(k / GROUP);
    clear(sum);
    for (long end = k + GROUP < s.a.k ? k + GROUP : s.a.k; k < end; k += 4, at += LINE) {
      __builtin_prefetch(at + NEAR, 0, 2);
      each_float(at, [&](int j, int i, v16 w) { sum[0][j] = fma16(w, splat16(x[k + i]), sum[0][j]); });
    }
    total = fma16(plus(sum[0][0], sum[0][1]), f, total);
  }
  store16(totals, total);
}

// The same for MR rows, by a group's codes that were unpacked as they leave it: [input of a lane in order][output].
template <int MR>
__attribute__((noinline)) void block(const float (*w)[OUTPUTS], long k, long count, v16 f, const float* const* x,
                                     float (*totals)[OUTPUTS]) {
  v16 sum[MR][2];
  clear(sum);
  for (long i = k; i < k + count; i += 4, w += 4)
    UNROLL for (int j = 0; j < 4; j++) {
      v16 codes = load16(w[j]);
      UNROLL for (int m = 0; m < MR; m++) sum[m][j % 2] = fma16(codes, splat16(x[m][i + PLACE[j]]), sum[m][j % 2]);
    }
  UNROLL for (int m = 0; m < MR; m++)
    store16(totals[m], fma16(plus(sum[m][0], sum[m][1]), f, load16(totals[m])));
}

template <int MR>
void blocks(const float (*w)[OUTPUTS], long k, long count, v16 f, const float* const* x, long rows,
            float (*totals)[OUTPUTS]) {
  for (; rows >= MR; rows -= MR, x += MR, totals += MR) block<MR>(w, k, count, f, x, totals);
  if constexpr (MR > 1)
    if (rows) blocks<MR - 1>(w, k, count, f, x, rows, totals);
}

void sliced(const Strip& s, const float* const* x, long rows, float (*totals)[OUTPUTS]) {
  alignas(64) float w[GROUP][OUTPUTS];
  const uint8_t* at = s.codes();
  memset(totals, 0, rows * sizeof *totals);
  for (long k = 0; k < s.a.k; k += GROUP) {
    long count = s.a.k - k < GROUP ? s.a.k - k : GROUP;
    for (long i = 0; i < count; i += 4, at += LINE) {
      long j = i;
      each_float(at, [&](int, int, v16 v) { store16(w[j++], v); });
    }
    blocks<SOME>(w, k, count, s.scale(k / GROUP), x, rows, totals);
  }
}

thread_local Scratch scratch;

}  // namespace

void product_fp8(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y) {
  float (*totals)[OUTPUTS] = (float(*)[OUTPUTS])scratch.of(rows * sizeof *totals);
  for (long end = n + count; n < end; n += OUTPUTS) {
    Strip s = {a, n};
    rows == 1 ? straight(s, (const float*)x[0], *totals) : sliced(s, (const float* const*)x, rows, totals);
    for (long m = 0; m < rows; m++) memcpy(y[m] + n, totals[m], sizeof *totals);
  }
}

#else

void product_fp8(const Matrix&, long, long, const uint16_t* const*, long, float* const*) { abort(); }

#endif
