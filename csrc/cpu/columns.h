// Products of a few rows of x with a W that is stored the other way round, [K, N] (GPT-2's Conv1D), which is read once:
// vectors lie along n.
#pragma once
#include "tile.h"

namespace {

// Sums at a time, of all rows of x: in L1, and long pieces of W's rows, as memory likes them.
constexpr int64_t COLUMNS = 4096;
constexpr int COLUMNS_K = 8;  // rows of W that go by together

// sums[m, n] += Σ_j x[m, j] · w[j, n] for n < N and KK rows of w; sums' rows are whole vectors
template <int KK, class T>
FP_INLINE void add_columns(float* sums, int64_t ld, const T* w, int64_t ldw, int64_t N, const float* x, int64_t ldx,
                           int64_t M) {
  constexpr int LINE = 64 / (int)sizeof(T), VECS = LINE / W;  // of a cache line
  int64_t n = 0;
  for (; n + LINE <= N; n += LINE) {
    for (int64_t m = 0; m < M; ++m) {
      float* to = sums + m * ld + n;
      V sum[VECS];
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) sum[v] = load(to + v * W);
#pragma GCC unroll 8
      for (int j = 0; j < KK; ++j) {
        const V xj = set1(x[m * ldx + j]);
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) sum[v] = fma(xj, load(w + j * ldw + n + v * W), sum[v]);
      }
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) store(to + v * W, sum[v]);
    }
  }
  for (; n < N; n += W)
    for (int64_t m = 0; m < M; ++m) {
      V sum = load(sums + m * ld + n);
      for (int j = 0; j < KK; ++j) {
        const T* from = w + j * ldw + n;
        sum = fma(set1(x[m * ldx + j]), n + W <= N ? load(from) : load_partial(from, (int)(N - n)), sum);
      }
      store(sums + m * ld + n, sum);
    }
}

// sums[m, n] = Σ_k x[m, k] · w[k, n] for n < N <= ld
template <class T>
void columns(float* sums, int64_t ld, const T* w, int64_t ldw, int64_t N, const float* x, int64_t ldx, int64_t M,
             int64_t K) {
  for (int64_t i = 0; i < M * ld; i += W) store(sums + i, zero());
  int64_t k = 0;
  for (; k + COLUMNS_K <= K; k += COLUMNS_K) add_columns<COLUMNS_K>(sums, ld, w + k * ldw, ldw, N, x + k, ldx, M);
  for (; k < K; ++k) add_columns<1>(sums, ld, w + k * ldw, ldw, N, x + k, ldx, M);
}

}  // namespace
