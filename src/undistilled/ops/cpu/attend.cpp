// Decode attention over a paged cache: grouped-query and absorbed multi-head latent.
//
// A row's context is cut into spans by its length and the heads alone, whatever the thread count; a task is one span for
// up to HEADS query heads that share a key/value head. Each task leaves its maximum, its sum and its weighted values;
// these are merged in the order of the spans.
#include "attend.h"
#include "pool.h"

namespace {

constexpr long RESULTS = 1024;   // of a row's heads in all of its spans; a longer row has longer spans

INLINE long up(long n, long to) { return (n + to - 1) / to * to; }

// Calls f with the loader of a cache's kind.
template <class F> INLINE void with_cached(int kind, F f) {
  kind == FP32 ? f(Fp32()) : kind == FP16 ? f(Fp16()) : f(Bf16Pair());
}

// One head's output from the results of all spans, the h-th of `heads` in each; these lie `step` floats apart. The
// first one is written over.
template <class L>
void merge(float* partials, long step, long spans, long heads, long h, long pad, long depth, float* out) {
  float top = -INFINITY, total = 0;
  for (long s = 0; s < spans; s++) {
    float other = Partial(partials + s * step, heads).top[h];
    top = other > top ? other : top;
  }
  float* sums = Partial(partials, heads).acc + h * pad;
  for (long s = 0; s < spans; s++) {
    Partial p(partials + s * step, heads);
    v8 weight = exp8(splat(p.top[h] - top));
    total += p.total[h] * weight[0];
    for (long d = 0; d < pad; d += 8) {
      v8 scaled = load(p.acc + h * pad + d) * weight;
      store(sums + d, s ? load(sums + d) + scaled : scaled);
    }
  }
  lift<L>(sums, depth, 1 / total, out);
}

thread_local Scratch starts, laid;

struct Attend : Kernel<Attend> {
  Paged a;
  long blocks, most, per_span;   // of heads that share a key/value head; heads of a block; tasks of a span
  long wide, pad, size;          // floats of a query and of its sums as they are laid; of a Partial

  Attend(const Paged& paged, const char* called) : a(paged) {
    name = called;
    shared = true;
    long group = a.heads / a.kv_heads, step = a.kind == BF16 ? Bf16Pair::STEP : 8;
    blocks = (group + HEADS - 1) / HEADS;
    most = (group + blocks - 1) / blocks;
    per_span = a.kv_heads * blocks;
    wide = up(a.width, step);
    pad = up(a.depth, step);
    size = up(most * (2 + pad), LINE / 4);
    long slots = INT32_MAX, row = slots * a.kv_heads * a.width;   // how long the cache is, nobody said
    reads(a.q, a.rows * a.heads * a.width * 4);
    reads(a.keys, row);
    if (a.values != a.keys) reads(a.values, row);
    reads(a.table, a.rows * a.table_width * 4);
    reads(a.context, a.rows * 4);
    writes(a.out, a.rows * a.heads * a.depth * 4);
  }

  long each(long r) const {   // tokens of a span
    long whole = (a.context[r] + BLOCK - 1) / BLOCK, limit = a.heads < RESULTS ? RESULTS / a.heads : 1;
    long n = whole < limit ? whole : limit;
    return up((a.context[r] + n - 1) / n, KEYS);
  }
  long spans(long r) const { return a.context[r] > 0 ? (a.context[r] + each(r) - 1) / each(r) : 0; }
  long spans() const {
    long all = 0;
    for (long r = 0; r < a.rows; r++) all += spans(r);
    return all;
  }
  long scratch() const override { return (spans() * per_span + 1) * size * 4; }

  // Heads of the i-th task of a span: its key/value head, the first of its query heads, how many.
  struct Some { long kv, first, count; };
  Some some(long i) const {
    long group = a.heads / a.kv_heads, kv = i / blocks, h = i % blocks * most;
    return {kv, kv * group + h, group - h < most ? group - h : most};
  }
  void attend(long r, long s, long i, float* partial) const {
    Some heads = some(i);
    long from = s * each(r), to = from + each(r);
    Span span = {r, heads.kv, from, to < a.context[r] ? to : a.context[r]};
    float* q = (float*)laid.of(HEADS * wide * sizeof(float));
    with_cached(a.kind, [&](auto loader) {
      typedef decltype(loader) L;
      for (long h = 0; h < heads.count; h++)
        lay<L>(a.q + (r * a.heads + heads.first + h) * a.width, a.width, a.scale, q + h * wide);
      attend_span<L>(a, span, q, wide, heads.count, i % blocks == 0, Partial(partial, most), pad);
    });
  }
  // The h-th head of the i-th task of row r, whose first results lie at `partials`.
  void end(float* partials, long r, long i, long h) const {
    float* out = a.out + (r * a.heads + some(i).first + h) * a.depth;
    if (!spans(r)) memset(out, 0, a.depth * sizeof(float));
    else with_cached(a.kind, [&](auto loader) {
      merge<decltype(loader)>(partials, per_span * size, spans(r), most, h, pad, a.depth, out);
    });
  }

  // A row's tasks go by span, so that what a thread reads lies together. A row of one span ends at once.
  void run(Team& team) const override {
    long* start = (long*)starts.of((a.rows + 1) * sizeof(long));   // first span of each row
    float* partials = (float*)team.scratch;
    bool later = false;
    start[0] = 0;
    for (long r = 0; r < a.rows; r++) {
      start[r + 1] = start[r] + spans(r);
      later |= spans(r) != 1;
    }
    team.share(start[a.rows] * per_span, [&](long task) {
      long low = 0, high = a.rows, span = task / per_span, i = task % per_span;
      while (high - low > 1) {
        long middle = (low + high) / 2;
        (start[middle] <= span ? low : high) = middle;
      }
      attend(low, span - start[low], i, partials + task * size);
      if (spans(low) == 1)
        for (long h = 0; h < some(i).count; h++) end(partials + task * size, low, i, h);
    });
    if (!later) return;
    team.barrier();
    team.share(a.rows * per_span, [&](long item) {
      long r = item / per_span, i = item % per_span;
      if (spans(r) != 1)
        for (long h = 0; h < some(i).count; h++) end(partials + (start[r] * per_span + i) * size, r, i, h);
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
