// Decode attention over a paged cache: grouped-query and absorbed multi-head latent.
//
// A row's context is cut into spans of SPAN tokens, whatever the thread count; a task is one
// span for up to HEADS query heads that share a key/value head. Each task leaves its maximum,
// its sum and its weighted values; these are merged in the order of the spans.
#include <cmath>
#include <cstdlib>
#include "matrix.h"
#include "pool.h"

namespace {

constexpr long SPAN = 512;    // tokens of a task
constexpr long HEADS = 8;     // query heads of a task
constexpr long BLOCK = 16;    // tokens whose scores are held at a time

struct Paged {
  const float* q;                   // [rows, heads, width]
  const uint8_t *keys, *values;     // [slots, kv_heads, width], of `kind`; values may be keys
  const int32_t *table, *context;   // [rows, table_width], [rows]
  float* out;                       // [rows, heads, depth]
  long rows, heads, kv_heads, width, depth;   // depth <= width: a value's leading elements
  long table_width, block_size;
  int kind;
  float scale;

  long spans(long r) const { return context[r] > 0 ? (context[r] + SPAN - 1) / SPAN : 0; }
  long slot(long r, long t) const {
    return (long)table[r * table_width + t / block_size] * block_size + t % block_size;
  }
};

// A task's result: maximum and sum per head, then [HEADS, pad] weighted values.
struct Partial {
  float *top, *total, *acc;
  Partial(float* p) : top(p), total(p + HEADS), acc(p + 2 * HEADS) {}
};

template <int MR, int NR>
INLINE void score_tile(const Paged& a, const float* q, const float* const* keys, float* scores) {
  const float* x[MR];
  const uint8_t* w[NR];
  v8 acc[1][MR][NR];
  UNROLL for (int m = 0; m < MR; m++) {
    x[m] = q + m * a.width;
    for (int j = 0; j < NR; j++) acc[0][m][j] = splat(0);
  }
  for (int j = 0; j < NR; j++) w[j] = (const uint8_t*)keys[j];
  dots<Fp32>(w, x, 0, a.width, acc);
  for (int m = 0; m < MR; m++)
    for (int j = 0; j < NR; j++) scores[m * BLOCK + j] = sum(acc[0][m][j]) * a.scale;
}

template <int NR>
INLINE void score_columns(const Paged& a, const float* q, long heads, const float* const* keys, float* scores) {
  long h = 0;
  for (; h + 3 <= heads && heads - h != 4; h += 3) score_tile<3, NR>(a, q + h * a.width, keys, scores + h * BLOCK);
  for (; h + 2 <= heads; h += 2) score_tile<2, NR>(a, q + h * a.width, keys, scores + h * BLOCK);
  if (h < heads) score_tile<1, NR>(a, q + h * a.width, keys, scores + h * BLOCK);
}

// acc[h][d..] = acc * fade[h] + sum over t of weights[h][t] * values[t][d..], HR heads by DR vectors.
template <int HR, int DR>
INLINE void mix_tile(const float* weights, const float* fade, const float* const* values, long tokens,
                     long d, long count, float* acc, long pad) {
  v8 sums[HR][DR];
  for (int h = 0; h < HR; h++)
    for (int i = 0; i < DR; i++) sums[h][i] = load(acc + h * pad + d + 8 * i) * splat(fade[h]);
  for (long t = 0; t < tokens; t++) {
    v8 v[DR];
    for (int i = 0; i < DR; i++) v[i] = DR == 1 ? load_part(values[t] + d, count) : load(values[t] + d + 8 * i);
    for (int h = 0; h < HR; h++)
      for (int i = 0; i < DR; i++) sums[h][i] = fma(splat(weights[h * BLOCK + t]), v[i], sums[h][i]);
  }
  for (int h = 0; h < HR; h++)
    for (int i = 0; i < DR; i++) store(acc + h * pad + d + 8 * i, sums[h][i]);
}

template <int HR>
INLINE void mix(const float* weights, const float* fade, const float* const* values, long tokens,
                long depth, float* acc, long pad) {
  long d = 0;
  for (; d + 16 <= depth; d += 16) mix_tile<HR, 2>(weights, fade, values, tokens, d, 0, acc, pad);
  for (; d < depth; d += 8)
    mix_tile<HR, 1>(weights, fade, values, tokens, d, depth - d < 8 ? depth - d : 8, acc, pad);
}

// Tokens t0..t1 of row r for `heads` query heads at q, which share key/value head `kv`.
void attend_span(const Paged& a, long r, long kv, const float* q, long heads, long t0, long t1,
                 Partial out, long pad, float* scratch) {
  long bytes = a.kind == FP32 ? 4 : 2;
  auto place = [&](long t) { return (a.slot(r, t) * a.kv_heads + kv) * a.width * bytes; };
  for (long h = 0; h < heads; h++) {
    out.top[h] = -INFINITY;
    out.total[h] = 0;
    memset(out.acc + h * pad, 0, pad * 4);
  }
  for (long t = t0; t < t1; t += BLOCK) {
    long tokens = t1 - t < BLOCK ? t1 - t : BLOCK;
    const float *keys[BLOCK], *values[BLOCK];
    float scores[HEADS * BLOCK], fade[HEADS];
    for (long i = 0; i < tokens; i++) {
      if (t + i + BLOCK < t1) {   // a head's rows lie apart, where hardware does not prefetch
        long next = place(t + i + BLOCK);
        for (long o = 0; o < a.width * bytes; o += 64) {
          __builtin_prefetch(a.keys + next + o);
          if (a.values != a.keys) __builtin_prefetch(a.values + next + o);
        }
      }
      long here = place(t + i);
      auto read = [&](const uint8_t* cache, float* buffer) -> const float* {
        if (a.kind == FP32) return (const float*)(cache + here);
        if (a.kind == FP16) decode<Fp16>(cache + here, 0, a.width, buffer);
        else decode<Bf16>(cache + here, 0, a.width, buffer);
        return buffer;
      };
      keys[i] = read(a.keys, scratch + i * a.width);
      values[i] = a.values == a.keys ? keys[i] : read(a.values, scratch + (BLOCK + i) * a.width);
    }
    long j = 0;
    for (; j + 4 <= tokens; j += 4) score_columns<4>(a, q, heads, keys + j, scores + j);
    for (; j < tokens; j++) score_columns<1>(a, q, heads, keys + j, scores + j);
    for (long h = 0; h < heads; h++) {
      float *s = scores + h * BLOCK, top = out.top[h];
      for (long i = 0; i < tokens; i++) top = s[i] > top ? s[i] : top;
      for (long i = tokens; i < BLOCK; i++) s[i] = -INFINITY;
      fade[h] = exp8(splat(out.top[h] - top))[0];
      out.top[h] = top;
      v8 part = splat(0);
      for (long i = 0; i < BLOCK; i += 8) {
        v8 e = exp8(load(s + i) - splat(top));
        store(s + i, e);
        part = part + e;
      }
      out.total[h] = out.total[h] * fade[h] + sum(part);
    }
    long h = 0;
    for (; h + 4 <= heads; h += 4)
      mix<4>(scores + h * BLOCK, fade + h, values, tokens, a.depth, out.acc + h * pad, pad);
    for (; h < heads; h++)
      mix<1>(scores + h * BLOCK, fade + h, values, tokens, a.depth, out.acc + h * pad, pad);
  }
}

// The outputs of `heads` heads from the results of all spans, which lie `step` floats apart.
void merge(float* partials, long step, long spans, long heads, long pad, long depth, float* out) {
  for (long h = 0; h < heads; h++) {
    float top = -INFINITY, total = 0;
    for (long s = 0; s < spans; s++) {
      float other = Partial(partials + s * step).top[h];
      top = other > top ? other : top;
    }
    Partial first(partials);
    for (long s = 0; s < spans; s++) {
      Partial p(partials + s * step);
      v8 weight = exp8(splat(p.top[h] - top));
      total += p.total[h] * weight[0];
      for (long d = 0; d < pad; d += 8) {
        float* sums = first.acc + h * pad + d;
        v8 scaled = load(p.acc + h * pad + d) * weight;
        store(sums, s ? load(sums) + scaled : scaled);
      }
    }
    for (long d = 0; d < depth; d += 8)
      store_part(out + h * depth + d, load(first.acc + h * pad + d) / splat(spans ? total : 1),
                 depth - d < 8 ? depth - d : 8);
  }
}

thread_local Scratch starts, read;

struct Attend : Kernel<Attend> {
  Paged a;
  long group, blocks, pad, size, per_span;   // size: floats of a Partial

  Attend(const Paged& paged, const char* called) : a(paged) {
    name = called;
    shared = true;
    group = a.heads / a.kv_heads;
    blocks = (group + HEADS - 1) / HEADS;
    pad = (a.depth + 7) / 8 * 8;
    size = HEADS * (2 + pad);
    per_span = a.kv_heads * blocks;
    long slots = INT32_MAX, row = slots * a.kv_heads * a.width;   // how long the cache is, nobody said
    reads(a.q, a.rows * a.heads * a.width * 4);
    reads(a.keys, row);
    if (a.values != a.keys) reads(a.values, row);
    reads(a.table, a.rows * a.table_width * 4);
    reads(a.context, a.rows * 4);
    writes(a.out, a.rows * a.heads * a.depth * 4);
  }
  long spans() const {
    long all = 0;
    for (long r = 0; r < a.rows; r++) all += a.spans(r);
    return all;
  }
  long scratch() const override { return (spans() * per_span + 1) * size * 4; }
  void end(float* partials, long r, long spans, long i) const {
    long kv = i / blocks, h = i % blocks * HEADS, heads = group - h < HEADS ? group - h : HEADS;
    float* out = a.out + (r * a.heads + kv * group + h) * a.depth;
    if (spans) merge(partials, size, spans, heads, pad, a.depth, out);
    else memset(out, 0, heads * a.depth * sizeof(float));
  }
  // The partials of a (row, kv head, head block) lie together, span after span. A row of one span ends at once.
  void run(Team& team) const override {
    long* start = (long*)starts.of((a.rows + 1) * sizeof(long));   // first span of each row
    float *partials = (float*)team.scratch, *cached = (float*)read.of((2 * BLOCK * a.width + 8) * sizeof(float));
    bool later = false;
    start[0] = 0;
    for (long r = 0; r < a.rows; r++) {
      start[r + 1] = start[r] + a.spans(r);
      later |= a.spans(r) != 1;
    }
    team.share(start[a.rows] * per_span, [&](long task) {
      long low = 0, high = a.rows;
      while (high - low > 1) {
        long middle = (low + high) / 2;
        (start[middle] * per_span <= task ? low : high) = middle;
      }
      long r = low, spans = a.spans(r), local = task - start[r] * per_span;
      long s = local % spans, block = local / spans % blocks, kv = local / spans / blocks;
      long h = block * HEADS, heads = group - h < HEADS ? group - h : HEADS;
      long t1 = (s + 1) * SPAN < a.context[r] ? (s + 1) * SPAN : a.context[r];
      attend_span(a, r, kv, a.q + (r * a.heads + kv * group + h) * a.width, heads, s * SPAN, t1,
                  Partial(partials + task * size), pad, cached);
      if (spans == 1) end(partials + task * size, r, 1, local);
    });
    if (!later) return;
    team.barrier();
    team.share(a.rows * per_span, [&](long i) {
      long r = i / per_span, spans = a.spans(r);
      if (spans != 1) end(partials + (start[r] * per_span + i % per_span * spans) * size, r, spans, i % per_span);
    });
  }
};

}  // namespace

extern "C" {

void native_attend_rows(int kind, const float* q, const uint8_t* keys, const uint8_t* values,
                        const int32_t* table, const int32_t* context, float* out, long rows, long heads,
                        long kv_heads, long d, long table_width, long block_size, float scale) {
  submit(Attend({q, keys, values, table, context, out, rows, heads, kv_heads, d, d, table_width, block_size, kind,
                 scale}, "attend"));
}

void native_mla_rows(int kind, const float* q, const uint8_t* cache, const int32_t* table,
                     const int32_t* context, float* out, long rows, long heads, long width, long latent,
                     long table_width, long block_size, float scale) {
  submit(Attend({q, cache, cache, table, context, out, rows, heads, 1, width, latent, table_width, block_size, kind,
                 scale}, "attend latents"));
}

}  // extern "C"
