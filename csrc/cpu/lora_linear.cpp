// The CPU kernels of lora_linear, for one instruction set (vec.h).
//
// The passes over tall matrices are one small GEMM on tiles in L1 (tile.h), with a different operand resident:
//   down       P[m, r] += X[m, k]  · Aᵀ[k, r]     vector along r
//   up         Y[m, n] += Sᵀ[r, m] · C[r, n]      vector along n, C = (scale·B)ᵀ; the bias is one more rank with s = 1
//   grad_up    P[m, r] += dY[m, n] · B'[n, r]  and  G[r, n] += Sᵀ[r, m] · dY[m, n];  dbias is one more rank with s = 1
//   grad_down  G[r, k] += Tᵀ[r, m] · X[m, k]   and  dX[m, k] += Tᵀ[r, m] · A[r, k]
// T is the compute dtype, E what tiles are multiplied in: pairs lie along K and N in down and in the t of grad_up,
// across rows m in dA and dB, along the ranks in up and dX. Operands [J, N] and [J, K] lie in panels of KC columns,
// each in one piece: their rows would be a power of two apart, and share a few sets of L1. The threads share a grid of
// row ranges x column ranges; sums across them go through partial results that are added in a fixed order. For a given
// number of threads results repeat bit for bit.
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
  int64_t R;
  bool wants_da;
};

struct Groups {
  const Projection* projections;
  int total, count;
  Groups(const Projection* p, int n, bool dropout) : projections(p), total(n), count(dropout ? n : n > 0) {}
  Group operator[](int g) const {
    Group group{projections, total, 0, false};
    if (count == total) group.first = projections + g, group.count = 1;
    for (int i = 0; i < group.count; ++i) group.R += group.first[i].R, group.wants_da |= group.first[i].da != nullptr;
    return group;
  }
};

// C[m, k] += Σ_j Lᵀ[j, m] · B[j, k], rounded once, k < cols; L's rows are MB apart, B's KC
template <class T, class E, class Next>
void add_product(T* c, int64_t ldc, const E* l, const E* b, int rows, int64_t J, int cols, float* scratch, Next& next) {
  const int whole = IS_FLOAT<T> || J <= MAX_SUM ? cols / W : 0;  // vectors that need no fp32 copy
  if (whole) tile_gemm<1, MB>(c, ldc, l, b, KC, rows, J, whole, next);
  const int done = whole * W;
  if (done == cols) return;
  NextTile<T>(scratch, c + done, ldc, {0, 0, rows, cols - done}).finish();
  tile_gemm<1, MB>(scratch, TILE_LD, l, b + done, KC, rows, J, (cols - done + W - 1) / W, next);
  store_tile(c + done, ldc, scratch, rows, cols - done);
}

// out[m, r] = factor · Σ_c partial[c, m, lane + r] rounded to T, for one row m; partial is [parts, M, lanes]
template <class T>
void add_parts(T* out, const float* partial, int parts, int64_t stride, int64_t R, float factor) {
  float sums[W];
  for (int64_t r = 0; r < R; r += W) {
    V sum = load(partial + r);
    for (int c = 1; c < parts; ++c) sum = add(sum, load(partial + c * stride + r));
    store(sums, mul(sum, set1(factor)));
    convert_row(out + r, sums, smaller(W, R - r));
  }
}

// out[r, m / TERMS] = the elements across the rows m of s[m, r], m < rows <= MB; out's rows are MB / TERMS apart
template <class E, class S>
void ranks_across(E* out, const S* s, int64_t ld, int64_t rows, int64_t R) {
  if constexpr (TERMS<E> == 1) {
    transpose(out, MB, s, ld, rows, R);
  } else {
    constexpr int64_t PAIRS = MB / 2;
    alignas(64) E across[PAIRS * KC];
    for (int64_t r = 0; r < R; r += KC) {
      const int64_t n = smaller(KC, R - r);
      zip_rows(across, KC, s + r, ld, rows, n);
      transpose((float*)(out + r * PAIRS), PAIRS, (const float*)across, KC, blocks(rows, 2), n);
    }
  }
}

// A bias is a further rank with s = 1: the element of that s, and its row of b, n <= KC.
template <class E>
E one_of() {
  if constexpr (TERMS<E> == 1)
    return 1.0f;
  else
    return {0x3f803f80u};
}
void bias_row(float* b_row, const float* bias, int64_t n) { memcpy(b_row, bias, (size_t)n * sizeof(float)); }
#ifdef FASTPEFT_DOT
void bias_row(bf16x2* b_row, const float* bias, int64_t n) {  // in two parts: 16 bits of a float's 24
  alignas(64) bf16 parts[2 * KC];
  float rest[KC];
  convert_row(parts, bias, n);
  convert_row(rest, parts, n);
  for (int64_t i = 0; i < n; ++i) {
    const float left = bias[i] - rest[i];
    rest[i] = left == left ? left : 0.0f;  // none of what is not finite
  }
  convert_row(parts + KC, rest, n);
  zip_rows(b_row, KC, parts, KC, 2, n);
}
#endif

// the elements across a masked tile's rows, from those along them
void across_of(Tile<float>&, int, int) {}
#ifdef FASTPEFT_DOT
void across_of(Tile<bf16x2>& tile, int rows, int cols) {
  zip_rows(tile.across, TILE_LD, (const bf16*)tile.along, 2 * ALONG_LD<bf16x2>, rows, cols);
}
#endif

// out[r / TERMS, m] = the elements across the rows of rows[r, m], which are rounded already; both `lanes` wide
void rows_across(float* out, const float* rows, int64_t R, int64_t lanes) {
  memcpy(out, rows, (size_t)(R * lanes) * sizeof(float));
}
#ifdef FASTPEFT_DOT
void rows_across(bf16x2* out, const float* rows, int64_t R, int64_t lanes) {
  for (int64_t r = 0; r < R; r += 2, rows += 2 * lanes, out += lanes)
    for (int64_t m = 0; m < lanes; m += W)
      zip_rounded(out + m, load(rows + m), r + 1 < R ? load(rows + lanes + m) : zero());
}
#endif

// The factor that a dropout mask leaves to be applied to a sum: pairs are masked by 0 or 1, which is exact.
template <class E>
float left_of(Keep& mask) {
  if (TERMS<E> == 1 || !mask) return 1.0f;
  const float factor = mask.value;
  mask.value = 1.0f;
  return factor;
}

// ---- down ----

template <class T, class E = float>
int down(const LoraLinearDown& d) {
  Keep mask(d.dropout);
  const float factor = left_of<E>(mask);
  const Groups groups(d.projections, d.count, (bool)mask);
  const int64_t M = d.M, K = d.K, depth = blocks(K, TERMS<E>);
  const T* x = (const T*)d.x.data;
  Ranks<T>* s = (Ranks<T>*)d.s.data;
  int64_t lanes = 0;  // of all groups, each padded to whole vectors
  for (int g = 0; g < groups.count; ++g) lanes += round_up(groups[g].R, W);
  if (lanes == 0) return OK;
  const int threads = d.way.team((double)M * K * lanes);
  const Grid grid(threads, M, K, 0, (double)M);

  Workspace work;
  if (!work.allocate(Workspace::size(depth * lanes) + Workspace::size(grid.cols * M * lanes + W))) return OUT_OF_MEMORY;
  E* at = work.take<E>(depth * lanes);                    // group after group, each [K / TERMS, its lanes]
  float* partial = work.take(grid.cols * M * lanes + W);  // [grid.cols, M, lanes] of s; read by whole vectors

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    // at[k, r] = A[r, k]
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < blocks(K, KC); ++tile) {
      const int64_t k0 = tile * KC, cols = smaller(KC, K - k0), k_end = k0 / TERMS<E> + blocks(cols, TERMS<E>);
      E* block = at;
      for (int g = 0; g < groups.count; ++g) {
        const Group group = groups[g];
        const int64_t ld = round_up(group.R, W);
        int64_t lane = 0;
        for (int i = 0; i < group.count; lane += group.first[i++].R) {
          const Projection& p = group.first[i];
          for (int64_t r0 = 0; r0 < p.R; r0 += KC)
            load_adapter_along<Ranks<T>>(block + k0 / TERMS<E> * ld + lane + r0, ld, p.a, r0, smaller(KC, p.R - r0), k0,
                                         cols, Scale{});
        }
        for (int64_t k = k0 / TERMS<E>; k < k_end; ++k)
          for (int64_t r = lane; r < ld; ++r) block[k * ld + r] = E{};
        block += depth * ld;
      }
    }

    Tile<E> tiles[2], masked;
    for (int c = omp_get_thread_num(); c < grid.cells(); c += omp_get_num_threads()) {
      const Cell cell(grid, c);
      float* sums = partial + cell.col * M * lanes;
      for (int64_t i = cell.m_begin() * lanes; i < cell.m_end() * lanes; i += W) store(sums + i, zero());
      const auto next_tile = [&](int64_t i) {
        return NextTile<T, E>(tiles[i % 2], true, false, x, d.x.ld, cell.in_strips(i));
      };
      next_tile(0).finish();
      for (int64_t i = 0; i < cell.count; ++i) {
        const TileAt t = cell.in_strips(i);
        const E* tile = tiles[i % 2].along;
        auto next = next_tile(i + 1);
        const E* block = at;
        float* p = sums + t.m0 * lanes;
        for (int g = 0; g < groups.count; ++g) {
          const int64_t ld = round_up(groups[g].R, W);
          if (mask)
            mask.tile(t, groups[g].first->index, [&](int m, int64_t k, V keep) {
              const int64_t at_k = m * ALONG_LD<E> * TERMS<E> + k;
              store((Number<E>*)masked.along + at_k, mul(keep, load((const Number<E>*)tile + at_k)));
            });
          tile_gemm<ALONG_LD<E>, 1>(p, lanes, mask ? masked.along : tile, block + t.k0 / TERMS<E> * ld, ld, t.rows,
                                    blocks(t.cols, TERMS<E>), (int)(ld / W), next);
          block += depth * ld, p += ld;
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
          add_parts(s + m * d.s.ld + group.first[i].column, row + lane, grid.cols, M * lanes, group.first[i].R, factor);
        row += round_up(group.R, W);
      }
    }
  }
  return OK;
}

// ---- up ----

template <class T, class E = float>
int up(const LoraLinearUp& u) {
  const int64_t M = u.M, N = u.N, R = u.R, ranks = blocks(R, TERMS<E>), J = ranks + (u.bias.data ? 1 : 0);
  if (J == 0) return OK;
  T* y = (T*)u.y.data;
  const Ranks<T>* s = (const Ranks<T>*)u.s.data;
  const int threads = u.way.team((double)M * N * J * TERMS<E>);
  const Grid grid(threads, M, N, 0, 0);

  Workspace work;
  if (!work.allocate(Workspace::size(J * round_up(N, KC)) + grid.cells() * Workspace::size(J * MB)))
    return OUT_OF_MEMORY;
  E* ct = work.take<E>(J * round_up(N, KC));  // panels [J, KC]: scale[r] · B[n, r], then the bias
  E* s_ranks = work.take<E>(grid.cells() * Workspace::size(J * MB));  // for each cell [J, MB]: s, then ones

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t n0 = 0; n0 < N; n0 += KC) {
      const int64_t n = smaller(KC, N - n0);
      E* panel = ct + n0 * J;
      if (n < KC) memset((void*)panel, 0, (size_t)(J * KC) * sizeof(E));
      load_adapter_along<Ranks<T>>(panel, KC, u.b, n0, n, 0, R, u.scale);
      if (J > ranks) {
        alignas(64) float bias[KC];
        row_to_float(bias, element(u.bias.data, u.bias.dtype, n0), u.bias.dtype, n);
        bias_row(panel + ranks * KC, bias, n);
      }
    }

    alignas(64) float scratch[MB * TILE_LD];
    for (int c = omp_get_thread_num(); c < grid.cells(); c += omp_get_num_threads()) {
      const Cell cell(grid, c);
      E* st = s_ranks + c * Workspace::size(J * MB);
      int64_t rows_of_st = -1;
      for (int64_t i = 0; i < cell.count; ++i) {
        const TileAt t = cell.in_strips(i);
        if (t.m0 != rows_of_st) {
          rows_of_st = t.m0;
          if (R) transpose(st, MB, s + t.m0 * u.s.ld, u.s.ld, t.rows, R);
          if (J > ranks)
            for (int m = 0; m < t.rows; ++m) st[ranks * MB + m] = one_of<E>();
        }
        NextLines<T> next(y, u.y.ld, cell.in_strips(i + 1));
        add_product(y + t.m0 * u.y.ld + t.k0, u.y.ld, st, ct + t.k0 * J, t.rows, J, t.cols, scratch, next);
      }
    }
  }
  return OK;
}

// ---- grad_up ----

template <class T, class E = float>
int grad_up(const LoraLinearGradUp& u) {
  const bool wants_t = u.t.data && u.R, wants_db = u.db && u.R, wants_dbias = u.dbias;
  const int64_t M = u.M, N = u.N, R = u.R, J = (wants_db ? R : 0) + (wants_dbias ? 1 : 0);
  const int64_t lanes = wants_t ? round_up(R, W) : 0, whole = round_up(N, KC);
  constexpr int64_t DEPTH = MB / TERMS<E>;  // of a tile's rows
  if (!wants_t && J == 0) return OK;
  const T* dy = (const T*)u.dy.data;
  const Ranks<T>* s = (const Ranks<T>*)u.s.data;
  Ranks<T>* t = (Ranks<T>*)u.t.data;
  const int threads = u.way.team((double)M * N * (J + lanes));
  const Grid grid(threads, M, N, J ? (double)N : 0, wants_t ? (double)M : 0);

  Workspace work;
  if (!work.allocate(Workspace::size(whole / TERMS<E> * lanes) + Workspace::size(blocks(M, MB) * J * DEPTH) +
                     Workspace::size(grid.cols * M * lanes) + Workspace::size(grid.rows * J * whole)))
    return OUT_OF_MEMORY;
  E* bt = work.take<E>(whole / TERMS<E> * lanes);     // [N / TERMS, lanes]: scale[r] · B[n, r]
  E* st = work.take<E>(blocks(M, MB) * J * DEPTH);    // for each row of tiles [J, MB / TERMS]: s, then ones
  float* partial = work.take(grid.cols * M * lanes);  // [grid.cols, M, lanes] of t
  float* grad = work.take(grid.rows * J * whole);     // [grid.rows], panels [J, KC] of db and dbias

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (wants_t) {
#pragma omp for schedule(static) nowait
      for (int64_t n0 = 0; n0 < N; n0 += KC)
        load_adapter_across<Ranks<T>>(bt + n0 / TERMS<E> * lanes, lanes, u.b, n0, smaller(KC, N - n0), R, u.scale);
    }
#pragma omp for schedule(static)
    for (int64_t m0 = 0; m0 < M; m0 += MB) {
      E* of_tile = st + m0 / MB * J * DEPTH;
      if (wants_db) ranks_across(of_tile, s + m0 * u.s.ld, u.s.ld, smaller(MB, M - m0), R);
      if (wants_dbias)
        for (int64_t m = 0; m < DEPTH; ++m) of_tile[(J - 1) * DEPTH + m] = one_of<E>();
    }

    Tile<E> tiles[2];
    for (int c = omp_get_thread_num(); c < grid.cells(); c += omp_get_num_threads()) {
      const Cell cell(grid, c);
      float *sums = partial + cell.col * M * lanes, *g = grad + cell.row * J * whole;
      for (int64_t i = cell.m_begin() * lanes; i < cell.m_end() * lanes; i += W) store(sums + i, zero());
      for (int64_t i = cell.k_begin() * J; i < round_up(cell.k_end(), KC) * J; i += W) store(g + i, zero());
      const auto next_tile = [&](int64_t i) {
        return NextTile<T, E>(tiles[i % 2], wants_t, J > 0, dy, u.dy.ld, cell.in_strips(i));
      };
      next_tile(0).finish();
      for (int64_t i = 0; i < cell.count; ++i) {
        const TileAt at = cell.in_strips(i);
        const Tile<E>& tile = tiles[i % 2];
        auto next = next_tile(i + 1);
        if (wants_t)
          tile_gemm<ALONG_LD<E>, 1>(sums + at.m0 * lanes, lanes, tile.along, bt + at.k0 / TERMS<E> * lanes, lanes,
                                    at.rows, blocks(at.cols, TERMS<E>), (int)(lanes / W), next);
        if (J)
          tile_gemm<DEPTH, 1>(g + at.k0 * J, KC, st + at.m0 / MB * J * DEPTH, tile.across, TILE_LD, J,
                              blocks(at.rows, TERMS<E>), (int)blocks(at.cols, W), next);
        next.finish();
      }
    }
#pragma omp barrier

    if (wants_t) {
#pragma omp for schedule(static) nowait
      for (int64_t m = 0; m < M; ++m) add_parts(t + m * u.t.ld, partial + m * lanes, grid.cols, M * lanes, R, 1.0f);
    }
    if (J) {
      // grad's first part becomes the sum of all; then db[n, r] = scale[r] · grad[r, n]
      alignas(64) float rows[KC * W];
#pragma omp for schedule(static)
      for (int64_t n0 = 0; n0 < N; n0 += KC) {
        const int64_t n = smaller(KC, N - n0);
        float* panel = grad + n0 * J;
        for (int64_t j = 0; j < J; ++j) {
          const V scale = set1(wants_db && j < R ? u.scale.data[j * u.scale.stride] : 1.0f);
          for (int64_t k = j * KC; k < j * KC + n; k += W) {
            V sum = load(panel + k);
            for (int r = 1; r < grid.rows; ++r) sum = add(sum, load(panel + r * J * whole + k));
            store(panel + k, mul(sum, scale));
          }
        }
        for (int64_t r0 = 0; wants_db && r0 < R; r0 += W) {
          const int64_t width = smaller(W, R - r0);
          transpose(rows, W, panel + r0 * KC, KC, width, n);
          for (int64_t k = 0; k < n; ++k)
            row_from_float((void*)element(u.db, u.b.dtype, (n0 + k) * R + r0), u.b.dtype, rows + k * W, width);
        }
        if (wants_dbias)
          row_from_float((void*)element(u.dbias, u.dbias_dtype, n0), u.dbias_dtype, panel + (J - 1) * KC, n);
      }
    }
  }
  return OK;
}

// ---- grad_down ----

template <class T, class E = float>
int grad_down(const LoraLinearGradDown& d) {
  Keep mask(d.dropout);
  const float factor = left_of<E>(mask);
  const Groups groups(d.projections, d.count, (bool)mask);
  const int64_t M = d.M, K = d.K, whole = round_up(K, KC);
  constexpr int64_t DEPTH = MB / TERMS<E>;  // of a tile's rows
  int64_t R = 0, J = 0;                     // ranks, and elements of them: those of a projection begin with one
  bool wants_da = false;
  for (int i = 0; i < d.count; ++i) {
    R += d.projections[i].R, J += blocks(d.projections[i].R, TERMS<E>);
    wants_da |= d.projections[i].da != nullptr;
  }
  const bool wants_dx = d.dx.data;
  if (R == 0 || (!wants_da && !wants_dx)) return OK;
  const T* x = (const T*)d.x.data;
  const Ranks<T>* t = (const Ranks<T>*)d.t.data;
  T* dx = (T*)d.dx.data;
  const int threads = d.way.team((double)M * K * R * (wants_da + wants_dx));
  const Grid grid(threads, M, K, wants_da ? (double)K : 0, 0);
  constexpr bool ONE_T = TERMS<E> == 1;  // a float lies along and across

  Workspace work;
  if (!work.allocate(Workspace::size(wants_dx ? J * whole : 0) + Workspace::size(blocks(M, MB) * J * MB) +
                     Workspace::size(ONE_T ? 0 : blocks(M, MB) * R * DEPTH) +
                     Workspace::size(wants_da ? grid.rows * R * whole : 0)))
    return OUT_OF_MEMORY;
  E* a = work.take<E>(wants_dx ? J * whole : 0);                        // panels [J, KC], a projection after the other
  E* along = work.take<E>(blocks(M, MB) * J * MB);                      // t: for each row of tiles [J, MB]
  E* across = ONE_T ? along : work.take<E>(blocks(M, MB) * R * DEPTH);  // t: for each row of tiles [R, MB / TERMS]
  float* grad = work.take(wants_da ? grid.rows * R * whole : 0);        // [grid.rows], panels [R, KC]

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (wants_dx) {
#pragma omp for schedule(static) nowait
      for (int64_t k0 = 0; k0 < K; k0 += KC) {
        const int64_t cols = smaller(KC, K - k0);
        E* panel = a + k0 * J;
        for (int i = 0; i < d.count; panel += blocks(d.projections[i++].R, TERMS<E>) * KC) {
          const Projection& p = d.projections[i];
          load_adapter_across<Ranks<T>>(panel, KC, columns(p.a, k0), 0, p.R, cols, Scale{});
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t m0 = 0; m0 < M; m0 += MB) {
      E *to_along = along + m0 * J, *to_across = across + m0 / MB * R * DEPTH;
      for (int i = 0; i < d.count; ++i) {
        const Projection& p = d.projections[i];
        const Ranks<T>* from = t + m0 * d.t.ld + p.column;
        transpose(to_along, MB, from, d.t.ld, smaller(MB, M - m0), p.R);
        if (!ONE_T) ranks_across(to_across, from, d.t.ld, smaller(MB, M - m0), p.R);
        to_along += blocks(p.R, TERMS<E>) * MB, to_across += p.R * DEPTH;
      }
    }

    Tile<E> tiles[2], masked;
    alignas(64) float dx_tile[MB * TILE_LD], product[MB * TILE_LD];
    for (int c = omp_get_thread_num(); c < grid.cells(); c += omp_get_num_threads()) {
      const Cell cell(grid, c);
      float* g = grad + cell.row * R * whole;
      for (int64_t i = cell.k_begin() * R; wants_da && i < round_up(cell.k_end(), KC) * R; i += W) store(g + i, zero());
      const auto next_tile = [&](int64_t i) {
        const TileAt at = cell.in_strips(i), none{0, 0, 0, 0};
        return Both<NextTile<T, E>, NextLines<T>>{{tiles[i % 2], (bool)mask, !mask, x, d.x.ld, wants_da ? at : none},
                                                  {dx, d.dx.ld, wants_dx ? at : none}};
      };
      next_tile(0).first.finish();
      for (int64_t i = 0; i < cell.count; ++i) {
        const TileAt at = cell.in_strips(i);
        const Tile<E>& tile = tiles[i % 2];
        const E *t_along = along + at.m0 * J, *t_across = across + at.m0 / MB * R * DEPTH, *rows_a = a + at.k0 * J;
        const int vecs = (int)blocks(at.cols, W);
        const int64_t depth = blocks(at.rows, TERMS<E>);
        float* of_tile = g + at.k0 * R;
        T* out = dx + at.m0 * d.dx.ld + at.k0;
        auto next = next_tile(i + 1);
        if (!mask) {
          if (wants_da) tile_gemm<DEPTH, 1>(of_tile, KC, t_across, tile.across, TILE_LD, R, depth, vecs, next);
          if (wants_dx) add_product(out, d.dx.ld, t_along, rows_a, at.rows, J, at.cols, product, next);
        } else {
          if (wants_dx) NextTile<T>(dx_tile, dx, d.dx.ld, at).finish();
          for (int j = 0; j < groups.count; ++j) {
            const Group group = groups[j];
            const int64_t elements_of = blocks(group.R, TERMS<E>);
            if (wants_dx) {
              memset(product, 0, sizeof product);
              tile_gemm<1, MB>(product, TILE_LD, t_along, rows_a, KC, at.rows, elements_of, vecs, next);
            }
            mask.tile(at, group.first->index, [&](int m, int64_t k, V keep) {
              const int64_t at_k = m * ALONG_LD<E> * TERMS<E> + k;
              if (group.wants_da)
                store((Number<E>*)masked.along + at_k, mul(keep, load((const Number<E>*)tile.along + at_k)));
              float* to = dx_tile + m * TILE_LD + k;
              if (wants_dx) store(to, fma(mul(keep, set1(factor)), load(product + m * TILE_LD + k), load(to)));
            });
            if (group.wants_da) {
              across_of(masked, at.rows, at.cols);
              tile_gemm<DEPTH, 1>(of_tile, KC, t_across, masked.across, TILE_LD, group.R, depth, vecs, next);
            }
            t_along += elements_of * MB, rows_a += elements_of * KC, t_across += group.R * DEPTH;
            of_tile += group.R * KC;
          }
          if (wants_dx) store_tile(out, d.dx.ld, dx_tile, at.rows, at.cols);
        }
        next.first.finish();
      }
    }
#pragma omp barrier

#pragma omp for schedule(static)
    for (int64_t k0 = 0; k0 < (wants_da ? K : 0); k0 += KC) {
      const int64_t cols = smaller(KC, K - k0);
      float* sum = grad + k0 * R;
      for (int i = 0; i < d.count; ++i) {
        const Projection& p = d.projections[i];
        for (int64_t r = 0; r < p.R; ++r, sum += KC) {
          if (!p.da) continue;
          for (int64_t k = 0; k < cols; k += W) {
            V total = load(sum + k);
            for (int part = 1; part < grid.rows; ++part) total = add(total, load(sum + part * R * whole + k));
            store(sum + k, mul(total, set1(factor)));
          }
          row_from_float((void*)element(p.da, p.a.dtype, r * K + k0), p.a.dtype, sum, cols);
        }
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
template <class T, class E>
void tile_rows(float* sums, const T* w, int64_t ldw, int64_t N, int64_t K, const E* xt, int64_t lanes) {
  Tile<E> tiles[2];
  const auto next_tile = [&](int64_t k0, int64_t i) {
    const TileAt at{0, k0, (int)N, (int)smaller(KC, K > k0 ? K - k0 : 0)};
    return NextTile<T, E>(tiles[i % 2], true, false, w, ldw, at);
  };
  next_tile(0, 0).finish();
  for (int64_t k0 = 0, i = 0; k0 < K; k0 += KC, ++i) {
    auto next = next_tile(k0 + KC, i + 1);
    tile_gemm<ALONG_LD<E>, 1>(sums, lanes, tiles[i % 2].along, xt + k0 / TERMS<E> * lanes, lanes, N,
                              blocks(smaller(KC, K - k0), TERMS<E>), (int)(lanes / W), next);
    next.finish();
  }
}

template <class T, class E = float>
int small(const LoraLinearSmall& d) {
  const int64_t M = d.M, K = d.K, N = d.N, R = d.R;
  if (M == 0 || N == 0) return OK;
  const bool tall = M > W / 2 && !d.transposed;  // vectors along m
  const int64_t ldx = round_up(K, W), lds = round_up(R, W), lanes = round_up(M, W);
  const T *x = (const T*)d.x.data, *w = (const T*)d.w.data;
  T* y = (T*)d.y.data;
  Ranks<T>* s = (Ranks<T>*)d.s.data;
  const int threads = d.way.team((double)(N + R) * K * M);
  const int64_t depth_x = tall ? blocks(K, TERMS<E>) * lanes : 0, depth_s = tall ? blocks(R, TERMS<E>) * lanes : 0;

  Workspace work;
  if (!work.allocate(Workspace::size(depth_x) + Workspace::size(depth_s) + Workspace::size(R * ldx) +
                     Workspace::size(tall ? 0 : M * ldx) + Workspace::size(tall ? 0 : M * lds) +
                     threads * Workspace::size(tall ? 0 : MB * R) +
                     threads * Workspace::size(d.transposed ? COLUMNS : 0)))
    return OUT_OF_MEMORY;
  E *xt = work.take<E>(depth_x), *st = work.take<E>(depth_s);  // if tall: x [K / TERMS, M] and s [R / TERMS, M]
  float *xf = work.take(tall ? 0 : M * ldx), *sf = work.take(tall ? 0 : M * lds);  // else: x [M, K] and s [M, R]
  float* af = work.take(R * ldx);                                                  // [R, K], numbers of E if tall
  float* b_rows = work.take(threads * Workspace::size(tall ? 0 : MB * R));
  float* columns_of = work.take(threads * Workspace::size(d.transposed ? COLUMNS : 0));  // [M, some columns] each

  const auto run = [&] {
    const int me = omp_get_thread_num(), team = omp_get_num_threads();
    const Part k_part(blocks(K, W), team, me), n_part(blocks(N, DOT_N), team, me);
    const Part r_part(blocks(R, TERMS<E>), team, me);

    const int64_t k0 = k_part.begin * W, k1 = smaller(K, k_part.end * W);
    if (tall) {
      E* rows = xt + k0 / TERMS<E> * lanes;
      if (k0 < k1) memset((void*)rows, 0, (size_t)(blocks(k1 - k0, TERMS<E>) * lanes) * sizeof(E));
      if (k0 < k1) transpose(rows, lanes, x + k0, d.x.ld, M, k1 - k0);
    } else {
      for (int64_t m = 0; m < M && k0 < k1; ++m) {
        store(xf + m * ldx + (k1 - 1) / W * W, zero());
        convert_row(xf + m * ldx + k0, x + m * d.x.ld + k0, k1 - k0);
      }
    }
#pragma omp barrier

    alignas(64) float out[SMALL_MAX_M * MB], sums[MB * 8 * W];
    // s: this thread's ranks
    const int64_t r_end = smaller(R, r_part.end * TERMS<E>);
    for (int64_t r = r_part.begin * TERMS<E>; r < r_end; r += MB) {
      const int64_t n = smaller(MB, r_end - r);
      if (tall) {
        Number<E>* a = (Number<E>*)(af + r * ldx);
        load_adapter<Ranks<T>>(a, ldx, d.a, r, n, K, Scale{});
        for (int64_t i = 0; i < n * lanes; i += W) store(sums + i, zero());
        tile_rows(sums, a, ldx, n, K, xt, lanes);
        round_row<Ranks<T>>(sums, n * lanes);
        rows_across(st + r / TERMS<E> * lanes, sums, n, lanes);
        transpose(out, MB, sums, lanes, n, M);
      } else {
        load_adapter<Ranks<T>>(af + r * ldx, ldx, d.a, r, n, K, Scale{});
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
        tile_rows(sums, rows, d.w.ld, n, K, xt, lanes);
        Tile<E> b_tile;
        NoTile none;
        for (int64_t r = 0; r < R; r += KC) {
          const int64_t width = smaller(KC, R - r);
          load_adapter<Ranks<T>>((Number<E>*)b_tile.along, ALONG_LD<E> * TERMS<E>, columns(d.b, r), n0, n, width,
                                 columns(d.scale, r));
          tile_gemm<ALONG_LD<E>, 1>(sums, lanes, b_tile.along, st + r / TERMS<E> * lanes, lanes, n,
                                    blocks(width, TERMS<E>), (int)(lanes / W), none);
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

int down_any(const LoraLinearDown& d) { FASTPEFT_BY_ELEMENT(down, d, d.x.dtype); }
int up_any(const LoraLinearUp& u) { FASTPEFT_BY_ELEMENT(up, u, u.y.dtype); }
int grad_up_any(const LoraLinearGradUp& u) { FASTPEFT_BY_ELEMENT(grad_up, u, u.dy.dtype); }
int grad_down_any(const LoraLinearGradDown& d) { FASTPEFT_BY_ELEMENT(grad_down, d, d.x.data ? d.x.dtype : d.dx.dtype); }
int small_rows(const LoraLinearSmall& d) { FASTPEFT_BY_ELEMENT(small, d, d.x.dtype); }
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
