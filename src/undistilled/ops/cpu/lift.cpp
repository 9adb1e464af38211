// Latent attention's lift straight from its stored weight [heads * (nope + values), latent]: a head's first `nope` rows
// fold into its query, its others turn what was attended into values. x stays float32 whatever the weight's products.
#include "matrix.h"
#include "pool.h"

namespace {

thread_local Scratch prepared, decoded;

// out[r][h] = sum over n of q[r][h][n] * row h * height + n of a, in the order of n; then q's own rotated part.
struct Absorb : Kernel<Absorb> {
  const Matrix& a;
  const float* q;      // [rows, heads, nope + rope]
  float* out;          // [rows, heads, latent + rope]
  long rows, heads, nope, rope, height;

  Absorb(const Matrix& a, const float* q, float* out, long rows, long heads, long nope, long rope)
      : a(a), q(q), out(out), rows(rows), heads(heads), nope(nope), rope(rope), height(a.n / heads) {
    name = "absorb";
    weights = bytes_of(a) / height * nope;
    small = rows * heads * nope * a.k <= SERIAL;
    reads(q, rows * heads * (nope + rope) * 4);
    writes(out, rows * heads * (a.k + rope) * 4);
  }
  // Up to ROWS_AT_ONCE decoded rows meet `count` inputs of one row's sum.
  void add(const float* weights, long many, const float* x, float* to) const {
    for (long k = 0; k < a.k; k += 8) {
      long count = a.k - k < 8 ? a.k - k : 8;
      v8 s = load_part(to + k, count);
      for (long i = 0; i < many; i++) s = fma(load_part(weights + i * a.k + k, count), splat(x[i]), s);
      store_part(to + k, s, count);
    }
  }
  void run(Team& team) const override {
    constexpr long AT_ONCE = 8;
    float* some = (float*)decoded.of(AT_ONCE * a.k * 4);
    long from = nope + rope, to = a.k + rope;
    team.share(heads, [&](long h) {
      for (long r = 0; r < rows; r++) memset(out + (r * heads + h) * to, 0, a.k * 4);
      for (long n = 0; n < nope; n += AT_ONCE) {
        long many = nope - n < AT_ONCE ? nope - n : AT_ONCE;
        for (long i = 0; i < many; i++) decode_row(a, h * height + n + i, some + i * a.k);
        for (long r = 0; r < rows; r++) add(some, many, q + (r * heads + h) * from + n, out + (r * heads + h) * to);
      }
      for (long r = 0; r < rows; r++)
        memcpy(out + (r * heads + h) * to + a.k, q + (r * heads + h) * from + nope, rope * 4);
    });
  }
};

// out[r][h][v] = x[r][h] . row h * height + nope + v of a.
struct Release : Kernel<Release> {
  const Matrix& a;
  const float* x;      // [rows, heads, latent]
  float* out;          // [rows, heads, values]
  long rows, heads, nope, height;

  Release(const Matrix& a, const float* x, float* out, long rows, long heads, long nope)
      : a(a), x(x), out(out), rows(rows), heads(heads), nope(nope), height(a.n / heads) {
    name = "release";
    weights = bytes_of(a) / height * (height - nope);
    small = rows * heads * (height - nope) * a.k <= SERIAL;
    reads(x, rows * heads * a.k * 4);
    writes(out, rows * heads * (height - nope) * 4);
  }
  void run(Team& team) const override {
    long depth = height - nope, width = rows <= 2 ? 4 : TILE, tiles = (depth + width - 1) / width, last = -1;
    long groups = has_offsets(a) ? a.groups() : 0;
    Cutter count, cut;
    auto lay = [&](Cutter& c) {
      struct { const float **x, **sums; float **y, *buffer; } laid = {
          c.take<const float*>(rows), c.take<const float*>(rows), c.take<float*>(rows), c.take<float>(rows * groups)};
      return laid;
    };
    lay(count);
    cut.at = (char*)prepared.of(count.at - (char*)nullptr);
    auto laid = lay(cut);
    team.share(heads * tiles, [&](long task) {
      long h = task / tiles, v = task % tiles * width, first = h * height + nope;
      for (long r = 0; r < rows; r++) {
        laid.x[r] = x + (r * heads + h) * a.k;
        laid.y[r] = out + (r * heads + h) * depth - first;
        laid.sums[r] = laid.buffer + r * groups;
        if (groups && h != last) group_sums(a, laid.x[r], laid.buffer + r * groups);
      }
      last = h;
      tile(a, first + v, depth - v < width ? depth - v : width, laid.x, laid.sums, rows, laid.y);
    });
  }
};

}  // namespace

extern "C" {

void native_absorb(const Matrix* a, const float* q, float* out, long rows, long heads, long nope, long rope) {
  submit(Absorb(*a, q, out, rows, heads, nope, rope));
}
void native_release(const Matrix* a, const float* x, float* out, long rows, long heads, long nope) {
  submit(Release(*a, x, out, rows, heads, nope));
}

}  // extern "C"
