// Which experts a row goes to, as ops/router.py says: float32, the lowest number first where choices are equal.
#include <cmath>
#include "matrix.h"
#include "pool.h"

namespace {

struct Route : Kernel<Route> {
  const float *logits, *bias;      // [rows, experts], [experts] or null
  int32_t* ids;                    // [rows, top]
  float* shares;                   // [rows, top]
  long rows, experts, top, groups, top_groups;
  bool sigmoid, normalise;
  float scale;

  Route(const float* logits, const float* bias, int32_t* ids, float* shares, long rows, long experts, long top,
        long groups, long top_groups, bool sigmoid, bool normalise, float scale)
      : logits(logits), bias(bias), ids(ids), shares(shares), rows(rows), experts(experts), top(top), groups(groups),
        top_groups(top_groups), sigmoid(sigmoid), normalise(normalise), scale(scale) {
    name = "router";
    small = rows * experts <= 4096;
    reads(logits, rows * experts * 4);
    writes(ids, rows * top * 4);
    writes(shares, rows * top * 4);
  }
  static v8 none() { return splat(-INFINITY); }
  void score(const float* in, float* out) const {
    float total = 0, most = -INFINITY;
    if (!sigmoid)
      for (long e = 0; e < experts; e++) most = in[e] > most ? in[e] : most;
    for (long e = 0; e < experts; e += 8) {
      long count = experts - e < 8 ? experts - e : 8;
      v8 x = load_part(in + e, count);
      store_part(out + e, sigmoid ? splat(1) / (splat(1) + exp8(splat(0) - x)) : exp8(x - splat(most)), count);
    }
    if (sigmoid) return;
    for (long e = 0; e < experts; e++) total += out[e];
    for (long e = 0; e < experts; e++) out[e] /= total;
  }
  // Leaves the best groups' choices; others become what is never chosen, or zero as V2 has it.
  void keep_groups(float* choice, float* rating) const {
    long each = experts / groups;
    for (long g = 0; g < groups; g++) {
      float first = -INFINITY, second = -INFINITY;
      for (long e = g * each; e < (g + 1) * each; e++) {
        float c = choice[e];
        if (c > first) second = first, first = c;
        else if (c > second) second = c;
      }
      rating[g] = sigmoid ? first + second : first;   // V3: the sum of a group's best two; V2: its best
    }
    for (long kept = 0; kept < top_groups; kept++) rating[best(rating, groups)] = INFINITY;
    for (long g = 0; g < groups; g++)
      if (rating[g] != INFINITY)
        for (long e = g * each; e < (g + 1) * each; e++) choice[e] = sigmoid ? -INFINITY : 0;
  }
  static long best(const float* from, long count) {
    long found = -1;
    for (long i = 0; i < count; i++)
      if (from[i] != INFINITY && (found < 0 || from[i] > from[found])) found = i;
    return found < 0 ? 0 : found;
  }
  void row(long r, float* scores, float* choice, float* rating) const {
    score(logits + r * experts, scores);
    for (long e = 0; e < experts; e++) choice[e] = bias ? scores[e] + bias[e] : scores[e];
    if (groups > 1) keep_groups(choice, rating);
    float total = 0;
    for (long t = 0; t < top; t++) {
      long e = best(choice, experts);
      choice[e] = INFINITY;                           // taken
      ids[r * top + t] = e;
      total += shares[r * top + t] = scores[e];
    }
    for (long t = 0; t < top; t++) {
      float& share = shares[r * top + t];
      if (normalise) share /= total + 1e-20f;
      share *= scale;
    }
  }
  void run(Team& team) const override {
    static thread_local Scratch memory;
    Cutter count, cut;
    auto lay = [&](Cutter& c) {
      struct { float *scores, *choice, *rating; } laid = {c.take<float>(experts), c.take<float>(experts),
                                                          c.take<float>(groups)};
      return laid;
    };
    lay(count);
    cut.at = (char*)memory.of(count.at - (char*)nullptr);
    auto laid = lay(cut);
    team.share(rows, [&](long r) { row(r, laid.scores, laid.choice, laid.rating); });
  }
};

}  // namespace

extern "C" void native_route(const float* logits, const float* bias, int32_t* ids, float* shares, long rows,
                             long experts, long top, long groups, long top_groups, int sigmoid, int normalise,
                             float scale) {
  submit(Route(logits, bias, ids, shares, rows, experts, top, groups, top_groups, sigmoid, normalise, scale));
}
