// What the Python faces of the CUDA kernels share: a pass, all of whose tensors lie on one GPU, and its launches.
#pragma once
#include <functional>
#include <utility>
#include <vector>

#include "../lora_linear_cuda.h"
#include "tensor.h"

namespace fastpeft {

using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<MaybeTensor>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The name of a pass, the GPU that its tensors lie on and the dtype that it computes in: those of one of them.
struct Pass {
  const char* const op;
  const Tensor& like;
  const int dtype, wide;  // wide: of s and t

  Pass(const char* op, const char* argument, const Tensor& like);

  // Each refuses what the kernels could not read.
  Matrix rows(const char* argument, const Tensor& t, int64_t M, int64_t columns) const;   // in the compute dtype
  Matrix ranks(const char* argument, const Tensor& t, int64_t M, int64_t columns) const;  // in `wide`
  Matrix adapter(const char* argument, const Tensor& t, int64_t rows, int64_t columns) const;
  Vector vector(const char* argument, const Tensor& t, int64_t columns) const;
  Scale scale(const Tensor& t, int64_t R) const;
  CudaDropout dropout(double p, const Tensor& seed) const;
  template <class... Lists>
  void same_length(size_t n, const Lists&... lists) const {
    if (!((lists.size() == n) && ...))
      throw py::value_error(text(op, ": lists must have an entry a projection (", n, ")"));
  }

 private:
  void on_device(const char* argument, const Tensor& t) const;
};

CudaDropout dropout(const char* op, const Tensor& like, double p, const Tensor& seed);
void check_device(const char* op, const char* argument, const Tensor& t);
int multiprocessors(const Tensor& like);

// Launches to be queued together, and their workspaces. These go back to PyTorch's allocator with it, which orders
// memory by stream: after `run` that is soon enough, before it what was packed could be given to a result.
class Launches {
 public:
  explicit Launches(const char* op, const Tensor& like) : op(op), like(like) {}
  explicit Launches(const Pass& pass) : Launches(pass.op, pass.like) {}
  Launches(const Launches&) = delete;
  ~Launches() {
    for (dlpack::Managed* each : managed) each->deleter(each);
  }

  Matrix workspace(int64_t rows, int64_t columns, int dtype);
  template <class Arguments>
  void add(int (*launch)(const Arguments&, void* stream), const Arguments& arguments) {
    all.push_back([=](void* stream) { return launch(arguments, stream); });
  }
  // On the tensors' device and its current stream, without the GIL; `sizes` for the sentence about an error.
  void run(std::initializer_list<std::pair<const char*, int64_t>> sizes);

 private:
  const char* op;
  const Tensor& like;
  std::vector<std::function<int(void*)>> all;
  std::vector<dlpack::Managed*> managed;
  std::vector<Result> handed_out;  // by a test
};

void define_lora_linear(py::module_& m);
void define_linear4bit(py::module_& m);
void define_prefix_attention(py::module_& m);

}  // namespace fastpeft
