// Products of rows of x, rounded to integers, with codes whose outputs lie side by side in memory (ACROSS), whatever it
// is that a lane has of them: what across.cpp (INT16) and coarse.cpp (INT8) share.
//
// Few rows meet the codes as they leave a register, more a slice of them unpacked in the first cache; sums and their
// order are the same, so that a row has the same bits in any company.
//
// Decoders of codes: each() calls f(step, codes of 16 outputs) for each step of 32 inputs, whose values are (codes +
// least) times `unit`; Scale is what scales are stored as, or void: of any format; BLOCK, the bytes of 32 inputs.
#pragma once
#include "crossed.h"
#include "scratch.h"

#if HAS_AVX2

constexpr int FEW = 3;            // rows of x for which nothing is kept

// What decoders of codes of 4 bits that are one apart have in common.
struct CountedFours : Steps {
  using Steps::Steps;
  typedef Fp16 Scale;   // as all such schemes have
  static constexpr long BLOCK = 256;
};

// Calls f(k, end, g) for inputs from `k` to `end` by what shares both scales, and is in group g.
template <class X, class F> INLINE void each_run(const Matrix& a, long k, long end, F f) {
  constexpr long SHARE = X::UNIT * X::SHARE;
  long g = k / a.group, group = (g + 1) * a.group, share = (k / SHARE + 1) * SHARE;
  for (long next; k < end; k = next) {
    next = group < share ? group : share;
    if (next > end) next = end;
    if (SHARE == QUANTUM) next = k + QUANTUM;   // which it is anyhow, and the compiler now knows
    f(k, next, g);
    if (next == group) group += a.group, g++;
    if (next == share) share += SHARE;
  }
}

// 16 outputs.
struct Strip {
  const Matrix& a;
  long n, groups;

  __attribute__((always_inline)) const uint8_t* codes(long block, long k) const {
    return a.values.at + (n / OUTPUTS * (a.k / QUANTUM) + k / QUANTUM) * block;
  }
  // Their scales or minimums in group g.
  long place(long g) const { return (n / OUTPUTS * groups + g) * OUTPUTS; }
  template <class W> __attribute__((always_inline)) v16 scales(const W& w, long g) const {
    if constexpr (std::is_same<typename W::Scale, Fp32>::value) return load16((const float*)a.scales.at + place(g));
    if constexpr (std::is_same<typename W::Scale, Fp16>::value) return half_precision(a.scales.at + 2 * place(g));
    float all[OUTPUTS];
    for (int i = 0; i < OUTPUTS; i += 8)
      store(all + i, factors_at(a.tiling.format, a.scales.at, place(g) + i, 8) * splat(w.unit));
    return load16(all);
  }
  // What the level of code 0 and minimums add for each of x in a group whose scales are `f`, where there are such.
  template <class W> bool offset(const W& w) const { return a.mins.at || w.least; }
  template <class W> __attribute__((always_inline)) v16 lows(const W& w, v16 f, long g) const {
    return a.mins.at ? half_precision(a.mins.at + 2 * place(g)) : times(f, splat16(w.least));
  }
  // Asks for the next ones' scales and minimums: short streams that the processor would not foresee.
  template <class W> void ask(const W&) const {
    auto lines = [&](const Part& part, long bytes) {
      const uint8_t* next = part.at + (n / OUTPUTS + 1) * bytes;
      for (long o = 0; part.at && o < bytes; o += LINE) __builtin_prefetch(next + o, 0, 2);
    };
    if constexpr (!std::is_same<typename W::Scale, void>::value) lines(a.scales, groups * OUTPUTS * W::Scale::BYTES);
    lines(a.mins, groups * OUTPUTS * 2);
  }
  void put(const float* totals, float* y) const {
    const uint8_t* multipliers = a.tiling.multipliers.at;
    for (int half = 0; half < 2; half++) {
      v8 by = splat(1);
      if (multipliers) Bf16::load(multipliers + 2 * (n + 8 * half), &by);
      store(y + n + 8 * half, load(totals + 8 * half) * by);
    }
  }
};

// totals[m] += the strip times MR rows of x.
template <int MR, class X, class W>
__attribute__((noinline)) void straight(const W& from, const Strip& strip, const Row<X>* x, float (*totals)[OUTPUTS]) {
  constexpr long SHARE = X::UNIT * X::SHARE;
  // Of one sum each product would wait for the last, where that is long.
  constexpr int CHAINS = MR == 1 && (HAS_VNNI || X::SHARE > 1) ? 2 : 1;
  const W w = from;
  const Strip s = strip;
  const uint8_t* at = s.codes(W::BLOCK, 0);
  v16 total[MR];
  UNROLL for (int m = 0; m < MR; m++) total[m] = load16(totals[m]);
  each_run<X>(s.a, 0, s.a.k, [&](long k, long end, long g) {
    v16 f = s.scales(w, g);
    Lanes sum[MR][CHAINS];
    UNROLL for (int m = 0; m < MR; m++)
      UNROLL for (int c = 0; c < CHAINS; c++) sum[m][c] = no_lanes();
    const unsigned long share = (unsigned long)k / SHARE;
    if (s.offset(w) && k == g * s.a.group)
      UNROLL for (int m = 0; m < MR; m++) total[m] = fma16(s.lows(w, f, g), splat16(x[m].sums[g]), total[m]);
    for (; k < end; k += QUANTUM, at += W::BLOCK) {
      UNROLL for (long o = 0; o < W::BLOCK; o += LINE) __builtin_prefetch(at + NEAR + o, 0, 2);
      W::each(w, at, [&](int p, Lanes codes) {
        UNROLL for (int m = 0; m < MR; m++) {
          Lanes& one = sum[m][p % CHAINS];
          meet<X>(codes, step_of(x[m].codes + k + STEP<X> * p), one);
          if (MR > 1) ALONE(one);   // each sum by itself instead of all products first
        }
      });
    }
    UNROLL for (int m = 0; m < MR; m++) {
      Lanes all = whole<X>(sum[m][0]);
      if (CHAINS > 1) all = plus(all, whole<X>(sum[m][CHAINS - 1]));
      total[m] = fma16(times(floats16(all), splat16(x[m].scales[share])), f, total[m]);
    }
  });
  UNROLL for (int m = 0; m < MR; m++) store16(totals[m], total[m]);
}

// The same for any number of rows, by codes unpacked in the first cache.
template <class X, class W>
void sliced(const W& w, const Strip& s, const Row<X>* x, long rows, float (*totals)[OUTPUTS]) {
  alignas(64) Unit<X> units[SLICE / QUANTUM];
  float factors[SLICE / QUANTUM][OUTPUTS], lows[SLICE / QUANTUM][OUTPUTS];
  Run<X> runs[SLICE / QUANTUM];
  for (long from = 0, to; from < s.a.k; from = to) {
    to = from + SLICE < s.a.k ? from + SLICE : s.a.k;
    const uint8_t* at = s.codes(W::BLOCK, from);
    for (long k = from; k < to; k += QUANTUM, at += W::BLOCK)
      W::each(w, at, [&](int p, Lanes codes) { put_lanes(units[(k - from) / QUANTUM][p], codes); });
    long made = 0;
    each_run<X>(s.a, from, to, [&](long k, long end, long g) {
      bool low = s.offset(w) && k == g * s.a.group;
      v16 f = s.scales(w, g);
      store16(factors[made], f);
      if (low) store16(lows[made], s.lows(w, f, g));
      runs[made] = {units + (k - from) / QUANTUM, k, (end - k) / STEP<X>, factors[made], low ? lows[made] : nullptr, g};
      made++;
    });
    blocks<MOST>(runs, made, x, rows, totals);
  }
}

// y[m][n..n+count) = x[m] times the outputs n.., whose decoder with_codes(a, f) calls f with.
template <class X, class F>
void product_of(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y,
                Scratch& scratch, F with_codes) {
  Row<X>* r;
  float (*totals)[OUTPUTS];
  auto cut = [&](Cutter c) {
    r = c.take<Row<X>>(rows + MOST), totals = (float(*)[OUTPUTS])c.take<float>(rows * OUTPUTS);
    return c.at - (char*)nullptr;
  };
  cut({(char*)scratch.of(cut({}))});
  for (long m = 0; m < rows + MOST; m++) r[m] = Row<X>(a, x[m < rows ? m : rows - 1]);
  with_codes(a, [&](const auto& w) {
    for (long end = n + count; n < end; n += OUTPUTS) {
      Strip s = {a, n, a.groups()};
      s.ask(w);
      memset(totals, 0, rows * sizeof *totals);
      if (rows == 1) straight<1>(w, s, r, totals);
      else if (rows == 2) straight<2>(w, s, r, totals);
      else if (rows == FEW) straight<FEW>(w, s, r, totals);
      else sliced(w, s, r, rows, totals);
      for (long m = 0; m < rows; m++) s.put(totals[m], y[m]);
    }
  });
}

#endif
