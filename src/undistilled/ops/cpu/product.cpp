// Products of rows of x, rounded to BF16, with a stored matrix, by AVX512_BF16's vdpbf16ps.
//
// Codes of int8, int4 and fp8 are exact in BF16, so a group is multiplied as codes and its float32 scale
// meets the float32 sum. Lanes run along k, for which neither weights nor x are rearranged; a lane's order
// depends on the matrix alone, so that a row has the same bits in a product of one row and of a thousand.
#include <cstdlib>
#include "product.h"

#if HAS_PRODUCTS
#pragma GCC diagnostic ignored "-Wuninitialized"   // GCC 12 sees both inside its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace {

typedef __m512bh b32;   // 32 BF16

// Loaders of 32 codes from the k-th of a row on, and of the first `count` < 32 of them, zeros behind.
struct AsBf16 {
  typedef uint16_t Code;
  INLINE b32 wide(__m512i v) { return (b32)v; }
  INLINE b32 load(const uint8_t* w, long k) { return wide(_mm512_loadu_si512((const Code*)w + k)); }
  INLINE b32 load_part(const uint8_t* w, long k, long count) {
    return wide(_mm512_maskz_loadu_epi16((1u << count) - 1, (const Code*)w + k));
  }
};

template <class B> struct Bytes {
  INLINE b32 load(const uint8_t* w, long k) { return B::wide(_mm256_loadu_si256((const __m256i*)(w + k))); }
  INLINE b32 load_part(const uint8_t* w, long k, long count) {
    return B::wide(_mm256_maskz_loadu_epi8((1u << count) - 1, w + k));
  }
};

struct Int8Codes : Bytes<Int8Codes> {
  INLINE b32 wide(__m256i v) {
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(v)));
    return _mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(v, 1))), low);
  }
};

// As simd.h's Fp8: through float16, the value times 2^-8.
struct Fp8Codes : Bytes<Fp8Codes> {
  INLINE b32 wide(__m256i v) {
    __m512i half = _mm512_slli_epi16(_mm512_cvtepi8_epi16(v), 7);
    half = _mm512_and_si512(half, _mm512_set1_epi16((short)0xbfff));
    __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    return _mm512_cvtne2ps_pbh(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), low);
  }
};

// Codes 0..15, or, where the scheme is symmetric, code - 8. A group begins with a block of 32.
template <int LOWEST> struct Int4Codes {
  INLINE b32 load(const uint8_t* w, long k) {
    alignas(64) static constexpr float VALUES[32] = {
        LOWEST, LOWEST + 1, LOWEST + 2, LOWEST + 3, LOWEST + 4, LOWEST + 5, LOWEST + 6, LOWEST + 7,
        LOWEST + 8, LOWEST + 9, LOWEST + 10, LOWEST + 11, LOWEST + 12, LOWEST + 13, LOWEST + 14, LOWEST + 15};
    __m512i table = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(VALUES + 16), _mm512_load_ps(VALUES));
    __m128i both = _mm_loadu_si128((const __m128i*)(w + k / 2));
    __m256i codes = _mm256_set_m128i(_mm_srli_epi16(both, 4), both);
    __m512i index = _mm512_cvtepu8_epi16(_mm256_and_si256(codes, _mm256_set1_epi8(15)));
    return (b32)_mm512_permutexvar_epi16(index, table);
  }
  INLINE b32 load_part(const uint8_t* w, long k, long count) {
    return (b32)_mm512_maskz_mov_epi16((1u << count) - 1, (__m512i)load(w, k));
  }
};

// The lane sums of four vectors, each in one fixed tree.
INLINE __m128 sums4(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512 s = _mm512_add_ps((__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd),
                           (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
  __m256 t = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  return _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
}

struct Panel {                 // up to 4 rows of a matrix
  const uint8_t* w[4];
  const float* scales[4];      // a factor for each group
  long k, group;
  bool adds;                   // to what y holds, else in its place
};

// y[m][0..NR) = x[m] . the panel's rows.
template <class L, bool GROUPED, int MR, int NR>
void block(const Panel& p, const uint16_t* const* x, float* const* y, long n) {
  __m512 acc[MR][NR], total[MR][NR];
  UNROLL for (int m = 0; m < MR; m++)
    UNROLL for (int j = 0; j < NR; j++) total[m][j] = _mm512_setzero_ps();
  for (long k0 = 0, g = 0; k0 < p.k; k0 += p.group, g++) {
    long end = p.k - k0 < p.group ? p.k : k0 + p.group, k = k0;
    UNROLL for (int m = 0; m < MR; m++)
      UNROLL for (int j = 0; j < NR; j++) acc[m][j] = _mm512_setzero_ps();
    auto step = [&](auto&& weight, auto&& row) {
      b32 w[NR];
      UNROLL for (int j = 0; j < NR; j++) w[j] = weight(p.w[j]);
      UNROLL for (int m = 0; m < MR; m++) {
        b32 v = row((const uint8_t*)x[m]);
        UNROLL for (int j = 0; j < NR; j++) acc[m][j] = _mm512_dpbf16_ps(acc[m][j], v, w[j]);
      }
    };
    for (; k + 32 <= end; k += 32)
      step([&](const uint8_t* w) { return L::load(w, k); }, [&](const uint8_t* v) { return AsBf16::load(v, k); });
    if (k < end)
      step([&](const uint8_t* w) { return L::load_part(w, k, end - k); },
           [&](const uint8_t* v) { return AsBf16::load_part(v, k, end - k); });
    UNROLL for (int j = 0; j < NR; j++) {
      __m512 scale = _mm512_set1_ps(p.scales[j][g]);
      UNROLL for (int m = 0; m < MR; m++)
        total[m][j] = GROUPED ? _mm512_fmadd_ps(acc[m][j], scale, total[m][j]) : _mm512_mul_ps(acc[m][j], scale);
    }
    if (!GROUPED) break;
  }
  UNROLL for (int m = 0; m < MR; m++) {
    __m128 s = NR == 4 ? sums4(total[m][0], total[m][1 % NR], total[m][2 % NR], total[m][3 % NR])
                       : sums4(total[m][0], total[m][0], total[m][0], total[m][0]);
    float* to = y[m] + n;
    constexpr int LANES = (1 << NR) - 1;
    if (p.adds) s = _mm_add_ps(s, _mm_maskz_loadu_ps(LANES, to));
    _mm_mask_storeu_ps(to, LANES, s);
  }
}

// Rows of x in blocks as large as the registers hold accumulators, and totals where there are groups.
template <class L, bool GROUPED, int MR, int NR>
void blocks(const Panel& p, const uint16_t* const* x, long rows, float* const* y, long n) {
  for (; rows >= MR; rows -= MR, x += MR, y += MR) block<L, GROUPED, MR, NR>(p, x, y, n);
  if constexpr (MR > 1)
    if (rows) blocks<L, GROUPED, MR - 1, NR>(p, x, rows, y, n);
}

template <class L, int MR>
void rows_of(const Panel& p, bool grouped, long count, const uint16_t* const* x, long rows, float* const* y, long n) {
  constexpr int FEW = MR < 3 ? MR : 3;
  if (count == 4)
    return grouped ? blocks<L, true, FEW, 4>(p, x, rows, y, n) : blocks<L, false, MR, 4>(p, x, rows, y, n);
  for (long j = 0; j < count; j++) {
    Panel one = {{p.w[j]}, {p.scales[j]}, p.k, p.group, p.adds};
    grouped ? blocks<L, true, FEW, 1>(one, x, rows, y, n + j) : blocks<L, false, MR, 1>(one, x, rows, y, n + j);
  }
}

// Grows to what a thread needs and stays for its next tile: fresh memory would be cleared each time.
struct Scratch {
  void* held = nullptr;
  long size = 0;
  ~Scratch() { free(held); }
  void* of(long bytes) {
    if (bytes > size) {
      free(held);
      held = aligned_alloc(64, size = (bytes + 4095) / 4096 * 4096);
    }
    return held;
  }
};
thread_local Scratch scratch;

template <class L> void unpack(const uint8_t* w, long k, uint16_t* out) {
  long i = 0;
  for (; i + 32 <= k; i += 32) _mm512_storeu_si512(out + i, (__m512i)L::load(w, i));
  if (i < k) _mm512_mask_storeu_epi16(out + i, (1u << (k - i)) - 1, (__m512i)L::load_part(w, i, k - i));
}

template <class L>
void product_of(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y) {
  long groups = a.groups(), stride = (a.k + 31) / 32 * 32;
  bool grouped = groups > 1, direct = rows <= 2 || a.kind == BF16, adds = a.mins != nullptr;
  float* scales = (float*)scratch.of(4 * groups * count + 64 + (direct ? 0 : 2 * stride * count));
  uint16_t* codes = (uint16_t*)(((uintptr_t)(scales + groups * count) + 63) / 64 * 64);
  for (long j = 0; j < count; j++) {
    panel_scales(a, n + j, 0, a.k, scales + j * groups);
    if (!direct) unpack<L>(a.row(n + j), a.k, codes + j * stride);
  }
  constexpr long SOME = 12;   // rows of x that stay in the first cache while the tile's weights pass by
  for (long m = 0; m < rows; m += SOME)
    for (long j = 0; j < count; j += 4) {
      Panel p = {{}, {}, a.k, a.group, adds};
      long width = count - j < 4 ? count - j : 4, part = rows - m < SOME ? rows - m : SOME;
      for (long i = 0; i < width; i++) {
        p.w[i] = direct ? a.row(n + j + i) : (const uint8_t*)(codes + (j + i) * stride);
        p.scales[i] = scales + (j + i) * groups;
      }
      if (!direct || a.kind == BF16) rows_of<AsBf16, 6>(p, grouped, width, x + m, part, y + m, n + j);
      else rows_of<L, 2>(p, grouped, width, x + m, part, y + m, n + j);
    }
}

}  // namespace

void round_row(const float* x, long k, uint16_t* out) {
  for (long i = 0; i < k; i += 16) {
    __mmask16 lanes = k - i < 16 ? (1u << (k - i)) - 1 : 0xffff;
    _mm256_mask_storeu_epi16(out + i, lanes, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, x + i)));
  }
}

void product(const Matrix& a, long n, long count, const uint16_t* const* x, const float* const* sums, long rows,
             float* const* y) {
  if (a.mins)
    for (long j = 0; j < count; j += TILE)
      tile(offsets(a), n + j, count - j < TILE ? count - j : TILE, sums, nullptr, rows, y);
  switch (a.kind) {
    case BF16: return product_of<AsBf16>(a, n, count, x, rows, y);
    case FP8_BLOCK: return product_of<Fp8Codes>(a, n, count, x, rows, y);
    case INT8: return product_of<Int8Codes>(a, n, count, x, rows, y);
    default:
      return a.mins ? product_of<Int4Codes<0>>(a, n, count, x, rows, y) : product_of<Int4Codes<-8>>(a, n, count, x, rows, y);
  }
}

#else

void round_row(const float*, long, uint16_t*) { abort(); }
void product(const Matrix&, long, long, const uint16_t* const*, const float* const*, long, float* const*) { abort(); }

#endif

extern "C" {

// 1 where native_linear_rounded may be called, and native_experts_rows with matrices that round.
int native_rounds(void) { return HAS_PRODUCTS; }

// native_linear with x rounded to BF16.
void native_linear_rounded(int kind, const float* x, const uint8_t* values, const void* scales, const void* mins,
                           float* y, long m, long n, long k, long group) {
  Matrix a = {kind, values, scales, mins, n, k, group};
  long groups = a.groups();
  const uint16_t** xs = (const uint16_t**)malloc(m * 3 * sizeof(void*));
  const float** sums = (const float**)(xs + m);
  float** ys = (float**)(xs + 2 * m);
  float* buffer = mins ? (float*)malloc(m * groups * 4) : nullptr;
  uint16_t* rounded = (uint16_t*)malloc(m * k * 2);
  // Rows of weights stay in a core's cache while a block of rows of x passes by.
  long width = m < ROWS ? TILE : 4 * TILE, rows = m < PART ? m : PART;
  long panels = (n + width - 1) / width, parts = (m + rows - 1) / rows;
#pragma omp parallel for schedule(static) if (m >= ROWS)
  for (long i = 0; i < m; i++) {
    xs[i] = rounded + i * k;
    ys[i] = y + i * n;
    sums[i] = buffer + i * groups;
    round_row(x + i * k, k, rounded + i * k);
    if (buffer) group_sums<Bf16>(a, xs[i], buffer + i * groups);
  }
  auto task = [&](long at) {
    long n0 = at / parts * width, m0 = at % parts * rows;
    product(a, n0, n - n0 < width ? n - n0 : width, xs + m0, sums + m0, m - m0 < rows ? m - m0 : rows, ys + m0);
  };
  if (parts == 1 && m < ROWS) {
#pragma omp parallel for schedule(static) if (m * n * k > SERIAL)
    for (long at = 0; at < panels; at++) task(at);
  } else {
#pragma omp parallel for schedule(dynamic)
    for (long at = 0; at < panels * parts; at++) task(at);
  }
  free(rounded);
  free(buffer);
  free(xs);
}

}  // extern "C"
