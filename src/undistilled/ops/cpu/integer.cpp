// Products by tiles: rows of x with INT8 and CODED matrices, rounded to INT8 or INT16 by groups of 32, or as they are
// with FP8.
//
// A scale of x is a group's largest magnitude by 127 or 32767. Levels of all codes are whole numbers of -128..127 times
// a power of two: they are multiplied and summed as integers within a group, which is exact, and the sum meets both
// scales in float32, tile after tile as they are stored. So a row has the same bits with every set of instructions that
// has a fused product and sum, in a product of one row and of a thousand, on any number of threads.
// One row of x meets rows of weights one after another, a stream that the processor foresees; more rows meet a slice of
// 16 unpacked in the first cache.
#include "integer.h"
#include "activations.h"
#include "product.h"
#include "scratch.h"

namespace {

constexpr long GROUP = QUANTUM;   // codes of x that share a scale
constexpr long LANES = 8;
constexpr long OUTPUTS = TILE;    // of a panel
constexpr long SLICE = 512;       // inputs whose codes are unpacked at a time

long lanes(long count) { return (count + LANES - 1) / LANES * LANES; }
long padded(const Matrix& a) { return a.kind == CODED ? a.tiling.padded : (a.k + GROUP - 1) / GROUP * GROUP; }

// Sums of x that its product may need: over groups of codes that count from their least level, or have minimums.
long summed(const Matrix& a) {
  return a.kind == CODED && !a.tiling.order.at && a.group >= GROUP ? lanes(a.groups()) : 0;
}

template <class X> struct Row {   // of x, rounded
  const typename X::Code* codes;
  const float *scales, *sums;     // of its groups; of x over the matrix' groups

  Row() {}
  Row(const Matrix& a, const void* at)
      : codes((const typename X::Code*)at), scales((const float*)(codes + padded(a))),
        sums(scales + padded(a) / GROUP) {}
};

// Decoders: 32 codes at w as bytes, and the first `some` of them, zeros behind; values are (bytes + least) times `unit`.
// Where bytes are SMALL they are no more than 127 and not negative.
struct Plain {                         // INT8, FP8
  static constexpr long BLOCK = GROUP;
  static constexpr bool SMALL = false;
  static constexpr float unit = 1, least = 0;
  INLINE c32 load(const uint8_t* w) { return codes_at(w); }
  INLINE c32 load_part(const uint8_t* w, long some) {
    uint8_t padded[GROUP] = {0};
    memcpy(padded, w, some);
    return codes_at(padded);
  }
};

template <int BITS> struct Decoded {   // levels that are looked up
  static constexpr long BLOCK = 4 * BITS;
  static constexpr bool SMALL = false;
  static constexpr float least = 0;
  Lookup<BITS> lookup;
  float unit = 1;

  explicit Decoded(const float* levels) {
    uint8_t bytes[1 << BITS];
    auto whole = [&](int i) { return levels[i] / unit == (float)(int)(levels[i] / unit); };
    for (int i = 0; i < 1 << BITS; i++)
      while (!whole(i)) unit /= 2;
    for (int i = 0; i < 1 << BITS; i++) bytes[i] = (uint8_t)(int)(levels[i] / unit);
    lookup = Lookup<BITS>(bytes);
  }
  __attribute__((always_inline)) c32 load(const uint8_t* w) const { return lookup.find(codes_of<BITS>(w)); }
  __attribute__((always_inline)) c32 load_part(const uint8_t* w, long) const { return load(w); }   // whole as stored
};

template <int BITS> struct Counted {   // levels one apart: codes are multiplied as they are
  static constexpr long BLOCK = 4 * BITS;
  static constexpr bool SMALL = true;
  static constexpr float unit = 1;
  float least;

  explicit Counted(const float* levels) : least(levels[0]) {}
  INLINE bool suits(const float* levels) {
    for (int i = 0; i < 1 << BITS; i++)
      if (levels[i] != levels[0] + i) return false;
    return true;
  }
  INLINE c32 load(const uint8_t* w) { return codes_of<BITS>(w); }
  INLINE c32 load_part(const uint8_t* w, long) { return load(w); }
};

// Codes that are unpacked already.
template <class X> struct Unpacked {
  static constexpr long BLOCK = sizeof(typename X::Wide);
};

// How rows of x meet blocks of a decoder.
template <class X, class W> struct Wide {
  INLINE typename X::Wide at(const W& w, const uint8_t* from) { return X::template wide<W::SMALL>(w.load(from)); }
  INLINE typename X::Wide part(const W& w, const uint8_t* from, long some) { return X::template wide<W::SMALL>(w.load_part(from, some)); }
};
template <class X> struct Wide<X, Unpacked<X>> {
  INLINE typename X::Wide at(const Unpacked<X>&, const uint8_t* from) { return *(const typename X::Wide*)from; }
  INLINE typename X::Wide part(const Unpacked<X>& w, const uint8_t* from, long) { return at(w, from); }
};

// Consecutive tiles of one width: groups of a row, or tiles of a block of rows.
struct Strip {
  const uint8_t* first;
  long row, tile;                 // bytes to the next row, to the next tile
  long tiles, blocks, all;        // blocks of 32 codes in a tile, and in all of a row's that are stored
  const int32_t* at;              // each tile's first input
  const float* scales;
  long by_row, by_tile;           // floats between scales
  long k, ahead;                  // inputs of the matrix; bytes to what is asked for
  bool rows_apart, halves;        // whether a row's tiles follow each other; whether a block has two scales
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
  const float* scales[MR];

  INLINE void at(const Row<X>* x, long k, Inputs* in) {
    UNROLL for (int m = 0; m < MR; m++) in->codes[m] = x[m].codes + k, in->scales[m] = x[m].scales + (k >> 5);
  }
};

// total[m] += a row's codes of a tile at `from` times x[m]: BLOCKS blocks, or where that is 0 `blocks` of which `left`
// codes belong to the row.
template <class X, int MR, int BLOCKS, class W>
INLINE void add(const W& w, const Strip& s, const uint8_t* from, const Inputs<X, MR>& x, const float* scale, long blocks,
                long left, v8* total) {
  typename X::Sum sum[MR];
  UNROLL for (int m = 0; m < MR; m++) sum[m] = X::none();
  auto meet = [&](const typename X::Wide& block, long b) {
    UNROLL for (int m = 0; m < MR; m++)
      X::meet(block, x.codes[m] + b * GROUP, X::SCALED ? x.scales[m][b] : 1, sum[m]);
  };
  UNROLL for (long b = 0; b < BLOCKS; b++) meet(Wide<X, W>::at(w, from + b * W::BLOCK), b);
  for (long b = 0; !BLOCKS && b < blocks; b++, from += W::BLOCK, left -= GROUP)
    meet(left >= GROUP ? Wide<X, W>::at(w, from) : Wide<X, W>::part(w, from, left), b);
  v8 f = splat(*scale);
  // the halves of a block lie in a vector's first and last four lanes
  if (!BLOCKS && s.halves) f = v8{f[0], f[0], f[0], f[0], scale[1], scale[1], scale[1], scale[1]};
  UNROLL for (int m = 0; m < MR; m++) total[m] = fma(X::total(sum[m]), f, total[m]);
}

// totals[r] += the strip times a row of x, in the order in which its bytes lie.
template <class X, int BLOCKS, class W>
__attribute__((noinline)) void straight(const W& from, const Strip& strip, long count, const Row<X>* x, v8* totals) {
  const W w = from;
  const Strip s = strip;
  Inputs<X, 1> in;
  v8 total;
  auto some = [&](auto blocks, long r, long t) {
    const uint8_t* at = s.first + r * s.row + t * s.tile;
    UNROLL for (long o = 0; o < (BLOCKS ? BLOCKS : 1) * W::BLOCK; o += LINE) __builtin_prefetch(at + s.ahead + o, 0, 2);
    const float* scale = s.scales + r * s.by_row + t * s.by_tile;
    add<X, 1, decltype(blocks)::value>(w, s, at, in, scale, s.blocks_of(t), s.k - s.at[t], &total);
  };
  constexpr auto whole = std::integral_constant<int, BLOCKS>(), rest = std::integral_constant<int, 0>();
  if (s.rows_apart)
    for (long r = 0; r < count; r++) {
      total = totals[r];
      for (long t = 0; t < s.whole; t++) Inputs<X, 1>::at(x, s.at[t], &in), some(whole, r, t);
      for (long t = s.whole; t < s.tiles; t++) Inputs<X, 1>::at(x, s.at[t], &in), some(rest, r, t);
      totals[r] = total;
    }
  else
    for (long t = 0; t < s.tiles; t++) {
      Inputs<X, 1>::at(x, s.at[t], &in);
      for (long r = 0; r < count; r++) {
        total = totals[r];
        some(whole, r, t);
        totals[r] = total;
      }
    }
}

// totals[m][r] += unpacked tiles [tile][r][block] times MR rows of x.
template <class X, int MR, int BLOCKS>
__attribute__((noinline)) void slice(const typename X::Wide* codes, const Strip& strip, long count, const Row<X>* x,
                                     v8* totals) {
  const Strip s = strip;
  Inputs<X, MR> in;
  for (long r = 0; r < count; r++) {
    v8 total[MR];
    UNROLL for (int m = 0; m < MR; m++) total[m] = totals[m * OUTPUTS + r];
    auto some = [&](auto blocks, long t) {
      Inputs<X, MR>::at(x, s.at[t], &in);
      const uint8_t* from = (const uint8_t*)(codes + (t * OUTPUTS + r) * s.blocks);
      const float* scale = s.scales + r * s.by_row + t * s.by_tile;
      add<X, MR, decltype(blocks)::value>(Unpacked<X>(), s, from, in, scale, s.blocks_of(t), s.k, total);
    };
    long whole = s.whole < s.tiles ? s.whole : s.tiles;
    for (long t = 0; t < whole; t++) some(std::integral_constant<int, BLOCKS>(), t);
    for (long t = whole; t < s.tiles; t++) some(std::integral_constant<int, 0>(), t);
    UNROLL for (int m = 0; m < MR; m++) totals[m * OUTPUTS + r] = total[m];
  }
}

template <class X, int BLOCKS, int MR>
void some_rows(const typename X::Wide* codes, const Strip& s, long count, const Row<X>* x, long rows, v8* totals) {
  for (; rows >= MR; rows -= MR, x += MR, totals += MR * OUTPUTS) slice<X, MR, BLOCKS>(codes, s, count, x, totals);
  if constexpr (MR > 1)
    if (rows) some_rows<X, BLOCKS, MR - 1>(codes, s, count, x, rows, totals);
}

template <class X, class W> void unpack(const W& w, const Strip& s, long count, typename X::Wide* codes) {
  auto some = [&](long r, long t) {
    const uint8_t* from = s.first + r * s.row + t * s.tile;
    for (long b = 0, left = s.k - s.at[t]; b < s.blocks_of(t); b++, from += W::BLOCK, left -= GROUP) {
      __builtin_prefetch(from + s.ahead, 0, 2);
      codes[(t * OUTPUTS + r) * s.blocks + b] =
          left >= GROUP ? Wide<X, W>::at(w, from) : Wide<X, W>::part(w, from, left);
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
    if (s.blocks == 4) return run(std::integral_constant<int, 4>());
    if (s.blocks == 2) return run(std::integral_constant<int, 2>());
    if (s.blocks == 1 && !s.halves) return run(std::integral_constant<int, 1>());
    return run(std::integral_constant<int, 0>());
  };
  if (rows == 1) return by_blocks([&](auto n) { straight<X, decltype(n)::value>(w, s, count, x, totals); });
  long slices = (s.tiles * s.blocks * GROUP + SLICE - 1) / SLICE, some = (s.tiles + slices - 1) / slices;   // alike
  for (long tiles = s.tiles; tiles > 0; tiles -= some) {
    s.tiles = tiles < some ? tiles : some;
    unpack<X>(w, s, count, codes);
    by_blocks([&](auto n) { some_rows<X, decltype(n)::value, 4>(codes, s, count, x, rows, totals); });
    s.skip(some);
  }
}

// Up to 8 scales or minimums from the i-th stored number on, of which `some` are there.
enum { SCALES_F32 = SCALES_E8M0 + 1 };
INLINE v8 factors_at(int format, const uint8_t* from, long i, long some) {
  v8 v = splat(0);
  auto by = [&](auto loader) {
    typedef decltype(loader) L;
    some < LANES ? load_tail<L>(from + i * L::BYTES, some, &v) : L::load(from + i * L::BYTES, &v);
  };
  if (format == SCALES_F32) by(Fp32());
  if (format == SCALES_F16) by(Fp16());
  if (format == SCALES_E4M3) by(Fp8()), v = v * splat(256);
  if (format == SCALES_E8M0)
    for (long j = 0; j < LANES; j++) {
      uint32_t code = j < some ? from[i + j] : 0, bits = code ? code << 23 : 1 << 22;
      float f;
      memcpy(&f, &bits, 4);
      v[j] = f;
    }
  return v;
}

// How a matrix' codes, scales and minimums lie, INT8's and FP8's among them: as groups of a row, cut where they are long.
struct Lying {
  Tiling tiling;
  long by_tile;                   // scales of a tile

  explicit Lying(const Matrix& a) : tiling(a.tiling), by_tile(0) {
    if (a.kind == CODED) {
      by_tile = tiling.cols / a.group;
      return;
    }
    Tiling& t = tiling = {};
    bool whole = a.group >= a.k;   // one scale a row
    t.height = 1, t.sections = 1, t.widths = 1;
    t.cols = whole ? 4 * GROUP : a.group;
    t.tiles = (a.k + t.cols - 1) / t.cols;
    t.factors = whole ? 1 : t.tiles;
    t.padded = padded(a);
    by_tile = whole ? 0 : 1;
    t.codes[0] = {8, t.tiles, a.k, a.values, nullptr};
  }
};

// Calls f with the decoder of a width.
template <class F> INLINE void with_decoder(const Matrix& a, const Codes& c, F f) {
  if (a.kind != CODED) return f(Plain());
  with_bits(c.bits, [&](auto bits) {
    constexpr int BITS = decltype(bits)::value;
    summed(a) && Counted<BITS>::suits(c.levels) ? f(Counted<BITS>(c.levels)) : f(made_of<Decoded<BITS>>(c.levels));
  });
}

struct Panel {                    // up to OUTPUTS rows of a matrix: places and factors of its tiles
  const Matrix& a;
  const Lying& lying;
  long n, count, last;
  int32_t* at;
  float *scales, *mins;
  v8* totals;
  float units[5];                 // of the widths
  float least;                    // of a matrix in groups: the level of code 0
  long by_row, by_tile;

  void by_rows(int format, const Part& from, const Part& multipliers, float unit, float* out) {
    long factors = lying.tiling.factors;
    for (long r = 0; r < count; r++) {
      long line = a.kind == FP8_BLOCK ? (n + r) / 128 : n + r;
      v8 f = splat(multipliers.at ? unit * bf16_to_float(((const uint16_t*)multipliers.at)[n + r]) : unit);
      for (long i = 0; i < factors; i += LANES)
        store(out + r * by_row + i, factors_at(format, from.at, line * factors + i, factors - i) * f);
    }
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
  void prepare() {
    const Tiling& t = lying.tiling;
    for (long w = 0; w < t.widths; w++)
      with_decoder(a, t.codes[w], [&](const auto& d) { units[w] = d.unit, least = d.least; });
    if (t.order.at) {
      by_row = 1, by_tile = OUTPUTS;
      return by_tiles();
    }
    by_row = lanes(t.factors), by_tile = lying.by_tile;
    for (long i = 0; i < t.tiles; i++) at[i] = i * t.cols;
    float unit = a.kind == FP8_BLOCK ? AsFloats::UNIT : units[0];
    by_rows(a.kind == CODED ? t.format : (int)SCALES_F32, a.scales, t.multipliers, unit, scales);
    if (a.mins.at) by_rows(SCALES_F16, a.mins, {}, 1, mins);
    for (long i = 0; least && i < count * by_row; i += LANES)
      store(mins + i, fma(load(scales + i), splat(least), a.mins.at ? load(mins + i) : splat(0)));
  }
  // Totals begin with the minimums times the sums of x.
  template <class X> void begin(const Row<X>* x, long rows) {
    for (long m = 0; m < rows; m++)
      for (long r = 0; r < count; r++) {
        v8 total = splat(0);
        for (long i = 0; (a.mins.at || least) && i < by_row; i += LANES)
          total = fma(load(mins + r * by_row + i), load(x[m].sums + i), total);
        totals[m * OUTPUTS + r] = total;
      }
  }
  void put(long rows, float* const* y) {
    for (long m = 0; m < rows; m++)
      for (long r = 0; r < count; r++) y[m][n + r] = sum(totals[m * OUTPUTS + r]);
  }
  template <class X, class W>
  void width(const W& w, const Codes& c, long first, const Row<X>* x, long rows, typename X::Wide* codes) {
    const Tiling& t = lying.tiling;
    bool apart = !t.order.at;
    long blocks = t.cols / GROUP, tile = blocks * W::BLOCK, tiles = t.sections * c.count;
    long row = apart ? c.block : tile, all = apart ? t.padded / GROUP : tiles * blocks;
    long ahead = apart ? (n + count + NEAR / row < last ? NEAR : 0) : ahead_of(c.block, t.height, n, last);
    long whole = (a.kind == CODED ? all : a.k / GROUP) / blocks;
    Strip s = {tile_at(t, c, n, 0), row, tile * t.height, tiles, blocks, all, at + first, scales + first * by_tile,
               by_row, by_tile, a.k, ahead, apart, a.kind == CODED && a.group < GROUP, whole};
    multiply<X>(w, s, count, x, rows, codes, totals);
  }
};

thread_local Scratch scratch, kept;

template <class X>
void product_of(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y, long last) {
  const Lying lying(a);
  const Tiling& t = lying.tiling;
  Row<X>* r = (Row<X>*)kept.of(rows * sizeof(Row<X>));
  for (long m = 0; m < rows; m++) r[m] = Row<X>(a, x[m]);
  long tiles = t.sections * t.tiles, most = OUTPUTS * lanes(t.order.at ? tiles : t.factors);
  long slice = rows > 1 ? OUTPUTS * (SLICE + t.cols) / GROUP : 0;
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
    p.prepare();
    p.ask();
    p.begin(r, rows);
    for (long w = 0, first = 0; w < t.widths; first += t.sections * t.codes[w++].count)
      if constexpr (X::SCALED)
        with_decoder(a, t.codes[w], [&](const auto& of) { p.width<X>(of, t.codes[w], first, r, rows, codes); });
      else
        p.width<X>(Plain(), t.codes[w], first, r, rows, codes);
    p.put(rows, y);
  }
}

// The largest magnitude of x; NaN where there is one: of floats without sign, bits are in the order of values.
INLINE float largest(const float* x, long count) {
  i8x most = {};
  for (long i = 0; i < count; i += 8) {
    i8x v = (i8x)(count - i < 8 ? load_part(x + i, count - i) : load(x + i)) & 0x7fffffff;
    most = v > most ? v : most;
  }
  int32_t bits = 0;
  for (int i = 0; i < 8; i++) bits = most[i] > bits ? most[i] : bits;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// A group's codes, zeros behind the last, and their sum.
template <class X> INLINE int round_group(const float* x, long count, float inverse, typename X::Code* codes) {
  const v8 magic = splat(0x1.8p23f);   // beside it floats are integers: the sum rounds to nearest, ties to even
  i8x sums = {}, v[GROUP / 8];
  UNROLL for (int j = 0; j < GROUP / 8; j++) {
    long left = count - 8 * j;
    v8 some = left >= 8 ? load(x + 8 * j) : left > 0 ? load_part(x + 8 * j, left) : splat(0);
    v[j] = (i8x)(some * splat(inverse) + magic) - (i8x)magic;
    sums += v[j];
  }
  X::put(v, codes);
  int sum = 0;
  for (int i = 0; i < 8; i++) sum += sums[i];
  return sum;
}

void arrange_floats(const Matrix& a, const float* x, uint16_t* out) {
  float* to = (float*)out;
  for (long k = 0; k < padded(a); k += GROUP, to += GROUP)
    for (long i = 0; i < GROUP; i++) {
      long from = k + i % 8 * 4 + 3 - i / 8;
      to[i] = from < a.k ? x[from] * AsFloats::TIMES : 0;
    }
}

template <class X> void arrange_row(const Matrix& a, const float* x, uint16_t* out) {
  Row<X> to(a, out);
  typename X::Code* codes = (typename X::Code*)to.codes;
  float *scales = (float*)to.scales, *sums = (float*)to.sums;
  if (summed(a)) memset(sums, 0, summed(a) * 4);
  for (long k = 0, g = 0; k < padded(a); k += GROUP, g++) {
    long left = a.k - k, count = left >= GROUP ? GROUP : left > 0 ? left : 0;
    float most = largest(x + k, count);
    bool none = most < 0x1p-100f;   // less would have no inverse
    scales[g] = none ? 0 : most / X::LARGEST + most * 0;   // NaN where there is an infinity
    int sum = round_group<X>(x + k, count, none ? 0 : X::LARGEST / most, codes + k);
    if (summed(a) && k < a.k) sums[k / a.group] += scales[g] * sum;
  }
}

}  // namespace

long arranged_integer(const Matrix& a) {
  if (a.rounds == TO_ORDER) return 2 * padded(a);
  long codes = a.rounds == TO_INT8 ? padded(a) / 2 : padded(a);
  return codes + 2 * (padded(a) / GROUP) + 2 * summed(a);
}

void arrange_integer(const Matrix& a, const float* x, uint16_t* out) {
  if (a.rounds == TO_INT8) return arrange_row<ToInt8>(a, x, out);
  if (a.rounds == TO_INT16) return arrange_row<ToInt16>(a, x, out);
  arrange_floats(a, x, out);
}

void product_integer(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y,
                     long last) {
  if (a.rounds == TO_INT8) return product_of<ToInt8>(a, n, count, x, rows, y, last);
  if (a.rounds == TO_INT16) return product_of<ToInt16>(a, n, count, x, rows, y, last);
  product_of<AsFloats>(a, n, count, x, rows, y, last);
}
