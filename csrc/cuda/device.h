// What kernels are made of on sm_80 and later: asynchronous copies to shared memory, matrix fragments, tensor-core
// products, dropout masks. With FASTPEFT_EMULATE a test supplies them on the CPU.
#pragma once
#include <stdint.h>

#include "../philox.h"

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

}  // namespace fastpeft
