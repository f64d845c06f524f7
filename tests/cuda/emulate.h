// CUDA on the CPU, so that csrc/cuda runs where there is no GPU: what device.h takes from CUDA, one fiber a thread.
//
// Strict where a GPU is forgiving: shared memory starts as NaN, and an asynchronous copy leaves NaN until it was waited
// for. Blocks run one after another. Not emulated: time, caches, the order of threads between barriers.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint4 {
  uint32_t x, y, z, w;
};

namespace emulated {

struct Copy {
  void* to;
  const void* from;
  bool inside;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  bool done = false;
  int waits_for = 0;  // 0: runnable, 1: its warp, 2: the block
  std::vector<std::vector<Copy>> groups{1};
  // what a lane shows the others of its warp
  const void* address;
  uint32_t operands[6];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<char> shared;
  ucontext_t scheduler;
  dim3 index, grid;
  int running = 0;
  std::function<void()> body;
};

inline Block* block = nullptr;
inline Fiber& me() { return block->fibers[block->running]; }
inline Fiber& lane(int i) { return block->fibers[block->running / 32 * 32 + i]; }
inline int lane_id() { return block->running % 32; }

inline void wait(int for_whom) {
  me().waits_for = for_whom;
  swapcontext(&me().context, &block->scheduler);
}

inline void enter() {
  block->body();
  me().done = true;
  swapcontext(&me().context, &block->scheduler);
}

inline bool release(int begin, int end, int level) {  // those that wait, once nobody among them still runs
  bool any = false;
  for (int i = begin; i < end; ++i) {
    const Fiber& f = block->fibers[i];
    if (!f.done && f.waits_for != level) return false;
    any |= !f.done;
  }
  for (int i = begin; i < end; ++i) block->fibers[i].waits_for = 0;
  return any;
}

// Runs every block of the grid; false on a deadlock (threads that wait for each other at different barriers).
inline bool run(dim3 grid, int threads, size_t shared, std::function<void()> body) {
  Block b;
  block = &b;
  b.grid = grid, b.body = std::move(body);
  bool fine = true;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x && fine; ++x) {
        b.index = dim3(x, y, z);
        b.shared.assign(shared + 64, (char)0xff);
        b.fibers = std::vector<Fiber>(threads);
        for (int i = 0; i < threads; ++i) {
          Fiber& f = b.fibers[i];
          f.thread = dim3(i, 0, 0);
          f.stack.reset(new char[1 << 16]);
          getcontext(&f.context);
          f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = 1 << 16, f.context.uc_link = nullptr;
          makecontext(&f.context, enter, 0);
        }
        for (bool alive = true; alive && fine;) {
          bool moved = false;
          alive = false;
          for (int i = 0; i < threads; ++i) {
            Fiber& f = b.fibers[i];
            if (f.done || f.waits_for) continue;
            b.running = i, moved = true;
            swapcontext(&b.scheduler, &f.context);
          }
          for (int w = 0; w < threads; w += 32) moved |= release(w, w + 32, 1);
          moved |= release(0, threads, 2);
          for (const Fiber& f : b.fibers) alive |= !f.done;
          fine = moved || !alive;
        }
      }
  block = nullptr;
  return fine;
}

}  // namespace emulated

#define threadIdx emulated::me().thread
#define blockIdx emulated::block->index
#define gridDim emulated::block->grid

inline void __syncthreads() { emulated::wait(2); }
inline void __syncwarp() { emulated::wait(1); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

namespace fastpeft {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
float to_float(T v);
template <>
inline float to_float(float v) {
  return v;
}
template <>
inline float to_float(bf16 v) {
  const uint32_t wide = (uint32_t)v.bits << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
}
template <>
inline float to_float(f16 v) {
  _Float16 h;
  memcpy(&h, &v, 2);
  return (float)h;
}

template <class T>
T from_float(float v);
template <>
inline float from_float(float v) {
  return v;
}
template <>
inline bf16 from_float(float v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  if (v != v) return {0x7fff};
  return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float(float v) {
  const _Float16 h = (_Float16)v;
  f16 r;
  memcpy(&r, &h, 2);
  return r;
}

template <class T>
T* shared_memory() {
  const uintptr_t at = ((uintptr_t)emulated::block->shared.data() + 63) / 64 * 64;
  return (T*)at;
}

template <class T>
void hold(T&) {}

inline uint32_t shuffle_xor(uint32_t v, int lanes) {
  emulated::me().operands[0] = v;
  emulated::wait(1);
  const uint32_t other = emulated::lane(emulated::lane_id() ^ lanes).operands[0];
  emulated::wait(1);
  return other;
}

inline void copy_async(void* to, const void* from, bool inside) {
  memset(to, 0xff, 16);
  emulated::me().groups.back().push_back({to, from, inside});
}
inline void commit_copies() { emulated::me().groups.emplace_back(); }
template <int LEFT>
void wait_copies() {
  auto& groups = emulated::me().groups;
  while ((int)groups.size() - 1 > LEFT) {
    for (const emulated::Copy& c : groups.front()) {
      if (c.inside)
        memcpy(c.to, c.from, 16);
      else
        memset(c.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

template <bool TRANSPOSED>
void load_matrices(uint32_t (&r)[4], const void* row) {
  emulated::me().address = row;
  emulated::wait(1);
  const int l = emulated::lane_id();
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const int at_row = TRANSPOSED ? l % 4 * 2 + j : l / 4, at_column = TRANSPOSED ? l / 4 : l % 4 * 2 + j;
      pair[j] = ((const uint16_t*)emulated::lane(8 * i + at_row).address)[at_column];
    }
    memcpy(&r[i], pair, 4);
  }
  emulated::wait(1);
}

template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  emulated::Fiber& f = emulated::me();
  for (int i = 0; i < 4; ++i) f.operands[i] = a[i];
  f.operands[4] = b0, f.operands[5] = b1;
  emulated::wait(1);
  const int l = emulated::lane_id();
  const auto element = [](int lane, int word, int half) {
    T v;
    memcpy(&v, (const char*)&emulated::lane(lane).operands[word] + 2 * half, 2);
    return to_float(v);
  };
  for (int j = 0; j < 4; ++j) {
    const int m = l / 4 + j / 2 * 8, n = l % 4 * 2 + j % 2;
    float sum = c[j];
    for (int k = 0; k < 16; ++k)
      sum += element(m % 8 * 4 + k % 8 / 2, m / 8 + k / 8 * 2, k % 2) * element(n * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    c[j] = sum;
  }
  emulated::wait(1);
}

inline uint32_t tf32(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return v != v ? 0x7fffffffu : (bits + 0x1000) & ~0x1fffu;
}
inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::Fiber& f = emulated::me();
  for (int i = 0; i < 4; ++i) f.operands[i] = a[i];
  f.operands[4] = b0, f.operands[5] = b1;
  emulated::wait(1);
  const int l = emulated::lane_id();
  const auto element = [](int lane, int word) {  // the product does not see the low bits
    const uint32_t bits = emulated::lane(lane).operands[word] & ~0x1fffu;
    float v;
    memcpy(&v, &bits, 4);
    return v;
  };
  for (int j = 0; j < 4; ++j) {
    const int m = l / 4 + j / 2 * 8, n = l % 4 * 2 + j % 2;
    float sum = c[j];
    for (int k = 0; k < 8; ++k)
      sum += element(m % 8 * 4 + k % 4, m / 8 + k / 4 * 2) * element(n * 4 + k % 4, 4 + k / 4);
    c[j] = sum;
  }
  emulated::wait(1);
}

template <class Args>
int launch(void (*kernel)(Args), dim3 grid, int threads, size_t shared, void*, const Args& args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
  if (shared > 227 << 10) return 1;
  return emulated::run(grid, threads, shared, [&] { kernel(args); }) ? 0 : 2;
}

}  // namespace fastpeft
