// Products of rows of x, rounded to integers, with unpacked codes of 16 outputs side by side, in each lane those of a
// step of inputs: a pair of words or four bytes. What matrices that are turned over (crossed.cpp) and those that lie so
// (strip.h) share.
#pragma once
#include "panel.h"
#include "sixteen.h"

#if HAS_AVX2

constexpr long SLICE = 512;       // inputs whose codes are unpacked at a time: they stay in the first cache
template <class X> constexpr long STEP = 4 / sizeof(typename X::Code);   // inputs

// The codes of 32 inputs and 16 outputs: [step][output], those of a step side by side.
template <class X> using Unit = typename X::Code[QUANTUM / STEP<X>][OUTPUTS][STEP<X>];

// A step of x, in every lane, meets one of codes; sums of many steps as a sum in each lane.
template <class X> INLINE void meet(Lanes w, Lanes x, Lanes& sum) {
  STEP<X> == 2 ? meet_words(w, x, sum) : meet_bytes(w, x, sum);
}
template <class X> INLINE Lanes whole(Lanes sum) { return STEP<X> == 2 ? sum : whole_bytes(sum); }

// Inputs that share both scales.
template <class X> struct Run {
  const Unit<X>* codes;           // from their first step on
  long k, steps;                  // the first input
  const float* factors;           // [OUTPUTS]
  const float* lows;              // where a group begins that has them: what is added for each of x in it
  long group;
};

// totals[m] += the runs times MR rows of x.
template <int MR, class X>
__attribute__((noinline)) void block(const Run<X>* runs, long count, const Row<X>* x, float (*totals)[OUTPUTS]) {
  constexpr long SHARE = X::UNIT * X::SHARE, BYTES = SHARE * sizeof(typename X::Code);
  constexpr long SOME = SHARE == QUANTUM ? QUANTUM / STEP<X> : 1;   // steps of a turn
  for (const Run<X>* at = runs; at < runs + count; at++) {
    const Run<X> r = *at;   // what is written could lie in it, as far as the compiler knows
    if (r.lows)
      UNROLL for (int m = 0; m < MR; m++)
        store16(totals[m], fma16(load16(r.lows), splat16(x[m].sums[r.group]), load16(totals[m])));
    asm volatile("" ::: "memory");   // totals stay there: registers are for sums
    const typename X::Code* xs[MR];
    Lanes sum[MR];
    UNROLL for (int m = 0; m < MR; m++) xs[m] = x[m].codes + r.k, sum[m] = no_lanes();
    const char* codes = (const char*)r.codes;   // of several units, one behind another
    UNROLL for (int m = 0; m < MR; m++)   // the next rows, of which no stream is to be seen
      UNROLL for (long o = 0; o < BYTES; o += LINE) __builtin_prefetch((char*)(x[m + MR].codes + r.k) + o, 0, 3);
    for (long p = 0, end = SOME > 1 ? SOME : r.steps; p < end; p += SOME)
      UNROLL for (long i = 0; i < SOME; i++) {
        Lanes step = lanes_at(codes + LINE * (p + i));
        UNROLL for (int m = 0; m < MR; m++) {
          meet<X>(step, step_of(xs[m] + STEP<X> * (p + i)), sum[m]);
          ALONE(sum[m]);   // in its registers, instead of all products first
        }
      }
    unsigned long share = (unsigned long)r.k / SHARE;
    UNROLL for (int m = 0; m < MR; m++) {
      v16 done = times(floats16(whole<X>(sum[m])), splat16(x[m].scales[share]));
      store16(totals[m], fma16(done, load16(r.factors), load16(totals[m])));
    }
  }
}

template <int MR, class X>
void blocks(const Run<X>* runs, long count, const Row<X>* x, long rows, float (*totals)[OUTPUTS]) {
  for (; rows >= MR; rows -= MR, x += MR, totals += MR) block<MR>(runs, count, x, totals);
  if constexpr (MR > 1)
    if (rows) blocks<MR - 1>(runs, count, x, rows, totals);
}

#endif
