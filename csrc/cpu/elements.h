// The element types of tensors, and what each vec_<isa>.h must offer for them (all in an anonymous namespace: each
// instruction set's object keeps its own copy, so that none can leak into an object for older machines):
//   W            fp32 lanes of a vector V;  MAX_VECS, ROWS_1, ROWS_2, ROWS_3: shapes of tile_gemm's register blocks
//   V            zero() set1(f) load(p) store(p, v) store2(p, v0, v1) load_partial(p, n) store_partial(p, v, n) add mul
//   fma(a, b, c) sum(v) sub div max(a, b): b where one is NaN; if_zero(x, a, b): a where x is 0, else b
//   nearest(v): whole numbers; times_power(a, n): a · 2^n, n a whole number in LEAST_POWER (it gives 0) .. 127;
//   exponent(v), significand(v): of positive normal numbers, the latter in [1, 2)
//                (p: float*, bf16* or f16*; n in 1 .. W-1 elements, nothing beyond them is touched; other lanes load as
//                0) transpose_block(v): W vectors as the rows of a square
//   U            W/2 lanes of 64 bits: uset1(u) uadd mul32(a, b) (low halves) xor2 xor3
//                shr32(a), dup32(a) (by a shift, by a shuffle: high halves moved to the low ones)
//                ublocks(): 0 .. W/2-1 in the order of lanes that in_order expects
//                pair(a, b): W 32-bit words, the low halves of a and b in turn
//                in_order(words, c0, c1, c2, c3): words[0 .. 1], W 32-bit words each, = the low halves, block by block
//   keep(words, threshold, value)   V: value where the word >= threshold, else 0
//   Book         16 floats: load_book(p);  Codes: W dwords of 8 four-bit codes each: load_codes(p)
//   pick(book, codes, shift)        V: book[dword >> shift & 15], shift a constant
//   unpack(book, p) lookup(table, p)   V: of W codes in W/2 bytes, the first in the high half; of W bytes, table[p[i]]
//   NarrowBook   narrow_book<T>(book, scale): book · scale, each rounded to 16-bit T; unpack(out, narrow, p): of 32
//   codes
//
// Where FASTPEFT_DOT is defined, also:
//   Pairs        W bf16x2: load(p) store(p, v) set1(e), bits(v): those of a V
//                load_pairs(p, n): of n numbers, zeros behind them; n <= 0: all zeros, nothing is read
//                zip(out, a, b, n), zip(out, V, V), zip_rounded(out, V, V): pairs out of two rows
//   fma(a, b, c) the products of pairs a and b added to c, a V
//   pick(narrow, codes, shift)      Pairs: narrow[dword >> shift & 15] and narrow[dword >> shift >> 16 & 15]
#pragma once
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "../tensor.h"

#ifdef __AVX512BF16__
#define FASTPEFT_DOT  // this instruction set has the dot product of pairs
#endif

#define FP_INLINE inline __attribute__((always_inline))

namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Two numbers that follow each other in a sum, the first in the low half: what a dot product of pairs is fed with.
struct __attribute__((may_alias)) bf16x2 {
  uint32_t bits;
};

// What a tile is multiplied in, an element at a time: so many terms of a sum, each a Number.
template <class E>
constexpr int TERMS = 1;
template <>
constexpr int TERMS<bf16x2> = 2;
template <class E>
using Number = std::conditional_t<TERMS<E> == 2, bf16, E>;

// What s and t lie in where the compute dtype is T, and to what adapters are rounded (ranks_dtype): fp16's range is too
// small for them.
template <class T>
using Ranks = std::conditional_t<std::is_same_v<T, f16>, float, T>;

}  // namespace

// A table's entry: the kernel for the compute dtype, a template argument.
#define FASTPEFT_BY_DTYPE(kernel, args, dtype) \
  switch (dtype) {                             \
    case FLOAT32:                              \
      return kernel<float>(args);              \
    case BFLOAT16:                             \
      return kernel<bf16>(args);               \
    case FLOAT16:                              \
      return kernel<f16>(args);                \
  }                                            \
  return BAD_DTYPE

// the same for a kernel of T and E that multiplies bf16 by dot products of pairs where the call says so
#ifdef FASTPEFT_DOT
#define FASTPEFT_BY_ELEMENT(kernel, args, dtype)                              \
  if ((dtype) == BFLOAT16 && args.way.dot) return kernel<bf16, bf16x2>(args); \
  FASTPEFT_BY_DTYPE(kernel, args, dtype)
#else
#define FASTPEFT_BY_ELEMENT FASTPEFT_BY_DTYPE
#endif
