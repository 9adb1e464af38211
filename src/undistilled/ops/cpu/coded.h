// Weights as codes of 2 to 6 bits: a value is levels[code] * scale, plus a minimum where there is one.
//
// By groups of a row (scheme/grouped.py) or in tiles of blocks of rows (scheme/tiles.py). The first is the second
// with blocks of one row, tiles of one group, or of two with 16 inputs each, and a single section. A row's tiles are
// counted by width, section and place in it, which is how the tiles of one width lie in memory.
#pragma once
#include "matrix.h"

enum ScaleFormat { SCALES_F16, SCALES_E4M3, SCALES_E8M0, SCALES_F32 };   // the last of ACROSS alone

constexpr int QUANTUM = 32;   // codes that lie together in 4 bytes for each bit, see scheme/packing.py
constexpr int MAIN[] = {0, 0, 2, 2, 4, 4, 4};   // bits of the plane that comes first; 0 to 2 more are in another

INLINE float bf16_to_float(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// A T of these levels, made where they are others than this thread's last time.
template <class T> const T& made_of(const float* levels) {
  static thread_local T kept(levels);
  static thread_local const float* made = levels;
  if (made != levels) kept = T(made = levels);
  return kept;
}

// Calls f with the number of bits as a type.
template <class F> INLINE void with_bits(int bits, F f) {
  switch (bits) {
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    default: return f(std::integral_constant<int, 6>());
  }
}

// The place of the i-th tile of a block, in tiles of a row.
INLINE long place_of(const Tiling& t, long block, long i) {
  const int16_t* order = (const int16_t*)t.order.at;
  return order ? i / t.tiles * t.tiles + order[block * t.sections * t.tiles + i] : i;
}

// Calls f(codes, q, i) for every tile of a row: its width, its number in that width, and by section and place.
template <class F> INLINE void each_tile(const Tiling& t, F f) {
  long first = 0;
  for (int w = 0; w < t.widths; first += t.codes[w++].count)
    for (long s = 0, q = 0; s < t.sections; s++)
      for (long j = 0; j < t.codes[w].count; j++, q++) f(t.codes[w], q, s * t.tiles + first + j);
}

// The q-th tile of a width, in a row of the matrix.
INLINE const uint8_t* tile_at(const Tiling& t, const Codes& c, long row, long q) {
  return c.values.at + row / t.height * c.block + (q * t.height + row % t.height) * (t.cols / 8 * c.bits);
}

// out[0..k) = row `row` of a, as float32.
void decode_coded(const Matrix& a, long row, float* out);

// Uint16 of a row of x as products of CODED matrices take it: rounded to BF16, each 32 in the order in which codes
// leave their planes, zeros up to `padded`; then, where there are minimums, float32 sums of x over the groups.
long arranged_coded(const Matrix& a);
void arrange_coded(const Matrix& a, const float* x, uint16_t* out);

// y[m][n..n+count) = x[m] . rows n.. of a, x arranged; a row's bits do not depend on the others.
void product_coded(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y,
                   long last);
