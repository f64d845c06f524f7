// linear4bit on the CPU: a base weight in 4 bits, as a C interface. One table of function pointers per instruction set;
// cpu/dispatch.h picks one. Every function returns a Status.
//
//   W[n, k] = codebook[code(n, k)] · scale(block),  block = (n K + k) / blocksize
//   scale(block) = scales[block], or nested: round(map[codes[block]] · nested_absmax[block / 256]) + offset
//
// Two layouts of the same bytes. Native: the codes of the flattened weight, two a byte, the first in the high half.
// Tiled (K a multiple of 8): the dwords (8 codes along k) of 16 rows side by side, [N/16, K/8, 16], then the native
// bytes of the last N % 16 rows; scales alike, [N/16, K/blocksize, 16] and the last rows', where blocks end with rows,
// else flat.
#pragma once
#include "tensor.h"

namespace fastpeft {

struct Weight4bit {
  int64_t N, K, blocksize;
  int tiled;
  const uint8_t* data;
  const void* scales;          // float, or uint8 codes where nested
  const float* nested_absmax;  // null: not nested
  const float* offset;         // one
  const float* codebook;       // [16]
  const float* map;            // [256]
};

// out[n - n0, k - k0] = W[n, k], n0 <= n < n1, k0 <= k < k1: the float32 product rounded once
struct Linear4bitDequantize {
  Weight4bit w;
  int64_t n0, n1, k0, k1;
  Matrix out;
  Way way;
};

// y = x Wᵀ + bias + s (scale·B)ᵀ + lora_bias, s = x Aᵀ: for few rows, W is read once; rounded once
struct Linear4bitSmall {
  Weight4bit w;
  int64_t M, R;          // R = 0: the base alone
  Matrix x, y, s, a, b;  // [M, K], [M, N], [M, R] (may be absent), [R, K], [N, R]
  Scale scale;
  Vector bias, lora_bias;  // [N]
  Way way;
};

// dx = dy W, for few rows, over a tiled weight; rounded once
struct Linear4bitGradSmall {
  Weight4bit w;
  int64_t M;
  Matrix dy, dx;  // [M, N], [M, K]
  Way way;
};

struct Linear4bitKernels {
  int (*dequantize)(const Linear4bitDequantize&);
  int (*small)(const Linear4bitSmall&);
  int (*grad_small)(const Linear4bitGradSmall&);
};

extern "C" {
extern const Linear4bitKernels linear4bit_scalar;
extern const Linear4bitKernels linear4bit_avx2;
extern const Linear4bitKernels linear4bit_avx512;
extern const Linear4bitKernels linear4bit_avx512bf16;
}

}  // namespace fastpeft
