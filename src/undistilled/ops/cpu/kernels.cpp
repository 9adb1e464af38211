// Linear layers on stored weights.
#include "across.h"
#include "coded.h"
#include "pool.h"
#include "integer.h"
#include "product.h"
#include "tiles.h"

namespace {

template <class L>
void tile_of(const Matrix& a, long n, int count, const float* const* x, const float* const* sums, long rows,
             float* const* y) {
  for (long m0 = 0; m0 < rows; m0 += ROWS) {
    long part = rows - m0 < ROWS ? rows - m0 : ROWS;
    Totals total[ROWS];
    for (long m = 0; m < part; m++)
      for (int j = 0; j < count; j++) total[m][j] = splat(0);
    add_tile<L>(a, n, count, x + m0, part, total);
    if (a.kind == INT4) add_tile<Fp16>(offsets(a), n, count, sums + m0, part, total);
    for (long m = 0; m < part; m++)
      for (int j = 0; j < count; j++) y[m0 + m][n + j] = sum(total[m][j]);
  }
}

thread_local Scratch scratch, prepared;

// A coded tile as float32 rows: one look-up serves all rows of x.
void tile_coded(const Matrix& a, long n, int count, const float* const* x, long rows, float* const* y) {
  Matrix wide = {FP32, 0, count, a.k, a.k, {}, {}, {}, {}};
  float* decoded = (float*)scratch.of(count * a.k * 4);
  wide.values.at = (const uint8_t*)decoded;
  for (int j = 0; j < count; j++) decode_coded(a, n + j, decoded + j * a.k);
  for (long m0 = 0; m0 < rows; m0 += ROWS) {
    long part = rows - m0 < ROWS ? rows - m0 : ROWS;
    float* to[ROWS];
    for (long m = 0; m < part; m++) to[m] = y[m0 + m] + n;
    tile_of<Fp32>(wide, 0, count, x + m0, nullptr, part, to);
  }
}

template <class L> void decode_scaled(const Matrix& a, long i, float* out) {
  long k = a.k, group = a.group;
  float factors[PANEL], lows[PANEL];
  for (long k0 = 0, k1; k0 < k; k0 = k1) {
    k1 = panel_end(a, k0);
    decode<L>(a.row(i), k0, k1, out + k0);
    if (a.kind <= BF16) continue;
    panel_scales(a, i, k0, k1, factors);
    if (a.mins.at) {
      Matrix b = a;
      b.scales = a.mins;
      panel_scales(b, i, k0, k1, lows);
    }
    for (long g = 0, from = k0; from < k1; g++) {
      long end = (from / group + 1) * group;
      end = end < k1 ? end : k1;
      v8 f = splat(factors[g]), low = splat(a.mins.at ? lows[g] : 0);
      auto scaled = [&](v8 w) {
        return a.kind != INT4 ? w * f : a.mins.at ? fma(w, f, low) : (w - splat(8)) * f;
      };
      for (; from + 8 <= end; from += 8) store(out + from, scaled(load(out + from)));
      if (from < end) store_part(out + from, scaled(load_part(out + from, end - from)), end - from);
      from = end;
    }
  }
}

// prepare(i) for every row: by each thread in memory of its own, or shared.
template <class F> void each_row(Team& team, bool own, long rows, F prepare) {
  if (own) {
    for (long i = 0; i < rows; i++) prepare(i);
    return;
  }
  team.share(rows, prepare);
  team.barrier();
}

// Rows of x cost a thread less to prepare by itself than to wait for others' share of them, up to so many elements.
constexpr long OWN = 1 << 14;

struct Linear : Kernel<Linear> {
  const Matrix& a;
  const float* x;
  float* y;
  long m;

  Linear(const Matrix& a, const float* x, float* y, long m) : a(a), x(x), y(y), m(m) {
    name = "linear";
    weights = bytes_of(a);
    small = m * a.n * a.k <= SERIAL;
    shared = !own();
    reads(x, m * a.k * 4);
    writes(y, m * a.n * 4);
  }
  bool own() const { return small || m * a.k <= OWN || !has_offsets(a); }
  struct Rows {
    const float **x, **sums;
    float **y, *buffer;
    long bytes;
  };
  Rows rows(void* at) const {
    Cutter cut = {(char*)at};
    long groups = has_offsets(a) ? a.groups() : 0;
    return {cut.take<const float*>(m), cut.take<const float*>(m), cut.take<float*>(m), cut.take<float>(m * groups),
            cut.at - (char*)at};
  }
  long scratch() const override { return own() ? 0 : rows(nullptr).bytes; }
  void run(Team& team) const override {
    Rows r = rows(own() ? prepared.of(rows(nullptr).bytes) : team.scratch);
    auto prepare = [&](long i) {
      r.x[i] = x + i * a.k;
      r.y[i] = y + i * a.n;
      r.sums[i] = r.buffer + i * a.groups();
      if (has_offsets(a)) group_sums(a, r.x[i], r.buffer + i * a.groups());
    };
    each_row(team, own(), m, prepare);
    team.share((a.n + TILE - 1) / TILE, [&](long at) {
      long n = at * TILE;
      tile(a, n, a.n - n < TILE ? a.n - n : TILE, r.x, r.sums, m, r.y);
    });
  }
};

struct Rounded : Kernel<Rounded> {
  const Matrix& a;
  const float* x;
  float* y;
  long m, row;

  Rounded(const Matrix& a, const float* x, float* y, long m)
      : a(a), x(x), y(y), m(m), row((arranged(a) + 31) / 32 * 32) {
    name = NAMES[a.rounds];
    weights = bytes_of(a);
    small = m * a.n * a.k <= SERIAL;
    shared = !own();
    reads(x, m * a.k * 4);
    writes(y, m * a.n * 4);
  }
  static constexpr const char* NAMES[] = {"", "linear bf16", "linear int8", "linear int16", "linear"};
  bool own() const { return small || m * a.k <= OWN; }
  bool crossed() const { return m >= ROWS && crosses(a); }
  bool tiled() const { return in_tiles(a, m); }
  struct Rows {
    const uint16_t** x;
    float** y;
    uint16_t* buffer;
    long bytes;
  };
  Rows rows(void* at) const {
    Cutter cut = {(char*)at};
    long all = tiled() ? Tiled::bytes(a, m) / 2 : m * row;
    return {cut.take<const uint16_t*>(m), cut.take<float*>(m), cut.take<uint16_t>(all), cut.at - (char*)at};
  }
  long scratch() const override { return own() ? 0 : rows(nullptr).bytes; }
  // Asks for the first weights of a thread's own part, where each is used at once.
  void ask(Team& team, long panels) const {
    const Tiling& t = a.tiling;
    if (m > 3 || (a.kind == CODED && t.height > 1)) return;
    long from = panels * team.rank / team.size * TILE, to = panels * (team.rank + 1) / team.size * TILE;
    long row = a.kind == CODED ? t.codes[0].block : a.row_bytes(), bytes = ((to < a.n ? to : a.n) - from) * row;
    const uint8_t* at = (a.kind == CODED ? t.codes[0].values.at : a.values.at) + from * row;
    for (long o = 0; o < bytes && o < AHEAD; o += 64) __builtin_prefetch(at + o, 0, 2);
  }
  void run(Team& team) const override {
    Rows r = rows(own() ? prepared.of(rows(nullptr).bytes) : team.scratch);
    const Tiled tiles(a, m, r.buffer);
    ask(team, (a.n + TILE - 1) / TILE);
    each_row(team, own(), m, [&](long i) {
      r.x[i] = r.buffer + i * row;
      r.y[i] = y + i * a.n;
      if (tiled()) return arrange_tiled(a, x + i * a.k, tiles, i);
      (crossed() ? arrange_crossed : arrange)(a, x + i * a.k, r.buffer + i * row);
    });
    // Rows of weights stay in a core's cache while a block of rows of x passes by.
    long width = m >= ROWS ? 4 * TILE : tiled() ? 2 * TILE : TILE, block = m < PART ? m : PART;
    long parts = m ? (m + block - 1) / block : 0;
    while (width > TILE && a.n / width * parts < 2 * team.size) width /= 2;
    long panels = (a.n + width - 1) / width;
    long last = panels * (team.rank + 1) / team.size * width;
    team.share(panels * parts, [&](long at) {
      long n0 = at / parts * width, m0 = at % parts * block;
      long n = a.n - n0 < width ? a.n - n0 : width, rows = m - m0 < block ? m - m0 : block;
      if (tiled()) return product_tiled(a, n0, n, tiles, m0, rows, r.y + m0);
      if (crossed()) return product_crossed(a, n0, n, r.x + m0, rows, r.y + m0);
      product(a, n0, n, r.x + m0, rows, r.y + m0, last);
    });
  }
};

struct Dequantise : Kernel<Dequantise> {
  const Matrix& a;
  float* out;
  long n0, n1;

  Dequantise(const Matrix& a, float* out, long n0, long n1) : a(a), out(out), n0(n0), n1(n1) {
    name = "dequantise";
    small = (n1 - n0) * a.k <= SERIAL;
    writes(out, (n1 - n0) * a.k * 4);
  }
  void run(Team& team) const override {
    team.share(n1 - n0, [&](long i) { decode_row(a, n0 + i, out + i * a.k); });
  }
};

}  // namespace

void decode_row(const Matrix& a, long i, float* out) {
  if (a.kind == CODED) return decode_coded(a, i, out);
  if (a.kind >= ACROSS) return decode_across(a, i, out);
  with_loader(a.kind, [&](auto loader) { decode_scaled<decltype(loader)>(a, i, out); });
}

long bytes_of(const Matrix& a) {
  const Tiling& t = a.tiling;
  bool fp8 = a.kind == FP8_BLOCK || a.kind == FP8_ACROSS;
  long rows = fp8 ? (a.n + 127) / 128 : a.n, bytes = 0;
  long scale = t.format == SCALES_F32 ? 4 : t.format == SCALES_F16 ? 2 : 1;
  if (a.kind == ACROSS) return a.n * (a.row_bytes() + a.groups() * scale);
  if (a.kind != CODED) return a.n * a.row_bytes() + (a.scales.at ? rows * a.groups() * (a.kind == INT4 ? 2 : 4) : 0);
  for (int w = 0; w < t.widths; w++) bytes += (a.n + t.height - 1) / t.height * t.codes[w].block;
  return bytes + a.n * t.factors * scale;
}

void tile(const Matrix& a, long n, int count, const float* const* x, const float* const* sums, long rows,
          float* const* y) {
  if (a.kind == CODED) return tile_coded(a, n, count, x, rows, y);
  with_loader(a.kind, [&](auto loader) { tile_of<decltype(loader)>(a, n, count, x, sums, rows, y); });
}

extern "C" {

// The state of the sources that this was built from: the Python side must be of the same.
const char* native_sources(void) { return SOURCES; }

void native_linear(const Matrix* a, const float* x, float* y, long m) { submit(Linear(*a, x, y, m)); }

// native_linear with x rounded as the matrix says; aborts, as all products of matrices that round to BF16 do, where
// HAS_PRODUCTS is 0.
void native_linear_rounded(const Matrix* a, const float* x, float* y, long m) { submit(Rounded(*a, x, y, m)); }

// out [n1 - n0, k] = rows n0..n1 as float32.
void native_dequantise(const Matrix* a, float* out, long n0, long n1) { submit(Dequantise(*a, out, n0, n1)); }

}  // extern "C"
