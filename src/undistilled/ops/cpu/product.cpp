// Products of rows of x, rounded to BF16, with a stored matrix, by AVX512_BF16's vdpbf16ps.
//
// Codes of int8 and fp8 are exact in BF16, so a group is multiplied as codes and its float32 scale
// meets the float32 sum. A vector holds 8 codes of each of 4 outputs and meets 8 values of a row of x four times:
// x stays as it lies, and sums of 16 outputs are folded together. What a lane sums, and in which order, depends on
// the matrix alone: a row has the same bits in a product of one row and of a thousand, on any number of threads.
#include "across.h"
#include "coded.h"
#include "integer.h"
#include "product.h"
#include "scratch.h"

#if HAS_PRODUCTS
#pragma GCC diagnostic ignored "-Wuninitialized"   // GCC 12 sees both inside its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "codes.h"

namespace {

constexpr long CHUNK = 8;      // codes of an output in a vector
constexpr int OUTPUTS = TILE;  // of a panel: output 4c + j is lane c, of 128 bits, of the j-th of four vectors

struct Panel {
  long k, group;
  const uint16_t* codes;       // for each group: [chunk][j][c][CHUNK], zeros behind the last
  const float* scales;         // [group][j][c]
  long n, count;               // its rows of the matrix
};

// out[group][j][c] = the scales of the rows n.., at most OUTPUTS; n is a multiple of OUTPUTS, as blocks of FP8 are.
void panel_factors(const Matrix& a, long n, long count, long groups, float* out) {
  const __m512i PLACE = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const float* scales = (const float*)a.scales.at + (a.kind == FP8_BLOCK ? n / 128 : n) * groups;
  __mmask16 here = (1u << count) - 1, placed = _mm512_cmplt_epi32_mask(PLACE, _mm512_set1_epi32(count));
  __m512i at = _mm512_mullo_epi32(PLACE, _mm512_set1_epi32(groups));
  for (long g = 0; g < groups; g++, out += OUTPUTS) {
    __m512 f = _mm512_set1_ps(1);
    if (a.kind == FP8_BLOCK) f = _mm512_set1_ps(scales[g] * 256);
    else if (a.kind == INT8 && groups == 1) f = _mm512_permutexvar_ps(PLACE, _mm512_maskz_loadu_ps(here, scales));
    else if (a.kind == INT8) f = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), placed, at, scales + g, 4);
    _mm512_storeu_ps(out, f);
  }
  if (a.kind == INT8)   // the next panel's: no stream that the processor would foresee
    for (long line = 0; line < groups; line++)
      _mm_prefetch((const char*)(scales + OUTPUTS * (groups + line)), _MM_HINT_T0);
}

struct Rows { const uint8_t* at[OUTPUTS]; };
// v[i] = the i-th chunk from k on of the outputs 4c + j, lane by lane, zeros from `end` on.
template <class L> INLINE void chunks_of(const Rows& rows, int j, long k, long end, __m512i* v) {
  UNROLL for (int c = 0; c < 4; c++) {
    const uint8_t* w = rows.at[4 * c + j];
    v[c] = (__m512i)(end - k < 32 ? L::load_part(w, k, end - k) : L::load(w, k));
  }
  __m512i ab = _mm512_shuffle_i32x4(v[0], v[1], 0x44), cd = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
  __m512i ef = _mm512_shuffle_i32x4(v[0], v[1], 0xee), gh = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_i32x4(ab, cd, 0x88);
  v[1] = _mm512_shuffle_i32x4(ab, cd, 0xdd);
  v[2] = _mm512_shuffle_i32x4(ef, gh, 0x88);
  v[3] = _mm512_shuffle_i32x4(ef, gh, 0xdd);
}

template <class L> void pack(const Matrix& a, const Rows& rows, uint16_t* codes) {
  long chunks = (a.group + CHUNK - 1) / CHUNK;
  for (long start = 0, g = 0; start < a.k; start += a.group, g++)
    for (long end = a.k - start < a.group ? a.k : start + a.group, k = start; k < end; k += 32)
      for (int j = 0; j < 4; j++) {
        __m512i v[4];
        chunks_of<L>(rows, j, k, end, v);
        uint16_t* to = codes + ((g * chunks + (k - start) / CHUNK) * 4 + j) * 32;
        UNROLL for (int i = 0; i < 4; i++)
          if (k + i * CHUNK < end) _mm512_store_si512(to + i * 128, v[i]);
      }
}

// The sums of each vector's lanes of 128 bits, in one fixed tree: output 4c + j from lane c of v[j].
INLINE __m512 folded(const __m512* v) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  return _mm512_add_ps((__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd),
                       (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
}

// 8 values of a row of x, of which `left` belong to the group, in each lane.
INLINE b32 four_times(const uint16_t* x, long left) {
  __m128i v = left >= CHUNK ? _mm_loadu_si128((const __m128i*)x)
              : left > 0    ? _mm_maskz_loadu_epi16((1u << left) - 1, x)
                            : _mm_setzero_si128();
  return (b32)_mm512_broadcast_i32x4(v);
}

// Four factors [c], each in the four floats of its lane.
INLINE __m512 spread(const float* factors) {
  const __m512i LANE = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return _mm512_permutexvar_ps(LANE, _mm512_castps128_ps512(_mm_loadu_ps(factors)));
}

template <int MR> struct Sums {
  __m512 acc[MR][4], total[MR][4];

  INLINE void clear(__m512 (&v)[MR][4]) {
    UNROLL for (int m = 0; m < MR; m++)
      UNROLL for (int j = 0; j < 4; j++) v[m][j] = _mm512_setzero_ps();
  }
  // The end of group g.
  template <bool GROUPED>
  __attribute__((always_inline)) void scale(const Panel& p, long g) {
    UNROLL for (int j = 0; j < 4; j++) {
      __m512 f = spread(p.scales + g * OUTPUTS + j * 4);
      UNROLL for (int m = 0; m < MR; m++)
        total[m][j] = GROUPED ? _mm512_fmadd_ps(acc[m][j], f, total[m][j]) : _mm512_mul_ps(acc[m][j], f);
    }
  }
  __attribute__((always_inline)) void put(const Panel& p, float* const* y) {
    __mmask16 outputs = (1u << p.count) - 1;
    UNROLL for (int m = 0; m < MR; m++) {
      _mm512_mask_storeu_ps(y[m] + p.n, outputs, folded(total[m]));
    }
  }
};

// y[m][n..n+count) = x[m] . the panel's outputs.
template <bool GROUPED, int MR>
void block(const Panel& p, const uint16_t* const* x, float* const* y) {
  Sums<MR> s;
  s.clear(s.total);
  for (long k0 = 0, g = 0; k0 < p.k; k0 += p.group, g++) {
    long end = p.k - k0 < p.group ? p.k : k0 + p.group;
    const uint16_t* w = p.codes + g * ((p.group + CHUNK - 1) / CHUNK) * 128;
    s.clear(s.acc);
    for (long k = k0; k < end; k += CHUNK, w += 128)
      UNROLL for (int m = 0; m < MR; m++) {
        b32 v = four_times(x[m] + k, end - k);
        UNROLL for (int j = 0; j < 4; j++)
          s.acc[m][j] = _mm512_dpbf16_ps(s.acc[m][j], v, (b32)_mm512_load_si512(w + j * 32));
      }
    s.template scale<GROUPED>(p, g);
  }
  s.put(p, y);
}

// block() straight from the stored rows, for so few rows of x that packed weights would be read once.
template <class L, bool GROUPED, int MR>
void straight(const Panel& p, const Rows& rows, const uint16_t* const* x, float* const* y, long ahead) {
  Sums<MR> s;
  s.clear(s.total);
  for (long k0 = 0, g = 0; k0 < p.k; k0 += p.group, g++) {
    long end = p.k - k0 < p.group ? p.k : k0 + p.group;
    s.clear(s.acc);
    for (long k = k0; k < end; k += 32) {
      if (k * L::BITS / 8 % 64 == 0)   // the rows are too many and too short for the processor to foresee
        UNROLL for (int r = 0; r < OUTPUTS; r++)
          _mm_prefetch((const char*)rows.at[r] + k * L::BITS / 8 + ahead, _MM_HINT_T1);
      b32 v[MR][4];
      UNROLL for (int m = 0; m < MR; m++)
        UNROLL for (int i = 0; i < 4; i++) v[m][i] = four_times(x[m] + k + i * CHUNK, end - k - i * CHUNK);
      UNROLL for (int j = 0; j < 4; j++) {
        __m512i w[4];
        chunks_of<L>(rows, j, k, end, w);
        UNROLL for (int i = 0; i < 4; i++)
          UNROLL for (int m = 0; m < MR; m++) s.acc[m][j] = _mm512_dpbf16_ps(s.acc[m][j], v[m][i], (b32)w[i]);
      }
    }
    s.template scale<GROUPED>(p, g);
  }
  s.put(p, y);
}

// Rows of x in blocks as large as the registers hold accumulators, and totals where there are groups.
template <bool GROUPED, int MR>
void blocks(const Panel& p, const uint16_t* const* x, long rows, float* const* y) {
  for (; rows >= MR; rows -= MR, x += MR, y += MR) block<GROUPED, MR>(p, x, y);
  if constexpr (MR > 1)
    if (rows) blocks<GROUPED, MR - 1>(p, x, rows, y);
}

thread_local Scratch scratch;

template <class L, bool GROUPED>
void product_of(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y, long last) {
  constexpr long SOME = 12;   // rows of x that stay in the first cache while the panels pass by
  bool few = rows <= 2;
  long chunks = (a.group + CHUNK - 1) / CHUNK, panels = (count + OUTPUTS - 1) / OUTPUTS;
  long groups = GROUPED ? a.groups() : 1;
  long codes = few ? 0 : groups * chunks * CHUNK * OUTPUTS, factors = groups * OUTPUTS;
  uint16_t* packed = (uint16_t*)scratch.of(panels * (2 * codes + 4 * factors));
  float* scales = (float*)(packed + panels * codes);
  auto panel = [&](long i) {
    long from = i * OUTPUTS, width = count - from < OUTPUTS ? count - from : OUTPUTS;
    return Panel{a.k, a.group, packed + i * codes, scales + i * factors, n + from, width};
  };
  for (long i = 0; i < panels; i++) {
    Panel p = panel(i);
    Rows from;
    for (long r = 0; r < OUTPUTS; r++) from.at[r] = a.row(p.n + (r < p.count ? r : 0));
    panel_factors(a, p.n, p.count, groups, (float*)p.scales);
    if (!few) pack<L>(a, from, (uint16_t*)p.codes);
    long ahead = ahead_of(OUTPUTS * a.row_bytes(), OUTPUTS, p.n, last);
    if (rows == 1) straight<L, GROUPED, 1>(p, from, x, y, ahead);
    if (rows == 2) straight<L, GROUPED, 2>(p, from, x, y, ahead);
  }
  for (long m = 0; m < (few ? 0 : rows); m += SOME)
    for (long i = 0; i < panels; i++)
      blocks<GROUPED, GROUPED ? 3 : 6>(panel(i), x + m, rows - m < SOME ? rows - m : SOME, y + m);
}

long arranged_bf16(const Matrix& a) { return a.kind == CODED ? arranged_coded(a) : a.k; }

void arrange_bf16(const Matrix& a, const float* x, uint16_t* out) {
  if (a.kind == CODED) return arrange_coded(a, x, out);
  for (long i = 0; i < a.k; i += 16) {
    __mmask16 lanes = a.k - i < 16 ? (1u << (a.k - i)) - 1 : 0xffff;
    _mm256_mask_storeu_epi16(out + i, lanes, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, x + i)));
  }
}

void product_bf16(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y,
                  long last) {
  auto by = [&](auto loader) {
    typedef decltype(loader) L;
    auto run = a.group < a.k ? product_of<L, true> : product_of<L, false>;
    run(a, n, count, x, rows, y, last);
  };
  switch (a.kind) {
    case BF16: return by(AsBf16());
    case FP8_BLOCK: return by(Fp8Codes());
    case INT8: return by(Int8Codes());
    default: return product_coded(a, n, count, x, rows, y, last);
  }
}

}  // namespace

#else

namespace {

long arranged_bf16(const Matrix&) { abort(); }
void arrange_bf16(const Matrix&, const float*, uint16_t*) { abort(); }
void product_bf16(const Matrix&, long, long, const uint16_t* const*, long, float* const*, long) { abort(); }

}  // namespace

#endif

long arranged(const Matrix& a) {
  if (a.kind == FP8_ACROSS) return 2 * a.k;
  return a.rounds >= TO_INT8 ? arranged_integer(a) : arranged_bf16(a);
}

void arrange(const Matrix& a, const float* x, uint16_t* out) {
  if (a.kind == FP8_ACROSS) return arrange_fp8(a, x, out);
  (a.kind == ACROSS ? arrange_crossed : a.rounds >= TO_INT8 ? arrange_integer : arrange_bf16)(a, x, out);
}

void product(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y, long last) {
  if (a.kind == ACROSS) return (a.rounds == TO_INT8 ? product_coarse : product_across)(a, n, count, x, rows, y);
  if (a.kind == FP8_ACROSS) return product_fp8(a, n, count, x, rows, y);
  (a.rounds >= TO_INT8 ? product_integer : product_bf16)(a, n, count, x, rows, y, last);
}
