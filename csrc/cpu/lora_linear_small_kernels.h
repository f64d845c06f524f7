// lora_linear for few rows (decoding): the weight is read once, at the speed of memory. Included after
// lora_linear_kernels.h.
#pragma once

namespace {

constexpr int SMALL_ROWS = 4;  // rows of W at a time; times up to 4 rows of x: 16 accumulators
constexpr int SMALL_N = 64;    // columns of y that are finished together
constexpr int SMALL_MAX_M = 32;

// out[m, n] = Σ_k x[m, k] · w[n, k] + Σ_r s[m, r] · b[n, r] for RN rows of w, RM rows of x; vectors along k and r.
// x, s and b are padded with zeros to whole vectors.
template <class T, int RN, int RM>
FP_INLINE void dot_rows(float* out, int64_t ld_out, const T* w, int64_t ldw, const float* x, int64_t ldx, int64_t K,
                        const float* b, const float* s, int64_t ld_ranks) {
  V acc[RM][RN];
#pragma GCC unroll 4
  for (int m = 0; m < RM; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < RN; ++n) acc[m][n] = zero();
  int64_t k = 0;
  for (; k + W <= K; k += W) {
#pragma GCC unroll 4
    for (int n = 0; n < RN; ++n) {
      const V wn = load(w + n * ldw + k);
#pragma GCC unroll 4
      for (int m = 0; m < RM; ++m) acc[m][n] = fma(wn, load(x + m * ldx + k), acc[m][n]);
    }
  }
  if (k < K)
    for (int n = 0; n < RN; ++n) {
      const V wn = load_partial(w + n * ldw + k, (int)(K - k));
      for (int m = 0; m < RM; ++m) acc[m][n] = fma(wn, load(x + m * ldx + k), acc[m][n]);
    }
  for (int64_t r = 0; r < ld_ranks; r += W)
    for (int n = 0; n < RN; ++n)
      for (int m = 0; m < RM; ++m)
        acc[m][n] = fma(load(b + n * ld_ranks + r), load(s + m * ld_ranks + r), acc[m][n]);
#pragma GCC unroll 4
  for (int m = 0; m < RM; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < RN; ++n) out[m * ld_out + n] = sum(acc[m][n]);
}

template <class T, int RN>
void dot_columns(float* out, int64_t ld_out, const T* w, int64_t ldw, const float* x, int64_t ldx, int64_t M, int64_t K,
                 const float* b, const float* s, int64_t ld_ranks) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4)
    dot_rows<T, RN, 4>(out + m * ld_out, ld_out, w, ldw, x + m * ldx, ldx, K, b, s + m * ld_ranks, ld_ranks);
  switch (M - m) {
    case 3: return dot_rows<T, RN, 3>(out + m * ld_out, ld_out, w, ldw, x + m * ldx, ldx, K, b, s + m * ld_ranks, ld_ranks);
    case 2: return dot_rows<T, RN, 2>(out + m * ld_out, ld_out, w, ldw, x + m * ldx, ldx, K, b, s + m * ld_ranks, ld_ranks);
    case 1: return dot_rows<T, RN, 1>(out + m * ld_out, ld_out, w, ldw, x + m * ldx, ldx, K, b, s + m * ld_ranks, ld_ranks);
  }
}

template <class T>
int small(const LoraLinearSmall& d) {
  const int64_t M = d.M, K = d.K, N = d.N, R = d.R;
  if (M == 0) return OK;
  const int64_t ldx = round_up(K, W), ld_ranks = round_up(R, W);
  const T *x = (const T*)d.x.data, *w = (const T*)d.w.data;
  T *y = (T*)d.y.data, *s = (T*)d.s.data;
  const int threads = useful_threads(d.threads, (double)(N + R) * K * M);

  Workspace work;
  if (!work.allocate(Workspace::size(M * ldx) + Workspace::size(R * ldx) + Workspace::size(M * ld_ranks) +
                     Workspace::size(N * ld_ranks)))
    return OUT_OF_MEMORY;
  float* xf = work.take(M * ldx);        // [M, K]
  float* af = work.take(R * ldx);        // [R, K]
  float* sf = work.take(M * ld_ranks);   // [M, R]
  float* bf = work.take(N * ld_ranks);   // [N, R]: scale[r] · B[n, r]

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t m = 0; m < M; ++m) {
      float* row = xf + m * ldx;
      convert_row(row, x + m * d.x.ld, K);
      for (int64_t k = K; k < ldx; ++k) row[k] = 0.0f;
    }

    if (R) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < R; ++r) {
        float column[SMALL_MAX_M];
        float* a = af + r * ldx;
        load_adapter<T>(a, ldx, d.a, r, 1, K, Scale{});
        dot_columns<float, 1>(column, 1, a, ldx, xf, ldx, M, K, nullptr, nullptr, 0);
        for (int64_t m = 0; m < M; ++m) sf[m * ld_ranks + r] = column[m];
      }
#pragma omp for schedule(static)
      for (int64_t m = 0; m < M; ++m) {
        float* row = sf + m * ld_ranks;
        for (int64_t r = R; r < ld_ranks; ++r) row[r] = 0.0f;
        round_row<T>(row, R);
        if (s) convert_row(s + m * d.s.ld, row, R);
      }
    }

    float out[SMALL_MAX_M * SMALL_N], bias[SMALL_N];
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks(N, SMALL_N); ++block) {
      const int64_t n0 = block * SMALL_N, width = smaller(SMALL_N, N - n0);
      if (R) load_adapter<T>(bf + n0 * ld_ranks, ld_ranks, d.b, n0, width, R, d.scale);
      int64_t n = 0;
      for (; n + SMALL_ROWS <= width; n += SMALL_ROWS)
        dot_columns<T, SMALL_ROWS>(out + n, SMALL_N, w + (n0 + n) * d.w.ld, d.w.ld, xf, ldx, M, K, bf + (n0 + n) * ld_ranks,
                                   sf, ld_ranks);
      for (; n < width; ++n)
        dot_columns<T, 1>(out + n, SMALL_N, w + (n0 + n) * d.w.ld, d.w.ld, xf, ldx, M, K, bf + (n0 + n) * ld_ranks, sf,
                          ld_ranks);
      const Vector biases[] = {d.bias, d.lora_bias};
      for (const Vector& v : biases) {
        if (!v.data) continue;
        row_to_float(bias, element(v.data, v.dtype, n0), v.dtype, width);
        for (int64_t m = 0; m < M; ++m)
          for (int64_t i = 0; i < width; ++i) out[m * SMALL_N + i] += bias[i];
      }
      for (int64_t m = 0; m < M; ++m) convert_row(y + m * d.y.ld + n0, out + m * SMALL_N, width);
    }
  }
  return OK;
}

}  // namespace
