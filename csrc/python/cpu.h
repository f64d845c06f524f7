// What the Python faces of the CPU kernels share: the kernels of the instruction set in use, the plan, a layer's base.
#pragma once
#include <math.h>

#include "../cpu/dispatch.h"
#include "../linear4bit.h"
#include "../lora_linear.h"
#include "../prefix_attention.h"
#include "tensor.h"

namespace fastpeft {

const LoraLinearKernels& lora_linear();
const Linear4bitKernels& linear4bit();
const PrefixAttentionKernels& prefix_attention();

// The measured crossovers that fastpeft/backends/plans.py hands over. Rows: up to so many take the kernels of few rows.
struct Plan {
  int64_t few_rows[ISA_COUNT][3] = {}, few_rows_4bit[ISA_COUNT][3] = {};  // by instruction set and Dtype
  int64_t few_rows_untiled = 0;     // over a 4-bit weight in bitsandbytes' order, which is slower to decode
  int64_t few_rows_transposed = 0;  // over a dense weight that is stored [K, N]
  bool dot = false;                 // bf16 rows take the dot product of pairs, where the instruction set has one
  double parallel_work = 2e5;       // multiply-adds below which a call stays on one thread
};
extern Plan plan;

// as torch and the plan have it
inline Way way(int threads = num_threads()) { return {threads, plan.parallel_work, plan.dot}; }

inline Dropout dropout(const char* op, double p, const Tensor& seed) {
  if (p == 0.0) return {0, 0.0, 0};
  if (!(p > 0.0 && p < 1.0)) throw py::value_error(text(op, ": p must be in [0, 1), got ", p));
  if (!seed || seed.dim() != 0 || seed.dtype() != INT64 || seed.view.device.type != dlpack::CPU)
    refuse(op, "seed", "[], int64, on the CPU", seed);
  return {(uint64_t)ceil(p * 4294967296.0), p, (uint64_t)*(const int64_t*)seed.data()};
}

// A layer's weight [N, K]: dense, of any strides, or in 4 bits.
struct Base {
  Tensor dense;  // none: in 4 bits
  Weight4bit packed{};
  int64_t N = 0, K = 0;
  // Whether a dense one is stored row by row.
  bool in_rows() const { return (K == 1 || dense.stride(1) == 1) && dense.stride(0) >= K; }
  // Whether rows of x take the kernels of few rows.
  bool takes(int64_t M, int dtype) const;
};

// Code books of 4-bit weights: fastpeft.reference.linear4bit has them.
void set_books(const Tensor& nf4, const Tensor& fp4, const Tensor& map);

// Reads a torch.Tensor or a fastpeft.Weight4bit on `x`'s device. False: it is neither, or its parts do not fit each
// other; with `raise`, that is an error.
bool read_base(PyObject* object, const Tensor& x, Base* out, bool raise);

void check_status(int status, const char* kernel, int64_t M, int64_t K, int64_t N, int64_t R);

void define_lora_linear(py::module_& m);
void define_linear4bit(py::module_& m);
void define_prefix_attention(py::module_& m);

}  // namespace fastpeft
