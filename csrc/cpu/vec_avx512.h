// AVX-512 (F, BW, VL, DQ), with the native bf16 rounding where the compiler was given -mavx512bf16.
#pragma once
#include <immintrin.h>

#include "elements.h"

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own avx512fintrin.h (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace {

using V = __m512;
using U = __m512i;
constexpr int W = 16;
constexpr int MAX_VECS = 6;  // 32 registers: 4 rows x 6 vectors, 8 x 3, 16 x 1
constexpr int ROWS_1 = 16, ROWS_2 = 8, ROWS_3 = 8;

FP_INLINE V zero() { return _mm512_setzero_ps(); }
FP_INLINE V set1(float f) { return _mm512_set1_ps(f); }
FP_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
FP_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
FP_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
FP_INLINE float sum(V a) { return _mm512_reduce_add_ps(a); }
FP_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
FP_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
FP_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
FP_INLINE V if_zero(V x, V a, V b) {
  return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_EQ_OQ), a);
}
FP_INLINE V nearest(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
constexpr float LEAST_POWER = -160.0f;
FP_INLINE V times_power(V a, V n) { return _mm512_scalef_ps(a, n); }
FP_INLINE V exponent(V a) { return _mm512_getexp_ps(a); }
FP_INLINE V significand(V a) { return _mm512_getmant_ps(a, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src); }

FP_INLINE __mmask16 first(int n) { return (__mmask16)((1u << n) - 1); }

FP_INLINE V from_bits(__m256i u, bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(u), 16)); }
FP_INLINE V from_bits(__m256i u, f16) { return _mm512_cvtph_ps(u); }
FP_INLINE __m256i to_bits(V v, f16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FP_INLINE __m256i to_bits(V v, bf16) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  // round to nearest even: add 0x7fff and the lowest kept bit, drop the low half; NaN stays NaN
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
#endif
}

FP_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
FP_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
FP_INLINE V load_partial(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
FP_INLINE void store_partial(float* p, V v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }

template <class T>
FP_INLINE V load(const T* p) {
  return from_bits(_mm256_loadu_si256((const __m256i*)p), T());
}
template <class T>
FP_INLINE void store(T* p, V v) {
  _mm256_storeu_si256((__m256i*)p, to_bits(v, T()));
}
template <class T>
FP_INLINE V load_partial(const T* p, int n) {
  return from_bits(_mm256_maskz_loadu_epi16(first(n), p), T());
}
template <class T>
FP_INLINE void store_partial(T* p, V v, int n) {
  _mm256_mask_storeu_epi16(p, first(n), to_bits(v, T()));
}

template <class T>
FP_INLINE void store2(T* p, V v0, V v1) {
  store(p, v0);
  store(p + W, v1);
}
#ifdef __AVX512BF16__
FP_INLINE void store2(bf16* p, V v0, V v1) {  // both in one instruction: twice as fast as one by one
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(v1, v0));
}
#endif

#ifdef FASTPEFT_DOT
using Pairs = __m512i;
FP_INLINE Pairs load(const bf16x2* p) { return _mm512_loadu_si512(p); }
FP_INLINE void store(bf16x2* p, Pairs v) { _mm512_storeu_si512(p, v); }
FP_INLINE Pairs set1(bf16x2 e) { return _mm512_set1_epi32((int)e.bits); }
FP_INLINE V fma(Pairs a, Pairs b, V c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
FP_INLINE V bits(Pairs v) { return _mm512_castsi512_ps(v); }
FP_INLINE Pairs load_pairs(const bf16* p, int n) {
  if (n >= 2 * W) return _mm512_loadu_si512(p);
  return n > 0 ? _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p) : _mm512_setzero_si512();
}
// out[i] = a[i] and b[i], i < n <= 2W, up to a multiple of W
FP_INLINE void zip(bf16x2* out, Pairs a, Pairs b, int n = 2 * W) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  store(out, _mm512_permutex2var_epi16(a, first, b));
  if (n > W) store(out + W, _mm512_permutex2var_epi16(a, _mm512_add_epi16(first, _mm512_set1_epi16(W)), b));
}
// the same of W numbers, rounded
FP_INLINE void zip(bf16x2* out, V a, V b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  store(out, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a)));
}
// of W numbers that are rounded already
FP_INLINE void zip_rounded(bf16x2* out, V a, V b) {
  const Pairs high = _mm512_and_si512(_mm512_castps_si512(b), _mm512_set1_epi32((int)0xffff0000u));
  store(out, _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(a), 16), high));
}
#endif

FP_INLINE void transpose_block(V* r) {
  V t[W], u[W];
  for (int i = 0; i < W; i += 2)
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  for (int i = 0; i < W; ++i) {  // u[4g + j], quarter q: column 4q + j of rows 4g .. 4g + 3
    const __m512d lo = _mm512_castps_pd(t[i / 4 * 4 + i % 4 / 2]), hi = _mm512_castps_pd(t[i / 4 * 4 + i % 4 / 2 + 2]);
    u[i] = _mm512_castpd_ps(i % 2 ? _mm512_unpackhi_pd(lo, hi) : _mm512_unpacklo_pd(lo, hi));
  }
  for (int j = 0; j < 4; ++j) {
    const V a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
    const V c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88), d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    r[j] = _mm512_shuffle_f32x4(a, c, 0x88), r[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88), r[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

FP_INLINE U uset1(uint64_t u) { return _mm512_set1_epi64((long long)u); }
FP_INLINE U uadd(U a, U b) { return _mm512_add_epi64(a, b); }
FP_INLINE U ublocks() { return _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); }
FP_INLINE U mul32(U a, U b) { return _mm512_mul_epu32(a, b); }
FP_INLINE U shr32(U a) { return _mm512_srli_epi64(a, 32); }
FP_INLINE U dup32(U a) { return _mm512_shuffle_epi32(a, (_MM_PERM_ENUM)0xF5); }
FP_INLINE U xor2(U a, U b) { return _mm512_xor_si512(a, b); }
FP_INLINE U xor3(U a, U b, U c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

// lanes [low half of a, low half of b]
FP_INLINE U pair(U a, U b) { return _mm512_mask_shuffle_epi32(a, 0xAAAA, b, (_MM_PERM_ENUM)0xA0); }
FP_INLINE void in_order(U* words, U c0, U c1, U c2, U c3) {
  words[0] = _mm512_unpacklo_epi64(pair(c0, c1), pair(c2, c3));
  words[1] = _mm512_unpackhi_epi64(pair(c0, c1), pair(c2, c3));
}
FP_INLINE V keep(U words, uint32_t threshold, float value) {
  return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(words, _mm512_set1_epi32((int)threshold)), set1(value));
}

using Codes = __m512i;
struct Book {
  V values;
};
FP_INLINE Book load_book(const float* p) { return {load(p)}; }
FP_INLINE Codes load_codes(const void* p) { return _mm512_loadu_si512(p); }
FP_INLINE V pick(Book book, Codes codes, int shift) {  // vpermps looks at the low 4 bits of an index only
  return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, (unsigned)shift), book.values);
}
FP_INLINE V unpack(Book book, const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)p);
  return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(_mm_srli_epi16(bytes, 4), bytes)), book.values);
}
using NarrowBook = __m512i;  // of 16-bit values, twice
template <class T>
FP_INLINE NarrowBook narrow_book(Book book, float scale) {
  const __m256i values = to_bits(mul(book.values, set1(scale)), T());
  return _mm512_inserti64x4(_mm512_castsi256_si512(values), values, 1);
}
FP_INLINE void unpack(void* out, NarrowBook book, const uint8_t* p) {
  // two codes a dword; vpermw looks at the low 5 bits of each half, and the book stands there twice
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, book));
}
#ifdef FASTPEFT_DOT
FP_INLINE Pairs pick(NarrowBook book, Codes codes, int shift) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi32(codes, (unsigned)shift), book);
}
#endif
FP_INLINE V lookup(const float* table, const uint8_t* p) {
  return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)), table, 4);
}

}  // namespace
