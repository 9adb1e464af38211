// Products of rows of x, rounded to integers, with matrices whose outputs lie side by side (ACROSS, scheme/across.py).
#pragma once
#include "matrix.h"

// As product() of product.h, for ACROSS and INT16, with x as arrange_crossed() leaves it; n and count are multiples of 16.
void product_across(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y);
// The same for INT8, with codes of 4 bits that are one apart.
void product_coarse(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y);

// The same for FP8, whose x are floats.
void arrange_fp8(const Matrix& a, const float* x, uint16_t* out);
void product_fp8(const Matrix& a, long n, long count, const uint16_t* const* x, long rows, float* const* y);

// out[0..k) = row `row` of a, as float32.
void decode_across(const Matrix& a, long row, float* out);
