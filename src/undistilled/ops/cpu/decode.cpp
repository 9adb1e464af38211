// Rows of CODED matrices as float32, on any processor.
#include "coded.h"

namespace {

constexpr long LEAST = 16;   // inputs of the smallest group: each has whole multiples of them

// out[0..32) = levels of the codes at w.
template <int BITS> void decode_block(const uint8_t* w, const float* levels, float* out) {
  constexpr int REST = BITS - MAIN[BITS];
  uint8_t codes[QUANTUM];
  auto plane = [&](int bits, int up) {
    for (int j = 0; j < 8 / bits; j++)
      for (int i = 0; i < 4 * bits; i++) {
        uint8_t piece = (w[i] >> (bits * j) & ((1 << bits) - 1)) << up;
        codes[j * 4 * bits + i] = up ? codes[j * 4 * bits + i] | piece : piece;
      }
    w += 4 * bits;
  };
  plane(MAIN[BITS], 0);
  if (REST) plane(REST ? REST : 1, MAIN[BITS]);
  for (int i = 0; i < QUANTUM; i++) out[i] = levels[codes[i]];
}

}  // namespace

void decode_coded(const Matrix& a, long row, float* out) {
  const Tiling& t = a.tiling;
  each_tile(t, [&](const Codes& c, long q, long i) {
    const uint8_t* w = tile_at(t, c, row, q);
    long first = place_of(t, row / t.height, i) * t.cols;
    for (long k = 0; k < t.cols && first + k < a.k; k += QUANTUM, w += 4 * c.bits) {
      float block[QUANTUM];
      with_bits(c.bits, [&](auto bits) { decode_block<decltype(bits)::value>(w, c.levels, block); });
      for (long j = 0; j < QUANTUM && first + k + j < a.k; j += LEAST) {
        long at = first + k + j, count = a.k - at < LEAST ? a.k - at : LEAST, g = t.order.at ? i : at / a.group;
        float scale = scale_of(a, row, g), low = 0;
        if (a.mins.at) low = half_to_float(((const uint16_t*)a.mins.at)[row * t.factors + g]);
        for (long e = 0; e < count; e++) out[at + e] = block[j + e] * scale + low;
      }
    }
  });
}
