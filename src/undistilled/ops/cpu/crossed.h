// Products of rows of x, rounded to INT16, with codes of 16 outputs side by side in two vectors, a pair of inputs in each
// lane: what matrices that are turned over (crossed.cpp) and those that lie so (across.cpp) share.
#pragma once
#include "panel.h"

#if HAS_AVX2

constexpr int MOST = 6;           // rows of x at a time: their sums, a pair's codes and a pair of x fill 15 registers
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

INLINE c32 pair_of(const int16_t* x) {
  int32_t both;
  memcpy(&both, x, 4);
  return (c32)_mm256_set1_epi32(both);
}

// totals[m] += the runs times MR rows of x.
template <int MR>
__attribute__((noinline)) void block(const Run* runs, long count, const Row<Crossed>* x, float (*totals)[OUTPUTS]) {
  for (const Run* r = runs; r < runs + count; r++) {
    const int16_t* xs[MR];
    i8x sum[MR][2];
    UNROLL for (int m = 0; m < MR; m++) xs[m] = x[m].codes + r->k, sum[m][0] = sum[m][1] = Crossed::none();
    const c32* w = (const c32*)r->codes;
    UNROLL for (int m = 0; m < MR; m++)   // the next rows, of which no stream is to be seen
      UNROLL for (long o = 0; o < 4; o++) __builtin_prefetch(x[m + MR].codes + r->k + 32 * o, 0, 3);
    for (long p = 0; p < r->pairs; p++, w += 2) {
      c32 first = w[0], second = w[1];
      UNROLL for (int m = 0; m < MR; m++) {
        c32 pair = pair_of(xs[m] + 2 * p);
        Crossed::meet(first, pair, sum[m][0]);
        Crossed::meet(second, pair, sum[m][1]);
      }
    }
    long share = r->k / (Crossed::UNIT * Crossed::SHARE);
    UNROLL for (int m = 0; m < MR; m++)
      UNROLL for (int j = 0; j < 2; j++) {
        float* to = totals[m] + 8 * j;
        v8 total = load(to), done = Crossed::total(sum[m][j]) * splat(x[m].scales[share]);
        if (r->lows) total = fma(load(r->lows + 8 * j), splat(x[m].sums[r->group]), total);
        store(to, fma(done, load(r->factors + 8 * j), total));
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
