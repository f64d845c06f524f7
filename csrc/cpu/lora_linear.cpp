// The CPU kernels of lora_linear, for one instruction set (vec.h).
//
// The passes over tall matrices are one small GEMM on fp32 tiles in L1 (tile.h), with a different operand resident:
//   down       P[m, r] += X[m, k]  · Aᵀ[k, r]     vector along r
//   up         Y[m, n] += Sᵀ[r, m] · C[r, n]      vector along n, C = (scale·B)ᵀ; the bias is one more rank with s = 1
//   grad_up    P[m, r] += dY[m, n] · B'[n, r]  and  G[r, n] += Sᵀ[r, m] · dY[m, n];  dbias is one more rank with s = 1
//   grad_down  G[r, k] += Tᵀ[r, m] · X[m, k]   and  dX[m, k] += Tᵀ[r, m] · A[r, k]
// The threads share a grid of row ranges x column ranges; sums across them go through partial results that are added in
// a fixed order. For a given number of threads results repeat bit for bit.
#include "../lora_linear.h"

#include <omp.h>

#include "adapter.h"
#include "columns.h"
#include "dot.h"

namespace {

using namespace fastpeft;

// Projections whose ranks share one operand: all of them, or one each where each has its own dropout mask.
struct Group {
  const Projection* first;
  int count;
  int64_t R, offset;  // ranks, and ranks of the groups before it
  bool wants_da;
};

struct Groups {
  const Projection* projections;
  int total, count;
  Groups(const Projection* p, int n, bool dropout) : projections(p), total(n), count(dropout ? n : n > 0) {}
  Group operator[](int g) const {
    Group group{projections, total, 0, 0, false};
    if (count == total) group.first = projections + g, group.count = 1;
    for (const Projection* p = projections; p < group.first; ++p) group.offset += p->R;
    for (int i = 0; i < group.count; ++i) group.R += group.first[i].R, group.wants_da |= group.first[i].da != nullptr;
    return group;
  }
};

// C[m, k] += Σ_j Lᵀ[j, m] · B[j, k], rounded once, k < cols; L's rows are MB apart
template <class T, class Next>
void add_product(T* c, int64_t ldc, const float* l, const float* b, int64_t ldb, int rows, int64_t J, int cols,
                 float* scratch, Next& next) {
  const int whole = IS_FLOAT<T> || J <= MAX_SUM ? cols / W : 0;  // vectors that need no fp32 copy
  if (whole) tile_gemm<1, MB>(c, ldc, l, b, ldb, rows, J, whole, next);
  const int done = whole * W;
  if (done == cols) return;
  NextTile<T>(scratch, c + done, ldc, {0, 0, rows, cols - done}).finish();
  tile_gemm<1, MB>(scratch, TILE_LD, l, b + done, ldb, rows, J, (cols - done + W - 1) / W, next);
  store_tile(c + done, ldc, scratch, rows, cols - done);
}

// out[m, r] = Σ_c partial[c, m, lane + r] rounded to T, for one row m; partial is [parts, M, lanes]
template <class T>
void add_parts(T* out, const float* partial, int parts, int64_t stride, int64_t R) {
  float sums[W];
  for (int64_t r = 0; r < R; r += W) {
    V sum = load(partial + r);
    for (int c = 1; c < parts; ++c) sum = add(sum, load(partial + c * stride + r));
    store(sums, sum);
    convert_row(out + r, sums, smaller(W, R - r));
  }
}

// dst[i] = src[i] for an element type that is known at run time only: the adapter's gradients
void row_from_float(void* dst, int dtype, const float* src, int64_t n) {
  if (dtype == FLOAT32) return convert_row((float*)dst, src, n);
  if (dtype == BFLOAT16) return convert_row((bf16*)dst, src, n);
  convert_row((f16*)dst, src, n);
}

// ---- down ----

template <class T>
int down(const LoraLinearDown& d) {
  const Keep mask(d.dropout);
  const Groups groups(d.projections, d.count, (bool)mask);
  const int64_t M = d.M, K = d.K;
  const T* x = (const T*)d.x.data;
  Ranks<T>* s = (Ranks<T>*)d.s.data;
  int64_t lanes = 0;  // of all groups, each padded to whole vectors
  for (int g = 0; g < groups.count; ++g) lanes += round_up(groups[g].R, W);
  if (lanes == 0) return OK;
  const int threads = useful_threads(d.threads, (double)M * K * lanes);
  const Grid grid(threads, M, K, 0, (double)M);

  Workspace work;
  if (!work.allocate(Workspace::size(K * lanes) + Workspace::size(grid.cols * M * lanes + W))) return OUT_OF_MEMORY;
  float* at = work.take(K * lanes);                       // group after group, each [K, its lanes]
  float* partial = work.take(grid.cols * M * lanes + W);  // [grid.cols, M, lanes] of s; read by whole vectors

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    // at[k, r] = A[r, k]
    alignas(64) float rows[W * KC];
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < blocks(K, KC); ++tile) {
      const int64_t k0 = tile * KC, cols = smaller(KC, K - k0);
      float* block = at;
      for (int g = 0; g < groups.count; ++g) {
        const Group group = groups[g];
        const int64_t ld = round_up(group.R, W);
        int64_t lane = 0;
        for (int i = 0; i < group.count; lane += group.first[i++].R) {
          const Projection& p = group.first[i];
          const Matrix a{(void*)element(p.a.data, p.a.dtype, k0), p.a.ld, p.a.dtype};
          for (int64_t r0 = 0; r0 < p.R; r0 += W) {
            const int64_t n = smaller(W, p.R - r0);
            load_adapter<Ranks<T>>(rows, KC, a, r0, n, cols, Scale{});
            transpose(block + k0 * ld + lane + r0, ld, rows, KC, n, cols);
          }
        }
        for (int64_t k = k0; k < k0 + cols; ++k)
          for (int64_t r = lane; r < ld; ++r) block[k * ld + r] = 0.0f;
        block += K * ld;
      }
    }

    alignas(64) float tiles[2][MB * TILE_LD], masked[MB * TILE_LD];
    for (int c = omp_get_thread_num(); c < grid.cells(); c += omp_get_num_threads()) {
      const Cell cell(grid, c);
      float* sums = partial + cell.col * M * lanes;
      for (int64_t i = cell.m_begin() * lanes; i < cell.m_end() * lanes; i += W) store(sums + i, zero());
      NextTile<T>(tiles[0], x, d.x.ld, cell.along_rows(0)).finish();
      for (int64_t i = 0; i < cell.count; ++i) {
        const TileAt t = cell.along_rows(i);
        const float* tile = tiles[i % 2];  // [rows, cols]
        NextTile<T> next(tiles[(i + 1) % 2], x, d.x.ld, cell.along_rows(i + 1));
        const float* block = at;
        float* p = sums + t.m0 * lanes;
        for (int g = 0; g < groups.count; ++g) {
          const int64_t ld = round_up(groups[g].R, W);
          if (mask)
            mask.tile(t, groups[g].first->index,
                      [&](int64_t k, V keep) { store(masked + k, mul(keep, load(tile + k))); });
          tile_gemm<TILE_LD, 1>(p, lanes, mask ? masked : tile, block + t.k0 * ld, ld, t.rows, t.cols, (int)(ld / W),
                                next);
          block += K * ld, p += ld;
        }
        next.finish();
      }
    }
#pragma omp barrier

#pragma omp for schedule(static)
    for (int64_t m = 0; m < M; ++m) {
      const float* row = partial + m * lanes;
      for (int g = 0; g < groups.count; ++g) {
        const Group group = groups[g];
        int64_t lane = 0;
        for (int i = 0; i < group.count; lane += group.first[i++].R)
          add_parts(s + m * d.s.ld + group.first[i].column, row + lane, grid.cols, M * lanes, group.first[i].R);
        row += round_up(group.R, W);
      }
    }
  }
  return OK;
}

// ---- up ----

template <class T>
int up(const LoraLinearUp& u) {
  const int64_t M = u.M, N = u.N, R = u.R, J = R + (u.bias.data ? 1 : 0), ld = round_up(N, W);
  if (J == 0) return OK;
  T* y = (T*)u.y.data;
  const Ranks<T>* s = (const Ranks<T>*)u.s.data;
  const int threads = useful_threads(u.threads, (double)M * N * J);
  const Grid grid(threads, M, N, 0, 0);

  Workspace work;
  if (!work.allocate(Workspace::size(J * ld) + grid.cells() * Workspace::size(J * MB))) return OUT_OF_MEMORY;
  float* ct = work.take(J * ld);                                     // [J, N]: scale[r] · B[n, r], then the bias
  float* ranks = work.take(grid.cells() * Workspace::size(J * MB));  // for each cell [J, MB]: s, then ones

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    alignas(64) float rows[KC * W];
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < blocks(N, KC); ++tile) {
      const int64_t n0 = tile * KC, n = smaller(KC, N - n0);
      for (int64_t r0 = 0; r0 < R; r0 += W) {
        const int64_t width = smaller(W, R - r0);
        const Matrix b{(void*)element(u.b.data, u.b.dtype, r0), u.b.ld, u.b.dtype};
        load_adapter<Ranks<T>>(rows, W, b, n0, n, width, Scale{u.scale.data + r0 * u.scale.stride, u.scale.stride});
        transpose(ct + r0 * ld + n0, ld, rows, W, n, width);
      }
      if (J > R) row_to_float(ct + R * ld + n0, element(u.bias.data, u.bias.dtype, n0), u.bias.dtype, n);
      if (n0 + n == N)
        for (int64_t r = 0; r < J; ++r)
          for (int64_t k = N; k < ld; ++k) ct[r * ld + k] = 0.0f;
    }

    alignas(64) float scratch[MB * TILE_LD];
    for (int c = omp_get_thread_num(); c < grid.cells(); c += omp_get_num_threads()) {
      const Cell cell(grid, c);
      float* st = ranks + c * Workspace::size(J * MB);
      for (int64_t i = 0; i < cell.count; ++i) {
        const TileAt t = cell.along_rows(i);
        if (t.k0 == cell.k_begin()) {
          if (R) transpose(st, MB, s + t.m0 * u.s.ld, u.s.ld, t.rows, R);
          if (J > R)
            for (int m = 0; m < t.rows; ++m) st[R * MB + m] = 1.0f;
        }
        NextLines<T> next(y, u.y.ld, cell.along_rows(i + 1));
        add_product(y + t.m0 * u.y.ld + t.k0, u.y.ld, st, ct + t.k0, ld, t.rows, J, t.cols, scratch, next);
      }
    }
  }
  return OK;
}

// ---- grad_up ----

template <class T>
int grad_up(const LoraLinearGradUp& u) {
  const bool wants_t = u.t.data && u.R, wants_db = u.db && u.R, wants_dbias = u.dbias;
  const int64_t M = u.M, N = u.N, R = u.R, J = (wants_db ? R : 0) + (wants_dbias ? 1 : 0);
  const int64_t lanes = wants_t ? round_up(R, W) : 0, ld = round_up(N, W);
  if (!wants_t && J == 0) return OK;
  const T* dy = (const T*)u.dy.data;
  const Ranks<T>* s = (const Ranks<T>*)u.s.data;
  Ranks<T>* t = (Ranks<T>*)u.t.data;
  const int threads = useful_threads(u.threads, (double)M * N * (J + lanes));
  const Grid grid(threads, M, N, J ? (double)N : 0, wants_t ? (double)M : 0);

  Workspace work;
  if (!work.allocate(Workspace::size(N * lanes) + Workspace::size(blocks(M, MB) * J * MB) +
                     Workspace::size(grid.cols * M * lanes) + Workspace::size(grid.rows * J * ld)))
    return OUT_OF_MEMORY;
  float* bt = work.take(N * lanes);                   // [N, lanes]: scale[r] · B[n, r]
  float* st = work.take(blocks(M, MB) * J * MB);      // for each row of tiles [J, MB]: s, then ones
  float* partial = work.take(grid.cols * M * lanes);  // [grid.cols, M, lanes] of t
  float* grad = work.take(grid.rows * J * ld);        // [grid.rows, J, N] of db and dbias

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (wants_t) {
#pragma omp for schedule(static) nowait
      for (int64_t n0 = 0; n0 < N; n0 += KC)
        load_adapter<Ranks<T>>(bt + n0 * lanes, lanes, u.b, n0, smaller(KC, N - n0), R, u.scale);
    }
#pragma omp for schedule(static)
    for (int64_t m0 = 0; m0 < M; m0 += MB) {
      const int64_t rows = smaller(MB, M - m0);
      if (wants_db) transpose(st + m0 * J, MB, s + m0 * u.s.ld, u.s.ld, rows, R);
      if (wants_dbias)
        for (int64_t m = 0; m < rows; ++m) st[m0 * J + (J - 1) * MB + m] = 1.0f;
    }

    alignas(64) float tiles[2][MB * TILE_LD];
    for (int c = omp_get_thread_num(); c < grid.cells(); c += omp_get_num_threads()) {
      const Cell cell(grid, c);
      float *sums = partial + cell.col * M * lanes, *g = grad + cell.row * J * ld;
      for (int64_t i = cell.m_begin() * lanes; i < cell.m_end() * lanes; i += W) store(sums + i, zero());
      for (int64_t j = 0; j < J; ++j)
        for (int64_t n = cell.k_begin(); n < cell.k_end(); n += W) store(g + j * ld + n, zero());
      NextTile<T>(tiles[0], dy, u.dy.ld, cell.along_rows(0)).finish();
      for (int64_t i = 0; i < cell.count; ++i) {
        const TileAt at = cell.along_rows(i);
        const float* tile = tiles[i % 2];  // [rows, cols]
        NextTile<T> next(tiles[(i + 1) % 2], dy, u.dy.ld, cell.along_rows(i + 1));
        if (wants_t)
          tile_gemm<TILE_LD, 1>(sums + at.m0 * lanes, lanes, tile, bt + at.k0 * lanes, lanes, at.rows, at.cols,
                                (int)(lanes / W), next);
        if (J)
          tile_gemm<MB, 1>(g + at.k0, ld, st + at.m0 * J, tile, TILE_LD, J, at.rows, (int)blocks(at.cols, W), next);
        next.finish();
      }
    }
#pragma omp barrier

    if (wants_t) {
#pragma omp for schedule(static) nowait
      for (int64_t m = 0; m < M; ++m) add_parts(t + m * u.t.ld, partial + m * lanes, grid.cols, M * lanes, R);
    }
    if (J) {
      // grad's first part becomes the sum of all; then db[n, r] = scale[r] · grad[r, n]
      alignas(64) float rows[KC * W];
#pragma omp for schedule(static)
      for (int64_t n0 = 0; n0 < N; n0 += KC) {
        const int64_t n = smaller(KC, N - n0);
        for (int64_t j = 0; j < J; ++j) {
          const V scale = set1(wants_db && j < R ? u.scale.data[j * u.scale.stride] : 1.0f);
          for (int64_t k = j * ld + n0; k < j * ld + n0 + n; k += W) {
            V sum = load(grad + k);
            for (int r = 1; r < grid.rows; ++r) sum = add(sum, load(grad + r * J * ld + k));
            store(grad + k, mul(sum, scale));
          }
        }
        for (int64_t r0 = 0; wants_db && r0 < R; r0 += W) {
          const int64_t width = smaller(W, R - r0);
          transpose(rows, W, grad + r0 * ld + n0, ld, width, n);
          for (int64_t k = 0; k < n; ++k)
            row_from_float((void*)element(u.db, u.b.dtype, (n0 + k) * R + r0), u.b.dtype, rows + k * W, width);
        }
        if (wants_dbias)
          row_from_float((void*)element(u.dbias, u.dbias_dtype, n0), u.dbias_dtype, grad + (J - 1) * ld + n0, n);
      }
    }
  }
  return OK;
}

// ---- grad_down ----

template <class T>
int grad_down(const LoraLinearGradDown& d) {
  const Keep mask(d.dropout);
  const Groups groups(d.projections, d.count, (bool)mask);
  const int64_t M = d.M, K = d.K, ld = round_up(K, W);
  int64_t R = 0;
  bool wants_da = false;
  for (int i = 0; i < d.count; ++i) R += d.projections[i].R, wants_da |= d.projections[i].da != nullptr;
  const bool wants_dx = d.dx.data;
  if (R == 0 || (!wants_da && !wants_dx)) return OK;
  const T* x = (const T*)d.x.data;
  const Ranks<T>* t = (const Ranks<T>*)d.t.data;
  T* dx = (T*)d.dx.data;
  const int threads = useful_threads(d.threads, (double)M * K * R * (wants_da + wants_dx));
  const Grid grid(threads, M, K, wants_da ? (double)K : 0, 0);

  Workspace work;
  if (!work.allocate(Workspace::size(wants_dx ? R * ld : 0) + Workspace::size(blocks(M, MB) * R * MB) +
                     Workspace::size(wants_da ? grid.rows * R * ld : 0)))
    return OUT_OF_MEMORY;
  float* a = work.take(wants_dx ? R * ld : 0);                 // [R, K], the projections' ranks one after another
  float* tt = work.take(blocks(M, MB) * R * MB);               // for each row of tiles [R, MB]
  float* grad = work.take(wants_da ? grid.rows * R * ld : 0);  // [grid.rows, R, K]

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    for (int64_t i = 0, r = 0; wants_dx && i < d.count; r += d.projections[i++].R) {
      const Projection& p = d.projections[i];
#pragma omp for schedule(static) nowait
      for (int64_t j = 0; j < p.R; ++j) load_adapter<Ranks<T>>(a + (r + j) * ld, ld, p.a, j, 1, K, Scale{});
    }
#pragma omp for schedule(static)
    for (int64_t m0 = 0; m0 < M; m0 += MB)
      for (int64_t i = 0, r = 0; i < d.count; r += d.projections[i++].R)
        transpose(tt + m0 * R + r * MB, MB, t + m0 * d.t.ld + d.projections[i].column, d.t.ld, smaller(MB, M - m0),
                  d.projections[i].R);

    alignas(64) float tiles[2][MB * TILE_LD], dx_tile[MB * TILE_LD], masked[MB * TILE_LD], product[MB * TILE_LD];
    for (int c = omp_get_thread_num(); c < grid.cells(); c += omp_get_num_threads()) {
      const Cell cell(grid, c);
      float* g = grad + cell.row * R * ld;
      for (int64_t r = 0; wants_da && r < R; ++r)
        for (int64_t k = cell.k_begin(); k < cell.k_end(); k += W) store(g + r * ld + k, zero());
      const auto next_tile = [&](int64_t i) {
        const TileAt at = cell.along_rows(i), none{0, 0, 0, 0};
        return Both<NextTile<T>, NextLines<T>>{{tiles[i % 2], x, d.x.ld, wants_da ? at : none},
                                               {dx, d.dx.ld, wants_dx ? at : none}};
      };
      next_tile(0).first.finish();
      for (int64_t i = 0; i < cell.count; ++i) {
        const TileAt at = cell.along_rows(i);
        const float *tile = tiles[i % 2], *ranks = tt + at.m0 * R;  // [rows, cols], [R, rows]
        const int vecs = (int)blocks(at.cols, W);
        T* out = dx + at.m0 * d.dx.ld + at.k0;
        auto next = next_tile(i + 1);
        if (!mask) {
          if (wants_da) tile_gemm<MB, 1>(g + at.k0, ld, ranks, tile, TILE_LD, R, at.rows, vecs, next);
          if (wants_dx) add_product(out, d.dx.ld, ranks, a + at.k0, ld, at.rows, R, at.cols, product, next);
        } else {
          if (wants_dx) NextTile<T>(dx_tile, dx, d.dx.ld, at).finish();
          for (int j = 0; j < groups.count; ++j) {
            const Group group = groups[j];
            const float *l = ranks + group.offset * MB, *rows_a = a + group.offset * ld + at.k0;
            if (wants_dx) {
              memset(product, 0, sizeof product);
              tile_gemm<1, MB>(product, TILE_LD, l, rows_a, ld, at.rows, group.R, vecs, next);
            }
            mask.tile(at, group.first->index, [&](int64_t k, V keep) {
              if (group.wants_da) store(masked + k, mul(keep, load(tile + k)));
              if (wants_dx) store(dx_tile + k, fma(keep, load(product + k), load(dx_tile + k)));
            });
            if (group.wants_da)
              tile_gemm<MB, 1>(g + group.offset * ld + at.k0, ld, l, masked, TILE_LD, group.R, at.rows, vecs, next);
          }
          if (wants_dx) store_tile(out, d.dx.ld, dx_tile, at.rows, at.cols);
        }
        next.first.finish();
      }
    }
#pragma omp barrier

    for (int64_t i = 0, first = 0; i < d.count; first += d.projections[i++].R) {
      const Projection& p = d.projections[i];
      if (!p.da) continue;
#pragma omp for schedule(static) nowait
      for (int64_t r = 0; r < p.R; ++r) {
        float* sum = grad + (first + r) * ld;
        for (int part = 1; part < grid.rows; ++part)
          for (int64_t k = 0; k < ld; k += W) store(sum + k, add(load(sum + k), load(sum + part * R * ld + k)));
        row_from_float((void*)element(p.da, p.a.dtype, r * K), p.a.dtype, sum, K);
      }
    }
  }
  return OK;
}

// ---- few rows (decoding), base included ----
//
// W is read once, at the speed of memory. Up to W/2 rows of x, vectors lie along k (dot.h); beyond, x is transposed and
// vectors lie along the rows m: the same tiles as in the tall passes, with W in the place of x. Where W is stored [K,
// N], vectors lie along n (columns.h).

constexpr int SMALL_MAX_M = 32;
static_assert(SMALL_MAX_M <= 8 * W, "a row of sums fits on the stack");
static_assert(COLUMNS / SMALL_MAX_M % MB == 0);

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

template <class T>
int small(const LoraLinearSmall& d) {
  const int64_t M = d.M, K = d.K, N = d.N, R = d.R;
  if (M == 0 || N == 0) return OK;
  const bool tall = M > W / 2 && !d.transposed;  // vectors along m
  const int64_t ldx = round_up(K, W), lds = round_up(R, W), lanes = round_up(M, W);
  const T *x = (const T*)d.x.data, *w = (const T*)d.w.data;
  T* y = (T*)d.y.data;
  Ranks<T>* s = (Ranks<T>*)d.s.data;
  const int threads = useful_threads(d.threads, (double)(N + R) * K * M);

  Workspace work;
  if (!work.allocate(Workspace::size(tall ? K * lanes : M * ldx) + Workspace::size(R * ldx) +
                     Workspace::size(tall ? R * lanes : M * lds) + threads * Workspace::size(tall ? 0 : MB * R) +
                     threads * Workspace::size(d.transposed ? COLUMNS : 0)))
    return OUT_OF_MEMORY;
  float* xf = work.take(tall ? K * lanes : M * ldx);  // x: [K, M] if tall, else [M, K]
  float* af = work.take(R * ldx);                     // [R, K]
  float* sf = work.take(tall ? R * lanes : M * lds);  // s: [R, M] if tall, else [M, R]
  float* b_rows = work.take(threads * Workspace::size(tall ? 0 : MB * R));
  float* columns_of = work.take(threads * Workspace::size(d.transposed ? COLUMNS : 0));  // [M, some columns] each

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
      load_adapter<Ranks<T>>(af + r * ldx, ldx, d.a, r, n, K, Scale{});
      if (tall) {
        float* rows = sf + r * lanes;
        for (int64_t i = 0; i < n * lanes; i += W) store(rows + i, zero());
        tile_rows(rows, af + r * ldx, ldx, n, K, xf, lanes);
        round_row<Ranks<T>>(rows, n * lanes);
        transpose(out, MB, rows, lanes, n, M);
      } else {
        dot_rows(out, MB, af + r * ldx, ldx, n, xf, ldx, M, K, nullptr, 0, nullptr, 0);
        for (int64_t m = 0; m < M; ++m) {
          round_row<Ranks<T>>(out + m * MB, n);
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
    const int64_t n_begin = n_part.begin * DOT_N, n_end = smaller(N, n_part.end * DOT_N);
    for (int64_t n0 = n_begin; n0 < n_end; n0 += MB) {
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
          load_adapter<Ranks<T>>(b_tile, TILE_LD, b, n0, n, width,
                                 Scale{d.scale.data + r * d.scale.stride, d.scale.stride});
          tile_gemm<TILE_LD, 1>(sums, lanes, b_tile, sf + r * lanes, lanes, n, width, (int)(lanes / W), none);
        }
        transpose(out, MB, sums, lanes, n, M);
      } else {
        float* b = b_rows + me * Workspace::size(MB * R);
        for (int64_t i = 0; R && i < n; ++i)  // the next block's, while this one streams W
          __builtin_prefetch(element(d.b.data, d.b.dtype, (n0 + MB + i) * d.b.ld), 0, 2);
        if (R) load_adapter<Ranks<T>>(b, R, d.b, n0, n, R, d.scale);
        dot_rows(out, MB, rows, d.w.ld, n, xf, ldx, M, d.transposed ? 0 : K, b, R, sf, lds);
        if (d.transposed) {
          const int64_t wide = COLUMNS / M / MB * MB, at = (n0 - n_begin) % wide;
          float* base = columns_of + me * Workspace::size(COLUMNS);
          if (at == 0) columns(base, wide, w + n0, d.w.ld, smaller(wide, n_end - n0), xf, ldx, M, K);
          for (int64_t m = 0; m < M; ++m)
            for (int64_t i = 0; i < n; ++i) out[m * MB + i] += base[m * wide + at + i];
        }
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

// ---- the table ----

int down_any(const LoraLinearDown& d) { FASTPEFT_BY_DTYPE(down, d, d.x.dtype); }
int up_any(const LoraLinearUp& u) { FASTPEFT_BY_DTYPE(up, u, u.y.dtype); }
int grad_up_any(const LoraLinearGradUp& u) { FASTPEFT_BY_DTYPE(grad_up, u, u.dy.dtype); }
int grad_down_any(const LoraLinearGradDown& d) { FASTPEFT_BY_DTYPE(grad_down, d, d.x.data ? d.x.dtype : d.dx.dtype); }
int small_rows(const LoraLinearSmall& d) { FASTPEFT_BY_DTYPE(small, d, d.x.dtype); }
int small_any(const LoraLinearSmall& all) {
  LoraLinearSmall d = all;  // SMALL_MAX_M rows at a time
  for (int64_t m = 0; m < all.M; m += SMALL_MAX_M) {
    d.M = smaller(SMALL_MAX_M, all.M - m);
    Matrix* const by_row[] = {&d.x, &d.y, &d.s};
    for (Matrix* rows : by_row)
      if (rows->data && m) rows->data = (void*)element(rows->data, rows->dtype, SMALL_MAX_M * rows->ld);
    const int status = small_rows(d);
    if (status) return status;
  }
  return OK;
}

void philox_words(uint64_t seed, uint64_t row, int64_t count, uint32_t projection, uint32_t* out) {
  Philox(seed, projection).row(row, 0, count, [&](int64_t k, U words) {
    memcpy(out + k, &words, (size_t)smaller(W, count - k) * sizeof(uint32_t));
  });
}

}  // namespace

const LoraLinearKernels fastpeft::FASTPEFT_TABLE(lora_linear) = {down_any,      up_any,    grad_up_any,
                                                                 grad_down_any, small_any, philox_words};
