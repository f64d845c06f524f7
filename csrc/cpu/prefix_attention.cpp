// The CPU kernels of prefix_attention, for one instruction set (vec.h).
//
// Flash attention (Dao et al., "FlashAttention-2", 2023) with the query rows of a block in lanes: a tile of scores has
// a row a key, so that maxima, sums and what belongs to a query row are plain vector operations. The products are small
// GEMMs on tiles (tile.h), each operand in panels of KEYS keys that are laid out once for all rows that see them:
//   S[n, m] = Σ_d K[n, d] · Q[m, d]     O[m, d] = kept[m] · O + added[m] · Σ_n P[n, m] · V[n, d]
//   dP[n, m] = Σ_d V[n, d] · dO[m, d]   dQ[m, d] += Σ_n dS[n, m] · K[n, d]
//   dK[n, d] += Σ_m dS[n, m] · Q[m, d]  dV[n, d] += Σ_m P[n, m] · dO[m, d]
// A panel is merged into (o, lse), and the next into the result; lse is kept to base 2 meanwhile. T is the compute
// dtype, E what tiles are multiplied in (pairs along D in S and dP, along keys in O and dQ, along rows in dK and dV).
// Sums over rows lie in one slot a thread, or are partial results that are added in a fixed order: for a given number
// of threads results repeat bit for bit.
#include "../prefix_attention.h"

#include <float.h>
#include <omp.h>

#include "columns.h"
#include "dot.h"
#include "exp.h"
#include "segment.h"

namespace {

// Two rows of a panel's tile as what is multiplied: across them, and along each (one and the same for floats).
FP_INLINE void store_across(float* tile, int n, int lane, V first, V second) {
  store(tile + n * LD + lane, first), store(tile + (n + 1) * LD + lane, second);
}
#ifdef FASTPEFT_DOT
FP_INLINE void store_across(bf16x2* tile, int n, int lane, V first, V second) {
  zip(tile + n / 2 * LD + lane, first, second);
}
FP_INLINE void store_along(bf16x2* tile, int n, int lane, V first, V second) {
  bf16* at = (bf16*)(tile + n * ALONG_LD<bf16x2>)+lane;
  store(at, first), store(at + 2 * ALONG_LD<bf16x2>, second);
}
#endif
FP_INLINE void store_along(float*, int, int, V, V) {}

// ---- attend ----

// What a panel's sum becomes in o[i, d].
struct Merge {
  const float *kept, *added;
  template <class C>
  FP_INLINE V operator()(const C* at, int64_t i, V sum) const {
    return fma(load(at), set1(kept[i]), mul(sum, set1(added[i])));
  }
};

// Scores s [n, LD] become weights p, relative to their maximum or lse's, whichever is greater: o' = kept · o + added ·
// Σ p v. lse (to base 2) becomes the merged one. N vectors of lanes at a time.
template <int N, class E>
FP_INLINE void weigh_lanes(float* s, E* p, int count, int lane, const Factors& f, float* lse, float* kept,
                           float* added) {
  const V scale = set1(f.scale * LOG2E);
  V most[N], total[N], old[N];
#pragma GCC unroll 2
  for (int i = 0; i < N; ++i) most[i] = load(lse + lane + i * W);
  for (int n = 0; n < count; ++n)
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
      const int at = lane + i * W;
      const V factor = f.gate_k ? mul(scale, f.gate_k.at(n, at)) : scale;
      const V raw = load(s + n * LD + at);
      const V score = f.bias ? fma(raw, factor, f.bias.at(n, at)) : mul(raw, factor);
      store(s + n * LD + at, score);
      most[i] = max(most[i], score);
    }
#pragma GCC unroll 2
  for (int i = 0; i < N; ++i) {
    most[i] = max(most[i], set1(-FLT_MAX));  // of nothing seen: -Inf - -Inf is NaN
    old[i] = total[i] = exp2(sub(load(lse + lane + i * W), most[i]));
  }
  const auto weight = [&](int n, int i) {
    const V weight = exp2(sub(load(s + n * LD + lane + i * W), most[i]));
    total[i] = add(total[i], weight);
    const V gated = f.gate_v ? mul(weight, f.gate_v.at(n, lane + i * W)) : weight;
    return f.keep ? mul(gated, f.keep.at(n, lane + i * W)) : gated;
  };
  for (int n = 0; n < count; n += 2)
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
      const V first = weight(n, i), second = n + 1 < count ? weight(n + 1, i) : zero();
      store_across(p, n, lane + i * W, first, second);
    }
#pragma GCC unroll 2
  for (int i = 0; i < N; ++i) {
    const V inverse = if_zero(total[i], zero(), div(set1(1.0f), total[i]));
    store(kept + lane + i * W, mul(old[i], inverse));
    store(added + lane + i * W, inverse);
    store(lse + lane + i * W, if_zero(total[i], set1(-INFINITY), add(most[i], log2(total[i]))));
  }
}
template <class E>
void weigh(float* s, E* p, int count, int lanes, const Factors& f, float* lse, float* kept, float* added) {
  int lane = 0;
  for (; lane + 2 * W <= lanes; lane += 2 * W) weigh_lanes<2>(s, p, count, lane, f, lse, kept, added);
  if (lane < lanes) weigh_lanes<1>(s, p, count, lane, f, lse, kept, added);
}

constexpr int FEW_ROWS = W / 2;

// A thread's buffers and what it does with a block of rows.
template <class T, class E>
struct Attending {
  const Attend& d;
  const Segment& s;
  const Sizes<E> size;
  const Mask mask;
  const int64_t tile_ld;
  Operands<T, E> keys;
  E *q, *p;
  float *s_tile, *o_tile;
  PlaneTile planes[4];
  struct {  // of each lane: lse to base 2, what of o is kept and what is added to it, gate_out
    alignas(64) float lse[LANES], kept[LANES], added[LANES], gate[LANES];
  } row;

  static int64_t needs(const Attend& d, bool stay) {
    const Sizes<E> size(d.D);
    return Operands<T, E>::needs(d.segment, size, stay, 1, 1) + size.along + 6 * Workspace::size(KEYS * LD) +
           Workspace::size(LANES * (size.wide + 16));
  }
  Attending(const Attend& d, bool stay, Arena arena)
      : d(d),
        s(d.segment),
        size(d.D),
        mask(s.dropout, s.projection),
        tile_ld(size.wide + 16),
        keys(s, size, stay, {true, false, false, true}, arena),
        q(arena.take<E>(size.along)),
        p(arena.take<E>(KEYS * LD)),
        s_tile(TERMS<E> == 1 ? (float*)p : arena.take(KEYS * LD)),
        o_tile(arena.take(LANES * tile_ld)) {
    for (PlaneTile& plane : planes) plane.tile = arena.take(KEYS * LD);
  }

  void block(const Block& b, int64_t hk) {
    const int64_t a = block_of(s, b.b), N = length_of(s, a), seen = seen_of(s, b, d.T, N);
    if (d.before.data)
      b.each([&](int, int64_t i, int64_t h, int64_t t) {
        memcpy(row_at<T>(d.o, i, h, t), row_at<T>(d.before, i, h, t), sizeof(T) * d.D);
      });
    if (a < 0 || (N == 0 && !d.fresh)) return nothing(b, a);
    const int64_t panels = blocks(seen, KEYS);
    // they read keys unrounded, and so where those are not rounded: lse must be what backward's scores add up to
    const bool exact = IS_FLOAT<Ranks<T>> || s.k.dtype == d.dtype;
    const bool few = !keys.stay && b.rows() <= FEW_ROWS && s.k.dtype == s.v.dtype && exact;
    const bool direct = panels == 1 && b.one_run() && d.D % W == 0 && !d.fresh && !few;  // straight into o
    begin(b, a, direct);
    if (few)
      rows_to_float(b);
    else
      rows_along<T>(q, d.q, b, size);
    keys.choose(a, hk);
    auto lines = lines_of<T>(d.o, b, d.D, direct);
    for (int64_t i = 0; i < panels; ++i) {
      const Panel panel{i * KEYS, (int)smaller(KEYS, seen - i * KEYS)};
      const Factors f{planes[0].read(s.gate_k, b, a, panel), planes[1].read(s.gate_v, b, a, panel),
                      read_bias(planes[2].tile, s, b, a, panel, d.T, N), mask.read(planes[3].tile, b, d.H, d.T, panel),
                      s.scale};
      if (few) {
        if (s.k.dtype == FLOAT32) merge_few<float>(b, panel, f);
        if (s.k.dtype == BFLOAT16) merge_few<bf16>(b, panel, f);
        if (s.k.dtype == FLOAT16) merge_few<f16>(b, panel, f);
        continue;
      }
      keys.lay_out(i, N);
      scores(s_tile, keys.k_along(i), q, panel.n, size.depth, b.lanes(), lines);
      weigh(s_tile, p, panel.n, b.lanes(), f, row.lse, row.kept, row.added);
      if (!direct) {
        merge(o_tile, tile_ld, b, i, panel);
        continue;
      }
      for (int r = 0; d.separate && r < LANES; ++r) row.kept[r] = 1.0f, row.added[r] *= row.gate[r];
      merge(row_at<T>(d.o, b.b, b.h, b.t), d.o.t, b, i, panel);
    }
    finish(b, direct);
  }

  void begin(const Block& b, int64_t a, bool direct) {
    const bool starts = d.separate || d.fresh;
    for (float& each : row.lse) each = -INFINITY;
    if (!starts) b.each([&](int lane, int64_t i, int64_t h, int64_t t) { row.lse[lane] = LOG2E * d.lse.at(i, h, t); });
    if (d.separate) read_gate_out(row.gate, s, b, a);
    if (direct) return;
    if (starts) memset(o_tile, 0, sizeof(float) * b.rows() * tile_ld);
    if (!starts)
      b.each([&](int lane, int64_t i, int64_t h, int64_t t) {
        convert_row(o_tile + lane * tile_ld, row_at<T>(d.o, i, h, t), d.D);
      });
  }

  // o[lane, d] = kept[lane] · o + added[lane] · Σ_n p[n, lane] · v[n, d]
  template <class C>
  void merge(C* o, int64_t ld, const Block& b, int64_t i, Panel panel) {
    NoTile none;
    tile_gemm<1, LD>(o, ld, p, keys.v_across(i), size.wide, b.rows(), blocks(panel.n, TERMS<E>), (int)(size.wide / W),
                     none, Merge{row.kept, row.added});
  }

  void finish(const Block& b, bool direct) {
    b.each([&](int lane, int64_t i, int64_t h, int64_t t) { d.lse.at(i, h, t) = LN2 * row.lse[lane]; });
    if (direct) return;
    b.each([&](int lane, int64_t i, int64_t h, int64_t t) {
      T* o = row_at<T>(d.o, i, h, t);
      float* sum = o_tile + lane * tile_ld;
      if (d.separate) {
        alignas(64) float before[MAX_HEAD_DIM];
        convert_row(before, o, d.D);
        const V gate_out = set1(row.gate[lane]);
        for (int64_t j = 0; j < size.wide; j += W) store(sum + j, fma(gate_out, load(sum + j), load(before + j)));
      }
      convert_row(o, sum, d.D);
    });
  }

  // ---- few rows, whose keys no other block sees: read where they lie, at the speed of memory (dot.h, columns.h) ----

  // [rows, wide] in q, zeros behind D
  void rows_to_float(const Block& b) {
    b.each([&](int lane, int64_t i, int64_t h, int64_t t) {
      float* to = (float*)q + lane * size.wide;
      store(to + size.wide - W, zero());
      convert_row(to, row_at<T>(d.q, i, h, t), d.D);
    });
  }

  template <class Key>
  void merge_few(const Block& b, Panel panel, const Factors& f) {
    alignas(64) float by_row[W * KEYS], sums[FEW_ROWS * MAX_HEAD_DIM];
    const int64_t wide = size.wide;
    const int rows = b.rows();
    const Matrix k = keys_of(s.k, s, keys.a, keys.hk), v = keys_of(s.v, s, keys.a, keys.hk);
    dot_rows(by_row, KEYS, (const Key*)k.data + panel.n0 * k.ld, k.ld, panel.n, (const float*)q, wide, rows, d.D,
             nullptr, 0, nullptr, 0);
    transpose(s_tile, LD, by_row, KEYS, rows, panel.n);
    weigh(s_tile, s_tile, panel.n, b.lanes(), f, row.lse, row.kept, row.added);
    transpose(by_row, KEYS, s_tile, LD, panel.n, rows);
    columns(sums, wide, (const Key*)v.data + panel.n0 * v.ld, v.ld, d.D, by_row, KEYS, rows, panel.n);
    const Merge merged{row.kept, row.added};
    for (int lane = 0; lane < rows; ++lane)
      for (int64_t j = 0; j < wide; j += W) {
        float* to = o_tile + lane * tile_ld + j;
        store(to, merged(to, lane, load(sums + lane * wide + j)));
      }
  }

  // rows that see no key of this segment, or that ask for one that is not there
  void nothing(const Block& b, int64_t a) const {
    if (a != FOREIGN && !d.separate) return;
    alignas(64) float nan[MAX_HEAD_DIM];
    for (float& each : nan) each = NAN;
    b.each([&](int, int64_t i, int64_t h, int64_t t) {
      d.lse.at(i, h, t) = a == FOREIGN ? NAN : -INFINITY;
      if (a == FOREIGN) convert_row(row_at<T>(d.o, i, h, t), nan, d.D);
    });
  }
};

template <class T, class E = float>
int attend(const Attend& d) {
  const Segment& s = d.segment;
  const int64_t G = d.H / s.Hk;
  const Cut cut(d.B, d.T, G, !s.index && !s.by_row);
  const int64_t batches = blocks(d.B, cut.bn), units = s.Hk * batches * cut.row_blocks;
  const bool stay = (s.by_row || s.index ? 1 : batches) * cut.row_blocks * blocks(G, cut.hn) > 1;
  const int threads = d.way.team(2.0 * d.B * d.H * d.T * d.D * s.N);
  const int64_t of_thread = Attending<T, E>::needs(d, stay);
  Workspace work;
  if (!work.allocate(threads * of_thread)) return OUT_OF_MEMORY;
  float* base = work.take(threads * of_thread);
  const int64_t chunk = blocks(units, 8 * threads);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Attending<T, E> attending(d, stay, {base + omp_get_thread_num() * of_thread});
#pragma omp for schedule(dynamic, chunk)
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t t = unit % cut.row_blocks * cut.tn, b = unit / cut.row_blocks % batches * cut.bn;
      const int64_t hk = unit / cut.row_blocks / batches;
      for (int64_t g = 0; g < G; g += cut.hn)
        attending.block({b, smaller(cut.bn, d.B - b), hk * G + g, smaller(cut.hn, G - g), t, smaller(cut.tn, d.T - t)},
                        hk);
    }
  }
  return OK;
}

// ---- grad ----

struct Lanes {  // what belongs to a row: lse to base 2, +Inf where nothing was seen; Δ; gate_out
  alignas(64) float lse[LANES], delta[LANES], gate[LANES];
};

// sums[lane] += Σ_n p · Gv · keep · dP without gate_out: Δ of a separate softmax, and gate_out's gradient
void add_delta(float* sums, const float* s, const float* dp, int count, int lanes, const Factors& f, const Lanes& row) {
  const V scale = set1(f.scale * LOG2E);
  for (int lane = 0; lane < lanes; lane += W) {
    V total = load(sums + lane);
    for (int n = 0; n < count; ++n) {
      const V factor = f.gate_k ? mul(scale, f.gate_k.at(n, lane)) : scale;
      V score = mul(load(s + n * LD + lane), factor), weight = load(dp + n * LD + lane);
      if (f.bias) score = add(score, f.bias.at(n, lane));
      if (f.gate_v) weight = mul(weight, f.gate_v.at(n, lane));
      if (f.keep) weight = mul(weight, f.keep.at(n, lane));
      total = fma(exp2(sub(score, load(row.lse + lane))), weight, total);
    }
    store(sums + lane, total);
  }
}

template <class E>
struct GradTiles {
  E *ds_across, *ds_along, *p_along;  // floats: along is across, and p_along the tile of dP
  Sums gate_k, gate_v, bias;
};

// Scores s and dP [n, LD] become scale · Gk · dS and Gv · keep · gate_out · P, and what the planes' gradients sum.
template <class E>
void differentiate(const float* s, const float* dp, int count, int lanes, const Factors& f, const Lanes& row,
                   const GradTiles<E>& to) {
  const V scale = set1(f.scale), scale2 = set1(f.scale * LOG2E);
  for (int lane = 0; lane < lanes; lane += W) {
    const V lse = load(row.lse + lane), delta = load(row.delta + lane), gate = load(row.gate + lane);
    const auto key = [&](int n, V* ds_out, V* p_out) {
      const V gate_k = f.gate_k ? f.gate_k.at(n, lane) : set1(1.0f), raw = load(s + n * LD + lane);
      V score = mul(raw, mul(scale2, gate_k)), keep = gate;
      if (f.bias) score = add(score, f.bias.at(n, lane));
      if (f.keep) keep = mul(keep, f.keep.at(n, lane));
      const V p = exp2(sub(score, lse)), dw = mul(keep, load(dp + n * LD + lane));
      const V weight = f.gate_v ? f.gate_v.at(n, lane) : set1(1.0f);
      const V ds = mul(p, sub(mul(weight, dw), delta)), scaled = mul(ds, scale);
      if (to.gate_k) to.gate_k.add_to(n, lane, mul(scaled, raw));
      if (to.gate_v) to.gate_v.add_to(n, lane, mul(p, dw));
      if (to.bias) to.bias.add_to(n, lane, ds);
      *ds_out = mul(scaled, gate_k), *p_out = mul(mul(p, keep), weight);
    };
    for (int n = 0; n < count; n += 2) {
      V ds[2] = {zero(), zero()}, p[2] = {zero(), zero()};
      key(n, ds, p);
      if (n + 1 < count) key(n + 1, ds + 1, p + 1);
      store_across(to.ds_across, n, lane, ds[0], ds[1]);
      store_along(to.ds_along, n, lane, ds[0], ds[1]);
      if constexpr (TERMS<E> == 1)
        store_across(to.p_along, n, lane, p[0], p[1]);
      else
        store_along(to.p_along, n, lane, p[0], p[1]);
    }
  }
}

// The fp32 sums of dK and dV of one (a, hk), [N, wide] each.
struct Slot {
  float *k, *v;
};

struct PlaneGrads {
  PlaneGrad gate_k, gate_v, bias, gate_out;
};

// A thread's buffers and what it does with a block of rows.
template <class T, class E>
struct Differentiating {
  const GradAttend& d;
  const Segment& s;
  const PlaneGrads& grads;
  const Sizes<E> size;
  const Mask mask;
  const int64_t tile_ld;
  const bool wants_keys;
  Operands<T, E> keys;
  E *q, *grad_o, *q_across, *grad_o_across;
  GradTiles<E> tiles;
  float *s_tile, *dp_tile, *dq_tile, *sums[3];
  PlaneTile planes[4];
  Lanes row;

  static int64_t needs(const GradAttend& d) {
    const Sizes<E> size(d.D);
    return Operands<T, E>::needs(d.segment, size, true, 2, 1) + 2 * (size.along + size.across) +
           (2 + 3 + 4 + 3) * Workspace::size(KEYS * LD) + Workspace::size(LANES * (size.wide + 16));
  }
  Differentiating(const GradAttend& d, const PlaneGrads& grads, Arena arena)
      : d(d),
        s(d.segment),
        grads(grads),
        size(d.D),
        mask(s.dropout, s.projection),
        tile_ld(size.wide + 16),
        wants_keys(d.grad_k.data || d.grad_v.data),
        keys(s, size, true, {true, true, true, false}, arena),
        q(arena.take<E>(size.along)),
        grad_o(arena.take<E>(size.along)),
        q_across(arena.take<E>(size.across)),
        grad_o_across(arena.take<E>(size.across)),
        s_tile(arena.take(KEYS * LD)),
        dp_tile(arena.take(KEYS * LD)),
        dq_tile(arena.take(LANES * tile_ld)) {
    for (PlaneTile& plane : planes) plane.tile = arena.take(KEYS * LD);
    for (float*& sum : sums) sum = arena.take(KEYS * LD);
    if constexpr (TERMS<E> == 1) {
      tiles.ds_across = tiles.ds_along = s_tile, tiles.p_along = dp_tile;
    } else {
      tiles.ds_across = arena.take<E>(KEYS * LD);
      tiles.ds_along = arena.take<E>(KEYS * LD), tiles.p_along = arena.take<E>(KEYS * LD);
    }
  }

  // the scores of panel i and dP, and what they are multiplied with
  Factors read(const Block& b, int64_t a, int64_t N, int64_t i, Panel panel, NextLines<T>& lines) {
    NoTile none;
    keys.lay_out(i, N);
    scores(s_tile, keys.k_along(i), q, panel.n, size.depth, b.lanes(), lines);
    scores(dp_tile, keys.v_along(i), grad_o, panel.n, size.depth, b.lanes(), none);
    return {planes[0].read(s.gate_k, b, a, panel), planes[1].read(s.gate_v, b, a, panel),
            read_bias(planes[2].tile, s, b, a, panel, d.T, N), mask.read(planes[3].tile, b, d.H, d.T, panel), s.scale};
  }

  // `first`, `last`: of the heads of a group, whose blocks are alike
  void block(const Block& b, int64_t a, int64_t hk, int64_t row_block, const Slot& slot, bool first, bool last) {
    const int64_t N = length_of(s, a), seen = seen_of(s, b, d.T, N), panels = blocks(seen, KEYS), D = d.D;
    const bool wants_q = d.grad_q.data, direct = wants_q && panels == 1 && b.one_run() && D % W == 0;
    constexpr int ALONG = TERMS<E> == 1 ? LD : ALONG_LD<E>;
    const auto panel_of = [&](int64_t i) { return Panel{i * KEYS, (int)smaller(KEYS, seen - i * KEYS)}; };
    if (panels) {
      keys.choose(a, hk);
      rows_along<T>(q, d.q, b, size), rows_along<T>(grad_o, d.grad_o, b, size);
      if (wants_keys) rows_across<T>(q_across, d.q, b, size), rows_across<T>(grad_o_across, d.grad_o, b, size);
      read_rows(b, a);
    }
    auto lines = lines_of<T>(d.grad_q, b, D, direct && !d.fresh);
    Factors f{};
    if (d.separate) {
      alignas(64) float total[LANES] = {};
      for (int64_t i = 0; i < panels; ++i) {
        f = read(b, a, N, i, panel_of(i), lines);
        add_delta(total, s_tile, dp_tile, panel_of(i).n, b.lanes(), f, row);
      }
      for (int i = 0; i < LANES; ++i) row.delta[i] = row.gate[i] * total[i];
      if (grads.gate_out.out && panels)
        b.each([&](int lane, int64_t i, int64_t h, int64_t) { *grads.gate_out.row(i, h, row_block) += total[lane]; });
    }
    if (wants_q && !direct) memset(dq_tile, 0, sizeof(float) * b.rows() * tile_ld);

    NoTile none;
    const int vecs = (int)(size.wide / W);
    for (int64_t i = 0; i < panels; ++i) {
      const Panel panel = panel_of(i);
      if (!d.separate || panels > 1) f = read(b, a, N, i, panel, lines);
      const bool next_head = panels == 1 && !first, more_heads = panels == 1 && !last;
      tiles.gate_k = grads.gate_k.begin(sums[0], b, panel, next_head);
      tiles.gate_v = grads.gate_v.begin(sums[1], b, panel, next_head);
      tiles.bias = grads.bias.begin(sums[2], b, panel, next_head);
      differentiate(s_tile, dp_tile, panel.n, b.lanes(), f, row, tiles);
      grads.gate_k.finish(tiles.gate_k, b, row_block, panel, more_heads);
      grads.gate_v.finish(tiles.gate_v, b, row_block, panel, more_heads);
      grads.bias.finish(tiles.bias, b, row_block, panel, more_heads);
      const int64_t depth = blocks(panel.n, TERMS<E>), row_depth = blocks(b.rows(), TERMS<E>);
      if (direct) {
        T* dq = row_at<T>(d.grad_q, b.b, b.h, b.t);
        if (d.fresh)
          tile_gemm<1, LD>(dq, d.grad_q.t, tiles.ds_across, keys.k_across(i), size.wide, b.rows(), depth, vecs, none,
                           Replace{});
        else
          tile_gemm<1, LD>(dq, d.grad_q.t, tiles.ds_across, keys.k_across(i), size.wide, b.rows(), depth, vecs, none);
      } else if (wants_q) {
        tile_gemm<1, LD>(dq_tile, tile_ld, tiles.ds_across, keys.k_across(i), size.wide, b.rows(), depth, vecs, none);
      }
      if (d.grad_k.data)
        tile_gemm<ALONG, 1>(slot.k + panel.n0 * size.wide, size.wide, tiles.ds_along, q_across, size.wide, panel.n,
                            row_depth, vecs, none);
      if (d.grad_v.data)
        tile_gemm<ALONG, 1>(slot.v + panel.n0 * size.wide, size.wide, tiles.p_along, grad_o_across, size.wide, panel.n,
                            row_depth, vecs, none);
    }
    if (!wants_q || direct || (panels == 0 && !d.fresh)) return;
    b.each([&](int lane, int64_t i, int64_t h, int64_t t) {
      T* dq = row_at<T>(d.grad_q, i, h, t);
      float* sum = dq_tile + lane * tile_ld;
      if (!d.fresh) {
        alignas(64) float before[MAX_HEAD_DIM];
        convert_row(before, dq, D);
        for (int64_t j = 0; j < size.wide; j += W) store(sum + j, add(load(before + j), load(sum + j)));
      }
      convert_row(dq, sum, D);
    });
  }

  void read_rows(const Block& b, int64_t a) {
    for (int i = 0; i < LANES; ++i) row.lse[i] = INFINITY, row.delta[i] = 0.0f;
    read_gate_out(row.gate, s, b, a);
    b.each([&](int lane, int64_t i, int64_t h, int64_t t) {
      const float lse = d.lse.at(i, h, t);
      row.lse[lane] = lse == -INFINITY ? INFINITY : lse * LOG2E;
      if (!d.separate) row.delta[lane] = dot(row_at<T>(d.grad_o, i, h, t), row_at<T>(d.o, i, h, t), d.D);
    });
  }
  static float dot(const T* x, const T* y, int64_t n) {
    V total = zero();
    int64_t i = 0;
    for (; i + W <= n; i += W) total = fma(load(x + i), load(y + i), total);
    if (i < n) total = fma(load_partial(x + i, (int)(n - i)), load_partial(y + i, (int)(n - i)), total);
    return sum(total);
  }
};

// How many blocks of keys some row sees, and which.
int64_t used_blocks(const Segment& s, int64_t B, int32_t* used = nullptr) {
  int64_t count = 0;
  for (int64_t b = 0; b < (s.index || s.by_row ? B : smaller(B, 1)); ++b) {
    const int64_t a = block_of(s, b);
    bool is_new = a >= 0;
    for (int64_t earlier = 0; s.index && is_new && earlier < b; ++earlier) is_new = block_of(s, earlier) != a;
    if (is_new && used) used[count] = (int32_t)a;
    count += is_new;
  }
  return count;
}

// How the threads share the sums over rows: a cell is one used (a, hk), or of few of them one of `parts` ranges of its
// rows. Of the ways to cut, the one with the least work for the busiest thread.
int parts_of(int64_t groups, int threads) {
  int best = 1;
  double least = -1;
  for (int parts = 1; parts <= threads && groups < 4 * threads; ++parts) {
    const double cost = (double)blocks(groups * parts, threads) / parts;
    if (least < 0 || cost < 0.95 * least) least = cost, best = parts;
  }
  return best;
}

// row n of a gradient of keys: the sum of `parts` slots [N, wide], `stride` apart
void write_keys(const HeadKeys& to, const Segment& s, int64_t a, int64_t hk, float* sum, int64_t n, int64_t parts,
                int64_t stride, int64_t D, int64_t wide) {
  const Matrix rows = keys_of(to, s, a, hk);
  for (int64_t i = 0; i < wide; i += W) {
    V total = load(sum + n * wide + i);
    for (int64_t part = 1; part < parts; ++part) total = add(total, load(sum + part * stride + n * wide + i));
    store(sum + n * wide + i, total);
  }
  row_from_float((void*)element(rows.data, rows.dtype, n * rows.ld), rows.dtype, sum + n * wide, D);
}

// what no row sees: a gradient is zero there
void zero_keys(const HeadKeys& to, const Segment& s, int64_t D, int64_t columns) {
  if (!to.data) return;
  for (int64_t a = 0; a < (s.offsets ? 1 : s.A); ++a)
    for (int64_t hk = 0; hk < s.Hk; ++hk)
      for (int64_t n = 0; n < columns; ++n)
        memset((void*)element(to.data, to.dtype, a * to.a + hk * to.h + n * to.n), 0, (size_t)(D * size_of(to.dtype)));
}

// The second stage of a plane's gradient: sums over what the plane is broadcast along.
void sum_plane(const PlaneGrad& g, const GradAttend& d) {
  const Plane& p = g.plane;
  if (!g.out || g.is_whole()) return;
  const int64_t B = p.has_b ? d.B : 1, H = p.has_h ? d.H : 1, T = p.has_t ? d.T : 1;
#pragma omp for schedule(static)
  for (int64_t i = 0; i < B * H * T; ++i) {
    const int64_t t = i % T, h = i / T % H, b = i / T / H;
    float* to = g.out + i * g.columns;
    memset(to, 0, sizeof(float) * g.columns);
    for (int64_t j = p.has_b ? b : 0; j < (p.has_b ? b + 1 : d.B); ++j)
      g.add_rows(to, j, p.has_h ? h : 0, p.has_h ? h + 1 : g.heads, p.has_t ? t : 0, p.has_t ? t + 1 : g.rows,
                 g.columns);
  }
}

// The same of a plane by key [A or 1, H, columns]: from batch rows to the segment's blocks of keys.
void sum_plane_by_key(const PlaneGrad& g, const GradAttend& d, int64_t columns) {
  const Segment& s = d.segment;
  const Plane& p = g.plane;
  if (!g.out) return;
  const int64_t A = p.has_b ? s.A : 1;
#pragma omp for schedule(static)
  for (int64_t h = 0; h < d.H; ++h) {
    for (int64_t a = 0; a < A; ++a) memset(g.out + (a * d.H + h) * columns, 0, sizeof(float) * columns);
    for (int64_t b = 0; b < d.B; ++b) {
      const int64_t a = block_of(s, b);
      if (a < 0) continue;
      float* to = g.out + ((p.has_b ? a : 0) * d.H + h) * columns + (s.offsets && p.has_n ? s.offsets[a] : 0);
      g.add_rows(to, b, h, h + 1, 0, g.rows, p.has_n ? length_of(s, a) : 1);
    }
  }
}

template <class T, class E = float>
int grad(const GradAttend& d) {
  const Segment& s = d.segment;
  const bool wants_keys = d.grad_k.data || d.grad_v.data;
  const int64_t G = d.H / s.Hk, wide = round_up(d.D, W), slot_size = Workspace::size(s.N * wide);
  const Cut cut(d.B, d.T, G, false);
  const int threads = d.way.team(5.0 * d.B * d.H * d.T * d.D * s.N);
  PlaneGrads grads{{s.gate_k, d.grad_gate_k, d, cut.row_blocks},
                   {s.gate_v, d.grad_gate_v, d, cut.row_blocks},
                   {s.bias, d.grad_bias, d, cut.row_blocks},
                   {s.gate_out, d.grad_gate_out, d, cut.row_blocks}};
  PlaneGrad* const all[] = {&grads.gate_k, &grads.gate_v, &grads.bias, &grads.gate_out};

  const int64_t used_count = used_blocks(s, d.B), parts = parts_of(used_count * s.Hk, threads);
  const int64_t cells = used_count * s.Hk * parts, slots = !wants_keys ? 0 : parts > 1 ? cells : threads;
  const int64_t of_thread = Differentiating<T, E>::needs(d);
  int64_t needs = threads * of_thread + slots * 2 * slot_size + Workspace::size(used_count);
  for (const PlaneGrad* g : all) needs += g->is_whole() ? 0 : Workspace::size(g->size());
  Workspace work;
  if (!work.allocate(needs)) return OUT_OF_MEMORY;
  float* base = work.take(threads * of_thread);
  float *slots_k = work.take(slots * slot_size), *slots_v = work.take(slots * slot_size);
  int32_t* used = work.take<int32_t>(used_count);
  used_blocks(s, d.B, used);
  for (PlaneGrad* g : all) {
    g->stage = g->is_whole() ? g->out : work.take(g->size());
    if (g->size()) memset(g->stage, 0, sizeof(float) * g->size());
  }
  if (used_count < s.A || s.lengths || s.offsets) {
    const int64_t columns = s.offsets ? d.columns : s.N;
    zero_keys(d.grad_k, s, d.D, columns), zero_keys(d.grad_v, s, d.D, columns);
  }

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Differentiating<T, E> differentiating(d, grads, {base + omp_get_thread_num() * of_thread});
    const auto write = [&](int64_t a, int64_t hk, int64_t slot, int64_t n) {
      if (d.grad_k.data) write_keys(d.grad_k, s, a, hk, slots_k + slot * slot_size, n, parts, slot_size, d.D, wide);
      if (d.grad_v.data) write_keys(d.grad_v, s, a, hk, slots_v + slot * slot_size, n, parts, slot_size, d.D, wide);
    };
#pragma omp for schedule(dynamic)
    for (int64_t cell = 0; cell < cells; ++cell) {
      const int64_t a = used[cell / parts / s.Hk], hk = cell / parts % s.Hk, N = length_of(s, a);
      const int64_t slot = parts > 1 ? cell : omp_get_thread_num();
      if (d.grad_k.data) memset(slots_k + slot * slot_size, 0, sizeof(float) * N * wide);
      if (d.grad_v.data) memset(slots_v + slot * slot_size, 0, sizeof(float) * N * wide);
      int64_t rows = 0;  // blocks of rows that see a
      for (int64_t b = 0; b < d.B; ++b) rows += block_of(s, b) == a ? cut.row_blocks : 0;
      const Part part(rows, parts, cell % parts);
      int64_t first = 0;  // of batch row b, among those
      for (int64_t b = 0; b < d.B && first < part.end; ++b) {
        if (block_of(s, b) != a) continue;
        for (int64_t i = 0; i < cut.row_blocks; ++i) {
          if (first + i < part.begin || first + i >= part.end) continue;
          const int64_t t = i * cut.tn;
          const bool alike = G % cut.hn == 0;
          for (int64_t g = 0; g < G; g += cut.hn)
            differentiating.block({b, 1, hk * G + g, smaller(cut.hn, G - g), t, smaller(cut.tn, d.T - t)}, a, hk, i,
                                  {slots_k + slot * slot_size, slots_v + slot * slot_size}, !alike || g == 0,
                                  !alike || g + cut.hn >= G);
        }
        first += cut.row_blocks;
      }
      for (int64_t n = 0; parts == 1 && n < N; ++n) write(a, hk, slot, n);
    }
    if (parts > 1 && wants_keys) {
#pragma omp for schedule(static) collapse(2)
      for (int64_t group = 0; group < used_count * s.Hk; ++group)
        for (int64_t n = 0; n < s.N; ++n)
          if (n < length_of(s, used[group / s.Hk])) write(used[group / s.Hk], group % s.Hk, group * parts, n);
    }
    sum_plane(grads.gate_k, d), sum_plane(grads.gate_v, d);
    sum_plane_by_key(grads.bias, d, s.offsets ? d.columns : s.N), sum_plane_by_key(grads.gate_out, d, 1);
  }
  return OK;
}

// ---- the table ----

int attend_any(const Attend& d) { FASTPEFT_BY_ELEMENT(attend, d, d.dtype); }
int grad_any(const GradAttend& d) { FASTPEFT_BY_ELEMENT(grad, d, d.dtype); }

}  // namespace

const PrefixAttentionKernels fastpeft::FASTPEFT_TABLE(prefix_attention) = {attend_any, grad_any};
