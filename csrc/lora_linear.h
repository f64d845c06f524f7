// lora_linear on the CPU: y = x Wᵀ + scale · (drop(x) Aᵀ) Bᵀ, its native passes, as a C interface.
// One table of function pointers per instruction set; cpu/dispatch.h picks one. Every function returns a Status.
//
// Sizes: x [M, K], A [R, K], B [N, R], y [M, N], s = drop(x) Aᵀ [M, R], t = dy (scale·B) [M, R].
// A row's elements are contiguous, rows are `ld` elements apart. Sums are fp32. Where the compute dtype (that of x, y,
// dy, dx) is bf16, the adapter's values (A, scale·B) are rounded to it once, and so are s and t: the arithmetic of PEFT
// with its adapters in the compute dtype. Where it is fp16 they stay in fp32, for its range does not hold them
// (scale·B after the first steps of training, t of a small dy, s of a large x): s and t are of `ranks_dtype`.
#pragma once
#include "tensor.h"

namespace fastpeft {

struct Projection {
  Matrix a;  // [R, K]
  int64_t R;
  int64_t column;  // of s and t, where this projection's ranks begin
  uint32_t index;  // third word of the dropout counter
  void* da;        // [R, K], contiguous, a's dtype; null: not wanted
};

// s[m, column+r] = Σ_k drop(x)[m, k] · A[r, k], for each projection
struct LoraLinearDown {
  int64_t M, K;
  Matrix x, s;  // [M, K], [M, ΣR]
  const Projection* projections;
  int count;
  Dropout dropout;
  Way way;
};

// y[m, n] += Σ_r s[m, r] · scale[r] · B[n, r] + bias[n], rounded once
struct LoraLinearUp {
  int64_t M, N, R;  // R = 0: the bias alone
  Matrix y, s, b;   // [M, N], [M, R], [N, R]
  Scale scale;
  Vector bias;  // [N]
  Way way;
};

// t[m, r] = Σ_n dy[m, n] · scale[r] · B[n, r];  db[n, r] = scale[r] · Σ_m dy[m, n] · s[m, r];  dbias[n] = Σ_m dy[m, n]
struct LoraLinearGradUp {
  int64_t M, N, R;
  Matrix dy, s, b;  // [M, N], [M, R], [N, R]
  Scale scale;
  Matrix t;     // [M, R]; may be absent
  void* db;     // [N, R], contiguous, b's dtype; may be null
  void* dbias;  // [N]; may be null
  int dbias_dtype;
  Way way;
};

// da[r, k] = Σ_m t[m, column+r] · drop(x)[m, k];  dx[m, k] += Σ_projections mask/(1-p) · Σ_r t[m, column+r] · A[r, k]
struct LoraLinearGradDown {
  int64_t M, K;
  Matrix x, dx, t;  // [M, K] (absent if no da is wanted), [M, K] (may be absent), [M, ΣR]
  const Projection* projections;
  int count;
  Dropout dropout;
  Way way;
};

// For few rows, base included: s = x Aᵀ;  y = x Wᵀ + bias + s (scale·B)ᵀ + lora_bias, rounded once
struct LoraLinearSmall {
  int64_t M, K, N, R;       // R = 0: the base alone
  Matrix x, w, y, s, a, b;  // [M, K], [N, K], [M, N], [M, R] (may be absent), [R, K], [N, R]
  bool transposed;          // w is stored [K, N]
  Scale scale;
  Vector bias, lora_bias;  // [N]
  Way way;
};

struct LoraLinearKernels {
  int (*down)(const LoraLinearDown&);
  int (*up)(const LoraLinearUp&);
  int (*grad_up)(const LoraLinearGradUp&);
  int (*grad_down)(const LoraLinearGradDown&);
  int (*small)(const LoraLinearSmall&);
  // the random words of columns 0 .. count-1 of a row
  void (*philox_words)(uint64_t seed, uint64_t row, int64_t count, uint32_t projection, uint32_t* out);
};

extern "C" {
extern const LoraLinearKernels lora_linear_scalar;
extern const LoraLinearKernels lora_linear_avx2;
extern const LoraLinearKernels lora_linear_avx512;
extern const LoraLinearKernels lora_linear_avx512bf16;
}

}  // namespace fastpeft
