// Linear layers on stored weights, and the per-row operations around them.
#include <cmath>
#include "coded.h"
#include "product.h"
#include "scratch.h"

namespace {

const char* const ISA =
#if HAS_AVX2
    "avx2 fma f16c"
#if defined(__AVX512F__)
    " avx512f"
#endif
#if defined(__AVX512VL__)
    " avx512vl"
#endif
#if HAS_PRODUCTS
    " avx512bw avx512dq avx512_bf16"
#endif
#endif
    "";

template <class L>
void tile_of(const Matrix& a, long n, int count, const float* const* x, const float* const* sums, long rows,
             float* const* y) {
  for (long m0 = 0; m0 < rows; m0 += ROWS) {
    long part = rows - m0 < ROWS ? rows - m0 : ROWS;
    Totals total[ROWS];
    for (long m = 0; m < part; m++)
      for (int j = 0; j < count; j++) total[m][j] = splat(0);
    add_tile<L>(a, n, count, x + m0, part, total);
    if (a.kind == INT4) add_tile<Fp16>(offsets(a), n, count, sums + m0, part, total);
    for (long m = 0; m < part; m++)
      for (int j = 0; j < count; j++) y[m0 + m][n + j] = sum(total[m][j]);
  }
}

thread_local Scratch scratch;

// A coded tile as float32 rows: one look-up serves all rows of x.
void tile_coded(const Matrix& a, long n, int count, const float* const* x, long rows, float* const* y) {
  Matrix wide = {FP32, 0, count, a.k, a.k, {}, {}, {}, {}};
  float* decoded = (float*)scratch.of(count * a.k * 4);
  wide.values.at = (const uint8_t*)decoded;
  for (int j = 0; j < count; j++) decode_coded(a, n + j, decoded + j * a.k);
  for (long m0 = 0; m0 < rows; m0 += ROWS) {
    long part = rows - m0 < ROWS ? rows - m0 : ROWS;
    float* to[ROWS];
    for (long m = 0; m < part; m++) to[m] = y[m0 + m] + n;
    tile_of<Fp32>(wide, 0, count, x + m0, nullptr, part, to);
  }
}

}  // namespace

void tile(const Matrix& a, long n, int count, const float* const* x, const float* const* sums, long rows,
          float* const* y) {
  if (a.kind == CODED) return tile_coded(a, n, count, x, rows, y);
  with_loader(a.kind, [&](auto loader) { tile_of<decltype(loader)>(a, n, count, x, sums, rows, y); });
}

extern "C" {

// The extension is loaded by ctypes; importing it is an error.
__attribute__((visibility("default"))) void* PyInit__kernels(void) { return nullptr; }

// The /proc/cpuinfo flags without which this build must not be called.
const char* native_isa(void) { return ISA; }

void native_linear(const Matrix* matrix, const float* x, float* y, long m) {
  const Matrix& a = *matrix;
  long n = a.n, k = a.k, groups = a.groups();
  const float** xs = (const float**)malloc(m * 3 * sizeof(void*));
  const float** sums = xs + m;
  float** ys = (float**)(xs + 2 * m);
  float* buffer = has_offsets(a) ? (float*)malloc(m * groups * 4) : nullptr;
  for (long i = 0; i < m; i++) {
    xs[i] = x + i * k;
    ys[i] = y + i * n;
    sums[i] = buffer + i * groups;
    if (buffer) group_sums(a, xs[i], buffer + i * groups);
  }
  long width = m <= 2 ? 4 : TILE;   // a wide tile reads x less often, a narrow one streams better
#pragma omp parallel for schedule(static) if (m * n * k > SERIAL)
  for (long n0 = 0; n0 < n; n0 += width) tile(a, n0, n - n0 < width ? n - n0 : width, xs, sums, m, ys);
  free(buffer);
  free(xs);
}

// 1 where native_linear_rounded may be called, and native_experts_rows with matrices that round.
int native_rounds(void) { return HAS_PRODUCTS; }

// native_linear with x rounded to BF16.
void native_linear_rounded(const Matrix* matrix, const float* x, float* y, long m) {
  if (m == 0) return;
  const Matrix& a = *matrix;
  long n = a.n, k = a.k, row = (arranged(a) + 31) / 32 * 32;
  const uint16_t** xs = (const uint16_t**)malloc(m * 2 * sizeof(void*));
  float** ys = (float**)(xs + m);
  uint16_t* rounded = (uint16_t*)aligned_alloc(64, m * row * 2);
  // Rows of weights stay in a core's cache while a block of rows of x passes by.
  long width = m < ROWS ? TILE : 4 * TILE, rows = m < PART ? m : PART;
  long panels = (n + width - 1) / width, parts = (m + rows - 1) / rows;
#pragma omp parallel for schedule(static) if (m >= ROWS)
  for (long i = 0; i < m; i++) {
    xs[i] = rounded + i * row;
    ys[i] = y + i * n;
    arrange(a, x + i * k, rounded + i * row);
  }
  auto task = [&](long at) {
    long n0 = at / parts * width, m0 = at % parts * rows;
    product(a, n0, n - n0 < width ? n - n0 : width, xs + m0, m - m0 < rows ? m - m0 : rows, ys + m0);
  };
  if (parts == 1 && m < ROWS) {
#pragma omp parallel for schedule(static) if (m * n * k > SERIAL)
    for (long at = 0; at < panels; at++) task(at);
  } else {
#pragma omp parallel for schedule(dynamic)
    for (long at = 0; at < panels * parts; at++) task(at);
  }
  free(rounded);
  free(xs);
}

// out [n1 - n0, k] = rows n0..n1 as float32.
void native_dequantise(const Matrix* matrix, float* out, long n0, long n1) {
  const Matrix& a = *matrix;
  long k = a.k, group = a.group;
  if (a.kind == CODED) {
#pragma omp parallel for schedule(static) if ((n1 - n0) * k > SERIAL)
    for (long i = n0; i < n1; i++) decode_coded(a, i, out + (i - n0) * k);
    return;
  }
  with_loader(a.kind, [&](auto loader) {
#pragma omp parallel for schedule(static) if ((n1 - n0) * k > SERIAL)
    for (long i = n0; i < n1; i++) {
      float factors[PANEL], lows[PANEL], *row = out + (i - n0) * k;
      for (long k0 = 0, k1; k0 < k; k0 = k1) {
        k1 = panel_end(a, k0);
        decode<decltype(loader)>(a.row(i), k0, k1, row + k0);
        if (a.kind <= BF16) continue;
        panel_scales(a, i, k0, k1, factors);
        if (a.mins.at) {
          Matrix b = a;
          b.scales = a.mins;
          panel_scales(b, i, k0, k1, lows);
        }
        for (long g = 0, from = k0; from < k1; g++) {
          long end = (from / group + 1) * group;
          end = end < k1 ? end : k1;
          v8 f = splat(factors[g]), low = splat(a.mins.at ? lows[g] : 0);
          auto scaled = [&](v8 w) {
            return a.kind != INT4 ? w * f : a.mins.at ? fma(w, f, low) : (w - splat(8)) * f;
          };
          for (; from + 8 <= end; from += 8) store(row + from, scaled(load(row + from)));
          if (from < end) store_part(row + from, scaled(load_part(row + from, end - from)), end - from);
          from = end;
        }
      }
    }
  });
}

// y = x / rms(x) * w; with r, x += r first, in place.
void native_norm_rows(float* x, const float* r, const float* w, float* y, long rows, long d, float eps) {
#pragma omp parallel for schedule(static) if (rows * d > SERIAL)
  for (long i = 0; i < rows; i++) {
    float* a = x + i * d;
    v8 s = splat(0), t = splat(0);
    long k = 0;
    auto squares = [&](long count, v8 acc) {
      v8 v = load_part(a + k, count);
      if (r) store_part(a + k, v = v + load_part(r + i * d + k, count), count);
      return fma(v, v, acc);
    };
    for (; k + 8 <= d; k += 8) {
      v8 acc = squares(8, s);
      s = t;
      t = acc;
    }
    if (k < d) s = squares(d - k, s);
    v8 inverse = splat(1 / std::sqrt(sum(s + t) / d + eps));
    for (k = 0; k + 8 <= d; k += 8) store(y + i * d + k, load(a + k) * inverse * load(w + k));
    if (k < d) store_part(y + i * d + k, load_part(a + k, d - k) * inverse * load_part(w + k, d - k), d - k);
  }
}

// y = g / (1 + exp(-g)) * u
void native_silu_mul(const float* g, const float* u, float* y, long count) {
  long whole = count / 8;
#pragma omp parallel for schedule(static) if (count > SERIAL)
  for (long i = 0; i < whole; i++) store(y + i * 8, silu8(load(g + i * 8)) * load(u + i * 8));
  long done = whole * 8, left = count - done;
  if (left) store_part(y + done, silu8(load_part(g + done, left)) * load_part(u + done, left), left);
}

// Rotary embedding of x [rows, heads, d], in place; heads lie `stride` floats apart. The cosines and
// sines are [rows, d / 2]; pair i is (2i, 2i + 1) if interleaved, else (i, i + d / 2).
void native_rope_rows(float* x, const float* cosines, const float* sines, long rows, long heads, long d,
                      long stride, int interleaved) {
  long half = d / 2, step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
#pragma omp parallel for schedule(static) if (rows * heads * d > SERIAL)
  for (long i = 0; i < rows * heads; i++) {
    const float *c = cosines + i / heads * half, *s = sines + i / heads * half;
    float* a = x + i * stride;
    for (long j = 0; j < half; j++) {
      float p = a[j * step], q = a[j * step + other];
      a[j * step] = p * c[j] - q * s[j];
      a[j * step + other] = q * c[j] + p * s[j];
    }
  }
}

}  // extern "C"
