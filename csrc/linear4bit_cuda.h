// linear4bit on CUDA GPUs: 4-bit weights to dense ones, and products with a few rows, as a C interface.
// Every function queues its work on `stream`, allocates nothing, and returns 0, BAD_DTYPE or a cudaError_t.
#pragma once
#include "tensor.h"

namespace fastpeft {

constexpr int LINEAR4BIT_SMALL_M = 16;  // rows that linear4bit_small takes

enum QuantType : int { NF4 = 0, FP4 = 1 };

// w[n, k] = book[code(n·K + k)] · scale((n·K + k) / blocksize), in bitsandbytes' order: byte i has the codes 2i (in its
// high half) and 2i + 1. scale(i) = scales[i], or map[codes[i]] · nested_absmax[i / 256] + offset with each operation
// rounded.
struct Weight4bitCuda {
  int64_t N, K;
  const uint8_t* data;         // [(N·K + 1) / 2]
  const void* scales;          // [blocks] fp32, or uint8 codes
  const float* nested_absmax;  // [blocks / 256]; null: the scales are fp32
  const float* offset;         // []
  int log_blocksize, quant_type;
};

// out[n, k] = w[n, k], rounded once; out is contiguous
struct Linear4bitDequantizeCuda {
  Weight4bitCuda w;
  void* out;
  int out_dtype;
};

// y[m, n] = Σ_k x[m, k] w[n, k] + bias[n] + lora_bias[n] + Σ_r s[m, r] scale[r] b[n, r];  M <= 16
// The compute dtype T (of x, y) is bf16 or fp16, s and scale·b are of its `ranks_dtype`; sums are fp32, in the same
// order in every run.
struct Linear4bitSmallCuda {
  Weight4bitCuda w;
  int64_t M;
  Matrix x, y;  // [M, K], [M, N]
  Vector bias, lora_bias;
  int64_t R;  // 0: no rank-R term
  Matrix s;   // [M, R]
  const void* b;
  int b_dtype;
  int64_t stride_bn, stride_br;
  Scale scale;
};

int linear4bit_dequantize(const Linear4bitDequantizeCuda&, void* stream);
int linear4bit_small(const Linear4bitSmallCuda&, void* stream);

// Whether linear4bit_small runs at the rate of memory; else one warp a column decodes one weight after the other.
bool linear4bit_small_is_fast(const Weight4bitCuda&, const Matrix& x);

}  // namespace fastpeft
