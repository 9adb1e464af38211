// Products by tiles, of rows of x rounded to integers with INT8 and CODED matrices, and of x as it is with FP8.
#pragma once
#include "matrix.h"

// As arranged(), arrange() and product() of product.h, for matrices whose rounds is TO_INT8, TO_INT16 or TO_ORDER: a
// row of x is its codes, filled up with zeros, then the scales of its groups, then sums over the matrix' groups; or, for
// FP8, floats.
long arranged_integer(const Matrix& a);
void arrange_integer(const Matrix& a, const float* x, uint16_t* out);
void product_integer(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y,
                     long last);

// The same for many rows, where crosses() says so: arranged_integer() uint16 each, of which arrange_crossed() makes
// others, as it does for ACROSS and any number of rows.
bool crosses(const Matrix& a);
void arrange_crossed(const Matrix& a, const float* x, uint16_t* out);
void product_crossed(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y);
