// A stored weight matrix, and rows of x times a tile of its rows.
#pragma once
#include <type_traits>
#include "simd.h"

enum Kind { FP32, FP16, BF16, FP8_BLOCK, INT8, INT4, CODED, ACROSS, FP8_ACROSS };
enum Rounding { TO_NOTHING, TO_BF16, TO_INT8, TO_INT16, TO_ORDER };   // TO_ORDER: FP8, as it is in another order

struct Part {            // of a weight, for its first expert
  const uint8_t* at;
  long step;             // bytes to the next expert's
  void skip(long experts) { if (at) at += experts * step; }
};

struct Codes {           // the tiles of one width in a CODED matrix, see coded.h
  int bits;
  long count;            // tiles of a section of a block
  long block;            // bytes of a block of rows
  Part values;           // [blocks, sections, count, height, cols / 8 * bits]
  const float* levels;   // [1 << bits], exact in BF16
};

struct Tiling {          // how a CODED matrix lies
  long height, cols;     // rows of a block, inputs of a tile: a multiple of 32
  long sections, tiles;  // of a row; of a section in all widths
  long factors;          // scales of a row
  long padded;           // inputs with those that fill the last tile
  int format, widths;    // a ScaleFormat; how many codes[] there are
  Part order;            // int16 [blocks, sections, tiles]: a tile's place in its section; null: the order they lie in
  Part multipliers;      // bf16 [n] or null: a row's, for all of its scales
  Codes codes[5];
};

struct Matrix {          // [n, k], row-major
  int kind, rounds;      // rounds: the Rounding of x in its products
  long n, k, group;      // group: elements along k that share a scale
  Part values;           // but for CODED; ACROSS: see scheme/across.py, as its other parts
  Part scales;           // fp8: f32 [n/128, k/128]; int8: f32 [n, g]; int4: f16 [n, g]; coded: of tiling.format
  Part mins;             // int4, coded: f16 [n, g], or null for symmetric schemes
  Tiling tiling;         // of CODED; of ACROSS the format, multipliers, and bits and levels of codes[0]

  long groups() const { return (k + group - 1) / group; }
  long row_bytes() const {         // but for CODED
    if (kind == ACROSS) return k * tiling.codes[0].bits / 8;
    return kind == INT4 ? (k + 31) / 32 * 16 : kind == FP32 ? k * 4 : kind <= BF16 ? k * 2 : k;
  }
  const uint8_t* row(long i) const { return values.at + i * row_bytes(); }
};

constexpr long PANEL = 1024;   // elements of k that are worked on at a time
constexpr int TILE = 16;      // rows of a matrix that are worked on at a time
constexpr long SERIAL = 1 << 15;   // below this many multiplications a team of threads costs more
constexpr int ROWS = 32;      // rows of x for which a weight is read once
constexpr long LINE = 64;     // bytes of memory that come together
constexpr long SPAN = 256;    // inputs between two looks ahead

// Bytes of weights that are asked for before they are needed: a busy memory answers late, and short rows are no stream
// that the processor would foresee.
constexpr long AHEAD = 1 << 16;
constexpr long NEAR = 1 << 12;   // the same in one stream of rows
// Whole blocks of `rows` rows from row n on, in bytes; 0 where they end behind `last`.
INLINE long ahead_of(long block, long rows, long n, long last) {
  long blocks = (AHEAD + block - 1) / block;
  return n + blocks * rows < last ? blocks * block : 0;
}

// Panels end on multiples of the group, or lie inside one group.
INLINE long panel_end(const Matrix& a, long k) {
  long end = a.group < PANEL ? k + PANEL / a.group * a.group
                             : k / a.group * a.group + a.group;
  end = end < k + PANEL ? end : k + PANEL;
  return end < a.k ? end : a.k;
}

// Calls f with the loader of a kind.
template <class F> INLINE void with_loader(int kind, F f) {
  switch (kind) {
    case FP32: return f(Fp32());
    case FP16: return f(Fp16());
    case BF16: return f(Bf16());
    case FP8_BLOCK: return f(Fp8Pair());
    case INT8: return f(Int8());
    default: return f(Int4());
  }
}

// out[0..k1-k0) = the unscaled weights k0..k1 of the row at w.
template <class L> INLINE void decode(const uint8_t* w, long k0, long k1, float* out) {
  v8 v[L::STEP / 8];
  long k = k0;
  for (; k + L::STEP <= k1; k += L::STEP, out += L::STEP) {
    L::load(w + at<L>(k), v);
    for (int i = 0; i < L::STEP / 8; i++) store(out + 8 * i, v[i]);
  }
  if (k >= k1) return;
  load_tail<L>(w + at<L>(k), k1 - k, v);
  for (int i = 0; k < k1; k += 8, i++, out += 8) store_part(out, v[i], k1 - k < 8 ? k1 - k : 8);
}

// out[i] = the factor of the i-th group in the panel k0..k1 of row n.
INLINE void panel_scales(const Matrix& a, long n, long k0, long k1, float* out) {
  long first = k0 / a.group, count = (k1 - 1) / a.group - first + 1;
  if (a.kind == INT4)
    decode<Fp16>(a.scales.at + n * a.groups() * 2, first, first + count, out);
  else
    for (long i = 0; i < count; i++)
      out[i] = a.kind == FP8_BLOCK ? ((const float*)a.scales.at)[n / 128 * a.groups() + first + i] * 256
               : a.kind == INT8    ? ((const float*)a.scales.at)[n * a.groups() + first + i]
                                   : 1;
}

#define UNROLL _Pragma("GCC unroll 16")

// acc[.][m][j] += x[m][k0..k1) * w[j][k0..k1), lane by lane, in one order for every MR and NR; k0 begins a group, or
// lies a multiple of SPAN behind its beginning. CHAINS: sums of eight inputs in turn, or a row's wait for each other.
template <class L, int CHAINS, int MR, int NR>
INLINE void dots(const uint8_t* const* w, const float* const* x, long k0, long k1, v8 (&acc)[CHAINS][MR][NR]) {
  constexpr int V = L::STEP / 8, EACH = MR * NR == 1 ? 8 : V > CHAINS ? V : CHAINS;   // vectors of a turn
  long k = k0;
  for (; k + 8 * EACH <= k1; k += 8 * EACH) {
    UNROLL for (int i = 0; i < EACH; i += V) {
      v8 xs[V][MR], q[V];
      UNROLL for (int v = 0; v < V; v++)
        UNROLL for (int m = 0; m < MR; m++) {
          xs[v][m] = load(x[m] + k + 8 * (i + v));
#if HAS_AVX2
          if (MR > 1) asm("" : "+x"(xs[v][m]));   // one load for NR products
#endif
        }
      UNROLL for (int j = 0; j < NR; j++) {
        L::load(w[j] + at<L>(k + 8 * i), q);
        UNROLL for (int v = 0; v < V; v++)
          UNROLL for (int m = 0; m < MR; m++)
            acc[(i + v) % CHAINS][m][j] = fma(q[v], xs[v][m], acc[(i + v) % CHAINS][m][j]);
      }
    }
  }
  for (int chain = 0; k < k1; k += L::STEP) {
    bool whole = k + L::STEP <= k1;
    UNROLL for (int j = 0; j < NR; j++) {
      v8 q[V];
      whole ? L::load(w[j] + at<L>(k), q) : load_tail<L>(w[j] + at<L>(k), k1 - k, q);
      for (int v = 0; v < V && k + 8 * v < k1; v++) {
        long left = k1 - k - 8 * v;
        UNROLL for (int m = 0; m < MR; m++) {
          v8 some = left >= 8 ? load(x[m] + k + 8 * v) : load_part(x[m] + k + 8 * v, left);
          v8& sum = acc[(chain + v) % CHAINS][m][j];
          sum = fma(q[v], some, sum);
        }
      }
    }
    chain += V;
  }
}

typedef v8 Totals[TILE];

// total[m][j] += the panel k0..k1, each group's sum times its scale. STREAM: what lies NEAR behind is asked for.
template <class L, int MR, int NR, bool STREAM>
static void panel(const uint8_t* const* w, const float* const* x, const float (*scales)[PANEL],
                  long group, long k0, long k1, Totals* total) {
  v8 t[MR][NR];
  UNROLL for (int m = 0; m < MR; m++)
    UNROLL for (int j = 0; j < NR; j++) t[m][j] = total[m][j];
  for (long k = k0, g = 0; k < k1; k += group, g++) {
    v8 acc[2][MR][NR];
    UNROLL for (auto& chain : acc)
      UNROLL for (int m = 0; m < MR; m++)
        UNROLL for (int j = 0; j < NR; j++) chain[m][j] = splat(0);
    for (long from = k, end = k1 - k < group ? k1 : k + group, to; from < end; from = to) {
      to = STREAM && from + SPAN < end ? from + SPAN : end;
      for (long line = STREAM ? at<L>(from) : at<L>(to); line < at<L>(to); line += LINE)
        __builtin_prefetch(w[0] + line + NEAR, 0, 2);
      dots<L>(w, x, from, to, acc);
    }
    UNROLL for (int j = 0; j < NR; j++)
      UNROLL for (int m = 0; m < MR; m++) t[m][j] = fma(acc[0][m][j] + acc[1][m][j], splat(scales[j][g]), t[m][j]);
  }
  UNROLL for (int m = 0; m < MR; m++)
    UNROLL for (int j = 0; j < NR; j++) total[m][j] = t[m][j];
}

// total[m][j] += the panel k0..k1 of rows n.. of a, NR of them, times `rows` rows of x.
template <class L, int NR>
static void add_panel(const Matrix& a, long n, const float* const* x, long rows, long k0, long k1, Totals* total) {
  float scales[NR][PANEL];
  const uint8_t* w[NR];
  long group = a.group < PANEL ? a.group : PANEL;
  for (int j = 0; j < NR; j++) {
    w[j] = a.row(n + j);
    panel_scales(a, n + j, k0, k1, scales[j]);
  }
  if (rows == 1) return panel<L, 1, NR, NR == 1>(w, x, scales, group, k0, k1, total);
  if (rows == 2) return panel<L, 2, NR, NR == 1>(w, x, scales, group, k0, k1, total);
  float decoded[NR][PANEL];
  const float* xs[ROWS];
  for (long m = 0; m < rows; m++) xs[m] = x[m] + k0;
  for (int j = 0; j < NR; j++) {
    decode<L>(w[j], k0, k1, decoded[j]);
    w[j] = (const uint8_t*)decoded[j];
  }
  long m = 0, k = k1 - k0;
  for (; m + 3 <= rows && rows - m != 4; m += 3) panel<Fp32, 3, NR, false>(w, xs + m, scales, group, 0, k, total + m);
  for (; m + 2 <= rows; m += 2) panel<Fp32, 2, NR, false>(w, xs + m, scales, group, 0, k, total + m);
  if (m < rows) panel<Fp32, 1, NR, false>(w, xs + m, scales, group, 0, k, total + m);
}

// total[m][j] += x[m] . row n + j of a, for rows <= ROWS and count <= TILE. One or two rows of x meet a row of weights
// after the other, a stream that the processor foresees.
template <class L>
static void add_tile(const Matrix& a, long n, int count, const float* const* x, long rows, Totals* total) {
  auto by = [&](auto width, long j, long k0, long k1) {
    constexpr int NR = decltype(width)::value;
    add_panel<L, NR>(a, n + j, x, rows, k0, k1, (Totals*)(*total + j));
  };
  typedef std::integral_constant<int, 1> One;
  typedef std::integral_constant<int, 2> Two;
  if (rows <= 2) {
    for (int j = 0; j < count; j++)
      for (long k0 = 0, k1; k0 < a.k; k0 = k1) by(One(), j, k0, k1 = panel_end(a, k0));
    return;
  }
  for (long k0 = 0, k1; k0 < a.k; k0 = k1) {
    k1 = panel_end(a, k0);
    int j = 0;
    for (; j + 2 <= count; j += 2) by(Two(), j, k0, k1);
    for (; j < count; j++) by(One(), j, k0, k1);
  }
}

// int4's offsets as a second product: its mins (or scales) with the sums of x over groups.
INLINE bool has_offsets(const Matrix& a) { return a.kind == INT4; }
INLINE Matrix offsets(const Matrix& a) {
  return {FP16, 0, a.n, a.groups(), a.groups(), a.mins.at ? a.mins : a.scales, {}, {}, {}};
}

// sums[g] = the sum of x over group g, times the factor of offsets()' weights.
INLINE void group_sums(const Matrix& a, const float* x, float* sums) {
  for (long k = 0; k < a.k; k += a.group) {
    long end = k + a.group < a.k ? k + a.group : a.k, i = k;
    v8 s = splat(0);
    for (; i + 8 <= end; i += 8) s = s + load(x + i);
    if (i < end) s = s + load_part(x + i, end - i);
    *sums++ = sum(s) * (a.mins.at ? 1 : -8);
  }
}

// y[m][n..n+count) = x[m] . rows n.. of a, for any number of rows and count <= TILE.
// sums: group_sums() of each row of x when a is int4.
void tile(const Matrix& a, long n, int count, const float* const* x, const float* const* sums, long rows,
          float* const* y);

// out[0..k) = row i of a, as float32.
void decode_row(const Matrix& a, long i, float* out);

// Bytes of a matrix that a product reads, minimums and orders but roughly.
long bytes_of(const Matrix& a);
