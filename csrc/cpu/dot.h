// Products of a few rows of x with rows of W, which is read once, at the speed of memory: vectors lie along k, and each
// result is the sum of one vector's lanes.
#pragma once
#include "tile.h"

namespace {

constexpr int DOT_N = 4;                     // rows of W at a time,
constexpr int DOT_M = MAX_VECS > 3 ? 4 : 2;  // times rows of x: as many sums as registers allow

// out[m, n] = Σ_k x[m, k] · w[n, k] + Σ_r s[m, r] · b[n, r] for NN rows of w and b, NM rows of x and s.
// x and s are padded with zeros to whole vectors (ldx, lds), b is [NN, R] without padding.
template <int NN, int NM, class T>
FP_INLINE void dot_block(float* out, int64_t ld_out, const T* w, int64_t ldw, const float* x, int64_t ldx, int64_t K,
                         const float* b, int64_t R, const float* s, int64_t lds) {
  V acc[NM][NN];
#pragma GCC unroll 4
  for (int m = 0; m < NM; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NN; ++n) acc[m][n] = zero();
  constexpr int LINE = 64 / (int)sizeof(T) / W * W;  // elements in a cache line
  int64_t k = 0;
  for (; k + LINE <= K; k += LINE) {
#pragma GCC unroll 4
    for (int n = 0; n < NN; ++n) {
      // the next rows, to L2: more lines under way than the fill buffers of L1 hold (17 instead of 14 GB/s by one core)
      __builtin_prefetch(w + (n + NN) * ldw + k, 0, 2);
#pragma GCC unroll 8
      for (int v = 0; v < LINE; v += W) {
        const V wn = load(w + n * ldw + k + v);
#pragma GCC unroll 4
        for (int m = 0; m < NM; ++m) acc[m][n] = fma(wn, load(x + m * ldx + k + v), acc[m][n]);
      }
    }
  }
  for (; k < K; k += W)
    for (int n = 0; n < NN; ++n) {
      const T* row = w + n * ldw + k;
      const V wn = k + W <= K ? load(row) : load_partial(row, (int)(K - k));
      for (int m = 0; m < NM; ++m) acc[m][n] = fma(wn, load(x + m * ldx + k), acc[m][n]);
    }
  for (int64_t r = 0; r < R; r += W)
    for (int n = 0; n < NN; ++n) {
      const V bn = r + W <= R ? load(b + n * R + r) : load_partial(b + n * R + r, (int)(R - r));
      for (int m = 0; m < NM; ++m) acc[m][n] = fma(bn, load(s + m * lds + r), acc[m][n]);
    }
#pragma GCC unroll 4
  for (int m = 0; m < NM; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NN; ++n) out[m * ld_out + n] = sum(acc[m][n]);
}

template <int NN, class T>
void dot_columns(float* out, int64_t ld_out, const T* w, int64_t ldw, const float* x, int64_t ldx, int64_t M, int64_t K,
                 const float* b, int64_t R, const float* s, int64_t lds) {
  int64_t m = 0;
  for (; m + DOT_M <= M; m += DOT_M)
    dot_block<NN, DOT_M>(out + m * ld_out, ld_out, w, ldw, x + m * ldx, ldx, K, b, R, s + m * lds, lds);
  for (; m < M; ++m) dot_block<NN, 1>(out + m * ld_out, ld_out, w, ldw, x + m * ldx, ldx, K, b, R, s + m * lds, lds);
}

// the same for any number N of rows of w and b
template <class T>
void dot_rows(float* out, int64_t ld_out, const T* w, int64_t ldw, int64_t N, const float* x, int64_t ldx, int64_t M,
              int64_t K, const float* b, int64_t R, const float* s, int64_t lds) {
  int64_t n = 0;
  for (; n + DOT_N <= N; n += DOT_N)
    dot_columns<DOT_N>(out + n, ld_out, w + n * ldw, ldw, x, ldx, M, K, b + n * R, R, s, lds);
  for (; n < N; ++n) dot_columns<1>(out + n, ld_out, w + n * ldw, ldw, x, ldx, M, K, b + n * R, R, s, lds);
}

}  // namespace
