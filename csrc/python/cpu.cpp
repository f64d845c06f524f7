// The module fastpeft_kernels._cpu. fastpeft/native.py loads it.
#include "cpu.h"

#include <stdlib.h>

#ifndef FASTPEFT_BUILD_ID
#define FASTPEFT_BUILD_ID "unstamped"
#endif

namespace fastpeft {

Plan plan;

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
const LoraLinearKernels& lora_linear() { return FASTPEFT_TABLE(lora_linear); }
const Linear4bitKernels& linear4bit() { return FASTPEFT_TABLE(linear4bit); }
const PrefixAttentionKernels& prefix_attention() { return FASTPEFT_TABLE(prefix_attention); }

void check_status(int status, const char* kernel, int64_t M, int64_t K, int64_t N, int64_t R) {
  if (status == OK) return;
  const std::string what = text(kernel, ": no memory for its workspace at M=", M, ", K=", K, ", N=", N, ", R=", R);
  PyErr_SetString(PyExc_MemoryError, what.c_str());
  throw py::error_already_set();
}

static std::vector<std::string> isas() {
  std::vector<std::string> all;
  for (int i = 0; i < ISA_COUNT; ++i)
    if (runnable((Isa)i)) all.push_back(name((Isa)i));
  return all;
}

static void set_isa_by_name(const std::string& wanted) {
  Isa isa;
  if (parse(wanted.c_str(), &isa) && runnable(isa)) return set_isa(isa);
  std::string choices;
  for (const std::string& each : isas()) choices += (choices.empty() ? "" : ", ") + each;
  throw py::value_error(text("set_isa: this machine runs ", choices, ", got '", wanted, "'"));
}

// rows: (instruction set, few_rows, few_rows_4bit), each with a number for float32, bfloat16 and float16
using Rows = std::tuple<std::string, std::array<int64_t, 3>, std::array<int64_t, 3>>;
static void set_plan(const std::vector<Rows>& rows, int64_t few_rows_untiled, int64_t few_rows_transposed, bool dot,
                     double parallel_work) {
  Plan next;
  for (const auto& [isa_name, few_rows, few_rows_4bit] : rows) {
    Isa isa;
    if (!parse(isa_name.c_str(), &isa)) throw py::value_error("set_plan: no instruction set is called " + isa_name);
    std::copy_n(few_rows.begin(), 3, next.few_rows[(int)isa]);
    std::copy_n(few_rows_4bit.begin(), 3, next.few_rows_4bit[(int)isa]);
  }
  next.few_rows_untiled = few_rows_untiled, next.few_rows_transposed = few_rows_transposed;
  next.dot = dot, next.parallel_work = parallel_work;
  plan = next;
}

}  // namespace fastpeft

using namespace fastpeft;

PYBIND11_MODULE(_cpu_checked, m) {
  using namespace py::literals;
  m.doc() = "Native CPU kernels of fastpeft: see csrc/<op>.h for what they compute.";
  m.attr("build_id") = FASTPEFT_BUILD_ID;
  import_torch();
  m.def("isas", isas, "Instruction sets compiled in that run on this machine, worst to best.");
  m.def("isa", [] { return std::string(name(current_isa())); }, "The instruction set in use.");
  m.def("set_isa", set_isa_by_name, "name"_a);
  m.def("set_plan", set_plan, "rows"_a, "few_rows_untiled"_a, "few_rows_transposed"_a, "dot"_a, "parallel_work"_a);
  m.def("set_books", set_books, "nf4"_a, "fp4"_a, "map"_a, "The code books of 4-bit weights, float32 on the CPU.");
  m.def("set_allocator", set_allocator, "f"_a.none(true));
  define_lora_linear(m);
  define_linear4bit(m);
  define_prefix_attention(m);
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

// The faces of the ops. One translation unit a module: pybind11's headers take 7 s of compiling in each.
#include "linear4bit.cpp"
#include "lora_linear.cpp"
#include "prefix_attention.cpp"
