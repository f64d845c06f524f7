#ifdef __x86_64__
#include "vec_avx512.h"
// (what the kernels are written in comes first)
#include "linear4bit_kernels.h"

const Linear4bitKernels fastpeft::linear4bit_avx512bf16 = LINEAR4BIT_TABLE;
#endif
