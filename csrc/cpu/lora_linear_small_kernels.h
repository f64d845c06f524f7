// lora_linear for few rows (decoding), base included: W is read once, at the speed of memory. Included after
// lora_linear_kernels.h.
//
// Up to W/2 rows of x, vectors lie along k and each result is the sum of one vector's lanes; beyond, x is transposed
// and vectors lie along the rows m: the same tiles as in the tall passes, with W in the place of x.
#pragma once

namespace {

constexpr int SMALL_MAX_M = 32;
constexpr int DOT_N = 4;                     // rows of W at a time,
constexpr int DOT_M = MAX_VECS > 3 ? 4 : 2;  // times rows of x: as many sums as registers allow
static_assert(SMALL_MAX_M <= 8 * W, "a row of sums fits on the stack");

// ---- vectors along k ----

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

// ---- vectors along m ----

// sums[n, m] += Σ_k w[n, k] · xt[k, m] for N <= MB rows of w; sums and xt have `lanes` columns
template <class T>
void tile_rows(float* sums, const T* w, int64_t ldw, int64_t N, int64_t K, const float* xt, int64_t lanes) {
  alignas(64) float tiles[2][MB * TILE_LD];
  const auto at = [&](int64_t k0) { return TileAt{0, k0, (int)N, (int)smaller(KC, K > k0 ? K - k0 : 0)}; };
  NextTile<T>(tiles[0], w, ldw, at(0)).finish();
  for (int64_t k0 = 0, i = 0; k0 < K; k0 += KC, ++i) {
    NextTile<T> next(tiles[(i + 1) % 2], w, ldw, at(k0 + KC));
    tile_gemm<TILE_LD, 1>(sums, lanes, tiles[i % 2], xt + k0 * lanes, lanes, N, at(k0).cols, (int)(lanes / W), next);
    next.finish();
  }
}

// ---- the op ----

template <class T>
int small(const LoraLinearSmall& d) {
  const int64_t M = d.M, K = d.K, N = d.N, R = d.R;
  if (M == 0 || N == 0) return OK;
  const bool tall = M > W / 2;  // vectors along m
  const int64_t ldx = round_up(K, W), lds = round_up(R, W), lanes = round_up(M, W);
  const T *x = (const T*)d.x.data, *w = (const T*)d.w.data;
  T *y = (T*)d.y.data, *s = (T*)d.s.data;
  const int threads = useful_threads(d.threads, (double)(N + R) * K * M);

  Workspace work;
  if (!work.allocate(Workspace::size(tall ? K * lanes : M * ldx) + Workspace::size(R * ldx) +
                     Workspace::size(tall ? R * lanes : M * lds) + threads * Workspace::size(tall ? 0 : MB * R)))
    return OUT_OF_MEMORY;
  float* xf = work.take(tall ? K * lanes : M * ldx);  // x: [K, M] if tall, else [M, K]
  float* af = work.take(R * ldx);                     // [R, K]
  float* sf = work.take(tall ? R * lanes : M * lds);  // s: [R, M] if tall, else [M, R]
  float* b_rows = work.take(threads * Workspace::size(tall ? 0 : MB * R));

  const auto run = [&] {
    const int me = omp_get_thread_num(), team = omp_get_num_threads();
    const Part k_part(blocks(K, W), team, me), r_part(R, team, me), n_part(blocks(N, DOT_N), team, me);

    const int64_t k0 = k_part.begin * W, k1 = smaller(K, k_part.end * W);
    if (tall) {
      for (int64_t i = k0 * lanes; i < k1 * lanes; i += W) store(xf + i, zero());
      if (k0 < k1) transpose(xf + k0 * lanes, lanes, x + k0, d.x.ld, M, k1 - k0);
    } else {
      for (int64_t m = 0; m < M && k0 < k1; ++m) {
        store(xf + m * ldx + (k1 - 1) / W * W, zero());
        convert_row(xf + m * ldx + k0, x + m * d.x.ld + k0, k1 - k0);
      }
    }
#pragma omp barrier

    alignas(64) float out[SMALL_MAX_M * MB], sums[MB * 8 * W];
    // s: this thread's ranks
    for (int64_t r = r_part.begin; r < r_part.end; r += MB) {
      const int64_t n = smaller(MB, r_part.end - r);
      load_adapter<T>(af + r * ldx, ldx, d.a, r, n, K, Scale{});
      if (tall) {
        float* rows = sf + r * lanes;
        for (int64_t i = 0; i < n * lanes; i += W) store(rows + i, zero());
        tile_rows(rows, af + r * ldx, ldx, n, K, xf, lanes);
        round_row<T>(rows, n * lanes);
        transpose(out, MB, rows, lanes, n, M);
      } else {
        dot_rows(out, MB, af + r * ldx, ldx, n, xf, ldx, M, K, nullptr, 0, nullptr, 0);
        for (int64_t m = 0; m < M; ++m) {
          round_row<T>(out + m * MB, n);
          memcpy(sf + m * lds + r, out + m * MB, (size_t)n * sizeof(float));
        }
      }
      for (int64_t m = 0; s && m < M; ++m) convert_row(s + m * d.s.ld + r, out + m * MB, n);
    }
    if (!tall && me == 0)
      for (int64_t m = 0; m < M; ++m)
        for (int64_t r = R; r < lds; ++r) sf[m * lds + r] = 0.0f;
#pragma omp barrier

    // y: this thread's columns
    const int64_t n_end = smaller(N, n_part.end * DOT_N);
    for (int64_t n0 = n_part.begin * DOT_N; n0 < n_end; n0 += MB) {
      const int64_t n = smaller(MB, n_end - n0);
      const T* rows = w + n0 * d.w.ld;
      if (tall) {
        for (int64_t i = 0; i < n * lanes; i += W) store(sums + i, zero());
        tile_rows(sums, rows, d.w.ld, n, K, xf, lanes);
        alignas(64) float b_tile[MB * TILE_LD];
        NoTile none;
        for (int64_t r = 0; r < R; r += KC) {
          const int64_t width = smaller(KC, R - r);
          const Matrix b{(void*)element(d.b.data, d.b.dtype, r), d.b.ld, d.b.dtype};
          load_adapter<T>(b_tile, TILE_LD, b, n0, n, width, Scale{d.scale.data + r * d.scale.stride, d.scale.stride});
          tile_gemm<TILE_LD, 1>(sums, lanes, b_tile, sf + r * lanes, lanes, n, width, (int)(lanes / W), none);
        }
        transpose(out, MB, sums, lanes, n, M);
      } else {
        float* b = b_rows + me * Workspace::size(MB * R);
        for (int64_t i = 0; R && i < n; ++i)  // the next block's, while this one streams W
          __builtin_prefetch(element(d.b.data, d.b.dtype, (n0 + MB + i) * d.b.ld), 0, 2);
        if (R) load_adapter<T>(b, R, d.b, n0, n, R, d.scale);
        dot_rows(out, MB, rows, d.w.ld, n, xf, ldx, M, K, b, R, sf, lds);
      }
      const Vector biases[] = {d.bias, d.lora_bias};
      for (const Vector& v : biases) {
        if (!v.data) continue;
        alignas(64) float bias[MB];
        row_to_float(bias, element(v.data, v.dtype, n0), v.dtype, n);
        for (int64_t m = 0; m < M; ++m)
          for (int64_t i = 0; i < n; ++i) out[m * MB + i] += bias[i];
      }
      for (int64_t m = 0; m < M; ++m) convert_row(y + m * d.y.ld + n0, out + m * MB, n);
    }
  };
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    run();
  } else {
    run();  // a team of one is 0.2 us of a tiny call
  }
  return OK;
}

}  // namespace
