#ifdef __x86_64__
#include "vec_avx2.h"
// (what the kernels are written in comes first)
#include "linear4bit_kernels.h"

const Linear4bitKernels fastpeft::linear4bit_avx2 = LINEAR4BIT_TABLE;
#endif
