// Products of rows of x, rounded to BF16, with CODED matrices.
//
// A processor's table look-up of 32 words turns 32 codes into BF16 at once and ignores all but the 5 lowest bits of a
// code's word: bytes repeated over the register and shifted by a constant for each word are 32 codes already, with
// their neighbours above them. They come out in an order of their own, in which x is laid out once.
// Few rows of x meet the codes as they are stored, more meet a slice of them unpacked in the first cache; what is
// summed in which order depends on the matrix alone, so both give a row the same bits.
#include "coded.h"
#include "product.h"
#include "scratch.h"

#if HAS_PRODUCTS
#pragma GCC diagnostic ignored "-Wuninitialized"   // GCC 12 sees both inside its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "codes.h"

namespace {

constexpr long SLICE = 512;    // inputs whose codes are unpacked at a time
constexpr int OUTPUTS = TILE;  // of a panel
constexpr int LANES = 16;      // floats of a register
constexpr uint16_t HALVES = 0xf0f0;   // lanes that hold the second 16 of 32 codes, see FIRST in codes.h

long lanes(long count) { return (count + LANES - 1) / LANES * LANES; }

// Consecutive tiles of one width.
struct Strip {
  long tiles, blocks, all;       // blocks of 32 codes in a tile, and in a row's tiles of this width from here on
  const int32_t* at;             // each tile's first input
  const float* scales;
  long by_row, by_tile;          // floats between scales
  bool halves;                   // whether a tile has two scales
};

// Codes of rows where they are stored. A cursor stands at a block of 32 of a tile, for several rows.
template <int BITS> struct AsStored {
  Decoder<BITS> decoder;
  const uint8_t* first;
  long row, tile, ahead;         // bytes to the next row, to the next tile, to what is read after these rows

  struct Cursor {                // three places, so that up to 9 rows are reached by scaled addresses
    const uint8_t *a, *b, *c;
    INLINE void step(Cursor& p, long bytes) { p.a += bytes, p.b += bytes, p.c += bytes; }
  };
  static constexpr long BLOCK = 4 * BITS;
  INLINE Cursor at(const AsStored& w, long r) {
    const uint8_t* p = w.first + r * w.row;
    return {p, p + 3 * w.row, p + 6 * w.row};
  }
  INLINE b32 load(const AsStored& w, const Cursor& p, int j) {
    return w.decoder.load((j < 3 ? p.a : j < 6 ? p.b : p.c) + j % 3 * w.row);
  }
  template <int NR> INLINE void prefetch(const AsStored& w, const Cursor& p) {
    if ((uintptr_t)p.a % 64 >= (uintptr_t)w.tile) return;   // rows are too many and too short to be foreseen
    UNROLL for (int j = 0; j < NR; j++)
      _mm_prefetch((const char*)(j < 3 ? p.a : j < 6 ? p.b : p.c) + j % 3 * w.row + w.ahead, _MM_HINT_T1);
  }
};

struct Unpacked {
  const uint16_t* codes;         // [tile][block][OUTPUTS][32]
  long tile;                     // bytes to the next

  struct Cursor {
    const uint8_t* a;
    INLINE void step(Cursor& p, long bytes) { p.a += bytes; }
  };
  static constexpr long BLOCK = OUTPUTS * 64;
  INLINE Cursor at(const Unpacked& w, long r) { return {(const uint8_t*)w.codes + r * 64}; }
  INLINE b32 load(const Unpacked&, const Cursor& p, int j) { return (b32)_mm512_load_si512(p.a + j * 64); }
  template <int NR> INLINE void prefetch(const Unpacked&, const Cursor&) {}
};

// totals[m][r][LANES] += x[m] . the strip's codes of the rows r.., NR of them, times their scales.
template <class W, int MR, int NR>
void multiply(const W& from, const Strip& s, long r, const uint16_t* const* x, float* totals) {
  const W w = from;
  __m512 total[MR][NR], acc[MR][NR];
  UNROLL for (int m = 0; m < MR; m++)
    UNROLL for (int j = 0; j < NR; j++) total[m][j] = _mm512_load_ps(totals + (m * OUTPUTS + r + j) * LANES);
  const float* f = s.scales + r * s.by_row;
  auto tile = W::at(w, r);
  const long by_row = s.by_row, by_tile = s.by_tile, whole = s.blocks;
  const bool halves = s.halves;
  long left = s.all;
  for (const int32_t *at = s.at, *end = at + s.tiles; at < end; at++, left -= whole, f += by_tile) {
    W::template prefetch<NR>(w, tile);
    UNROLL for (int m = 0; m < MR; m++)
      UNROLL for (int j = 0; j < NR; j++) acc[m][j] = _mm512_setzero_ps();
    auto p = tile;
    for (long k = *at, end = k + (left < whole ? left : whole) * QUANTUM; k < end; k += QUANTUM) {
      __m512i v[MR];
      UNROLL for (int m = 0; m < MR; m++) v[m] = _mm512_load_si512(x[m] + k);
      UNROLL for (int j = 0; j < NR; j++) {
        b32 codes = W::load(w, p, j);
        UNROLL for (int m = 0; m < MR; m++) acc[m][j] = _mm512_dpbf16_ps(acc[m][j], (b32)v[m], codes);
      }
      W::Cursor::step(p, W::BLOCK);
    }
    W::Cursor::step(tile, w.tile);
    const float* g = f;
    UNROLL for (int j = 0; j < NR; j++, g += by_row) {
      __m512 scale = _mm512_set1_ps(*g);
      if (halves) scale = _mm512_mask_broadcastss_ps(scale, HALVES, _mm_load_ss(g + 1));
      UNROLL for (int m = 0; m < MR; m++) total[m][j] = _mm512_fmadd_ps(acc[m][j], scale, total[m][j]);
    }
  }
  UNROLL for (int m = 0; m < MR; m++)
    UNROLL for (int j = 0; j < NR; j++) _mm512_store_ps(totals + (m * OUTPUTS + r + j) * LANES, total[m][j]);
}

template <class W, int MR, int NR>
void outputs(const W& w, const Strip& s, long count, const uint16_t* const* x, float* totals) {
  long r = 0;
  for (; r + NR <= count; r += NR) multiply<W, MR, NR>(w, s, r, x, totals);
  for (; r < count; r++) multiply<W, MR, 1>(w, s, r, x, totals);
}

// What the tiles of a panel of up to OUTPUTS rows need beside their codes: places and factors as float32.
struct Panel {
  const Matrix& a;
  long n, count;
  int32_t* at;
  float *scales, *mins, *totals;
  long by_row, by_tile, last;

  // LANES scales or minimums from the i-th stored number on, of which `some` are there.
  static __m512 read(int format, const uint8_t* from, long i, long some) {
    __mmask16 here = some < LANES ? (1u << some) - 1 : 0xffff;
    if (format == SCALES_F16) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, from + 2 * i));
    __m128i bytes = _mm_maskz_loadu_epi8(here, from + i);
    if (format == SCALES_E8M0)
      return (__m512)_mm512_max_epu32(_mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23), _mm512_set1_epi32(1 << 22));
    __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7), _mm256_set1_epi16((short)0xbfff));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256));
  }
  void by_rows(int format, const Part& from, const Part& multipliers, float* out) {
    long factors = a.tiling.factors, pad = lanes(factors);
    for (long r = 0; r < count; r++) {
      __m512 f = _mm512_set1_ps(multipliers.at ? bf16_to_float(((const uint16_t*)multipliers.at)[n + r]) : 1);
      for (long i = 0; i < factors; i += LANES)
        _mm512_store_ps(out + r * pad + i,
                        _mm512_mul_ps(read(format, from.at, (n + r) * factors + i, factors - i), f));
    }
  }
  void by_tiles() {
    const Tiling& t = a.tiling;
    long block = n / t.height, inside = n % t.height, to = 0;
    __m256i bits = _mm256_maskz_loadu_epi16((1u << count) - 1, (const uint16_t*)t.multipliers.at + n);
    __m512 f = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
    each_tile(t, [&](const Codes&, long, long i) {
      at[to] = place_of(t, block, i) * t.cols;
      __m512 scale = read(t.format, a.scales.at, (block * t.factors + i) * t.height + inside, count);
      _mm512_store_ps(scales + to++ * LANES, _mm512_mul_ps(scale, f));
    });
  }
  void prepare() {
    const Tiling& t = a.tiling;
    if (t.order.at) {
      by_row = 1, by_tile = LANES;
      return by_tiles();
    }
    by_row = lanes(t.factors), by_tile = t.cols / a.group;
    for (long i = 0; i < t.tiles; i++) at[i] = i * t.cols;
    by_rows(t.format, a.scales, t.multipliers, scales);
    if (a.mins.at) by_rows(SCALES_F16, a.mins, {}, mins);
  }
  // The minimums meet the sums of x, LANES groups at a time.
  void begin(const uint16_t* const* x, long rows) {
    for (long m = 0; m < rows; m++)
      for (long r = 0; r < count; r++) {
        __m512 total = _mm512_setzero_ps();
        const float *low = mins + r * by_row, *sums = (const float*)(x[m] + a.tiling.padded);
        for (long i = 0; a.mins.at && i < by_row; i += LANES)
          total = _mm512_fmadd_ps(_mm512_load_ps(low + i), _mm512_load_ps(sums + i), total);
        _mm512_store_ps(totals + (m * OUTPUTS + r) * LANES, total);
      }
  }
  void put(long rows, float* const* y) {
    for (long m = 0; m < rows; m++)
      for (long r = 0; r < count; r++)
        y[m][n + r] = _mm512_reduce_add_ps(_mm512_load_ps(totals + (m * OUTPUTS + r) * LANES));
  }

  template <int BITS>
  void width(const Codes& c, long first, const uint16_t* const* x, long rows, uint16_t* unpacked) {
    const Tiling& t = a.tiling;
    long tile = t.cols / 8 * c.bits, row = t.height > 1 ? tile : c.block, tiles = t.sections * c.count;
    AsStored<BITS> w = {made_of<Decoder<BITS>>(c.levels), tile_at(t, c, n, 0), row, tile * t.height, 0};
    w.ahead = t.height > 1 ? ahead_of(c.block, t.height, n, last) : ahead_of(8 * row, 8, n, last);
    long all = t.order.at ? tiles * t.cols / QUANTUM : t.padded / QUANTUM, blocks = t.cols / QUANTUM;
    Strip s = {tiles, blocks, all, at + first, scales + first * by_tile, by_row, by_tile, a.group < QUANTUM};
    if (rows == 1) return outputs<AsStored<BITS>, 1, 8>(w, s, count, x, totals);
    if (rows == 2) return outputs<AsStored<BITS>, 2, 4>(w, s, count, x, totals);
    long some = blocks * QUANTUM < SLICE ? SLICE / (blocks * QUANTUM) : 1;
    for (; tiles > 0; tiles -= some) {
      s.tiles = tiles < some ? tiles : some;
      for (long t = 0; t < s.tiles; t++)
        for (long b = 0; b < blocks && t * blocks + b < s.all; b++)
          for (long r = 0; r < count; r++)
            _mm512_store_si512(unpacked + ((t * blocks + b) * OUTPUTS + r) * QUANTUM,
                               (__m512i)w.decoder.load(w.first + r * w.row + t * w.tile + b * 4 * BITS));
      Unpacked u = {unpacked, blocks * OUTPUTS * 64};
      long m = 0;
      for (; m + 3 <= rows && rows - m != 4; m += 3)
        outputs<Unpacked, 3, 4>(u, s, count, x + m, totals + m * OUTPUTS * LANES);
      for (; m + 2 <= rows; m += 2) outputs<Unpacked, 2, 4>(u, s, count, x + m, totals + m * OUTPUTS * LANES);
      if (m < rows) outputs<Unpacked, 1, 4>(u, s, count, x + m, totals + m * OUTPUTS * LANES);
      w.first += some * w.tile;
      s.at += some;
      s.scales += some * by_tile;
      s.all -= some * blocks;
    }
  }
};

thread_local Scratch scratch;

}  // namespace

long arranged_coded(const Matrix& a) { return a.tiling.padded + (a.mins.at ? 2 * lanes(a.groups()) : 0); }

void arrange_coded(const Matrix& a, const float* x, uint16_t* out) {
  const __m512i order = _mm512_loadu_si512(FIRST);
  auto some = [&](long k) {
    long left = a.k - k;
    return _mm512_maskz_loadu_ps(left >= LANES ? 0xffff : left > 0 ? (1u << left) - 1 : 0, x + k);
  };
  for (long k = 0; k < a.tiling.padded; k += QUANTUM) {
    __m512i v = (__m512i)_mm512_cvtne2ps_pbh(some(k + LANES), some(k));
    _mm512_store_si512(out + k, _mm512_permutexvar_epi16(order, v));
  }
  if (!a.mins.at) return;
  float* sums = (float*)(out + a.tiling.padded);
  const b32 ones = (b32)_mm512_set1_epi16(0x3f80);
  memset(sums, 0, lanes(a.groups()) * 4);
  for (long k = 0; k < a.tiling.padded; sums++) {
    __m512 sum = _mm512_setzero_ps();
    for (long end = k + a.group; k < end && k < a.tiling.padded; k += QUANTUM)
      sum = _mm512_dpbf16_ps(sum, (b32)_mm512_load_si512(out + k), ones);
    *sums = _mm512_reduce_add_ps(sum);
  }
}

void product_coded(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y,
                   long last) {
  const Tiling& t = a.tiling;
  long tiles = t.sections * t.tiles, most = OUTPUTS * lanes(t.order.at ? tiles : t.factors);
  long slice = OUTPUTS * (t.cols > SLICE ? t.cols : SLICE);
  long own = rows * OUTPUTS * LANES;
  float* totals = (float*)scratch.of(own * 4 + most * 8 + slice * 2 + lanes(tiles) * 4);
  float *scales = totals + own, *mins = scales + most;
  uint16_t* unpacked = (uint16_t*)(mins + most);
  int32_t* at = (int32_t*)(unpacked + slice);
  for (long end = n + count, next; n < end; n = next) {
    next = (n / OUTPUTS + 1) * OUTPUTS;
    if (t.order.at && next > (n / t.height + 1) * t.height) next = (n / t.height + 1) * t.height;
    if (next > end) next = end;
    Panel p = {a, n, next - n, at, scales, mins, totals, 0, 0, last};
    p.prepare();
    p.begin(x, rows);
    for (long w = 0, first = 0; w < t.widths; first += t.sections * t.codes[w++].count)
      with_bits(t.codes[w].bits, [&](auto bits) {
        p.template width<decltype(bits)::value>(t.codes[w], first, x, rows, unpacked);
      });
    p.put(rows, y);
  }
}

#else

long arranged_coded(const Matrix&) { abort(); }
void arrange_coded(const Matrix&, const float*, uint16_t*) { abort(); }
void product_coded(const Matrix&, long, long, const uint16_t* const*, long, float* const*, long) { abort(); }

#endif
