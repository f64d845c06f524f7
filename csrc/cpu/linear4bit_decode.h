// Reading a 4-bit weight: scales, single rows, whole blocks of rows.
#pragma once
#include "../linear4bit.h"
#include "tile.h"

namespace {

using namespace fastpeft;

constexpr int ROWS4 = 16, CODES4 = 8;  // a tile: 16 rows x 8 codes, a dword a row
constexpr int LANES = ROWS4 / W;       // vectors of a tile's rows
constexpr int64_t NESTED_BLOCK = 256;
constexpr int64_t AHEAD = 8192;                                  // bytes of W that are on their way: 13 -> 18 GB/s
constexpr int ODD_EVEN[CODES4] = {4, 0, 12, 8, 20, 16, 28, 24};  // where code k of a dword begins

// Where things lie in a weight of either layout.
struct Reader {
  const Weight4bit& w;
  Book book;
  int64_t tiled_rows;  // rows that lie in tiles
  int64_t row_blocks;  // blocks a row, where blocks end with rows; else 0
  int64_t step;        // codes of a row that share a scale wherever the row begins

  explicit Reader(const Weight4bit& w)
      : w(w),
        book(load_book(w.codebook)),
        tiled_rows(w.tiled ? w.N / ROWS4 * ROWS4 : 0),
        row_blocks(w.K % w.blocksize ? 0 : w.K / w.blocksize),
        step(w.blocksize) {
    for (int64_t rest = w.K; row_blocks == 0 && rest % step;) step /= 2;  // blocksize is a power of two
  }

  // the scale that is stored at `at` and belongs to a block of the flattened weight
  float scale(int64_t at, int64_t block) const {
    if (!w.nested_absmax) return ((const float*)w.scales)[at];
    return w.map[((const uint8_t*)w.scales)[at]] * w.nested_absmax[block / NESTED_BLOCK] + *w.offset;
  }
  float scale_of(int64_t n, int64_t k) const {
    const int64_t block = (n * w.K + k) / w.blocksize;
    const bool in_tile = row_blocks && n < tiled_rows;
    return scale(in_tile ? (n / ROWS4 * row_blocks + k / w.blocksize) * ROWS4 + n % ROWS4 : block, block);
  }

  const uint8_t* tile(int64_t group) const { return w.data + group * ROWS4 * w.K / 2; }

  // The scales of a group of 16 tiled rows, [K / step, 16]: where they lie, or computed into `out`.
  const float* group_scales(int64_t group, float* out) const {
    const int64_t n0 = group * ROWS4;
    if (!row_blocks) {
      for (int64_t i = 0; i < w.K / step; ++i)
        for (int r = 0; r < ROWS4; ++r) out[i * ROWS4 + r] = scale_of(n0 + r, i * step);
      return out;
    }
    const int64_t at = group * row_blocks * ROWS4;
    if (!w.nested_absmax) return (const float*)w.scales + at;
    const uint8_t* codes = (const uint8_t*)w.scales + at;
    const V offset = set1(*w.offset);
    for (int64_t i = 0; i < row_blocks;) {
      // up to the next block at which some row comes to another nested scale
      float nested[ROWS4];
      int64_t end = row_blocks;
      for (int r = 0; r < ROWS4; ++r) {
        const int64_t block = (n0 + r) * row_blocks + i;
        nested[r] = w.nested_absmax[block / NESTED_BLOCK];
        end = smaller(end, i + NESTED_BLOCK - block % NESTED_BLOCK);
      }
      for (; i < end; ++i)
        for (int v = 0; v < ROWS4; v += W)
          store(out + i * ROWS4 + v, add(mul(lookup(w.map, codes + i * ROWS4 + v), load(nested + v)), offset));
    }
    return out;
  }
  bool stores_scales() const { return row_blocks && !w.nested_absmax; }  // group_scales computes nothing

  // out[k - k0] = W[n, k], k0 <= k < k1
  void row(float* out, int64_t n, int64_t k0, int64_t k1) const {
    constexpr int64_t PART = 512;
    uint8_t part[PART / 2];
    for (int64_t k = k0; k < k1;) {
      int64_t end = k1;
      if (n >= tiled_rows) {
        codes(out + k - k0, w.data, n * w.K + k, n, k, end - k);
      } else {  // the row's dwords side by side
        const int64_t first = k / CODES4;
        end = smaller(k1, (first + PART / CODES4) * CODES4);
        const uint8_t* from = tile(n / ROWS4) + (first * ROWS4 + n % ROWS4) * 4;
        for (int64_t i = first; i < blocks(end, CODES4); ++i, from += ROWS4 * 4)
          memcpy(part + (i - first) * 4, from, 4);
        codes(out + k - k0, part, k % CODES4, n, k, end - k);
      }
      k = end;
    }
  }

 private:
  // out[i] = W[n, k + i], i < count; its codes begin at the code `at` of `bytes`
  void codes(float* out, const uint8_t* bytes, int64_t at, int64_t n, int64_t k, int64_t count) const {
    const auto one = [&](int64_t i) { return w.codebook[bytes[(at + i) / 2] >> ((at + i) % 2 ? 0 : 4) & 15]; };
    for (int64_t i = 0; i < count;) {
      const int64_t in_block = w.blocksize - (n * w.K + k + i) % w.blocksize;
      const int64_t end = smaller(count, i + in_block);
      const float s = scale_of(n, k + i);
      const V vs = set1(s);
      if ((at + i) % 2) out[i] = one(i) * s, ++i;
      for (; i + W <= end; i += W) store(out + i, mul(unpack(book, bytes + (at + i) / 2), vs));
      for (; i < end; ++i) out[i] = one(i) * s;
    }
  }
};

template <class T>
int dequantize(const Linear4bitDequantize& d) {
  constexpr int64_t PART = 512;  // columns of 16 rows that stay in L1 while each row collects its dwords
  const Reader reader(d.w);
  const int64_t rows = d.n1 - d.n0;
  T* out = (T*)d.out.data;
  const int threads = d.threads > 1 && (double)rows * (d.k1 - d.k0) > 1e5 ? d.threads : 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t group = d.n0 / ROWS4; group < blocks(d.n1, ROWS4); ++group) {
    alignas(64) float part[PART];
    const int64_t n0 = group * ROWS4 > d.n0 ? group * ROWS4 : d.n0, n1 = smaller(d.n1, (group + 1) * ROWS4);
    for (int64_t k = d.k0; k < d.k1; k += PART)
      for (int64_t n = n0; n < n1; ++n) {
        const int64_t count = smaller(PART, d.k1 - k);
        T* to = out + (n - d.n0) * d.out.ld + k - d.k0;
        if constexpr (IS_FLOAT<T>) {
          reader.row(to, n, k, k + count);
        } else {
          reader.row(part, n, k, k + count);
          convert_row(to, part, count);
        }
      }
  }
  return OK;
}

}  // namespace
