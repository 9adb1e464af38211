// Products with x rounded to what the matrix' `rounds` says: to INT8, INT16 or not at all (integer.h) or, where the build
// has the instructions, to BF16 (product.cpp).
#pragma once
#include "matrix.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define HAS_PRODUCTS 1
#else
#define HAS_PRODUCTS 0
#endif

constexpr long PART = 192;   // rows of x that a core multiplies with a panel of weights at a time

// A row of x as product() takes it, rounded to nearest, ties to even: how many uint16, and these. As product() they
// abort for BF16 where HAS_PRODUCTS is not 1.
long arranged(const Matrix& a);
void arrange(const Matrix& a, const float* x, uint16_t* out);

// y[m][n..n+count) = x[m] . rows n.. of a, for bf16, fp8, int8 and coded (to integers: int8 and coded) and any number of
// rows; a row's bits do not depend on the others. No row from `last` on is asked for ahead: the caller will not need it.
void product(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y, long last);
