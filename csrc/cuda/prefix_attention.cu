// The prefix's part of attention on the GPU: what each kernel computes stands in ../prefix_attention_cuda.h.
//
// A program takes BM queries of one head, a warp 16 of them, and goes through the row's own prefix in tiles of BN
// positions in shared memory; products are those of device.h on tensor cores. Scores and weights stay in registers,
// gates and biases are read where they are used. Backward computes scores again in each of its kernels: one for dq, one
// for the gates, one for the prefix, none of which writes what another one adds to.
#include <math.h>

#include "../prefix_attention_cuda.h"
#include "device.h"

namespace fastpeft {
namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int BM = PREFIX_BLOCK_T, BN = PREFIX_BLOCK_P;
static_assert(BM == 16 * WARPS && BN == 32);
constexpr int COLUMNS = PREFIX_COLUMNS;
constexpr float NONE = -INFINITY;  // L where nothing is seen
template <class T>
constexpr int CHUNK = 16 / (int)sizeof(T);  // elements in 16 bytes
template <class T>
constexpr int DTYPE = FLOAT32;
template <>
constexpr int DTYPE<bf16> = BFLOAT16;
template <>
constexpr int DTYPE<f16> = FLOAT16;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int padded(int D) { return (D + 15) / 16 * 16; }

// From one row of a tile to the next in shared memory: 16 bytes more, rows then start in different banks.
template <class T>
__host__ __device__ constexpr int row_elements(int D) {
  return padded(D) + CHUNK<T>;
}

// ---- where things lie ----

// The number of a program in mixed radix, from its last digit on.
struct Digits {
  int rest;
  __device__ __forceinline__ int next(int n) {
    const int digit = rest % n;
    rest /= n;
    return digit;
  }
};

__device__ __forceinline__ int within(int64_t v, int end) { return v < 0 ? 0 : v < end ? (int)v : end; }

// The prefix of a row of the batch: positions [start, start + length) of prefix a. Whatever the tensors say, it lies
// inside what there is.
struct Own {
  int a = -1, start = 0, length = 0;
  bool unknown = false;  // an index out of range, or fewer gates than positions

  __device__ __forceinline__ Own(const PrefixAttentionCuda& d, int b) {
    const int row = d.index ? d.index[b] : 0;
    unknown = row < -1 || row >= d.A;
    if (unknown || row < 0) return;
    a = row;
    int end = d.P;
    if (d.offsets) start = within(d.offsets[a], d.P), end = within(d.offsets[a + 1], d.P);
    length = end < start ? 0 : end - start;
    unknown = length > d.longest;
    if (unknown) length = 0;
    if (d.lengths) length = within(d.lengths[a], length);
  }
};

__device__ __forceinline__ const void* at(const PrefixRowsCuda& d, int a, int h, int position) {
  return (const char*)d.data + (a * d.stride_a + h * d.stride_h + position * d.stride_p) * (d.dtype == FLOAT32 ? 4 : 2);
}
template <class T>
__device__ __forceinline__ T* at(const HeadsCuda& d, int b, int h, int t) {
  return (T*)d.data + b * d.stride_b + h * d.stride_h + t * d.stride_t;
}
__device__ __forceinline__ const float* at(const PrefixGateCuda& d, int b, int h, int p) {
  return d.data ? d.data + b * d.stride_b + h * d.stride_h + p * d.stride_p : nullptr;
}

// One head of a row of the batch.
struct Head {
  const PrefixAttentionCuda& d;
  const Own own;
  const int b, h;
  const float *const gates_k, *const gates_v, *const biases;  // from position 0 of its own prefix on; null: none

  __device__ __forceinline__ Head(const PrefixAttentionCuda& d, int b, int h)
      : d(d),
        own(d, b),
        b(b),
        h(h),
        gates_k(at(d.gate_k, b, h, 0)),
        gates_v(at(d.gate_v, b, h, 0)),
        biases(at(d.log_bias, own.a, h, own.start)) {}

  __device__ __forceinline__ float gate_k(int t, int p) const {
    return gates_k ? gates_k[t * d.gate_k.stride_t + p * d.gate_k.stride_p] : 1.0f;
  }
  __device__ __forceinline__ float gate_v(int t, int p) const {
    return gates_v ? gates_v[t * d.gate_v.stride_t + p * d.gate_v.stride_p] : 1.0f;
  }
  __device__ __forceinline__ float log_bias(int p) const { return biases ? biases[p * d.log_bias.stride_p] : 0.0f; }
  __device__ __forceinline__ float gate_out() const {
    return d.gate_out.data && own.a >= 0 ? *at(d.gate_out, own.a, h, 0) : 1.0f;
  }

  // Which of [16, BN], from query t and position p on, dropout keeps: bit 4n + j is element j of the lane in columns 8n
  // to 8n + 7.
  __device__ __forceinline__ uint32_t kept(int t, int p) const {
    const uint32_t threshold = d.dropout.keep_threshold;
    if (!threshold) return ~0u;
    const uint64_t seed = (uint64_t)*d.dropout.seed;
    const int64_t row = (int64_t)(b * d.H + h) * d.T + t;
    const int lane = threadIdx.x % 32;
    uint32_t bits = 0;
    if (p % 4 == 0) {
#pragma unroll 1
      for (int n = 0; n < BN / 8; ++n) {
        bool keep[4];
        draw_kept(keep, seed, threshold, row, p + n * 8, 0);
#pragma unroll
        for (int j = 0; j < 4; ++j) bits |= (uint32_t)keep[j] << (n * 4 + j);
      }
      return bits;
    }
#pragma unroll 1
    for (int i = 0; i < BN / 2; ++i) {  // in the gradient of flat prefixes: blocks of 4 are shared out otherwise
      const int column = p + i / 4 * 8 + lane % 4 * 2 + i % 2;
      uint32_t w[4];
      random_words(w, seed, (uint32_t)(column >> 2), (uint64_t)(row + lane / 4 + i % 4 / 2 * 8), 0);
      const uint32_t word = column & 2 ? (column & 1 ? w[3] : w[2]) : (column & 1 ? w[1] : w[0]);
      bits |= (uint32_t)(word >= threshold) << i;
    }
    return bits;
  }
};

// to[r, c] = from[r · stride + c] for r < rows and c < columns, else 0; r < tile_rows, c up to a multiple of 16
template <class T>
__device__ __forceinline__ void load_tile(T* to, int ld, const void* from, int dtype, int64_t stride, int rows,
                                          int columns, int tile_rows) {
  const int chunks = padded(columns) / CHUNK<T>;
  const bool whole = (uintptr_t)from % 16 == 0 && stride % 8 == 0 && columns % 8 == 0;
  for (int i = threadIdx.x; i < tile_rows * chunks; i += THREADS) {
    const int r = i / chunks, c = i % chunks * CHUNK<T>;
    const int64_t source = r * stride + c;
    const bool inside = r < rows && c < columns;
    T* const target = to + r * ld + c;
    if (whole && dtype == DTYPE<T>) {
      copy_async(target, inside ? (const T*)from + source : from, inside);
      continue;
    }
    alignas(16) T values[CHUNK<T>];
    if (whole && dtype == FLOAT32) {  // parameters, where the computation has 16 bits
#pragma unroll
      for (int j = 0; j < CHUNK<T>; j += 4) {
        alignas(16) float four[4] = {};
        if (inside) *(uint4*)four = *(const uint4*)((const float*)from + source + j);
#pragma unroll
        for (int k = 0; k < 4; ++k) values[j + k] = from_float<T>(four[k]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < CHUNK<T>; ++j)
        values[j] = from_float<T>(r < rows && c + j < columns ? load_any(from, source + j, dtype) : 0.0f);
    }
    *(uint4*)target = *(const uint4*)values;
  }
}

template <class T>
__device__ __forceinline__ void load_queries(T* to, int ld, const HeadsCuda& from, const Head& head, int t0,
                                             int tile_rows) {
  load_tile(to, ld, at<T>(from, head.b, head.h, t0), DTYPE<T>, from.stride_t, head.d.T - t0, head.d.D, tile_rows);
}

// From position p of the head's own prefix on, `columns` of its elements from c on
template <class T>
__device__ __forceinline__ void load_prefix(T* to, int ld, const PrefixRowsCuda& from, const Head& head, int p, int c,
                                            int columns) {
  const int of = head.h / (head.d.H / head.d.Hk);
  const char* row = (const char*)at(from, head.own.a, of, head.own.start + p) + c * (from.dtype == FLOAT32 ? 4 : 2);
  load_tile(to, ld, row, from.dtype, from.stride_p, head.own.length - p, columns, BN);
}

// ---- products ----

// acc [16, BN] += left [16, D] · right [BN, D]ᵀ
template <class T>
__device__ __forceinline__ void multiply_rows(float (&acc)[BN / 8][4], const T* left, const T* right, int ld, int D) {
  for (int k = 0; k < D; k += 16) {
    Left<T> a;
    load_left<false>(a, left + k, ld);
#pragma unroll
    for (int n = 0; n < BN / 16; ++n) {
      Right<T> b[2];
      load_right<false>(b, right + n * 16 * ld + k, ld);
      multiply(acc[2 * n], a, b[0]);
      multiply(acc[2 * n + 1], a, b[1]);
    }
  }
}

// acc [16, columns] += left [16, 16] · right [16, columns]
template <int N, class T>
__device__ __forceinline__ void multiply_columns(float (&acc)[N / 8][4], const Left<T>& left, const T* right, int ld,
                                                 int columns) {
#pragma unroll
  for (int n = 0; n < N / 16; ++n) {
    if (n * 16 >= columns) continue;
    Right<T> b[2];
    load_right<true>(b, right + n * 16, ld);
    multiply(acc[2 * n], left, b[0]);
    multiply(acc[2 * n + 1], left, b[1]);
  }
}

// The same with left [16, BN] in the order of a product's result
template <class T>
__device__ __forceinline__ void multiply_weights(float (&acc)[COLUMNS / 8][4], const float (&left)[BN / 8][4],
                                                 const T* right, int ld, int columns) {
#pragma unroll
  for (int k = 0; k < BN / 16; ++k) {
    Left<T> a;
    fill(a, [&](int row, int i) { return left[2 * k + i / 8][row * 2 + i % 2]; });
    multiply_columns<COLUMNS>(acc, a, right + k * 16 * ld, ld, columns);
  }
}

__device__ __forceinline__ float over_quad(float v) {  // the sum of the four lanes that share a row
  v += shuffle_xor(v, 1);
  return v + shuffle_xor(v, 2);
}
__device__ __forceinline__ float over_rows(float v) {  // of the eight that share a column
  v += shuffle_xor(v, 4);
  v += shuffle_xor(v, 8);
  return v + shuffle_xor(v, 16);
}

// Thread p < BN gets the sum of column p over all rows of the block's lanes, by way of shared memory.
__device__ __forceinline__ float over_block(const float (&columns)[BN / 8][2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* sums = shared_memory<float>();  // [WARPS, BN], once the tiles are used
#pragma unroll
  for (int n = 0; n < BN / 8; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float sum = over_rows(columns[n][j]);
      if (lane < 4) sums[warp * BN + n * 8 + lane * 2 + j] = sum;
    }
  __syncthreads();
  float total = 0.0f;
  for (int w = 0; w < WARPS && threadIdx.x < BN; ++w) total += sums[w * BN + threadIdx.x];
  __syncthreads();
  return total;
}

// out[t, c] = from[t, c] · factors[row] + acc[row, c] for `columns` of them from c0 on, by way of shared memory so that
// rows are read and written whole. `from` may be out; factors null: ones.
template <class T>
__device__ __forceinline__ void add_rows(const HeadsCuda& out, const HeadsCuda& from, const Head& head, int t0, int c0,
                                         int columns, const float (&acc)[COLUMNS / 8][4], const float* factors) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, ld = padded(columns) + 4;
  float* sums = shared_memory<float>();  // [BM, columns], once the tiles are used
#pragma unroll
  for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (n * 8 < columns) sums[(warp * 16 + lane / 4 + j / 2 * 8) * ld + n * 8 + lane % 4 * 2 + j % 2] = acc[n][j];
  __syncthreads();
  T* const to = at<T>(out, head.b, head.h, t0) + c0;
  const T* const source = at<T>(from, head.b, head.h, t0) + c0;
  const bool whole = ((uintptr_t)to | (uintptr_t)source) % 16 == 0 && columns % CHUNK<T> == 0 &&
                     out.stride_t % CHUNK<T> == 0 && from.stride_t % CHUNK<T> == 0;
  const int chunks = (int)ceil_div(columns, CHUNK<T>);
  for (int i = threadIdx.x; i < BM * chunks; i += THREADS) {
    const int r = i / chunks, c = i % chunks * CHUNK<T>;
    if (t0 + r >= head.d.T) continue;
    const float factor = factors ? factors[r] : 1.0f;
    alignas(16) T values[CHUNK<T>];
    if (whole) *(uint4*)values = *(const uint4*)(source + r * from.stride_t + c);
#pragma unroll
    for (int j = 0; j < CHUNK<T>; ++j) {
      if (c + j >= columns) continue;
      if (!whole) values[j] = source[r * from.stride_t + c + j];
      values[j] = from_float<T>(to_float(values[j]) * factor + sums[r * ld + c + j]);
      if (!whole) to[r * out.stride_t + c + j] = values[j];
    }
    if (whole) *(uint4*)(to + r * out.stride_t + c) = *(const uint4*)values;
  }
  __syncthreads();
}

// ---- forward ----

template <class T>
constexpr size_t forward_shared(int D) {
  return sizeof(T) * (BM + 2 * BN) * row_elements<T>(D) + sizeof(float) * BM;
}

template <class T>
__global__ void __launch_bounds__(THREADS, 3) forward_kernel(PrefixAttentionForwardCuda d) {
  const PrefixAttentionCuda& x = d.call;
  const int ld = row_elements<T>(x.D), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* q_tile = shared_memory<T>();               // [BM, D]
  T* k_tile = q_tile + BM * ld;                 // [BN, D]
  T* v_tile = k_tile + BN * ld;                 // [BN, columns]
  float* factors = (float*)(v_tile + BN * ld);  // [BM]
  const int tiles = ceil_div(x.T, BM), t0 = blockIdx.x % tiles * BM, bh = blockIdx.x / tiles;
  const Head head(x, bh / x.H, bh % x.H);
  const Own& own = head.own;
  if (!x.separate && !own.length && !own.unknown) return;
  const float drop = x.dropout.keep_threshold ? x.dropout.value : 1.0f;
  const bool busy = t0 + warp * 16 < x.T;  // else the warp only helps to load: decoding has one query
  float lse[2];
  for (int c0 = 0; c0 < x.D; c0 += COLUMNS) {
    const int columns = x.D - c0 < COLUMNS ? x.D - c0 : COLUMNS;
    float acc[COLUMNS / 8][4] = {}, top[2] = {NONE, NONE}, total[2] = {};
    if (own.length) load_queries(q_tile, ld, x.q, head, t0, BM);
    for (int p0 = 0; p0 < own.length; p0 += BN) {
      load_prefix(k_tile, ld, x.k, head, p0, 0, x.D);
      commit_copies();
      load_prefix(v_tile, ld, x.v, head, p0, c0, columns);
      commit_copies();
      wait_copies<1>();
      __syncthreads();
      float s[BN / 8][4] = {};
      if (busy) {
        multiply_rows(s, q_tile + warp * 16 * ld, k_tile, ld, x.D);
        float highest[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < BN / 8; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int t = t0 + warp * 16 + lane / 4 + j / 2 * 8, p = p0 + n * 8 + lane % 4 * 2 + j % 2;
            s[n][j] = t < x.T && p < own.length ? x.scale * head.gate_k(t, p) * s[n][j] + head.log_bias(p) : NONE;
            highest[j / 2] = fmaxf(highest[j / 2], s[n][j]);
          }
        float base[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          highest[r] = fmaxf(highest[r], shuffle_xor(highest[r], 1));
          highest[r] = fmaxf(highest[r], shuffle_xor(highest[r], 2));
          base[r] = highest[r] == NONE ? 0.0f : highest[r];
          const float shrink = expf(top[r] - base[r]);
          top[r] = highest[r], total[r] *= shrink;
#pragma unroll
          for (int n = 0; n < COLUMNS / 8; ++n) acc[n][2 * r] *= shrink, acc[n][2 * r + 1] *= shrink;
        }
        const uint32_t kept = head.kept(t0 + warp * 16, p0);
#pragma unroll
        for (int n = 0; n < BN / 8; ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int t = t0 + warp * 16 + lane / 4 + j / 2 * 8, p = p0 + n * 8 + lane % 4 * 2 + j % 2;
            const float weight = expf(s[n][j] - base[j / 2]);
            total[j / 2] += weight;
            s[n][j] = kept >> (n * 4 + j) & 1 && t < x.T && p < own.length ? weight * drop * head.gate_v(t, p) : 0.0f;
          }
        }
      }
      wait_copies<0>();
      __syncthreads();
      if (busy) multiply_weights(acc, s, v_tile, ld, columns);
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp * 16 + lane / 4 + r * 8;
      const int t = t0 + row;
      const float sum = over_quad(total[r]), own_lse = sum == 0.0f ? NONE : top[r] + logf(sum);
      float factor = 1.0f, shrink;
      if (x.separate) {
        lse[r] = own_lse;
        shrink = sum == 0.0f ? 0.0f : head.gate_out() / sum;
      } else {
        const float tokens = t < x.T ? *at<float>(d.lse, head.b, head.h, t) : NONE, higher = fmaxf(tokens, own_lse);
        const bool nothing = tokens == NONE && own_lse == NONE;
        lse[r] = nothing ? NONE : higher + logf(expf(tokens - higher) + expf(own_lse - higher));
        factor = nothing ? 0.0f : expf(tokens - lse[r]);
        shrink = sum == 0.0f ? 0.0f : expf(top[r] - lse[r]);
      }
      if (own.unknown) factor = lse[r] = NAN;
      if (lane % 4 == 0) factors[row] = factor;
#pragma unroll
      for (int n = 0; n < COLUMNS / 8; ++n) acc[n][2 * r] *= shrink, acc[n][2 * r + 1] *= shrink;
    }
    add_rows<T>(d.out, d.o, head, t0, c0, columns, acc, factors);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int t = t0 + warp * 16 + lane / 4 + r * 8;
    if (lane % 4 == 0 && t < x.T) *at<float>(d.lse_out, head.b, head.h, t) = lse[r];
  }
}

// ---- backward ----

struct Weight {
  float weight, dropped;                 // w, m w
  float score, grad_weight, grad_score;  // q·pk, dp, ds
  float gate_k, gate_v;
};

// use(n, j, element j of the lane in columns 8n to 8n + 7) for 16 queries from t on, whose rows of q and do are given,
// and BN positions from p on, whose rows of pk and pv are. Outside all are 0.
template <class T, class Use>
__device__ __forceinline__ void for_each_weight(const PrefixAttentionGradCuda& d, const Head& head, const T* q,
                                                const T* grad_o, const T* k, const T* v, int ld, int t, int p,
                                                Use use) {
  const PrefixAttentionCuda& x = d.call;
  const int lane = threadIdx.x % 32;
  float scores[BN / 8][4] = {}, grads[BN / 8][4] = {};
  multiply_rows(scores, q, k, ld, x.D);
  multiply_rows(grads, grad_o, v, ld, x.D);
  const float drop = x.dropout.keep_threshold ? x.dropout.value : 1.0f;
  const float out = d.delta ? head.gate_out() : 1.0f;  // delta itself is without c
  const uint32_t kept = head.kept(t, p);
  float lse[2], delta[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = t + lane / 4 + r * 8;
    lse[r] = row < x.T ? *at<float>(d.lse, head.b, head.h, row) : NONE;
    delta[r] = row < x.T && d.delta ? d.delta[(int64_t)(head.b * x.H + head.h) * x.T + row] * out : 0.0f;
  }
#pragma unroll
  for (int n = 0; n < BN / 8; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = t + lane / 4 + j / 2 * 8, position = p + n * 8 + lane % 4 * 2 + j % 2;
      Weight e = {};
      if (lse[j / 2] != NONE && position >= 0 && position < head.own.length) {  // outside T it is NONE
        e.gate_k = head.gate_k(row, position), e.gate_v = head.gate_v(row, position);
        e.score = scores[n][j], e.grad_weight = grads[n][j] * out;
        e.weight = expf(x.scale * e.gate_k * e.score + head.log_bias(position) - lse[j / 2]);
        e.dropped = kept >> (n * 4 + j) & 1 ? e.weight * drop : 0.0f;
        e.grad_score = e.dropped * e.gate_v * e.grad_weight - e.weight * delta[j / 2];
      }
      use(n, j, e);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS) delta_kernel(PrefixAttentionDeltaCuda d) {
  const PrefixAttentionCuda& x = d.grad.call;
  const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;  // a warp a row
  const int bh = (int)(row / x.T), t = (int)(row % x.T);
  if (bh >= x.B * x.H) return;
  const T* grad_o = at<T>(d.grad.grad_o, bh / x.H, bh % x.H, t);
  const T* o = at<T>(d.o, bh / x.H, bh % x.H, t);
  const bool whole = ((uintptr_t)grad_o | (uintptr_t)o) % 16 == 0 && x.D % CHUNK<T> == 0;
  float sum = 0.0f;
  for (int c = threadIdx.x % 32 * CHUNK<T>; c < x.D; c += 32 * CHUNK<T>) {
    alignas(16) T left[CHUNK<T>], right[CHUNK<T>];
    if (whole) *(uint4*)left = *(const uint4*)(grad_o + c), *(uint4*)right = *(const uint4*)(o + c);
#pragma unroll
    for (int j = 0; j < CHUNK<T>; ++j) {
      if (c + j >= x.D) continue;
      if (!whole) left[j] = grad_o[c + j], right[j] = o[c + j];
      sum += to_float(left[j]) * to_float(right[j]);
    }
  }
  sum = over_rows(over_quad(sum));
  if (threadIdx.x % 32 == 0) d.delta[row] = sum;
}

template <class T>
constexpr size_t grad_shared(int D) {
  return sizeof(T) * (2 * BM + 2 * BN) * row_elements<T>(D);
}
static_assert(grad_shared<bf16>(256) <= 99 << 10 && grad_shared<float>(128) <= 99 << 10, "what sm_86 and sm_89 have");

template <class T>
__global__ void __launch_bounds__(THREADS, 3) grad_query_kernel(PrefixAttentionGradQueryCuda d) {
  const PrefixAttentionCuda& x = d.grad.call;
  const int ld = row_elements<T>(x.D), warp = threadIdx.x / 32;
  T* q_tile = shared_memory<T>();   // [BM, D]
  T* grad_tile = q_tile + BM * ld;  // [BM, D]
  T* k_tile = grad_tile + BM * ld;  // [BN, D]
  T* v_tile = k_tile + BN * ld;     // [BN, D]
  const int tiles = ceil_div(x.T, BM), t0 = blockIdx.x % tiles * BM, bh = blockIdx.x / tiles;
  const Head head(x, bh / x.H, bh % x.H);
  if (!head.own.length) return;
  for (int c0 = 0; c0 < x.D; c0 += COLUMNS) {
    const int columns = x.D - c0 < COLUMNS ? x.D - c0 : COLUMNS;
    load_queries(q_tile, ld, x.q, head, t0, BM);
    load_queries(grad_tile, ld, d.grad.grad_o, head, t0, BM);
    float acc[COLUMNS / 8][4] = {};
    for (int p0 = 0; p0 < head.own.length; p0 += BN) {
      load_prefix(k_tile, ld, x.k, head, p0, 0, x.D);
      load_prefix(v_tile, ld, x.v, head, p0, 0, x.D);
      commit_copies();
      wait_copies<0>();
      __syncthreads();
      float ds[BN / 8][4];
      if (t0 + warp * 16 < x.T) {
        for_each_weight(d.grad, head, q_tile + warp * 16 * ld, grad_tile + warp * 16 * ld, k_tile, v_tile, ld,
                        t0 + warp * 16, p0,
                        [&](int n, int j, const Weight& e) { ds[n][j] = x.scale * e.gate_k * e.grad_score; });
        multiply_weights(acc, ds, k_tile + c0, ld, columns);
      }
      __syncthreads();
    }
    add_rows<T>(d.dq, d.dq, head, t0, c0, columns, acc, nullptr);
  }
}

// One program sums over its share of (b, h, tile of queries) for one tile of the gate.
template <class T>
__global__ void __launch_bounds__(THREADS) grad_gates_kernel(PrefixAttentionGradGatesCuda d) {
  const PrefixAttentionCuda& x = d.grad.call;
  const int ld = row_elements<T>(x.D), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* q_tile = shared_memory<T>();   // [BM, D]
  T* grad_tile = q_tile + BM * ld;  // [BM, D]
  T* k_tile = grad_tile + BM * ld;  // [BN, D]
  T* v_tile = k_tile + BN * ld;     // [BN, D]
  const int tiles = ceil_div(x.T, BM);
  Digits program{(int)blockIdx.x};
  const int part = program.next(d.parts), tile_p = program.next(ceil_div(d.p, BN));
  const int tile_t = program.next(d.t == 1 ? 1 : tiles), at_h = program.next(d.h), at_b = program.rest;
  const int sum_t = d.t == 1 ? tiles : 1, sum_h = d.h == 1 ? x.H : 1, sum_b = d.b == 1 ? x.B : 1;
  float acc_k[BN / 8][4] = {}, acc_v[BN / 8][4] = {};
  for (int item = part; item < sum_b * sum_h * sum_t; item += d.parts) {
    const Head head(x, at_b + item / (sum_h * sum_t), at_h + item / sum_t % sum_h);
    const int t0 = (tile_t + item % sum_t) * BM, length = head.own.length;
    const int begin = tile_p * BN, end = d.p == 1 ? length : begin + BN < length ? begin + BN : length;
    if (begin >= end) continue;
    load_queries(q_tile, ld, x.q, head, t0, BM);
    load_queries(grad_tile, ld, d.grad.grad_o, head, t0, BM);
    for (int p0 = begin; p0 < end; p0 += BN) {
      load_prefix(k_tile, ld, x.k, head, p0, 0, x.D);
      load_prefix(v_tile, ld, x.v, head, p0, 0, x.D);
      commit_copies();
      wait_copies<0>();
      __syncthreads();
      if (t0 + warp * 16 < x.T)
        for_each_weight(d.grad, head, q_tile + warp * 16 * ld, grad_tile + warp * 16 * ld, k_tile, v_tile, ld,
                        t0 + warp * 16, p0, [&](int n, int j, const Weight& e) {
                          acc_k[n][j] += x.scale * e.score * e.grad_score;
                          acc_v[n][j] += e.dropped * e.grad_weight * (d.delta ? e.gate_v : 1.0f);
                        });
      __syncthreads();
    }
  }
  const auto store = [&](float* partial, const float (&acc)[BN / 8][4]) {
    float* out = partial + (((int64_t)part * d.b + at_b) * d.h + at_h) * d.t * d.p;
    if (d.t != 1) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int t = tile_t * BM + warp * 16 + lane / 4 + r * 8;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < BN / 8; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int p = tile_p * BN + n * 8 + lane % 4 * 2 + j;
            if (d.p != 1 && t < d.t && p < d.p) out[(int64_t)t * d.p + p] = acc[n][r * 2 + j];
            total += acc[n][r * 2 + j];
          }
        total = over_quad(total);
        if (d.p == 1 && t < d.t && lane % 4 == 0) out[t] = total;
      }
      return;
    }
    float columns[BN / 8][2];
#pragma unroll
    for (int n = 0; n < BN / 8; ++n) columns[n][0] = acc[n][0] + acc[n][2], columns[n][1] = acc[n][1] + acc[n][3];
    float total = over_block(columns);
    const int p = tile_p * BN + threadIdx.x;
    if (d.p == 1) {
      total = over_rows(over_quad(total));  // thread 0's warp has all columns
      if (threadIdx.x == 0) out[0] = total;
    } else if (threadIdx.x < BN && p < d.p) {
      out[p] = total;
    }
  };
  if (d.gate_k) store(d.gate_k, acc_k);
  if (d.gate_v) store(d.gate_v, acc_v);
  if (d.delta) store(d.delta, acc_v);
}

// ---- the gradient of the prefix ----

constexpr int WEIGHTS_LD = BN + 4;  // a column is then read from as many banks as there are lanes

// Queries of a tile: fewer where rows are long, so that what sm_86 and sm_89 have holds it all.
template <class T>
__host__ __device__ constexpr int grad_prefix_rows(int D) {
  return sizeof(T) * row_elements<T>(D) > 272 ? BM / 2 : BM;
}
template <class T>
constexpr size_t grad_prefix_shared(int D) {
  return sizeof(T) * (2 * grad_prefix_rows<T>(D) + 2 * BN) * row_elements<T>(D) +
         sizeof(float) * 2 * grad_prefix_rows<T>(D) * WEIGHTS_LD;
}
static_assert(grad_prefix_shared<bf16>(256) <= 99 << 10 && grad_prefix_shared<bf16>(128) <= 99 << 10);

// One program sums over its share of (b, tile of queries) for one head and BN positions, of prefix `a` or, where they
// are flat, of all. Weights go through shared memory: then a warp has 16 positions and half of the columns.
template <class T>
__global__ void __launch_bounds__(THREADS) grad_prefix_kernel(PrefixAttentionGradPrefixCuda d) {
  const PrefixAttentionCuda& x = d.grad.call;
  const int ld = row_elements<T>(x.D), rows = grad_prefix_rows<T>(x.D);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* q_tile = shared_memory<T>();            // [rows, D]
  T* grad_tile = q_tile + rows * ld;         // [rows, D]
  T* k_tile = grad_tile + rows * ld;         // [BN, D]
  T* v_tile = k_tile + BN * ld;              // [BN, D]
  float* to_k = (float*)(v_tile + BN * ld);  // [rows, BN]: weights of q in dpk
  float* to_v = to_k + rows * WEIGHTS_LD;    // of do in dpv
  const int tiles = ceil_div(x.T, rows), prefixes = x.offsets ? 1 : x.A;
  Digits program{(int)blockIdx.x};
  const int part = program.next(d.parts), h = program.next(x.H), c0 = program.next(ceil_div(x.D, COLUMNS)) * COLUMNS;
  const int first = program.next(ceil_div(x.P, BN)) * BN, a = program.rest, group = x.H / x.Hk;
  const int columns = x.D - c0 < COLUMNS ? x.D - c0 : COLUMNS;
  load_tile(k_tile, ld, at(x.k, a, h / group, first), x.k.dtype, x.k.stride_p, x.P - first, x.D, BN);
  load_tile(v_tile, ld, at(x.v, a, h / group, first), x.v.dtype, x.v.stride_p, x.P - first, x.D, BN);
  const int half = (columns + 31) / 32 * 16, position = warp % 2 * 16, column = c0 + warp / 2 * half;
  const int width = padded(x.D) - column < half ? padded(x.D) - column : half;
  float acc_k[COLUMNS / 16][4] = {}, acc_v[COLUMNS / 16][4] = {}, bias[BN / 8][2] = {};
  for (int item = part; item < x.B * tiles; item += d.parts) {
    const Head head(x, item / tiles, h);
    const int t0 = item % tiles * rows, p = first - head.own.start;  // of the tile's first in the row's own prefix
    if (head.own.a < 0 || (!x.offsets && head.own.a != a) || p >= head.own.length || p + BN <= 0) continue;
    __syncthreads();  // until all have used the tiles before
    load_queries(q_tile, ld, x.q, head, t0, rows);
    load_queries(grad_tile, ld, d.grad.grad_o, head, t0, rows);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    const int row = warp * 16;
    if (row < rows && t0 + row < x.T)
      for_each_weight(d.grad, head, q_tile + row * ld, grad_tile + row * ld, k_tile, v_tile, ld, t0 + row, p,
                      [&](int n, int j, const Weight& e) {
                        const int at = (row + lane / 4 + j / 2 * 8) * WEIGHTS_LD + n * 8 + lane % 4 * 2 + j % 2;
                        to_k[at] = x.scale * e.gate_k * e.grad_score;
                        to_v[at] = e.dropped * e.gate_v * head.gate_out();
                        bias[n][j % 2] += e.grad_score;
                      });
    __syncthreads();
    for (int r = 0; r < rows && t0 + r < x.T; r += 16) {
      const int at = (r + lane % 4 * 2) * WEIGHTS_LD + position + lane / 4;
      Left<T> left;
      if (d.k) {
        fill(left, [&](int row, int k) { return to_k[at + k * WEIGHTS_LD + row * 8]; });
        multiply_columns<COLUMNS / 2>(acc_k, left, q_tile + r * ld + column, ld, width);
      }
      if (d.v) {
        fill(left, [&](int row, int k) { return to_v[at + k * WEIGHTS_LD + row * 8]; });
        multiply_columns<COLUMNS / 2>(acc_v, left, grad_tile + r * ld + column, ld, width);
      }
    }
  }
  const int64_t row = ((((int64_t)part * group + h % group) * prefixes + a) * x.Hk + h / group) * x.P;
#pragma unroll
  for (int n = 0; n < COLUMNS / 16; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int to = first + position + lane / 4 + j / 2 * 8, c = column + n * 8 + lane % 4 * 2 + j % 2;
      if (n * 8 >= width || to >= x.P || c >= x.D) continue;
      if (d.k) d.k[(row + to) * x.D + c] = acc_k[n][j];
      if (d.v) d.v[(row + to) * x.D + c] = acc_v[n][j];
    }
  if (!d.log_bias || c0) return;
  __syncthreads();
  const float total = over_block(bias);
  if (threadIdx.x < BN && first + threadIdx.x < x.P)
    d.log_bias[(((int64_t)part * prefixes + a) * x.H + h) * x.P + first + threadIdx.x] = total;
}

__global__ void grad_out_kernel(PrefixAttentionGradOutCuda d) {  // a program for each of [A, H]
  const PrefixAttentionCuda& x = d.grad.call;
  const int a = blockIdx.x / x.H, h = blockIdx.x % x.H;
  float sum = 0.0f;
  for (int b = 0; b < x.B; ++b) {
    const Own own(x, b);
    if (own.a < 0 || (d.A > 1 && own.a != a)) continue;
    const float* delta = d.grad.delta + (int64_t)(b * x.H + h) * x.T;
    for (int t = threadIdx.x; t < x.T; t += THREADS) sum += delta[t];
  }
  float* sums = shared_memory<float>();  // [WARPS]
  sum = over_rows(over_quad(sum));
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  float total = 0.0f;
  for (int w = 0; w < WARPS; ++w) total += sums[w];
  d.out[blockIdx.x] = total;
}

// ---- launches ----

template <class T>
int forward_at(const PrefixAttentionForwardCuda& d, void* stream) {
  const PrefixAttentionCuda& x = d.call;
  const dim3 grid((unsigned)(ceil_div(x.T, BM) * x.B * x.H));
  return launch(forward_kernel<T>, grid, THREADS, forward_shared<T>(x.D), stream, d);
}

template <class T>
int delta_at(const PrefixAttentionDeltaCuda& d, void* stream) {
  const PrefixAttentionCuda& x = d.grad.call;
  return launch(delta_kernel<T>, dim3((unsigned)(((int64_t)x.B * x.H * x.T + WARPS - 1) / WARPS)), THREADS, 0, stream,
                d);
}

template <class T>
int grad_query_at(const PrefixAttentionGradQueryCuda& d, void* stream) {
  const PrefixAttentionCuda& x = d.grad.call;
  const dim3 grid((unsigned)(ceil_div(x.T, BM) * x.B * x.H));
  return launch(grad_query_kernel<T>, grid, THREADS, grad_shared<T>(x.D), stream, d);
}

template <class T>
int grad_gates_at(const PrefixAttentionGradGatesCuda& d, void* stream) {
  const PrefixAttentionCuda& x = d.grad.call;
  const int programs = d.parts * ceil_div(d.p, BN) * (d.t == 1 ? 1 : ceil_div(x.T, BM)) * d.h * d.b;
  return launch(grad_gates_kernel<T>, dim3((unsigned)programs), THREADS, grad_shared<T>(x.D), stream, d);
}

template <class T>
int grad_prefix_at(const PrefixAttentionGradPrefixCuda& d, void* stream) {
  const PrefixAttentionCuda& x = d.grad.call;
  const int blocks = ceil_div(x.D, COLUMNS) * ceil_div(x.P, BN) * (x.offsets ? 1 : x.A);
  return launch(grad_prefix_kernel<T>, dim3((unsigned)(d.parts * x.H * blocks)), THREADS, grad_prefix_shared<T>(x.D),
                stream, d);
}

}  // namespace

#define FASTPEFT_BY_DTYPE(function, dtype)                   \
  if ((dtype) == FLOAT32) return function<float>(d, stream); \
  if ((dtype) == BFLOAT16) return function<bf16>(d, stream); \
  if ((dtype) == FLOAT16) return function<f16>(d, stream);   \
  return BAD_DTYPE

int prefix_attention_forward(const PrefixAttentionForwardCuda& d, void* stream) {
  FASTPEFT_BY_DTYPE(forward_at, d.call.dtype);
}
int prefix_attention_delta(const PrefixAttentionDeltaCuda& d, void* stream) {
  FASTPEFT_BY_DTYPE(delta_at, d.grad.call.dtype);
}
int prefix_attention_grad_query(const PrefixAttentionGradQueryCuda& d, void* stream) {
  FASTPEFT_BY_DTYPE(grad_query_at, d.grad.call.dtype);
}
int prefix_attention_grad_gates(const PrefixAttentionGradGatesCuda& d, void* stream) {
  FASTPEFT_BY_DTYPE(grad_gates_at, d.grad.call.dtype);
}
int prefix_attention_grad_prefix(const PrefixAttentionGradPrefixCuda& d, void* stream) {
  FASTPEFT_BY_DTYPE(grad_prefix_at, d.grad.call.dtype);
}
int prefix_attention_grad_out(const PrefixAttentionGradOutCuda& d, void* stream) {
  return launch(grad_out_kernel, dim3((unsigned)(d.A * d.grad.call.H)), THREADS, sizeof(float) * WARPS, stream, d);
}

}  // namespace fastpeft
