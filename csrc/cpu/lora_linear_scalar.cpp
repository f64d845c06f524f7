#include "vec_scalar.h"
// (what the kernels are written in comes first)
#include "lora_linear_table.h"

const LoraLinearKernels fastpeft::lora_linear_scalar = TABLE;
