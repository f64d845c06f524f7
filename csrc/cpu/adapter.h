// Rows of an adapter, rounded to what s and t lie in (Ranks), as the tiles want them.
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
template <class T, class D, class A>
void load_adapter_rows(D* lanes, int64_t ld, const A* adapter, int64_t ld_adapter, int64_t rows, int64_t R,
                       Scale scale) {
  const V one_scale = set1(scale.data && scale.stride == 0 ? *scale.data : 1.0f);
  const bool scales = scale.data && scale.stride;
  for (int64_t j = 0; j < rows; ++j) {
    const A* in = adapter + j * ld_adapter;
    D* out = lanes + j * ld;
    int64_t r = 0;
    for (; r + W <= R; r += W) store(out + r, rounded<T>(mul(load(in + r), scales ? load(scale.data + r) : one_scale)));
    if (r < R) {
      const int n = (int)(R - r);
      const V v = mul(load_partial(in + r, n), scales ? load_partial(scale.data + r, n) : one_scale);
      store_partial(out + r, rounded<T>(v), n);
    }
    for (r = R; r < ld; ++r) out[r] = D{};
  }
}

// the same from row `row` of an adapter whose element type is known at run time only; no scale data: not scaled
template <class T, class D>
void load_adapter(D* lanes, int64_t ld, const Matrix& m, int64_t row, int64_t rows, int64_t R, Scale scale) {
  const void* p = element(m.data, m.dtype, row * m.ld);
  if (m.dtype == FLOAT32) return load_adapter_rows<T>(lanes, ld, (const float*)p, m.ld, rows, R, scale);
  if (m.dtype == BFLOAT16) return load_adapter_rows<T>(lanes, ld, (const bf16*)p, m.ld, rows, R, scale);
  load_adapter_rows<T>(lanes, ld, (const f16*)p, m.ld, rows, R, scale);
}

// out[r / TERMS, j] = the elements along r of adapter[row + j, r0 + r] · scale, j < rows <= KC, r < R, each a whole
// vector of them; rows of out are ld apart
template <class T, class E>
void load_adapter_along(E* out, int64_t ld, const Matrix& m, int64_t row, int64_t rows, int64_t r0, int64_t R,
                        Scale scale) {
  constexpr int64_t SOME = W * TERMS<E>;
  alignas(64) Number<E> part[KC * SOME];
  for (int64_t r = 0; r < R; r += SOME) {
    const int64_t n = smaller(SOME, R - r);
    load_adapter<T>(part, SOME, columns(m, r0 + r), row, rows, n, columns(scale, r));
    transpose(out + r / TERMS<E> * ld, ld, part, SOME, rows, n);
  }
}

// out[j / TERMS, r] = the elements across rows j of adapter[row + j, r] · scale, j < rows, r < R; out's rows are ld >=
// R apart, zeros from R on
template <class T, class E>
void load_adapter_across(E* out, int64_t ld, const Matrix& m, int64_t row, int64_t rows, int64_t R, Scale scale) {
  if constexpr (TERMS<E> == 1) {
    load_adapter<T>(out, ld, m, row, rows, R, scale);
  } else {
    alignas(64) Number<E> two[2 * KC];
    for (int64_t j = 0; j < rows; j += 2, out += ld)
      for (int64_t r = 0; r < ld; r += KC) {
        const int64_t some = smaller(KC, ld - r), n = r < R ? smaller(KC, R - r) : 0;
        const int count = j + 1 < rows ? 2 : 1;
        memset(two, 0, sizeof two);
        if (n) load_adapter<T>(two, KC, columns(m, r), row + j, count, n, columns(scale, r));
        zip_rows(out + r, ld, two, KC, 2, some);
      }
  }
}

}  // namespace
