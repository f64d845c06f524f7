#include "vec_scalar.h"
// (what the kernels are written in comes first)
#include "linear4bit_kernels.h"

const Linear4bitKernels fastpeft::linear4bit_scalar = LINEAR4BIT_TABLE;
