// Where a processor multiplies tiles of bytes (AMX): many rows of x, rounded to INT16, with codes that lie across.
//
// Bytes of 64 inputs and 16 outputs that lie across are a tile as AMX takes it. A code of x is 256 times its upper byte
// and its lower one, without a sign, so that two tiles of x meet each tile of codes. What is summed, and in which order
// sums meet their scales, is what it is for few rows (strip.h): a row has the same bits in any company.
#pragma once
#include "matrix.h"

constexpr long BAND = 16, DEPTH = 64;   // rows of x and inputs of a tile
constexpr long MANY = 8;                // rows from which a band is worth it: half of one

// Whether a matrix meets rows of x so, where there are `rows` of them.
bool in_tiles(const Matrix& a, long rows);

// Rows of x for a matrix, which lie together: tiles [row / BAND][input / DEPTH][upper, lower][BAND][DEPTH], of four
// neighbours in the order 0, 2, 1, 3; behind them each row's scales, and sums over the matrix' groups.
struct Tiled {
  const uint8_t* codes;
  const float* scales;            // of row 0
  long step, sums;                // floats from a row's to the next row's, and to its sums

  Tiled(const Matrix& a, long rows, const void* at);
  static long bytes(const Matrix& a, long rows);
};

// Puts a row where it belongs.
void arrange_tiled(const Matrix& a, const float* x, const Tiled& to, long row);

// y[m][n..n+count) = the rows first.. of x, `rows` of them, times the outputs n..; n, count and first are multiples
// of 16.
void product_tiled(const Matrix& a, long n, long count, const Tiled& x, long first, long rows, float* const* y);
