// The table of one instruction set: each pass for the three compute dtypes. Included last by lora_linear_<isa>.cpp.
#pragma once
#include "lora_linear_kernels.h"
#include "lora_linear_small_kernels.h"

namespace {

int down_any(const LoraLinearDown& d) { FASTPEFT_BY_DTYPE(down, d, d.x.dtype); }
int up_any(const LoraLinearUp& u) { FASTPEFT_BY_DTYPE(up, u, u.y.dtype); }
int grad_up_any(const LoraLinearGradUp& u) { FASTPEFT_BY_DTYPE(grad_up, u, u.dy.dtype); }
int grad_down_any(const LoraLinearGradDown& d) { FASTPEFT_BY_DTYPE(grad_down, d, d.t.dtype); }
int small_rows(const LoraLinearSmall& d) { FASTPEFT_BY_DTYPE(small, d, d.x.dtype); }
int small_any(const LoraLinearSmall& all) {
  LoraLinearSmall d = all;  // SMALL_MAX_M rows at a time
  for (int64_t m = 0; m < all.M; m += SMALL_MAX_M) {
    d.M = smaller(SMALL_MAX_M, all.M - m);
    Matrix* const by_row[] = {&d.x, &d.y, &d.s};
    for (Matrix* rows : by_row)
      if (rows->data && m) rows->data = (void*)element(rows->data, rows->dtype, SMALL_MAX_M * rows->ld);
    const int status = small_rows(d);
    if (status) return status;
  }
  return OK;
}

void philox_words(uint64_t seed, uint64_t row, int64_t count, uint32_t projection, uint32_t* out) {
  Philox(seed, projection).row(row, 0, count, [&](int64_t k, U words) {
    memcpy(out + k, &words, (size_t)smaller(W, count - k) * sizeof(uint32_t));
  });
}

constexpr LoraLinearKernels TABLE = {down_any, up_any, grad_up_any, grad_down_any, small_any, philox_words};

}  // namespace
