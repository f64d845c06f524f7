// Tensors across the native boundary: the one place that knows torch.Tensor. A native pass is a C++ function of Tensor,
// MaybeTensor, numbers and vectors of them, and returns what `allocate` gives; pybind11's casters below do the rest.
//
// No torch header: torch.Tensor carries DLPack's C exchange API (the public standard's version 1.3; torch 2.11 and
// newer), a table of functions that lend a tensor's metadata, allocate, wrap, and name the current stream.
// Only exact tensors and Parameters are taken, whose memory is their value: not a subclass, not one that is lazily
// negated, zero, conjugated or on no device. Those raise here; the callers in Python resolve them or go another way.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../tensor.h"

namespace py = pybind11;

namespace fastpeft {

// ---- DLPack, as its standard lays it out ----

namespace dlpack {
enum DeviceType : int32_t { CPU = 1, CUDA = 2 };
struct Device {
  int32_t type, index;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct View {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t *shape, *strides;  // they point into the tensor that was borrowed
  uint64_t byte_offset;
};
struct Version {
  uint32_t major, minor;
};
struct Managed {
  Version version;
  void* context;
  void (*deleter)(Managed*);
  uint64_t flags;
  View tensor;
};
using SetError = void (*)(void* context, const char* kind, const char* message);
struct ExchangeApi {
  Version version;
  ExchangeApi* older;
  int (*allocate)(View* prototype, Managed** out, void* context, SetError);
  int (*managed_from_object)(void* object, Managed** out);
  int (*object_from_managed)(Managed*, void** object);
  int (*borrow)(void* object, View* out);
  int (*current_stream)(int32_t device_type, int32_t device_index, void** stream);
};
}  // namespace dlpack

constexpr int INT64 = 3, UINT8 = 4, INT32 = 5, BOOL = 6, OTHER = -1;  // beside the Dtypes that kernels compute in

inline int dtype_of(dlpack::DataType t) {
  switch (t.code << 8 | t.bits) {
    case 2 << 8 | 32:
      return FLOAT32;
    case 4 << 8 | 16:
      return BFLOAT16;
    case 2 << 8 | 16:
      return FLOAT16;
    case 0 << 8 | 64:
      return INT64;
    case 1 << 8 | 8:
      return UINT8;
    case 0 << 8 | 32:
      return INT32;
    case 6 << 8 | 8:
      return BOOL;
    default:
      return OTHER;
  }
}

inline dlpack::DataType dlpack_of(int dtype) {
  static const dlpack::DataType all[] = {{2, 32, 1}, {4, 16, 1}, {2, 16, 1}, {0, 64, 1}, {1, 8, 1}};
  return all[dtype];
}

// What is asked of torch once, when the module is loaded; the references are kept for good.
struct Torch {
  const dlpack::ExchangeApi* api = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyObject *is_neg = nullptr, *get_num_threads = nullptr, *is_grad_enabled = nullptr, *requires_grad = nullptr;
  PyObject *empty = nullptr, *empty_keywords = nullptr, *device = nullptr;
  PyObject* dtypes[5] = {};              // by Dtype, INT64 and UINT8
  PyObject* watchers[5] = {};            // functions whose answer is false or None in a plain call
  PyObject* allocate_instead = nullptr;  // (shape, dtype code) -> tensor: tests hand out guarded memory
};
inline Torch torch_;

inline PyObject* attribute(const char* module, const char* name) {
  return py::object(py::module_::import(module).attr(name)).release().ptr();
}

// Raises ImportError where this torch cannot lend tensors.
inline void import_torch() {
  torch_.tensor = (PyTypeObject*)attribute("torch", "Tensor");
  torch_.parameter = (PyTypeObject*)attribute("torch.nn", "Parameter");
  const py::object capsule = py::getattr(py::handle((PyObject*)torch_.tensor), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api"))
    throw py::import_error("this torch has no DLPack C exchange API: torch 2.11 or newer is needed");
  auto* api = (dlpack::ExchangeApi*)PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  while (api && api->version.major != 1) api = api->older;
  if (!api) throw py::import_error("this torch's DLPack C exchange API has no version 1");
  torch_.api = api;
  torch_.is_neg = PyUnicode_InternFromString("is_neg");
  torch_.requires_grad = PyUnicode_InternFromString("requires_grad");
  torch_.empty = attribute("torch", "empty");
  torch_.empty_keywords = py::make_tuple("dtype", "device").release().ptr();
  torch_.device = PyUnicode_InternFromString("device");
  const char* const dtypes[] = {"float32", "bfloat16", "float16", "int64", "uint8"};
  for (int i = 0; i < 5; ++i) torch_.dtypes[i] = attribute("torch", dtypes[i]);
  torch_.get_num_threads = attribute("torch", "get_num_threads");
  torch_.is_grad_enabled = attribute("torch", "is_grad_enabled");
  torch_.watchers[0] = attribute("torch._C", "_is_any_autocast_enabled");
  torch_.watchers[1] = attribute("torch._C", "_len_torch_dispatch_stack");
  torch_.watchers[2] = attribute("torch._C", "_is_torch_function_mode_enabled");
  torch_.watchers[3] = attribute("torch._C._functorch", "peek_interpreter_stack");
  torch_.watchers[4] = attribute("torch._C._autograd", "_profiler_enabled");
}

inline bool answers_true(PyObject* function) {
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(function));
  const int truth = answer ? PyObject_IsTrue(answer.ptr()) : -1;
  if (truth < 0) throw py::error_already_set();
  return truth;
}

// No autocast, no dispatch or function mode, no functorch transform, no profiler.
inline bool plain_call() {
  for (PyObject* watcher : torch_.watchers)
    if (answers_true(watcher)) return false;
  return true;
}

inline int num_threads() {
  const auto n = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(torch_.get_num_threads));
  if (!n) throw py::error_already_set();
  return (int)PyLong_AsLong(n.ptr());
}

// ---- a tensor that is lent for the length of a call ----

struct Tensor {
  PyObject* object = nullptr;  // null: None came
  dlpack::View view{};

  explicit operator bool() const { return object; }
  int dim() const { return view.dims; }
  int64_t size(int i) const { return view.shape[i < 0 ? view.dims + i : i]; }
  int64_t stride(int i) const { return view.strides[i < 0 ? view.dims + i : i]; }
  int dtype() const { return dtype_of(view.dtype); }
  bool is_real() const { return (unsigned)dtype() <= FLOAT16; }  // of a dtype that kernels compute in
  void* data() const { return object ? (char*)view.data + view.byte_offset : nullptr; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < view.dims; ++i) n *= view.shape[i];
    return n;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int i = view.dims - 1; i >= 0; --i) {
      if (view.shape[i] != 1 && view.strides[i] != expected) return numel() == 0;
      expected *= view.shape[i];
    }
    return true;
  }
  bool is(std::initializer_list<int64_t> shape) const {
    if ((int)shape.size() != view.dims) return false;
    int i = 0;
    for (int64_t n : shape)
      if (view.shape[i++] != n) return false;
    return true;
  }
  bool same_device(const Tensor& other) const {
    return view.device.type == other.view.device.type && view.device.index == other.view.device.index;
  }
};

struct MaybeTensor : Tensor {};

// Whether it was lent; if not, and `raise`, an error is set.
inline bool borrow(PyObject* object, Tensor* out, bool raise) {
  const char* what = nullptr;
  if (Py_TYPE(object) != torch_.tensor && Py_TYPE(object) != torch_.parameter) {
    what = "is no exact torch.Tensor or Parameter";
  } else if (torch_.api->borrow(object, &out->view)) {
    PyErr_Clear();
    what = "is one that PyTorch does not lend (meta, sparse, nested, conjugated)";
  } else if (!out->view.data && out->numel()) {
    what = "has no memory (a zero tensor, or one that was freed)";
  } else {
    PyObject* arguments[] = {object};
    const auto negated =
        py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(torch_.is_neg, arguments, 1, nullptr));
    if (negated.ptr() == Py_False) {
      out->object = object;
      return true;
    }
    what = "is lazily negated";
  }
  if (raise) PyErr_Format(PyExc_TypeError, "fastpeft's native passes take plain tensors; this one %s", what);
  return false;
}

inline bool requires_grad(const Tensor& t) {
  if (!t) return false;
  const auto answer = py::reinterpret_steal<py::object>(PyObject_GetAttr(t.object, torch_.requires_grad));
  return answer.ptr() == Py_True;
}

// ---- results ----

// For tests: results and workspaces are what f(shape, dtype code) returns; None: PyTorch's allocator.
inline void set_allocator(py::object f) { torch_.allocate_instead = f.is_none() ? nullptr : f.release().ptr(); }

// Memory on `like`'s device, by PyTorch's allocator, until its deleter is called. The GIL is held.
inline dlpack::Managed* allocate_managed(const Tensor& like, const int64_t* shape, int dims, int dtype) {
  dlpack::View prototype{nullptr, like.view.device, dims, dlpack_of(dtype), (int64_t*)shape, nullptr, 0};
  dlpack::Managed* made = nullptr;
  std::string message = "no memory";
  const auto set_error = [](void* context, const char*, const char* text) { *(std::string*)context = text; };
  if (torch_.api->allocate(&prototype, &made, &message, set_error)) {
    PyErr_SetString(PyExc_MemoryError, message.c_str());
    throw py::error_already_set();
  }
  return made;
}

inline void* data_of(const dlpack::View& view) { return view.data ? (char*)view.data + view.byte_offset : nullptr; }

constexpr int MAX_DIMS = 64;  // as PyTorch has it

struct Result {
  py::object object = py::none();
  void* data = nullptr;
};

// A new contiguous tensor on `like`'s device, by PyTorch's allocator. The GIL is held.
inline Result allocate(const Tensor& like, const int64_t* shape, int dims, int dtype) {
  PyObject* object = nullptr;
  if (like.view.device.type == dlpack::CPU && !torch_.allocate_instead) {
    dlpack::Managed* made = allocate_managed(like, shape, dims, dtype);
    void* const data = data_of(made->tensor);
    if (torch_.api->object_from_managed(made, (void**)&object)) throw py::error_already_set();
    return {py::reinterpret_steal<py::object>(object), data};
  }
  py::tuple sizes(dims);
  for (int i = 0; i < dims; ++i) sizes[i] = shape[i];
  if (torch_.allocate_instead) {
    object = py::object(py::handle(torch_.allocate_instead)(sizes, dtype)).release().ptr();
  } else {  // record_stream does nothing to a tensor that DLPack has made
    const auto device = py::reinterpret_steal<py::object>(PyObject_GetAttr(like.object, torch_.device));
    PyObject* arguments[] = {sizes.ptr(), torch_.dtypes[dtype], device.ptr()};
    if (device) object = PyObject_Vectorcall(torch_.empty, arguments, 1, torch_.empty_keywords);
  }
  Result result{py::reinterpret_steal<py::object>(object)};
  Tensor t;
  if (!object || !borrow(object, &t, true)) throw py::error_already_set();
  result.data = t.data();
  return result;
}
inline Result allocate(const Tensor& like, std::initializer_list<int64_t> shape, int dtype) {
  return allocate(like, shape.begin(), (int)shape.size(), dtype);
}

// ---- checks in sentences ----

template <class... Parts>
std::string text(const Parts&... parts) {
  std::string all;
  const auto add = [&](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>)
      all += std::to_string(part);
    else
      all += part;
  };
  (add(parts), ...);
  return all;
}

inline std::string shape_of(const Tensor& t) {
  std::string all = "[";
  for (int i = 0; i < t.dim(); ++i) all += (i ? ", " : "") + std::to_string(t.size(i));
  return all + "]";
}

// Throws ValueError: "lora_linear_up: s must be [3, 4], contiguous rows, of x's dtype, got [3, 5]"
[[noreturn]] inline void refuse(const char* op, const char* argument, const std::string& expected, const Tensor& got) {
  throw py::value_error(text(op, ": ", argument, " must be ", expected, ", got ", got ? shape_of(got) : "None"));
}

inline int64_t rows_of(const Tensor& t) {
  int64_t n = 1;
  for (int i = 0; i + 1 < t.dim(); ++i) n *= t.size(i);
  return n;
}

// t [..., columns] as a matrix [M, columns]: elements of a row side by side, one stride between rows. `M` < 0: any.
inline Matrix matrix(const char* op, const char* argument, const Tensor& t, int64_t M, int64_t columns, int dtype) {
  if (!t) return {nullptr, 0, dtype};
  bool fits = t.dim() >= 1 && t.size(-1) == columns && (M < 0 || rows_of(t) == M) && t.dtype() == dtype;
  int64_t ld = columns, expected = 0;
  for (int i = t.dim() - 2; fits && i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (expected == 0) ld = t.stride(i);
    fits = expected == 0 || t.stride(i) == expected;
    expected = t.stride(i) * t.size(i);
  }
  fits = fits && (columns <= 1 || t.stride(-1) == 1) && (ld >= columns || t.numel() == 0);
  if (!fits) refuse(op, argument, text("[", M, ", ", columns, "], contiguous rows, of the right dtype"), t);
  return {t.data(), ld, dtype};
}

// An optional [columns], contiguous.
inline Vector vector(const char* op, const char* argument, const Tensor& t, int64_t columns) {
  if (!t) return {nullptr, FLOAT32};
  const bool fits = t.is({columns}) && t.is_real() && (columns <= 1 || t.stride(0) == 1);
  if (!fits) refuse(op, argument, text("[", columns, "], contiguous, float32, bfloat16 or float16"), t);
  return {t.data(), t.dtype()};
}

}  // namespace fastpeft

namespace pybind11::detail {
template <>
struct type_caster<fastpeft::Tensor> {
  PYBIND11_TYPE_CASTER(fastpeft::Tensor, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    if (!fastpeft::borrow(source.ptr(), &value, true)) throw error_already_set();
    return true;
  }
};
template <>
struct type_caster<fastpeft::MaybeTensor> {
  PYBIND11_TYPE_CASTER(fastpeft::MaybeTensor, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    if (!source.is_none() && !fastpeft::borrow(source.ptr(), &value, true)) throw error_already_set();
    return true;
  }
};
}  // namespace pybind11::detail
