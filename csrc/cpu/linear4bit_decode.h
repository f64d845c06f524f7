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
        row_of(out + k - k0, w.data, n * w.K + k, n, k, end);
      } else {  // the row's dwords side by side
        const int64_t first = k / CODES4;
        end = smaller(k1, (first + PART / CODES4) * CODES4);
        const uint8_t* from = tile(n / ROWS4) + (first * ROWS4 + n % ROWS4) * 4;
        for (int64_t i = first; i < blocks(end, CODES4); ++i, from += ROWS4 * 4)
          memcpy(part + (i - first) * 4, from, 4);
        row_of(out + k - k0, part, k % CODES4, n, k, end);
      }
      k = end;
    }
  }

  // out[i] = book[code at + i of bytes] · s rounded once, i < count
  template <class T>
  FP_INLINE void run(T* out, const uint8_t* bytes, int64_t at, int64_t count, float s) const {
    const V vs = set1(s);
    int64_t i = 0;
    const auto rest = [&](int64_t n) {
      float values[W] = {};
      for (int64_t j = 0; j < n; ++j)
        values[j] = w.codebook[bytes[(at + i + j) / 2] >> ((at + i + j) % 2 ? 0 : 4) & 15] * s;
      store_partial(out + i, load(values), (int)n);
      i += n;
    };
    if (at % 2 && count) rest(1);
    if constexpr (!IS_FLOAT<T>) {  // a book that is scaled and rounded, once for all codes that share the scale
      const NarrowBook narrow = narrow_book<T>(book, s);
      for (; i + 32 <= count; i += 32) unpack(out + i, narrow, bytes + (at + i) / 2);
    }
    for (; i + W <= count; i += W) store(out + i, mul(unpack(book, bytes + (at + i) / 2), vs));
    while (i < count) rest(smaller(W, count - i));
  }

 private:
  // out[i] = W[n, k + i], k + i < end; its codes begin at the code `at` of `bytes`
  void row_of(float* out, const uint8_t* bytes, int64_t at, int64_t n, int64_t k, int64_t end) const {
    for (int64_t i = k; i < end;) {
      const int64_t count = smaller(end - i, w.blocksize - (n * w.K + i) % w.blocksize);
      run(out + i - k, bytes, at + i - k, count, scale_of(n, i));
      i += count;
    }
  }
};

}  // namespace
