// A fastpeft.Weight4bit across the native boundary: its fields by name.
#pragma once
#include "tensor.h"

namespace fastpeft {

struct Packed {
  int64_t N = 0, K = 0, blocksize = 0;
  bool tiled = false, fp4 = false;
  Tensor data, scales, nested, offset;  // nested and offset: none where the scales are float32
};

// What is wrong with it, or null. Kernels read what the sizes say, so each is held against its tensor.
inline const char* read_packed(PyObject* object, Packed* out) {
  constexpr int COUNT = 8, TILE_ROWS = 16;
  static PyObject* names[COUNT] = {};
  if (!names[0]) {
    const char* const all[] = {"data",  "scales",    "nested_absmax", "offset",
                               "shape", "blocksize", "tiled",         "quant_type"};
    for (int i = 0; i < COUNT; ++i) names[i] = PyUnicode_InternFromString(all[i]);
  }
  py::object fields[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    fields[i] = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, names[i]));
    if (!fields[i]) return PyErr_Clear(), "is neither a torch.Tensor nor an fp.Weight4bit";
  }
  const py::object &shape = fields[4], &quant_type = fields[7];
  if (!PyTuple_CheckExact(shape.ptr()) || PyTuple_GET_SIZE(shape.ptr()) != 2) return "has no shape (N, K)";
  Tensor* const parts[] = {&out->data, &out->scales, &out->nested, &out->offset};
  for (int i = 0; i < 4; ++i)
    if (!fields[i].is_none() && !borrow(fields[i].ptr(), parts[i], false)) return "has parts that are no plain tensors";
  const int64_t N = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), 0));
  const int64_t K = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), 1));
  const int64_t blocksize = PyLong_AsLongLong(fields[5].ptr());
  if (PyErr_Occurred()) return PyErr_Clear(), "has sizes that are no ints";
  if (N < 0 || K < 0 || (K && N > (int64_t(1) << 60) / K) || blocksize < 2 || (blocksize & (blocksize - 1)))
    return "has sizes that make no sense";
  const int64_t blocks = (N * K + blocksize - 1) / blocksize;
  const bool is_nested = (bool)out->nested;
  const auto flat = [&](const Tensor& t, int dtype, int64_t count) {
    return t && t.dtype() == dtype && t.numel() >= count && t.contiguous() && t.same_device(out->data);
  };
  if (!flat(out->data, UINT8, (N * K + 1) / 2) || !flat(out->scales, is_nested ? UINT8 : FLOAT32, blocks) ||
      (is_nested && (!flat(out->nested, FLOAT32, (blocks + 255) / 256) || !flat(out->offset, FLOAT32, 1))))
    return "has parts of another size, dtype or device than its shape asks for";
  out->N = N, out->K = K, out->blocksize = blocksize, out->tiled = fields[6].ptr() == Py_True;
  out->fp4 = PyUnicode_Check(quant_type.ptr()) && PyUnicode_CompareWithASCIIString(quant_type.ptr(), "fp4") == 0;
  if (out->tiled && (K % 8 || K == 0 || N < TILE_ROWS)) return "is in tiles, but its shape has none";
  return nullptr;
}

}  // namespace fastpeft
