// Powers and logarithms to base 2 of fp32 vectors.
#pragma once
#include "vec.h"

namespace {

// 2^x, x < 128, off by 1.8 units in the last place at most, but 0 from LEAST_POWER on; NaN of NaN.
// x = n + f, |f| <= 1/2: the polynomial is 2^f's minimax one of degree 6 (1.9e-9).
FP_INLINE V exp2(V x) {
  x = max(set1(LEAST_POWER), x);  // a NaN is kept: it is the second operand
  const V n = nearest(x), f = sub(x, n);
  V y = set1(1.5345808e-4f);
  y = fma(y, f, set1(1.3399931e-3f));
  y = fma(y, f, set1(9.6184891e-3f));
  y = fma(y, f, set1(5.5503286e-2f));
  y = fma(y, f, set1(2.4022646e-1f));
  y = fma(y, f, set1(6.9314718e-1f));
  y = fma(y, f, set1(1.0f));
  return times_power(y, n);
}

// log2 x of a normal x > 0, off by 1.4e-7 at most within (-1, 1), by 1.4 · 2^-23 of it elsewhere; NaN of NaN and Inf.
// x = 2^n m, z = (m − √2) / (m + √2): log2 x = n + 1/2 + 2/ln 2 · atanh z, |z| < 0.172
FP_INLINE V log2(V x) {
  const V m = significand(x), root = set1(1.41421356f);
  const V z = div(sub(m, root), add(m, root)), zz = mul(z, z);
  V y = set1(2.8853901f / 9.0f);
  y = fma(y, zz, set1(2.8853901f / 7.0f));
  y = fma(y, zz, set1(2.8853901f / 5.0f));
  y = fma(y, zz, set1(2.8853901f / 3.0f));
  y = fma(y, zz, set1(2.8853901f));
  return fma(x, zero(), add(add(exponent(x), set1(0.5f)), mul(y, z)));
}

}  // namespace
