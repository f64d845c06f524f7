// Any machine: the compiler's own 4-lane vectors (SSE2 on x86-64, NEON on ARM), conversions element by element.
#pragma once
#include "elements.h"

namespace {

typedef float V __attribute__((vector_size(16)));
typedef uint64_t U __attribute__((vector_size(16)));
constexpr int W = 4;
constexpr int MAX_VECS = 3;
constexpr int ROWS_1 = 8, ROWS_2 = 4, ROWS_3 = 4;

FP_INLINE V set1(float f) { return V{f, f, f, f}; }
FP_INLINE V zero() { return set1(0.0f); }
FP_INLINE V add(V a, V b) { return a + b; }
FP_INLINE V mul(V a, V b) { return a * b; }
FP_INLINE V fma(V a, V b, V c) { return a * b + c; }
FP_INLINE float sum(V a) { return (a[0] + a[2]) + (a[1] + a[3]); }

FP_INLINE uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
FP_INLINE float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

FP_INLINE V sub(V a, V b) { return a - b; }
FP_INLINE V div(V a, V b) { return a / b; }
FP_INLINE V max(V a, V b) { return a > b ? a : b; }
FP_INLINE V if_zero(V x, V a, V b) { return x == zero() ? a : b; }
FP_INLINE V nearest(V a) {  // adding 1.5 * 2^23 leaves no bits for a fraction
  return (a + set1(12582912.0f)) - set1(12582912.0f);
}
constexpr float LEAST_POWER = -127.0f;
FP_INLINE V times_power(V a, V n) {
  for (int i = 0; i < W; ++i) a[i] *= float_of((uint32_t)((n[i] == n[i] ? (int32_t)n[i] : 0) + 127) << 23);
  return a;
}
FP_INLINE V exponent(V a) {
  for (int i = 0; i < W; ++i) a[i] = (float)((int32_t)(bits_of(a[i]) >> 23) - 127);
  return a;
}
FP_INLINE V significand(V a) {
  for (int i = 0; i < W; ++i) a[i] = float_of((bits_of(a[i]) & 0x7fffffu) | 0x3f800000u);
  return a;
}

FP_INLINE float to_float(bf16 e) { return float_of((uint32_t)e.bits << 16); }
FP_INLINE void from_float(bf16& e, float f) {
  // round to nearest even: add 0x7fff and the lowest kept bit, drop the low half; NaN stays NaN
  const uint32_t u = bits_of(f);
  e.bits = f != f ? (uint16_t)0x7fc0 : (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

FP_INLINE float to_float(f16 e) {
  // exponent and fraction moved into place, then rescaled by 2^112: right for subnormals too
  const uint32_t magnitude = (uint32_t)(e.bits & 0x7fff) << 13, sign = (uint32_t)(e.bits & 0x8000) << 16;
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;  // Inf, NaN
  return float_of(bits_of(float_of(magnitude) * float_of(0x77800000u)) | special | sign);
}
FP_INLINE void from_float(f16& e, float f) {
  // Adding a power of two 13 bits above the last kept bit rounds to nearest even in the adder (FP16 library, Dukhan).
  const uint32_t u = bits_of(f), twice = u + u, sign = (u >> 16) & 0x8000u;
  uint32_t exponent = twice & 0xff000000u;
  if (exponent < 0x71000000u) exponent = 0x71000000u;
  const float base = (float_of(u & 0x7fffffffu) * float_of(0x77800000u)) * float_of(0x08800000u);
  const uint32_t r = bits_of(float_of((exponent >> 1) + 0x07800000u) + base);
  const uint32_t magnitude = ((r >> 13) & 0x7c00u) + (r & 0x0fffu);
  e.bits = (uint16_t)(sign | (twice > 0xff000000u ? 0x7e00u : magnitude));
}
FP_INLINE float to_float(float e) { return e; }
FP_INLINE void from_float(float& e, float f) { e = f; }

template <class T>
FP_INLINE V load_partial(const T* p, int n) {
  V v = zero();
  for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
}
template <class T>
FP_INLINE void store_partial(T* p, V v, int n) {
  for (int i = 0; i < n; ++i) from_float(p[i], v[i]);
}
template <class T>
FP_INLINE V load(const T* p) {
  return V{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <class T>
FP_INLINE void store(T* p, V v) {
  store_partial(p, v, W);
}
FP_INLINE V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
FP_INLINE void store(float* p, V v) { memcpy(p, &v, sizeof v); }

template <class T>
FP_INLINE void store2(T* p, V v0, V v1) {
  store(p, v0);
  store(p + W, v1);
}

FP_INLINE void transpose_block(V* r) {
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < i; ++j) {
      const float above = r[j][i];
      r[j][i] = r[i][j], r[i][j] = above;
    }
}

FP_INLINE U uset1(uint64_t u) { return U{u, u}; }
FP_INLINE U uadd(U a, U b) { return a + b; }
FP_INLINE U ublocks() { return U{0, 1}; }
FP_INLINE U mul32(U a, U b) {
  return U{(uint64_t)(uint32_t)a[0] * (uint32_t)b[0], (uint64_t)(uint32_t)a[1] * (uint32_t)b[1]};
}
FP_INLINE U shr32(U a) { return a >> 32; }
FP_INLINE U dup32(U a) { return shr32(a); }
FP_INLINE U xor2(U a, U b) { return a ^ b; }
FP_INLINE U xor3(U a, U b, U c) { return a ^ b ^ c; }

FP_INLINE U pair(U a, U b) { return U{(uint32_t)a[0] | b[0] << 32, (uint32_t)a[1] | b[1] << 32}; }
FP_INLINE void in_order(U* words, U c0, U c1, U c2, U c3) {
  for (int i = 0; i < 2; ++i) words[i] = U{(uint32_t)c0[i] | c1[i] << 32, (uint32_t)c2[i] | c3[i] << 32};
}
FP_INLINE V keep(U words, uint32_t threshold, float value) {
  uint32_t w[W];
  memcpy(w, &words, sizeof w);
  V v;
  for (int i = 0; i < W; ++i) v[i] = w[i] >= threshold ? value : 0.0f;
  return v;
}

struct Codes {
  uint32_t dwords[W];
};
struct Book {
  const float* values;
};
FP_INLINE Book load_book(const float* p) { return {p}; }
FP_INLINE Codes load_codes(const void* p) {
  Codes codes;
  memcpy(&codes, p, sizeof codes);
  return codes;
}
FP_INLINE V pick(Book book, Codes codes, int shift) {
  V v;
  for (int i = 0; i < W; ++i) v[i] = book.values[codes.dwords[i] >> shift & 15];
  return v;
}
FP_INLINE V unpack(Book book, const uint8_t* p) {
  return V{book.values[p[0] >> 4], book.values[p[0] & 15], book.values[p[1] >> 4], book.values[p[1] & 15]};
}
struct NarrowBook {
  uint16_t bits[16];
};
template <class T>
FP_INLINE NarrowBook narrow_book(Book book, float scale) {
  NarrowBook narrow;
  for (int i = 0; i < 16; ++i) {
    T value;
    from_float(value, book.values[i] * scale);
    narrow.bits[i] = value.bits;
  }
  return narrow;
}
FP_INLINE void unpack(void* out, const NarrowBook& book, const uint8_t* p) {
  for (int i = 0; i < 16; ++i) {
    const uint16_t two[] = {book.bits[p[i] >> 4], book.bits[p[i] & 15]};
    memcpy((char*)out + sizeof two * i, two, sizeof two);
  }
}
FP_INLINE V lookup(const float* table, const uint8_t* p) {
  return V{table[p[0]], table[p[1]], table[p[2]], table[p[3]]};
}

}  // namespace
