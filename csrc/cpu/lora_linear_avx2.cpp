#ifdef __x86_64__
#include "vec_avx2.h"
// (what the kernels are written in comes first)
#include "lora_linear_table.h"

const LoraLinearKernels fastpeft::lora_linear_avx2 = TABLE;
#endif
