// What every native op is composed of: rows and tiles converted to fp32, one small GEMM on tiles that lie in L1, and the
// dropout mask of a tile. Included after a vec_<isa>.h.
#pragma once
#include <stdlib.h>

#include "../philox.h"

namespace {

// A tile is MB rows x KC columns of fp32 in L1 (18 KB), its rows TILE_LD apart (16 more than KC: rows that are a power of
// two apart share few cache sets).
constexpr int MB = 32, KC = 128, TILE_LD = KC + 16;

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

// the same where the element type is known at run time only: adapters, biases
FP_INLINE const void* element(const void* p, int dtype, int64_t i) {
  return (const char*)p + i * (dtype == fastpeft::FLOAT32 ? 4 : 2);
}
void row_to_float(float* dst, const void* src, int dtype, int64_t n) {
  if (dtype == fastpeft::FLOAT32) return convert_row(dst, (const float*)src, n);
  if (dtype == fastpeft::BFLOAT16) return convert_row(dst, (const bf16*)src, n);
  convert_row(dst, (const f16*)src, n);
}
void row_from_float(void* dst, int dtype, const float* src, int64_t n) {
  if (dtype == fastpeft::FLOAT32) return convert_row((float*)dst, src, n);
  if (dtype == fastpeft::BFLOAT16) return convert_row((bf16*)dst, src, n);
  convert_row((f16*)dst, src, n);
}

// ---- tiles ----

// tile[m, k] = src[m, k], zeros from cols to the next multiple of W
template <class T>
void load_tile(float* tile, const T* src, int64_t ld, int rows, int cols) {
  const int whole = cols / W * W;
  for (int m = 0; m < rows; ++m) {
    const T* row = src + m * ld;
    float* out = tile + m * TILE_LD;
    for (int k = 0; k < whole; k += W) store(out + k, load(row + k));
    if (whole < cols) store(out + whole, load_partial(row + whole, cols - whole));
  }
}

template <class T>
void store_tile(T* dst, int64_t ld, const float* tile, int rows, int cols) {
  for (int m = 0; m < rows; ++m) convert_row(dst + m * ld, tile + m * TILE_LD, cols);
}

// out[c * ld_out + r] = in[r * ld_in + c]
void transpose(float* out, int64_t ld_out, const float* in, int64_t ld_in, int64_t rows, int64_t cols) {
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t r = 0; r < rows; ++r) out[c * ld_out + r] = in[r * ld_in + c];
}

// C[i, v] += Σ_j L[i, j] · B[j, v] for I rows and N vectors, held in registers. L's strides are constants: one base
// register serves all rows. The sum over j starts at zero: a long sum is built of short ones, as in a blocked GEMM.
template <int I, int N, int LI, int LJ>
FP_INLINE void gemm_block(float* c, int64_t ldc, const float* l, const float* b, int64_t ldb, int64_t J) {
  V acc[I][N];
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) acc[i][v] = zero();
  for (int64_t j = 0; j < J; ++j, b += ldb, l += LJ) {
    V bv[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) bv[v] = load(b + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
      const V li = set1(l[i * LI]);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) acc[i][v] = fma(li, bv[v], acc[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) store(c + i * ldc + v * W, add(load(c + i * ldc + v * W), acc[i][v]));
}

template <int N, int LI, int LJ>
void gemm_rows(float* c, int64_t ldc, const float* l, const float* b, int64_t ldb, int64_t I, int64_t J) {
  constexpr int ROWS = N == 1 ? ROWS_1 : N == 2 ? ROWS_2 : N == 3 ? ROWS_3 : 4;
  int64_t i = 0;
  for (; i + ROWS <= I; i += ROWS) gemm_block<ROWS, N, LI, LJ>(c + i * ldc, ldc, l + i * LI, b, ldb, J);
  if (ROWS > 4)
    for (; i + 4 <= I; i += 4) gemm_block<4, N, LI, LJ>(c + i * ldc, ldc, l + i * LI, b, ldb, J);
  for (; i < I; ++i) gemm_block<1, N, LI, LJ>(c + i * ldc, ldc, l + i * LI, b, ldb, J);
}

// C[i, 0 .. vecs*W) += Σ_j L[i, j] · B[j, 0 .. vecs*W), i < I, j < J; L[i, j] = l[i * LI + j * LJ]
template <int LI, int LJ>
void tile_gemm(float* c, int64_t ldc, const float* l, const float* b, int64_t ldb, int64_t I, int64_t J, int vecs) {
  constexpr int64_t JB = 128;  // B's block stays in L1 while all rows pass over it
  for (int64_t j0 = 0; j0 < J; j0 += JB) {
    const float *lj = l + j0 * LJ, *bj = b + j0 * ldb;
    const int64_t jn = smaller(JB, J - j0);
    for (int done = 0, parts = (vecs + MAX_VECS - 1) / MAX_VECS; parts > 0; --parts) {
      const int n = (vecs - done + parts - 1) / parts, v = done * W;
      switch (n) {
        case 1: gemm_rows<1, LI, LJ>(c + v, ldc, lj, bj + v, ldb, I, jn); break;
        case 2: gemm_rows<2, LI, LJ>(c + v, ldc, lj, bj + v, ldb, I, jn); break;
        case 3: gemm_rows<3, LI, LJ>(c + v, ldc, lj, bj + v, ldb, I, jn); break;
      }
      if constexpr (MAX_VECS > 3) switch (n) {
        case 4: gemm_rows<4, LI, LJ>(c + v, ldc, lj, bj + v, ldb, I, jn); break;
        case 5: gemm_rows<5, LI, LJ>(c + v, ldc, lj, bj + v, ldb, I, jn); break;
        case 6: gemm_rows<6, LI, LJ>(c + v, ldc, lj, bj + v, ldb, I, jn); break;
      }
      done += n;
    }
  }
}

// ---- dropout ----

// What stays the same along a row segment whose flat indices share their high word.
struct PhiloxRow {
  U k0[philox::ROUNDS], k1[philox::ROUNDS];  // k[1] of both folded into what follows
  U c2_round1, c0_round2, c2_round2, c3_round2;

  FP_INLINE PhiloxRow(uint64_t seed, uint32_t index_high, uint32_t projection) {
    using namespace philox;
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    // round 1, the half that no lane changes: c0' and c1'
    const uint64_t p1 = (uint64_t)M1 * projection;
    const uint32_t c0 = (uint32_t)(p1 >> 32) ^ index_high ^ key0, c1 = (uint32_t)p1;
    c2_round1 = uset1(key1);  // c2' = hi(M0 * c0) ^ key1
    key0 += W0, key1 += W1;
    // round 2: its M0 * c0' is constant too
    const uint64_t p0 = (uint64_t)M0 * c0;
    c0_round2 = uset1(c1 ^ key0);                       // c0'' = hi(M1 * c2') ^ this
    c2_round2 = uset1((uint32_t)(p0 >> 32) ^ key1);     // c2'' = c3' ^ this
    c3_round2 = uset1((uint32_t)p0);                    // c3''
    for (int r = 2; r < ROUNDS; ++r) {
      key0 += W0, key1 += W1;
      k0[r] = uset1(key0), k1[r] = uset1(key1);
    }
  }

  // first word, in the low half of each lane, of the blocks whose index's low word is the low half of `low`.
  // Values live in the low halves (mul32 reads only those), so lo() costs nothing and hi() is one shift.
  FP_INLINE U word(U low) const {
    const U m0 = uset1(philox::M0), m1 = uset1(philox::M1);
    U p0 = mul32(low, m0), p1 = mul32(xor2(shr32(p0), c2_round1), m1);
    U c0 = xor2(shr32(p1), c0_round2), c1 = p1, c2 = xor2(p0, c2_round2), c3 = c3_round2;
#pragma GCC unroll 10
    for (int r = 2; r < philox::ROUNDS - 2; ++r) {
      p0 = mul32(c0, m0), p1 = mul32(c2, m1);
      c0 = xor3(shr32(p1), c1, k0[r]), c1 = p1;
      c2 = xor3(shr32(p0), c3, k1[r]), c3 = p0;
    }
    p0 = mul32(c0, m0), p1 = mul32(c2, m1);  // round 9: its c0 and c3 go nowhere
    c1 = p1, c2 = xor3(shr32(p0), c3, k1[philox::ROUNDS - 2]);
    return xor3(shr32(mul32(c2, m1)), c1, k0[philox::ROUNDS - 1]);  // round 10
  }
};

// calls f(i, even, odd) with the words of the flat indices start+i .. start+i+W-1, for i from 0 in steps of W until n is
// covered; where the high word of the index changes, i goes back to the first index that has the new one
template <class F>
FP_INLINE void for_each_word(uint64_t seed, uint64_t start, int64_t n, uint32_t projection, F f) {
  for (int64_t done = 0; done < n;) {
    const uint64_t index = start + (uint64_t)done;
    const int64_t run = smaller(n - done, (int64_t)((1ull << 32) - (uint32_t)index));
    const PhiloxRow row(seed, (uint32_t)(index >> 32), projection);
    U even = uadd(uset1(index), uevens());
    for (int64_t i = 0; i < run; i += W, even = uadd(even, uset1(W))) f(done + i, row.word(even), row.word(uadd(even, uset1(1))));
    done += run;
  }
}

struct Keep {
  uint64_t seed;
  uint64_t threshold;
  float value;  // 1 / (1 - p)

  explicit Keep(const fastpeft::Dropout& d)
      : seed(d.seed), threshold(d.keep_threshold), value(d.p < 1.0 ? (float)(1.0 / (1.0 - d.p)) : 0.0f) {}
  explicit operator bool() const { return threshold != 0; }

  // mask[m, k] = keep ? 1/(1-p) : 0 for the flat indices (m0+m) * K + k0 + k
  void tile(float* mask, int64_t m0, int rows, int64_t k0, int cols, int64_t K, uint32_t projection) const {
    const uint32_t t = threshold >> 32 ? 0xffffffffu : (uint32_t)threshold;  // p = 1 keeps nothing: value is 0
    const float v = threshold >> 32 ? 0.0f : value;
    for (int m = 0; m < rows; ++m) {
      float* out = mask + m * TILE_LD;
      const uint64_t start = (uint64_t)((m0 + m) * K + k0);
      for_each_word(seed, start, cols, projection, [&](int64_t i, U even, U odd) { store(out + i, keep(even, odd, t, v)); });
    }
  }
};

// ---- work ----

// Part i of n units, cut into `parts` runs whose lengths differ by one at most.
struct Part {
  int64_t begin, end;
  Part(int64_t n, int64_t parts, int64_t i) : begin(n * i / parts), end(n * (i + 1) / parts) {}
};

// One allocation for all that a call needs; take() hands it out in cache lines.
struct Workspace {
  float* base = nullptr;
  int64_t used = 0;
  bool allocate(int64_t floats) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, (size_t)(floats > 0 ? floats : 1) * sizeof(float))) return false;
    base = (float*)p;
    return true;
  }
  static int64_t size(int64_t floats) { return round_up(floats, 16); }
  float* take(int64_t floats) {
    float* p = base + used;
    used += size(floats);
    return p;
  }
  ~Workspace() { free(base); }
};

}  // namespace
