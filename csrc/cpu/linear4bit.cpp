// The CPU kernels of linear4bit, for one instruction set (vec.h).
#include "../linear4bit.h"

#include <omp.h>

#include "adapter.h"
#include "dot.h"
#include "linear4bit_decode.h"
#include "linear4bit_dot.h"

namespace {

using namespace fastpeft;

// ---- dequantize ----

template <class T>
int dequantize(const Linear4bitDequantize& d) {
  constexpr int64_t PART = 512;  // columns of 16 rows at a time, in L1
  const Reader reader(d.w);
  const int64_t K = d.w.K, width = d.k1 - d.k0;
  T* out = (T*)d.out.data;
  if (width <= 0) return OK;
  const int threads = d.way.team(2.0 * (d.n1 - d.n0) * width);
  const int64_t scale_floats = reader.stores_scales() ? 0 : K / reader.step * ROWS4;
  Workspace work;
  if (!work.allocate(threads * Workspace::size(scale_floats))) return OUT_OF_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t group = d.n0 / ROWS4; group < blocks(d.n1, ROWS4); ++group) {
    const int64_t n0 = group * ROWS4 > d.n0 ? group * ROWS4 : d.n0, n1 = smaller(d.n1, (group + 1) * ROWS4);
    const bool tiled = (group + 1) * ROWS4 <= reader.tiled_rows && d.k0 % CODES4 == 0;
    alignas(64) float part[ROWS4 * PART / CODES4];  // a row's dwords side by side; or a row of fp32
    static_assert(ROWS4 / CODES4 >= 1, "it holds a row of fp32");
    const float* scales =
        tiled ? reader.group_scales(group, work.base + omp_get_thread_num() * Workspace::size(scale_floats)) : nullptr;
    for (int64_t k = d.k0; k < d.k1; k += PART) {
      const int64_t end = smaller(d.k1, k + PART);
      if (tiled)
        transpose(part, PART / CODES4, (const float*)(reader.tile(group) + k * ROWS4 / 2), ROWS4,
                  blocks(end - k, CODES4), ROWS4);
      for (int64_t n = n0; n < n1; ++n) {
        T* to = out + (n - d.n0) * d.out.ld - d.k0;
        if (!tiled) {
          reader.row(part, n, k, end);
          convert_row(to + k, part, end - k);
          continue;
        }
        const uint8_t* bytes = (const uint8_t*)(part + n % ROWS4 * (PART / CODES4));
        for (int64_t i = k; i < end;) {
          const int64_t block = i / reader.step, count = smaller(end, (block + 1) * reader.step) - i;
          reader.run(to + i, bytes, i - k, count, scales[block * ROWS4 + n % ROWS4]);
          i += count;
        }
      }
    }
  }
  return OK;
}

// ---- few rows of x: y = x Wᵀ + bias + s (scale·B)ᵀ + lora_bias, W read and decoded once ----
//
// Up to DIRECT_M rows of x, decoded vectors (16 rows of W side by side) go straight into multiply-adds; beyond, tiles
// of KC x 32 of them are decoded into L1 and multiplied by all rows of x. Rows of W outside tiles are decoded one by
// one.

constexpr int DIRECT_M = LANES == 1 ? 4 : LANES == 2 ? 2 : 1;
constexpr int PAIR = 2 * ROWS4;  // columns of y at a time
constexpr int XM = 32;           // rows of x at a time, in tiles
constexpr int TAIL = DOT_N;      // rows of W outside tiles at a time

// out[m, n] = Σ_k x[m, k] · W[n, k] for M rows of x and the 16 rows of a tiled group; xt [K, M]
template <int M>
void direct(float* out, const Reader& reader, int64_t group, const float* scales, const float* xt) {
  constexpr int CHAINS = LANES * M >= 4 ? (LANES * M > 4 ? 1 : 2) : 4;  // enough sums to keep the multipliers busy
  const uint8_t* p = reader.tile(group);
  const int64_t run = reader.step / CODES4;
  V total[LANES][M];
  for (int v = 0; v < LANES; ++v)
    for (int m = 0; m < M; ++m) total[v][m] = zero();
  for (int64_t i = 0; i < reader.w.K / reader.step; ++i, scales += ROWS4) {
    V acc[LANES][M][CHAINS];
#pragma GCC unroll 4
    for (int v = 0; v < LANES; ++v)
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; ++c) acc[v][m][c] = zero();
    for (int64_t d = 0; d < run; ++d, p += 4 * ROWS4, xt += CODES4 * M) {
      __builtin_prefetch(p + AHEAD, 0, 2);
#pragma GCC unroll 4
      for (int v = 0; v < LANES; ++v) {
        const Codes codes = load_codes(p + v * 4 * W);
#pragma GCC unroll 8
        for (int j = 0; j < CODES4; ++j) {
          const V w = pick(reader.book, codes, ODD_EVEN[j]);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) acc[v][m][j % CHAINS] = fma(w, set1(xt[j * M + m]), acc[v][m][j % CHAINS]);
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < LANES; ++v)
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        for (int c = 1; c < CHAINS; ++c) acc[v][m][0] = add(acc[v][m][0], acc[v][m][c]);
        total[v][m] = fma(acc[v][m][0], load(scales + v * W), total[v][m]);
      }
  }
  for (int v = 0; v < LANES; ++v)
    for (int m = 0; m < M; ++m) store(out + m * PAIR + v * W, total[v][m]);
}

// tile[k - k0, n] = W[n, k] rounded to T for 16 rows of a tiled group, k0 <= k < k1 (multiples of 8); the tile's rows
// are PAIR apart
template <class T>
FP_INLINE void decode(T* tile, const Reader& reader, int64_t group, const float* scales, int64_t k0, int64_t k1) {
  const uint8_t* p = reader.tile(group) + k0 * ROWS4 / 2;
  for (int64_t k = k0; k < k1; k += CODES4, p += 4 * ROWS4, tile += CODES4 * PAIR) {
    __builtin_prefetch(p + AHEAD, 0, 2);
    const float* scale = scales + k / reader.step * ROWS4;
#pragma GCC unroll 4
    for (int v = 0; v < LANES; ++v) {
      const Codes codes = load_codes(p + v * 4 * W);
      const V s = load(scale + v * W);
#pragma GCC unroll 8
      for (int j = 0; j < CODES4; ++j) store(tile + j * PAIR + v * W, mul(pick(reader.book, codes, ODD_EVEN[j]), s));
    }
  }
}

template <class T, class E = float>
int linear4bit_small(const Linear4bitSmall& d) {
  const Reader reader(d.w);
  const int64_t M = d.M, K = d.w.K, N = d.w.N, R = d.R;
  if (M == 0 || N == 0) return OK;
  constexpr bool IS_DOT = TERMS<E> == 2;
  const bool is_direct = !IS_DOT && M <= DIRECT_M;
  const int64_t groups = reader.tiled_rows / ROWS4, tail = N - reader.tiled_rows,
                xm = IS_DOT      ? DOT_ROWS
                     : is_direct ? M
                                 : XM;
  const int64_t ldx = round_up(K, W), lds = round_up(R, W), x_blocks = blocks(M, xm);
  const int64_t scale_floats = reader.stores_scales() ? 0 : K / reader.step * ROWS4;
  const T* x = (const T*)d.x.data;
  T* y = (T*)d.y.data;
  Ranks<T>* s = (Ranks<T>*)d.s.data;
  const int threads = d.way.team((double)(N + R) * K * M);

  const int64_t of_thread = Workspace::size(2 * scale_floats) + Workspace::size(tail ? TAIL * ldx : 0) +
                            Workspace::size(PAIR * lds) + Workspace::size(ROWS4 * lds) +
                            Workspace::size(x_blocks * xm * PAIR);
  Workspace work;
  if (!work.allocate(Workspace::size(M * ldx) + Workspace::size(groups ? x_blocks * K * xm : 0) +
                     Workspace::size(R * ldx) + Workspace::size(M * lds) + threads * of_thread))
    return OUT_OF_MEMORY;
  const bool wants_rows = R > 0 || tail > 0;
  float* xf = work.take(M * ldx);                         // x: [M, K]
  float* xt = work.take(groups ? x_blocks * K * xm : 0);  // [blocks, K, xm]
  float* af = work.take(R * ldx);                         // [R, K]
  float* sf = work.take(M * lds);                         // s: [M, R]
  float* own = work.take(threads * of_thread);

  // the pairs of a block of rows, in the room of its transpose: half of it
  [[maybe_unused]] const auto pairs_of = [&](int64_t b) { return (bf16x2*)(xt + b * K * xm); };

  const auto run = [&] {
    const int me = omp_get_thread_num(), team = omp_get_num_threads();
    const Part k_part(blocks(K, W), team, me), r_part(R, team, me), pairs(blocks(groups, 2), team, me);
    const Part tails(blocks(tail, TAIL), team, me);

    const int64_t k0 = k_part.begin * W, k1 = smaller(K, k_part.end * W);
    for (int64_t m = 0; m < M && k0 < k1 && wants_rows; ++m) {
      store(xf + m * ldx + (k1 - 1) / W * W, zero());
      convert_row(xf + m * ldx + k0, x + m * d.x.ld + k0, k1 - k0);
    }
    for (int64_t b = 0; b < x_blocks && k0 < k1 && groups; ++b) {
      const int64_t rows = smaller(xm, M - b * xm);
      const T* from = x + b * xm * d.x.ld;
      if constexpr (IS_DOT)
        pair_up(pairs_of(b), from, d.x.ld, rows, k0, k1);
      else
        transpose(xt + (b * K + k0) * xm, xm, from + k0, d.x.ld, rows, k1 - k0);
    }
#pragma omp barrier

    alignas(64) float block[XM * MB];
    for (int64_t r = r_part.begin; r < r_part.end; r += MB) {  // s: this thread's ranks
      const int64_t n = smaller(MB, r_part.end - r);
      load_adapter<Ranks<T>>(af + r * ldx, ldx, d.a, r, n, K, Scale{});
      for (int64_t m0 = 0; m0 < M; m0 += XM) {
        const int64_t rows = smaller(XM, M - m0);
        dot_rows(block, MB, af + r * ldx, ldx, n, xf + m0 * ldx, ldx, rows, K, nullptr, 0, nullptr, 0);
        for (int64_t m = 0; m < rows; ++m) {
          round_row<Ranks<T>>(block + m * MB, n);
          memcpy(sf + (m0 + m) * lds + r, block + m * MB, (size_t)n * sizeof(float));
          if (s) convert_row(s + (m0 + m) * d.s.ld + r, block + m * MB, n);
        }
      }
    }
    if (me == 0)
      for (int64_t m = 0; m < M; ++m)
        for (int64_t r = R; r < lds; ++r) sf[m * lds + r] = 0.0f;
#pragma omp barrier

    float* at = own + me * of_thread;
    const auto take = [&](int64_t floats) { return (at += Workspace::size(floats)) - Workspace::size(floats); };
    float *scale_room = take(2 * scale_floats), *rows = take(tail ? TAIL * ldx : 0), *b_rows = take(PAIR * lds);
    float *bt = take(ROWS4 * lds), *out = take(x_blocks * xm * PAIR);  // out [M, PAIR]

    // y[m, n0 + i] = out[m, i] + biases
    const auto finish = [&](int64_t n0, int64_t n) {
      const Vector biases[] = {d.bias, d.lora_bias};
      for (const Vector& v : biases) {
        if (!v.data) continue;
        float bias[PAIR];
        row_to_float(bias, element(v.data, v.dtype, n0), v.dtype, n);
        for (int64_t m = 0; m < M; ++m)
          for (int64_t i = 0; i < n; ++i) out[m * PAIR + i] += bias[i];
      }
      for (int64_t m = 0; m < M; ++m) convert_row(y + m * d.y.ld + n0, out + m * PAIR, n);
    };

    alignas(64) float tile[KC * PAIR];
    for (int64_t pair = pairs.begin; pair < pairs.end; ++pair) {
      const int64_t first = 2 * pair, count = smaller(2, groups - first), n0 = first * ROWS4;
      const float* scales[2];
      for (int64_t g = 0; g < count; ++g) scales[g] = reader.group_scales(first + g, scale_room + g * scale_floats);
      if constexpr (IS_DOT) {
        for (int64_t g = 0; g < count; ++g)
          for (int64_t b = 0; b < x_blocks; ++b)
            dot_rows_of(smaller(xm, M - b * xm), out + b * xm * PAIR + g * ROWS4, PAIR, reader, first + g, scales[g],
                        pairs_of(b));
      } else if (is_direct) {
        for (int64_t g = 0; g < count; ++g) {
          float* to = out + g * ROWS4;
          if (M == 1) direct<1>(to, reader, first + g, scales[g], xt);
          if constexpr (DIRECT_M > 1) {
            if (M == 2) direct<2>(to, reader, first + g, scales[g], xt);
          }
          if constexpr (DIRECT_M > 2) {
            if (M == 3) direct<3>(to, reader, first + g, scales[g], xt);
            if (M == 4) direct<4>(to, reader, first + g, scales[g], xt);
          }
        }
      } else {
        const int vecs = (int)count * LANES;
        for (int64_t i = 0; i < M * PAIR; i += W) store(out + i, zero());
        NoTile none;
        for (int64_t k = 0; k < K; k += KC) {
          const int64_t width = smaller(KC, K - k);
          for (int64_t g = 0; g < count; ++g) decode(tile + g * ROWS4, reader, first + g, scales[g], k, k + width);
          for (int64_t b = 0; b < x_blocks; ++b)
            tile_gemm<1, XM>(out + b * XM * PAIR, PAIR, xt + (b * K + k) * XM, tile, PAIR, smaller(XM, M - b * XM),
                             width, vecs, none);
        }
      }
      if (R) {
        load_adapter<Ranks<T>>(b_rows, lds, d.b, n0, count * ROWS4, R, d.scale);
        for (int64_t g = 0; g < count; ++g) {
          transpose(bt, ROWS4, b_rows + g * ROWS4 * lds, lds, ROWS4, R);
          for (int64_t m = 0; m < M; ++m)
            for (int v = 0; v < ROWS4; v += W) {
              float* to = out + m * PAIR + g * ROWS4 + v;
              V sum = load(to);
              for (int64_t r = 0; r < R; ++r) sum = fma(set1(sf[m * lds + r]), load(bt + r * ROWS4 + v), sum);
              store(to, sum);
            }
        }
      }
      finish(n0, count * ROWS4);
    }

    for (int64_t i = tails.begin; i < tails.end; ++i) {
      const int64_t n0 = reader.tiled_rows + i * TAIL, n = smaller(TAIL, N - n0);
      for (int64_t j = 0; j < n; ++j) {
        if (K) store(rows + j * ldx + ldx - W, zero());
        reader.row(rows + j * ldx, n0 + j, 0, K);
      }
      if (R) load_adapter<Ranks<T>>(b_rows, R, d.b, n0, n, R, d.scale);
      dot_rows(out, PAIR, rows, ldx, n, xf, ldx, M, K, b_rows, R, sf, lds);
      finish(n0, n);
    }
  };
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    run();
  } else {
    run();
  }
  return OK;
}

// ---- few rows of dy: dx = dy W ----

// Vectors lie along the rows m, each thread owns columns k and takes them a panel at a time. Pairs lie along n.
template <class T, class E = float>
int linear4bit_grad_small(const Linear4bitGradSmall& d) {
  constexpr int64_t PANEL = 512;  // columns: 4 KB of a group's codes in one run, sums that stay in L1 or close to it
  const Reader reader(d.w);
  const int64_t M = d.M, K = d.w.K, N = d.w.N, lanes = round_up(M, W), groups = reader.tiled_rows / ROWS4;
  if (M == 0 || K == 0) return OK;
  const int threads = d.way.team((double)N * K * lanes);
  const int64_t scale_floats = reader.stores_scales() ? 0 : K / reader.step * ROWS4;
  const int64_t of_thread = Workspace::size(PANEL * lanes) + Workspace::size(2 * scale_floats);
  const int64_t tiled = reader.tiled_rows, tail = N - tiled;
  Workspace work;
  if (!work.allocate(Workspace::size(tiled / TERMS<E> * lanes) + Workspace::size(tail * lanes) + threads * of_thread))
    return OUT_OF_MEMORY;
  E* dyt = work.take<E>(tiled / TERMS<E> * lanes);  // [N / TERMS, M] for rows of W in tiles
  float *dyt_tail = work.take(tail * lanes), *own = work.take(threads * of_thread);  // [N, M] for the others

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int me = omp_get_thread_num(), team = omp_get_num_threads();
    const Part rows(groups, team, me), columns(blocks(K, KC), team, me);
    const int64_t r0 = rows.begin * ROWS4, r1 = rows.end * ROWS4;
    const T* dy = (const T*)d.dy.data;
    E* of_rows = dyt + r0 / TERMS<E> * lanes;
    memset((void*)of_rows, 0, (size_t)((r1 - r0) / TERMS<E> * lanes) * sizeof(E));
    transpose(of_rows, lanes, dy + r0, d.dy.ld, M, r1 - r0);
    if (me == 0) {
      for (int64_t i = 0; i < tail * lanes; i += W) store(dyt_tail + i, zero());
      transpose(dyt_tail, lanes, dy + tiled, d.dy.ld, M, tail);
    }
#pragma omp barrier

    float *sums = own + me * of_thread, *scale_room = sums + Workspace::size(PANEL * lanes);  // sums [PANEL, M]
    alignas(64) E tile[KC * PAIR / TERMS<E>];
    alignas(64) float row[KC], out[MB * KC];
    const int64_t end = smaller(K, columns.end * KC);
    for (int64_t k0 = columns.begin * KC; k0 < end; k0 += PANEL) {
      const int64_t width = smaller(PANEL, end - k0);
      for (int64_t i = 0; i < width * lanes; i += W) store(sums + i, zero());
      for (int64_t g = 0; g < groups; g += 2) {
        const int64_t count = smaller(2, groups - g);
        const float* scales[2];
        for (int64_t i = 0; i < count; ++i) scales[i] = reader.group_scales(g + i, scale_room + i * scale_floats);
        NoTile none;
        for (int64_t k = 0; k < width; k += KC) {
          const int64_t some = smaller(KC, width - k);
          for (int64_t i = 0; i < count; ++i)
            decode((Number<E>*)tile + i * ROWS4, reader, g + i, scales[i], k0 + k, k0 + k + some);
          tile_gemm<PAIR / TERMS<E>, 1>(sums + k * lanes, lanes, tile, dyt + g * ROWS4 / TERMS<E> * lanes, lanes, some,
                                        count * ROWS4 / TERMS<E>, (int)(lanes / W), none);
        }
      }
      for (int64_t n = 0; n < tail; ++n)
        for (int64_t k = 0; k < width; k += KC) {
          const int64_t some = smaller(KC, width - k);
          reader.row(row, tiled + n, k0 + k, k0 + k + some);
          for (int64_t i = 0; i < some; ++i)
            for (int64_t m = 0; m < lanes; m += W) {
              float* to = sums + (k + i) * lanes + m;
              store(to, fma(set1(row[i]), load(dyt_tail + n * lanes + m), load(to)));
            }
        }
      for (int64_t k = 0; k < width; k += KC)
        for (int64_t m = 0; m < M; m += MB) {
          const int64_t some = smaller(KC, width - k), m_count = smaller(MB, M - m);
          transpose(out, KC, sums + k * lanes + m, lanes, some, m_count);
          for (int64_t i = 0; i < m_count; ++i)
            convert_row((T*)d.dx.data + (m + i) * d.dx.ld + k0 + k, out + i * KC, some);
        }
    }
  }
  return OK;
}

// ---- the table ----

int linear4bit_grad_small_any(const Linear4bitGradSmall& d) {
  FASTPEFT_BY_ELEMENT(linear4bit_grad_small, d, d.dy.dtype);
}
int linear4bit_small_any(const Linear4bitSmall& d) { FASTPEFT_BY_ELEMENT(linear4bit_small, d, d.x.dtype); }
int dequantize_any(const Linear4bitDequantize& d) { FASTPEFT_BY_DTYPE(dequantize, d, d.out.dtype); }

}  // namespace

const Linear4bitKernels fastpeft::FASTPEFT_TABLE(linear4bit) = {dequantize_any, linear4bit_small_any,
                                                                linear4bit_grad_small_any};
