// The vectors of the instruction set that this object is for. setup.py compiles each file of kernels once for each set,
// and names it in FASTPEFT_ISA.
#pragma once
#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_scalar.h"
#endif

// The one symbol of an object, its table of kernels: FASTPEFT_TABLE(lora_linear) is lora_linear_avx2
#define FASTPEFT_TABLE(op) FASTPEFT_JOIN(op, FASTPEFT_ISA)
#define FASTPEFT_JOIN(op, isa) FASTPEFT_JOIN_EXPANDED(op, isa)
#define FASTPEFT_JOIN_EXPANDED(op, isa) op##_##isa
