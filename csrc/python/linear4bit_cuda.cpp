// The Python face of linear4bit's CUDA kernels: see csrc/linear4bit_cuda.h for what each computes.
#include "../linear4bit_cuda.h"

#include "cuda.h"
#include "weight4bit.h"

namespace fastpeft {

namespace {

Packed read(const char* op, py::handle weight) {
  Packed w;
  if (const char* wrong = read_packed(weight.ptr(), &w)) throw py::value_error(text(op, ": the weight ", wrong));
  if (w.tiled) throw py::value_error(text(op, ": the weight must be in bitsandbytes' order (`untile`)"));
  check_device(op, "weight", w.data);
  return w;
}

Weight4bitCuda pointers(const Packed& w) {
  int log_blocksize = 0;
  while ((int64_t(1) << log_blocksize) < w.blocksize) ++log_blocksize;
  return {w.N,
          w.K,
          (const uint8_t*)w.data.data(),
          w.scales.data(),
          (const float*)w.nested.data(),
          (const float*)w.offset.data(),
          log_blocksize,
          w.fp4 ? FP4 : NF4};
}

// [N, K] = codebook[code] · scale in float32, rounded once to `dtype`
py::object dequantize(py::handle weight, int dtype) {
  const char* const op = "linear4bit_dequantize";
  if (dtype < FLOAT32 || dtype > FLOAT16) throw py::value_error(text(op, ": no dtype has the code ", dtype));
  const Packed w = read(op, weight);
  const Result out = allocate(w.data, {w.N, w.K}, dtype);
  Launches launches(op, w.data);
  launches.add(linear4bit_dequantize, Linear4bitDequantizeCuda{pointers(w), out.data, dtype});
  launches.run({{"N", w.N}, {"K", w.K}});
  return out.object;
}

// Whether `small` runs at the rate of memory for x [M, K] over all of the weights.
bool small_is_fast(const Tensor& x, const std::vector<py::object>& weights) {
  const char* const op = "linear4bit_small_is_fast";
  if (x.dim() != 2 || x.size(0) < 1 || x.size(0) > LINEAR4BIT_SMALL_M) return false;
  if (x.dtype() != BFLOAT16 && x.dtype() != FLOAT16) return false;
  const Matrix from = matrix(op, "x", x, x.size(0), x.size(1), x.dtype());
  for (const py::object& weight : weights)
    if (!linear4bit_small_is_fast(pointers(read(op, weight)), from)) return false;
  return true;
}

// [y_i [M, N_i] = x W_iᵀ + bias_i + s_i (scale_i·B_i)ᵀ + lora_bias_i], rounded once; x [M, K], M <= 16. s: [M, ΣR], or
// None where no projection has a B.
py::list small(const Tensor& x, const std::vector<py::object>& weights, const MaybeTensors& biases,
               const MaybeTensor& s, const MaybeTensors& b, const MaybeTensors& scales,
               const MaybeTensors& lora_biases) {
  const Pass pass("linear4bit_small", "x", x);
  const int64_t M = rows_of(x), K = x.size(-1);
  const size_t n = weights.size();
  pass.same_length(n, biases, b, scales, lora_biases);
  if (M > LINEAR4BIT_SMALL_M) refuse(pass.op, "x", text("[M, K], M up to ", LINEAR4BIT_SMALL_M), x);
  const Matrix from = pass.rows("x", x, M, K);
  const int64_t total = s && s.dim() ? s.size(-1) : 0;
  const Matrix ranks = pass.ranks("s", s, M, total);
  Launches launches(pass);
  py::list ys(n);
  int64_t column = 0;
  for (size_t i = 0; i < n; ++i) {
    const Packed w = read(pass.op, weights[i]);
    if (w.K != K || !w.data.same_device(x))
      throw py::value_error(
          text(pass.op, ": the weight must be [N, ", K, "] on x's device, got [", w.N, ", ", w.K, "]"));
    const Result y = allocate(x, {M, w.N}, pass.dtype);
    ys[i] = y.object;
    const int64_t R = b[i] && b[i].dim() == 2 ? b[i].size(1) : 0;
    Linear4bitSmallCuda call{pointers(w),
                             M,
                             from,
                             {y.data, w.N, pass.dtype},
                             pass.vector("bias", biases[i], w.N),
                             pass.vector("lora_bias", lora_biases[i], w.N),
                             R,
                             columns(ranks, column),
                             nullptr,
                             FLOAT32,
                             0,
                             0,
                             {nullptr, 0}};
    if (R) {
      const Matrix of = pass.adapter("b", b[i], w.N, R);
      call.b = of.data, call.b_dtype = of.dtype, call.stride_bn = of.ld, call.stride_br = 1;
      call.scale = pass.scale(scales[i], R);
    }
    column += R;
    launches.add(linear4bit_small, call);
  }
  if (column != total) refuse(pass.op, "s", text("[M, ΣR] = [", M, ", ", column, "]"), s);
  launches.run({{"M", M}, {"K", K}, {"R", total}});
  return ys;
}

}  // namespace

void define_linear4bit(py::module_& m) {
  using namespace py::literals;
  m.def("linear4bit_dequantize", dequantize, "weight"_a, "dtype"_a);
  m.def("linear4bit_small_is_fast", small_is_fast, "x"_a, "weights"_a);
  m.def("linear4bit_small", small, "x"_a, "weights"_a, "biases"_a, "s"_a.none(true), "b"_a, "scales"_a,
        "lora_biases"_a);
}

}  // namespace fastpeft
