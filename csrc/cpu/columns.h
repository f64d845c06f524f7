// Products of a few rows of x with a W that is stored the other way round, [K, N] (GPT-2's Conv1D), which is read once:
// vectors lie along n.
#pragma once
#include "tile.h"

namespace {

constexpr int64_t COLUMNS_N = 512;  // columns of sums that stay in L1 beside COLUMNS_K rows of W
constexpr int COLUMNS_K = 8;        // elements of x in registers

// sums[m, n] += Σ_j x[m, j] · w[j, n] for n < N and KK rows of w; sums' rows are whole vectors
template <int KK, class T>
FP_INLINE void add_columns(float* sums, const T* w, int64_t ldw, int64_t N, const float* x, int64_t ldx, int64_t M) {
  constexpr int LINE = 64 / (int)sizeof(T), VECS = LINE / W;  // of a cache line
  for (int64_t m = 0; m < M; ++m) {
    V xs[KK];
#pragma GCC unroll 8
    for (int j = 0; j < KK; ++j) xs[j] = set1(x[m * ldx + j]);
    float* row = sums + m * COLUMNS_N;
    int64_t n = 0;
    for (; n + LINE <= N; n += LINE) {
      V sum[VECS];
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) sum[v] = load(row + n + v * W);
#pragma GCC unroll 8
      for (int j = 0; j < KK; ++j) {
        if (m == 0) __builtin_prefetch(w + (KK + j) * ldw + n, 0, 2);  // the next rows, as in dot.h
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) sum[v] = fma(xs[j], load(w + j * ldw + n + v * W), sum[v]);
      }
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) store(row + n + v * W, sum[v]);
    }
    for (; n < N; n += W) {
      V sum = load(row + n);
      for (int j = 0; j < KK; ++j) {
        const T* from = w + j * ldw + n;
        sum = fma(xs[j], n + W <= N ? load(from) : load_partial(from, (int)(N - n)), sum);
      }
      store(row + n, sum);
    }
  }
}

// sums[m, n] = Σ_k x[m, k] · w[k, n] for n < N <= COLUMNS_N; sums [M, COLUMNS_N]
template <class T>
void columns(float* sums, const T* w, int64_t ldw, int64_t N, const float* x, int64_t ldx, int64_t M, int64_t K) {
  for (int64_t i = 0; i < M * COLUMNS_N; i += W) store(sums + i, zero());
  int64_t k = 0;
  for (; k + COLUMNS_K <= K; k += COLUMNS_K) add_columns<COLUMNS_K>(sums, w + k * ldw, ldw, N, x + k, ldx, M);
  for (; k < K; ++k) add_columns<1>(sums, w + k * ldw, ldw, N, x + k, ldx, M);
}

}  // namespace
