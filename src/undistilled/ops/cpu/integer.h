// Products of rows of x, rounded to INT8 or INT16 by groups of 32, with INT8 and CODED matrices; see integer.cpp.
#pragma once
#include "matrix.h"

// As arranged(), arrange() and product() of product.h, for matrices whose rounds is TO_INT8 or TO_INT16: a row of x is
// its codes, filled up with zeros, then the scales of its groups, then sums for the minimums of the matrix.
long arranged_integer(const Matrix& a);
void arrange_integer(const Matrix& a, const float* x, uint16_t* out);
void product_integer(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y,
                     long last);
