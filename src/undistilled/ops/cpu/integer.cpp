// Products by tiles: rows of x with INT8 and CODED matrices, rounded to INT8 or INT16 by groups, or as they are with
// FP8.
//
// A scale of x is a group's largest magnitude by 127 or 32767. Levels of all codes are whole numbers of -128..127 times
// a power of two: they are multiplied and summed as integers as far as both scales reach, which is exact, and the sum
// meets both scales in float32, tile after tile as they are stored. So a row has the same bits with every set of
// instructions that has a fused product and sum, in a product of one row and of a thousand, on any number of threads.
// One row of x meets rows of weights one after another, a stream that the processor foresees; more rows meet a slice
// of 16 unpacked in the first cache.
#include "integer.h"
#include "panel.h"
#include "product.h"
#include "scratch.h"

namespace {

constexpr int MOST = 4;           // rows of x that meet codes at a time
constexpr long SLICE = 512;       // inputs whose codes are unpacked at a time

// Consecutive tiles of one width: groups of a row, or tiles of a block of rows.
struct Strip {
  const uint8_t* first;
  long row, tile;                 // bytes to the next row, to the next tile
  long tiles, blocks, all;        // units of codes in a tile, and in all of a row's that are stored
  const int32_t* at;              // each tile's first input
  const float* scales;
  long by_row, by_tile;           // floats between scales
  long k, ahead;                  // inputs of the matrix; bytes to what is asked for
  bool rows_apart, halves;        // whether a row's tiles follow each other; whether a unit has two scales
  long whole;                     // tiles of which each code belongs to the row, or is stored and meets zeros

  long blocks_of(long t) const { return all - t * blocks < blocks ? all - t * blocks : blocks; }
  void skip(long count) {
    first += count * tile, at += count, scales += count * by_tile, all -= count * blocks;
    whole = whole > count ? whole - count : 0;
  }
};

// A tile's inputs of MR rows of x.
template <class X, int MR> struct Inputs {
  const typename X::Code* codes[MR];
  const float* scales[MR];        // from the first input's on
  long past;                      // units that share that scale with it and come before

  __attribute__((always_inline)) Inputs(const Row<X>* x, unsigned long k) {   // without sign: shifts alone
    unsigned long unit = k / X::UNIT;
    UNROLL for (int m = 0; m < MR; m++) codes[m] = x[m].codes + k, scales[m] = x[m].scales + unit / X::SHARE;
    past = unit % X::SHARE;
  }
};

// total[r][m] += codes of a tile of NR rows, `step` bytes apart from `from` on, times x[m]: BLOCKS units, which begin
// where a scale of x does or end before the next, or where that is 0 `blocks`, of which `left` codes belong to a row.
template <class X, int MR, int NR, int BLOCKS, class W>
INLINE void add(const W& w, const Strip& s, const uint8_t* from, long step, const Inputs<X, MR>& x, const float* scale,
                long blocks, long left, v8 (*total)[MR]) {
  constexpr int PARTS = sizeof(typename X::Wide) / 32;
  constexpr bool APART = NR > 1 || (MR == 3 && X::SHARE > 1 && BLOCKS >= X::SHARE);   // which was found to be faster
  typename X::Sum sum[NR][MR];
  UNROLL for (int r = 0; r < NR; r++)
    UNROLL for (int m = 0; m < MR; m++) sum[r][m] = X::none();
  auto meet = [&](auto unit, long b) {   // unit(at): as it meets x
    typename X::Wide of[NR];
    UNROLL for (int r = 0; r < NR; r++) of[r] = unit(from + r * step);
    UNROLL for (int p = 0; p < PARTS; p++)
      UNROLL for (int m = 0; m < MR; m++) {
        auto xs = X::part(x.codes[m] + b * X::UNIT, p);
#if HAS_AVX2   // one load for NR products, and each sum by itself instead of all products first
        if (NR > 1) asm("" : "+x"(xs));
#endif
        UNROLL for (int r = 0; r < NR; r++) {
          X::meet(of[r].part[p], xs, sum[r][m]);
#if HAS_AVX2
          if constexpr (APART) asm("" : "+x"(sum[r][m]));
#endif
        }
      }
    from += W::BLOCK;
  };
  auto end = [&](long share) {
    UNROLL for (int r = 0; r < NR; r++)
      UNROLL for (int m = 0; m < MR; m++) {
        const float* own = scale + r * s.by_row;
        v8 f = splat(own[0]), done = X::total(sum[r][m]);
        // the halves of a unit lie in a vector's first and last four lanes
        if (s.halves) f = split(own[0], own[1]);
        total[r][m] = fma(X::SCALED ? done * splat(x.scales[m][share]) : done, f, total[r][m]);
        sum[r][m] = X::none();
      }
  };
  auto whole = [&](const uint8_t* at) { return W::template at<X>(w, at); };
  if constexpr (BLOCKS > 0) {
    UNROLL for (long b = 0; b < BLOCKS; b++) {
      meet(whole, b);
      if ((b + 1) % X::SHARE == 0 || b + 1 == BLOCKS) end(b / X::SHARE);
    }
    return;
  }
  for (long b = 0; b < blocks; b++, left -= X::UNIT) {
    left >= X::UNIT ? meet(whole, b) : meet([&](const uint8_t* at) { return W::template part<X>(w, at, left); }, b);
    long here = x.past + b;
    if ((here + 1) % X::SHARE == 0 || b + 1 == blocks) end(here / X::SHARE);
  }
}

template <int BLOCKS> using Tiles = std::integral_constant<int, BLOCKS>;

// some() with how much there is of tile t, which is not whole.
template <class X, int BLOCKS, class F> INLINE void rest(const Strip& s, long t, F some) {
  long blocks = s.blocks_of(t);
  if (BLOCKS > 1 && 2 * blocks == BLOCKS && s.k - s.at[t] >= blocks * X::UNIT) return some(Tiles<BLOCKS / 2>());
  some(Tiles<0>());
}

// totals[r] += the strip times a row of x, in the order in which its bytes lie.
template <class X, int BLOCKS, class W>
__attribute__((noinline)) void straight(const W& from, const Strip& strip, long count, const Row<X>* x, v8* totals) {
  const W w = from;
  const Strip s = strip;
  v8 total[1];
  auto some = [&](auto blocks, const Inputs<X, 1>& in, long r, long t) {
    const uint8_t* at = s.first + r * s.row + t * s.tile;
    constexpr long bytes = (BLOCKS ? BLOCKS : 1) * W::BLOCK;
    UNROLL for (long o = 0; o < bytes; o += LINE) __builtin_prefetch(at + s.ahead + o, 0, 2);
    const float* scale = s.scales + r * s.by_row + t * s.by_tile;
    add<X, 1, 1, decltype(blocks)::value>(w, s, at, 0, in, scale, s.blocks_of(t), s.k - s.at[t], &total);
  };
  if (s.rows_apart)
    for (long r = 0; r < count; r++) {
      total[0] = totals[r];
      for (long t = 0; t < s.whole; t++) some(Tiles<BLOCKS>(), Inputs<X, 1>(x, s.at[t]), r, t);
      for (long t = s.whole; t < s.tiles; t++)
        rest<X, BLOCKS>(s, t, [&](auto blocks) { some(blocks, Inputs<X, 1>(x, s.at[t]), r, t); });
      totals[r] = total[0];
    }
  else
    for (long t = 0; t < s.tiles; t++) {
      const Inputs<X, 1> in(x, s.at[t]);
      for (long r = 0; r < count; r++) {
        total[0] = totals[r];
        some(Tiles<BLOCKS>(), in, r, t);
        totals[r] = total[0];
      }
    }
}

// totals[m][r] += unpacked tiles [tile][r][block] of NR rows from `first` on, times MR rows of x.
template <class X, int MR, int NR, int BLOCKS>
INLINE void slice_rows(const typename X::Wide* codes, const Strip& s, long first, const Row<X>* x, v8* totals) {
  const float* scales = s.scales + first * s.by_row;
  const long step = s.blocks * sizeof(typename X::Wide);
  v8 total[NR][MR];
  UNROLL for (int r = 0; r < NR; r++)
    UNROLL for (int m = 0; m < MR; m++) total[r][m] = totals[m * OUTPUTS + first + r];
  auto some = [&](auto blocks, long t) {
    const Inputs<X, MR> in(x, s.at[t]);
    const uint8_t* from = (const uint8_t*)codes + (t * OUTPUTS + first) * step;
    const float* scale = scales + t * s.by_tile;
    add<X, MR, NR, decltype(blocks)::value>(Unpacked<X>(), s, from, step, in, scale, s.blocks_of(t), s.k, total);
  };
  long whole = s.whole < s.tiles ? s.whole : s.tiles;
  for (long t = 0; t < whole; t++) some(Tiles<BLOCKS>(), t);
  for (long t = whole; t < s.tiles; t++) rest<X, BLOCKS>(s, t, [&](auto blocks) { some(blocks, t); });
  UNROLL for (int r = 0; r < NR; r++)
    UNROLL for (int m = 0; m < MR; m++) totals[m * OUTPUTS + first + r] = total[r][m];
}

template <class X, int MR, int NR, int BLOCKS>
__attribute__((noinline)) void slice(const typename X::Wide* codes, const Strip& strip, long count, const Row<X>* x,
                                     v8* totals) {
  const Strip s = strip;   // what is written could lie in it, as far as the compiler knows
  Row<X> rows[MR];
  UNROLL for (int m = 0; m < MR; m++) rows[m] = x[m];
  long r = 0;
  for (; r + NR <= count; r += NR) slice_rows<X, MR, NR, BLOCKS>(codes, s, r, rows, totals);
  if constexpr (NR > 1)
    for (; r < count; r++) slice_rows<X, MR, 1, BLOCKS>(codes, s, r, rows, totals);
}

template <class X, int BLOCKS, int MR>
void some_rows(const typename X::Wide* codes, const Strip& s, long count, const Row<X>* x, long rows, v8* totals) {
  constexpr int NR = MR == MOST && sizeof(typename X::Sum) == sizeof(v8) ? 2 : 1;   // what registers hold
  for (; rows >= MR; rows -= MR, x += MR, totals += MR * OUTPUTS) slice<X, MR, NR, BLOCKS>(codes, s, count, x, totals);
  if constexpr (MR > 1)
    if (rows) some_rows<X, BLOCKS, MR - 1>(codes, s, count, x, rows, totals);
}

template <class X, class W> void unpack(const W& w, const Strip& s, long count, typename X::Wide* codes) {
  auto some = [&](long r, long t) {
    const uint8_t* from = s.first + r * s.row + t * s.tile;
    for (long b = 0, left = s.k - s.at[t]; b < s.blocks_of(t); b++, from += W::BLOCK, left -= X::UNIT) {
      __builtin_prefetch(from + s.ahead, 0, 2);
      codes[(t * OUTPUTS + r) * s.blocks + b] =
          left >= X::UNIT ? W::template at<X>(w, from) : W::template part<X>(w, from, left);
    }
  };
  if (s.rows_apart)
    for (long r = 0; r < count; r++)
      for (long t = 0; t < s.tiles; t++) some(r, t);
  else
    for (long t = 0; t < s.tiles; t++)
      for (long r = 0; r < count; r++) some(r, t);
}

template <class X, class W>
void multiply(const W& w, Strip s, long count, const Row<X>* x, long rows, typename X::Wide* codes, v8* totals) {
  auto by_blocks = [&](auto run) {   // a tile's loop is unrolled where it is short
    if (s.blocks == 4) return run(Tiles<4>());
    if (s.blocks == 2) return run(Tiles<2>());
    if (s.blocks == 1) return run(Tiles<1>());
    return run(Tiles<0>());
  };
  if (rows == 1) return by_blocks([&](auto n) { straight<X, decltype(n)::value>(w, s, count, x, totals); });
  long slices = (s.tiles * s.blocks * X::UNIT + SLICE - 1) / SLICE, some = (s.tiles + slices - 1) / slices;   // alike
  for (long tiles = s.tiles; tiles > 0; tiles -= some) {
    s.tiles = tiles < some ? tiles : some;
    unpack<X>(w, s, count, codes);
    by_blocks([&](auto n) { some_rows<X, decltype(n)::value, MOST>(codes, s, count, x, rows, totals); });
    s.skip(some);
  }
}

// The tiles of one width, the first of them the panel's `first`, times rows of x.
template <class X, class W>
void add_width(const Panel& p, const W& w, const Codes& c, long first, const Row<X>* x, long rows,
               typename X::Wide* codes) {
  const Matrix& a = p.a;
  const Tiling& t = p.lying.tiling;
  bool apart = !t.order.at;
  long blocks = t.cols / X::UNIT, tile = blocks * W::BLOCK, tiles = t.sections * c.count;
  long row = apart ? c.block : tile, all = apart ? t.padded / X::UNIT : tiles * blocks;
  long ahead = apart ? (p.n + p.count + NEAR / row < p.last ? NEAR : 0) : ahead_of(c.block, t.height, p.n, p.last);
  long whole = (a.kind == CODED ? all : a.k / X::UNIT) / blocks;
  Strip s = {tile_at(t, c, p.n, 0), row, tile * t.height, tiles, blocks, all, p.at + first,
             p.scales + first * p.by_tile, p.by_row, p.by_tile, a.k, ahead, apart,
             a.kind == CODED && a.group < X::UNIT, whole};
  multiply<X>(w, s, p.count, x, rows, codes, p.totals);
}

thread_local Scratch scratch, kept;

template <class X>
void product_of(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y, long last) {
  const Lying lying(a, X::UNIT);
  const Tiling& t = lying.tiling;
  Row<X>* r = (Row<X>*)kept.of(rows * sizeof(Row<X>));
  for (long m = 0; m < rows; m++) r[m] = Row<X>(a, x[m]);
  long tiles = t.sections * t.tiles, most = OUTPUTS * (t.order.at ? tiles : t.factors) + LANES;
  long slice = rows > 1 ? OUTPUTS * (SLICE + t.cols) / X::UNIT : 0;
  Cutter cut = {(char*)scratch.of(rows * OUTPUTS * 32 + slice * sizeof(typename X::Wide) + most * 8 + tiles * 4 + 320)};
  v8* totals = cut.take<v8>(rows * OUTPUTS);
  typename X::Wide* codes = cut.take<typename X::Wide>(slice);
  float *scales = cut.take<float>(most), *mins = cut.take<float>(most);
  int32_t* at = cut.take<int32_t>(tiles);
  for (long end = n + count, next; n < end; n = next) {
    next = (n / OUTPUTS + 1) * OUTPUTS;
    if (t.order.at && next > (n / t.height + 1) * t.height) next = (n / t.height + 1) * t.height;
    if (next > end) next = end;
    Panel p = {a, lying, n, next - n, last, at, scales, mins, totals, {}, 0, 0, 0};
    p.template prepare<X>();
    p.ask();
    p.begin(r, rows);
    for (long w = 0, first = 0; w < t.widths; first += t.sections * t.codes[w++].count)
      with_decoder<X>(a, t.codes[w], [&](const auto& of) { add_width<X>(p, of, t.codes[w], first, r, rows, codes); });
    p.put(rows, y);
  }
}

}  // namespace

void product_integer(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y,
                     long last) {
  with_activations(a, [&](auto of) { product_of<decltype(of)>(a, n, count, x, rows, y, last); });
}
