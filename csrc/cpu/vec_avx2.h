// AVX2 with FMA and F16C.
#pragma once
#include <immintrin.h>

#include "elements.h"

namespace {

using V = __m256;
using U = __m256i;
constexpr int W = 8;
constexpr int MAX_VECS = 3;  // 16 registers: 4 rows x 3 vectors
constexpr int ROWS_1 = 8, ROWS_2 = 4, ROWS_3 = 4;

FP_INLINE V zero() { return _mm256_setzero_ps(); }
FP_INLINE V set1(float f) { return _mm256_set1_ps(f); }
FP_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
FP_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
FP_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
FP_INLINE float sum(V a) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}

FP_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
FP_INLINE V div(V a, V b) { return _mm256_div_ps(a, b); }
FP_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
FP_INLINE V if_zero(V x, V a, V b) { return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ)); }
FP_INLINE V nearest(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
constexpr float LEAST_POWER = -127.0f;
FP_INLINE V times_power(V a, V n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}
FP_INLINE V exponent(V a) {
  const __m256i biased = _mm256_srli_epi32(_mm256_castps_si256(a), 23);
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(biased, _mm256_set1_epi32(127)));
}
FP_INLINE V significand(V a) {
  const __m256i fraction = _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffff));
  return _mm256_castsi256_ps(_mm256_or_si256(fraction, _mm256_set1_epi32(0x3f800000)));
}

FP_INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

FP_INLINE V from_bits(__m128i u, bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(u), 16)); }
FP_INLINE V from_bits(__m128i u, f16) { return _mm256_cvtph_ps(u); }
FP_INLINE __m128i to_bits(V v, f16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FP_INLINE __m128i to_bits(V v, bf16) {
  // round to nearest even: add 0x7fff and the lowest kept bit, drop the low half; NaN stays NaN
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i r = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}

FP_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
FP_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
FP_INLINE V load_partial(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
FP_INLINE void store_partial(float* p, V v, int n) { _mm256_maskstore_ps(p, first(n), v); }

template <class T>
FP_INLINE V load(const T* p) {
  return from_bits(_mm_loadu_si128((const __m128i*)p), T());
}
template <class T>
FP_INLINE void store(T* p, V v) {
  _mm_storeu_si128((__m128i*)p, to_bits(v, T()));
}
template <class T>
FP_INLINE V load_partial(const T* p, int n) {
  T full[W] = {};
  for (int i = 0; i < n; ++i) full[i] = p[i];
  return load(full);
}
template <class T>
FP_INLINE void store_partial(T* p, V v, int n) {
  T full[W];
  store(full, v);
  for (int i = 0; i < n; ++i) p[i] = full[i];
}

template <class T>
FP_INLINE void store2(T* p, V v0, V v1) {
  store(p, v0);
  store(p + W, v1);
}

FP_INLINE void transpose_block(V* r) {
  V t[W], u[W];
  for (int i = 0; i < W; i += 2)
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  for (int i = 0; i < W; ++i) {  // u[4g + j], half h: column 4h + j of rows 4g .. 4g + 3
    const __m256d lo = _mm256_castps_pd(t[i / 4 * 4 + i % 4 / 2]), hi = _mm256_castps_pd(t[i / 4 * 4 + i % 4 / 2 + 2]);
    u[i] = _mm256_castpd_ps(i % 2 ? _mm256_unpackhi_pd(lo, hi) : _mm256_unpacklo_pd(lo, hi));
  }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    r[4 + j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
}

FP_INLINE U uset1(uint64_t u) { return _mm256_set1_epi64x((long long)u); }
FP_INLINE U uadd(U a, U b) { return _mm256_add_epi64(a, b); }
FP_INLINE U ublocks() { return _mm256_set_epi64x(3, 1, 2, 0); }
FP_INLINE U mul32(U a, U b) { return _mm256_mul_epu32(a, b); }
FP_INLINE U shr32(U a) { return _mm256_srli_epi64(a, 32); }
FP_INLINE U dup32(U a) { return _mm256_shuffle_epi32(a, 0xF5); }
FP_INLINE U xor2(U a, U b) { return _mm256_xor_si256(a, b); }
FP_INLINE U xor3(U a, U b, U c) { return xor2(xor2(a, b), c); }

// lanes [low half of a, low half of b]
FP_INLINE U pair(U a, U b) { return _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xAA); }
FP_INLINE void in_order(U* words, U c0, U c1, U c2, U c3) {
  words[0] = _mm256_unpacklo_epi64(pair(c0, c1), pair(c2, c3));
  words[1] = _mm256_unpackhi_epi64(pair(c0, c1), pair(c2, c3));
}
FP_INLINE V keep(U words, uint32_t threshold, float value) {  // unsigned w >= threshold: max(w, threshold) == w
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_max_epu32(words, _mm256_set1_epi32((int)threshold)), words);
  return _mm256_and_ps(_mm256_castsi256_ps(kept), set1(value));
}

using Codes = __m256i;
struct Book {
  V low, high;
};
FP_INLINE Book load_book(const float* p) { return {load(p), load(p + W)}; }
FP_INLINE Codes load_codes(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
FP_INLINE V pick(Book book, Codes index) {  // vpermps looks at 3 bits, the 4th chooses between two results
  const V low = _mm256_permutevar8x32_ps(book.low, index), high = _mm256_permutevar8x32_ps(book.high, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
FP_INLINE V pick(Book book, Codes codes, int shift) { return pick(book, _mm256_srli_epi32(codes, shift)); }
FP_INLINE V unpack(Book book, const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  const __m128i bytes = _mm_cvtsi32_si128(four);
  return pick(book, _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(_mm_srli_epi16(bytes, 4), bytes)));
}
struct NarrowBook {
  __m256i low, high;  // bytes of 16-bit values, in both halves
};
template <class T>
FP_INLINE NarrowBook narrow_book(Book book, float scale) {
  const __m128i a = to_bits(mul(book.low, set1(scale)), T()), b = to_bits(mul(book.high, set1(scale)), T());
  const __m128i byte = _mm_set1_epi16(255);
  return {_mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte))),
          _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)))};
}
FP_INLINE void unpack(void* out, NarrowBook book, const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p), code = _mm_set1_epi8(15);
  const __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), code), second = _mm_and_si128(bytes, code);
  const __m256i index = _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
  const __m256i low = _mm256_shuffle_epi8(book.low, index), high = _mm256_shuffle_epi8(book.high, index);
  const __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
  _mm256_storeu_si256((__m256i*)out, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256((__m256i*)out + 1, _mm256_permute2x128_si256(even, odd, 0x31));
}
FP_INLINE V lookup(const float* table, const uint8_t* p) {
  return _mm256_i32gather_ps(table, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), 4);
}

}  // namespace
