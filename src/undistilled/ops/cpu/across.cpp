// Products of rows of x, rounded to INT16, with INT8 and codes of 4 bits whose outputs lie side by side already: a lane
// of 32 bits has an output's codes of four inputs, or of eight, and the next lane the next output's. So memory is read as
// one stream, and nothing is summed across a vector: what comes with a row of short rows cost more than their codes.
#include "across.h"
#include "decoders_across.h"
#include "integer.h"
#include "pool.h"
#include "strip.h"

namespace {

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

thread_local Scratch scratch;

}  // namespace

void product_across(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y) {
  product_of<Crossed>(a, n, count, x, rows, y, scratch, [](const Matrix& a, auto f) { with_codes(a, f); });
}

#else

void product_across(const Matrix&, long, long, const uint16_t* const*, long, float* const*) { abort(); }

#endif
