// What kernels are made of on sm_80 and later: asynchronous copies to shared memory, matrix fragments, tensor-core
// products, dropout masks. With FASTPEFT_EMULATE a test supplies them on the CPU.
#pragma once
#include <stdint.h>

#include "../philox.h"
#include "../tensor.h"

#ifdef FASTPEFT_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fastpeft {

using bf16 = __nv_bfloat16;
using f16 = __half;

template <class T>
__device__ __forceinline__ float to_float(T v);
template <>
__device__ __forceinline__ float to_float(float v) {
  return v;
}
template <>
__device__ __forceinline__ float to_float(bf16 v) {
  return __bfloat162float(v);
}
template <>
__device__ __forceinline__ float to_float(f16 v) {
  return __half2float(v);
}

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float(float v) {
  return v;
}
template <>
__device__ __forceinline__ bf16 from_float(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ f16 from_float(float v) {
  return __float2half_rn(v);
}

template <class T>
__device__ __forceinline__ T* shared_memory() {  // what the launch asked for
  extern __shared__ uint4 memory[];
  return (T*)memory;
}
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t v, int lanes) {
  return __shfl_xor_sync(0xffffffffu, v, lanes);
}

// The compiler holds v in a register from here on, instead of computing it again wherever it is used. (It then no
// longer knows that a pointer is to global memory: for copy_async only.)
__device__ __forceinline__ void hold(uint32_t& v) { asm("" : "+r"(v)); }
template <class T>
__device__ __forceinline__ void hold(const T*& v) {
  asm("" : "+l"(v));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// 16 bytes to shared memory without waiting; zeros instead where !inside
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int LEFT>
__device__ __forceinline__ void wait_copies() {  // until at most LEFT groups are under way
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane 8i + j gives the address of row j of matrix i; lane l gets, of each, the
// elements 2(l % 4) and 2(l % 4) + 1 of row l / 4 (TRANSPOSED: of column l / 4).
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  if (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

// c [16, 8] += a [16, 16] · b [16, 8], by one warp
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// v as TF32, rounded to the nearest
__device__ __forceinline__ uint32_t tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}
// c [16, 8] += a [16, 8] · b [8, 8] of TF32, by one warp: lane 4g + t has the columns t and t + 4 of a's rows g and g +
// 8 (in the order of c), and those rows of b's column g
__device__ __forceinline__ void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Queues kernel(args) on `stream`; a cudaError_t.
template <class Args>
int launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared, void* stream, const Args& args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (error) return error;
  }
  void* pointers[] = {(void*)&args};
  return cudaLaunchKernel((const void*)kernel, grid, dim3(threads), pointers, shared, (cudaStream_t)stream);
}

}  // namespace fastpeft
#endif

namespace fastpeft {

__device__ __forceinline__ float shuffle_xor(float v, int lanes) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  bits = shuffle_xor(bits, lanes);
  memcpy(&v, &bits, 4);
  return v;
}

__device__ __forceinline__ float load_any(const void* p, int64_t i, int dtype) {
  return dtype == FLOAT32    ? ((const float*)p)[i]
         : dtype == BFLOAT16 ? to_float(((const bf16*)p)[i])
                             : to_float(((const f16*)p)[i]);
}

// ---- products with s, t, A and scale·B ----
//
// c [16, 8] += left [16, 16] · right [16, 8] by one warp, where x and dy are of T. With bf16 everything is. fp16's
// range does not hold the rank-R operands: there they are fp32 in memory and TF32 in the product, which has fp16's
// mantissa (10 bits: x and dy are exact in it) and fp32's range. (Scaled by a power of two they could stay fp16, at
// twice the rate, but each tile would first be read for its maximum, and the passes run at the rate of memory.)
//
// Lane 4g + t holds the rows g and g + 8 of left and the column g of right, of both k = 2t, 2t+1, 2t+8 and 2t+9.

// What the rank-R operands lie in (ranks_dtype).
template <class T>
struct RanksOf {
  using type = T;
};
template <>
struct RanksOf<f16> {
  using type = float;
};
template <class T>
using Ranks = typename RanksOf<T>::type;

template <class T>
struct Left {
  uint32_t v[4];  // pairs of T: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
};
template <class T>
struct Right {
  uint32_t v[2];  // pairs of T: 2t, 2t + 8
};
// Two products over 8 columns, which the lanes hold in another order than the product's: a sum has none.
template <>
struct Left<f16> {
  uint32_t v[2][4];  // TF32: (g, k), (g + 8, k), (g, k + 1), (g + 8, k + 1) for k = 2t and 2t + 8
};
template <>
struct Right<f16> {
  uint32_t v[4];  // TF32: 2t, 2t + 1, 2t + 8, 2t + 9
};
// fp32 as the sum of two TF32 numbers: of the four products the smallest, 2^-22 of the whole, is left out.
template <>
struct Left<float> {
  Left<f16> high, low;
};
template <>
struct Right<float> {
  Right<f16> high, low;
};

template <class T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

// of values(row, k), row 0: g, 1: g + 8; k = 0, 1, 8, 9 from 2t on
template <class T, class Values>
__device__ __forceinline__ void fill(Left<T>& left, Values values) {
#pragma unroll
  for (int i = 0; i < 4; ++i) left.v[i] = pair_of<T>(values(i % 2, i / 2 * 8), values(i % 2, i / 2 * 8 + 1));
}
template <class Values>
__device__ __forceinline__ void fill(Left<f16>& left, Values values) {
#pragma unroll
  for (int i = 0; i < 8; ++i) left.v[i / 4][i % 4] = tf32(values(i % 2, i / 4 * 8 + i % 4 / 2));
}
// of values(k)
template <class T, class Values>
__device__ __forceinline__ void fill(Right<T>& right, Values values) {
#pragma unroll
  for (int i = 0; i < 2; ++i) right.v[i] = pair_of<T>(values(i * 8), values(i * 8 + 1));
}
template <class Values>
__device__ __forceinline__ void fill(Right<f16>& right, Values values) {
#pragma unroll
  for (int i = 0; i < 4; ++i) right.v[i] = tf32(values(i / 2 * 8 + i % 2));
}

// what TF32 leaves of v
__device__ __forceinline__ float beyond_tf32(float v) {
  const uint32_t bits = tf32(v) & ~0x1fffu;
  float high;
  memcpy(&high, &bits, 4);
  return v - high;
}
template <class Values>
__device__ __forceinline__ void fill(Left<float>& left, Values values) {
  fill(left.high, values);
  fill(left.low, [&](int row, int k) { return beyond_tf32(values(row, k)); });
}
template <class Values>
__device__ __forceinline__ void fill(Right<float>& right, Values values) {
  fill(right.high, values);
  fill(right.low, [&](int k) { return beyond_tf32(values(k)); });
}

template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const Left<T>& left, const Right<T>& right) {
  multiply(c, left.v, right.v[0], right.v[1], T());
}
template <>
__device__ __forceinline__ void multiply(float (&c)[4], const Left<f16>& left, const Right<f16>& right) {
#pragma unroll
  for (int i = 0; i < 2; ++i) multiply_tf32(c, left.v[i], right.v[2 * i], right.v[2 * i + 1]);
}
template <>
__device__ __forceinline__ void multiply(float (&c)[4], const Left<float>& left, const Right<float>& right) {
  multiply(c, left.low, right.high);  // small terms first
  multiply(c, left.high, right.low);
  multiply(c, left.high, right.high);
}

// From a tile of T in shared memory whose rows are `ld` apart; TRANSPOSED: the tile is [k, 16]
template <bool TRANSPOSED, class T>
__device__ __forceinline__ void load_left(Left<T>& left, const T* tile, int ld) {
  const int lane = threadIdx.x % 32;
  load_matrices<TRANSPOSED>(left.v, TRANSPOSED ? tile + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8
                                               : tile + lane % 16 * ld + lane / 16 * 8);
}
template <bool TRANSPOSED>
__device__ __forceinline__ void load_left(Left<f16>& left, const f16* tile, int ld) {
  Left<bf16> pairs;  // two bytes each, whatever they mean
  load_left<TRANSPOSED>(pairs, (const bf16*)tile, ld);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    f16 pair[2];
    memcpy(pair, &pairs.v[i], 4);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float wide = to_float(pair[j]);  // exact in TF32
      memcpy(&left.v[i / 2][j * 2 + i % 2], &wide, 4);
    }
  }
}
template <bool TRANSPOSED>
__device__ __forceinline__ void load_left(Left<float>& left, const float* tile, int ld) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  fill(left, [&](int row, int k) {
    return TRANSPOSED ? tile[(2 * t + k) * ld + g + row * 8] : tile[(g + row * 8) * ld + 2 * t + k];
  });
}
// From rank-R operands
__device__ __forceinline__ void load_left_ranks(Left<bf16>& left, const bf16* tile, int ld) {
  load_left<false>(left, tile, ld);
}
__device__ __forceinline__ void load_left_ranks(Left<f16>& left, const float* tile, int ld) {
  const float* at = tile + threadIdx.x % 32 / 4 * ld + threadIdx.x % 4 * 2;
  fill(left, [&](int row, int k) { return at[row * 8 * ld + k]; });
}

// 16 columns: those of the first product, and of the second. The tile is [16 columns, k]; TRANSPOSED: [k, 16 columns]
template <bool TRANSPOSED>
__device__ __forceinline__ void load_right(Right<bf16> (&right)[2], const bf16* tile, int ld) {
  const int lane = threadIdx.x % 32;
  uint32_t b[4];
  load_matrices<TRANSPOSED>(b, TRANSPOSED ? tile + lane % 16 * ld + lane / 16 * 8
                                          : tile + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8);
  right[0] = {{b[0], b[1]}}, right[1] = {{b[2], b[3]}};
}
template <bool TRANSPOSED, class R>  // R: Right<f16> of rank-R operands, or Right<float>
__device__ __forceinline__ void load_right(R (&right)[2], const float* tile, int ld) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    fill(right[i],
         [&](int k) { return TRANSPOSED ? tile[(2 * t + k) * ld + g + 8 * i] : tile[(g + 8 * i) * ld + 2 * t + k]; });
}
template <bool TRANSPOSED>
__device__ __forceinline__ void load_right(Right<f16> (&right)[2], const f16* tile, int ld) {
  Right<bf16> pairs[2];  // two bytes each, whatever they mean
  load_right<TRANSPOSED>(pairs, (const bf16*)tile, ld);
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      f16 pair[2];
      memcpy(pair, &pairs[i].v[j / 2], 4);
      const float wide = to_float(pair[j % 2]);  // exact in TF32
      memcpy(&right[i].v[j], &wide, 4);
    }
}

// The four random words of columns 4·block .. 4·block+3 of a row.
__device__ __forceinline__ void random_words(uint32_t (&c)[4], uint64_t seed, uint32_t block, uint64_t row,
                                             uint32_t projection) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  c[0] = block, c[1] = (uint32_t)row, c[2] = projection, c[3] = (uint32_t)(row >> 32);
#pragma unroll
  for (int i = 0; i < philox::ROUNDS; ++i, k0 += philox::W0, k1 += philox::W1) {
    const uint64_t p0 = (uint64_t)philox::M0 * c[0], p1 = (uint64_t)philox::M1 * c[2];
    c[0] = (uint32_t)(p1 >> 32) ^ c[1] ^ k0, c[1] = (uint32_t)p1;
    c[2] = (uint32_t)(p0 >> 32) ^ c[3] ^ k1, c[3] = (uint32_t)p0;
  }
}

// Which of the lane's four elements of c [16, 8] dropout keeps, where c starts at `row` and `column`, a multiple of 4.
// A block of 4 columns belongs to two lanes: each draws it for one of their two rows, and they swap halves.
__device__ __forceinline__ void draw_kept(bool (&keep)[4], uint64_t seed, uint32_t threshold, int64_t row,
                                          int64_t column, uint32_t projection) {
  const int lane = threadIdx.x % 32, odd = lane % 2;
  uint32_t w[4];
  random_words(w, seed, (uint32_t)((column + lane % 4 / 2 * 4) / 4), (uint64_t)(row + lane / 4 + odd * 8), projection);
  const uint32_t other0 = shuffle_xor(odd ? w[0] : w[2], 1), other1 = shuffle_xor(odd ? w[1] : w[3], 1);
  keep[0] = (odd ? other0 : w[0]) >= threshold, keep[1] = (odd ? other1 : w[1]) >= threshold;
  keep[2] = (odd ? w[2] : other0) >= threshold, keep[3] = (odd ? w[3] : other1) >= threshold;
}

}  // namespace fastpeft
