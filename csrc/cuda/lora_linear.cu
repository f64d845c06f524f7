// The rank-R passes of lora_linear: what each computes stands in ../lora_linear_cuda.h.
//
// A program takes BM rows and streams 16-byte chunks into shared memory, several tiles ahead (copy_async), so that the
// passes run at the rate of memory; products are those of device.h on tensor cores, fp32 sums in registers. Operands
// whose rows do not start at multiples of 16 bytes are copied element by element. With T = fp16 the rank-R operands are
// fp32: twice the bytes, so a program takes half as many ranks at most, and needs no more shared memory than with bf16.
#include "../lora_linear_cuda.h"
#include "device.h"

namespace fastpeft {
namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int BM = 16 * WARPS;  // rows of a tile
constexpr int PAD = 8;          // elements between rows of a tile in shared memory: rows then start in different banks
template <class T>
constexpr int CHUNK = 16 / (int)sizeof(T);  // elements in 16 bytes
template <class T>
constexpr int RANKS_PAD = sizeof(Ranks<T>) == 4 ? 4 : PAD;  // the same where a lane reads down a column
template <class T>
constexpr int MAX_NR = 64 * sizeof(T) / sizeof(Ranks<T>);  // ranks of a program

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether the rows of a matrix with this many columns are whole 16-byte chunks.
template <class T>
__device__ __forceinline__ bool aligned(const Matrix& m, int64_t columns) {
  return (uintptr_t)m.data % 16 == 0 && m.ld % CHUNK<T> == 0 && columns % CHUNK<T> == 0;
}

// Whether every projection's ranks in s and t are.
template <class T>
__device__ __forceinline__ bool aligned(const Matrix& s, const Spans& spans) {
  bool all = aligned<T>(s, CHUNK<T>);
  for (int i = 0; i < spans.count; ++i) all = all && spans.rank[i] % CHUNK<T> == 0 && spans.column[i] % CHUNK<T> == 0;
  return all;
}

// to[r, c] = from[row + r, column + c], zero outside [rows, columns]; r < tile_rows, c < tile_columns
template <class T>
__device__ __forceinline__ void load_tile(bool chunked, T* to, int to_ld, const Matrix& from, int64_t row, int64_t rows,
                                          int64_t column, int64_t columns, int tile_rows, int tile_columns) {
  const int chunks = tile_columns / CHUNK<T>;
  for (int i = threadIdx.x; i < tile_rows * chunks; i += THREADS) {
    const int r = i / chunks, c = i % chunks * CHUNK<T>;
    const T* source = (const T*)from.data + (row + r) * from.ld + column + c;
    if (chunked) {
      const bool inside = row + r < rows && column + c < columns;
      copy_async(to + r * to_ld + c, inside ? source : from.data, inside);
    } else {
      for (int j = 0; j < CHUNK<T>; ++j)
        to[r * to_ld + c + j] = row + r < rows && column + c + j < columns ? source[j] : from_float<T>(0.0f);
    }
  }
}

// The projection that owns a packed rank, or -1; *column: its column of s and t.
__device__ __forceinline__ int owner(const Spans& spans, int packed, int64_t* column) {
  for (int i = 0; i < spans.count; ++i) {
    const int r = packed - spans.packed[i];
    if (r >= 0 && r < spans.rank[i]) {
      *column = spans.column[i] + r;
      return i;
    }
  }
  return -1;
}

// to[r, p] = s[row + r, column of packed rank first + p], zero where there is none; p < NR
template <int NR, class T>
__device__ __forceinline__ void load_ranks(bool chunked, T* to, int to_ld, const Matrix& s, const Spans& spans,
                                           int64_t row, int64_t rows, int first) {
  for (int i = threadIdx.x; i < BM * NR / CHUNK<T>; i += THREADS) {
    const int r = i / (NR / CHUNK<T>), p = i % (NR / CHUNK<T>)*CHUNK<T>;
    const T* source = (const T*)s.data + (row + r) * s.ld;
    int64_t column = 0;
    if (chunked) {
      const bool inside = row + r < rows && owner(spans, first + p, &column) >= 0;
      copy_async(to + r * to_ld + p, inside ? source + column : (const T*)s.data, inside);
    } else {
      for (int j = 0; j < CHUNK<T>; ++j) {
        const bool inside = row + r < rows && owner(spans, first + p + j, &column) >= 0;
        to[r * to_ld + p + j] = inside ? source[column] : from_float<T>(0.0f);
      }
    }
  }
}

// masked = kept elements of a tile [BM, COLUMNS] that starts at (row, column) of its matrix, zeros for the others
template <int COLUMNS, class T>
__device__ __forceinline__ void mask_tile(T* masked, const T* tile, int ld, const CudaDropout& dropout,
                                          uint32_t projection, int64_t row, int64_t column) {
  for (int i = threadIdx.x; i < BM * COLUMNS / 4; i += THREADS) {
    const int r = i / (COLUMNS / 4), c = i % (COLUMNS / 4) * 4;
    uint32_t words[4];
    random_words(words, (uint64_t)*dropout.seed, (uint32_t)((column + c) / 4), (uint64_t)(row + r), projection);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      masked[r * ld + c + j] = words[j] >= dropout.keep_threshold ? tile[r * ld + c + j] : from_float<T>(0.0f);
  }
}

// acc[NR / 8] [16, 8] += left [16, 16] · right [NR, 16]ᵀ for the 16-rank groups in [begin, end)
template <int NR, class T>
__device__ __forceinline__ void multiply_ranks(float (&acc)[NR / 8][4], const Left<T>& left, const Ranks<T>* right,
                                               int ld, int begin, int end) {
#pragma unroll
  for (int n = 0; n < NR / 16; ++n) {
    if (n < begin || n >= end) continue;
    Right<T> b[2];
    load_right<false>(b, right + n * 16 * ld, ld);
    multiply(acc[2 * n], left, b[0]);
    multiply(acc[2 * n + 1], left, b[1]);
  }
}

// The 16-rank groups of a program's NR ranks, from `first` on, that belong to a projection.
__device__ __forceinline__ void groups_of(const Spans& spans, int i, int first, int nr, int* begin, int* end) {
  const int from = spans.packed[i] - first, to = from + (spans.rank[i] + 15) / 16 * 16;
  *begin = (from < 0 ? 0 : from) / 16, *end = (to > nr ? nr : to) / 16;
}

// ---- down ----

constexpr int DOWN_BK = 64, DOWN_STAGES = 4, DOWN_LD = DOWN_BK + PAD;

template <class T, int NR>
constexpr size_t down_shared(bool dropout) {
  return DOWN_LD * (sizeof(T) * (DOWN_STAGES * BM + (dropout ? BM : 0)) + sizeof(Ranks<T>) * DOWN_STAGES * NR);
}

template <class T, int NR>
__global__ void __launch_bounds__(THREADS) down_kernel(LoraLinearDownCuda d) {
  using S = Ranks<T>;
  T* x_tiles = shared_memory<T>();                          // [STAGES, BM, BK]
  S* a_tiles = (S*)(x_tiles + DOWN_STAGES * BM * DOWN_LD);  // [STAGES, NR, BK]
  T* masked = (T*)(a_tiles + DOWN_STAGES * NR * DOWN_LD);   // [BM, BK]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = blockIdx.y, first = blockIdx.z * NR;
  const int64_t m0 = (int64_t)blockIdx.x * BM, steps = (ceil_div(d.K, DOWN_BK) - part + d.parts - 1) / d.parts;
  const bool chunked = aligned<T>(d.x, d.K);
  const auto k_of = [&](int64_t step) { return (part + step * d.parts) * DOWN_BK; };
  const auto load = [&](int64_t step) {
    if (step < steps) {
      const int stage = step % DOWN_STAGES;
      load_tile(chunked, x_tiles + stage * BM * DOWN_LD, DOWN_LD, d.x, m0, d.M, k_of(step), d.K, BM, DOWN_BK);
      load_tile(true, a_tiles + stage * NR * DOWN_LD, DOWN_LD, d.a, first, d.packed_ranks, k_of(step), d.a.ld, NR,
                DOWN_BK);
    }
    commit_copies();
  };
  float acc[NR / 8][4] = {};
  for (int step = 0; step < DOWN_STAGES - 1; ++step) load(step);
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<DOWN_STAGES - 2>();
    __syncthreads();
    load(step + DOWN_STAGES - 1);
    const T* x = x_tiles + step % DOWN_STAGES * BM * DOWN_LD;
    const S* a = a_tiles + step % DOWN_STAGES * NR * DOWN_LD;
    const auto product = [&](const T* rows, int begin, int end) {
#pragma unroll
      for (int k = 0; k < DOWN_BK; k += 16) {
        Left<T> left;
        load_left<false>(left, rows + warp * 16 * DOWN_LD + k, DOWN_LD);
        multiply_ranks<NR>(acc, left, a + k, DOWN_LD, begin, end);
      }
    };
    if (!d.dropout.keep_threshold) {
      product(x, 0, NR / 16);
    } else {
      for (int i = 0; i < d.spans.count; ++i) {
        int begin, end;
        groups_of(d.spans, i, first, NR, &begin, &end);
        if (begin >= end) continue;  // the same for all threads
        mask_tile<DOWN_BK>(masked, x, DOWN_LD, d.dropout, d.spans.index[i], m0, k_of(step));
        __syncthreads();
        product(masked, begin, end);
        __syncthreads();
      }
    }
  }
  const float value = d.dropout.keep_threshold ? d.dropout.value : 1.0f;
#pragma unroll
  for (int n = 0; n < NR / 8; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t m = m0 + warp * 16 + lane / 4 + j / 2 * 8;
      int64_t column;
      if (m >= d.M || owner(d.spans, first + n * 8 + lane % 4 * 2 + j % 2, &column) < 0) continue;
      const float v = acc[n][j] * value;
      if (d.parts > 1)
        ((float*)d.out)[(part * d.M + m) * d.ld_out + column] = v;
      else
        ((S*)d.out)[m * d.ld_out + column] = from_float<S>(v);
    }
}

// ---- columns ----

constexpr int COLUMNS_BC = 128, COLUMNS_STAGES = 3, COLUMNS_LD = COLUMNS_BC + PAD;

template <class T, int NR>
constexpr size_t columns_shared(bool ds, bool dropout) {
  return sizeof(T) * (COLUMNS_STAGES * BM + (dropout ? BM : 0)) * COLUMNS_LD +
         sizeof(Ranks<T>) * (COLUMNS_STAGES * BM * (NR + RANKS_PAD<T>)+(ds ? NR : 0) * COLUMNS_LD);
}

template <class T, int NR>
__global__ void __launch_bounds__(THREADS) columns_kernel(LoraLinearColumnsCuda d) {
  using S = Ranks<T>;
  constexpr int LD = COLUMNS_LD, LDS = NR + RANKS_PAD<T>, STAGES = COLUMNS_STAGES;
  T* tiles = shared_memory<T>();                // [STAGES, BM, BC]
  S* s_tiles = (S*)(tiles + STAGES * BM * LD);  // [STAGES, BM, NR]
  S* b_tile = s_tiles + STAGES * BM * LDS;      // [NR, BC]; there is this one
  T* masked = (T*)b_tile;                       // [BM, BC], or this one
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.z * NR;
  const int64_t slab = blockIdx.x, tile = blockIdx.y, c0 = tile * COLUMNS_BC, begin_m = slab * d.slab_rows;
  const int64_t end_m = d.M < begin_m + d.slab_rows ? d.M : begin_m + d.slab_rows;
  const bool chunked = aligned<T>(d.t, d.C), chunked_s = aligned<S>(d.s, d.spans);
  const int64_t steps = end_m > begin_m ? ceil_div(end_m - begin_m, BM) : 0;
  const auto load = [&](int64_t step) {
    if (step < steps) {
      const int stage = step % STAGES;
      const int64_t m = begin_m + step * BM;
      load_tile(chunked, tiles + stage * BM * LD, LD, d.t, m, end_m, c0, d.C, BM, COLUMNS_BC);
      if (d.g) load_ranks<NR>(chunked_s, s_tiles + stage * BM * LDS, LDS, d.s, d.spans, m, end_m, first);
    }
    commit_copies();
  };
  if (d.ds) load_tile(true, b_tile, LD, d.b, first, d.packed_ranks, c0, d.b.ld, NR, COLUMNS_BC);
  float g[2][NR / 8][4] = {}, total = 0.0f;  // [32 columns of the warp, NR]; the thread's column
  for (int step = 0; step < STAGES - 1; ++step) load(step);
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    load(step + STAGES - 1);
    const T* t = tiles + step % STAGES * BM * LD;
    const S* s = s_tiles + step % STAGES * BM * LDS;
    const int64_t m0 = begin_m + step * BM;
    if (d.ds) {
      float ds[NR / 8][4] = {};
#pragma unroll
      for (int c = 0; c < COLUMNS_BC; c += 16) {
        Left<T> left;
        load_left<false>(left, t + warp * 16 * LD + c, LD);
        multiply_ranks<NR>(ds, left, b_tile + c, LD, 0, NR / 16);
      }
#pragma unroll
      for (int n = 0; n < NR / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t m = m0 + warp * 16 + lane / 4 + j / 2 * 8;
          int64_t column;
          if (m < end_m && owner(d.spans, first + n * 8 + lane % 4 * 2 + j % 2, &column) >= 0)
            d.ds[(tile * d.M + m) * d.ranks + column] = ds[n][j];
        }
    }
    const auto product = [&](const T* rows, int begin, int end) {
#pragma unroll
      for (int m = 0; m < BM; m += 16) {
        Left<T> left[2];
#pragma unroll
        for (int f = 0; f < 2; ++f) load_left<true>(left[f], rows + m * LD + warp * 32 + f * 16, LD);
#pragma unroll
        for (int n = 0; n < NR / 16; ++n) {
          if (n < begin || n >= end) continue;
          Right<T> b[2];
          load_right<true>(b, s + m * LDS + n * 16, LDS);
#pragma unroll
          for (int f = 0; f < 2; ++f) {
            multiply(g[f][2 * n], left[f], b[0]);
            multiply(g[f][2 * n + 1], left[f], b[1]);
          }
        }
      }
    };
    if (d.g && !d.dropout.keep_threshold) {
      product(t, 0, NR / 16);
    } else if (d.g) {
      for (int i = 0; i < d.spans.count; ++i) {
        int begin, end;
        groups_of(d.spans, i, first, NR, &begin, &end);
        if (begin >= end) continue;
        mask_tile<COLUMNS_BC>(masked, t, LD, d.dropout, d.spans.index[i], m0, c0);
        __syncthreads();
        product(masked, begin, end);
        __syncthreads();
      }
    }
    if (d.sums)
      for (int m = 0; m < BM; ++m) total += to_float(t[m * LD + threadIdx.x]);
  }
  const float value = d.dropout.keep_threshold ? d.dropout.value : 1.0f;
  if (d.sums && blockIdx.z == 0 && c0 + threadIdx.x < d.C) d.sums[slab * d.C + c0 + threadIdx.x] = total;
  if (!d.g) return;
#pragma unroll
  for (int f = 0; f < 2; ++f)
#pragma unroll
    for (int n = 0; n < NR / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t c = c0 + warp * 32 + f * 16 + lane / 4 + j / 2 * 8;
        int64_t column;
        if (c >= d.C || owner(d.spans, first + n * 8 + lane % 4 * 2 + j % 2, &column) < 0) continue;
        d.g[d.transposed ? (slab * d.ranks + column) * d.C + c : (slab * d.C + c) * d.ranks + column] =
            g[f][n][j] * value;
      }
}

// ---- up ----

constexpr int UP_BC = 128, UP_NR = 64, UP_LDS = UP_NR + PAD, UP_LDF = UP_BC + 4;
template <class T>
constexpr int UP_LD = UP_BC + RANKS_PAD<T>;

template <class T>
constexpr size_t up_shared() {
  const size_t operands = sizeof(Ranks<T>) * (BM * UP_LDS + UP_NR * UP_LD<T>), sums = (size_t)4 * BM * UP_LDF;
  return operands > sums ? operands : sums;
}

template <class T>
__global__ void __launch_bounds__(THREADS) up_kernel(LoraLinearUpCuda d) {
  using S = Ranks<T>;
  constexpr int LD = UP_LD<T>;
  S* s = shared_memory<S>();             // [BM, NR]
  S* up = s + BM * UP_LDS;               // [NR, BC]
  float* sums = shared_memory<float>();  // [BM, BC], once the operands are used
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t m0 = (int64_t)blockIdx.x * BM, c0 = (int64_t)blockIdx.y * UP_BC;
  const bool chunked = aligned<T>(d.out, d.C), chunked_s = aligned<S>(d.s, d.spans);
  float acc[UP_BC / 8][4] = {}, term[UP_BC / 8][4] = {};
  for (int first = 0; first < d.packed_ranks; first += UP_NR) {
    load_ranks<UP_NR>(chunked_s, s, UP_LDS, d.s, d.spans, m0, d.M, first);
    load_tile(true, up, LD, d.up, first, d.packed_ranks, c0, d.up.ld, UP_NR, UP_BC);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    for (int i = 0; i < d.spans.count; ++i) {
      int begin, end;
      groups_of(d.spans, i, first, UP_NR, &begin, &end);
      for (int r = begin * 16; r < end * 16; r += 16) {
        Left<T> left;
        load_left_ranks(left, s + warp * 16 * UP_LDS + r, UP_LDS);
#pragma unroll
        for (int n = 0; n < UP_BC / 16; ++n) {
          Right<T> b[2];
          load_right<true>(b, up + r * LD + n * 16, LD);
          multiply(term[2 * n], left, b[0]);
          multiply(term[2 * n + 1], left, b[1]);
        }
      }
      if (begin >= end) continue;
      // this projection's term, or what of it lies in these ranks: dropout falls on each alike
#pragma unroll
      for (int n = 0; n < UP_BC / 8; ++n) {
        bool keep[4] = {true, true, true, true};
        if (d.dropout.keep_threshold)
          draw_kept(keep, (uint64_t)*d.dropout.seed, d.dropout.keep_threshold, m0 + warp * 16, c0 + n * 8,
                    d.spans.index[i]);
        const float value = d.dropout.keep_threshold ? d.dropout.value : 1.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[n][j] += keep[j] ? term[n][j] * value : 0.0f, term[n][j] = 0.0f;
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int n = 0; n < UP_BC / 8; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      sums[(warp * 16 + lane / 4 + j / 2 * 8) * UP_LDF + n * 8 + lane % 4 * 2 + j % 2] = acc[n][j];
  __syncthreads();
  for (int i = threadIdx.x; i < BM * UP_BC / CHUNK<T>; i += THREADS) {
    const int r = i / (UP_BC / CHUNK<T>), c = i % (UP_BC / CHUNK<T>)*CHUNK<T>;
    if (m0 + r >= d.M) continue;
    T* out = (T*)d.out.data + (m0 + r) * d.out.ld + c0 + c;
    alignas(16) T values[CHUNK<T>];
    const int n = d.C - c0 - c < CHUNK<T> ? (int)(d.C - c0 - c) : CHUNK<T>;
    if (chunked && n == CHUNK<T>)
      *(uint4*)values = *(const uint4*)out;
    else
      for (int j = 0; j < n; ++j) values[j] = out[j];
    for (int j = 0; j < n; ++j) {
      float v = to_float(values[j]) + sums[r * UP_LDF + c + j];
      if (d.bias.data) v += load_any(d.bias.data, c0 + c + j, d.bias.dtype);
      values[j] = from_float<T>(v);
    }
    if (chunked && n == CHUNK<T>)
      *(uint4*)out = *(const uint4*)values;
    else
      for (int j = 0; j < n; ++j) out[j] = values[j];
  }
}

// ---- pack, sum ----

__device__ __forceinline__ void store_any(void* p, int64_t i, int dtype, float v) {
  if (dtype == FLOAT32) ((float*)p)[i] = v;
  if (dtype == BFLOAT16) ((bf16*)p)[i] = from_float<bf16>(v);
  if (dtype == FLOAT16) ((f16*)p)[i] = from_float<f16>(v);
}

__global__ void pack_kernel(LoraLinearPack d) {
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < d.out_rows * d.out.ld;
       i += (int64_t)gridDim.x * THREADS) {
    const int64_t row = i / d.out.ld, column = i % d.out.ld;
    float v = 0.0f;
    if (row < d.rows && column < d.columns) {
      v = load_any(d.in, row * d.stride_i + column * d.stride_j, d.in_dtype);
      if (d.scale) v *= d.scale[row * d.stride_scale];
    }
    store_any(d.out.data, i, d.out.dtype, v);
  }
}

__global__ void sum_kernel(LoraLinearSum d) {
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < d.rows * d.columns;
       i += (int64_t)gridDim.x * THREADS) {
    float total = 0.0f;
    for (int64_t part = 0; part < d.count; ++part) total += d.parts[part * d.stride_part + i];
    const int64_t row = i / d.columns, column = i % d.columns;
    if (d.scale) total *= d.scale[column * d.stride_scale];
    store_any(d.out.data, row * d.out.ld + column, d.out.dtype, total);
  }
}

dim3 grid_of(int64_t x, int64_t y, int64_t z) { return dim3((unsigned)x, (unsigned)y, (unsigned)z); }

template <class T, int NR>
int down_at(const LoraLinearDownCuda& d, void* stream) {
  const dim3 grid = grid_of(ceil_div(d.M, BM), d.parts, ceil_div(d.packed_ranks, NR));
  return launch(down_kernel<T, NR>, grid, THREADS, down_shared<T, NR>(d.dropout.keep_threshold != 0), stream, d);
}

template <class T, int NR>
int columns_at(const LoraLinearColumnsCuda& d, void* stream) {
  const dim3 grid = grid_of(d.slabs, ceil_div(d.C, COLUMNS_BC), ceil_div(d.packed_ranks, NR));
  return launch(columns_kernel<T, NR>, grid, THREADS,
                columns_shared<T, NR>(d.ds != nullptr, d.dropout.keep_threshold != 0), stream, d);
}

template <class T>
int up_at(const LoraLinearUpCuda& d, void* stream) {
  const dim3 grid = grid_of(ceil_div(d.M, BM), ceil_div(d.C, UP_BC), 1);
  return launch(up_kernel<T>, grid, THREADS, up_shared<T>(), stream, d);
}

unsigned blocks_for(int64_t elements) {
  const int64_t wanted = ceil_div(elements, THREADS);
  return (unsigned)(wanted < 4096 ? wanted : 4096);
}

}  // namespace

#define FASTPEFT_BY_DTYPE(dtype, bf16_call, f16_call) \
  if ((dtype) == BFLOAT16) return bf16_call;          \
  if ((dtype) == FLOAT16) return f16_call;            \
  return BAD_DTYPE

int lora_linear_pack(const LoraLinearPack& d, void* stream) {
  return launch(pack_kernel, dim3(blocks_for(d.out_rows * d.out.ld)), THREADS, 0, stream, d);
}

int lora_linear_sum(const LoraLinearSum& d, void* stream) {
  return launch(sum_kernel, dim3(blocks_for(d.rows * d.columns)), THREADS, 0, stream, d);
}

template <class T>
static int down_by_ranks(const LoraLinearDownCuda& d, void* stream) {
  return d.packed_ranks <= 16   ? down_at<T, 16>(d, stream)
         : d.packed_ranks <= 32 ? down_at<T, 32>(d, stream)
                                : down_at<T, MAX_NR<T>>(d, stream);
}

template <class T>
static int columns_by_ranks(const LoraLinearColumnsCuda& d, void* stream) {
  return d.packed_ranks <= 16   ? columns_at<T, 16>(d, stream)
         : d.packed_ranks <= 32 ? columns_at<T, 32>(d, stream)
                                : columns_at<T, MAX_NR<T>>(d, stream);
}

int lora_linear_down(const LoraLinearDownCuda& d, void* stream) {
  FASTPEFT_BY_DTYPE(d.x.dtype, down_by_ranks<bf16>(d, stream), down_by_ranks<f16>(d, stream));
}

int lora_linear_columns(const LoraLinearColumnsCuda& d, void* stream) {
  FASTPEFT_BY_DTYPE(d.t.dtype, columns_by_ranks<bf16>(d, stream), columns_by_ranks<f16>(d, stream));
}

int lora_linear_up(const LoraLinearUpCuda& d, void* stream) {
  FASTPEFT_BY_DTYPE(d.out.dtype, up_at<bf16>(d, stream), up_at<f16>(d, stream));
}

}  // namespace fastpeft
