// What products by tiles (integer.cpp) know of up to OUTPUTS rows of a matrix: where its tiles lie, and their factors.
#pragma once
#include "decoders.h"

constexpr long OUTPUTS = TILE;    // of a panel

// Up to 8 scales or minimums from the i-th stored number on, of which `some` are there.
INLINE v8 factors_at(int format, const uint8_t* from, long i, long some) {
  v8 v = splat(0);
  auto by = [&](auto loader) {
    typedef decltype(loader) L;
    some < LANES ? load_tail<L>(from + i * L::BYTES, some, &v) : L::load(from + i * L::BYTES, &v);
  };
  if (format == SCALES_F32) by(Fp32());
  if (format == SCALES_F16) by(Fp16());
  if (format == SCALES_E4M3) by(Fp8()), v = v * splat(256);
  if (format == SCALES_E8M0) {
    uint32_t bits[LANES];
    for (long j = 0; j < LANES; j++) {
      uint32_t code = j < some ? from[i + j] : 0;
      bits[j] = code ? code << 23 : 1 << 22;
    }
    v = read<v8>(bits);
  }
  return v;
}

// How a matrix' codes, scales and minimums lie, INT8's and FP8's among them: as groups of a row, cut where they are
// long.
struct Lying {
  Tiling tiling;
  long by_tile;                   // scales of a tile

  Lying(const Matrix& a, long unit) : tiling(a.tiling), by_tile(0) {
    Tiling& t = tiling;
    if (a.kind == CODED) {
      if (t.cols < unit) t.tiles = t.codes[0].count = t.padded / unit, t.cols = unit;
      by_tile = t.cols / a.group;
      return;
    }
    t = {};
    bool whole = a.group >= a.k;   // one scale a row
    t.height = 1, t.sections = 1, t.widths = 1;
    t.cols = whole ? 4 * QUANTUM : a.group;
    t.tiles = (a.k + t.cols - 1) / t.cols;
    t.factors = whole ? 1 : t.tiles;
    t.padded = padded(a);
    by_tile = whole ? 0 : 1;
    t.codes[0] = {8, t.tiles, a.k, a.values, nullptr};
  }
};

struct Panel {
  const Matrix& a;
  const Lying& lying;
  long n, count, last;
  int32_t* at;
  float *scales, *mins;
  v8* totals;
  float units[5];                 // of the widths
  float least;                    // of a matrix in groups: the level of code 0
  long by_row, by_tile;

  // Scales or minimums of all rows, one after another as they are stored.
  void by_rows(int format, const Part& from, float unit, float* out) {
    bool blocks = a.kind == FP8_BLOCK;   // whose rows share a line of scales
    long first = (blocks ? n / 128 : n) * lying.tiling.factors, all = (blocks ? 1 : count) * lying.tiling.factors;
    for (long i = 0; i <= all; i += LANES)   // and a zero behind, for half a unit that is not there
      store(out + i, factors_at(format, from.at, first + i, all - i) * splat(unit));
  }
  void by_tiles() {
    const Tiling& t = lying.tiling;
    long block = n / t.height, inside = n % t.height, to = 0;
    each_tile(t, [&](const Codes& c, long, long i) {
      at[to] = place_of(t, block, i) * t.cols;
      for (long r = 0; r < count; r += LANES) {
        long some = count - r;
        v8 f = factors_at(t.format, a.scales.at, (block * t.factors + i) * t.height + inside + r, some), by;
        const uint8_t* multipliers = t.multipliers.at + 2 * (n + r);
        some < LANES ? load_tail<Bf16>(multipliers, some, &by) : Bf16::load(multipliers, &by);
        store(scales + to * OUTPUTS + r, f * by * splat(units[&c - t.codes]));
      }
      to++;
    });
  }
  // Asks for the next panel's scales: they are no stream that the processor would foresee.
  void ask() {
    const Tiling& t = lying.tiling;
    auto lines = [&](const Part& part, long from, long bytes) {
      for (long o = 0; part.at && o < bytes; o += LINE) __builtin_prefetch(part.at + from + bytes + o, 0, 2);
    };
    if (a.kind == FP8_BLOCK) return;   // eight panels share them
    long each = a.kind == INT8 ? 4 : t.format == SCALES_F16 ? 2 : 1, row = t.factors * each;
    if (t.order.at) {
      lines(a.scales, n / t.height * t.height * row, t.height * row);
      lines(t.order, n / t.height * t.sections * t.tiles * 2, t.sections * t.tiles * 2);
    } else {
      lines(a.scales, n * row, count * row);
      lines(a.mins, n * t.factors * 2, count * t.factors * 2);
    }
  }
  template <class X> void prepare() {
    const Tiling& t = lying.tiling;
    for (long w = 0; w < t.widths; w++)
      with_decoder<X>(a, t.codes[w], [&](const auto& d) { units[w] = d.unit, least = d.least; });
    if (t.order.at) {
      by_row = 1, by_tile = OUTPUTS;
      return by_tiles();
    }
    by_row = a.kind == FP8_BLOCK ? 0 : t.factors, by_tile = lying.by_tile;
    for (long i = 0; i < t.tiles; i++) at[i] = i * t.cols;
    by_rows(a.kind == CODED ? t.format : (int)SCALES_F32, a.scales, X::SCALED ? units[0] : AsFloats::REST, scales);
    if (a.mins.at) by_rows(SCALES_F16, a.mins, 1, mins);
    for (long i = 0; least && i < count * by_row; i += LANES)
      store(mins + i, fma(load(scales + i), splat(least), a.mins.at ? load(mins + i) : splat(0)));
  }
  // Totals begin with the minimums times the sums of x.
  template <class X> void begin(const Row<X>* x, long rows) {
    for (long m = 0; m < rows; m++)
      for (long r = 0; r < count; r++) {
        v8 total = splat(0);
        for (long i = 0; (a.mins.at || least) && i < by_row; i += LANES) {
          const float* some = mins + r * by_row + i;
          total = fma(by_row - i < LANES ? load_part(some, by_row - i) : load(some), load(x[m].sums + i), total);
        }
        totals[m * OUTPUTS + r] = total;
      }
  }
  void put(long rows, float* const* y) {
    const uint8_t* multipliers = lying.tiling.order.at ? nullptr : lying.tiling.multipliers.at;
    float by[OUTPUTS];
    for (long r = 0; r < count; r++) by[r] = multipliers ? bf16_to_float(((const uint16_t*)multipliers)[n + r]) : 1;
    for (long m = 0; m < rows; m++)
      for (long r = 0; r < count; r++) y[m][n + r] = sum(totals[m * OUTPUTS + r]) * by[r];
  }
};
