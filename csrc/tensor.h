// How the C interfaces of all ops speak of tensors.
#pragma once
#include <stdint.h>

namespace fastpeft {

enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
// The dtype of lora_linear's s = drop(x) Aᵀ and t = dy (scale·B) where x has `dtype`.
inline int ranks_dtype(int dtype) { return dtype == FLOAT16 ? FLOAT32 : dtype; }

enum Status : int { OK = 0, OUT_OF_MEMORY = 1, BAD_DTYPE = 2 };

struct Matrix {
  void* data;  // null: absent
  int64_t ld;  // elements from one row to the next
  int dtype;
};

inline int64_t size_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

// its columns from `first` on
inline Matrix columns(const Matrix& m, int64_t first) {
  return {m.data ? (char*)m.data + first * size_of(m.dtype) : nullptr, m.ld, m.dtype};
}

struct Vector {
  const void* data;  // null: absent
  int dtype;
};

struct Scale {
  const float* data;
  int64_t stride;  // 1: one value a rank; 0: one value for all
};

inline Scale columns(const Scale& s, int64_t first) { return {s.data ? s.data + first * s.stride : nullptr, s.stride}; }

// How a call runs: on so many threads, but on one below so many multiply-adds, where waking the others costs more than
// the work; and whether bf16 takes the dot product of pairs, at the instruction set that has one.
struct Way {
  int threads;
  double parallel_work;
  bool dot;

  int team(double work) const { return threads > 1 && work > parallel_work ? threads : 1; }
};

struct Dropout {
  uint64_t keep_threshold;  // ceil(p · 2³²); 0: no dropout
  double p;
  uint64_t seed;
};

}  // namespace fastpeft
