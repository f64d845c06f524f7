// The Python face of linear4bit's CPU kernels: see csrc/linear4bit.h for what each computes.
#include "../linear4bit.h"

#include <string.h>

#include "cpu.h"

namespace fastpeft {

static float books[2][16], dynamic_map[256];
constexpr int TILE_ROWS = 16;

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

// The fields of a fastpeft.Weight4bit by name.
struct Names {
  PyObject* all[8];
  Names() {
    const char* const names[] = {"data", "scales", "nested_absmax", "offset", "shape", "blocksize", "tiled", "quant_type"};
    for (int i = 0; i < 8; ++i) all[i] = PyUnicode_InternFromString(names[i]);
  }
};

// The kernels read what these sizes say, so each is held against its tensor.
const char* read_packed(PyObject* object, const Tensor& x, Base* out) {
  static const Names names;
  py::object fields[8];
  for (int i = 0; i < 8; ++i) {
    fields[i] = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, names.all[i]));
    if (!fields[i]) return PyErr_Clear(), "is neither a torch.Tensor nor an fp.Weight4bit";
  }
  const py::object &shape = fields[4], &quant_type = fields[7];
  if (!PyTuple_CheckExact(shape.ptr()) || PyTuple_GET_SIZE(shape.ptr()) != 2) return "has no shape (N, K)";
  Tensor parts[4];
  for (int i = 0; i < 4; ++i)
    if (!fields[i].is_none() && !borrow(fields[i].ptr(), &parts[i], false)) return "has parts that are no plain tensors";
  const auto& [data, scales, nested, offset] = parts;
  const int64_t N = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), 0));
  const int64_t K = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), 1));
  const int64_t blocksize = PyLong_AsLongLong(fields[5].ptr());
  if (PyErr_Occurred()) return PyErr_Clear(), "has sizes that are no ints";
  if (N < 0 || K < 0 || blocksize < 2 || (blocksize & (blocksize - 1))) return "has sizes that make no sense";
  const int64_t blocks = (N * K + blocksize - 1) / blocksize;
  const bool tiled = fields[6].ptr() == Py_True, is_nested = (bool)nested;
  const auto flat = [&](const Tensor& t, int dtype, int64_t count) {
    return t && t.dtype() == dtype && t.numel() >= count && t.contiguous() && t.same_device(x);
  };
  if (!flat(data, UINT8, (N * K + 1) / 2) || !flat(scales, is_nested ? UINT8 : FLOAT32, blocks) ||
      (is_nested && (!flat(nested, FLOAT32, (blocks + 255) / 256) || !flat(offset, FLOAT32, 1))))
    return "has parts of another size, dtype or device than its shape asks for";
  if (tiled && (K % 8 || K == 0 || N < TILE_ROWS)) return "is in tiles, but its shape has none";
  const bool fp4 = PyUnicode_CompareWithASCIIString(quant_type.ptr(), "fp4") == 0;
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
  if (dense) return M <= plan.few_rows[isa][dtype] && (K == 1 || dense.stride(1) == 1) && dense.stride(0) >= K;
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
    wrong = read_packed(object, x, out);
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
  const int threads = num_threads();
  int status;
  {
    py::gil_scoped_release release;
    status = linear4bit().dequantize({base.packed, n0, n1, k0, k1, to, threads});
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
  const py::object dx = allocate(dy, {M, base.K}, dy.dtype());
  const Matrix to = matrix(op, "dx", borrowed(dx), M, base.K, dy.dtype());
  const int threads = num_threads();
  int status;
  {
    py::gil_scoped_release release;
    status = linear4bit().grad_small({base.packed, M, from, to, threads});
  }
  check_status(status, op, M, base.K, base.N, 0);
  return dx;
}

void define_linear4bit(py::module_& m) {
  using namespace py::literals;
  m.def("linear4bit_dequantize", dequantize, "weight"_a, "out"_a, "n0"_a, "n1"_a, "k0"_a, "k1"_a);
  m.def("linear4bit_grad_few", grad_few, "dy"_a, "weight"_a);
}

}  // namespace fastpeft
