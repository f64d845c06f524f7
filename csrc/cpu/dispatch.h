// Which instruction set the native CPU kernels use in this process.
#pragma once

namespace fastpeft {

enum class Isa { SCALAR, AVX2, AVX512, AVX512BF16 };  // worst to best
constexpr int ISA_COUNT = 4;

const char* name(Isa isa);
bool runnable(Isa isa);                  // compiled in, and this machine (CPU and operating system) has it
bool parse(const char* text, Isa* isa);  // false: no such name

Isa best_isa(Isa cap = Isa::AVX512BF16);  // the best that runs here, no better than cap
Isa current_isa();                        // best_isa() unless set
void set_isa(Isa isa);

}  // namespace fastpeft
