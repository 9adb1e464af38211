// Products of rows of x, rounded to INT8 by groups of 32, with INT8 and INT4 matrices.
//
// A scale of x is a group's largest magnitude by 127. Codes are multiplied and summed as integers within a group, which
// is exact, and the sum meets both scales in float32, group after group: the same bits with every set of instructions,
// in a product of one row and of a thousand, on any number of threads. INT4's codes are 0..15; what they are offset by
// meets the sum of x over the group.
#include "integer.h"
#include "product.h"
#include "scratch.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define HAS_VNNI 1
#else
#define HAS_VNNI 0
#endif

namespace {

constexpr long GROUP = 32;     // codes of x that share a scale, and of a vector
constexpr long LANES = 8;      // outputs of a vector of sums
constexpr int VECTORS = 2;     // of a panel
constexpr long OUTPUTS = VECTORS * LANES;
constexpr int QUADS = GROUP / 4;
constexpr int SOME = HAS_VNNI ? 6 : 4;   // rows of x whose sums the registers hold

typedef uint8_t c32 __attribute__((vector_size(32)));   // codes, whatever their sign

INLINE c32 codes_at(const void* p) { c32 v; memcpy(&v, p, 32); return v; }
INLINE c32 quad(const int8_t* x) {                       // four codes of x in every lane
  int32_t four;
  memcpy(&four, x, 4);
  return (c32)(i8x{four, four, four, four, four, four, four, four});
}

// Loaders: 32 codes of a row from k on, of which `left` belong to it.
struct Bytes {
  static constexpr bool SMALL = false;
  static constexpr int OFFSET = HAS_VNNI ? 128 : 0;   // VNNI's codes of w are 0..255
  INLINE c32 load(const uint8_t* row, long k, long left) {
    if (left >= GROUP) return codes_at(row + k) + (uint8_t)OFFSET;
    uint8_t padded[GROUP] = {0};
    memcpy(padded, row + k, left);
    return codes_at(padded) + (uint8_t)OFFSET;
  }
};

struct Nibbles {
  static constexpr bool SMALL = true;   // codes of 0..15
  static constexpr int OFFSET = 0;
  INLINE c32 load(const uint8_t* row, long k, long) {
#if HAS_AVX2
    __m128i both = _mm_loadu_si128((const __m128i*)(row + (k >> 1)));
    __m256i pair = _mm256_set_m128i(_mm_srli_epi16(both, 4), both);
    return (c32)_mm256_and_si256(pair, _mm256_set1_epi8(15));
#else
    uint8_t codes[GROUP];
    for (int i = 0; i < 16; i++) {
      codes[i] = row[k / 2 + i] & 15;
      codes[i + 16] = row[k / 2 + i] >> 4;
    }
    return codes_at(codes);
#endif
  }
};

// Sums of four neighbours' products in each of 8 lanes, of up to 8 add()s: w of -128..127 or, where SMALL, 0..15, with
// VNNI 0..255, and x of -127..127. AVX2 multiplies a byte of w without its sign by x with it.
template <bool SMALL> struct Dot {
#if HAS_VNNI
  __m256i total = _mm256_setzero_si256();
  __attribute__((always_inline)) void add(c32 w, c32 x) {
    total = _mm256_dpbusd_epi32(total, (__m256i)w, (__m256i)x);
  }
  __attribute__((always_inline)) i8x sum() const { return (i8x)total; }
#elif HAS_AVX2
  __m256i total = _mm256_setzero_si256();   // of pairs in 16 bits where SMALL: 8 x 2 x 15 x 127 fits
  INLINE __m256i wide(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
  __attribute__((always_inline)) void add(c32 w, c32 x) {
    if (SMALL) {
      total = _mm256_add_epi16(total, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
    } else {
      __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), _mm256_sign_epi8((__m256i)x, (__m256i)w));
      total = _mm256_add_epi32(total, wide(pairs));
    }
    asm("" : "+x"(total));   // summed now: the compiler would keep all products for a tree of sums
  }
  __attribute__((always_inline)) i8x sum() const { return (i8x)(SMALL ? wide(total) : total); }
#else
  i8x total = {};
  void add(c32 w, c32 x) {
    for (int i = 0; i < 32; i++) total[i / 4] += (int8_t)w[i] * (int8_t)x[i];
  }
  i8x sum() const { return total; }
#endif
};

// The sums over each of eight vectors.
INLINE i8x folded(const i8x* v) {
#if HAS_AVX2
  auto pairs = [](__m256i a, __m256i b) { return _mm256_hadd_epi32(a, b); };
  __m256i low = pairs(pairs((__m256i)v[0], (__m256i)v[1]), pairs((__m256i)v[2], (__m256i)v[3]));
  __m256i high = pairs(pairs((__m256i)v[4], (__m256i)v[5]), pairs((__m256i)v[6], (__m256i)v[7]));
  return (i8x)_mm256_permute2x128_si256(low, high, 0x20) + (i8x)_mm256_permute2x128_si256(low, high, 0x31);
#else
  i8x sums = {};
  for (int j = 0; j < 8; j++)
    for (int i = 0; i < 8; i++) sums[j] += v[j][i];
  return sums;
#endif
}

// Eight rows of eight lanes of 32 bits become columns.
INLINE void transpose(v8* v) {
#if HAS_AVX2
  v8 t[8], u[8];
  UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) {
    UNROLL for (int j = 0; j < 2; j++) {
      u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  }
  UNROLL for (int i = 0; i < 4; i++) {
    v[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
#else
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < i; j++) {
      float kept = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = kept;
    }
#endif
}

long groups_of_x(const Matrix& a) { return (a.k + GROUP - 1) / GROUP; }
long padded(const Matrix& a) { return groups_of_x(a) * GROUP; }

struct Row {                   // of x, rounded
  int8_t* codes;
  float* scales;               // of the groups
  int32_t* sums;               // of their codes

  Row(const Matrix& a, const void* at)
      : codes((int8_t*)at), scales((float*)(codes + padded(a))), sums((int32_t*)(scales + groups_of_x(a))) {}
};

struct Panel {                 // some rows of a matrix, `count` of OUTPUTS
  const Matrix& a;
  long groups, n, count;       // groups: of the matrix
  const float *factors, *lows; // [VECTORS][groups][LANES]
  const uint8_t* codes;        // [k / 4][VECTORS][LANES][4]

  const uint8_t* row(long i) const { return a.row(n + (i < count ? i : 0)); }
};

// out[g][j] = the g-th of the floats in row j of a table [n, groups], times `times`.
template <class L> void columns(const Panel& p, const uint8_t* table, float times, int vector, float* out) {
  long bytes = p.groups * L::BYTES;
  const uint8_t* last = table + p.a.n * bytes - LANES * L::BYTES;   // up to it a row's end may be read past
  for (long g = 0; g < p.groups; g += LANES) {
    v8 v[LANES];
    long some = p.groups - g < LANES ? p.groups - g : LANES;
    for (long j = 0; j < LANES; j++) {
      long i = vector * LANES + j;
      const uint8_t* from = table + (p.n + (i < p.count ? i : 0)) * bytes + g * L::BYTES;
      from <= last ? L::load(from, v + j) : load_tail<L>(from, some, v + j);
    }
    transpose(v);
    for (long i = 0; i < some; i++) store(out + (g + i) * LANES, v[i] * splat(times));
  }
}

void prepare(const Panel& p, float* factors, float* lows) {
  const Matrix& a = p.a;
  for (int v = 0; v * LANES < p.count; v++, factors += p.groups * LANES, lows += p.groups * LANES) {
    if (a.kind == INT8) columns<Fp32>(p, a.scales.at, 1, v, factors);
    else columns<Fp16>(p, a.scales.at, 1, v, factors);
    if (a.kind == INT4) columns<Fp16>(p, (a.mins.at ? a.mins : a.scales).at, a.mins.at ? 1 : -8, v, lows);
  }
}

template <class C> void pack(const Panel& p, uint8_t* codes) {
  for (long k = 0; k < p.a.k; k += GROUP, codes += GROUP * OUTPUTS)
    for (int v = 0; v < VECTORS; v++) {
      v8 r[LANES];
      for (int j = 0; j < LANES; j++) r[j] = (v8)C::load(p.row(v * LANES + j), k, p.a.k - k);
      transpose(r);
      for (int q = 0; q < QUADS; q++) store((float*)(codes + (q * VECTORS + v) * GROUP), r[q]);
    }
}

// Calls each(k, w) for every group of x, which begins at k and lies in the matrix' group w.
template <class F> INLINE void each_group(const Matrix& a, F each) {
  for (long from = 0, w = 0; from < a.k; from += a.group, w++)
    for (long end = a.k - from < a.group ? a.k : from + a.group, k = from; k < end; k += GROUP) each(k, w);
}

// A group's sums meet the scales of both and, of INT4, what its codes are offset by.
template <class C> INLINE v8 scaled(v8 total, i8x sums, v8 factor, const float* low, const Row& x, long g) {
  sums -= C::OFFSET * x.sums[g];
  total = fma(__builtin_convertvector(sums, v8), factor * splat(x.scales[g]), total);
  return C::SMALL ? fma(load(low), splat(x.scales[g] * x.sums[g]), total) : total;
}

INLINE void put(const Panel& p, int vector, v8 total, float* y) {
  long left = p.count - vector * LANES;
  store_part(y + p.n + vector * LANES, total, left < LANES ? left : LANES);
}

// y[m][n..n+count) = x[m] . the panel's outputs, from packed codes.
template <class C, int MR> __attribute__((noinline)) void block(const Panel& p, const Row* x, float* const* y) {
  v8 total[MR][VECTORS];
  UNROLL for (int m = 0; m < MR; m++)
    UNROLL for (int v = 0; v < VECTORS; v++) total[m][v] = splat(0);
  each_group(p.a, [&](long k, long w) {
    Dot<C::SMALL> dot[MR][VECTORS];
    const uint8_t* codes = p.codes + k * OUTPUTS;
    UNROLL for (int q = 0; q < QUADS; q++)
      UNROLL for (int m = 0; m < MR; m++) {
        c32 four = quad(x[m].codes + k + 4 * q);
        UNROLL for (int v = 0; v < VECTORS; v++) dot[m][v].add(codes_at(codes + (q * VECTORS + v) * GROUP), four);
      }
    UNROLL for (int v = 0; v < VECTORS; v++) {
      long at = (v * p.groups + w) * LANES;
      v8 factor = load(p.factors + at);
      UNROLL for (int m = 0; m < MR; m++)
        total[m][v] = scaled<C>(total[m][v], dot[m][v].sum(), factor, p.lows + at, x[m], k / GROUP);
    }
  });
  UNROLL for (int m = 0; m < MR; m++)
    for (int v = 0; v * LANES < p.count; v++) put(p, v, total[m][v], y[m]);
}

// block() straight from the stored rows, for so few rows of x that packed codes would be read once.
template <class C, int MR>
__attribute__((noinline)) void straight(const Panel& p, const Row* x, float* const* y, long ahead) {
  for (int v = 0; v * LANES < p.count; v++) {
    v8 total[MR];
    UNROLL for (int m = 0; m < MR; m++) total[m] = splat(0);
    const uint8_t* rows[LANES];
    for (int j = 0; j < LANES; j++) rows[j] = p.row(v * LANES + j);
    const char* next = (const char*)rows[0] + ahead;
    each_group(p.a, [&](long k, long w) {
      constexpr long BYTES = LANES * GROUP / (C::SMALL ? 2 : 1);
      UNROLL for (long i = 0; i < BYTES; i += 64) __builtin_prefetch(next + i, 0, 2);
      next += BYTES;
      i8x sums[MR][LANES];
      c32 with[MR];
      UNROLL for (int m = 0; m < MR; m++) with[m] = codes_at(x[m].codes + k);
      UNROLL for (int j = 0; j < LANES; j++) {
        c32 codes = C::load(rows[j], k, p.a.k - k);
        UNROLL for (int m = 0; m < MR; m++) {
          Dot<C::SMALL> dot;
          dot.add(codes, with[m]);
          sums[m][j] = dot.sum();
        }
      }
      long at = (v * p.groups + w) * LANES;
      UNROLL for (int m = 0; m < MR; m++)
        total[m] = scaled<C>(total[m], folded(sums[m]), load(p.factors + at), p.lows + at, x[m], k / GROUP);
    });
    UNROLL for (int m = 0; m < MR; m++) put(p, v, total[m], y[m]);
  }
}

// Rows of x in blocks as large as the registers hold sums.
template <class C, int MR> void blocks(const Panel& p, const Row* x, long rows, float* const* y) {
  for (; rows >= MR; rows -= MR, x += MR, y += MR) block<C, MR>(p, x, y);
  if constexpr (MR > 1)
    if (rows) blocks<C, MR - 1>(p, x, rows, y);
}

thread_local Scratch scratch;

template <class C>
void product_of(const Matrix& a, long n, long count, const Row* x, long rows, float* const* y, long last) {
  bool few = rows <= 2;
  long groups = a.groups(), factors = VECTORS * groups * LANES;
  float* scales = (float*)scratch.of(factors * 8 + (few ? 0 : padded(a) * OUTPUTS));
  uint8_t* codes = (uint8_t*)(scales + 2 * factors);
  for (long end = n + count; n < end; n += OUTPUTS) {
    Panel p = {a, groups, n, end - n < OUTPUTS ? end - n : OUTPUTS, scales, scales + factors, codes};
    prepare(p, scales, scales + factors);
    long ahead = ahead_of(OUTPUTS * a.row_bytes(), OUTPUTS, n, last);
    if (rows == 1) straight<C, 1>(p, x, y, ahead);
    if (rows == 2) straight<C, 2>(p, x, y, ahead);
    if (few) continue;
    pack<C>(p, codes);
    blocks<C, SOME>(p, x, rows, y);
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

// 32 numbers of -128..127 as bytes.
INLINE void put_bytes(int8_t* to, const i8x* v) {
#if HAS_AVX2
  __m256i ab = _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]), cd = _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order));
#else
  for (int i = 0; i < GROUP; i++) to[i] = (int8_t)v[i / 8][i % 8];
#endif
}

// A group's codes, zeros behind the last, and their sum.
INLINE int round_group(const float* x, long count, float inverse, int8_t* codes) {
  const v8 magic = splat(0x1.8p23f);   // beside it floats are integers: the sum rounds to nearest, ties to even
  i8x sums = {}, v[GROUP / 8];
  UNROLL for (int j = 0; j < GROUP / 8; j++) {
    long left = count - 8 * j;
    v8 some = left >= 8 ? load(x + 8 * j) : left > 0 ? load_part(x + 8 * j, left) : splat(0);
    v[j] = (i8x)(some * splat(inverse) + magic) - (i8x)magic;
    sums += v[j];
  }
  put_bytes(codes, v);
  int sum = 0;
  for (int i = 0; i < 8; i++) sum += sums[i];
  return sum;
}

}  // namespace

long arranged_integer(const Matrix& a) { return padded(a) / 2 + 4 * groups_of_x(a); }

void arrange_integer(const Matrix& a, const float* x, uint16_t* out) {
  Row to(a, out);
  for (long k = 0, g = 0; k < a.k; k += GROUP, g++) {
    long count = a.k - k < GROUP ? a.k - k : GROUP;
    float most = largest(x + k, count);
    bool none = most < 0x1p-100f;   // less would have no inverse
    to.scales[g] = none ? 0 : most / 127;
    to.sums[g] = round_group(x + k, count, none ? 0 : 127 / most, to.codes + k);
  }
}

void product_integer(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y,
                     long last) {
  static thread_local Scratch kept;
  Row* r = (Row*)kept.of(rows * sizeof(Row));
  for (long m = 0; m < rows; m++) r[m] = Row(a, x[m]);
  (a.kind == INT8 ? product_of<Bytes> : product_of<Nibbles>)(a, n, count, r, rows, y, last);
}
