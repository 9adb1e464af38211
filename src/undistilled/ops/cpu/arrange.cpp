// Rows of x for products by tiles: rounded to INT8 or INT16, or in the order in which FP8 meets them.
#include <cstdlib>
#include "decoders.h"
#include "integer.h"

namespace {

// The largest magnitude of x; NaN where there is one: of floats without sign, bits are in the order of values.
INLINE float largest(const float* x, long count) {
  i8x most = {};
  for (long i = 0; i < count; i += 8) {
    i8x v = (i8x)(count - i < 8 ? load_part(x + i, count - i) : load(x + i)) & 0x7fffffff;
    most = greater(v, most);
  }
  int32_t bits = 0;
  for (int i = 0; i < 8; i++) bits = most[i] > bits ? most[i] : bits;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// A block's codes, zeros behind the first `count`, eight in a vector; returns their sum.
INLINE int round_block(const float* x, long count, float inverse, i8x* v) {
  const v8 magic = splat(0x1.8p23f);   // beside it floats are integers: the sum rounds to nearest, ties to even
  i8x sums = {};
  UNROLL for (int j = 0; j < QUANTUM / 8; j++) {
    long left = count - 8 * j;
    v8 some = left >= 8 ? load(x + 8 * j) : left > 0 ? load_part(x + 8 * j, left) : splat(0);
    v[j] = (i8x)(some * splat(inverse) + magic) - (i8x)magic;
    sums += v[j];
  }
  int sum = 0;
  for (int i = 0; i < 8; i++) sum += sums[i];
  return sum;
}

template <class X> struct Arranged {
  const Matrix& a;
  const float* x;
  Row<X> to;

  // SHARE units from the k-th input on.
  void share(long k) {
    long left = a.k - k, all = X::UNIT * X::SHARE, end = k + all < padded(a) ? k + all : padded(a);
    float most = largest(x + k, left < all ? left : all), scale = most / X::LARGEST + most * 0;   // NaN for infinities
    bool least = most < 0x1p-100f, none = least || scale != scale;   // less has no inverse, and NaN says it all
    if (least) scale = 0;
    ((float*)to.scales)[k / all] = scale;
    for (; k < end; k += X::UNIT) {
      i8x v[X::UNIT / 8];
      for (long b = 0; b < X::UNIT; b += QUANTUM) {
        int sum = round_block(x + k + b, none ? 0 : a.k - k - b, none ? 0 : X::LARGEST / most, v + b / 8);
        if (summed(a) && k + b < a.k) ((float*)to.sums)[(k + b) / a.group] += scale * sum;
      }
      X::put(v, (typename X::Code*)to.codes + k);
    }
  }
  void run() {
    if (summed(a)) memset((float*)to.sums, 0, summed(a) * 4);
    for (long k = 0; k < padded(a); k += X::UNIT * X::SHARE) share(k);
  }
};

template <> struct Arranged<AsFloats> {
  const Matrix& a;
  const float* x;
  Row<AsFloats> to;

  void run() {
    float* out = (float*)to.codes;
    for (long k = 0; k < padded(a); k += QUANTUM, out += QUANTUM)
      for (long i = 0; i < QUANTUM; i++) {
        long from = k + i % 8 * 4 + 3 - i / 8;
        out[i] = from < a.k ? x[from] * AsFloats::TIMES : 0;
      }
  }
};

}  // namespace

long arranged_integer(const Matrix& a) {
  return with_activations(a, [&](auto of) { return Row<decltype(of)>::bytes(a) / 2; });
}

void arrange_integer(const Matrix& a, const float* x, uint16_t* out) {
  with_activations(a, [&](auto of) { Arranged<decltype(of)>{a, x, {a, out}}.run(); });
}

#if HAS_AVX2
void arrange_crossed(const Matrix& a, const float* x, uint16_t* out) {
  a.rounds == TO_INT8 ? Arranged<Coarse>{a, x, {a, out}}.run() : Arranged<Crossed>{a, x, {a, out}}.run();
}
#else
void arrange_crossed(const Matrix&, const float*, uint16_t*) { abort(); }
#endif
