// A mixture-of-experts feed-forward for a few rows, each with its own top-k experts.
//
// The (row, choice) pairs are sorted by expert, so that an expert's weights are read once for
// all rows that chose it. A row's result is summed in the order of its choices.
#include <cstdlib>
#include "product.h"

namespace {

// Expert e of weights stacked [experts, n, k].
Matrix expert(Matrix a, long e) {
  a.values += e * a.n * a.row_bytes();
  if (a.kind == FP8_BLOCK) a.scales = (const float*)a.scales + e * ((a.n + 127) / 128) * a.groups();
  if (a.kind == INT8) a.scales = (const float*)a.scales + e * a.n * a.groups();
  if (a.kind == INT4) a.scales = (const uint16_t*)a.scales + e * a.n * a.groups();
  if (a.mins) a.mins = (const uint16_t*)a.mins + e * a.n * a.groups();
  return a;
}

// Rows of x as floats, where a matrix rounds them as BF16, and their sums over its groups.
struct Input {
  const float** x;
  const uint16_t** rounded;
  const float** sums;

  void take(const Matrix& a, long i) {
    if (!has_offsets(a)) return;
    a.rounds ? group_sums<Bf16>(a, rounded[i], (float*)sums[i]) : group_sums<Fp32>(a, x[i], (float*)sums[i]);
  }
};

// y[r] = the rows i.. of `in` times the outputs n..n+width, at most TILE; few rows take narrow tiles.
void wide_tile(const Matrix& a, long n, long width, const Input& in, long i, long rows, float* const* y) {
  const float **x = in.x + i, **sums = in.sums + i;
  if (a.rounds) return product(a, n, width, in.rounded + i, sums, rows, y);
  long step = rows <= 2 ? 4 : TILE;
  for (long j = 0; j < width; j += step) tile(a, n + j, width - j < step ? width - j : step, x, sums, rows, y);
}

template <class T> T* make(long count) { return (T*)malloc((count + 1) * sizeof(T)); }

}  // namespace

extern "C" {

// out [rows, d] = sum over t of weights[r, t] * down(silu(gate x) * (up x)), expert chosen[r, t];
// x is [rows, d]. A choice outside 0..experts adds nothing.
void native_experts_rows(const float* x, const Matrix* gate, const Matrix* up, const Matrix* down,
                         const int32_t* chosen, const float* weights, float* out, long experts, long rows,
                         long top) {
  long pairs = rows * top, inner = gate->n, d = down->n;
  long *pair = make<long>(pairs), *place = make<long>(pairs), *start = make<long>(pairs), *id = make<long>(pairs);
  long groups = 0, used = 0, *count = (long*)calloc(experts + 1, sizeof(long));
  for (long p = 0; p < pairs; p++)
    if (chosen[p] >= 0 && chosen[p] < experts) count[chosen[p]]++;
  for (long e = 0; e < experts; e++) {
    if (!count[e]) continue;
    start[groups] = used;
    id[groups++] = e;
    used += count[e];
    count[e] = used - count[e];
  }
  start[groups] = used;
  for (long p = 0; p < pairs; p++) {
    bool here = chosen[p] >= 0 && chosen[p] < experts;
    place[p] = here ? count[chosen[p]]++ : -1;
    if (here) pair[place[p]] = p;
  }

  // Everything below is indexed by the sorted place of a pair.
  long gs = gate->groups(), us = up->groups(), ds = down->groups();
  float *h = make<float>(used * inner), *u = make<float>(used * inner), *o = make<float>(used * d);
  float* sums = make<float>(used * (gs + us + ds));
  bool rounds = gate->rounds || up->rounds;
  uint16_t *xr = make<uint16_t>(rounds ? rows * gate->k : 0), *hr = make<uint16_t>(down->rounds ? used * inner : 0);
  const float **xs = make<const float*>(used), **hs = make<const float*>(used);
  const uint16_t **xrs = make<const uint16_t*>(used), **hrs = make<const uint16_t*>(used);
  Input to_gate = {xs, xrs, make<const float*>(used)}, to_up = {xs, xrs, make<const float*>(used)},
        to_down = {hs, hrs, make<const float*>(used)};
  float **hy = make<float*>(used), **uy = make<float*>(used), **oy = make<float*>(used);
  for (long r = 0; rounds && r < rows; r++) round_row(x + r * gate->k, gate->k, xr + r * gate->k);
  for (long i = 0; i < used; i++) {
    float* s = sums + i * (gs + us + ds);
    xs[i] = x + pair[i] / top * gate->k;
    xrs[i] = xr + pair[i] / top * gate->k;
    hs[i] = hy[i] = h + i * inner;
    hrs[i] = hr + i * inner;
    uy[i] = u + i * inner;
    oy[i] = o + i * d;
    to_gate.sums[i] = s;
    to_up.sums[i] = s + gs;
    to_down.sums[i] = s + gs + us;
    to_gate.take(*gate, i);
    to_up.take(*up, i);
  }

  long inner_tiles = (inner + TILE - 1) / TILE, tiles = (d + TILE - 1) / TILE;
#pragma omp parallel if (used * inner * d > SERIAL)
  {
#pragma omp for schedule(dynamic, 4)
    for (long task = 0; task < groups * inner_tiles; task++) {
      long g = task / inner_tiles, n = task % inner_tiles * TILE, i = start[g], m = start[g + 1] - i;
      long width = inner - n < TILE ? inner - n : TILE;
      wide_tile(expert(*gate, id[g]), n, width, to_gate, i, m, hy + i);
      wide_tile(expert(*up, id[g]), n, width, to_up, i, m, uy + i);
      for (long r = i; r < i + m; r++)
        for (long j = 0; j < width; j += 8) {
          long part = width - j < 8 ? width - j : 8;
          float* to = hy[r] + n + j;
          store_part(to, silu8(load_part(to, part)) * load_part(uy[r] + n + j, part), part);
        }
    }
    if (down->rounds || has_offsets(*down)) {
#pragma omp for schedule(static)
      for (long i = 0; i < used; i++) {
        if (down->rounds) round_row(hs[i], inner, hr + i * inner);
        to_down.take(*down, i);
      }
    }
#pragma omp for schedule(dynamic, 4)
    for (long task = 0; task < groups * tiles; task++) {
      long g = task / tiles, n = task % tiles * TILE, i = start[g];
      wide_tile(expert(*down, id[g]), n, d - n < TILE ? d - n : TILE, to_down, i, start[g + 1] - i, oy + i);
    }
#pragma omp for schedule(static)
    for (long task = 0; task < rows * tiles; task++) {
      long r = task / tiles, n = task % tiles * TILE, end = n + TILE < d ? n + TILE : d;
      for (long j = n; j < end; j += 8) {
        long part = end - j < 8 ? end - j : 8;
        v8 s = splat(0);
        for (long t = r * top; t < (r + 1) * top; t++)
          if (place[t] >= 0) s = fma(splat(weights[t]), load_part(oy[place[t]] + j, part), s);
        store_part(out + r * d + j, s, part);
      }
    }
  }
  void* all[] = {pair, place, start, id, count, h, u, o, sums, xr, hr, xs, hs, xrs, hrs, to_gate.sums, to_up.sums,
                 to_down.sums, hy, uy, oy};
  for (void* p : all) free(p);
}

}  // extern "C"
