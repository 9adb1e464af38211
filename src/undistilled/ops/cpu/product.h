// Products with x rounded to BF16, where the build has the instructions; see product.cpp.
#pragma once
#include "matrix.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define HAS_PRODUCTS 1
#else
#define HAS_PRODUCTS 0
#endif

constexpr long PART = 192;   // rows of x that a core multiplies with a panel of weights at a time

// out[0..k) = x rounded to nearest, ties to even. Aborts, as product() does, where HAS_PRODUCTS is not 1.
void round_row(const float* x, long k, uint16_t* out);

// y[m][n..n+count) = x[m] . rows n.. of a, for BF16, fp8, int8 and int4 and any number of rows; a row's bits
// do not depend on the others. sums: group_sums() of each row of x where a has mins.
void product(const Matrix& a, long n, long count, const uint16_t* const* x, const float* const* sums, long rows,
             float* const* y);
