// What every native op is composed of: rows and tiles in the elements that they are multiplied in, one small GEMM on
// tiles that lie in L1, and the dropout mask of a tile.
//
// An element E is a float, or a pair of bf16 (bf16x2) for the dot product of pairs: two terms of the sum, so that the
// operands come "along" (two neighbours in a row) or "across" (one under the other in two rows). Sums are fp32.
#pragma once
#include <stdlib.h>

#include "../philox.h"
#include "vec.h"

namespace {

// A tile is MB rows x KC columns of fp32, two of them in L1 (10 KB each; 16x256, 32x128 and 64x128 were slower), its
// rows TILE_LD apart (16 more than KC: rows that are a power of two apart share few cache sets).
constexpr int MB = 32, KC = 64, TILE_LD = KC + 16;
static_assert(KC % (2 * W) == 0 && MB % 2 == 0);

FP_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
FP_INLINE int64_t blocks(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
FP_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
constexpr bool IS_FLOAT = false;
template <>
constexpr bool IS_FLOAT<float> = true;

// ---- rows ----

// dst[i] = src[i] from one element type to another, i < n; one of the two is float
template <class D, class S>
void convert_row(D* dst, const S* src, int64_t n) {
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) store2(dst + i, load(src + i), load(src + i + W));
  for (; i + W <= n; i += W) store(dst + i, load(src + i));
  if (i < n) store_partial(dst + i, load_partial(src + i, (int)(n - i)), (int)(n - i));
}

// row[i] rounded to T, i < n
template <class T>
void round_row(float* row, int64_t n) {
  if (IS_FLOAT<T>) return;
  T rounded[W];
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    store(rounded, load(row + i));
    store(row + i, load(rounded));
  }
  if (i == n) return;
  store_partial(rounded, load_partial(row + i, (int)(n - i)), (int)(n - i));
  store_partial(row + i, load_partial(rounded, (int)(n - i)), (int)(n - i));
}

// the same where the element type is known at run time only: adapters, biases, their gradients
FP_INLINE const void* element(const void* p, int dtype, int64_t i) {
  return (const char*)p + i * fastpeft::size_of(dtype);
}
void row_to_float(float* dst, const void* src, int dtype, int64_t n) {
  if (dtype == fastpeft::FLOAT32) return convert_row(dst, (const float*)src, n);
  if (dtype == fastpeft::BFLOAT16) return convert_row(dst, (const bf16*)src, n);
  convert_row(dst, (const f16*)src, n);
}
inline void row_from_float(void* dst, int dtype, const float* src, int64_t n) {
  if (dtype == fastpeft::FLOAT32) return convert_row((float*)dst, src, n);
  if (dtype == fastpeft::BFLOAT16) return convert_row((bf16*)dst, src, n);
  convert_row((f16*)dst, src, n);
}

// ---- tiles ----

template <class T>
void store_tile(T* dst, int64_t ld, const float* tile, int rows, int cols) {
  for (int m = 0; m < rows; ++m) convert_row(dst + m * ld, tile + m * TILE_LD, cols);
}

// W elements along a row, as the bits of a vector: of n <= W TERMS numbers, zeros behind them
template <class E, class T>
FP_INLINE V elements(const T* row, int64_t n) {
#ifdef FASTPEFT_DOT
  if constexpr (TERMS<E> == 2) return bits(load_pairs(row, (int)n));
#endif
  return n >= W ? load(row) : load_partial(row, (int)n);
}

// out[c, r] = the elements along in[r, c], r < rows, c < cols (numbers)
template <class E, class T>
void transpose(E* out, int64_t ld_out, const T* in, int64_t ld_in, int64_t rows, int64_t cols) {
  constexpr int64_t SOME = W * TERMS<E>;
  for (int64_t r0 = 0; r0 < rows; r0 += W)
    for (int64_t c0 = 0; c0 < cols; c0 += SOME) {
      const int nr = (int)smaller(W, rows - r0);
      const int64_t nc = smaller(SOME, cols - c0);
      const T* src = in + r0 * ld_in + c0;
      float* dst = (float*)(out + c0 / TERMS<E> * ld_out + r0);
      V block[W];
      for (int r = 0; r < W; ++r) block[r] = r >= nr ? zero() : elements<E>(src + r * ld_in, nc);
      transpose_block(block);
      for (int c = 0; c < blocks(nc, TERMS<E>); ++c)
        if (nr == W)
          store(dst + c * ld_out, block[c]);
        else
          store_partial(dst + c * ld_out, block[c], nr);
    }
}

#ifdef FASTPEFT_DOT
// out[r / TERMS, c] = the elements across rows r of in[r, c], r < rows, c < cols, zeros up to a multiple of W
FP_INLINE void zip_rows(bf16x2* out, int64_t ld_out, const bf16* in, int64_t ld_in, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; r += 2, out += ld_out, in += 2 * ld_in)
    for (int64_t c = 0; c < cols; c += 2 * W) {
      const int n = (int)smaller(2 * W, cols - c);
      zip(out + c, load_pairs(in + c, n), load_pairs(in + ld_in + c, r + 1 < rows ? n : 0), n);
    }
}
#endif

// A tile of MB x KC numbers: as elements along its rows, [MB, ALONG_LD], and across them, [MB / TERMS, TILE_LD].
template <class E>
constexpr int ALONG_LD = KC / TERMS<E> + 16;
template <class E>
struct Tile {
  alignas(64) E along[MB * ALONG_LD<E>];
  alignas(64) E across[MB / 2 * TILE_LD];
};
template <>
struct Tile<float> {
  alignas(64) float along[MB * TILE_LD];
  float* const across = along;  // a float is both
};

struct TileAt {
  int64_t m0, k0;
  int rows, cols;
};

// Converts the tile that is wanted next, a vector at a step, while this one is multiplied: out of the way of the
// multiply- adds, its loads wait for L2 and L3 at no cost. Done in one go beforehand, they took a third of the time of
// a pass.
template <class T, class E = float>
struct NextTile {
  const T* src;  // [rows, cols]
  int64_t ld;
  float* tile;
  int cols, column = 0, left;

  NextTile(float* tile, const T* x, int64_t ld, TileAt at)
      : src(x + at.m0 * ld + at.k0), ld(ld), tile(tile), cols(at.cols), left(at.rows * (int)blocks(at.cols, W)) {}
  NextTile(Tile<float>& tile, bool, bool, const T* x, int64_t ld, TileAt at) : NextTile(tile.along, x, ld, at) {}

  FP_INLINE void step() {
    if (left == 0) return;
    --left;
    __builtin_prefetch(src + column + MB * ld, 0, 2);  // the next row of tiles, to L2
    if (column + W <= cols)
      store(tile + column, load(src + column));
    else
      store(tile + column, load_partial(src + column, cols - column));
    column += W;
    if (column >= cols) column = 0, src += ld, tile += TILE_LD;
  }
  void finish() {
    while (left) step();
  }
};

#ifdef FASTPEFT_DOT
// Pairs, two rows of numbers at a step: as they lie, or side by side, or both.
template <>
struct NextTile<bf16, bf16x2> {
  const bf16* src;  // [rows, cols]
  int64_t ld;
  bf16x2 *along, *across;  // null: not wanted
  int cols, column = 0, rows;

  NextTile(Tile<bf16x2>& tile, bool along, bool across, const bf16* x, int64_t ld, TileAt at)
      : src(x + at.m0 * ld + at.k0),
        ld(ld),
        along(along ? tile.along : nullptr),
        across(across ? tile.across : nullptr),
        cols(at.cols),
        rows(at.cols ? at.rows : 0) {}

  FP_INLINE void step() {
    if (rows <= 0) return;
    const int n = cols - column;
    const bf16* p = src + column;
    __builtin_prefetch(p + MB * ld, 0, 2);
    __builtin_prefetch(p + (MB + 1) * ld, 0, 2);
    const Pairs first = load_pairs(p, n), second = load_pairs(p + ld, rows > 1 ? n : 0);
    if (along) {
      store(along + column / 2, first);
      store(along + ALONG_LD<bf16x2> + column / 2, second);
    }
    if (across) zip(across + column, first, second);
    column += 2 * W;
    if (column < cols) return;
    column = 0, rows -= 2, src += 2 * ld;
    if (along) along += 2 * ALONG_LD<bf16x2>;
    if (across) across += TILE_LD;
  }
  void finish() {
    while (rows > 0) step();
  }
};
#endif

struct NoTile {
  FP_INLINE void step() {}
};

// Prefetches the tile of an output that is added to next, a cache line at a step: the sum of a register block is
// ready long before a line from L3 is.
template <class T>
struct NextLines {
  static constexpr int LINE = 64 / sizeof(T);
  const T* line;  // [rows, cols]
  int64_t ld;
  int cols, column = 0, left;

  NextLines(const T* c, int64_t ld, TileAt at)
      : line(c + at.m0 * ld + at.k0), ld(ld), cols(at.cols), left(at.rows * (int)blocks(at.cols, LINE)) {}

  FP_INLINE void step() {
    if (left == 0) return;
    --left;
    __builtin_prefetch(line + column, 1, 3);
    column += LINE;
    if (column >= cols) column = 0, line += ld;
  }
};

template <class First, class Second>
struct Both {
  First first;
  Second second;
  FP_INLINE void step() { first.step(), second.step(); }
};

// What a sum becomes of C[i, v], which lies at `at`.
struct AddTo {
  template <class C>
  FP_INLINE V operator()(const C* at, int64_t, V sum) const {
    return add(load(at), sum);
  }
};
struct Replace {
  template <class C>
  FP_INLINE V operator()(const C*, int64_t, V sum) const {
    return sum;
  }
};

// C[i, v] += Σ_j L[i, j] · B[j, v] for I rows and N vectors, held in registers. L's strides are constants: one base
// register serves all rows. The sum over j starts at zero: a long sum is built of short ones, as in a blocked GEMM.
// C is fp32, or of another element type if this sum is all that is added to it: then it is rounded once.
template <int I, int N, int LI, int LJ, class C, class E, class Next, class Into>
FP_INLINE void gemm_block(C* c, int64_t ldc, const E* l, const E* b, int64_t ldb, int64_t J, Next& shared_next,
                          const Into& into, int64_t row0) {
  using Elements = decltype(load(b));
  V acc[I][N];
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) acc[i][v] = zero();
  Next next = shared_next;
  for (int64_t j = 0; j < J; ++j, b += ldb, l += LJ) {
    next.step();
    Elements bv[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) bv[v] = load(b + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
      const Elements li = set1(l[i * LI]);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) acc[i][v] = fma(li, bv[v], acc[i][v]);
    }
  }
  shared_next = next;
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i) {
    C* row = c + i * ldc;
#pragma GCC unroll 8
    for (int v = 0; v + 1 < N; v += 2)
      store2(row + v * W, into(row + v * W, row0 + i, acc[i][v]), into(row + (v + 1) * W, row0 + i, acc[i][v + 1]));
    if (N % 2) store(row + (N - 1) * W, into(row + (N - 1) * W, row0 + i, acc[i][N - 1]));
  }
}

template <int N, int LI, int LJ, class C, class E, class Next, class Into>
void gemm_rows(C* c, int64_t ldc, const E* l, const E* b, int64_t ldb, int64_t I, int64_t J, Next& next,
               const Into& into) {
  constexpr int ROWS = N == 1 ? ROWS_1 : N == 2 ? ROWS_2 : N == 3 ? ROWS_3 : 4;
  int64_t i = 0;
  for (; i + ROWS <= I; i += ROWS) gemm_block<ROWS, N, LI, LJ>(c + i * ldc, ldc, l + i * LI, b, ldb, J, next, into, i);
  if (ROWS > 4)
    for (; i + 4 <= I; i += 4) gemm_block<4, N, LI, LJ>(c + i * ldc, ldc, l + i * LI, b, ldb, J, next, into, i);
  for (; i < I; ++i) gemm_block<1, N, LI, LJ>(c + i * ldc, ldc, l + i * LI, b, ldb, J, next, into, i);
}

constexpr int64_t MAX_SUM = 128;  // longest sum over j in one go: B's block stays in L1 while all rows pass over it

// C[i, 0 .. vecs*W) += Σ_j L[i, j] · B[j, 0 .. vecs*W), i < I, j < J; L[i, j] = l[i * LI + j * LJ]; fp32 C if J >
// MAX_SUM. Another `into` than adding is applied to each run of MAX_SUM.
template <int LI, int LJ, class C, class E, class Next, class Into = AddTo>
void tile_gemm(C* c, int64_t ldc, const E* l, const E* b, int64_t ldb, int64_t I, int64_t J, int vecs, Next& next,
               const Into& into = {}) {
  for (int64_t j0 = 0; j0 < J; j0 += MAX_SUM) {
    const E *lj = l + j0 * LJ, *bj = b + j0 * ldb;
    const int64_t jn = smaller(MAX_SUM, J - j0);
    for (int done = 0, parts = (vecs + MAX_VECS - 1) / MAX_VECS; parts > 0; --parts) {
      const int n = (vecs - done + parts - 1) / parts, v = done * W;
      if (n == 1) gemm_rows<1, LI, LJ>(c + v, ldc, lj, bj + v, ldb, I, jn, next, into);
      if (n == 2) gemm_rows<2, LI, LJ>(c + v, ldc, lj, bj + v, ldb, I, jn, next, into);
      if (n == 3) gemm_rows<3, LI, LJ>(c + v, ldc, lj, bj + v, ldb, I, jn, next, into);
      if constexpr (MAX_VECS > 3) {
        if (n == 4) gemm_rows<4, LI, LJ>(c + v, ldc, lj, bj + v, ldb, I, jn, next, into);
        if (n == 5) gemm_rows<5, LI, LJ>(c + v, ldc, lj, bj + v, ldb, I, jn, next, into);
        if (n == 6) gemm_rows<6, LI, LJ>(c + v, ldc, lj, bj + v, ldb, I, jn, next, into);
      }
      done += n;
    }
  }
}

// ---- dropout ----

// Philox's blocks for one seed and one projection, row by row.
class Philox {
  uint32_t key0, key1;                       // of the first round
  U k0[philox::ROUNDS], k1[philox::ROUNDS];  // of the others
  uint64_t m1_projection;

 public:
  FP_INLINE Philox(uint64_t seed, uint32_t projection)
      : key0((uint32_t)seed), key1((uint32_t)(seed >> 32)), m1_projection((uint64_t)philox::M1 * projection) {
    for (uint32_t r = 1; r < philox::ROUNDS; ++r)
      k0[r] = uset1((uint32_t)(key0 + r * philox::W0)), k1[r] = uset1((uint32_t)(key1 + r * philox::W1));
  }

  // calls f(k, words) with the words of columns first + k .. first + k + W-1 of a row, k = 0, W, 2W ... until n columns
  // are covered; first is a multiple of 4
  template <class F>
  FP_INLINE void row(uint64_t m, int64_t first, int64_t n, F f) const {
    using namespace philox;
    // what is the same for the whole row: half of round 1, and what follows from it in round 2
    const uint32_t c0_1 = (uint32_t)(m1_projection >> 32) ^ (uint32_t)m ^ key0, c1_1 = (uint32_t)m1_projection;
    const uint64_t p0_2 = (uint64_t)M0 * c0_1;
    const U from_c3 = uset1((uint32_t)(m >> 32) ^ key1), from_c1 = xor2(uset1(c1_1), k0[1]);
    const U from_p0 = xor2(uset1(p0_2 >> 32), k1[1]), c3_2 = uset1((uint32_t)p0_2);
    const U m0 = uset1(M0), m1 = uset1(M1);
    for (int64_t k = 0; k < n; k += CHAINS * 2 * W) {
      U c0[CHAINS], c1[CHAINS], c2[CHAINS], c3[CHAINS];
#pragma GCC unroll 8
      for (int i = 0; i < CHAINS; ++i) {
        const U block = uadd(uset1((uint64_t)(first + k) / 4 + i * W / 2), ublocks());
        const U p0 = mul32(block, m0), p1 = mul32(xor2(shr32(p0), from_c3), m1);
        c0[i] = xor2(shr32(p1), from_c1), c1[i] = p1, c2[i] = xor2(p0, from_p0), c3[i] = c3_2;
      }
      rounds<2>(c0, c1, c2, c3);
#pragma GCC unroll 8
      for (int i = 0; i < CHAINS; ++i) {
        const int64_t at = k + i * 2 * W;
        U words[2];
        in_order(words, c0[i], c1[i], c2[i], c3[i]);
        if (at < n) f(at, words[0]);
        if (at + W < n) f(at + W, words[1]);
      }
    }
  }

  // calls f(j, words) with the words of column 4 · block + j in W rows, j = 0 .. 3: the rows of `even` and `odd` in
  // turn
  template <class F>
  FP_INLINE void columns(int64_t block, U even, U odd, F f) const {
    using namespace philox;
    static_assert(CHAINS == 2);
    const uint64_t p0 = (uint64_t)M0 * (uint32_t)block;
    const U from_p0 = uset1((uint32_t)(p0 >> 32) ^ key1), from_p1 = uset1((uint32_t)(m1_projection >> 32) ^ key0);
    U c0[] = {xor2(even, from_p1), xor2(odd, from_p1)}, c1[] = {uset1((uint32_t)m1_projection), c1[0]};
    U c2[] = {xor2(shr32(even), from_p0), xor2(shr32(odd), from_p0)}, c3[] = {uset1((uint32_t)p0), c3[0]};
    rounds<1>(c0, c1, c2, c3);
    f(0, pair(c0[0], c0[1])), f(1, pair(c1[0], c1[1])), f(2, pair(c2[0], c2[1])), f(3, pair(c3[0], c3[1]));
  }

 private:
  // A value lies in the low half of its lane (mul32 reads no more), so that lo() costs nothing and hi() is one shift or
  // shuffle, half of each, since they use different ports. Two chains in lockstep: each is one long dependence.
  static constexpr int CHAINS = 2;
  template <int FIRST>
  FP_INLINE void rounds(U* c0, U* c1, U* c2, U* c3) const {
    const U m0 = uset1(philox::M0), m1 = uset1(philox::M1);
#pragma GCC unroll 10
    for (int r = FIRST; r < philox::ROUNDS; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < CHAINS; ++i) {
        const U p0 = mul32(c0[i], m0), p1 = mul32(c2[i], m1);
        c0[i] = xor3(shr32(p1), c1[i], k0[r]), c1[i] = p1;
        c2[i] = xor3(dup32(p0), c3[i], k1[r]), c3[i] = p0;
      }
  }
};

struct Keep {
  uint64_t seed;
  uint64_t threshold;
  float value;  // 1 / (1 - p)

  explicit Keep(const fastpeft::Dropout& d)
      : seed(d.seed), threshold(d.keep_threshold), value(d.p < 1.0 ? (float)(1.0 / (1.0 - d.p)) : 0.0f) {}
  explicit operator bool() const { return threshold != 0; }

  // calls f(m, k, mask) with mask = keep ? value : 0 for the W numbers m, k .. k+W-1 of a tile
  template <class F>
  FP_INLINE void tile(TileAt at, uint32_t projection, F f) const {
    const uint32_t t = threshold >> 32 ? 0xffffffffu : (uint32_t)threshold;  // p = 1 keeps nothing: value is 0
    const float v = threshold >> 32 ? 0.0f : value;
    const Philox philox(seed, projection);
    for (int m = 0; m < at.rows; ++m)
      philox.row((uint64_t)(at.m0 + m), at.k0, at.cols, [&](int64_t k, U words) { f(m, k, keep(words, t, v)); });
  }
};

// ---- work ----

// Part i of n units, cut into `parts` runs whose lengths differ by one at most.
struct Part {
  int64_t begin, end;
  Part(int64_t n, int64_t parts, int64_t i) : begin(n * i / parts), end(n * (i + 1) / parts) {}
};

// How the threads share the tiles of an [M, K] matrix: rows x cols cells. Of the ways to cut it, the one with the least
// work for the busiest thread, where each further range of rows costs row_cost multiply-adds (the partial results that
// must be added up), each further range of columns col_cost.
struct Grid {
  int64_t M, K;
  int rows = 1, cols = 1;

  Grid(int threads, int64_t M, int64_t K, double row_cost, double col_cost) : M(M), K(K) {
    double best = -1;
    for (int c = 1; c <= threads; ++c) {
      const int r = threads / c;
      const double busiest = (double)(blocks(blocks(M, MB), r) * blocks(blocks(K, KC), c)) * MB * KC;
      const double cost = busiest + (r - 1) * row_cost + (c - 1) * col_cost;
      if (best < 0 || cost < best) best = cost, rows = r, cols = c;
    }
  }
  int cells() const { return rows * cols; }
};

constexpr int64_t STRIP = 8;  // tiles

// One cell of a grid and the tiles in it.
struct Cell {
  int row, col;
  int64_t M, K;
  Part row_tiles, col_tiles;
  int64_t count;

  Cell(const Grid& g, int cell)
      : row(cell / g.cols),
        col(cell % g.cols),
        M(g.M),
        K(g.K),
        row_tiles(blocks(M, MB), g.rows, row),
        col_tiles(blocks(K, KC), g.cols, col),
        count((row_tiles.end - row_tiles.begin) * (col_tiles.end - col_tiles.begin)) {}

  int64_t m_begin() const { return row_tiles.begin * MB; }
  int64_t m_end() const { return smaller(M, row_tiles.end * MB); }
  int64_t k_begin() const { return col_tiles.begin * KC; }
  int64_t k_end() const { return smaller(K, col_tiles.end * KC); }

  // Tile i, strip after strip of columns, in a strip one row of tiles after another; an empty one after the last. Down
  // the columns each tile would lie in other pages, and the hardware's prefetch cannot follow: up to 1.7 times slower
  // out of L3. Along whole rows, what belongs to the columns (adapter, gradient, the lines ahead) does not stay in L2,
  // or does by where its pages fall: up to 1.3 times slower.
  TileAt in_strips(int64_t i) const {
    if (i >= count) return {0, 0, 0, 0};
    const int64_t rows = row_tiles.end - row_tiles.begin, first = col_tiles.begin + i / (rows * STRIP) * STRIP;
    const int64_t wide = smaller(STRIP, col_tiles.end - first), in_strip = i % (rows * STRIP);
    return at(row_tiles.begin + in_strip / wide, first + in_strip % wide);
  }
  TileAt at(int64_t row_tile, int64_t col_tile) const {
    const int64_t m0 = row_tile * MB, k0 = col_tile * KC;
    return {m0, k0, (int)smaller(MB, M - m0), (int)smaller(KC, K - k0)};
  }
};

// One allocation for all that a call needs; take() hands it out in cache lines. A thread keeps the last one for its
// next call: the first touch of fresh pages costs more than many a pass, and how much differs from process to process.
struct Workspace {
  static constexpr int64_t MOST_KEPT = 8 << 20;  // 4-byte elements
  struct Kept {
    float* base = nullptr;
    int64_t size = 0;
    ~Kept() { free(base); }
  };
  static Kept& kept() {
    static thread_local Kept of_thread;
    return of_thread;
  }

  float* base = nullptr;
  int64_t used = 0, capacity = 0;
  bool allocate(int64_t elements) {
    Kept& last = kept();
    base = last.base, capacity = last.size;
    last = Kept{};  // moved
    if (capacity >= elements && base) return true;
    free(base);
    void* p = nullptr;
    capacity = elements > 0 ? elements : 1;
    if (posix_memalign(&p, 4096, (size_t)capacity * sizeof(float))) return base = nullptr, false;
    base = (float*)p;
    return true;
  }
  static int64_t size(int64_t elements) { return round_up(elements, 16); }
  template <class E = float>
  E* take(int64_t elements) {
    static_assert(sizeof(E) == sizeof(float));
    E* p = (E*)(base + used);
    used += size(elements);
    return p;
  }
  ~Workspace() {
    Kept& last = kept();
    if (capacity <= MOST_KEPT && !last.base) {
      last.base = base, last.size = base ? capacity : 0;
    } else {
      free(base);
    }
  }
};

}  // namespace
