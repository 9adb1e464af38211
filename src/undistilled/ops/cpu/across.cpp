// Products of rows of x, rounded to INT16, with INT8 and codes of 4 bits whose outputs lie side by side already: a lane
// of 32 bits has an output's codes of four inputs, or of eight, and the next lane the next output's. So memory is read as
// one stream, and nothing is summed across a vector: what comes with a row of short rows cost more than their codes.
//
// Few rows meet the codes as they leave a register, more a slice of them unpacked in the first cache; sums and their order
// are the same, so that a row has the same bits in any company.
#include "across.h"
#include "crossed.h"
#include "integer.h"
#include "pool.h"
#include "scratch.h"

namespace {

constexpr int FEW = 3;            // rows of x for which nothing is kept
constexpr int BYTE[] = {0, 2, 1, 3};   // of a lane, for each of four inputs: even bytes make a pair, and odd ones

long block_bytes(int bits) { return TILE * QUANTUM * bits / 8; }

INLINE uint32_t word(const uint8_t* at) {
  uint32_t w;
  memcpy(&w, at, 4);
  return w;
}

// A lane's 32 bits: of INT8 its four codes in a row of them, of 4 bits the codes from `first` on of a block (packing.py).
INLINE uint32_t lane_of(const uint8_t* row, int bits, long first) {
  uint32_t w = bits == 8 ? word(row + first) : 0;
  if (bits == 4) {
    const uint8_t* at = row + first % 16;
    long up = first / 16 * 4;
    w = (word(at) >> up & 0x0f0f0f0f) | (word(at + 4) >> up & 0x0f0f0f0f) << 4;
  }
  return (w & 0xff0000ff) | (w >> 8 & 0xff00) | (w << 8 & 0xff0000);
}

struct LayAcross : Kernel<LayAcross> {
  const uint8_t* rows;
  uint8_t* out;
  long n, k;
  int bits;

  LayAcross(const uint8_t* rows, uint8_t* out, long n, long k, int bits)
      : rows(rows), out(out), n(n), k(k), bits(bits) {
    name = "lay across";
    reads(rows, n * k * bits / 8);
    writes(out, n * k * bits / 8);
  }
  void run(Team& team) const override {
    long bytes = k * bits / 8, each = 32 / bits;
    team.share(n / TILE, [&](long panel) {
      const uint8_t* from = rows + panel * TILE * bytes;
      uint8_t* to = out + panel * TILE * bytes;
      for (long b = 0; b < k / QUANTUM; b++, from += QUANTUM * bits / 8)
        for (long i = 0; i < QUANTUM; i += each)
          for (long r = 0; r < TILE; r++, to += 4) {
            uint32_t lane = lane_of(from + r * bytes, bits, i);
            memcpy(to, &lane, 4);
          }
    });
  }
};

}  // namespace

void decode_across(const Matrix& a, long row, float* out) {
  const Tiling& t = a.tiling;
  const Codes& c = t.codes[0];
  bool blocks = a.kind == FP8_ACROSS;   // whose scales 128 rows share
  long inside = row % TILE, each = 32 / c.bits, mask = (1 << c.bits) - 1;
  const uint8_t* lane = a.values.at + row / TILE * (a.k / QUANTUM) * block_bytes(c.bits) + inside * 4;
  float by = t.multipliers.at ? bf16_to_float(((const uint16_t*)t.multipliers.at)[row]) : 1;
  for (long k = 0; k < a.k;) {
    long g = k / a.group, place = blocks ? row / 128 * a.groups() + g : (row / TILE * a.groups() + g) * TILE + inside;
    v8 f = factors_at(blocks ? (int)SCALES_F32 : t.format, a.scales.at, place, 1);
    float scale = f[0] * by, low = a.mins.at ? half_to_float(((const uint16_t*)a.mins.at)[place]) : 0;
    for (long end = k + a.group < a.k ? k + a.group : a.k; k < end; k += each, lane += 4 * TILE)
      for (long i = 0; i < each; i++)
        out[k + i] = c.levels[word(lane) >> (8 * BYTE[i % 4] + i / 4 * c.bits) & mask] * scale + low;
  }
}

extern "C" void native_lay_across(const uint8_t* rows, uint8_t* out, long n, long k, int bits) {
  submit(LayAcross(rows, out, n, k, bits));
}

#if HAS_AVX2

namespace {

// Decoders: each() calls f(pair, codes of 16 outputs) for each pair of inputs of 32, whose values are (codes + least)
// times `unit`. Of lanes of 64 bytes a pair is words.
struct Eights {
  static constexpr float unit = 1, least = 0;
  typedef Fp32 Scale;
  static constexpr long BLOCK = 512;
  template <class F> INLINE void each(const Eights&, const uint8_t* w, F f) {
    UNROLL for (int q = 0; q < 8; q++) {
      Lanes even, odd;
      widen(lanes_at(w + 64 * q), even, odd);
      f(2 * q, even), f(2 * q + 1, odd);
    }
  }
};

struct CountedFours : Steps {
  using Steps::Steps;
  typedef Fp16 Scale;   // as all such schemes have
  static constexpr long BLOCK = 256;
  template <class F> INLINE void each(const CountedFours&, const uint8_t* w, F f) {
    UNROLL for (int q = 0; q < 4; q++) {
      Lanes v = lanes_at(w + 64 * q);
      f(4 * q, few(v, 15)), f(4 * q + 1, few(right<8>(v), 15));
      f(4 * q + 2, few(right<4>(v), 15)), f(4 * q + 3, right<12>(v));
    }
  }
};

struct DecodedFours : Whole<4> {
  using Whole<4>::Whole;
  typedef void Scale;   // of any format
  static constexpr long BLOCK = 256;
  template <class F> INLINE void each(const DecodedFours& w, const uint8_t* from, F f) {
    UNROLL for (int q = 0; q < 4; q++) {
      Lanes v = lanes_at(from + 64 * q), even, odd;
      widen(found(w.lookup, few(v, 0x0f0f)), even, odd);
      f(4 * q, even), f(4 * q + 1, odd);
      widen(found(w.lookup, few(right<4>(v), 0x0f0f)), even, odd);
      f(4 * q + 2, even), f(4 * q + 3, odd);
    }
  }
};

template <class F> void with_codes(const Matrix& a, F f) {
  const Codes& c = a.tiling.codes[0];
  if (c.bits == 8) return f(Eights());
  Steps::suits(c.levels, 16) ? f(CountedFours(c.levels)) : f(made_of<DecodedFours>(c.levels));
}

constexpr long SHARE = Crossed::UNIT * Crossed::SHARE;

// Calls f(k, end, g) for inputs from `k` to `end` by what shares both scales, and is in group g.
template <class F> INLINE void each_run(const Matrix& a, long k, long end, F f) {
  long g = k / a.group, group = (g + 1) * a.group, share = (k / SHARE + 1) * SHARE;
  for (long next; k < end; k = next) {
    next = group < share ? group : share;
    if (next > end) next = end;
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
template <int MR, class W>
__attribute__((noinline)) void straight(const W& from, const Strip& strip, const Row<Crossed>* x,
                                        float (*totals)[OUTPUTS]) {
  constexpr int CHAINS = MR == 1 ? 2 : 1;   // of one sum each product would wait for the last
  const W w = from;
  const Strip s = strip;
  const uint8_t* at = s.codes(W::BLOCK, 0);
  v16 total[MR];
  UNROLL for (int m = 0; m < MR; m++) total[m] = load16(totals[m]);
  each_run(s.a, 0, s.a.k, [&](long k, long end, long g) {
    v16 f = s.scales(w, g);
    Lanes sum[MR][CHAINS];
    UNROLL for (int m = 0; m < MR; m++)
      UNROLL for (int c = 0; c < CHAINS; c++) sum[m][c] = no_lanes();
    const long first = k;
    if (s.offset(w) && k == g * s.a.group)
      UNROLL for (int m = 0; m < MR; m++) total[m] = fma16(s.lows(w, f, g), splat16(x[m].sums[g]), total[m]);
    for (; k < end; k += QUANTUM, at += W::BLOCK) {
      UNROLL for (long o = 0; o < W::BLOCK; o += LINE) __builtin_prefetch(at + NEAR + o, 0, 2);
      W::each(w, at, [&](int p, Lanes codes) {
        UNROLL for (int m = 0; m < MR; m++) {
          Lanes& one = sum[m][p % CHAINS];
          meet(codes, pair_of(x[m].codes + k + 2 * p), one);
          if (MR > 1) ALONE(one);   // each sum by itself instead of all products first
        }
      });
    }
    UNROLL for (int m = 0; m < MR; m++) {
      Lanes all = CHAINS > 1 ? plus(sum[m][0], sum[m][CHAINS - 1]) : sum[m][0];
      total[m] = fma16(times(floats16(all), splat16(x[m].scales[first / SHARE])), f, total[m]);
    }
  });
  UNROLL for (int m = 0; m < MR; m++) store16(totals[m], total[m]);
}

// The same for any number of rows, by codes unpacked in the first cache.
template <class W>
void sliced(const W& w, const Strip& s, const Row<Crossed>* x, long rows, float (*totals)[OUTPUTS]) {
  alignas(64) Unit units[SLICE / QUANTUM];
  float factors[SLICE / QUANTUM][OUTPUTS], lows[SLICE / QUANTUM][OUTPUTS];
  Run runs[SLICE / QUANTUM];
  for (long from = 0, to; from < s.a.k; from = to) {
    to = from + SLICE < s.a.k ? from + SLICE : s.a.k;
    const uint8_t* at = s.codes(W::BLOCK, from);
    for (long k = from; k < to; k += QUANTUM, at += W::BLOCK)
      W::each(w, at, [&](int p, Lanes codes) { put_lanes(units[(k - from) / QUANTUM][p], codes); });
    long made = 0;
    each_run(s.a, from, to, [&](long k, long end, long g) {
      bool low = s.offset(w) && k == g * s.a.group;
      v16 f = s.scales(w, g);
      store16(factors[made], f);
      if (low) store16(lows[made], s.lows(w, f, g));
      runs[made] = {units + (k - from) / QUANTUM, k, (end - k) / 2, factors[made], low ? lows[made] : nullptr, g};
      made++;
    });
    blocks<MOST>(runs, made, x, rows, totals);
  }
}

thread_local Scratch scratch;

}  // namespace

void product_across(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y) {
  Cutter count_it, cut;
  auto place = [&](Cutter& c, Row<Crossed>*& r, float*& t) {
    r = c.take<Row<Crossed>>(rows + MOST), t = c.take<float>(rows * OUTPUTS);
  };
  Row<Crossed>* r;
  float* t;
  place(count_it, r, t);
  cut.at = (char*)scratch.of(count_it.at - (char*)nullptr);
  place(cut, r, t);
  float (*totals)[OUTPUTS] = (float(*)[OUTPUTS])t;
  for (long m = 0; m < rows + MOST; m++) r[m] = Row<Crossed>(a, x[m < rows ? m : rows - 1]);
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

#else

void product_across(const Matrix&, long, long, const uint16_t* const*, long, float* const*) { abort(); }

#endif
