#include "dispatch.h"

#include <string.h>

#include <atomic>

namespace fastpeft {

static const char* const NAMES[ISA_COUNT] = {"scalar", "avx2", "avx512", "avx512bf16"};

const char* name(Isa isa) { return NAMES[(int)isa]; }

bool parse(const char* text, Isa* isa) {
  for (int i = 0; i < ISA_COUNT; ++i)
    if (!strcmp(text, NAMES[i])) return *isa = (Isa)i, true;
  return false;
}

bool runnable(Isa isa) {
#ifdef __x86_64__
  // libgcc asks the operating system too (XGETBV); F16C is in every machine with AVX2 and FMA
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::SCALAR:
      return true;
    case Isa::AVX2:
      return avx2;
    case Isa::AVX512:
      return avx512;
    case Isa::AVX512BF16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::SCALAR;
}

Isa best_isa(Isa cap) {
  int i = (int)cap;
  while (!runnable((Isa)i)) --i;  // scalar always runs
  return (Isa)i;
}

static std::atomic<Isa>& setting() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

Isa current_isa() { return setting().load(std::memory_order_relaxed); }
void set_isa(Isa isa) { setting().store(isa, std::memory_order_relaxed); }

}  // namespace fastpeft
