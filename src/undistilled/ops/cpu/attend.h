// A span of tokens of a paged cache, for query heads that share a key/value head.
//
// Keys and values are widened in registers: queries and sums lie in the order in which a loader gives elements.
#pragma once
#include <cmath>
#include "matrix.h"

namespace {

// Stays in one register from here on; is not what it was, so that a load from there is not done ahead.
#if HAS_AVX2
#define PIN(x) asm("" : "+x"(x))
#define FRESH(x) asm("" : "+r"(x))
#else
#define PIN(x)
#define FRESH(x)
#endif

constexpr long BLOCK = 64;    // tokens whose scores are held at a time
constexpr long HEADS = 8;     // query heads that are served together
constexpr long SOON = 16;     // tokens between asking for a row and its use
constexpr long WIDE = 1024;   // bytes of a token's keys of which a block fills the second cache
constexpr long KEYS = 4;      // keys that all of them meet while they are near

struct Paged {
  const float* q;                   // [rows, heads, width]
  const uint8_t *keys, *values;     // [slots, kv_heads, width], of `kind`; values may be keys
  const int32_t *table, *context;   // [rows, table_width], [rows]
  float* out;                       // [rows, heads, depth]
  long rows, heads, kv_heads, width, depth;   // depth <= width: a value's leading elements
  long table_width, block_size;
  int kind;
  float scale;

  long bytes() const { return width * (kind == FP32 ? 4 : 2); }   // of a head's row
  // at[i] = the byte at which token from + i of row r begins in keys and values; the last one again up to whole KEYS.
  void find(long r, long kv, long from, long count, long* at) const {
    long i = 0;
    while (i < count) {
      long t = from + i, inside = t % block_size;
      long slot = table[r * table_width + t / block_size] * block_size + inside;
      for (long end = i + block_size - inside; i < end && i < count; i++, slot++)
        at[i] = (slot * kv_heads + kv) * bytes();
    }
    for (; i % KEYS; i++) at[i] = at[i - 1];
  }
};

// A task's result: maximum and sum per head, then [heads, pad] weighted values.
struct Partial {
  float *top, *total, *acc;
  Partial(float* p, long heads) : top(p), total(p + heads), acc(p + 2 * heads) {}
};

// Calls f(MR, h) for tiles of MR = 1 to 3 heads from h on.
template <class F> INLINE void by_tiles(long heads, F f) {
  long h = 0;
  if (heads % 2 && heads > 1) f(std::integral_constant<int, 3>(), h), h = 3;
  for (; h + 2 <= heads; h += 2) f(std::integral_constant<int, 2>(), h);
  if (h < heads) f(std::integral_constant<int, 1>(), h);
}

// The vectors of the elements k.. of a row of `width`.
template <class L> INLINE void load_at(const uint8_t* row, long k, long width, bool whole, v8* w) {
  whole ? L::load(row + at<L>(k), w) : load_tail<L>(row + at<L>(k), width - k, w);
}

// acc[m][j] += q[m] * key j in the elements k.., MR heads by NR keys.
template <class L, int MR, int NR>
INLINE void add_products(const float* q, long pad, const uint8_t* keys, const long* at, long k, long width, bool whole,
                         v8 (&acc)[MR][NR]) {
  constexpr int V = L::STEP / 8;
  UNROLL for (int v = 0; v < V; v++) {
    v8 x[MR];
    UNROLL for (int m = 0; m < MR; m++) {
      v8 some = load(q + m * pad + k + 8 * v);
      PIN(some);
      x[m] = some;
    }
    FRESH(keys);
    UNROLL for (int j = 0; j < NR; j++) {
      v8 w[V];
      load_at<L>(keys + at[j], k, width, whole, w);
      UNROLL for (int m = 0; m < MR; m++) acc[m][j] = fma(w[v], x[m], acc[m][j]);
    }
  }
}

// scores[m][j] = q[m] . key j.
template <class L, int MR, int NR>
INLINE void score_tile(const float* q, long pad, const uint8_t* keys, const long* at, long width, float* scores) {
  v8 acc[MR][NR];
  UNROLL for (int m = 0; m < MR; m++)
    UNROLL for (int j = 0; j < NR; j++) acc[m][j] = splat(0);
  long k = 0;
  for (; k + L::STEP <= width; k += L::STEP) add_products<L>(q, pad, keys, at, k, width, true, acc);
  if (k < width) add_products<L>(q, pad, keys, at, k, width, false, acc);
  UNROLL for (int m = 0; m < MR; m++) sum_each(acc[m][0], acc[m][1], acc[m][2], acc[m][3], scores + m * BLOCK);
}

// acc[h][d..] = acc * fade[h] + sum over t of weights[h][t] * value t, HR heads by DR vectors.
template <class L, int HR, int DR>
INLINE void mix_tile(const float* weights, const float* fade, const uint8_t* values, const long* at, long tokens,
                     long d, long width, bool whole, float* acc, long pad) {
  constexpr int V = L::STEP / 8;
  v8 sums[HR][DR];
  UNROLL for (int h = 0; h < HR; h++)
    UNROLL for (int i = 0; i < DR; i++) sums[h][i] = load(acc + h * pad + d + 8 * i) * splat(fade[h]);
  for (long t = 0; t < tokens; t++) {
    v8 share[HR], v[V];
    UNROLL for (int h = 0; h < HR; h++) share[h] = splat(weights[h * BLOCK + t]);
    UNROLL for (int i = 0; i < DR; i += V) {
      load_at<L>(values + at[t], d + 8 * i, width, whole, v);
      UNROLL for (int n = 0; n < V; n++)
        UNROLL for (int h = 0; h < HR; h++) sums[h][i + n] = fma(share[h], v[n], sums[h][i + n]);
    }
  }
  UNROLL for (int h = 0; h < HR; h++)
    UNROLL for (int i = 0; i < DR; i++) store(acc + h * pad + d + 8 * i, sums[h][i]);
}

// The same for all of a value.
template <class L>
INLINE void mix(const float* weights, const float* fade, const uint8_t* values, const long* at, long tokens,
                long heads, long width, float* acc, long pad) {
  by_tiles(heads, [&](auto some, long h) {
    constexpr int HR = decltype(some)::value, DR = HR > 1 ? 4 : 8, V = L::STEP / 8;
    const float *w = weights + h * BLOCK, *f = fade + h;
    float* sums = acc + h * pad;
    long d = 0, end = width / L::STEP * L::STEP;
    end = end < pad ? end : pad;
    for (; d + 8 * DR <= end; d += 8 * DR) mix_tile<L, HR, DR>(w, f, values, at, tokens, d, width, true, sums, pad);
    for (; d < end; d += L::STEP) mix_tile<L, HR, V>(w, f, values, at, tokens, d, width, true, sums, pad);
    if (d < pad) mix_tile<L, HR, V>(w, f, values, at, tokens, d, width, false, sums, pad);
  });
}

// Scores become weights; returns what earlier weights are worth beside these.
INLINE float weigh(float* scores, long tokens, float& top, float& total) {
  float before = top;
  for (long i = tokens; i % 8; i++) scores[i] = -INFINITY;
  v8 most = splat(top), part = splat(0);
  for (long i = 0; i < tokens; i += 8) most = greater(load(scores + i), most);
  for (int i = 0; i < 8; i++) top = most[i] > top ? most[i] : top;
  for (long i = 0; i < tokens; i += 8) {
    v8 e = exp8(load(scores + i) - splat(top));
    store(scores + i, e);
    part = part + e;
  }
  float fade = before == -INFINITY ? 0 : exp8(splat(before - top))[0];
  total = total * fade + sum(part);
  return fade;
}

struct Span {
  long r, kv, from, to;             // tokens of row r, as key/value head kv has them
};

// What is asked for while a block of `tokens` from t on is worked on. Of the tokens behind it the kv-th part, with all
// their heads, so that memory is read in the order in which it lies; where that would fill the second cache, this
// head's own rows, SOON before they are needed.
struct Ahead {
  const Paged& a;
  const long parts;
  long at[BLOCK], count = 0, done = 0;
  Ahead(const Paged& paged, const Span& s, long t, long tokens)
      : a(paged), parts(a.kv_heads * a.bytes() > WIDE ? 1 : a.kv_heads) {
    long kv = parts > 1 ? s.kv : 0, begin = a.kv_heads > parts ? t + SOON : t + tokens;
    long from = begin + BLOCK * kv / parts, to = begin + BLOCK * (kv + 1) / parts;
    if (to > a.context[s.r]) to = a.context[s.r];
    if (from < to) a.find(s.r, a.kv_heads > parts ? s.kv : 0, from, count = to - from, at);
  }
  void ask(long tokens) {           // when so many have been worked on
    for (; done < count && done * parts < tokens; done++)
      for (long o = 0; o < a.bytes() * parts; o += LINE) {
        __builtin_prefetch(a.keys + at[done] + o);
        if (a.values != a.keys) __builtin_prefetch(a.values + at[done] + o);
      }
  }
};

// A span for `heads` query heads, laid out at q, `wide` floats each. first: whether these are the first of its heads.
template <class L>
void attend_span(const Paged& a, const Span& s, const float* q, long wide, long heads, bool first, Partial out,
                 long pad) {
  for (long h = 0; h < heads; h++) {
    out.top[h] = -INFINITY;
    out.total[h] = 0;
  }
  memset(out.acc, 0, heads * pad * sizeof(float));
  for (long t = s.from; t < s.to; t += BLOCK) {
    long tokens = s.to - t < BLOCK ? s.to - t : BLOCK, at[BLOCK];
    float scores[HEADS * BLOCK], fade[HEADS];
    a.find(s.r, s.kv, t, tokens, at);
    Ahead next(a, s, t, tokens);
    for (long j = 0; j < tokens; j += KEYS) {
      if (first) next.ask(j + KEYS);
      by_tiles(heads, [&](auto some, long h) {
        score_tile<L, decltype(some)::value, KEYS>(q + h * wide, wide, a.keys, at + j, a.width, scores + h * BLOCK + j);
      });
    }
    for (long h = 0; h < heads; h++) fade[h] = weigh(scores + h * BLOCK, tokens, out.top[h], out.total[h]);
    mix<L>(scores, fade, a.values, at, tokens, heads, a.width, out.acc, pad);
  }
}

// What a loader's vectors would hold of x: `count` elements times `factor`, zeros behind them.
template <class L> INLINE void lay(const float* x, long count, float factor, float* out) {
  float last[L::STEP] = {0};
  for (; count > 0; count -= L::STEP, x += L::STEP, out += L::STEP) {
    if (count < L::STEP) x = (const float*)memcpy(last, x, count * sizeof(float));
    v8 v[2] = {load(x), L::STEP > 8 ? load(x + L::STEP - 8) : splat(0)};
    if (L::STEP > 8) unzip(v);
    for (int i = 0; i < L::STEP / 8; i++) store(out + 8 * i, v[i] * splat(factor));
  }
}

// The other way.
template <class L> INLINE void lift(const float* x, long count, float factor, float* out) {
  constexpr int V = L::STEP / 8;
  for (; count > 0; count -= L::STEP, x += L::STEP, out += L::STEP) {
    float some[L::STEP];
    for (int v = 0; v < V; v++)
      for (int i = 0; i < 8; i++) some[V * i + v] = x[8 * v + i] * factor;
    memcpy(out, some, (count < L::STEP ? count : L::STEP) * sizeof(float));
  }
}

}  // namespace
