// The Python face of lora_linear's CPU kernels: see csrc/lora_linear.h for what each computes. Lists have an entry a
// projection; a and b are None where one has no adapter. Ranks lie side by side in s and t, projection after
// projection.
#include "../lora_linear.h"

#include <string.h>

#include "cpu.h"

namespace fastpeft {

namespace {

constexpr int64_t MAX_RANK = 512;

using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<MaybeTensor>;

// A number, or a float32 tensor [] or [R]; None where a projection has no adapter.
struct ScaleArgument : Tensor {
  float number = 0.0f;
  bool is_number = false;

  bool read(PyObject* object, bool raise) {
    is_number = PyFloat_CheckExact(object) || PyLong_CheckExact(object);
    if (!is_number) return borrow(object, this, raise);
    number = (float)PyFloat_AsDouble(object);
    return !PyErr_Occurred() || (PyErr_Clear(), false);
  }
};
using Scales = std::vector<ScaleArgument>;

// ---- arguments ----

Tensor compute(const char* op, const char* argument, const Tensor& t) {
  if (!t.is_real() || t.dim() < 1 || t.view.device.type != dlpack::CPU)
    refuse(op, argument, "[..., columns], float32, bfloat16 or float16, on the CPU", t);
  return t;
}

// The compute dtype: that of the first tensor of x's width that there is; s, which may be wider, where there is none.
template <class List>
int compute_of(const char* op, const char* argument, const List& list, const Tensor& s) {
  for (const Tensor& t : list)
    if (t) return compute(op, argument, t).dtype();
  return s.dtype();
}

// Whether t is [rows, columns] with contiguous rows, of a dtype that kernels read.
bool is_adapter(const Tensor& t, int64_t rows, int64_t columns) {
  return t.is({rows, columns}) && t.is_real() && (columns <= 1 || t.stride(1) == 1) &&
         (rows <= 1 || t.stride(0) >= columns);
}

Matrix adapter(const char* op, const char* argument, const Tensor& t, int64_t rows, int64_t columns) {
  if (!is_adapter(t, rows, columns) || t.view.device.type != dlpack::CPU)
    refuse(op, argument, text("[", rows, ", ", columns, "], contiguous rows, on the CPU"), t);
  return {t.data(), t.stride(0) > columns ? t.stride(0) : columns, t.dtype()};
}

bool is_scale(const Tensor& t, int64_t R) {
  return t.dtype() == FLOAT32 && (t.dim() == 0 || (t.is({R}) && (R == 1 || t.stride(0) == 1)));
}

Scale scale_of(const char* op, const ScaleArgument& t, int64_t R) {
  if (t.is_number) return {&t.number, 0};
  if (!t || !is_scale(t, R)) refuse(op, "scale", text("[] or [R] = [", R, "], contiguous, float32"), t);
  return {(const float*)t.data(), t.dim()};
}

int64_t rank_of(const char* op, const Tensor& a) {
  if (!a) return 0;
  if (a.dim() != 2 || a.size(0) > MAX_RANK) refuse(op, "a", text("[R, K], R up to ", MAX_RANK), a);
  return a.size(0);
}

int64_t ranks_of(const char* op, const MaybeTensors& a) {
  int64_t all = 0;
  for (const Tensor& each : a) all += rank_of(op, each);
  return all;
}

template <class... Lists>
void same_length(const char* op, size_t n, const Lists&... lists) {
  if (!((lists.size() == n) && ...))
    throw py::value_error(text(op, ": lists must have an entry a projection (", n, ")"));
}

template <class Call>
void run(const char* op, int64_t M, int64_t K, int64_t N, int64_t R, Call call) {
  int status;
  {
    py::gil_scoped_release release;
    status = call();
  }
  check_status(status, op, M, K, N, R);
}

// ---- the passes ----

// s [M, ΣR] = drop(x) Aᵀ of all projections; x [..., K], contiguous
py::object down(const Tensor& x, const MaybeTensors& a, double p, const MaybeTensor& seed) {
  const char* const op = "lora_linear_down";
  const int dtype = compute(op, "x", x).dtype();
  const int64_t K = x.size(-1), M = rows_of(x), total = ranks_of(op, a);
  const Matrix from = matrix(op, "x", x, M, K, dtype);
  const Dropout drop = dropout(op, p, seed);
  std::vector<Projection> all;
  int64_t column = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!a[i]) continue;
    const int64_t R = a[i].size(0);
    all.push_back({adapter(op, "a", a[i], R, K), R, column, (uint32_t)i, nullptr});
    column += R;
  }
  const Result s = allocate(x, {M, total}, ranks_dtype(dtype));
  if (total == 0 || M == 0) return s.object;
  const Matrix to{s.data, total, ranks_dtype(dtype)};
  const LoraLinearDown call{M, K, from, to, all.data(), (int)all.size(), drop, way()};
  run(op, M, K, 0, total, [&] { return lora_linear().down(call); });
  return s.object;
}

// y_i += s_i (scale_i·B_i)ᵀ + lora_bias_i, in place
py::object up(py::object ys, const Tensor& s, const MaybeTensors& b, const Scales& scales,
              const MaybeTensors& lora_biases) {
  const char* const op = "lora_linear_up";
  const Tensors all = ys.cast<Tensors>();
  same_length(op, all.size(), b, scales, lora_biases);
  const int dtype = compute_of(op, "y", all, compute(op, "s", s));
  const int64_t M = rows_of(s), total = s.size(-1);
  const Matrix ranks = matrix(op, "s", s, M, total, ranks_dtype(dtype));
  const Way how = way();
  std::vector<LoraLinearUp> calls;
  int64_t column = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].dim() < 1) refuse(op, "y", "[..., N]", all[i]);
    const int64_t N = all[i].size(-1), R = b[i] && b[i].dim() == 2 ? b[i].size(1) : 0;
    LoraLinearUp call{M,
                      N,
                      R,
                      matrix(op, "y", compute(op, "y", all[i]), M, N, dtype),
                      columns(ranks, column),
                      {},
                      {},
                      vector(op, "lora_bias", lora_biases[i], N),
                      how};
    if (b[i]) call.b = adapter(op, "b", b[i], N, R), call.scale = scale_of(op, scales[i], R);
    column += R;
    if (R || lora_biases[i]) calls.push_back(call);
  }
  if (column != total) refuse(op, "s", text("[M, ΣR] = [", M, ", ", column, "]"), s);
  for (const LoraLinearUp& call : calls) run(op, M, 0, call.N, call.R, [&] { return lora_linear().up(call); });
  return ys;
}

// -> t [M, ΣR] = dy (scale·B) or None, [dB_i], [dbias_i, float32]; None where not needed, and t 0, where there is no dy
py::tuple grad_up(const MaybeTensors& dys, const Tensor& s, const MaybeTensors& b, const Scales& scales, bool wants_t,
                  const std::vector<bool>& needs_b, const std::vector<bool>& needs_bias) {
  const char* const op = "lora_linear_grad_up";
  const size_t n = dys.size();
  same_length(op, n, b, scales, needs_b, needs_bias);
  const int dtype = compute_of(op, "dy", dys, compute(op, "s", s)), wide = ranks_dtype(dtype);
  const int64_t M = rows_of(s), total = s.size(-1);
  const Matrix ranks = matrix(op, "s", s, M, total, wide);
  const Result t = wants_t ? allocate(s, {M, total}, wide) : Result{};
  const Matrix to{t.data, total, wide};
  for (const Tensor& dy : dys)
    if (!dy && to.data && M && total) memset(to.data, 0, (size_t)(M * total * size_of(wide)));
  py::list dbs(n), dbiases(n);
  const Way how = way();
  std::vector<LoraLinearGradUp> calls;
  int64_t column = 0;
  for (size_t i = 0; i < n; ++i) {
    dbs[i] = py::none(), dbiases[i] = py::none();
    const int64_t R = b[i] && b[i].dim() == 2 ? b[i].size(1) : 0, first = column;
    column += R;
    if (!dys[i]) continue;
    const int64_t N = compute(op, "dy", dys[i]).size(-1);
    LoraLinearGradUp call{M,
                          N,
                          R,
                          matrix(op, "dy", dys[i], M, N, dtype),
                          columns(ranks, first),
                          {},
                          {},
                          columns(to, first),
                          nullptr,
                          nullptr,
                          FLOAT32,
                          how};
    if (b[i]) call.b = adapter(op, "b", b[i], N, R), call.scale = scale_of(op, scales[i], R);
    if (b[i] && needs_b[i]) {
      const Result db = allocate(s, {N, R}, b[i].dtype());
      call.db = db.data, dbs[i] = db.object;
    }
    if (needs_bias[i]) {
      const Result dbias = allocate(s, {N}, FLOAT32);
      call.dbias = dbias.data, dbiases[i] = dbias.object;
    }
    if ((wants_t && R) || call.db || call.dbias) calls.push_back(call);
  }
  if (column != total) refuse(op, "s", text("[M, ΣR] = [", M, ", ", column, "]"), s);
  for (const LoraLinearGradUp& call : calls) run(op, M, 0, call.N, call.R, [&] { return lora_linear().grad_up(call); });
  return py::make_tuple(t.object, dbs, dbiases);
}

// -> dx, to which Σ_i drop_i(t_i A_i) was added in place (None stays None), and [dA_i = t_iᵀ drop_i(x)] where needed.
// `live`: which projections have a t.
py::tuple grad_down(py::object dx, const MaybeTensor& x, const Tensor& t, const MaybeTensors& a,
                    const std::vector<bool>& live, const std::vector<bool>& needs_a, double p,
                    const MaybeTensor& seed) {
  const char* const op = "lora_linear_grad_down";
  const size_t n = a.size();
  same_length(op, n, live, needs_a);
  const MaybeTensor out = dx.cast<MaybeTensor>();
  const Tensor& sized = out ? (const Tensor&)out : x;
  const int dtype = compute(op, sized ? "x or dx" : "t", sized ? sized : t).dtype();
  const int64_t M = rows_of(compute(op, "t", t)), total = ranks_of(op, a);
  const Dropout drop = dropout(op, p, seed);
  const Matrix ranks = matrix(op, "t", t, M, total, ranks_dtype(dtype));
  py::list das(n);
  std::vector<Projection> all;
  int64_t column = 0;
  const int64_t K = sized ? sized.size(-1) : 0;
  for (size_t i = 0; i < n; ++i) {
    das[i] = py::none();
    if (!a[i]) continue;
    const int64_t R = a[i].size(0);
    Projection projection{adapter(op, "a", a[i], R, K), R, column, (uint32_t)i, nullptr};
    column += R;
    if (!live[i]) continue;
    if (needs_a[i]) {
      if (!x) refuse(op, "x", "a tensor where dA is needed", x);
      const Result da = allocate(t, {R, K}, a[i].dtype());
      projection.da = da.data, das[i] = da.object;
    }
    all.push_back(projection);
  }
  if (sized && !all.empty()) {
    const Matrix from = matrix(op, "x", x, M, K, dtype), to = matrix(op, "dx", out, M, K, dtype);
    const LoraLinearGradDown call{M, K, from, to, ranks, all.data(), (int)all.size(), drop, way()};
    run(op, M, K, 0, total, [&] { return lora_linear().grad_down(call); });
  }
  return py::make_tuple(dx, das);
}

// ---- few rows, base included ----

// One projection of rows x, whose y and s exist already.
struct Few {
  int64_t M, K;
  Matrix x, y, s, a, b;
  int64_t R;
  Scale scale;
  Vector bias, lora_bias;

  // Work so small that one thread does it, without giving the GIL away.
  static constexpr double ALONE = 1e5;

  void run(const Base& base) const {
    const bool alone = (double)M * K * (base.N + R) < ALONE;
    const Way how = way(alone ? 1 : num_threads());
    int status;
    if (alone) {
      status = call(base, how);
    } else {
      py::gil_scoped_release release;
      status = call(base, how);
    }
    check_status(status, "lora_linear, few rows", M, K, base.N, R);
  }

  int call(const Base& base, const Way& how) const {
    if (!base.dense) return linear4bit().small({base.packed, M, R, x, y, s, a, b, scale, bias, lora_bias, how});
    const bool transposed = !base.in_rows();
    const int64_t ld = transposed ? base.dense.stride(1) : std::max(base.dense.stride(0), K);
    const Matrix w{base.dense.data(), ld, x.dtype};
    return lora_linear().small({M, K, base.N, R, x, w, y, s, a, b, transposed, scale, bias, lora_bias, how});
  }
};

// y [..., N] as x has its leading dimensions
Result allocate_rows(const Tensor& x, int64_t N) {
  int64_t shape[MAX_DIMS];
  std::copy_n(x.view.shape, x.dim(), shape);
  shape[x.dim() - 1] = N;
  return allocate(x, shape, x.dim(), x.dtype());
}

// ---- one call as the public function has it ----

struct Arguments {  // of one projection
  Tensor a, b, bias, lora_bias;
  ScaleArgument scale;
  int64_t R = 0;

  // Whether all are what the kernels take as they are; no exception, no error set.
  bool read(const Tensor& x, const Base& base, PyObject* a_, PyObject* b_, PyObject* scale_, PyObject* bias_,
            PyObject* lora_bias_) {
    if (!optional(bias_, &bias, x, base.N) || !optional(lora_bias_, &lora_bias, x, base.N)) return false;
    if (a_ == Py_None && b_ == Py_None) return true;
    if (!borrow(a_, &a, false) || a.dim() != 2 || !borrow(b_, &b, false)) return false;
    R = a.size(0);
    if (R < 1 || R > MAX_RANK || !is_adapter(a, R, base.K) || !is_adapter(b, base.N, R)) return false;
    if (!a.same_device(x) || !b.same_device(x)) return false;
    return scale.read(scale_, false) && (scale.is_number || (is_scale(scale, R) && scale.same_device(x)));
  }

  static bool optional(PyObject* object, Tensor* out, const Tensor& x, int64_t N) {
    if (object == Py_None) return true;
    return borrow(object, out, false) && out->is({N}) && out->is_real() && (N <= 1 || out->stride(0) == 1) &&
           out->same_device(x);
  }

  Few few(const Tensor& x, int64_t M, int64_t K, const Matrix& y, const Matrix& s) const {
    const auto of = [&](const Tensor& t) -> Vector { return {t.data(), t ? t.dtype() : (int)FLOAT32}; };
    const auto rows = [&](const Tensor& t, int64_t width) -> Matrix {
      return t ? Matrix{t.data(), t.stride(0) > width ? t.stride(0) : width, t.dtype()} : Matrix{nullptr, 0, FLOAT32};
    };
    const Scale scales{scale.is_number ? &scale.number : (const float*)scale.data(), scale ? scale.dim() : 0};
    return {M, K, {x.data(), K, x.dtype()}, y, s, rows(a, K), rows(b, R), R, scales, of(bias), of(lora_bias)};
  }
};

// lora_linear_plain(x, weight, a, b, scale, bias, lora_bias) -> y of a call without gradients that the kernels of few
// rows take as it is; None: anything else, wrong arguments too. (By hand: pybind11's conversions are half of such a
// call.)
PyObject* plain(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  if (count != 7) return PyErr_Format(PyExc_TypeError, "lora_linear_plain takes 7 arguments, got %zd", count);
  Tensor x;
  Base base;
  Arguments given;
  if (answers_true(torch_.is_grad_enabled) || !borrow(args[0], &x, false) || x.view.device.type != dlpack::CPU)
    Py_RETURN_NONE;
  if (!x.is_real() || x.dim() < 1 || !x.contiguous() || !read_base(args[1], x, &base, false)) Py_RETURN_NONE;
  const int64_t K = x.size(-1), M = rows_of(x);
  if (base.K != K || !base.takes(M, x.dtype())) Py_RETURN_NONE;
  if (!given.read(x, base, args[2], args[3], args[4], args[5], args[6]) || !plain_call()) Py_RETURN_NONE;
  Result y = allocate_rows(x, base.N);
  given.few(x, M, K, {y.data, base.N, x.dtype()}, {nullptr, 0, ranks_dtype(x.dtype())}).run(base);
  return y.object.release().ptr();
} catch (py::error_already_set& error) {
  error.restore();
  return nullptr;
}

// The i-th of n projections in the six tuples of a call.
struct Lists {
  PyObject* const* args;
  Py_ssize_t n;
  explicit Lists(PyObject* const* all) : args(all), n(PyTuple_CheckExact(all[0]) ? PyTuple_GET_SIZE(all[0]) : 0) {
    for (int i = 1; i < 6; ++i)
      if (!PyTuple_CheckExact(args[i]) || PyTuple_GET_SIZE(args[i]) != n) n = 0;
  }
  bool read(Py_ssize_t i, const Tensor& x, Base* base, Arguments* given) const {
    const auto item = [&](int list) { return PyTuple_GET_ITEM(args[list], i); };
    return read_base(item(0), x, base, false) && base->K == x.size(-1) &&
           given->read(x, *base, item(2), item(3), item(4), item(1), item(5));
  }
};

// y_i = x W_iᵀ + bias_i + s_i (scale_i·B_i)ᵀ + lora_bias_i of all projections, and s
py::tuple compute_few(const Tensor& x, int64_t M, int64_t K, const std::vector<std::pair<Base, Arguments>>& all) {
  int64_t total = 0;
  for (const auto& [base, given] : all) total += given.R;
  const Result s = allocate(x, {M, total}, ranks_dtype(x.dtype()));
  Matrix ranks{s.data, total, ranks_dtype(x.dtype())};
  py::tuple ys(all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    const auto& [base, given] = all[i];
    const Result y = allocate_rows(x, base.N);
    given.few(x, M, K, {y.data, base.N, x.dtype()}, ranks).run(base);
    ranks = columns(ranks, given.R);
    ys[i] = y.object;
  }
  return py::make_tuple(ys, s.object);
}

// lora_linear_few(x, weights, biases, a, b, scales, lora_biases), tuples of an entry a projection -> ([y_i], s); or
// None, where a weight is not for the kernels of few rows, or an argument not as the kernels take it.
PyObject* few(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  if (count != 7) return PyErr_Format(PyExc_TypeError, "lora_linear_few takes 7 arguments, got %zd", count);
  Tensor x;
  const Lists lists(args + 1);
  if (!borrow(args[0], &x, false) || x.view.device.type != dlpack::CPU || !x.is_real() || x.dim() < 1 ||
      !x.contiguous() || lists.n < 1)
    Py_RETURN_NONE;
  const int64_t M = rows_of(x);
  std::vector<std::pair<Base, Arguments>> all(lists.n);
  for (Py_ssize_t i = 0; i < lists.n; ++i)
    if (!lists.read(i, x, &all[i].first, &all[i].second) || !all[i].first.takes(M, x.dtype())) Py_RETURN_NONE;
  return compute_few(x, M, x.size(-1), all).release().ptr();
} catch (py::error_already_set& error) {
  error.restore();
  return nullptr;
}

// lora_linear_begin(compute, x, weights, biases, a, b, scales, lora_biases) -> (flags, found)
// flags: -1, not a plain call, or arguments that the passes do not take as they are (the checks in Python say what is
// wrong); else a sum of 1, some of it requires grad, 2, an A does, 4, a weight is in 4 bits. found: what
// lora_linear_few gives, if `compute`, else None.
PyObject* begin(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  if (count != 8) return PyErr_Format(PyExc_TypeError, "lora_linear_begin takes 8 arguments, got %zd", count);
  static PyObject* const no = py::make_tuple(-1, py::none()).release().ptr();
  Tensor x;
  const Lists lists(args + 2);
  if (lists.n < 1 || !borrow(args[1], &x, false) || !x.is_real() || x.dim() < 1 || !plain_call()) return Py_NewRef(no);
  const bool grad = answers_true(torch_.is_grad_enabled);
  int flags = grad && requires_grad(x);
  const int64_t M = rows_of(x);
  bool is_few = args[0] == Py_True && x.view.device.type == dlpack::CPU && x.contiguous();
  std::vector<std::pair<Base, Arguments>> all(lists.n);
  for (Py_ssize_t i = 0; i < lists.n; ++i) {
    auto& [base, given] = all[i];
    if (!lists.read(i, x, &base, &given)) return Py_NewRef(no);
    if (grad && (requires_grad(base.dense) || requires_grad(given.scale))) return Py_NewRef(no);
    if (!base.dense) flags |= 4;
    if (grad && requires_grad(given.a)) flags |= 3;
    if (grad && (requires_grad(given.b) || requires_grad(given.bias) || requires_grad(given.lora_bias))) flags |= 1;
    is_few = is_few && base.takes(M, x.dtype());
  }
  py::object found = py::none();
  if (is_few) found = compute_few(x, M, x.size(-1), all);
  return py::make_tuple(flags, found).release().ptr();
} catch (py::error_already_set& error) {
  error.restore();
  return nullptr;
}

// The random words of columns 0 .. count-1 of a row, into out int32-sized; for tests.
void philox_words(int64_t seed, uint64_t row, uint32_t projection, const Tensor& out) {
  if (out.view.dtype.bits != 32 || !out.contiguous()) refuse("philox_words", "out", "contiguous, of 32 bits", out);
  lora_linear().philox_words((uint64_t)seed, row, out.numel(), projection, (uint32_t*)out.data());
}

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
PyMethodDef fast_method(const char* name, FastCall call, const char* doc) {
  return {name, (PyCFunction)(void (*)(void))call, METH_FASTCALL, doc};
}
PyMethodDef FAST_METHODS[] = {
    fast_method("lora_linear_plain", plain, "y of a plain inference call of few rows, or None."),
    fast_method("lora_linear_few", few, "ys and s of few rows, base included, or None."),
    fast_method("lora_linear_begin", begin,
                "Whether the passes take these arguments as they are, and few rows' results."),
};

}  // namespace

}  // namespace fastpeft

namespace pybind11::detail {
template <>
struct type_caster<fastpeft::ScaleArgument> {
  PYBIND11_TYPE_CASTER(fastpeft::ScaleArgument, const_name("float | torch.Tensor | None"));
  bool load(handle source, bool) {
    if (!source.is_none() && !value.read(source.ptr(), true)) throw error_already_set();
    return true;
  }
};
}  // namespace pybind11::detail

namespace fastpeft {

void define_lora_linear(py::module_& m) {
  using namespace py::literals;
  m.def("lora_linear_down", down, "x"_a, "a"_a, "p"_a, "seed"_a.none(true));
  m.def("lora_linear_up", up, "ys"_a, "s"_a, "b"_a, "scales"_a, "lora_biases"_a);
  m.def("lora_linear_grad_up", grad_up, "dys"_a, "s"_a, "b"_a, "scales"_a, "wants_t"_a, "needs_b"_a, "needs_bias"_a);
  m.def("lora_linear_grad_down", grad_down, "dx"_a.none(true), "x"_a.none(true), "t"_a, "a"_a, "live"_a, "needs_a"_a,
        "p"_a, "seed"_a.none(true));
  m.def("philox_words", philox_words, "seed"_a, "row"_a, "projection"_a, "out"_a);
  for (PyMethodDef& method : FAST_METHODS)
    m.add_object(method.ml_name, py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr)));
}

}  // namespace fastpeft
