// Rows of an adapter as fp32, rounded to what s and t lie in (Ranks).
#pragma once
#include "tile.h"

namespace {

using namespace fastpeft;

// v rounded to T
template <class T>
FP_INLINE V rounded(V v) {
  if (IS_FLOAT<T>) return v;
  T narrow[W];
  store(narrow, v);
  return load(narrow);
}

// lanes[j, r] = adapter[j, r] · scale[r] rounded to T, j < rows; lanes' rows are ld >= R apart, zeros from R on
template <class T, class A>
void load_adapter_rows(float* lanes, int64_t ld, const A* adapter, int64_t ld_adapter, int64_t rows, int64_t R,
                       Scale scale) {
  const V one_scale = set1(scale.data && scale.stride == 0 ? *scale.data : 1.0f);
  const bool scales = scale.data && scale.stride;
  for (int64_t j = 0; j < rows; ++j) {
    const A* in = adapter + j * ld_adapter;
    float* out = lanes + j * ld;
    int64_t r = 0;
    for (; r + W <= R; r += W) store(out + r, rounded<T>(mul(load(in + r), scales ? load(scale.data + r) : one_scale)));
    if (r < R) {
      const int n = (int)(R - r);
      const V v = mul(load_partial(in + r, n), scales ? load_partial(scale.data + r, n) : one_scale);
      store_partial(out + r, rounded<T>(v), n);
    }
    for (r = R; r < ld; ++r) out[r] = 0.0f;
  }
}

// the same from row `row` of an adapter whose element type is known at run time only; no scale data: not scaled
template <class T>
void load_adapter(float* lanes, int64_t ld, const Matrix& m, int64_t row, int64_t rows, int64_t R, Scale scale) {
  const void* p = element(m.data, m.dtype, row * m.ld);
  if (m.dtype == FLOAT32) return load_adapter_rows<T>(lanes, ld, (const float*)p, m.ld, rows, R, scale);
  if (m.dtype == BFLOAT16) return load_adapter_rows<T>(lanes, ld, (const bf16*)p, m.ld, rows, R, scale);
  load_adapter_rows<T>(lanes, ld, (const f16*)p, m.ld, rows, R, scale);
}

}  // namespace
