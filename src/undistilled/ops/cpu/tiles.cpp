#include "tiles.h"
#include <atomic>
#include <cstdlib>
#include "amx.h"
#include "decoders_across.h"
#include "integer.h"

#if HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

enum Tiles { NONE, REAL, IMITATED };

// Linux lets a process have the tiles' registers that asks for them.
bool granted() {
#if HAS_AMX
  constexpr long ASK = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d;
  bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 3) == 3;   // tiles, and their products of bytes
  return has && !syscall(SYS_arch_prctl, ASK, TILE_DATA);
#else
  return false;
#endif
}

// UNDISTILLED_AMX=off has none.
Tiles& tiles() {
  static Tiles now = [] {
    const char* asked = getenv("UNDISTILLED_AMX");
    return (asked && !strcmp(asked, "off")) || !granted() ? NONE : REAL;
  }();
  return now;
}

std::atomic<long> imitated{0};   // products

long bands(long rows) { return (rows + BAND - 1) / BAND; }
long shares(const Matrix& a) { return Row<ToInt16>::shares(a); }

}  // namespace

extern "C" {

// Whether products of many rows go by tiles: 0, or 1 by AMX, or 2 by what imitates it.
int native_tiles(void) { return tiles(); }

// For tests: while nothing runs.
void native_imitate_tiles(int yes) {
  static const Tiles real = tiles();
  tiles() = yes ? IMITATED : real;
}

// How many products were imitated since this was asked last.
long native_imitated() { return imitated.exchange(0); }

}  // extern "C"

Tiled::Tiled(const Matrix& a, long rows, const void* at)
    : codes((const uint8_t*)at), scales((const float*)(codes + bands(rows) * BAND * a.k * 2)),
      step(shares(a) + summed(a)), sums(shares(a)) {}

long Tiled::bytes(const Matrix& a, long rows) {
  return bands(rows) * BAND * a.k * 2 + rows * (shares(a) + summed(a)) * 4;
}

#if HAS_AVX2

bool in_tiles(const Matrix& a, long rows) {
  bool whole = a.group % DEPTH == 0 && a.k % DEPTH == 0;
  return rows >= MANY && a.kind == ACROSS && a.rounds == TO_INT16 && whole && tiles();
}

namespace {

thread_local Scratch scratch;

// 16 codes' upper and lower bytes.
INLINE void split(const int16_t* codes, uint8_t* upper, uint8_t* lower) {
  // lower bytes, then upper ones
  const __m128i ORDER = _mm_setr_epi8(0, 4, 2, 6, 8, 12, 10, 14, 1, 5, 3, 7, 9, 13, 11, 15);
  __m256i v = _mm256_loadu_si256((const __m256i*)codes);
  v = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(ORDER)), 0xd8);
  _mm_storeu_si128((__m128i*)lower, _mm256_castsi256_si128(v));
  _mm_storeu_si128((__m128i*)upper, _mm256_extracti128_si256(v, 1));
}

// Inputs that share both scales, and each strip's.
struct Share {
  long k, end, group;
  bool low;                       // whether a group begins here that has minimums
};

// STRIPS neighbouring strips of 16 outputs, which meet a tile of x together.
template <class T, int STRIPS, class W> struct Block {
  static constexpr long TILE_BYTES = BAND * DEPTH, MOST_SHARES = SLICE / DEPTH;
  static constexpr int UPPER = 2 * STRIPS, LOWER = UPPER + 1, CODES = LOWER + 1;   // tiles behind those of sums
  const W w;
  const Strip* strips;
  const Tiled& x;
  T t;
  alignas(64) uint8_t unpacked[STRIPS][SLICE * OUTPUTS];
  alignas(64) int32_t sums[2 * STRIPS][BAND][OUTPUTS];   // of each strip: of upper and of lower bytes
  Share shares[MOST_SHARES];
  float factors[MOST_SHARES][STRIPS][OUTPUTS], lows[MOST_SHARES][STRIPS][OUTPUTS];
  const uint8_t* codes[STRIPS];   // of the inputs from `from` on
  long from, made;

  Block(const W& w, const Strip* strips, const Tiled& x) : w(w), strips(strips), x(x) {}

  template <class F> INLINE void each_strip(F f) {
    f(std::integral_constant<int, 0>());
    if constexpr (STRIPS > 1) f(std::integral_constant<int, 1>());
  }
  // Codes as bytes, those of 8 bits where they lie, and factors of a slice of inputs.
  void prepare(long start, long end) {
    from = start, made = 0;
    for (int i = 0; i < STRIPS; i++) {
      const uint8_t* at = strips[i].codes(W::BLOCK, from);
      codes[i] = W::BLOCK == QUANTUM * OUTPUTS ? at : unpacked[i];
      if (codes[i] == at) continue;
      uint8_t* to = unpacked[i];
      for (long k = from; k < end; k += QUANTUM, at += W::BLOCK, to += QUANTUM * OUTPUTS)
        W::fours(w, at, [&](int q, Lanes bytes) { put_lanes(to + LINE * q, bytes); });
    }
    each_run<Crossed>(strips->a, from, end, [&](long k, long end, long g) {
      bool low = strips->offset(w) && k == g * strips->a.group;
      for (int i = 0; i < STRIPS; i++) {
        v16 f = strips[i].scales(w, g);
        store16(factors[made][i], f);
        if (low) store16(lows[made][i], strips[i].lows(w, f, g));
      }
      shares[made++] = {k, end, g, low};
    });
  }
  // sums = a band of x times the inputs of a share.
  __attribute__((always_inline)) void multiply(const uint8_t* band, const Share& s) {
    each_strip([&](auto i) { t.template zero<2 * i>(), t.template zero<2 * i + 1>(); });
    for (long k = s.k; k < s.end; k += DEPTH) {
      const uint8_t* bytes = band + k * BAND * 2;
      t.template load<UPPER>(bytes), t.template load<LOWER>(bytes + TILE_BYTES);
      each_strip([&](auto i) {
        t.template load<CODES + i>(codes[i] + (k - from) * OUTPUTS);
        t.template meet<2 * i, UPPER, CODES + i>(), t.template meet_bare<2 * i + 1, LOWER, CODES + i>();
      });
    }
    each_strip([&](auto i) { t.template store<2 * i>(sums[2 * i]), t.template store<2 * i + 1>(sums[2 * i + 1]); });
  }
  // totals += sums of the share `at` with its scales, for `count` rows of x whose scales are at `of`.
  __attribute__((always_inline)) void scale(long at, const float* of, long count, float (*totals)[STRIPS][OUTPUTS]) {
    const Share s = shares[at];
    const unsigned long share = (unsigned long)s.k / (Crossed::UNIT * Crossed::SHARE);
    for (long m = 0; m < count; m++, of += x.step)
      UNROLL for (int i = 0; i < STRIPS; i++) {
        v16 total = load16(totals[m][i]);
        if (s.low) total = fma16(load16(lows[at][i]), splat16(of[x.sums + s.group]), total);
        Lanes sum = plus(times_256(lanes_at(sums[2 * i][m])), lanes_at(sums[2 * i + 1][m]));
        v16 done = times(floats16(sum), splat16(of[share]));
        store16(totals[m][i], fma16(done, load16(factors[at][i]), total));
      }
  }
  // totals[m] += the rows first.. of x, `rows` of them, times the strips.
  void run(long first, long rows, float (*totals)[STRIPS][OUTPUTS]) {
    const long k = strips->a.k;
    for (long start = 0; start < k; start += SLICE) {
      prepare(start, start + SLICE < k ? start + SLICE : k);
      for (long m = 0; m < rows; m += BAND)
        for (long at = 0; at < made; at++) {
          multiply(x.codes + (first + m) * k * 2, shares[at]);
          scale(at, x.scales + (first + m) * x.step, rows - m < BAND ? rows - m : BAND, totals + m);
        }
    }
  }
};

template <class T, int STRIPS, class W>
void meet_strips(const W& w, const Matrix& a, long n, const Tiled& x, long first, long rows, float* const* y) {
  typedef float Totals[STRIPS][OUTPUTS];
  Totals* totals = (Totals*)scratch.of(rows * sizeof(Totals));
  memset((void*)totals, 0, rows * sizeof(Totals));
  const Strip strips[] = {{a, n, a.groups()}, {a, n + OUTPUTS, a.groups()}};
  Block<T, STRIPS, W>(w, strips, x).run(first, rows, totals);
  for (int i = 0; i < STRIPS; i++)
    for (long m = 0; m < rows; m++) strips[i].put(totals[m][i], y[m]);
}

template <class T>
void product_by(const Matrix& a, long n, long count, const Tiled& x, long first, long rows, float* const* y) {
  with_codes(a, [&](const auto& w) {
    long end = n + count;
    for (; n + 2 * OUTPUTS <= end; n += 2 * OUTPUTS) meet_strips<T, 2>(w, a, n, x, first, rows, y);
    if (n < end) meet_strips<T, 1>(w, a, n, x, first, rows, y);
  });
}

}  // namespace

void arrange_tiled(const Matrix& a, const float* x, const Tiled& to, long row) {
  uint16_t* buffer = (uint16_t*)scratch.of(Row<Crossed>::bytes(a));
  arrange_crossed(a, x, buffer);
  Row<Crossed> r(a, buffer);
  uint8_t* band = (uint8_t*)to.codes + row / BAND * BAND * a.k * 2 + row % BAND * DEPTH;
  for (long k = 0; k < a.k; k += 16) {
    uint8_t* at = band + k / DEPTH * DEPTH * BAND * 2 + k % DEPTH;
    split(r.codes + k, at, at + BAND * DEPTH);
  }
  memcpy((float*)to.scales + row * to.step, r.scales, to.step * 4);
}

void product_tiled(const Matrix& a, long n, long count, const Tiled& x, long first, long rows, float* const* y) {
#if HAS_AMX
  if (tiles() == REAL) return product_by<Amx>(a, n, count, x, first, rows, y);
#endif
  imitated++;
  product_by<Imitated>(a, n, count, x, first, rows, y);
}

#else

bool in_tiles(const Matrix&, long) { return false; }
void arrange_tiled(const Matrix&, const float*, const Tiled&, long) { abort(); }
void product_tiled(const Matrix&, long, long, const Tiled&, long, long, float* const*) { abort(); }

#endif
