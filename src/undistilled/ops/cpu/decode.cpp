// Rows of CODED matrices as float32, on any processor.
#include "levels.h"

namespace {

// Levels, which BF16 holds, as the two bytes of each.
template <int BITS> struct Levels {
  Lookup<BITS> low, high;

  explicit Levels(const float* levels) {
    uint8_t bytes[2][1 << BITS];
    for (int i = 0; i < 1 << BITS; i++) {
      uint32_t bits;
      memcpy(&bits, levels + i, 4);
      bytes[0][i] = bits >> 16;
      bytes[1][i] = bits >> 24;
    }
    low = Lookup<BITS>(bytes[0]);
    high = Lookup<BITS>(bytes[1]);
  }
  // w[i] = levels of the codes 8i..8i + 8 of a block.
  __attribute__((always_inline)) void load(const uint8_t* at, v8* w) const {
    c32 codes = codes_of<BITS>(at);
    bf16s(low.find(codes), high.find(codes), w);
  }
};

// A row's place in its block, which is worked out once.
struct Row {
  const Matrix& a;
  const Tiling& t;
  const long row, block, inside, by_tile;   // by_tile: scales of a tile
  const long ahead;                         // blocks to the one that is asked for
  const float multiplier;

  Row(const Matrix& a, long row)
      : a(a), t(a.tiling), row(row), block(row / t.height), inside(row % t.height), by_tile(t.cols / a.group),
        ahead(blocks_ahead()), multiplier(t.multipliers.at ? bf16_to_float(((const uint16_t*)t.multipliers.at)[row]) : 1) {}
  long blocks_ahead() const {
    long bytes = 0;
    for (int w = 0; w < t.widths; w++) bytes += t.codes[w].block;
    return ahead_of(bytes, t.height, row, a.n) / bytes;
  }
  // The i-th scale of the row as it is stored, i counted by section and place.
  float scale(long i) const {
    long at = (block * t.factors + i) * t.height + inside;
    if (t.format == SCALES_F16) return half_to_float(((const uint16_t*)a.scales.at)[at]) * multiplier;
    uint32_t code = a.scales.at[at], bits = code ? code << 23 : 1 << 22;
    if (t.format == SCALES_E4M3) return half_to_float((uint16_t)((int8_t)code * 128 & 0xbfff)) * 256 * multiplier;
    float f;
    memcpy(&f, &bits, 4);
    return f * multiplier;
  }
  float low(long i) const { return a.mins.at ? half_to_float(((const uint16_t*)a.mins.at)[row * t.factors + i]) : 0; }

  // out[k..) = the values of the i-th tile, whose codes lie at w and whose first input is k.
  template <int BITS> void tile(const Levels<BITS>& levels, const uint8_t* w, long i, long k, float* out) const {
    const bool halves = a.group < QUANTUM;   // of a block have scales of their own
    long end = k + t.cols < a.k ? k + t.cols : a.k, next = k, factor = i * by_tile;
    v8 f[2] = {splat(0), splat(0)}, low[2] = {splat(0), splat(0)};
    for (; k < end; k += QUANTUM, w += 4 * BITS) {
      if (k == next) {
        for (int h = 0; h < 2; h++) {
          long at = factor + (halves && k + QUANTUM / 2 < end ? h : 0);
          f[h] = splat(scale(at));
          low[h] = splat(this->low(at));
        }
        factor += halves ? 2 : 1;
        next += halves ? QUANTUM : a.group;
      }
      v8 v[4];
      levels.load(w, v);
      UNROLL for (int j = 0; j < 4; j++) v[j] = v[j] * f[j / 2] + low[j / 2];
      if (end - k >= QUANTUM)
        UNROLL for (int j = 0; j < 4; j++) store(out + k + 8 * j, v[j]);
      else
        memcpy(out + k, v, (end - k) * 4);
    }
  }
  static void ask(const uint8_t* w, long bytes) {
    for (long o = 0; o < bytes; o += LINE) __builtin_prefetch(w + o, 0, 2);
  }
  // The tiles of a width, the first of which is the first-th of a section.
  template <int BITS> void width(const Codes& c, long first, float* out) const {
    const Levels<BITS> levels = made_of<Levels<BITS>>(c.levels);
    const int16_t* order = (const int16_t*)t.order.at;
    long bytes = t.cols / 8 * BITS;
    const uint8_t* w = c.values.at + block * c.block + inside * bytes;
    for (long s = 0; s < t.sections; s++)
      for (long i = s * t.tiles + first, last = i + c.count; i < last; i++, w += t.height * bytes) {
        long place = order ? s * t.tiles + order[block * t.sections * t.tiles + i] : i;
        if (ahead) ask(w + ahead * c.block, bytes);
        tile<BITS>(levels, w, i, place * t.cols, out);
      }
  }
};

}  // namespace

void decode_coded(const Matrix& a, long row, float* out) {
  const Row r(a, row);
  for (long w = 0, first = 0; w < a.tiling.widths; first += a.tiling.codes[w++].count)
    with_bits(a.tiling.codes[w].bits, [&](auto bits) {
      r.width<decltype(bits)::value>(a.tiling.codes[w], first, out);
    });
}
