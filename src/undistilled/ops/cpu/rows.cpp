// Operations on rows of activations: norm, SwiGLU's middle, rotation, sums, rows out of and into tables.
#include <cmath>
#include "matrix.h"
#include "pool.h"

namespace {

long spread(long rows, long stride, long d) { return rows ? ((rows - 1) * stride + d) * 4 : 0; }

struct Norm : Kernel<Norm> {   // y = x / rms(x) * w; with r, x += r first, in place; y may be x
  float* x;
  const float *r, *w;
  float* y;
  long rows, d, from, to;      // from, to: floats between rows of x, and of y
  float eps;

  Norm(float* x, const float* r, const float* w, float* y, long rows, long d, long from, long to, float eps)
      : x(x), r(r), w(w), y(y), rows(rows), d(d), from(from), to(to), eps(eps) {
    name = "norm";
    small = rows * d <= SERIAL;
    (r ? writes(x, spread(rows, from, d)) : reads(x, spread(rows, from, d)));
    if (r) reads(r, rows * d * 4);
    writes(y, spread(rows, to, d));
  }
  void row(long i) const {
    float *a = x + i * from, *out = y + i * to;
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
    for (k = 0; k + 8 <= d; k += 8) store(out + k, load(a + k) * inverse * load(w + k));
    if (k < d) store_part(out + k, load_part(a + k, d - k) * inverse * load_part(w + k, d - k), d - k);
  }
  void run(Team& team) const override {
    team.share(rows, [&](long i) { row(i); });
  }
};

constexpr long PIECE = 1024;   // elements that a thread takes at a time

// out[i] = f(i) for `count` elements, 8 at a time.
template <class F> void elements(Team& team, long count, F piece) {
  team.share((count + PIECE - 1) / PIECE, [&](long at) {
    long end = (at + 1) * PIECE < count ? (at + 1) * PIECE : count;
    for (long i = at * PIECE; i < end; i += 8) piece(i, end - i < 8 ? end - i : 8);
  });
}

struct SiluMul : Kernel<SiluMul> {   // y = g / (1 + exp(-g)) * u
  const float *g, *u;
  float* y;
  long count;

  SiluMul(const float* g, const float* u, float* y, long count) : g(g), u(u), y(y), count(count) {
    name = "silu mul";
    small = count <= SERIAL / 8;
    reads(g, count * 4);
    reads(u, count * 4);
    writes(y, count * 4);
  }
  void run(Team& team) const override {
    elements(team, count, [&](long i, long n) {
      store_part(y + i, silu8(load_part(g + i, n)) * load_part(u + i, n), n);
    });
  }
};

// y [rows, d] = a + b or a * b, where b [d] may stand for every row of it.
struct Pointwise : Kernel<Pointwise> {
  const float *a, *b;
  float* y;
  long rows, d, step;
  bool times;

  Pointwise(const float* a, const float* b, float* y, long rows, long d, bool one, bool times)
      : a(a), b(b), y(y), rows(rows), d(d), step(one ? 0 : d), times(times) {
    name = times ? "multiply" : "add";
    small = rows * d <= SERIAL;
    reads(a, rows * d * 4);
    reads(b, (one ? d : rows * d) * 4);
    writes(y, rows * d * 4);
  }
  void run(Team& team) const override {
    team.share(rows, [&](long r) {
      const float *p = a + r * d, *q = b + r * step;
      float* out = y + r * d;
      for (long i = 0; i < d; i++) out[i] = times ? p[i] * q[i] : p[i] + q[i];
    });
  }
};

// Rotary embedding of x [rows, heads, d], in place; heads lie `stride` floats apart. The cosines and
// sines are [rows, d / 2]; pair i is (2i, 2i + 1) if interleaved, else (i, i + d / 2).
struct Rope : Kernel<Rope> {
  float* x;
  const float *cosines, *sines;
  long rows, heads, d, stride;
  bool interleaved;

  Rope(float* x, const float* c, const float* s, long rows, long heads, long d, long stride, bool interleaved)
      : x(x), cosines(c), sines(s), rows(rows), heads(heads), d(d), stride(stride), interleaved(interleaved) {
    name = "rope";
    small = rows * heads * d <= SERIAL;
    writes(x, spread(rows * heads, stride, d));
    reads(c, rows * d * 2);
    reads(s, rows * d * 2);
  }
  void run(Team& team) const override {
    long half = d / 2, step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
    team.share(rows * heads, [&](long i) {
      const float *c = cosines + i / heads * half, *s = sines + i / heads * half;
      float* a = x + i * stride;
      for (long j = 0; j < half; j++) {
        float p = a[j * step], q = a[j * step + other];
        a[j * step] = p * c[j] - q * s[j];
        a[j * step + other] = q * c[j] + p * s[j];
      }
    });
  }
};

// float32 to the nearest of 16 bits, ties to even, as PyTorch converts.
uint16_t to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return f != f ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

uint16_t to_fp16(float f) {
  uint32_t bits, sign, rest, half;
  memcpy(&bits, &f, 4);
  sign = bits >> 16 & 0x8000, bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;
  if (bits < 0x33000000) return sign;
  uint32_t shift = bits < 0x38800000 ? 126 - (bits >> 23) : 13;   // subnormal, or normal
  uint32_t whole = bits < 0x38800000 ? (bits & 0x7fffff) | 0x800000 : bits - (112u << 23);
  rest = whole & ((1u << shift) - 1), half = whole >> shift;
  half += rest > 1u << (shift - 1) || (rest == 1u << (shift - 1) && (half & 1));
  return sign | half;
}

// Row i of x [rows, d] goes into row slots[i] of a table of `kind`; a slot outside it stays unwritten.
struct WriteRows : Kernel<WriteRows> {
  int kind;
  const float* x;
  const int64_t* slots;
  uint8_t* table;
  long rows, d, size;

  WriteRows(int kind, const float* x, const int64_t* slots, uint8_t* table, long rows, long d, long size)
      : kind(kind), x(x), slots(slots), table(table), rows(rows), d(d), size(size) {
    name = "cache";
    small = rows * d <= SERIAL;
    reads(x, rows * d * 4);
    reads(slots, rows * 8);
    writes(table, size * d * (kind == FP32 ? 4 : 2));
  }
  void run(Team& team) const override {
    team.share(rows, [&](long i) {
      if (slots[i] < 0 || slots[i] >= size) return;
      const float* from = x + i * d;
      if (kind == FP32) {
        memcpy((float*)table + slots[i] * d, from, d * 4);
        return;
      }
      uint16_t* to = (uint16_t*)table + slots[i] * d;
      if (kind == BF16)
        for (long k = 0; k < d; k++) to[k] = to_bf16(from[k]);
      else
        for (long k = 0; k < d; k++) to[k] = to_fp16(from[k]);
    });
  }
};

// out[i] = row ids[i] of a matrix as float32; zeros for an id outside it.
struct Pick : Kernel<Pick> {
  const Matrix& a;
  const int64_t* ids;
  float* out;
  long rows;

  Pick(const Matrix& a, const int64_t* ids, float* out, long rows) : a(a), ids(ids), out(out), rows(rows) {
    name = "embedding";
    weights = rows * bytes_of(a) / (a.n ? a.n : 1);
    small = rows * a.k <= SERIAL;
    reads(ids, rows * 8);
    writes(out, rows * a.k * 4);
  }
  void run(Team& team) const override {
    team.share(rows, [&](long i) {
      if (ids[i] >= 0 && ids[i] < a.n) decode_row(a, ids[i], out + i * a.k);
      else memset(out + i * a.k, 0, a.k * 4);
    });
  }
};

// Reads `count` pieces of memory of `bytes` each, and leaves of each a number that depends on all of it.
struct Read : Kernel<Read> {
  const uint8_t* at;
  int32_t* out;
  long count, bytes;           // a multiple of 256

  Read(const uint8_t* at, int32_t* out, long count, long bytes) : at(at), out(out), count(count), bytes(bytes) {
    name = "read";
  }
  void run(Team& team) const override {
    team.share(count, [&](long i) {
      i8x s[8] = {};
      for (const uint8_t *p = at + i * bytes, *end = p + bytes; p < end; p += 256)
        UNROLL for (int j = 0; j < 8; j++) {
          if (j % 2 == 0) __builtin_prefetch(p + 32 * j + NEAR, 0, 2);   // as kernels that read weights do
          s[j] ^= read<i8x>(p + 32 * j);
        }
      for (int j = 1; j < 8; j++) s[0] ^= s[j];
      out[i] = s[0][0] ^ s[0][1] ^ s[0][2] ^ s[0][3] ^ s[0][4] ^ s[0][5] ^ s[0][6] ^ s[0][7];
    });
  }
};

}  // namespace

extern "C" {

void native_read(const uint8_t* at, int32_t* out, long count, long bytes) { submit(Read(at, out, count, bytes)); }

void native_norm_rows(float* x, const float* r, const float* w, float* y, long rows, long d, long from, long to,
                      float eps) {
  submit(Norm(x, r, w, y, rows, d, from, to, eps));
}
void native_silu_mul(const float* g, const float* u, float* y, long count) { submit(SiluMul(g, u, y, count)); }
void native_pointwise(const float* a, const float* b, float* y, long rows, long d, int one, int times) {
  submit(Pointwise(a, b, y, rows, d, one, times));
}
void native_rope_rows(float* x, const float* cosines, const float* sines, long rows, long heads, long d, long stride,
                      int interleaved) {
  submit(Rope(x, cosines, sines, rows, heads, d, stride, interleaved));
}
void native_write_rows(int kind, const float* x, const int64_t* slots, void* table, long rows, long d, long size) {
  submit(WriteRows(kind, x, slots, (uint8_t*)table, rows, d, size));
}
void native_pick_rows(const Matrix* a, const int64_t* ids, float* out, long rows) { submit(Pick(*a, ids, out, rows)); }

}  // extern "C"
