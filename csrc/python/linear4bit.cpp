// The Python face of linear4bit's CPU kernels: see csrc/linear4bit.h for what each computes.
#include "../linear4bit.h"

#include <string.h>

#include "cpu.h"
#include "weight4bit.h"

namespace fastpeft {

static float books[2][16], dynamic_map[256];

void set_books(const Tensor& nf4, const Tensor& fp4, const Tensor& map) {
  const Tensor* const given[] = {&nf4, &fp4, &map};
  float* const to[] = {books[0], books[1], dynamic_map};
  for (int i = 0; i < 3; ++i) {
    const int64_t count = i < 2 ? 16 : 256;
    const Vector v = vector("set_books", "a code book", *given[i], count);
    if (v.dtype != FLOAT32) refuse("set_books", "a code book", "float32", *given[i]);
    memcpy(to[i], v.data, (size_t)count * sizeof(float));
  }
}

namespace {

const char* read_packed_base(PyObject* object, const Tensor& x, Base* out) {
  Packed w;
  if (const char* wrong = read_packed(object, &w)) return wrong;
  if (!w.data.same_device(x)) return "is on another device";
  const auto& [N, K, blocksize, tiled, fp4, data, scales, nested, offset] = w;
  out->N = N, out->K = K;
  out->packed = {N,
                 K,
                 blocksize,
                 tiled,
                 (const uint8_t*)data.data(),
                 scales.data(),
                 (const float*)nested.data(),
                 (const float*)offset.data(),
                 books[fp4],
                 dynamic_map};
  return nullptr;
}

}  // namespace

bool Base::takes(int64_t M, int dtype) const {
  if (M <= 0 || N <= 0 || K <= 0) return false;
  const int isa = (int)current_isa();
  if (dense)
    return M <= plan.few_rows[isa][dtype] &&
           (in_rows() || (M <= plan.few_rows_transposed && dense.stride(0) == 1 && dense.stride(1) >= N));
  const int64_t most = plan.few_rows_4bit[isa][dtype];
  return M <= (packed.tiled || most < plan.few_rows_untiled ? most : plan.few_rows_untiled);
}

bool read_base(PyObject* object, const Tensor& x, Base* out, bool raise) {
  const char* wrong = nullptr;
  if (Py_TYPE(object) == torch_.tensor || Py_TYPE(object) == torch_.parameter) {
    if (!borrow(object, &out->dense, raise)) return false;
    if (out->dense.dim() != 2 || out->dense.dtype() != x.dtype() || !out->dense.same_device(x))
      wrong = "is not a matrix of x's dtype on its device";
    else
      out->N = out->dense.size(0), out->K = out->dense.size(1);
  } else {
    wrong = read_packed_base(object, x, out);
  }
  if (wrong && raise) throw py::value_error(text("fastpeft: the weight ", wrong));
  return !wrong;
}

static Tensor cpu_rows(const char* op, const char* argument, const Tensor& t) {
  if (!t.is_real() || t.dim() < 1 || t.view.device.type != dlpack::CPU)
    refuse(op, argument, "[..., columns], float32, bfloat16 or float16, on the CPU", t);
  return t;
}

// out [n1 - n0, k1 - k0] = that part of the weight, in out's dtype
static void dequantize(py::handle weight, const Tensor& out, int64_t n0, int64_t n1, int64_t k0, int64_t k1) {
  const char* const op = "linear4bit_dequantize";
  Base base;
  read_base(weight.ptr(), cpu_rows(op, "out", out), &base, true);
  if (base.dense) throw py::value_error(text(op, ": weight must be an fp.Weight4bit"));
  if (n0 < 0 || n0 > n1 || n1 > base.N || k0 < 0 || k0 > k1 || k1 > base.K)
    throw py::value_error(text(op, ": rows ", n0, " to ", n1, " and columns ", k0, " to ", k1, " are not all in [",
                               base.N, ", ", base.K, "]"));
  const Matrix to = matrix(op, "out", out, n1 - n0, k1 - k0, out.dtype());
  const Way how = way();
  int status;
  {
    py::gil_scoped_release release;
    status = linear4bit().dequantize({base.packed, n0, n1, k0, k1, to, how});
  }
  check_status(status, op, n1 - n0, k1 - k0, 0, 0);
}

// dx [M, K] = dy W for few rows over a tiled weight; None where the plan says to decode it instead
static py::object grad_few(const Tensor& dy, py::handle weight) {
  const char* const op = "linear4bit_grad_few";
  Base base;
  read_base(weight.ptr(), cpu_rows(op, "dy", dy), &base, true);
  const int64_t M = rows_of(dy);
  if (base.dense || !base.packed.tiled || !base.takes(M, dy.dtype())) return py::none();
  const Matrix from = matrix(op, "dy", dy, M, base.N, dy.dtype());
  const Result dx = allocate(dy, {M, base.K}, dy.dtype());
  const Matrix to{dx.data, base.K, dy.dtype()};
  const Way how = way();
  int status;
  {
    py::gil_scoped_release release;
    status = linear4bit().grad_small({base.packed, M, from, to, how});
  }
  check_status(status, op, M, base.K, base.N, 0);
  return dx.object;
}

void define_linear4bit(py::module_& m) {
  using namespace py::literals;
  m.def("linear4bit_dequantize", dequantize, "weight"_a, "out"_a, "n0"_a, "n1"_a, "k0"_a, "k1"_a);
  m.def("linear4bit_grad_few", grad_few, "dy"_a, "weight"_a);
}

}  // namespace fastpeft
