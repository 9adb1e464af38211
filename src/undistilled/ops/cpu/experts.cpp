// A mixture-of-experts feed-forward for a few rows, each with its own top-k experts.
//
// The (row, choice) pairs are sorted by expert, so that an expert's weights are read once for
// all rows that chose it. A row's result is summed in the order of its choices.
#include <cstdlib>
#include <initializer_list>
#include "product.h"

namespace {

// Expert e of weights stacked [experts, n, k].
Matrix expert(Matrix a, long e) {
  for (Part* part : {&a.values, &a.scales, &a.mins, &a.tiling.order, &a.tiling.multipliers}) part->skip(e);
  for (int w = 0; w < a.tiling.widths; w++) a.tiling.codes[w].values.skip(e);
  return a;
}

template <class T> T* make(long count) { return (T*)malloc((count + 1) * sizeof(T)); }

// Rows of x for a matrix: as floats with their sums over its groups, or rounded as it takes them.
struct Input {
  const Matrix& a;
  long row, group;   // of a rounded row, of a row's sums
  uint16_t* buffer;
  float* all_sums;
  const float **x, **sums;
  const uint16_t** rounded;

  // `rows` distinct rows of x, `used` places for them.
  Input(const Matrix& a, long rows, long used)
      : a(a), row(a.rounds ? (arranged(a) + 31) / 32 * 32 : 0), group(has_offsets(a) ? a.groups() : 0),
        buffer((uint16_t*)aligned_alloc(64, (rows * row + 32) * 2)), all_sums(make<float>(rows * group)),
        x(make<const float*>(used)), sums(make<const float*>(used)), rounded(make<const uint16_t*>(used)) {}
  ~Input() {
    for (void* p : {(void*)buffer, (void*)all_sums, (void*)x, (void*)sums, (void*)rounded}) free(p);
  }
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

// y[r] = the rows i.. of `in` times the outputs n..n+width, at most TILE; few rows take narrow tiles.
void wide_tile(const Matrix& a, long n, long width, const Input& in, long i, long rows, float* const* y) {
  const float **x = in.x + i, **sums = in.sums + i;
  if (a.rounds) return product(a, n, width, in.rounded + i, rows, y);
  long step = rows <= 2 ? 4 : TILE;
  for (long j = 0; j < width; j += step) tile(a, n + j, width - j < step ? width - j : step, x, sums, rows, y);
}

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
  float *h = make<float>(used * inner), *u = make<float>(used * inner), *o = make<float>(used * d);
  Input to_gate(*gate, rows, used), to_up(*up, rows, used), to_down(*down, used, used);
  float **hy = make<float*>(used), **uy = make<float*>(used), **oy = make<float*>(used);
  for (long r = 0; r < rows; r++)
    for (Input* in : {&to_gate, &to_up}) in->take(r, x + r * gate->k);
  for (long i = 0; i < used; i++) {
    long r = pair[i] / top;
    for (Input* in : {&to_gate, &to_up}) in->put(i, r, x + r * gate->k);
    to_down.put(i, i, hy[i] = h + i * inner);
    uy[i] = u + i * inner;
    oy[i] = o + i * d;
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
#pragma omp for schedule(static)
    for (long i = 0; i < used; i++) to_down.take(i, hy[i]);
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
  void* all[] = {pair, place, start, id, count, h, u, o, hy, uy, oy};
  for (void* p : all) free(p);
}

}  // extern "C"
