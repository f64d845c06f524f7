// Gates, masks and biases over [B, H, T, N], read for a block of query rows and a panel of keys, and their gradients.
//
// A block's rows are lanes: a tile has a row a key. Where a plane is the same in all rows of a block, its tile is one
// vector a key, `step` 0, and its gradient's tile is summed over the block's vectors.
#pragma once
#include <math.h>

#include "../prefix_attention.h"
#include "tile.h"

namespace {

using namespace fastpeft;

constexpr int LANES = KC, KEYS = KC;  // query rows of a block, keys of a panel
constexpr int LD = TILE_LD;           // between a tile's rows
static_assert(LANES % (2 * W) == 0);

// Query rows that are attended to together: heads [h, h + hn) of the batch rows [b, b + bn), of each [t, t + tn).
struct Block {
  int64_t b, bn, h, hn, t, tn;

  int rows() const { return (int)(bn * hn * tn); }
  int lanes() const { return (int)round_up(rows(), W); }
  bool one_run() const { return bn * hn == 1; }
  // calls f(lane, b, h) with the first lane of each run of tn rows
  template <class F>
  void runs(F f) const {
    int lane = 0;
    for (int64_t i = b; i < b + bn; ++i)
      for (int64_t j = h; j < h + hn; ++j, lane += (int)tn) f(lane, i, j);
  }
  // calls f(lane, b, h, t) for each row
  template <class F>
  void each(F f) const {
    runs([&](int lane, int64_t i, int64_t j) {
      for (int64_t k = 0; k < tn; ++k) f(lane + (int)k, i, j, t + k);
    });
  }
};

struct Panel {
  int64_t n0;
  int n;
};

// The values of a plane in a block's lanes and a panel's keys; no data: there is no plane.
struct Factor {
  const float* data = nullptr;
  int ld = 0, step = 0;
  explicit operator bool() const { return data; }
  FP_INLINE V at(int n, int lane) const { return load(data + n * ld + lane * step); }
};

// Sums over a block's lanes, or over its vectors where step is 0.
struct Sums {
  float* data = nullptr;
  int ld = 0, step = 0;
  explicit operator bool() const { return data; }
  FP_INLINE void add_to(int n, int lane, V v) const {
    float* at = data + n * ld + lane * step;
    store(at, add(load(at), v));
  }
};

void plane_row(float* out, const Plane& p, int64_t at, int n, float factor) {
  if (p.dtype == MASK) {
    for (int i = 0; i < n; ++i) out[i] = ((const uint8_t*)p.data)[at + i * p.n] ? 0.0f : -INFINITY;
    return;
  }
  if (p.n == 1) {
    row_to_float(out, element(p.data, p.dtype, at), p.dtype, n);
  } else {
    for (int i = 0; i < (p.n ? n : 1); ++i) row_to_float(out + i, element(p.data, p.dtype, at + i * p.n), p.dtype, 1);
    for (int i = 1; i < n && !p.n; ++i) out[i] = out[0];
  }
  for (int i = 0; i < n && factor != 1.0f; ++i) out[i] *= factor;
}

// Whether its values are the same in all rows of a block.
bool is_constant(const Plane& p, const Block& block) {
  return p.t == 0 && (p.h == 0 || block.hn == 1) && (p.b == 0 || p.by_key || block.bn == 1);
}

// the plane times `factor`, in `tile` [KEYS, LD]; `in_lanes`: with a lane of its own for each row
Factor read_plane(float* tile, const Plane& p, const Block& block, int64_t a, Panel panel, float factor,
                  bool in_lanes = false) {
  if (!p.data) return {};
  alignas(64) float values[LANES * KEYS];
  const auto offset = [&](int64_t b, int64_t h) {
    return (p.by_key ? a : b) * p.b + h * p.h + block.t * p.t + panel.n0 * p.n;
  };
  if (is_constant(p, block) && !in_lanes) {
    plane_row(values, p, offset(block.b, block.h), panel.n, factor);
    for (int n = 0; n < panel.n; ++n) store(tile + n * W, set1(values[n]));
    return {tile, W, 0};
  }
  if (block.rows() < block.lanes()) memset(tile, 0, sizeof(float) * panel.n * LD);
  block.runs([&](int lane, int64_t b, int64_t h) {
    const int64_t at = offset(b, h);
    if (p.t == 0) {
      plane_row(values, p, at, panel.n, factor);
      for (int n = 0; n < panel.n; ++n)
        for (int64_t i = 0; i < block.tn; ++i) tile[n * LD + lane + i] = values[n];
    } else if (p.n == 1 && p.dtype == FLOAT32 && factor == 1.0f) {
      transpose(tile + lane, LD, (const float*)p.data + at, p.t, block.tn, panel.n);
    } else {
      for (int64_t i = 0; i < block.tn; ++i) plane_row(values + i * KEYS, p, at + i * p.t, panel.n, factor);
      transpose(tile + lane, LD, values, KEYS, block.tn, panel.n);
    }
  });
  return {tile, LD, 1};
}

// Reads a plane into its tile; what the heads of a group share is read once.
struct PlaneTile {
  float* tile = nullptr;
  Factor last;
  int64_t a = -1, n0 = 0;
  Block block{};

  Factor read(const Plane& p, const Block& next, int64_t next_a, Panel panel) {
    const bool same = next_a == a && panel.n0 == n0 && next.b == block.b && next.t == block.t && next.hn == block.hn;
    if (p.h || !same) last = read_plane(tile, p, next, next_a, panel, 1.0f);
    a = next_a, n0 = panel.n0, block = next;
    return last;
  }
};

// The gradient of a plane. In a first stage each block of rows adds to elements that are its own: [B, H or Hk, T or
// blocks of rows, N or 1], where a plane that is broadcast over heads has one row for a group of them, and one that is
// broadcast over t one for a block. A second stage sums what the plane is broadcast along, in a fixed order.
struct PlaneGrad {
  Plane plane{};
  float *stage = nullptr, *out = nullptr;
  int64_t B = 0, heads = 0, rows = 0, columns = 0;
  int64_t group = 1;  // heads of one of the stage's

  PlaneGrad() = default;
  PlaneGrad(const Plane& p, float* out, const GradAttend& d, int64_t row_blocks)
      : plane(p),
        out(out),
        B(d.B),
        heads(p.has_h ? d.H : d.segment.Hk),
        rows(p.has_t ? d.T : row_blocks),
        columns(p.has_n ? d.segment.N : 1),
        group(d.H / heads) {}
  // whether the first stage is all: nothing is summed after it
  bool is_whole() const { return plane.has_b && plane.has_h && plane.has_t && !plane.by_key; }
  int64_t size() const { return out ? B * heads * rows * columns : 0; }
  float* row(int64_t b, int64_t head, int64_t t) const { return stage + ((b * heads + head) * rows + t) * columns; }

  // Zeroed sums for a block, in `tile`; or those of the last head of a group, whose sums are one.
  Sums begin(float* tile, const Block& block, Panel panel, bool next_head) const {
    if (!out) return {};
    const bool whole = block.one_run() && !plane.has_t;
    if (plane.has_h || !next_head) memset(tile, 0, sizeof(float) * panel.n * (whole ? W : LD));
    return {tile, whole ? W : LD, whole ? 0 : 1};
  }

  void finish(const Sums& sums, const Block& block, int64_t row_block, Panel panel, bool more_heads) const {
    if (!out || (!plane.has_h && more_heads)) return;
    const int step = plane.has_n;
    const int64_t n0 = step ? panel.n0 : 0;
    alignas(64) float turned[LANES * KEYS];
    block.runs([&](int lane, int64_t b, int64_t h) {
      if (!plane.has_t) {
        float* to = row(b, h / group, row_block) + n0;
        for (int n = 0; n < panel.n; ++n) {
          const float* from = sums.data + n * sums.ld;
          float total = 0.0f;
          if (sums.step == 0)
            total = sum(load(from));
          else
            for (int64_t i = 0; i < block.tn; ++i) total += from[lane + i];
          to[n * step] += total;
        }
        return;
      }
      transpose(turned, KEYS, sums.data + lane, LD, panel.n, block.tn);
      for (int64_t i = 0; i < block.tn; ++i) {
        float* to = row(b, h / group, block.t + i) + n0;
        for (int n = 0; n < panel.n; ++n) to[n * step] += turned[i * KEYS + n];
      }
    });
  }

  // to[n] += the stage's rows [t, t_end) of batch row b and heads [h, h_end), n < count
  void add_rows(float* to, int64_t b, int64_t h, int64_t h_end, int64_t t, int64_t t_end, int64_t count) const {
    for (int64_t i = h; i < h_end; ++i)
      for (int64_t j = t; j < t_end; ++j) {
        const float* from = row(b, i, j);
        for (int64_t n = 0; n < count; ++n) to[n] += from[n];
      }
  }
};

}  // namespace
