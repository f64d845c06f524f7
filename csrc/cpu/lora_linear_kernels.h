// The passes of lora_linear over tall matrices, for one instruction set. Included by lora_linear_<isa>.cpp.
//
// All are the same small GEMM on fp32 tiles in L1 (tile.h), with a different operand resident:
//   down       P[m, r] += X[m, k]  · Aᵀ[k, r]     vector along r
//   up         Y[m, n] += Sᵀ[r, m] · C[r, n]      vector along n, C = (scale·B)ᵀ; the bias is one more rank with s = 1
//   grad_up    P[m, r] += dY[m, n] · B'[n, r]  and  G[r, n] += Sᵀ[r, m] · dY[m, n];  dbias is one more rank with s = 1
//   grad_down  G[r, k] += Tᵀ[r, m] · X[m, k]   and  dX[m, k] += Tᵀ[r, m] · A[r, k]
// Work is cut into a grid of row ranges x column ranges by the number of threads asked for. Sums across the grid go
// through partial results that are added in a fixed order: for a given number of threads results repeat bit for bit.
#pragma once
#include <omp.h>

#include "../lora_linear.h"
#include "tile.h"

namespace {

using namespace fastpeft;

// Below this many multiply-adds one thread is faster than waking the others.
constexpr double PARALLEL_WORK = 2e5;

int useful_threads(int threads, double work) { return threads > 1 && work > PARALLEL_WORK ? threads : 1; }

// rows x cols cells for `threads` threads over row_tiles x col_tiles tiles, with the least cost in partial results:
// row_cost floats for each range of rows, col_cost for each range of columns.
struct Grid {
  int rows = 1, cols = 1;
  Grid(int threads, int64_t row_tiles, int64_t col_tiles, double row_cost, double col_cost) {
    double best = -1;
    for (int c = 1; c <= threads; ++c) {
      const int r = threads / c;
      const double rounds = (double)(blocks(row_tiles, r) * blocks(col_tiles, c)) * r * c;  // >= all tiles; idle ones too
      const double work = rounds * MB * KC * (double)threads / (r * c);
      const double cost = work + (r > 1 ? r * row_cost : 0) + (c > 1 ? c * col_cost : 0);
      if (best < 0 || cost < best) best = cost, rows = r, cols = c;
    }
  }
  int cells() const { return rows * cols; }
};

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
  Groups(const Projection* p, int n, bool dropout) : projections(p), total(n), count(dropout ? n : smaller(n, 1)) {}
  Group operator[](int g) const {
    Group group{projections, total, 0, 0, false};
    if (count == total) group.first = projections + g, group.count = 1;
    for (const Projection* p = projections; p < group.first; ++p) group.offset += p->R;
    for (int i = 0; i < group.count; ++i) group.R += group.first[i].R, group.wants_da |= group.first[i].da != nullptr;
    return group;
  }
};

int64_t total_ranks(const Projection* p, int n) {
  int64_t R = 0;
  for (int i = 0; i < n; ++i) R += p[i].R;
  return R;
}

// lanes[j, r] = adapter[row+j, r] · scale[r] rounded to T, j < rows; lanes' rows are ld apart, zeros from R on
template <class T>
void load_adapter(float* lanes, int64_t ld, const Matrix& adapter, int64_t row, int64_t rows, int64_t R, Scale scale) {
  for (int64_t j = 0; j < rows; ++j) {
    float* out = lanes + j * ld;
    row_to_float(out, element(adapter.data, adapter.dtype, (row + j) * adapter.ld), adapter.dtype, R);
    if (scale.data)
      for (int64_t r = 0; r < R; ++r) out[r] *= scale.data[r * scale.stride];
    round_row<T>(out, R);
    for (int64_t r = R; r < ld; ++r) out[r] = 0.0f;
  }
}

// out[r, m] = s[m, r], m < rows, r < R; out's rows are MB apart
template <class T>
void load_ranks(float* out, const T* s, int64_t ld, int64_t rows, int64_t R) {
  float row[W];
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t r0 = 0; r0 < R; r0 += W) {
      const int n = (int)smaller(W, R - r0);
      convert_row(row, s + m * ld + r0, n);
      for (int r = 0; r < n; ++r) out[(r0 + r) * MB + m] = row[r];
    }
}

// The tile of a matrix that a pass reads: for float rows of whole vectors in place, else a converted copy.
struct Tile {
  const float* data;
  int64_t ld;
};
template <class T>
Tile read_tile(float* scratch, const T* src, int64_t ld, int rows, int cols) {
  load_tile(scratch, src, ld, rows, cols);
  return {scratch, TILE_LD};
}
template <>
Tile read_tile(float* scratch, const float* src, int64_t ld, int rows, int cols) {
  if (cols % W == 0) return {src, ld};
  load_tile(scratch, src, ld, rows, cols);
  return {scratch, TILE_LD};
}

// ---- down ----

template <class T>
int down(const LoraLinearDown& d) {
  const Keep mask(d.dropout);
  const Groups groups(d.projections, d.count, (bool)mask);
  const int64_t M = d.M, K = d.K;
  const T* x = (const T*)d.x.data;
  T* s = (T*)d.s.data;
  int64_t lanes = 0;  // of all groups, each padded to whole vectors
  for (int g = 0; g < groups.count; ++g) lanes += round_up(groups[g].R, W);
  if (lanes == 0) return OK;
  const int threads = useful_threads(d.threads, (double)M * K * lanes);
  const int64_t row_tiles = blocks(M, MB), col_tiles = blocks(K, KC);
  const Grid grid(threads, row_tiles, col_tiles, 0, (double)M * lanes);

  Workspace work;
  if (!work.allocate(Workspace::size(K * lanes) + Workspace::size(grid.cols * M * lanes))) return OUT_OF_MEMORY;
  float* at = work.take(K * lanes);                 // group after group, each [K, its lanes]
  float* partial = work.take(grid.cols * M * lanes);  // [grid.cols, M, lanes]

  // s[m, ...] = Σ_c partial[c, m, ...] for one tile of rows
  const auto finish = [&](int64_t m0, int rows) {
    for (int c = 1; c < grid.cols; ++c)
      for (int64_t i = m0 * lanes; i < (m0 + rows) * lanes; i += W)
        store(partial + i, add(load(partial + i), load(partial + c * M * lanes + i)));
    int64_t lane = 0;
    for (int g = 0; g < groups.count; ++g) {
      const Group group = groups[g];
      int64_t within = lane;
      for (int i = 0; i < group.count; within += group.first[i++].R)
        for (int64_t m = m0; m < m0 + rows; ++m)
          convert_row(s + m * d.s.ld + group.first[i].column, partial + m * lanes + within, group.first[i].R);
      lane += round_up(group.R, W);
    }
  };

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    // at[k, r] = A[r, k]
    alignas(64) float rows[W * KC];
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < col_tiles; ++tile) {
      const int64_t k0 = tile * KC, cols = smaller(KC, K - k0);
      float* block = at;
      for (int g = 0; g < groups.count; ++g) {
        const Group group = groups[g];
        const int64_t ld = round_up(group.R, W);
        int64_t lane = 0;
        for (int i = 0; i < group.count; ++i) {
          const Projection& p = group.first[i];
          for (int64_t r0 = 0; r0 < p.R; r0 += W) {
            const int64_t n = smaller(W, p.R - r0);
            const Matrix a{(void*)element(p.a.data, p.a.dtype, k0), p.a.ld, p.a.dtype};
            load_adapter<T>(rows, KC, a, r0, n, cols, Scale{});
            transpose(block + k0 * ld + lane + r0, ld, rows, KC, n, cols);
          }
          lane += p.R;
        }
        for (int64_t k = k0; k < k0 + cols; ++k)
          for (int64_t r = lane; r < ld; ++r) block[k * ld + r] = 0.0f;
        block += K * ld;
      }
    }

    alignas(64) float tile[MB * TILE_LD], masked[MB * TILE_LD];
    for (int cell = omp_get_thread_num(); cell < grid.cells(); cell += omp_get_num_threads()) {
      const int c = cell % grid.cols;
      const Part row_part(row_tiles, grid.rows, cell / grid.cols), col_part(col_tiles, grid.cols, c);
      for (int64_t i = row_part.begin; i < row_part.end; ++i) {
        const int64_t m0 = i * MB;
        const int rows = (int)smaller(MB, M - m0);
        float* p = partial + (c * M + m0) * lanes;
        memset(p, 0, (size_t)(rows * lanes) * sizeof(float));
        for (int64_t k0 = col_part.begin * KC; k0 < smaller(K, col_part.end * KC); k0 += KC) {
          const int cols = (int)smaller(KC, K - k0);
          load_tile(tile, x + m0 * d.x.ld + k0, d.x.ld, rows, cols);  // [rows, cols]
          const float* block = at;
          int64_t lane = 0;
          for (int g = 0; g < groups.count; ++g) {
            const int64_t ld = round_up(groups[g].R, W);
            if (mask) {
              mask.tile(masked, m0, rows, k0, cols, K, groups[g].first->index);
              for (int m = 0; m < rows; ++m)
                for (int k = m * TILE_LD; k < m * TILE_LD + cols; k += W)
                  store(masked + k, mul(load(masked + k), load(tile + k)));
            }
            tile_gemm<TILE_LD, 1>(p + lane, lanes, mask ? masked : tile, block + k0 * ld, ld, rows, cols, (int)(ld / W));
            block += K * ld, lane += ld;
          }
        }
        if (grid.cols == 1) finish(m0, rows);
      }
    }
    if (grid.cols > 1) {
#pragma omp barrier
#pragma omp for schedule(static)
      for (int64_t i = 0; i < row_tiles; ++i) finish(i * MB, (int)smaller(MB, M - i * MB));
    }
  }
  return OK;
}

// ---- up ----

template <class T>
int up(const LoraLinearUp& u) {
  const int64_t M = u.M, N = u.N, R = u.R, J = R + (u.bias.data ? 1 : 0);
  if (J == 0) return OK;
  T* y = (T*)u.y.data;
  const T* s = (const T*)u.s.data;
  const int threads = useful_threads(u.threads, (double)M * N * J);
  const int64_t row_tiles = blocks(M, MB), col_tiles = blocks(N, KC), ld = round_up(N, W);
  const Grid grid(threads, row_tiles, col_tiles, 0, 0);

  Workspace work;
  if (!work.allocate(Workspace::size(J * ld) + grid.cells() * Workspace::size(J * MB))) return OUT_OF_MEMORY;
  float* ct = work.take(J * ld);                                     // [J, N]: scale[r] · B[n, r], then the bias
  float* ranks = work.take(grid.cells() * Workspace::size(J * MB));  // for each cell [J, MB]: s, then ones

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    alignas(64) float rows[KC * W];
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < col_tiles; ++tile) {
      const int64_t n0 = tile * KC, n = smaller(KC, N - n0);
      for (int64_t r0 = 0; r0 < R; r0 += W) {
        const int64_t width = smaller(W, R - r0);
        const Matrix b{(void*)element(u.b.data, u.b.dtype, r0), u.b.ld, u.b.dtype};
        load_adapter<T>(rows, W, b, n0, n, width, Scale{u.scale.data + r0 * u.scale.stride, u.scale.stride});
        transpose(ct + r0 * ld + n0, ld, rows, W, n, width);
      }
      if (J > R) row_to_float(ct + R * ld + n0, element(u.bias.data, u.bias.dtype, n0), u.bias.dtype, n);
      if (n0 + n == N)
        for (int64_t r = 0; r < J; ++r)
          for (int64_t k = N; k < ld; ++k) ct[r * ld + k] = 0.0f;
    }

    alignas(64) float scratch[MB * TILE_LD];
    for (int cell = omp_get_thread_num(); cell < grid.cells(); cell += omp_get_num_threads()) {
      float* st = ranks + cell * Workspace::size(J * MB);
      const Part row_part(row_tiles, grid.rows, cell / grid.cols), col_part(col_tiles, grid.cols, cell % grid.cols);
      for (int64_t i = row_part.begin; i < row_part.end; ++i) {
        const int64_t m0 = i * MB;
        const int rows = (int)smaller(MB, M - m0);
        if (R) load_ranks(st, s + m0 * u.s.ld, u.s.ld, rows, R);
        if (J > R)
          for (int m = 0; m < rows; ++m) st[R * MB + m] = 1.0f;
        for (int64_t n0 = col_part.begin * KC; n0 < smaller(N, col_part.end * KC); n0 += KC) {
          const int cols = (int)smaller(KC, N - n0);
          T* out = y + m0 * u.y.ld + n0;
          const Tile tile = read_tile(scratch, out, u.y.ld, rows, cols);  // [rows, cols]
          tile_gemm<1, MB>((float*)tile.data, tile.ld, st, ct + n0, ld, rows, J, (cols + W - 1) / W);
          if (tile.data == scratch) store_tile(out, u.y.ld, scratch, rows, cols);
        }
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
  const T *dy = (const T*)u.dy.data, *s = (const T*)u.s.data;
  T* t = (T*)u.t.data;
  const int threads = useful_threads(u.threads, (double)M * N * (J + lanes));
  const int64_t row_tiles = blocks(M, MB), col_tiles = blocks(N, KC);
  const Grid grid(threads, row_tiles, col_tiles, (double)J * ld, (double)M * lanes);

  Workspace work;
  if (!work.allocate(Workspace::size(N * lanes) + Workspace::size(row_tiles * J * MB) +
                     Workspace::size(grid.cols * M * lanes) + Workspace::size(grid.rows * J * ld)))
    return OUT_OF_MEMORY;
  float* bt = work.take(N * lanes);                   // [N, lanes]: scale[r] · B[n, r]
  float* st = work.take(row_tiles * J * MB);          // tile after tile, [J, MB]: s, then ones
  float* partial = work.take(grid.cols * M * lanes);  // [grid.cols, M, lanes] of t
  float* grad = work.take(grid.rows * J * ld);        // [grid.rows, J, N] of db and dbias

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (wants_t) {
#pragma omp for schedule(static) nowait
      for (int64_t tile = 0; tile < col_tiles; ++tile)
        load_adapter<T>(bt + tile * KC * lanes, lanes, u.b, tile * KC, smaller(KC, N - tile * KC), R, u.scale);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < row_tiles; ++i) {
      const int64_t rows = smaller(MB, M - i * MB);
      float* out = st + i * J * MB;
      if (wants_db) load_ranks(out, s + i * MB * u.s.ld, u.s.ld, rows, R);
      if (wants_dbias)
        for (int64_t m = 0; m < rows; ++m) out[(J - 1) * MB + m] = 1.0f;
    }

    alignas(64) float scratch[MB * TILE_LD];
    for (int cell = omp_get_thread_num(); cell < grid.cells(); cell += omp_get_num_threads()) {
      const int r = cell / grid.cols, c = cell % grid.cols;
      const Part row_part(row_tiles, grid.rows, r), col_part(col_tiles, grid.cols, c);
      const int64_t m_begin = row_part.begin * MB, m_end = smaller(M, row_part.end * MB);
      if (m_begin < m_end)
        memset(partial + (c * M + m_begin) * lanes, 0, (size_t)((m_end - m_begin) * lanes) * sizeof(float));
      for (int64_t n0 = col_part.begin * KC; n0 < smaller(N, col_part.end * KC); n0 += KC) {
        const int cols = (int)smaller(KC, N - n0), vecs = (cols + W - 1) / W;
        float* g = grad + r * J * ld + n0;
        for (int64_t j = 0; j < J; ++j) memset(g + j * ld, 0, (size_t)(vecs * W) * sizeof(float));
        for (int64_t m0 = m_begin; m0 < m_end; m0 += MB) {
          const int rows = (int)smaller(MB, M - m0);
          const T* src = dy + m0 * u.dy.ld + n0;
          load_tile(scratch, src, u.dy.ld, rows, cols);  // [rows, cols]
          if (wants_t)
            tile_gemm<TILE_LD, 1>(partial + (c * M + m0) * lanes, lanes, scratch, bt + n0 * lanes, lanes, rows, cols,
                                  (int)(lanes / W));
          if (J) tile_gemm<MB, 1>(g, ld, st + m0 * J, scratch, TILE_LD, J, rows, vecs);
        }
      }
    }
#pragma omp barrier

    if (wants_t) {
#pragma omp for schedule(static) nowait
      for (int64_t m = 0; m < M; ++m) {
        float* row = partial + m * lanes;
        for (int c = 1; c < grid.cols; ++c)
          for (int64_t r = 0; r < lanes; r += W) store(row + r, add(load(row + r), load(row + c * M * lanes + r)));
        convert_row(t + m * u.t.ld, row, R);
      }
    }
    if (J) {
      // grad's first part becomes the sum of all; then db[n, r] = scale[r] · grad[r, n]
      alignas(64) float rows[KC * W];
#pragma omp for schedule(static)
      for (int64_t tile = 0; tile < col_tiles; ++tile) {
        const int64_t n0 = tile * KC, n = smaller(KC, N - n0);
        for (int64_t j = 0; j < J; ++j) {
          const V scale = wants_db && j < R ? set1(u.scale.data[j * u.scale.stride]) : set1(1.0f);
          for (int64_t k = n0; k < n0 + n; k += W) {
            V sum = load(grad + j * ld + k);
            for (int r = 1; r < grid.rows; ++r) sum = add(sum, load(grad + (r * J + j) * ld + k));
            store(grad + j * ld + k, mul(sum, scale));
          }
        }
        if (wants_db)
          for (int64_t r0 = 0; r0 < R; r0 += W) {
            const int64_t ranks = smaller(W, R - r0);
            transpose(rows, W, grad + r0 * ld + n0, ld, ranks, n);
            for (int64_t k = 0; k < n; ++k)
              row_from_float((void*)element(u.db, u.b.dtype, (n0 + k) * R + r0), u.b.dtype, rows + k * W, ranks);
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
  const int64_t M = d.M, K = d.K, R = total_ranks(d.projections, d.count), ld = round_up(K, W);
  bool wants_da = false;
  for (int i = 0; i < d.count; ++i) wants_da |= d.projections[i].da != nullptr;
  const bool wants_dx = d.dx.data;
  if (!wants_da && !wants_dx) return OK;
  const T *x = (const T*)d.x.data, *t = (const T*)d.t.data;
  T* dx = (T*)d.dx.data;
  const int threads = useful_threads(d.threads, (double)M * K * R * (wants_da + wants_dx));
  const int64_t row_tiles = blocks(M, MB), col_tiles = blocks(K, KC);
  const Grid grid(threads, row_tiles, col_tiles, wants_da ? (double)R * ld : 0, 0);

  Workspace work;
  if (!work.allocate(Workspace::size(wants_dx ? R * ld : 0) + Workspace::size(row_tiles * R * MB) +
                     Workspace::size(wants_da ? grid.rows * R * ld : 0)))
    return OUT_OF_MEMORY;
  float* a = work.take(wants_dx ? R * ld : 0);                  // [R, K], the projections' ranks one after another
  float* tt = work.take(row_tiles * R * MB);                    // tile after tile, [R, MB]
  float* grad = work.take(wants_da ? grid.rows * R * ld : 0);  // [grid.rows, R, K]

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    for (int64_t i = 0, r = 0; wants_dx && i < d.count; r += d.projections[i++].R) {
      const Projection& p = d.projections[i];
#pragma omp for schedule(static) nowait
      for (int64_t j = 0; j < p.R; ++j) load_adapter<T>(a + (r + j) * ld, ld, p.a, j, 1, K, Scale{});
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < row_tiles; ++i)
      for (int64_t j = 0, r = 0; j < d.count; r += d.projections[j++].R)
        load_ranks(tt + (i * R + r) * MB, t + i * MB * d.t.ld + d.projections[j].column, d.t.ld, smaller(MB, M - i * MB),
                   d.projections[j].R);

    alignas(64) float x_scratch[MB * TILE_LD], dx_scratch[MB * TILE_LD], kept[MB * TILE_LD], masked[MB * TILE_LD];
    for (int cell = omp_get_thread_num(); cell < grid.cells(); cell += omp_get_num_threads()) {
      const int part = cell / grid.cols;
      const Part row_part(row_tiles, grid.rows, part), col_part(col_tiles, grid.cols, cell % grid.cols);
      for (int64_t k0 = col_part.begin * KC; k0 < smaller(K, col_part.end * KC); k0 += KC) {
        const int cols = (int)smaller(KC, K - k0), vecs = (cols + W - 1) / W;
        float* g = grad + part * R * ld + k0;
        for (int64_t r = 0; wants_da && r < R; ++r) memset(g + r * ld, 0, (size_t)(vecs * W) * sizeof(float));
        for (int64_t m0 = row_part.begin * MB; m0 < smaller(M, row_part.end * MB); m0 += MB) {
          const int rows = (int)smaller(MB, M - m0);
          Tile xt{}, dxt{};
          if (wants_da) xt = read_tile(x_scratch, x + m0 * d.x.ld + k0, d.x.ld, rows, cols);  // [rows, cols]
          if (wants_dx) dxt = read_tile(dx_scratch, dx + m0 * d.dx.ld + k0, d.dx.ld, rows, cols);
          for (int i = 0; i < groups.count; ++i) {
            const Group group = groups[i];
            const float* ranks = tt + m0 * R + group.offset * MB;  // [group.R, rows]
            const float* rows_a = a + group.offset * ld + k0;
            if (!mask) {
              if (wants_da) tile_gemm<MB, 1>(g, ld, ranks, xt.data, xt.ld, R, rows, vecs);
              if (wants_dx) tile_gemm<1, MB>((float*)dxt.data, dxt.ld, ranks, rows_a, ld, rows, R, vecs);
              continue;
            }
            mask.tile(kept, m0, rows, k0, cols, K, group.first->index);
            if (group.wants_da) {
              for (int m = 0; m < rows; ++m)
                for (int k = 0; k < vecs * W; k += W)
                  store(masked + m * TILE_LD + k, mul(load(xt.data + m * xt.ld + k), load(kept + m * TILE_LD + k)));
              tile_gemm<MB, 1>(g + group.offset * ld, ld, ranks, masked, TILE_LD, group.R, rows, vecs);
            }
            if (wants_dx) {
              memset(masked, 0, sizeof masked);
              tile_gemm<1, MB>(masked, TILE_LD, ranks, rows_a, ld, rows, group.R, vecs);
              for (int m = 0; m < rows; ++m)
                for (int k = 0; k < vecs * W; k += W) {
                  float* out = (float*)dxt.data + m * dxt.ld + k;
                  store(out, fma(load(masked + m * TILE_LD + k), load(kept + m * TILE_LD + k), load(out)));
                }
            }
          }
          if (wants_dx && dxt.data == dx_scratch) store_tile(dx + m0 * d.dx.ld + k0, d.dx.ld, dx_scratch, rows, cols);
        }
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

}  // namespace
