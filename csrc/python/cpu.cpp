// The Python face of the native CPU kernels: pointers come as ints, row strides in elements, 0 for an absent pointer.
// fastpeft/_native.py loads it; nothing here knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <stdlib.h>

#include <string>
#include <tuple>
#include <vector>

#include "../cpu/dispatch.h"
#include "../linear4bit.h"
#include "../lora_linear.h"

#ifndef FASTPEFT_BUILD_ID
#define FASTPEFT_BUILD_ID "unstamped"
#endif

namespace py = pybind11;
using namespace fastpeft;

static std::vector<std::string> isas() {
  std::vector<std::string> all;
  for (int i = 0; i < ISA_COUNT; ++i)
    if (runnable((Isa)i)) all.push_back(name((Isa)i));
  return all;
}

static std::string choices() {
  std::string text;
  for (const std::string& isa : isas()) text += (text.empty() ? "" : ", ") + isa;
  return text;
}

static void set_isa_by_name(const std::string& text) {
  Isa isa;
  if (!parse(text.c_str(), &isa) || !runnable(isa))
    throw py::value_error("set_isa: this machine runs " + choices() + ", got '" + text + "'");
  set_isa(isa);
}

// The table of the instruction set in use.
template <class Table>
static const Table& table(const Table& scalar, [[maybe_unused]] const Table& avx2, [[maybe_unused]] const Table& avx512,
                          [[maybe_unused]] const Table& avx512bf16) {
  switch (current_isa()) {
    case Isa::AVX512BF16:
      return avx512bf16;
    case Isa::AVX512:
      return avx512;
    case Isa::AVX2:
      return avx2;
    default:
      return scalar;
  }
}
#ifdef __x86_64__
#define FASTPEFT_TABLE(op) table(op##_scalar, op##_avx2, op##_avx512, op##_avx512bf16)
#else
#define FASTPEFT_TABLE(op) table(op##_scalar, op##_scalar, op##_scalar, op##_scalar)
#endif
static const LoraLinearKernels& lora_linear() { return FASTPEFT_TABLE(lora_linear); }
static const Linear4bitKernels& linear4bit() { return FASTPEFT_TABLE(linear4bit); }

using Pointer = uintptr_t;

static Matrix matrix(Pointer data, int64_t ld, int dtype) { return {(void*)data, ld, dtype}; }
static Vector vector(Pointer data, int dtype) { return {(const void*)data, dtype}; }
static Scale scale_of(Pointer data, int64_t stride) { return {(const float*)data, stride}; }

// (a, a_dtype, R, lda, column, index) and, where gradients are wanted, da
using DownProjection = std::tuple<Pointer, int, int64_t, int64_t, int64_t, uint32_t>;
using GradProjection = std::tuple<Pointer, int, int64_t, int64_t, int64_t, uint32_t, Pointer>;

static Projection projection(const DownProjection& p) {
  const auto& [a, dtype, R, lda, column, index] = p;
  return {matrix(a, lda, dtype), R, column, index, nullptr};
}
static Projection projection(const GradProjection& p) {
  const auto& [a, dtype, R, lda, column, index, da] = p;
  return {matrix(a, lda, dtype), R, column, index, (void*)da};
}
template <class Tuple>
static std::vector<Projection> projections_of(const std::vector<Tuple>& tuples) {
  std::vector<Projection> all;
  for (const Tuple& t : tuples) all.push_back(projection(t));
  return all;
}

static int down(int dtype, Pointer x, int64_t M, int64_t K, int64_t ldx, Pointer s, int64_t lds,
                const std::vector<DownProjection>& projections, uint64_t keep_threshold, double p, int64_t seed,
                int threads) {
  const std::vector<Projection> all = projections_of(projections);
  return lora_linear().down({M,
                             K,
                             matrix(x, ldx, dtype),
                             matrix(s, lds, dtype),
                             all.data(),
                             (int)all.size(),
                             {keep_threshold, p, (uint64_t)seed},
                             threads});
}

static int up(int dtype, Pointer y, int64_t M, int64_t N, int64_t ldy, Pointer s, int64_t lds, int64_t R, Pointer b,
              int b_dtype, int64_t ldb, Pointer scale, int64_t scale_stride, Pointer bias, int bias_dtype,
              int threads) {
  return lora_linear().up({M, N, R, matrix(y, ldy, dtype), matrix(s, lds, dtype), matrix(b, ldb, b_dtype),
                           scale_of(scale, scale_stride), vector(bias, bias_dtype), threads});
}

static int grad_up(int dtype, Pointer dy, int64_t M, int64_t N, int64_t lddy, Pointer s, int64_t lds, int64_t R,
                   Pointer b, int b_dtype, int64_t ldb, Pointer scale, int64_t scale_stride, Pointer t, int64_t ldt,
                   Pointer db, Pointer dbias, int dbias_dtype, int threads) {
  return lora_linear().grad_up({M, N, R, matrix(dy, lddy, dtype), matrix(s, lds, dtype), matrix(b, ldb, b_dtype),
                                scale_of(scale, scale_stride), matrix(t, ldt, dtype), (void*)db, (void*)dbias,
                                dbias_dtype, threads});
}

static int grad_down(int dtype, Pointer x, int64_t M, int64_t K, int64_t ldx, Pointer dx, int64_t lddx, Pointer t,
                     int64_t ldt, const std::vector<GradProjection>& projections, uint64_t keep_threshold, double p,
                     int64_t seed, int threads) {
  const std::vector<Projection> all = projections_of(projections);
  return lora_linear().grad_down({M,
                                  K,
                                  matrix(x, ldx, dtype),
                                  matrix(dx, lddx, dtype),
                                  matrix(t, ldt, dtype),
                                  all.data(),
                                  (int)all.size(),
                                  {keep_threshold, p, (uint64_t)seed},
                                  threads});
}

// Ops of few rows are bound by hand, all arguments ints by position: on tiny inputs pybind11's conversions were half of
// the call (2.2 us; 1.0 us this way).
template <int COUNT, class Kernel>
static PyObject* call_with_ints(const char* name, PyObject* const* args, Py_ssize_t count, Kernel kernel) {
  int64_t v[COUNT];
  if (count != COUNT) return PyErr_Format(PyExc_TypeError, "%s takes %d ints, got %zd", name, COUNT, count);
  for (int i = 0; i < COUNT; ++i) {
    v[i] = PyLong_AsLongLong(args[i]);
    if (v[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  int status;
  Py_BEGIN_ALLOW_THREADS status = kernel(v);
  Py_END_ALLOW_THREADS return PyLong_FromLong(status);
}

// lora_linear_small(dtype, x, M, K, ldx, w, ldw, N, bias, bias_dtype, y, ldy, s, lds, R, a, a_dtype, lda, b, b_dtype,
// ldb, scale, scale_stride, lora_bias, lora_bias_dtype, threads) -> status
static PyObject* small(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call_with_ints<26>("lora_linear_small", args, count, [](const int64_t* v) {
    const int dtype = (int)v[0];
    return lora_linear().small(
        {v[2], v[3], v[7], v[14], matrix(v[1], v[4], dtype), matrix(v[5], v[6], dtype), matrix(v[10], v[11], dtype),
         matrix(v[12], v[13], dtype), matrix(v[15], v[17], (int)v[16]), matrix(v[18], v[20], (int)v[19]),
         scale_of(v[21], v[22]), vector(v[8], (int)v[9]), vector(v[23], (int)v[24]), (int)v[25]});
  });
}

// N, K, blocksize, tiled, data, scales, nested_absmax, offset, codebook, map
static Weight4bit weight4bit(const int64_t* v) {
  return {v[0],
          v[1],
          v[2],
          (int)v[3],
          (const uint8_t*)v[4],
          (const void*)v[5],
          (const float*)v[6],
          (const float*)v[7],
          (const float*)v[8],
          (const float*)v[9]};
}

// linear4bit_small(dtype, x, M, ldx, the weight's 10, bias, bias_dtype, y, ldy, s, lds, R, a, a_dtype, lda, b, b_dtype,
// ldb, scale, scale_stride, lora_bias, lora_bias_dtype, dot, threads) -> status
static PyObject* small_4bit(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call_with_ints<33>("linear4bit_small", args, count, [](const int64_t* v) {
    const int dtype = (int)v[0];
    return linear4bit().small({weight4bit(v + 4), v[2], v[20], matrix(v[1], v[3], dtype), matrix(v[16], v[17], dtype),
                               matrix(v[18], v[19], dtype), matrix(v[21], v[23], (int)v[22]),
                               matrix(v[24], v[26], (int)v[25]), scale_of(v[27], v[28]), vector(v[14], (int)v[15]),
                               vector(v[29], (int)v[30]), (int)v[31], (int)v[32]});
  });
}

// linear4bit_dequantize(dtype, out, ld, the weight's 10, n0, n1, k0, k1, threads) -> status
static PyObject* dequantize_4bit(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call_with_ints<18>("linear4bit_dequantize", args, count, [](const int64_t* v) {
    return linear4bit().dequantize(
        {weight4bit(v + 3), v[13], v[14], v[15], v[16], matrix(v[1], v[2], (int)v[0]), (int)v[17]});
  });
}

// linear4bit_grad_small(dtype, dy, M, lddy, the weight's 10, dx, lddx, threads) -> status
static PyObject* grad_small_4bit(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call_with_ints<17>("linear4bit_grad_small", args, count, [](const int64_t* v) {
    const int dtype = (int)v[0];
    return linear4bit().grad_small(
        {weight4bit(v + 4), v[2], matrix(v[1], v[3], dtype), matrix(v[14], v[15], dtype), (int)v[16]});
  });
}

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
static PyMethodDef fast_method(const char* name, FastCall call, const char* doc) {
  return {name, (PyCFunction)(void (*)(void))call, METH_FASTCALL, doc};
}
static PyMethodDef FAST_METHODS[] = {
    fast_method("lora_linear_small", small, "Forward for few rows, base included: see csrc/lora_linear.h."),
    fast_method("linear4bit_small", small_4bit, "Forward for few rows: see csrc/linear4bit.h."),
    fast_method("linear4bit_grad_small", grad_small_4bit, "Gradient of few rows: see csrc/linear4bit.h."),
    fast_method("linear4bit_dequantize", dequantize_4bit, "Rows and columns of the weight: see csrc/linear4bit.h."),
};

static void philox_words(int64_t seed, uint64_t row, int64_t count, uint32_t projection, Pointer out) {
  lora_linear().philox_words((uint64_t)seed, row, count, projection, (uint32_t*)out);
}

PYBIND11_MODULE(_cpu_checked, m) {
  using namespace py::literals;
  m.doc() = "Native CPU kernels of fastpeft: see csrc/lora_linear.h for what each function computes.";
  m.attr("build_id") = FASTPEFT_BUILD_ID;
  m.def("isas", isas, "Instruction sets compiled in that run on this machine, worst to best.");
  m.def("isa", [] { return std::string(name(current_isa())); }, "The instruction set in use.");
  m.def("set_isa", set_isa_by_name, "name"_a);

  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("lora_linear_down", down, no_gil, "dtype"_a, "x"_a, "M"_a, "K"_a, "ldx"_a, "s"_a, "lds"_a, "projections"_a,
        "keep_threshold"_a, "p"_a, "seed"_a, "threads"_a);
  m.def("lora_linear_up", up, no_gil, "dtype"_a, "y"_a, "M"_a, "N"_a, "ldy"_a, "s"_a, "lds"_a, "R"_a, "b_ptr"_a,
        "b_dtype"_a, "ldb"_a, "scale_ptr"_a, "scale_stride"_a, "bias_ptr"_a, "bias_dtype"_a, "threads"_a);
  m.def("lora_linear_grad_up", grad_up, no_gil, "dtype"_a, "dy"_a, "M"_a, "N"_a, "lddy"_a, "s"_a, "lds"_a, "R"_a,
        "b_ptr"_a, "b_dtype"_a, "ldb"_a, "scale_ptr"_a, "scale_stride"_a, "t"_a, "ldt"_a, "db_ptr"_a, "dbias_ptr"_a,
        "dbias_dtype"_a, "threads"_a);
  m.def("lora_linear_grad_down", grad_down, no_gil, "dtype"_a, "x"_a, "M"_a, "K"_a, "ldx"_a, "dx"_a, "lddx"_a, "t"_a,
        "ldt"_a, "projections"_a, "keep_threshold"_a, "p"_a, "seed"_a, "threads"_a);
  for (PyMethodDef& method : FAST_METHODS)
    m.add_object(method.ml_name, py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr)));
  m.def("philox_words", philox_words, no_gil, "seed"_a, "row"_a, "count"_a, "projection"_a, "out_ptr"_a);
}

// FASTPEFT_CPU_ISA caps the level, read once at import. It is checked here because pybind11 turns whatever its own
// initialiser raises into an ImportError, and a misspelt variable is a ValueError.
extern "C" PYBIND11_EXPORT PyObject* PyInit__cpu() {
  const char* cap = getenv("FASTPEFT_CPU_ISA");
  if (cap && *cap) {
    Isa isa;
    if (!parse(cap, &isa)) {
      PyErr_Format(PyExc_ValueError, "FASTPEFT_CPU_ISA must be one of scalar, avx2, avx512, avx512bf16, got '%s'", cap);
      return nullptr;
    }
    set_isa(best_isa(isa));
  }
  return PyInit__cpu_checked();
}
