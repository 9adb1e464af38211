// Products of rows of x, rounded to INT8, with codes of 4 bits that are one apart and whose outputs lie side by side:
// four bytes of a lane are an output's codes of four inputs, and meet four bytes of x at once. A scale of x is that of
// 32 inputs, so that without VNNI two words hold what a lane sums: 16 products each, of no more than 15 * 127.
#include "across.h"
#include "decoders_across.h"

#if HAS_AVX2

namespace {

struct Nibbles : CountedPairs {   // a step is four inputs
  using CountedPairs::CountedPairs;
  template <class F> INLINE void each(const Nibbles& w, const uint8_t* at, F f) { fours(w, at, f); }
};

thread_local Scratch scratch;

}  // namespace

void product_coarse(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y) {
  auto with_codes = [](const Matrix& a, auto f) { f(Nibbles(a.tiling.codes[0].levels)); };
  product_of<Coarse>(a, n, count, x, rows, y, scratch, with_codes);
}

#else

void product_coarse(const Matrix&, long, long, const uint16_t* const*, long, float* const*) { abort(); }

#endif
