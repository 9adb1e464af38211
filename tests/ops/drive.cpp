// Calls the kernels on drawn data and prints a hash of every result: builds that have a fused product and sum print the
// same, up to 31 rows (AVX2 sums more of INT16 in another order, crossed.cpp). What the numbers should be, the tests in
// Python say of one build.
#include <cmath>
#include <cstdio>
#include <deque>
#include <string>
#include <utility>
#include <vector>
#include "coded.h"

extern "C" {
void native_threads(int size);
void native_linear(const Matrix*, const float* x, float* y, long m);
void native_linear_rounded(const Matrix*, const float* x, float* y, long m);
void native_dequantise(const Matrix*, float* out, long n0, long n1);
void native_experts_rows(const float* x, const Matrix* gate, const Matrix* up, const Matrix* down, const int32_t*,
                         const float* shares, float* out, long experts, long rows, long top, long most);
void native_attend_rows(int, const float*, const uint8_t*, const uint8_t*, const int32_t*, const int32_t*, float*, long,
                        long, long, long, long, long, float);
void native_mla_rows(int, const float*, const uint8_t*, const int32_t*, const int32_t*, float*, long, long, long, long,
                     long, long, float);
void native_norm_rows(float*, const float*, const float*, float*, long, long, long, long, float);
void native_silu_mul(const float*, const float*, float*, long);
void native_route(const float*, const float*, int32_t*, float*, long, long, long, long, long, int, int, float);
}

template <class T> using Many = std::vector<T>;
static uint64_t state = 88172645463325252ull;

static uint32_t next() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state >> 16;
}
static float uniform() { return (next() & 0xffffff) / 16777216.f; }
static Many<float> floats_drawn(long n, float least = -1) {
  Many<float> v(n);
  for (float& f : v) f = least + (1 - least) * uniform();
  return v;
}
static Many<uint8_t> bytes_drawn(long n, int least = 0, int count = 256) {
  Many<uint8_t> v(n);
  for (uint8_t& b : v) b = least + next() % count;
  return v;
}
// 16 bits of floats: half-precision ones between 2^-6 and 2, or bfloat16.
static Many<uint16_t> short_floats(long n, bool half, bool negative = false) {
  Many<uint16_t> v(n);
  for (uint16_t& h : v) {
    h = half ? 0x2400 + next() % 0x1c00 : 0x3c00 + next() % 0x380;
    if (negative) h |= next() & 0x8000;
  }
  return v;
}

static void say(const std::string& what, const void* at, long bytes) {
  uint64_t hash = 1469598103934665603ull;
  for (long i = 0; i < bytes; i++) hash = (hash ^ ((const uint8_t*)at)[i]) * 1099511628211ull;
  printf("%s %016llx\n", what.c_str(), (unsigned long long)hash);
}
static void say(const std::string& what, const Many<float>& v) { say(what, v.data(), v.size() * 4); }

struct Weight {
  Matrix a = {};
  std::string name;
  std::deque<Many<uint8_t>> held;

  template <class T> Part part(const Many<T>& v, long experts) {
    held.emplace_back((const uint8_t*)v.data(), (const uint8_t*)(v.data() + v.size()));
    return {held.back().data(), (long)held.back().size() / experts};
  }
};

static const float* levels_of(int bits, bool steps) {
  static float made[2][7][64];
  float* f = made[steps][bits];
  for (int i = 0; i < 1 << bits; i++) f[i] = steps ? i : (i * i % 255 - 127 + (i & 1)) * .5f;
  return f;
}

static void plain(Weight& w, int kind, int rounds, long n, long k, long group, long experts = 1) {
  Matrix& a = w.a;
  a.kind = kind, a.rounds = rounds, a.n = n, a.k = k;
  a.group = kind == FP8_BLOCK ? 128 : group ? group : k;
  long scales = experts * (kind == FP8_BLOCK ? (n + 127) / 128 : n) * a.groups(), bytes = experts * n * a.row_bytes();
  if (kind == FP32) a.values = w.part(floats_drawn(experts * n * k), experts);
  else if (kind == FP16 || kind == BF16) a.values = w.part(short_floats(experts * n * k, kind == FP16, true), experts);
  else a.values = w.part(bytes_drawn(bytes, 0, kind == FP8_BLOCK ? 127 : 256), experts);
  if (kind == FP8_BLOCK || kind == INT8) a.scales = w.part(floats_drawn(scales, .1f), experts);
  if (kind == INT4) a.scales = w.part(short_floats(scales, true), experts);
  w.name = "kind " + std::to_string(kind) + " group " + std::to_string(a.group);
}

static void grouped(Weight& w, int bits, bool steps, int format, int rounds, long n, long k, long group,
                    long experts = 1) {
  Matrix& a = w.a;
  Tiling& t = a.tiling;
  a.kind = CODED, a.rounds = rounds, a.n = n, a.k = k, a.group = group;
  long blocks = (k + 31) / 32, scales = experts * n * a.groups(), block = blocks * 4 * bits;
  t.height = t.sections = t.widths = 1, t.cols = group < 32 ? 32 : group, t.tiles = (k + t.cols - 1) / t.cols;
  t.factors = a.groups(), t.padded = blocks * 32, t.format = format;
  if (format == SCALES_F16) a.scales = w.part(short_floats(scales, true), experts);
  else if (format == SCALES_E4M3) a.scales = w.part(bytes_drawn(scales, 0, 100), experts);
  else a.scales = w.part(bytes_drawn(scales, 120, 12), experts);
  if (steps) a.mins = w.part(short_floats(scales, true, true), experts);
  if (format == SCALES_E4M3) t.multipliers = w.part(short_floats(experts * n, false), experts);
  t.codes[0] = {bits, t.tiles, block, w.part(bytes_drawn(experts * n * block), experts), levels_of(bits, steps)};
  w.name = "coded " + std::to_string(bits) + " steps " + std::to_string(steps) + " group " + std::to_string(group);
}

static void tiled(Weight& w, int rounds, long n, long k, long rows, long cols, Many<std::pair<int, int>> counts) {
  Matrix& a = w.a;
  Tiling& t = a.tiling;
  a.kind = CODED, a.rounds = rounds, a.n = n, a.k = k, a.group = cols;
  for (auto& c : counts) t.tiles += c.second;
  t.height = rows, t.cols = cols, t.sections = (k + cols * t.tiles - 1) / (cols * t.tiles), t.widths = counts.size();
  long blocks = (n + rows - 1) / rows;
  t.factors = t.sections * t.tiles, t.padded = t.factors * cols, t.format = SCALES_E4M3;
  a.scales = w.part(bytes_drawn(blocks * t.factors * rows, 0, 100), 1);
  t.multipliers = w.part(short_floats(blocks * rows, false), 1);
  Many<int16_t> order(blocks * t.factors);
  for (size_t i = 0; i < order.size(); i++) order[i] = t.tiles - 1 - i % t.tiles;
  t.order = w.part(order, 1);
  for (size_t i = 0; i < counts.size(); i++) {
    auto [bits, count] = counts[i];
    long block = t.sections * count * rows * cols / 8 * bits;
    t.codes[i] = {bits, count, block, w.part(bytes_drawn(blocks * block), 1), levels_of(bits, false)};
  }
  w.name = "tiles " + std::to_string(rows) + "x" + std::to_string(cols);
}

static void products(const Weight& w) {
  const Matrix& a = w.a;
  std::string name = w.name + " rounds " + std::to_string(a.rounds) + " k " + std::to_string(a.k);
  Many<float> dense(a.n * a.k), x = floats_drawn(31 * a.k);
  native_dequantise(&a, dense.data(), 0, a.n);
  say(name + " dense", dense);
  auto multiply = [&](long m, const std::string& what) {
    Many<float> in(x.begin(), x.begin() + m * a.k), y(m * a.n);   // nothing behind the last row
    (a.rounds ? native_linear_rounded : native_linear)(&a, in.data(), y.data(), m);
    for (float& f : y) f = f == f ? f : 7;                         // NaN has other bits elsewhere
    say(name + " rows " + what, y);
  };
  for (long m : {1, 2, 3, 4, 31}) multiply(m, std::to_string(m));
  for (long i = 0; i < a.k; i++) x[i] = NAN, x[a.k + i] = i % 2 ? INFINITY : -INFINITY, x[2 * a.k + i] *= 1e-38f;
  multiply(4, "of no numbers");
}

static void weights(long n, long k) {
  auto of = [](auto make) {
    Weight w;
    make(w);
    products(w);
  };
  for (int kind : {FP32, FP16, BF16, FP8_BLOCK, INT4}) of([&](Weight& w) { plain(w, kind, 0, n, k, 32); });
  of([&](Weight& w) { plain(w, FP8_BLOCK, TO_ORDER, n, k, 0); });
  for (int rounds : {TO_NOTHING, TO_INT8, TO_INT16}) {
    for (long group : {0, 32, 64, 96, 128}) of([&](Weight& w) { plain(w, INT8, rounds, n, k, group); });
    for (int bits = 2; bits <= 6; bits++)
      for (long group : {32, 64, 96, 128, 256}) {
        of([&](Weight& w) { grouped(w, bits, true, SCALES_F16, rounds, n, k, group); });
        of([&](Weight& w) { grouped(w, bits, false, SCALES_E4M3, rounds, n, k, group); });
      }
    of([&](Weight& w) { grouped(w, 4, false, SCALES_E8M0, rounds, n, k, 32); });
    of([&](Weight& w) { grouped(w, 4, false, SCALES_E4M3, rounds, n, k, 16); });
    of([&](Weight& w) { tiled(w, rounds, n, k, 16, 32, {{2, 3}, {3, 4}, {4, 2}}); });
    of([&](Weight& w) { tiled(w, rounds, n, k, 16, 128, {{3, 2}, {5, 1}, {6, 1}}); });
    of([&](Weight& w) { tiled(w, rounds, n, k, 5, 32, {{2, 1}, {6, 2}}); });
  }
}

static void experts(long rows) {
  constexpr long COUNT = 6, INNER = 72, D = 100, TOP = 2;
  for (int rounds : {TO_NOTHING, TO_INT8, TO_INT16}) {
    Weight gate, up, down;
    for (Weight* w : {&gate, &up}) grouped(*w, 4, true, SCALES_F16, rounds, INNER, D, 32, COUNT);
    plain(down, INT8, rounds, D, INNER, 32, COUNT);
    Many<float> x = floats_drawn(rows * D), shares = floats_drawn(rows * TOP), out(rows * D);
    Many<int32_t> chosen(rows * TOP);
    for (int32_t& e : chosen) e = next() % (COUNT + 1);
    long most = rows / 2 * TOP + TOP;   // of more rows than one two waves
    native_experts_rows(x.data(), &gate.a, &up.a, &down.a, chosen.data(), shares.data(), out.data(), COUNT, rows, TOP,
                        most);
    say("experts rounds " + std::to_string(rounds) + " rows " + std::to_string(rows), out);
  }
}

static void attention(int kind, long heads, long kv_heads, long d, long latent) {
  const Many<int32_t> context = {0, 1, 5, 64, 129, 700};
  long rows = context.size(), block = 16, width = 44, size = (rows * width + 1) * block * kv_heads * d;
  Weight w;
  auto cache = [&] {
    return kind == FP32 ? w.part(floats_drawn(size), 1) : w.part(short_floats(size, kind == FP16, true), 1);
  };
  Part keys = cache(), values = cache();
  Many<int32_t> table(rows * width);
  for (size_t i = 0; i < table.size(); i++) table[i] = table.size() - i;
  Many<float> q = floats_drawn(rows * heads * d), out(rows * heads * (latent ? latent : d));
  if (latent) native_mla_rows(kind, q.data(), keys.at, table.data(), context.data(), out.data(), rows, heads, d, latent,
                              width, block, .2f);
  else native_attend_rows(kind, q.data(), keys.at, values.at, table.data(), context.data(), out.data(), rows, heads,
                          kv_heads, d, width, block, .2f);
  say("attention " + std::to_string(kind) + " heads " + std::to_string(heads) + " d " + std::to_string(d), out);
}

int main() {
  native_threads(2);
  for (auto [n, k] : {std::pair<long, long>{3, 17}, {5, 129}, {33, 300}, {17, 600}}) weights(n, k);
  for (long rows : {1, 5, 40}) experts(rows);
  for (int kind : {FP32, FP16, BF16}) {
    for (long d : {7, 24, 64}) for (long heads : {1, 3, 22}) attention(kind, 2 * heads, 2, d, 0);
    for (long heads : {1, 3, 16}) attention(kind, heads, 1, 72, 60);
  }
  for (long d : {7, 100, 1024}) {
    Many<float> x = floats_drawn(3 * d, -9), r = floats_drawn(3 * d), w = floats_drawn(d), y(3 * d), s(3 * 2);
    Many<int32_t> ids(3 * 2);
    native_norm_rows(x.data(), r.data(), w.data(), y.data(), 3, d, d, d, 1e-6f);
    say("norm", y);
    native_silu_mul(x.data(), r.data(), y.data(), 3 * d);
    say("silu", y);
    native_route(x.data(), w.data(), ids.data(), s.data(), 3, d, 2, 1, 1, d % 2, 1, 2.5f);
    say("router", s);
  }
}
