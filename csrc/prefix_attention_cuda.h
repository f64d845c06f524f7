// prefix_attention on CUDA GPUs: the prefix's part of softmax attention, as a C interface.
// Every function queues its work on `stream`, allocates nothing, and returns 0, BAD_DTYPE or a cudaError_t.
//
// For row b of the batch, head h, query t and position p of the row's own prefix, with m: dropped or 1/(1 - p):
//   s_p = scale Gk_p (q·pk_p) + β_p,   w_p = e^{s_p - L},   o = Σ_p m_p w_p Gv_p pv_p   (times c in mode "separate")
// and, with dp_p = c (do·pv_p):   ds_p = w_p (m_p Gv_p dp_p - Δ),   Δ = do·o of the whole o, or Σ_p m_p w_p Gv_p dp_p
//   dq = Σ_p scale Gk_p ds_p pk_p, dpk_p = Σ scale Gk_p ds_p q, dpv_p = Σ c m_p w_p Gv_p do,
//   dGk_p = scale (q·pk_p) ds_p, dGv_p = m_p w_p dp_p, dβ_p = Σ ds_p, dc = Σ m_p w_p Gv_p (do·pv_p)
// The compute dtype is that of q, o, do and dq; prefixes may have others, gates are fp32. Sums are fp32; sums over
// programs go through partial results and lora_linear_sum, so that they are the same in every run.
#pragma once
#include "lora_linear_cuda.h"

namespace fastpeft {

constexpr int PREFIX_BLOCK_T = 64, PREFIX_BLOCK_P = 32;  // queries and prefix positions of a tile
constexpr int PREFIX_COLUMNS = 128;  // of o, dq or the prefix's gradient that a program has in registers at a time
constexpr int PREFIX_MAX_ROW = 512;  // bytes of a row of D elements

// [B, H, T, D], the elements of a row side by side; or [B, H, T], float32
struct HeadsCuda {
  void* data;  // null: absent
  int64_t stride_b, stride_h, stride_t;
};

// prefix_k or prefix_v [A, Hk, P, D], or flat [Hk, P, D] with P the sum of all lengths
struct PrefixRowsCuda {
  const void* data;
  int dtype;
  int64_t stride_a, stride_h, stride_p;
};

// A gate [B, H, T, P]; log_bias [A, H, P], or gate_out [A, H], whose row is the prefix's. The stride of what broadcasts
// is 0.
struct PrefixGateCuda {
  const float* data;  // null: absent
  int64_t stride_b, stride_h, stride_t, stride_p;
};

struct PrefixAttentionCuda {
  int dtype, B, H, Hk, T, D, A, P;
  int longest;  // positions that gates have; a row with a longer prefix has NaN for o and L
  HeadsCuda q;
  PrefixRowsCuda k, v;
  PrefixGateCuda gate_k, gate_v, log_bias, gate_out;
  const int32_t* index;    // [B], -1: none; null: 0. A row whose index is out of range has NaN for o and L
  const int32_t* lengths;  // [A]; null: P
  const int64_t* offsets;  // [A + 1] of flat prefixes; null: not flat
  int separate;
  float scale;
  CudaDropout dropout;
};

// Joint: out = o merged with the prefix's part, lse_out = L, where o and lse are the tokens'; in place where out is o.
// Separate: out = o + the prefix's part, lse_out = the prefix's own L.
struct PrefixAttentionForwardCuda {
  PrefixAttentionCuda call;
  HeadsCuda o, out, lse, lse_out;
};

struct PrefixAttentionGradCuda {
  PrefixAttentionCuda call;
  HeadsCuda grad_o, lse;
  const float* delta;  // Δ/c [B, H, T]
};

// delta = Σ_d do·o
struct PrefixAttentionDeltaCuda {
  PrefixAttentionGradCuda grad;
  HeadsCuda o;
  float* delta;
};

// dq += its prefix part
struct PrefixAttentionGradQueryCuda {
  PrefixAttentionGradCuda grad;
  HeadsCuda dq;
};

// Partial sums [parts, b, h, t, p], each dimension the full one of [B, H, T, P] or 1; every parts-th tile of what is
// summed. What is null is not wanted. With `delta`, [B, H, T, 1], alone: Δ/c of mode "separate".
struct PrefixAttentionGradGatesCuda {
  PrefixAttentionGradCuda grad;
  float *gate_k, *gate_v, *delta;
  int b, h, t, p, parts;
};

// Partial sums over every parts-th tile of queries: k and v [parts, H / Hk, A, Hk, P, D], log_bias [parts, A, H, P]; A
// is 1 for flat prefixes. What is null is not wanted.
struct PrefixAttentionGradPrefixCuda {
  PrefixAttentionGradCuda grad;
  float *k, *v, *log_bias;
  int parts;
};

// out [A, H] (or [1, H]: of all prefixes) = Σ delta over the queries of a prefix's rows
struct PrefixAttentionGradOutCuda {
  PrefixAttentionGradCuda grad;
  float* out;
  int A;
};

int prefix_attention_forward(const PrefixAttentionForwardCuda&, void* stream);
int prefix_attention_delta(const PrefixAttentionDeltaCuda&, void* stream);
int prefix_attention_grad_query(const PrefixAttentionGradQueryCuda&, void* stream);
int prefix_attention_grad_gates(const PrefixAttentionGradGatesCuda&, void* stream);
int prefix_attention_grad_prefix(const PrefixAttentionGradPrefixCuda&, void* stream);
int prefix_attention_grad_out(const PrefixAttentionGradOutCuda&, void* stream);

}  // namespace fastpeft
