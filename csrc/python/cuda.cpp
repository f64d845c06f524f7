// The Python face of the CUDA kernels: pointers and streams come as ints, row strides in elements, 0 for an absent
// pointer. fastpeft/_native.py loads it; nothing here knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../linear4bit_cuda.h"
#include "../lora_linear_cuda.h"

#ifndef FASTPEFT_BUILD_ID
#define FASTPEFT_BUILD_ID "unstamped"
#endif

namespace py = pybind11;
using namespace fastpeft;

using Pointer = uintptr_t;
using Tensor2d = std::tuple<Pointer, int64_t, int>;  // data, row stride, dtype
using Span = std::tuple<int, int, int, uint32_t>;    // first packed rank, rank, column, index
using Drop = std::tuple<Pointer, uint32_t, float>;   // seed, keep threshold, 1 / (1 - p)
using Tensor1d = std::tuple<Pointer, int>;           // data, dtype
// N, K, data, scales, nested absmax, offset, log2 of the block size, quant type
using Weight4bit = std::tuple<int64_t, int64_t, Pointer, Pointer, Pointer, Pointer, int, int>;
using Adapter = std::tuple<int64_t, Pointer, int, int64_t, int64_t, Pointer,
                           int64_t>;  // R, b [N, R], dtype, strides, scale, stride

static Matrix matrix(const Tensor2d& t) { return {(void*)std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }
static CudaDropout dropout(const Drop& d) { return {(const int64_t*)std::get<0>(d), std::get<1>(d), std::get<2>(d)}; }

static Vector vector(const Tensor1d& t) { return {(const void*)std::get<0>(t), std::get<1>(t)}; }
static Weight4bitCuda weight4bit(const Weight4bit& w) {
  const auto& [n, k, data, scales, nested_absmax, offset, log_blocksize, quant_type] = w;
  return {n,
          k,
          (const uint8_t*)data,
          (const void*)scales,
          (const float*)nested_absmax,
          (const float*)offset,
          log_blocksize,
          quant_type};
}

static Spans spans_of(const std::vector<Span>& list) {
  if (list.size() > MAX_PROJECTIONS)
    throw py::value_error("at most " + std::to_string(MAX_PROJECTIONS) + " projections");
  Spans spans{};
  for (const auto& [packed, rank, column, index] : list) {
    const int i = spans.count++;
    spans.packed[i] = packed, spans.rank[i] = rank, spans.column[i] = column, spans.index[i] = index;
  }
  return spans;
}

static int pack(const Tensor2d& out, int64_t out_rows, Pointer in, int in_dtype, int64_t stride_i, int64_t stride_j,
                int64_t rows, int64_t columns, Pointer scale, int64_t stride_scale, Pointer stream) {
  return lora_linear_pack({matrix(out), (const void*)in, in_dtype, stride_i, stride_j, (const float*)scale,
                           stride_scale, rows, columns, out_rows},
                          (void*)stream);
}

static int down(const Tensor2d& x, int64_t m, int64_t k, const Tensor2d& a, Pointer out, int64_t ld_out, int parts,
                int packed_ranks, const std::vector<Span>& spans, const Drop& drop, Pointer stream) {
  return lora_linear_down(
      {m, k, matrix(x), matrix(a), (void*)out, ld_out, parts, packed_ranks, spans_of(spans), dropout(drop)},
      (void*)stream);
}

static int columns(const Tensor2d& t, int64_t m, int64_t c, const Tensor2d& s, const Tensor2d& b, Pointer g, Pointer ds,
                   Pointer sums, bool transposed, int64_t slab_rows, int slabs, int packed_ranks, int ranks,
                   const std::vector<Span>& spans, const Drop& drop, Pointer stream) {
  return lora_linear_columns({m, c, matrix(t), matrix(s), matrix(b), (float*)g, (float*)ds, (float*)sums, transposed,
                              slab_rows, slabs, packed_ranks, ranks, spans_of(spans), dropout(drop)},
                             (void*)stream);
}

static int up(const Tensor2d& out, int64_t m, int64_t c, const Tensor2d& s, const Tensor2d& up, Pointer bias,
              int bias_dtype, int packed_ranks, const std::vector<Span>& spans, const Drop& drop, Pointer stream) {
  return lora_linear_up({m,
                         c,
                         matrix(out),
                         matrix(s),
                         matrix(up),
                         {(const void*)bias, bias_dtype},
                         packed_ranks,
                         spans_of(spans),
                         dropout(drop)},
                        (void*)stream);
}

static int sum(Pointer parts, int64_t count, int64_t stride_part, int64_t rows, int64_t columns, const Tensor2d& out,
               Pointer scale, int64_t stride_scale, Pointer stream) {
  return lora_linear_sum(
      {(const float*)parts, count, stride_part, rows, columns, matrix(out), (const float*)scale, stride_scale},
      (void*)stream);
}

static int dequantize_4bit(const Weight4bit& w, Pointer out, int out_dtype, Pointer stream) {
  return linear4bit_dequantize({weight4bit(w), (void*)out, out_dtype}, (void*)stream);
}

static int small_4bit(const Weight4bit& w, const Tensor2d& x, int64_t m, const Tensor2d& y, const Tensor1d& bias,
                      const Tensor1d& lora_bias, const Tensor2d& s, const Adapter& adapter, Pointer stream) {
  const auto& [r, b, b_dtype, stride_bn, stride_br, scale, stride_scale] = adapter;
  return linear4bit_small({weight4bit(w),
                           m,
                           matrix(x),
                           matrix(y),
                           vector(bias),
                           vector(lora_bias),
                           r,
                           matrix(s),
                           (const void*)b,
                           b_dtype,
                           stride_bn,
                           stride_br,
                           {(const float*)scale, stride_scale}},
                          (void*)stream);
}

static bool small_4bit_is_fast(const Weight4bit& w, const Tensor2d& x) {
  return linear4bit_small_is_fast(weight4bit(w), matrix(x));
}

PYBIND11_MODULE(_cuda, m) {
  using namespace py::literals;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.doc() =
      "fastpeft's CUDA kernels. Used through fastpeft._native. Every function queues work and returns a cudaError_t.";
  m.attr("build_id") = FASTPEFT_BUILD_ID;
  m.attr("max_projections") = MAX_PROJECTIONS;
  m.def("lora_linear_pack", pack, no_gil);
  m.def("lora_linear_down", down, no_gil);
  m.def("lora_linear_columns", columns, no_gil);
  m.def("lora_linear_up", up, no_gil);
  m.def("lora_linear_sum", sum, no_gil);
  m.attr("linear4bit_small_m") = LINEAR4BIT_SMALL_M;
  m.def("linear4bit_dequantize", dequantize_4bit, no_gil);
  m.def("linear4bit_small", small_4bit, no_gil);
  m.def("linear4bit_small_is_fast", small_4bit_is_fast);
}
