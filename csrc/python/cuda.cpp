// The module fastpeft_kernels._cuda. fastpeft/native.py loads it.
#include "cuda.h"

#include <math.h>

#ifndef FASTPEFT_EMULATE
#include <cuda_runtime_api.h>
#endif
#ifndef FASTPEFT_BUILD_ID
#define FASTPEFT_BUILD_ID "unstamped"
#endif

namespace fastpeft {

namespace {

#ifdef FASTPEFT_EMULATE  // by tests, on the CPU
constexpr int GPU = dlpack::CPU;
struct DeviceGuard {
  explicit DeviceGuard(int) {}
  int status = 0;
};
void* current_stream(const Tensor&) { return nullptr; }
std::string error_name(int) { return "emulated"; }
#else
constexpr int GPU = dlpack::CUDA;

// Makes a device the calling thread's current one, and puts back the one that was.
struct DeviceGuard {
  int before = 0, now, status;
  explicit DeviceGuard(int device) : now(device), status(cudaGetDevice(&before)) {
    if (!status && now != before) status = cudaSetDevice(now);
  }
  ~DeviceGuard() {
    if (now != before) cudaSetDevice(before);
  }
};

void* current_stream(const Tensor& like) {
  void* stream = nullptr;
  if (torch_.api->current_stream(GPU, like.view.device.index, &stream)) throw py::error_already_set();
  return stream;
}

std::string error_name(int status) { return cudaGetErrorString((cudaError_t)status); }
#endif

}  // namespace

int multiprocessors([[maybe_unused]] const Tensor& like) {
  int count = 4;
#ifndef FASTPEFT_EMULATE
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, like.view.device.index)) count = 4;
#endif
  return count;
}

// ---- what a pass takes ----

void check_device(const char* op, const char* argument, const Tensor& t) {
  if (t.view.device.type != GPU) refuse(op, argument, "on a CUDA device", t);
}

Pass::Pass(const char* op, const char* argument, const Tensor& like)
    : op(op), like(like), dtype(like.dtype()), wide(ranks_dtype(dtype)) {
  if ((dtype != BFLOAT16 && dtype != FLOAT16) || like.dim() < 1)
    refuse(op, argument, "[M, columns], bfloat16 or float16", like);
  check_device(op, argument, like);
}

void Pass::on_device(const char* argument, const Tensor& t) const {
  if (t && !t.same_device(like)) refuse(op, argument, "on the other tensors' device", t);
}

Matrix Pass::rows(const char* argument, const Tensor& t, int64_t M, int64_t columns) const {
  on_device(argument, t);
  return matrix(op, argument, t, M, columns, dtype);
}

Matrix Pass::ranks(const char* argument, const Tensor& t, int64_t M, int64_t columns) const {
  on_device(argument, t);
  return matrix(op, argument, t, M, columns, wide);
}

Matrix Pass::adapter(const char* argument, const Tensor& t, int64_t rows, int64_t columns) const {
  on_device(argument, t);
  if (!t.is_real()) refuse(op, argument, "float32, bfloat16 or float16", t);
  return matrix(op, argument, t, rows, columns, t.dtype());
}

Vector Pass::vector(const char* argument, const Tensor& t, int64_t columns) const {
  on_device(argument, t);
  return fastpeft::vector(op, argument, t, columns);
}

Scale Pass::scale(const Tensor& t, int64_t R) const {
  on_device("scale", t);
  if (!t || t.dtype() != FLOAT32 || (t.dim() && !t.is({R})))
    refuse(op, "scale", text("[] or [R] = [", R, "], float32"), t);
  return {(const float*)t.data(), t.dim() ? t.stride(0) : 0};
}

CudaDropout Pass::dropout(double p, const Tensor& seed) const { return fastpeft::dropout(op, like, p, seed); }

CudaDropout dropout(const char* op, const Tensor& like, double p, const Tensor& seed) {
  if (p == 0.0) return {nullptr, 0, 1.0f};
  if (!(p > 0.0 && p < 1.0)) throw py::value_error(text(op, ": p must be in [0, 1), got ", p));
  if (seed && !seed.same_device(like)) refuse(op, "seed", "on the other tensors' device", seed);
  if (!seed || seed.dim() != 0 || seed.dtype() != INT64) refuse(op, "seed", "[], int64", seed);
  const double threshold = ceil(p * 4294967296.0);
  return {(const int64_t*)seed.data(), threshold < 4294967295.0 ? (uint32_t)threshold : 4294967295u,
          (float)(1.0 / (1.0 - p))};
}

// ---- launches ----

Matrix Launches::workspace(int64_t rows, int64_t columns, int dtype) {
  const int64_t shape[] = {rows, columns};
  if (torch_.allocate_instead) {
    handed_out.push_back(allocate(like, shape, 2, dtype));
    return {handed_out.back().data, columns, dtype};
  }
  managed.push_back(allocate_managed(like, shape, 2, dtype));
  return {data_of(managed.back()->tensor), columns, dtype};
}

void Launches::run(std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  void* const stream = current_stream(like);
  int status;
  {
    py::gil_scoped_release release;
    DeviceGuard guard(like.view.device.index);
    status = guard.status;
    for (auto launch = all.begin(); !status && launch != all.end(); ++launch) status = (*launch)(stream);
  }
  if (!status) return;
  std::string message = text(op, ": CUDA error ", status, " (", error_name(status), ") at");
  for (const auto& [name, size] : sizes) message += text(" ", name, "=", size);
  throw std::runtime_error(message);
}

}  // namespace fastpeft

using namespace fastpeft;

PYBIND11_MODULE(_cuda, m) {
  using namespace py::literals;
  m.doc() =
      "Native CUDA kernels of fastpeft: see csrc/lora_linear_cuda.h and its like, of other ops, for what they compute.";
  m.attr("build_id") = FASTPEFT_BUILD_ID;
  import_torch();
  m.def("set_allocator", set_allocator, "f"_a.none(true));
  define_lora_linear(m);
  define_linear4bit(m);
  define_prefix_attention(m);
}

// The faces of the ops. One translation unit a module: pybind11's headers take 7 s of compiling in each.
#include "linear4bit_cuda.cpp"
#include "lora_linear_cuda.cpp"
#include "prefix_attention_cuda.cpp"
