// Which query rows see which keys of a segment, and both as the operands of tile_gemm.
#pragma once
#include "adapter.h"
#include "planes.h"

namespace {

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

// ---- which rows see which keys ----

constexpr int64_t NONE = -1, FOREIGN = -2;

int64_t block_of(const Segment& s, int64_t b) {
  if (!s.index) return s.by_row ? b : 0;
  const int64_t a = s.index[b];
  return a >= 0 && a < s.A ? a : a == NONE ? NONE : FOREIGN;
}
int64_t length_of(const Segment& s, int64_t a) {
  if (a < 0) return 0;
  int64_t n = s.offsets ? s.offsets[a + 1] - s.offsets[a] : s.N;
  if (s.lengths) n = smaller(n, s.lengths[a] > 0 ? s.lengths[a] : 0);
  return n;
}
Matrix keys_of(const HeadKeys& k, const Segment& s, int64_t a, int64_t hk) {
  const int64_t at = a * k.a + hk * k.h + (s.offsets ? s.offsets[a] * k.n : 0);
  return {(void*)element(k.data, k.dtype, at), k.n, k.dtype};
}
// how many of a block's N keys its last row sees
int64_t seen_of(const Segment& s, const Block& block, int64_t T, int64_t N) {
  if (!s.causal) return N;
  const int64_t seen = block.t + block.tn + N - T;
  return seen < 0 ? 0 : smaller(N, seen);
}

// How the rows of one key head are cut into blocks: of one head, or of short ones all of a group, of several batch rows
// where those see the same keys.
struct Cut {
  int64_t tn, hn, bn, row_blocks;
  Cut(int64_t B, int64_t T, int64_t G, bool one_block_of_keys)
      : tn(T < LANES ? T : LANES), hn(smaller(G, LANES / tn)), bn(1), row_blocks(blocks(T, tn)) {
    if (one_block_of_keys && hn == G && tn == T) bn = smaller(B, LANES / (hn * tn));
  }
};

// ---- operands ----

template <class E>
struct Sizes {
  int64_t D, depth, wide, along, across;
  explicit Sizes(int64_t D)
      : D(D),
        depth(blocks(D, TERMS<E>)),
        wide(round_up(D, W)),
        along(Workspace::size(depth * LD)),
        across(Workspace::size(KEYS / TERMS<E> * wide)) {}
};

// A thread's part of the workspace.
struct Arena {
  float* at;
  template <class E = float>
  E* take(int64_t elements) {
    E* p = (E*)at;
    at += Workspace::size(elements);
    return p;
  }
};

// row t of head h of batch row b
template <class T>
T* row_at(const HeadRows& r, int64_t b, int64_t h, int64_t t) {
  return (T*)r.data + b * r.b + h * r.h + t * r.t;
}

// Prefetches a block's rows of a result that a product goes straight into: none where it does not.
template <class T>
NextLines<T> lines_of(const HeadRows& r, const Block& b, int64_t D, bool direct) {
  return {row_at<T>(r, b.b, b.h, b.t), r.t, {0, 0, direct ? (int)b.tn : 0, (int)D}};
}

// out[d / TERMS, lane] = the elements along the rows of a block, [depth, LD], zeros in lanes behind them
template <class T, class E>
void rows_along(E* out, const HeadRows& r, const Block& block, const Sizes<E>& size) {
  if (block.rows() < block.lanes()) memset((void*)out, 0, sizeof(E) * size.depth * LD);
  block.runs([&](int lane, int64_t b, int64_t h) {
    transpose(out + lane, LD, row_at<T>(r, b, h, block.t), r.t, block.tn, size.D);
  });
}

// out[lane / TERMS, d] = the elements across the rows of a block, rows of out `wide` apart
template <class T, class E>
void rows_across(E* out, const HeadRows& r, const Block& block, const Sizes<E>& size) {
  if constexpr (TERMS<E> == 1) {
    block.each([&](int lane, int64_t b, int64_t h, int64_t t) {
      convert_row(out + lane * size.wide, row_at<T>(r, b, h, t), size.D);
    });
  } else {
    if (block.one_run())
      return zip_rows(out, size.wide, row_at<T>(r, block.b, block.h, block.t), r.t, block.tn, size.D);
    const T* first = nullptr;
    block.each([&](int lane, int64_t b, int64_t h, int64_t t) {
      const T* row = row_at<T>(r, b, h, t);
      if (lane % 2) zip_rows(out + lane / 2 * size.wide, size.wide, first, row - first, 2, size.D);
      if (lane % 2 == 0 && lane + 1 == block.rows()) zip_rows(out + lane / 2 * size.wide, size.wide, row, 0, 1, size.D);
      first = row;
    });
  }
}

// The keys and values of one (a, hk) as operands, a panel at a time: those that more than one block of rows sees stay.
template <class T, class E>
struct Operands {
  const Segment& s;
  Sizes<E> size;
  bool stay;
  E* forms[4];  // k along [depth, LD] and across [KEYS / TERMS, wide] a panel, and v; null: not wanted
  int64_t a = NONE, hk = 0, laid_out = 0;

  static int64_t needs(const Segment& s, const Sizes<E>& size, bool stay, int count_along, int count_across) {
    return (stay ? blocks(s.N, KEYS) : 1) * (count_along * size.along + count_across * size.across);
  }
  Operands(const Segment& s, const Sizes<E>& size, bool stay, const bool (&wanted)[4], Arena& arena)
      : s(s), size(size), stay(stay) {
    int i = 0;
    for (const bool each : wanted) {
      const int64_t of_panel = i % 2 ? size.across : size.along;
      forms[i++] = each ? arena.take<E>((stay ? blocks(s.N, KEYS) : 1) * of_panel) : nullptr;
    }
  }

  void choose(int64_t next_a, int64_t next_hk) {
    if (next_a != a || next_hk != hk) a = next_a, hk = next_hk, laid_out = 0;
  }
  E* k_along(int64_t i) const { return forms[0] + (stay ? i * size.along : 0); }
  E* k_across(int64_t i) const { return forms[1] + (stay ? i * size.across : 0); }
  E* v_along(int64_t i) const { return forms[2] + (stay ? i * size.along : 0); }
  E* v_across(int64_t i) const { return forms[3] + (stay ? i * size.across : 0); }

  // Lays out panel i, of keys up to N, if it is not there.
  void lay_out(int64_t i, int64_t N) {
    if (stay && i < laid_out) return;
    laid_out = i + 1;
    const int64_t n0 = i * KEYS, n = smaller(KEYS, N - n0);
    const Matrix all[] = {keys_of(s.k, s, a, hk), keys_of(s.v, s, a, hk)};
    for (int j = 0; j < 2; ++j) {
      const Matrix& rows = all[j];
      E *along = forms[2 * j], *across = forms[2 * j + 1];
      if (along) along += stay ? i * size.along : 0;
      if (across) across += stay ? i * size.across : 0;
      if constexpr (TERMS<E> == 2) {
        if (rows.dtype == BFLOAT16) {
          const bf16* at = (const bf16*)rows.data + n0 * rows.ld;
          if (along) transpose(along, LD, at, rows.ld, n, size.D);
          if (across) zip_rows(across, size.wide, at, rows.ld, n, size.D);
          continue;
        }
      }
      if (along) load_adapter_along<Ranks<T>>(along, LD, rows, n0, n, 0, size.D, Scale{});
      if (across) load_adapter_across<Ranks<T>>(across, size.wide, rows, n0, n, size.D, Scale{});
    }
  }
};

// C[i, lane] = Σ_j L[j, i] · B[j, lane], i < I, j < depth: scores of a panel and a block
template <class E, class Next>
void scores(float* c, const E* l, const E* b, int I, int64_t depth, int lanes, Next& next) {
  for (int64_t j = 0; j < depth; j += MAX_SUM) {
    const int64_t n = smaller(MAX_SUM, depth - j);
    if (j == 0)
      tile_gemm<1, LD>(c, LD, l, b, LD, I, n, lanes / W, next, Replace{});
    else
      tile_gemm<1, LD>(c, LD, l + j * LD, b + j * LD, LD, I, n, lanes / W, next);
  }
}

// What scores and weights of a panel and a block are multiplied with, and what is added to scores.
struct Factors {
  Factor gate_k, gate_v, bias, keep;
  float scale;
};

// The dropout factors of a panel and a block, [keys, LD].
struct Mask {
  const Keep keep;
  const Philox philox;
  Mask(const Dropout& d, uint32_t projection) : keep(d), philox(d.seed, projection) {}

  Factor read(float* tile, const Block& block, int64_t H, int64_t T, Panel panel) const {
    if (!keep) return {};
    const uint32_t threshold = keep.threshold >> 32 ? 0xffffffffu : (uint32_t)keep.threshold;
    uint64_t rows[2][LANES / 2] = {};
    block.each(
        [&](int lane, int64_t b, int64_t h, int64_t t) { rows[lane % 2][lane / 2] = (uint64_t)((b * H + h) * T + t); });
    for (int lane = 0; lane < block.lanes(); lane += W) {
      U even, odd;
      memcpy(&even, rows[0] + lane / 2, sizeof even), memcpy(&odd, rows[1] + lane / 2, sizeof odd);
      for (int n = 0; n < panel.n; n += 4)
        philox.columns((panel.n0 + n) / 4, even, odd, [&](int j, U words) {
          store(tile + (n + j) * LD + lane, ::keep(words, threshold, keep.value));
        });
    }
    return {tile, LD, 1};
  }
};

// The bias of a panel and a block, to base 2: of its plane, and -Inf where causality hides a key.
Factor read_bias(float* tile, const Segment& s, const Block& block, int64_t a, Panel panel, int64_t T, int64_t N) {
  const int64_t ahead = N - T;  // query t sees key n <= t + ahead
  const bool hides = s.causal && panel.n0 + panel.n - 1 > block.t + ahead;
  Plane plane = s.bias;
  if (s.offsets && plane.data) plane.data = element(plane.data, plane.dtype, s.offsets[a] * plane.n);
  const Factor bias = read_plane(tile, plane, block, a, panel, LOG2E, hides);
  if (!hides) return bias;
  if (!bias) memset(tile, 0, sizeof(float) * panel.n * LD);
  block.runs([&](int lane, int64_t, int64_t) {
    for (int n = 0; n < panel.n; ++n)
      for (int64_t i = 0; i < block.tn && panel.n0 + n > block.t + i + ahead; ++i) tile[n * LD + lane + i] = -INFINITY;
  });
  return {tile, LD, 1};
}

// gate_out in a block's lanes, 1 without one
void read_gate_out(float* lanes, const Segment& s, const Block& block, int64_t a) {
  for (int i = 0; i < LANES; ++i) lanes[i] = 1.0f;
  const Plane& p = s.gate_out;
  if (!p.data) return;
  block.runs([&](int lane, int64_t, int64_t h) {
    for (int64_t i = 0; i < block.tn; ++i) plane_row(lanes + lane + i, p, a * p.b + h * p.h, 1, 1.0f);
  });
}

}  // namespace
