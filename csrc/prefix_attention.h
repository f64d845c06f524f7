// Attention of query rows to one segment of keys, merged with what they have seen already, as a C interface: the
// prefix with its gates, and tokens with dropout. One table of function pointers per instruction set; cpu/dispatch.h
// picks one. Every function returns a Status.
//
// For a query row (b, h, t), h in the group of key head h / (H / Hk), and key n of the segment's block a = a(b):
//   s = scale · Gk · (q·k) + β;  w = Gv · keep;  L = ln Σ e^s
//   joint     o, lse  = merged:  L' = ln(e^lse + e^L),  o' = e^(lse − L') o + Σ e^(s − L') w v
//   separate  o      += c · Σ e^(s − L) w v,  lse = L
// A row's D elements are contiguous. Sums are fp32. The factors of products are of the compute dtype where they are
// multiplied in pairs, else of fp32; keys and values are rounded to the compute dtype, in fp16 they stay wide.
#pragma once
#include "tensor.h"

namespace fastpeft {

constexpr int64_t MAX_HEAD_DIM = 256;

// [B, H, T, D]
struct HeadRows {
  void* data;       // null: absent
  int64_t b, h, t;  // elements from one to the next
};

// [B, H, T]
struct HeadNumbers {
  float* data;
  int64_t b, h, t;

  float& at(int64_t i, int64_t j, int64_t k) const { return data[i * b + j * h + k * t]; }
};

// [A, Hk, N, D]; flat ones [Hk, ΣN, D] have a = 0
struct HeadKeys {
  void* data;
  int64_t a, h, n;
  int dtype;
};

// Numbers over [B, H, T, N], each dimension whole or of size 1.
struct Plane {
  const void* data;    // null: absent
  int64_t b, h, t, n;  // strides, 0 where the size is 1
  bool has_b, has_h, has_t, has_n;
  int dtype;    // a Dtype, or MASK
  bool by_key;  // b counts the segment's blocks a
};
constexpr int MASK = 3;  // bytes, 0: not seen

struct Segment {
  int64_t A, Hk, N;  // N: the longest block
  HeadKeys k, v;
  const int32_t* index;    // [B], −1: sees nothing; another a < 0 or >= A: the row's results are NaN
  bool by_row;             // no index: a(b) = b, else 0
  const int32_t* lengths;  // [A], null: all of N
  const int64_t* offsets;  // [A + 1] of flat keys, within them; null: not flat
  Plane gate_k, gate_v, bias, gate_out;
  bool causal;  // query t sees key n <= t + N − T
  float scale;
  Dropout dropout;
  uint32_t projection;  // of the mask of a matrix [B·H·T, N]
};

struct Attend {
  int64_t B, H, T, D;  // all 1 or more, D up to MAX_HEAD_DIM
  int dtype;
  HeadRows q, o;    // o: of what was seen already, changed in place
  HeadRows before;  // o of what was seen already, where o is only written; else absent
  HeadNumbers lse;
  bool separate;  // lse is only written
  bool fresh;     // o and lse are only written: nothing was seen
  Segment segment;
  Way way;
};

// joint: p = e^(s − lse) by the merged lse, Δ = do·o by the merged o; separate: by the segment's own, o absent
struct GradAttend {
  int64_t B, H, T, D;  // all 1 or more, D up to MAX_HEAD_DIM
  int dtype;
  HeadRows grad_o, q, o;
  HeadNumbers lse;
  HeadRows grad_q;  // added to in place; may be absent
  bool separate;
  bool fresh;  // grad_q is only written
  Segment segment;
  HeadKeys grad_k, grad_v;  // written whole, what no row sees as 0; may be absent
  // float32, contiguous, each of its plane's own shape, sums over what the plane is broadcast along; null: not wanted
  float *grad_gate_k, *grad_gate_v, *grad_bias, *grad_gate_out;
  int64_t columns;  // ΣN of flat keys
  Way way;
};

struct PrefixAttentionKernels {
  int (*attend)(const Attend&);
  int (*grad)(const GradAttend&);
};

extern "C" {
extern const PrefixAttentionKernels prefix_attention_scalar;
extern const PrefixAttentionKernels prefix_attention_avx2;
extern const PrefixAttentionKernels prefix_attention_avx512;
extern const PrefixAttentionKernels prefix_attention_avx512bf16;
}

}  // namespace fastpeft
