// lora_linear on CUDA GPUs: the rank-R passes around a base GEMM that PyTorch runs, as a C interface.
// Every function queues its work on `stream`, allocates nothing, and returns 0 or a cudaError_t.
//
// The compute dtype T (of x, y, dy, dx) is bf16 or fp16, s and t are of its `ranks_dtype` S: fp32 for fp16, else T.
// Adapters are first packed: scaled, rounded to S, and laid out so that each projection owns a multiple of 16 ranks,
// with zeros between. Sums are fp32; sums over programs go
// through partial results and lora_linear_sum, so that they are the same in every run.
#pragma once
#include "tensor.h"

namespace fastpeft {

constexpr int MAX_PROJECTIONS = 8;

// Which packed ranks, and which columns of s and t, belong to each projection.
struct Spans {
  int count;
  int packed[MAX_PROJECTIONS];  // first packed rank, a multiple of 16
  int rank[MAX_PROJECTIONS];
  int column[MAX_PROJECTIONS];      // of s and t
  uint32_t index[MAX_PROJECTIONS];  // third word of the dropout counter
};

// The dropout of a launch; the seed lies on the device. keep_threshold 0: none.
struct CudaDropout {
  const int64_t* seed;
  uint32_t keep_threshold;
  float value;  // 1 / (1 - p); 0 for p = 1
};

// out[i, j] = S(in[i * stride_i + j * stride_j] * (scale ? scale[i * stride_scale] : 1)) for i < rows, j < columns,
// else 0
struct LoraLinearPack {
  Matrix out;  // [out_rows, ld]
  const void* in;
  int in_dtype;
  int64_t stride_i, stride_j;
  const float* scale;
  int64_t stride_scale;
  int64_t rows, columns, out_rows;
};

// out[part, m, column + r] = Σ_k drop(x)[m, k] a[packed + r, k] over every parts-th block of k; fp32 if parts > 1, else
// S
struct LoraLinearDownCuda {
  int64_t M, K;
  Matrix x, a;  // [M, K], packed [ΣR16, K]
  void* out;    // [parts, M, ld_out]
  int64_t ld_out;
  int parts, packed_ranks;
  Spans spans;
  CudaDropout dropout;
};

// g[slab, c, r] = Σ_m drop(t)[m, c] s[m, column + r];  ds[tile, m, r] = Σ_c t[m, c] b[packed + r, c];  sums[slab, c] =
// Σ_m t[m, c] What is null is not wanted. Forward's dy: t = dy, b = packed (scale·B)ᵀ. For dA: t = x, s = ds,
// transposed g.
struct LoraLinearColumnsCuda {
  int64_t M, C;
  Matrix t, s, b;  // [M, C], [M, ΣR], packed [ΣR16, C]
  float *g, *ds, *sums;
  int transposed;  // g is [slab, ΣR, C] instead of [slab, C, ΣR]
  int64_t slab_rows;
  int slabs, packed_ranks, ranks;
  Spans spans;
  CudaDropout dropout;
};

// out[m, c] += Σ_i drop_i(Σ_r s[m, column + r] up[packed + r, c]) + bias[c]
struct LoraLinearUpCuda {
  int64_t M, C;
  Matrix out, s, up;  // [M, C], [M, ΣR], packed [ΣR16, C]
  Vector bias;        // [C]
  int packed_ranks;
  Spans spans;
  CudaDropout dropout;
};

// out[i, j] = scale[j] · Σ_part parts[part, i, j], the parts in order
struct LoraLinearSum {
  const float* parts;
  int64_t count, stride_part, rows, columns;
  Matrix out;
  const float* scale;
  int64_t stride_scale;
};

int lora_linear_pack(const LoraLinearPack&, void* stream);
int lora_linear_down(const LoraLinearDownCuda&, void* stream);
int lora_linear_columns(const LoraLinearColumnsCuda&, void* stream);
int lora_linear_up(const LoraLinearUpCuda&, void* stream);
int lora_linear_sum(const LoraLinearSum&, void* stream);

}  // namespace fastpeft
