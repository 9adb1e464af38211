// Products of rows of x, rounded to INT16, with codes of 16 outputs side by side, a pair of inputs in each lane: what
// matrices that are turned over (crossed.cpp) and those that lie so (across.cpp) share.
#pragma once
#include "panel.h"
#include "sixteen.h"

#if HAS_AVX2

constexpr long SLICE = 512;       // inputs whose codes are unpacked at a time: they stay in the first cache
constexpr long PAIRS = QUANTUM / 2;

// The codes of a unit and 16 outputs: [pair][output], the pair's two words side by side.
typedef int16_t Unit[PAIRS][OUTPUTS][2];

// Inputs that share both scales.
struct Run {
  const Unit* codes;              // from their first pair on
  long k, pairs;                  // the first input
  const float* factors;           // [OUTPUTS]
  const float* lows;              // where a group begins that has them: what is added for each of x in it
  long group;
};

// totals[m] += the runs times MR rows of x.
template <int MR>
__attribute__((noinline)) void block(const Run* runs, long count, const Row<Crossed>* x, float (*totals)[OUTPUTS]) {
  for (const Run* r = runs; r < runs + count; r++) {
    const int16_t* xs[MR];
    Lanes sum[MR];
    UNROLL for (int m = 0; m < MR; m++) xs[m] = x[m].codes + r->k, sum[m] = no_lanes();
    const char* codes = (const char*)r->codes;   // of several units, one behind another
    UNROLL for (int m = 0; m < MR; m++)   // the next rows, of which no stream is to be seen
      UNROLL for (long o = 0; o < 4; o++) __builtin_prefetch(x[m + MR].codes + r->k + 32 * o, 0, 3);
    for (long p = 0; p < r->pairs; p++) {
      Lanes pair = lanes_at(codes + LINE * p);
      UNROLL for (int m = 0; m < MR; m++) {
        meet(pair, pair_of(xs[m] + 2 * p), sum[m]);
        ALONE(sum[m]);   // in its registers, instead of all products first
      }
    }
    long share = r->k / (Crossed::UNIT * Crossed::SHARE);
    UNROLL for (int m = 0; m < MR; m++) {
      v16 total = load16(totals[m]), done = times(floats16(sum[m]), splat16(x[m].scales[share]));
      if (r->lows) total = fma16(load16(r->lows), splat16(x[m].sums[r->group]), total);
      store16(totals[m], fma16(done, load16(r->factors), total));
    }
  }
}

template <int MR>
void blocks(const Run* runs, long count, const Row<Crossed>* x, long rows, float (*totals)[OUTPUTS]) {
  for (; rows >= MR; rows -= MR, x += MR, totals += MR) block<MR>(runs, count, x, totals);
  if constexpr (MR > 1)
    if (rows) blocks<MR - 1>(runs, count, x, rows, totals);
}

#endif
