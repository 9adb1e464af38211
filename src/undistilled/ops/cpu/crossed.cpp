// Products of many rows of x, rounded to INT16, with INT8 and CODED matrices: outputs lie side by side in a vector and
// a pair of neighbours of x meets all of them, so that nothing is summed across a vector.
//
// As in integer.cpp products are summed as integers as far as both scales reach, which is exact, and the sum meets both
// scales in float32. A row's bits do not depend on the others, nor on the number of threads.
#include "crossed.h"
#include "integer.h"
#include "scratch.h"

#if HAS_AVX2

namespace {

// Eight vectors of eight 32-bit lanes, rows to columns.
INLINE void transpose(__m256i* v) {
  __m256i t[8];
  UNROLL for (int i = 0; i < 8; i += 2)
    t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]), t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  UNROLL for (int i = 0; i < 8; i += 4)
    UNROLL for (int j = 0; j < 2; j++) {
      v[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      v[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  UNROLL for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x31);
  }
  UNROLL for (int i = 0; i < 8; i++) v[i] = t[i];
}

// Eight outputs' codes of a unit, even ones and odd ones, into the unit from output `first` on.
INLINE void cross(const Crossed::Wide* rows, Unit<Crossed>& unit, long first) {
  UNROLL for (int high = 0; high < 2; high++) {   // of the four pairs in each half of a vector
    __m256i v[8];
    UNROLL for (int r = 0; r < 8; r++) {
      __m256i even = (__m256i)rows[r].part[0], odd = (__m256i)rows[r].part[1];
      v[r] = high ? _mm256_unpackhi_epi16(even, odd) : _mm256_unpacklo_epi16(even, odd);
    }
    transpose(v);
    UNROLL for (int i = 0; i < 8; i++)
      _mm256_store_si256((__m256i*)unit[i / 4 * 8 + high * 4 + i % 4][first], v[i]);
  }
}

struct Work {
  const Matrix& a;
  const Panel& p;
  Unit<Crossed>* units;                    // of a slice
  Run<Crossed>* runs;
  float (*factors)[OUTPUTS], (*lows)[OUTPUTS];   // of a slice's tiles
  float (*totals)[OUTPUTS];       // of each row of x

  // The tile at `from`, its rows `step` bytes apart, from input k on: units from `to` on.
  template <class W> void unpack(const W& w, const uint8_t* from, long step, long k, long count, Unit<Crossed>* to) {
    for (long b = 0; b < count; b++, k += QUANTUM, from += W::BLOCK) {
      Crossed::Wide rows[OUTPUTS];
      for (long r = 0; r < OUTPUTS; r++) {
        const uint8_t* at = from + (r < p.count ? r : 0) * step;   // the last panel's outputs that are not there
        rows[r] = a.k - k >= QUANTUM ? W::template at<Crossed>(w, at) : W::template part<Crossed>(w, at, a.k - k);
      }
      cross(rows, to[b], 0);
      cross(rows + 8, to[b], 8);
    }
  }

  // All tiles of a width, the panel's `first` and those behind it.
  template <class W> void add_width(const W& w, const Codes& c, long first, const Row<Crossed>* x, long rows) {
    const Tiling& t = p.lying.tiling;
    bool apart = !t.order.at;   // a row's tiles follow each other
    long all = t.sections * c.count, of = t.cols / QUANTUM, tile = of * W::BLOCK, step = apart ? c.block : tile;
    const uint8_t* from = tile_at(t, c, p.n, 0);
    for (long q = 0; q < all;) {
      long used = 0, made = 0;
      for (long i = 0; q < all && (!i || used + of <= SLICE / QUANTUM); i++, q++) {   // a slice: one tile at least
        long k = p.at[first + q], end = k + t.cols;
        if (end > t.padded) end = t.padded;   // the last of a row's tiles may be stored in part
        bool low = a.mins.at || p.least;   // then a tile is a group
        for (long r = 0; r < OUTPUTS; r++) {
          factors[i][r] = r < p.count ? p.scales[r * p.by_row + (first + q) * p.by_tile] : 0;
          if (low) lows[i][r] = r < p.count ? p.mins[r * p.by_row + q] : 0;
        }
        unpack(w, from + q * tile * t.height, step, k, (end - k) / QUANTUM, units + used);
        constexpr long SHARE = Crossed::UNIT * Crossed::SHARE;
        for (long next; k < end; k = next) {
          next = (k / SHARE + 1) * SHARE < end ? (k / SHARE + 1) * SHARE : end;
          runs[made++] = {units + used, k, (next - k) / STEP<Crossed>, factors[i], low ? lows[i] : nullptr, q};
          low = false;
          used += (next - k) / QUANTUM;
        }
      }
      blocks<MOST>(runs, made, x, rows, totals);
    }
  }

  void put(long rows, float* const* y) {
    const uint8_t* multipliers = p.lying.tiling.order.at ? nullptr : p.lying.tiling.multipliers.at;
    float by[OUTPUTS];
    for (long r = 0; r < OUTPUTS; r++)
      by[r] = multipliers && r < p.count ? bf16_to_float(((const uint16_t*)multipliers)[p.n + r]) : 1;
    v8 one = load(by), two = load(by + 8);
    for (long m = 0; m < rows; m++) {
      v8 low = load(totals[m]) * one, high = load(totals[m] + 8) * two;
      float* to = y[m] + p.n;
      if (p.count == OUTPUTS) {
        store(to, low), store(to + 8, high);
        continue;
      }
      store_part(to, low, p.count < 8 ? p.count : 8);
      if (p.count > 8) store_part(to + 8, high, p.count - 8);
    }
  }
};

thread_local Scratch scratch;

}  // namespace

bool crosses(const Matrix& a) {
  return a.rounds == TO_INT16 && (a.kind == INT8 || (a.kind == CODED && a.group >= QUANTUM));
}

void product_crossed(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y) {
  const Lying lying(a, Crossed::UNIT);
  const Tiling& t = lying.tiling;
  long tiles = t.sections * t.tiles, most = OUTPUTS * (t.order.at ? tiles : t.factors) + LANES;
  long units = (SLICE + t.cols) / QUANTUM, some = SLICE / t.cols + 1;
  Row<Crossed>* r;
  float *scales, *mins, (*factors)[OUTPUTS], (*lows)[OUTPUTS], (*totals)[OUTPUTS];
  int32_t* at;
  Unit<Crossed>* codes;
  Run<Crossed>* runs;
  auto cut = [&](Cutter c) {
    r = c.take<Row<Crossed>>(rows + MOST);
    scales = c.take<float>(most), mins = c.take<float>(most), at = c.take<int32_t>(tiles);
    codes = c.take<Unit<Crossed>>(units), runs = c.take<Run<Crossed>>(units);
    factors = (float(*)[OUTPUTS])c.take<float>(some * OUTPUTS);
    lows = (float(*)[OUTPUTS])c.take<float>(some * OUTPUTS);
    totals = (float(*)[OUTPUTS])c.take<float>(rows * OUTPUTS);
    return c.at - (char*)nullptr;
  };
  cut({(char*)scratch.of(cut({}))});
  for (long m = 0; m < rows + MOST; m++) r[m] = Row<Crossed>(a, x[m < rows ? m : rows - 1]);
  for (long end = n + count, next; n < end; n = next) {
    next = (n / OUTPUTS + 1) * OUTPUTS;
    if (t.order.at && next > (n / t.height + 1) * t.height) next = (n / t.height + 1) * t.height;
    if (next > end) next = end;
    Panel p = {a, lying, n, next - n, a.n, at, scales, mins, nullptr, {}, 0, 0, 0};
    p.template prepare<Crossed>();
    Work work = {a, p, codes, runs, factors, lows, totals};
    memset(totals, 0, rows * sizeof *totals);
    for (long w = 0, first = 0; w < t.widths; first += t.sections * t.codes[w++].count)
      with_decoder<Crossed>(a, t.codes[w], [&](const auto& of) { work.add_width(of, t.codes[w], first, r, rows); });
    work.put(rows, y);
  }
}

#else

bool crosses(const Matrix&) { return false; }
void product_crossed(const Matrix&, long, long, const uint16_t* const*, long, float* const*) { abort(); }

#endif
