// Few rows over a 4-bit weight by AVX512-BF16's dot product of pairs: twice the rate of FMAs where the machine has it
// at full rate (AMD), less than theirs where not (Intel): the caller chooses.
//
// A dword of codes k .. k+7, shifted, has the code of k + j in the low bits of its lower half and that of k + j + 4 in
// those of its upper half: vpermw looks up both, in a code book of 16 bf16 values that stands there twice (it reads 5
// bits). So x comes in the same pairs. Products are of bf16 values, exact, sums fp32, and the scale of a block is fp32.
#pragma once
#include "linear4bit_decode.h"

namespace {

constexpr int DOT_ROWS = 16;  // rows of x at a time
constexpr int DOT_PAIRS = CODES4 / 2;

#ifdef FASTPEFT_DOT
// pairs[k / 8, j, m] = x[m, k + j] and x[m, k + j + 4], k0 <= k < k1 (multiples of 8), m < rows; zeros up to DOT_ROWS
FP_INLINE void pair_up(bf16x2* pairs, const bf16* x, int64_t ld, int64_t rows, int64_t k0, int64_t k1) {
  for (int64_t k = k0; k < k1; k += CODES4)
    for (int j = 0; j < DOT_PAIRS; ++j)
      for (int64_t m = 0; m < DOT_ROWS; ++m) {
        const bf16* p = x + m * ld + k + j;
        pairs[(k / CODES4 * DOT_PAIRS + j) * DOT_ROWS + m] = {m < rows ? p[0].bits | (uint32_t)p[DOT_PAIRS].bits << 16
                                                                       : 0u};
      }
}

// out[m, n] = Σ_k x[m, k] · W[n, k] for M rows (those of `pairs`) and the 16 rows of a tiled group; out's are ld apart
template <int M>
void dot_group(float* out, int64_t ld, const Reader& reader, int64_t group, const float* scales, const bf16x2* pairs) {
  constexpr int CHAINS = M >= 8 ? 1 : M >= 4 ? 2 : 4;
  // Rounded to bf16 as it is, NF4's book has errors of one sign that do not average out (2.6 times a dense weight's
  // where x has a mean); multiplied by this factor, which the block's scale takes back, 0.7 times. FP4's is exact in
  // twelfths.
  const float factor = reader.w.codebook[ROWS4 - 1] == 1.0f ? 1.287098f : 12.0f;
  const V unscale = set1(1.0f / factor);
  const NarrowBook book = narrow_book<bf16>(reader.book, factor);
  const uint8_t* p = reader.tile(group);
  for (int m = 0; m < M; ++m) store(out + m * ld, zero());
  for (int64_t i = 0; i < reader.w.K / reader.step; ++i, scales += ROWS4) {
    V acc[M][CHAINS];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int c = 0; c < CHAINS; ++c) acc[m][c] = zero();
    for (int64_t d = 0; d < reader.step / CODES4; ++d, p += 4 * ROWS4, pairs += DOT_PAIRS * DOT_ROWS) {
      __builtin_prefetch(p + AHEAD, 0, 2);
      const Codes codes = load_codes(p);
#pragma GCC unroll 4
      for (int j = 0; j < DOT_PAIRS; ++j) {
        const Pairs w = pick(book, codes, ODD_EVEN[j]);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) acc[m][j % CHAINS] = fma(w, set1(pairs[j * DOT_ROWS + m]), acc[m][j % CHAINS]);
      }
    }
    const V scale = mul(load(scales), unscale);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      V sum = acc[m][0];
      for (int c = 1; c < CHAINS; ++c) sum = add(sum, acc[m][c]);
      store(out + m * ld, fma(sum, scale, load(out + m * ld)));
    }
  }
}

void dot_rows_of(int64_t rows, float* out, int64_t ld, const Reader& reader, int64_t group, const float* scales,
                 const bf16x2* pairs) {
  if (rows > 8) return dot_group<16>(out, ld, reader, group, scales, pairs);
  if (rows > 4) return dot_group<8>(out, ld, reader, group, scales, pairs);
  if (rows > 2) return dot_group<4>(out, ld, reader, group, scales, pairs);
  if (rows > 1) return dot_group<2>(out, ld, reader, group, scales, pairs);
  dot_group<1>(out, ld, reader, group, scales, pairs);
}
#endif

}  // namespace
