// A mixture-of-experts feed-forward for any number of rows, each with its own top-k experts.
//
// The (row, choice) pairs are sorted by expert, so that an expert's weights are read once for
// all rows that chose it. A row's result is summed in the order of the experts' numbers.
#include <initializer_list>
#include "pool.h"
#include "product.h"
#include "tiles.h"

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
  long spots;        // of rows in tiles
  Tiled tiles;

  // `rows` kept rows of x, `used` places for them, and `some` spots in tiles where the matrix takes them.
  Input(const Matrix& a, long rows, long used, long some, Cutter& cut)
      : a(a), row(a.rounds ? (arranged(a) + 31) / 32 * 32 : 0), group(has_offsets(a) && !a.rounds ? a.groups() : 0),
        buffer(cut.take<uint16_t>(rows * row)), all_sums(cut.take<float>(rows * group)),
        x(cut.take<const float*>(used)), sums(cut.take<const float*>(used)), rounded(cut.take<const uint16_t*>(used)),
        spots(in_tiles(a, some) ? some : 0), tiles(a, spots, cut.take<uint8_t>(Tiled::bytes(a, spots))) {}
  // Keeps the row at `from`: as row r, or in a spot in tiles if it has one there.
  void take(long r, long spot, const float* from) {
    if (spot >= 0 && spots) return arrange_tiled(a, from, tiles, spot);
    if (a.rounds) arrange(a, from, buffer + r * row);
    if (group) group_sums(a, from, all_sums + r * group);
  }
  // Place i is kept row r, which lies at `from`.
  void put(long i, long r, const float* from) {
    x[i] = from;
    rounded[i] = buffer + r * row;
    sums[i] = all_sums + r * group;
  }
};

// y[r] = the rows i.. of `in`, in tiles from `spot` on, times the outputs n..n+width.
void wide_tile(const Matrix& a, long n, long width, const Input& in, long i, long spot, long rows, float* const* y) {
  const float **x = in.x + i, **sums = in.sums + i;
  if (spot >= 0 && in.spots) return product_tiled(a, n, width, in.tiles, spot, rows, y);
  if (a.rounds) return product(a, n, width, in.rounded + i, rows, y, a.n);
  tile(a, n, width, x, sums, rows, y);
}

// The (row, choice) pairs by expert, in groups of no more than `most` and these in waves of no more. Up to
// `id` all are indexed by the sorted place of a pair, or by group.
struct Sorted {
  long *pair, *spot;            // spot: in tiles, or -1 where few chose the expert
  long *start, *id;             // of a group: its first place; the expert
  long *wave;                   // of each wave: its first group
  long *place;                  // of a row's choices, by expert; -1 where one is none of the experts
  long *count, *groups, *waves;

  Sorted(long pairs, long experts, Cutter& cut)
      : pair(cut.take<long>(pairs)), spot(cut.take<long>(pairs)), start(cut.take<long>(pairs + 1)),
        id(cut.take<long>(pairs)), wave(cut.take<long>(pairs + 2)), place(cut.take<long>(pairs)),
        count(cut.take<long>(experts)), groups(cut.take<long>(1)), waves(cut.take<long>(1)) {}

  void sort(const int32_t* chosen, long rows, long top, long experts, long most) {
    auto known = [&](long p) { return chosen[p] >= 0 && chosen[p] < experts; };
    memset(count, 0, experts * sizeof(long));
    for (long p = 0; p < rows * top; p++)
      if (known(p)) count[chosen[p]]++;
    group(experts, most);
    for (long r = 0; r < rows; r++)
      for (long t = 0, p = r * top; t < top; t++, p++) {
        long at = known(p) ? count[chosen[p]]++ : -1, i = p;
        if (at >= 0) pair[at] = p;
        for (; i > r * top && place[i - 1] > at; i--) place[i] = place[i - 1];
        place[i] = at;
      }
  }
  // Groups, waves and spots by counts, which become each expert's first place.
  void group(long experts, long most) {
    long used = 0, next = 0, from = 0;   // `from`: where the wave begins
    *groups = 0, *waves = 1, wave[0] = 0;
    for (long e = 0; e < experts; e++) {
      long left = count[e];
      count[e] = used;
      for (long rows; left; left -= rows) {
        rows = left < most ? left : most;
        if (used + rows - from > most) wave[(*waves)++] = *groups, from = used, next = 0;
        for (long i = 0; i < rows; i++) spot[used + i] = rows < MANY ? -1 : next + i;
        if (rows >= MANY) next += (rows + BAND - 1) / BAND * BAND;
        id[*groups] = e, start[(*groups)++] = used;
        used += rows;
      }
    }
    start[*groups] = used, wave[*waves] = *groups;
  }
};

// out [rows, d] = sum over t of weights[r, t] * down(silu(gate x) * (up x)), expert chosen[r, t];
// x is [rows, d]. A choice outside 0..experts adds nothing. `most`: pairs whose results are in memory together.
struct Experts : Kernel<Experts> {
  const float* x;
  const Matrix &gate, &up, &down;
  const int32_t* chosen;
  const float* shares;
  float* out;
  long experts, rows, top, most, inner, d;

  Experts(const float* x, const Matrix& gate, const Matrix& up, const Matrix& down, const int32_t* chosen,
          const float* shares, float* out, long experts, long rows, long top, long most)
      : x(x), gate(gate), up(up), down(down), chosen(chosen), shares(shares), out(out), experts(experts), rows(rows),
        top(top), most(most < rows * top ? most : rows * top), inner(gate.n), d(down.n) {
    name = "experts";
    shared = true;
    weights = rows == 1 ? top * (bytes_of(gate) + bytes_of(up) + bytes_of(down)) : 0;   // else by what rows choose
    reads(x, rows * gate.k * 4);
    reads(chosen, rows * top * 4);
    reads(shares, rows * top * 4);
    writes(out, rows * d * 4);
  }
  bool apart() const { return rows >= 8; }   // fewer rows cost less to keep than it does to wait for each other
  // Whether gate and up take rows of x the same.
  bool alike() const {
    return gate.rounds && gate.kind != CODED && gate.kind == up.kind && gate.rounds == up.rounds &&
           gate.group == up.group && gate.tiling.codes[0].bits == up.tiling.codes[0].bits;
  }
  long spots() const { return apart() ? 2 * most : 0; }   // a band is half full at least
  // Whether x is kept for each place of a wave: for tiles, or since all rows could be too many; else each row once.
  bool by_place() const { return apart() && (rows * top > most || in_tiles(gate, spots()) || in_tiles(up, spots())); }
  // Outputs of a task: in tiles two strips read x once.
  long widest() const {
    for (const Matrix* a : {&gate, &up, &down})
      if (!in_tiles(*a, spots())) return TILE;
    return 2 * TILE;
  }
  struct Work {
    Sorted pairs;
    float *h, *u, *o, **hy, **uy, **oy;
    Input to_gate, to_up, to_down;
    Work(const Experts& e, Cutter cut, long* bytes)
        : pairs(e.rows * e.top, e.experts, cut), h(cut.take<float>(e.most * e.inner)),
          u(cut.take<float>(e.most * e.inner)), o(cut.take<float>(e.most * e.d)), hy(cut.take<float*>(e.rows * e.top)),
          uy(cut.take<float*>(e.rows * e.top)), oy(cut.take<float*>(e.rows * e.top)),
          to_gate(e.gate, e.by_place() ? e.most : e.rows, e.rows * e.top, e.spots(), cut),
          to_up(e.up, e.alike() ? 0 : e.by_place() ? e.most : e.rows, e.rows * e.top, e.alike() ? 0 : e.spots(), cut),
          to_down(e.down, e.most, e.rows * e.top, e.spots(), cut) {
      if (bytes) *bytes = cut.at - (char*)nullptr;
    }
  };
  long scratch() const override {
    long bytes;
    Work(*this, Cutter(), &bytes);
    return bytes;
  }
  // As gate and up take it.
  void take(Work& w, long kept, long spot, const float* from) const {
    w.to_gate.take(kept, spot, from);
    if (!alike()) w.to_up.take(kept, spot, from);
  }
  void prepare(Work& w) const {
    Sorted& s = w.pairs;
    s.sort(chosen, rows, top, experts, most);
    for (long r = 0; r < (apart() ? 0 : rows); r++) take(w, r, -1, x + r * gate.k);
    for (long k = 0; k < *s.waves; k++)
      for (long i = s.start[s.wave[k]], at = 0; i < s.start[s.wave[k + 1]]; i++, at++) {
        long r = s.pair[i] / top;
        for (Input* in : {&w.to_gate, &w.to_up}) in->put(i, by_place() ? at : r, x + r * gate.k);
        w.to_down.put(i, at, w.hy[i] = w.h + at * inner);
        w.uy[i] = w.u + at * inner;
        w.oy[i] = w.o + at * d;
      }
  }
  // One panel of an expert's gate and up for its rows, and their product.
  void middle(const Work& w, long g, long n, long width) const {
    const Sorted& s = w.pairs;
    const Input& to_up = alike() ? w.to_gate : w.to_up;
    long i = s.start[g], m = s.start[g + 1] - i;
    wide_tile(expert(gate, s.id[g]), n, width, w.to_gate, i, s.spot[i], m, w.hy + i);
    wide_tile(expert(up, s.id[g]), n, width, to_up, i, s.spot[i], m, w.uy + i);
    for (long r = i; r < i + m; r++)
      for (long j = 0; j < width; j += 8) {
        long part = width - j < 8 ? width - j : 8;
        float* to = w.hy[r] + n + j;
        store_part(to, silu8(load_part(to, part)) * load_part(w.uy[r] + n + j, part), part);
      }
  }
  // Adds the k-th wave's places to a row of the result, in the order of their experts.
  void sum(const Work& w, long r, long n, long k) const {
    const Sorted& s = w.pairs;
    const long from = s.start[s.wave[k]], to = s.start[s.wave[k + 1]];
    for (long end = n + TILE < d ? n + TILE : d, j = n; j < end; j += 8) {
      long part = end - j < 8 ? end - j : 8;
      v8 total = k ? load_part(out + r * d + j, part) : splat(0);
      for (long t = r * top; t < (r + 1) * top; t++)
        if (s.place[t] >= from && s.place[t] < to)
          total = fma(splat(shares[s.pair[s.place[t]]]), load_part(w.oy[s.place[t]] + j, part), total);
      store_part(out + r * d + j, total, part);
    }
  }
  // body(group, first output, outputs) for all parts of `outputs` of a wave's groups.
  template <class F> void each_part(Team& team, const Sorted& s, long k, long outputs, F body) const {
    const long wide = widest(), parts = (outputs + wide - 1) / wide, first = s.wave[k];
    team.share((s.wave[k + 1] - first) * parts, [&](long at) {
      long n = at % parts * wide;
      body(first + at / parts, n, outputs - n < wide ? outputs - n : wide);
    });
    team.barrier();
  }
  void pass(Team& team, Work& w, long k) const {
    const Sorted& s = w.pairs;
    const long from = s.start[s.wave[k]], to = s.start[s.wave[k + 1]], tiles = (d + TILE - 1) / TILE;
    if (by_place()) {
      team.share(to - from, [&](long i) { take(w, i, s.spot[from + i], x + s.pair[from + i] / top * gate.k); });
      team.barrier();
    } else if (apart()) {   // and all is one wave
      team.share(rows, [&](long r) { take(w, r, -1, x + r * gate.k); });
      team.barrier();
    }
    each_part(team, s, k, inner, [&](long g, long n, long width) { middle(w, g, n, width); });
    team.share(to - from, [&](long i) { w.to_down.take(i, s.spot[from + i], w.hy[from + i]); });
    team.barrier();
    each_part(team, s, k, d, [&](long g, long n, long width) {
      long i = s.start[g];
      wide_tile(expert(down, s.id[g]), n, width, w.to_down, i, s.spot[i], s.start[g + 1] - i, w.oy + i);
    });
    team.share(rows * tiles, [&](long at) { sum(w, at / tiles, at % tiles * TILE, k); });
  }
  void run(Team& team) const override {
    Work w(*this, Cutter{(char*)team.scratch}, nullptr);
    if (team.rank == 0) prepare(w);
    team.barrier();
    for (long k = 0, waves = *w.pairs.waves; k < waves; k++) {
      if (k) team.barrier();
      pass(team, w, k);
    }
  }
};

}  // namespace

extern "C" void native_experts_rows(const float* x, const Matrix* gate, const Matrix* up, const Matrix* down,
                                    const int32_t* chosen, const float* shares, float* out, long experts, long rows,
                                    long top, long most) {
  submit(Experts(x, *gate, *up, *down, chosen, shares, out, experts, rows, top, most));
}
