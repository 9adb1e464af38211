// A mixture-of-experts feed-forward for a few rows, each with its own top-k experts.
//
// The (row, choice) pairs are sorted by expert, so that an expert's weights are read once for
// all rows that chose it. A row's result is summed in the order of its choices.
#include <initializer_list>
#include "pool.h"
#include "product.h"

namespace {

// Expert e of weights stacked [experts, n, k].
Matrix expert(Matrix a, long e) {
  for (Part* part : {&a.values, &a.scales, &a.mins, &a.tiling.order, &a.tiling.multipliers}) part->skip(e);
  for (int w = 0; w < a.tiling.widths; w++) a.tiling.codes[w].values.skip(e);
  return a;
}

// Rows of x for a matrix: as floats with their sums over its groups, or rounded as it takes them.
struct Input {
  const Matrix& a;
  long row, group;   // of a rounded row, of a row's sums
  uint16_t* buffer;
  float* all_sums;
  const float **x, **sums;
  const uint16_t** rounded;

  // `rows` distinct rows of x, `used` places for them.
  Input(const Matrix& a, long rows, long used, Cutter& cut)
      : a(a), row(a.rounds ? (arranged(a) + 31) / 32 * 32 : 0), group(has_offsets(a) && !a.rounds ? a.groups() : 0),
        buffer(cut.take<uint16_t>(rows * row)), all_sums(cut.take<float>(rows * group)),
        x(cut.take<const float*>(used)), sums(cut.take<const float*>(used)), rounded(cut.take<const uint16_t*>(used)) {}
  void take(long r, const float* from) {
    if (a.rounds) arrange(a, from, buffer + r * row);
    if (group) group_sums(a, from, all_sums + r * group);
  }
  // Place i is distinct row r, which lies at `from`.
  void put(long i, long r, const float* from) {
    x[i] = from;
    rounded[i] = buffer + r * row;
    sums[i] = all_sums + r * group;
  }
};

// y[r] = the rows i.. of `in` times the outputs n..n+width, at most TILE.
void wide_tile(const Matrix& a, long n, long width, const Input& in, long i, long rows, float* const* y) {
  const float **x = in.x + i, **sums = in.sums + i;
  if (a.rounds) return product(a, n, width, in.rounded + i, rows, y, a.n);
  tile(a, n, width, x, sums, rows, y);
}

// The (row, choice) pairs by expert; everything but `place` is indexed by the sorted place of a pair.
struct Sorted {
  long *pair, *place, *start, *id, *count;   // place: of a pair, -1 where its choice is none of the experts
  long *groups, *used;
  float *h, *u, *o, **hy, **uy, **oy;

  Sorted(long pairs, long experts, long inner, long d, Cutter& cut)
      : pair(cut.take<long>(pairs)), place(cut.take<long>(pairs)), start(cut.take<long>(pairs + 1)),
        id(cut.take<long>(pairs)), count(cut.take<long>(experts)), groups(cut.take<long>(1)), used(cut.take<long>(1)),
        h(cut.take<float>(pairs * inner)), u(cut.take<float>(pairs * inner)), o(cut.take<float>(pairs * d)),
        hy(cut.take<float*>(pairs)), uy(cut.take<float*>(pairs)), oy(cut.take<float*>(pairs)) {}
  void sort(const int32_t* chosen, long pairs, long experts) {
    *groups = *used = 0;
    memset(count, 0, experts * sizeof(long));
    for (long p = 0; p < pairs; p++)
      if (chosen[p] >= 0 && chosen[p] < experts) count[chosen[p]]++;
    for (long e = 0; e < experts; e++) {
      if (!count[e]) continue;
      start[*groups] = *used;
      id[(*groups)++] = e;
      *used += count[e];
      count[e] = *used - count[e];
    }
    start[*groups] = *used;
    for (long p = 0; p < pairs; p++) {
      bool here = chosen[p] >= 0 && chosen[p] < experts;
      place[p] = here ? count[chosen[p]]++ : -1;
      if (here) pair[place[p]] = p;
    }
  }
};

// out [rows, d] = sum over t of weights[r, t] * down(silu(gate x) * (up x)), expert chosen[r, t];
// x is [rows, d]. A choice outside 0..experts adds nothing.
struct Experts : Kernel<Experts> {
  const float* x;
  const Matrix &gate, &up, &down;
  const int32_t* chosen;
  const float* shares;
  float* out;
  long experts, rows, top, inner, d;

  Experts(const float* x, const Matrix& gate, const Matrix& up, const Matrix& down, const int32_t* chosen,
          const float* shares, float* out, long experts, long rows, long top)
      : x(x), gate(gate), up(up), down(down), chosen(chosen), shares(shares), out(out), experts(experts), rows(rows),
        top(top), inner(gate.n), d(down.n) {
    name = "experts";
    shared = true;
    weights = rows == 1 ? top * (bytes_of(gate) + bytes_of(up) + bytes_of(down)) : 0;   // else by what rows choose
    reads(x, rows * gate.k * 4);
    reads(chosen, rows * top * 4);
    reads(shares, rows * top * 4);
    writes(out, rows * d * 4);
  }
  struct Work {
    Sorted pairs;
    Input to_gate, to_up, to_down;
    Work(const Experts& e, Cutter cut, long* bytes)
        : pairs(e.rows * e.top, e.experts, e.inner, e.d, cut), to_gate(e.gate, e.rows, e.rows * e.top, cut),
          to_up(e.up, e.rows, e.rows * e.top, cut), to_down(e.down, e.rows * e.top, e.rows * e.top, cut) {
      if (bytes) *bytes = cut.at - (char*)nullptr;
    }
  };
  long scratch() const override {
    long bytes;
    Work(*this, Cutter(), &bytes);
    return bytes;
  }
  void prepare(Work& w) const {
    Sorted& s = w.pairs;
    s.sort(chosen, rows * top, experts);
    for (long r = 0; r < rows; r++)
      for (Input* in : {&w.to_gate, &w.to_up}) in->take(r, x + r * gate.k);
    for (long i = 0; i < *s.used; i++) {
      long r = s.pair[i] / top;
      for (Input* in : {&w.to_gate, &w.to_up}) in->put(i, r, x + r * gate.k);
      w.to_down.put(i, i, s.hy[i] = s.h + i * inner);
      s.uy[i] = s.u + i * inner;
      s.oy[i] = s.o + i * d;
    }
  }
  // One panel of an expert's gate and up for its rows, and their product.
  void middle(const Work& w, long g, long n) const {
    const Sorted& s = w.pairs;
    long i = s.start[g], m = s.start[g + 1] - i, width = inner - n < TILE ? inner - n : TILE;
    wide_tile(expert(gate, s.id[g]), n, width, w.to_gate, i, m, s.hy + i);
    wide_tile(expert(up, s.id[g]), n, width, w.to_up, i, m, s.uy + i);
    for (long r = i; r < i + m; r++)
      for (long j = 0; j < width; j += 8) {
        long part = width - j < 8 ? width - j : 8;
        float* to = s.hy[r] + n + j;
        store_part(to, silu8(load_part(to, part)) * load_part(s.uy[r] + n + j, part), part);
      }
  }
  void sum(const Sorted& s, long r, long n) const {
    for (long end = n + TILE < d ? n + TILE : d, j = n; j < end; j += 8) {
      long part = end - j < 8 ? end - j : 8;
      v8 total = splat(0);
      for (long t = r * top; t < (r + 1) * top; t++)
        if (s.place[t] >= 0) total = fma(splat(shares[t]), load_part(s.oy[s.place[t]] + j, part), total);
      store_part(out + r * d + j, total, part);
    }
  }
  void run(Team& team) const override {
    Work w(*this, Cutter{(char*)team.scratch}, nullptr);
    const Sorted& s = w.pairs;
    if (team.rank == 0) prepare(w);
    team.barrier();
    long inner_tiles = (inner + TILE - 1) / TILE, tiles = (d + TILE - 1) / TILE;
    team.share(*s.groups * inner_tiles, [&](long at) { middle(w, at / inner_tiles, at % inner_tiles * TILE); });
    team.barrier();
    team.share(*s.used, [&](long i) { w.to_down.take(i, s.hy[i]); });
    team.barrier();
    team.share(*s.groups * tiles, [&](long at) {
      long g = at / tiles, n = at % tiles * TILE, i = s.start[g];
      wide_tile(expert(down, s.id[g]), n, d - n < TILE ? d - n : TILE, w.to_down, i, s.start[g + 1] - i, s.oy + i);
    });
    team.barrier();
    team.share(rows * tiles, [&](long at) { sum(s, at / tiles, at % tiles * TILE); });
  }
};

}  // namespace

extern "C" void native_experts_rows(const float* x, const Matrix* gate, const Matrix* up, const Matrix* down,
                                    const int32_t* chosen, const float* shares, float* out, long experts, long rows,
                                    long top) {
  submit(Experts(x, *gate, *up, *down, chosen, shares, out, experts, rows, top));
}
