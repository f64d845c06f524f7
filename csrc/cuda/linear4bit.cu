// 4-bit weights on the GPU: what each kernel computes stands in ../linear4bit_cuda.h.
#include "../linear4bit_cuda.h"
#include "device.h"
#include "dynamic_map.h"

namespace fastpeft {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A kernel's arguments, and the code book as it wants it.
template <class Problem>
struct WithBook {
  Problem d;
  float book[16];
  float unscale;  // the scales' factor that undoes the book's
};

// A scale as it is stored, and what it means: apart, so that the loads can be under way long before.
struct StoredScale {
  float value;    // fp32, or of 256 codes
  uint32_t code;  // of double quantisation
};

struct Scales {
  const float* values;
  const uint8_t* codes;  // null: the values are the scales
  int shift;             // codes that share a value
  float offset;

  __device__ __forceinline__ explicit Scales(const Weight4bitCuda& w)
      : values(w.nested_absmax ? w.nested_absmax : (const float*)w.scales),
        codes(w.nested_absmax ? (const uint8_t*)w.scales : nullptr),
        shift(w.nested_absmax ? 8 : 0),
        offset(w.nested_absmax ? *w.offset : 0.0f) {}

  template <class Int>
  __device__ __forceinline__ StoredScale load(Int block) const {
    return {values[block >> shift], codes ? codes[block] : 0u};
  }
  __device__ __forceinline__ float decode(const StoredScale& s, const float* map) const {
    return codes ? __fadd_rn(__fmul_rn(map[s.code], s.value), offset) : s.value;
  }
};

// ---- dequantize ----

// out[i] = T(book[code i] · scale[i / blocksize]), i over the flattened weight
//
// 8 weights of a thread are 4 bytes in and, in bf16, 16 bytes out, both coalesced; loads of 16 bytes would scatter the
// stores, which are four fifths of the bytes. UNROLL words keep 16 bytes of codes a thread under way.
constexpr int UNROLL = 4;

template <class T>
__global__ void __launch_bounds__(THREADS) dequantize_kernel(WithBook<Linear4bitDequantizeCuda> args) {
  float* book = shared_memory<float>();  // [16]: 16 banks, so no lookup waits for another
  const Weight4bitCuda& w = args.d.w;
  if (threadIdx.x < 16) book[threadIdx.x] = args.book[threadIdx.x];
  __syncthreads();
  const int64_t count = w.N * w.K, first = (int64_t)blockIdx.x * THREADS * UNROLL + threadIdx.x;
  const Scales scales(w);
  T* out = (T*)args.d.out;
  const bool aligned = (uintptr_t)w.data % 4 == 0 && (uintptr_t)out % 16 == 0;
  uint32_t words[UNROLL];
  StoredScale stored[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int64_t i = (first + u * THREADS) * 8;
    if (i >= count) continue;
    stored[u] = scales.load(i >> w.log_blocksize);  // 8 weights share a block: they start at a multiple of 8
    if (aligned && i + 8 <= count) {
      words[u] = *(const uint32_t*)(w.data + i / 2);
    } else {
      words[u] = 0;
      for (int j = 0; j < 4; ++j)
        if (i + 2 * j < count) words[u] |= (uint32_t)w.data[i / 2 + j] << 8 * j;
    }
  }
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int64_t i = (first + u * THREADS) * 8;
    if (i >= count) continue;
    const float scale = scales.decode(stored[u], DYNAMIC_MAP);
    alignas(16) T values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = from_float<T>(__fmul_rn(book[words[u] >> (j ^ 1) * 4 & 15], scale));
    if (aligned && i + 8 <= count) {
#pragma unroll
      for (int j = 0; j < (int)sizeof(values) / 16; ++j) ((uint4*)(out + i))[j] = ((const uint4*)values)[j];
    } else {
      for (int j = 0; j < 8; ++j)
        if (i + j < count) out[i + j] = values[j];
    }
  }
}

// ---- small ----

// y[m, n] = Σ_k x[m, k] w[n, k] + …, M <= 4·QUADS, by blocks of 16·TILES columns n, whose warps share out k.
//
// A byte of codes is looked up as a pair of T: that is half a register of a tensor-core operand, so weights are neither
// unpacked nor multiplied one by one. The table of 256 pairs lies 32 times in shared memory, once in each bank: a lane
// reads from its own, without conflicts.
//
// Lane l = 4g + t owns, in a step of 128 k, the 32 weights [32t, 32t + 32) of the rows g and g + 8 of a tile: 16-byte
// loads. A tensor-core product sums over the lanes t, but with blocks of 64 the lanes t < 2 have another scale than the
// rest. So the 8 columns of the other operand are 4 rows m for the lanes t < 2 (zero for the rest), and the same 4 rows
// for t >= 2. Lane l gets the sums of the columns 2t and 2t + 1, which belong to the half that it owns weights of: its
// own two scales are the ones that it needs. The halves meet at the end.
//
// Instructions a weight: a shift, an and-or and a lookup a byte (1.5); products QUADS/8; sums times scale QUADS/16; the
// rest is addresses and loads. In the disassembled loop for sm_90a: 3.4 for QUADS = 1, 4.4 for QUADS = 4. An H100
// issues 4.9 in the time that 3 TB/s take for a weight.
//
// The book is rounded to T. Rounded as it stands in bf16, NF4's values are off by 0.05 % of a typical weight on
// average, which adds up where x has a mean; times 1.287098 by 0.002 %. See `book_of`.
constexpr int STEP = 128;                          // k of a step
constexpr int LOG_UNIT = 6, UNIT = 1 << LOG_UNIT;  // weights that surely share a scale; what 32 bits count
constexpr int PAIRS = 256, BANKS = 32;             // of the table
constexpr int TABLE_BYTES = PAIRS * BANKS * 4, MAP_BYTES = 256 * 4;

template <int QUADS, int STAGES>
constexpr size_t small_shared() {
  return TABLE_BYTES + MAP_BYTES + (size_t)WARPS * STAGES * 4 * QUADS * STEP * 2;
}

static_assert(small_shared<1, 4>() <= 99 << 10 && small_shared<4, 2>() <= 99 << 10, "what sm_86 and sm_89 have");

__device__ __forceinline__ float add_lane(float v, int lanes) {  // v + that of the lane `lanes` away
  return v + shuffle_xor(v, lanes);
}

// scale[r] · b[n, r], rounded to what s lies in; 0 outside
template <class T>
__device__ __forceinline__ float scaled_b(const Linear4bitSmallCuda& d, int64_t n, int64_t r) {
  if (n >= d.w.N || r >= d.R) return 0.0f;
  const float v = load_any(d.b, n * d.stride_bn + r * d.stride_br, d.b_dtype) * d.scale.data[r * d.scale.stride];
  return to_float(from_float<Ranks<T>>(v));
}

template <class T>
__device__ __forceinline__ void store_y(const Linear4bitSmallCuda& d, int64_t m, int64_t n, float v) {
  if (d.bias.data) v += load_any(d.bias.data, n, d.bias.dtype);
  if (d.lora_bias.data) v += load_any(d.lora_bias.data, n, d.lora_bias.dtype);
  ((T*)d.y.data)[m * d.y.ld + n] = from_float<T>(v);
}

template <class T, int QUADS, int TILES, int STAGES>
__global__ void __launch_bounds__(THREADS) small_kernel(WithBook<Linear4bitSmallCuda> args) {
  constexpr int ROWS = 16 * TILES, MS = 4 * QUADS, CHUNKS = STEP / 8;
  const Linear4bitSmallCuda& d = args.d;
  const Weight4bitCuda& w = d.w;
  uint4* memory = shared_memory<uint4>();
  const char* table = (const char*)memory;           // [PAIRS, BANKS] pairs of T
  float* map = (float*)(memory + TABLE_BYTES / 16);  // [256]
  uint4* x_tiles = (uint4*)(map + 256);              // [WARPS, STAGES, MS, CHUNKS] of 8 elements
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t n0 = (int64_t)blockIdx.x * ROWS;
  const int M = (int)d.M, steps = (int)ceil_div(w.K, STEP), units = (int)(w.K / UNIT);
  const bool owns_x = g / 4 == t / 2;
  const Scales scales(w);
  uint4* x_mine = x_tiles + warp * STAGES * MS * CHUNKS;
  uint32_t bank = lane * 4;
  hold(bank);

  // Two rows of x at a time, a chunk a lane. Chunks change places by row, so that 8 lanes read from 8 groups of banks.
  const int chunk = lane % CHUNKS, second = lane / CHUNKS;
  uint32_t x_even = second * CHUNKS + (chunk ^ second), x_odd = x_even ^ 2;
  const T* from = (const T*)d.x.data + second * d.x.ld + chunk * 8;
  const uint4* data = (const uint4*)w.data + t % 2;
  hold(x_even), hold(x_odd), hold(from);
  const int last = (int)ceil_div(w.K - chunk * 8, STEP);  // the first step in which the chunk lies past the end: zeros
  const int log_block = w.log_blocksize - LOG_UNIT;

  uint32_t rows[TILES][2];  // the first unit of each row; rows past the last are the last
#pragma unroll
  for (int i = 0; i < TILES * 2; ++i) {
    const int64_t n = n0 + i / 2 * 16 + i % 2 * 8 + g;
    rows[i / 2][i % 2] = (uint32_t)(n < w.N ? n : w.N - 1) * units;
    hold(rows[i / 2][i % 2]);
  }
  uint4 codes[STAGES][TILES][2];
  StoredScale stored[STAGES][TILES][2];
  const auto load = [&](uint4(&codes)[TILES][2], StoredScale(&stored)[TILES][2], uint4* x, int step) {
    if (step < steps) {
      int unit = step * (STEP / UNIT) + t / 2;  // past the last: the last once more, times x = 0
      unit = unit < units ? unit : units - 1;
#pragma unroll
      for (int i = 0; i < TILES * 2; ++i) {
        const uint32_t at = rows[i / 2][i % 2] + unit;
        codes[i / 2][i % 2] = data[(int64_t)at * 2];
        stored[i / 2][i % 2] = scales.load(at >> log_block);
      }
#pragma unroll
      for (int i = 0; i < MS / 2; ++i) {
        const int m = 2 * i + second;
        if (m < M)
          copy_async(x + 2 * i * CHUNKS + (i % 2 ? x_odd : x_even), from + 2 * i * d.x.ld + step * STEP, step < last);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int s = 0; s < STAGES; ++s) load(codes[s], stored[s], x_mine + s * MS * CHUNKS, warp + s * WARPS);

  {  // a thread fills the row of one byte, starting at its own column: 8 threads write to 8 groups of banks
    const uint32_t pair = pair_of<T>(args.book[threadIdx.x / 16], args.book[threadIdx.x % 16]);
    for (int i = 0; i < BANKS / 4; ++i)
      memory[threadIdx.x * (BANKS / 4) + (threadIdx.x + i) % (BANKS / 4)] = uint4{pair, pair, pair, pair};
    map[threadIdx.x] = DYNAMIC_MAP[threadIdx.x];
  }

  float total[TILES][QUADS][4] = {};
  for (int64_t r0 = warp * 16; r0 < d.R; r0 += WARPS * 16) {  // s (scale·b)ᵀ, with the columns of the first half
    Right<T> right[QUADS];
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
      const int64_t m = q * 4 + g;
      const Ranks<T>* s = (const Ranks<T>*)d.s.data + m * d.s.ld;
      const bool inside = g < 4 && m < d.M;
      fill(right[q], [&](int k) {
        const int64_t r = r0 + 2 * t + k;
        return inside && r < d.R ? to_float(s[r]) : 0.0f;
      });
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      Left<T> left;
      fill(left, [&](int row, int k) { return scaled_b<T>(d, n0 + tile * 16 + row * 8 + g, r0 + 2 * t + k); });
#pragma unroll
      for (int q = 0; q < QUADS; ++q) multiply(total[tile][q], left, right[q]);
    }
  }
  __syncthreads();

  const auto compute = [&](const uint4(&codes)[TILES][2], const StoredScale(&stored)[TILES][2], const uint4* x) {
    const auto pair = [&](uint32_t word, int byte) {
      const uint32_t at = byte == 0 ? word << 7 : word >> (8 * byte - 7);
      return *(const uint32_t*)(table + ((at & (PAIRS - 1) << 7) | bank));
    };
    float sum[TILES][QUADS][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint4 right[QUADS];  // x[m, 32t + 8i ..], two products' worth
#pragma unroll
      for (int q = 0; q < QUADS; ++q)
        right[q] = owns_x ? x[(q * 4 + g % 4) * CHUNKS + ((4 * t + i) ^ g % 4)] : uint4{0, 0, 0, 0};
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        const uint32_t upper = ((const uint32_t*)&codes[tile][0])[i], lower = ((const uint32_t*)&codes[tile][1])[i];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t left[4] = {pair(upper, 2 * half), pair(lower, 2 * half), pair(upper, 2 * half + 1),
                                    pair(lower, 2 * half + 1)};
#pragma unroll
          for (int q = 0; q < QUADS; ++q)
            multiply(sum[tile][q], left, half ? right[q].z : right[q].x, half ? right[q].w : right[q].y, T());
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float scale = scales.decode(stored[tile][row], map) * args.unscale;
#pragma unroll
        for (int q = 0; q < QUADS; ++q)
#pragma unroll
          for (int i = 0; i < 2; ++i) total[tile][q][2 * row + i] += scale * sum[tile][q][2 * row + i];
      }
  };
  for (int step = warp; step < steps; step += STAGES * WARPS) {
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
      uint4* x = x_mine + s * MS * CHUNKS;
      wait_copies<STAGES - 1>();
      __syncwarp();
      if (step + s * WARPS < steps) compute(codes[s], stored[s], x);
      __syncwarp();
      load(codes[s], stored[s], x, step + (s + STAGES) * WARPS);
    }
  }
  wait_copies<0>();
  __syncthreads();

  float* sums = (float*)x_tiles;  // [WARPS, MS, ROWS]
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int q = 0; q < QUADS; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float v = add_lane(total[tile][q][i], 2);
        if (t < 2) sums[(warp * MS + q * 4 + 2 * t + i % 2) * ROWS + tile * 16 + i / 2 * 8 + g] = v;
      }
  __syncthreads();
  for (int i = threadIdx.x; i < d.M * ROWS; i += THREADS) {
    const int64_t m = i / ROWS, n = n0 + i % ROWS;
    float v = 0.0f;
    for (int from = 0; from < WARPS; ++from) v += sums[from * MS * ROWS + i];
    if (n < w.N) store_y<T>(d, m, n, v);
  }
}

// The same for any shape, one warp a column n, one weight after the other.
template <class T>
__global__ void __launch_bounds__(THREADS) small_any_kernel(WithBook<Linear4bitSmallCuda> args) {
  float* book = shared_memory<float>();  // [16]
  const Linear4bitSmallCuda& d = args.d;
  const Weight4bitCuda& w = d.w;
  if (threadIdx.x < 16) book[threadIdx.x] = args.book[threadIdx.x];
  __syncthreads();
  const int64_t n = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (n >= w.N) return;  // whole warps
  const Scales scales(w);
  float acc[LINEAR4BIT_SMALL_M] = {};
  for (int64_t k = lane; k < w.K; k += 32) {
    const int64_t i = n * w.K + k;
    const float scale = scales.decode(scales.load(i >> w.log_blocksize), DYNAMIC_MAP);
    const float value = book[w.data[i / 2] >> (i % 2 ? 0 : 4) & 15] * scale;
#pragma unroll
    for (int m = 0; m < LINEAR4BIT_SMALL_M; ++m)
      if (m < d.M) acc[m] += to_float(((const T*)d.x.data)[m * d.x.ld + k]) * value;
  }
  for (int64_t r = lane; r < d.R; r += 32) {
    const float value = scaled_b<T>(d, n, r);
#pragma unroll
    for (int m = 0; m < LINEAR4BIT_SMALL_M; ++m)
      if (m < d.M) acc[m] += to_float(((const Ranks<T>*)d.s.data)[m * d.s.ld + r]) * value;
  }
#pragma unroll
  for (int m = 0; m < LINEAR4BIT_SMALL_M; ++m) {
    if (m >= d.M) continue;
    for (int lanes = 16; lanes; lanes /= 2) acc[m] = add_lane(acc[m], lanes);
    if (lane == 0) store_y<T>(d, m, n, acc[m]);
  }
}

constexpr float NF4_BOOK[16] = {-1.0f,
                                -0.6961928009986877f,
                                -0.5250730514526367f,
                                -0.39491748809814453f,
                                -0.28444138169288635f,
                                -0.18477343022823334f,
                                -0.09105003625154495f,
                                0.0f,
                                0.07958029955625534f,
                                0.16093020141124725f,
                                0.24611230194568634f,
                                0.33791524171829224f,
                                0.44070982933044434f,
                                0.5626170039176941f,
                                0.7229568362236023f,
                                1.0f};
constexpr float FP4_HALF[8] = {0.0f, 0.0625f, 8.0f, 12.0f, 4.0f, 6.0f, 2.0f, 3.0f};  // of 12

// factor · book, with the factor undone by the scales. 12: FP4 is exact in T. For NF4, of the factors in [1, 2) those
// whose rounded values have the smallest error and mean error over the codes of Gaussian weights in blocks of 64 to
// 4096 and of uniform ones: in bf16 rms 1.5e-3 and mean 2e-5 of the weights' rms (by 1: 1.6e-3, 47e-5), in fp16 1.2e-4
// and 4e-6 (by 1: 2.0e-4, 59e-6).
template <class Problem>
WithBook<Problem> book_of(const Problem& d, int rounded_to) {
  const bool nf4 = d.w.quant_type == NF4;
  const float factor = rounded_to == FLOAT32 ? 1.0f : !nf4 ? 12.0f : rounded_to == BFLOAT16 ? 1.287098f : 1.458954f;
  WithBook<Problem> args{d, {}, 1.0f / factor};
  for (int i = 0; i < 16; ++i)
    args.book[i] = nf4 ? factor * NF4_BOOK[i] : (i < 8 ? FP4_HALF[i] : -FP4_HALF[i - 8]) / (12.0f / factor);
  return args;
}

template <class T, int QUADS, int TILES, int STAGES>
int small_at(const Linear4bitSmallCuda& d, void* stream) {
  const dim3 grid((unsigned)ceil_div(d.w.N, 16 * TILES));
  return launch(small_kernel<T, QUADS, TILES, STAGES>, grid, THREADS, small_shared<QUADS, STAGES>(), stream,
                book_of(d, d.x.dtype));
}

template <class T>
int small_by_rows(const Linear4bitSmallCuda& d, void* stream) {
  if (!linear4bit_small_is_fast(d.w, d.x))
    return launch(small_any_kernel<T>, dim3((unsigned)ceil_div(d.w.N, WARPS)), THREADS, 16 * sizeof(float), stream,
                  book_of(d, FLOAT32));
  return d.M <= 4 ? small_at<T, 1, 1, 4>(d, stream) : small_at<T, 4, 2, 2>(d, stream);
}

}  // namespace

int linear4bit_dequantize(const Linear4bitDequantizeCuda& d, void* stream) {
  const auto args = book_of(d, FLOAT32);
  const dim3 grid((unsigned)ceil_div(ceil_div(d.w.N * d.w.K, 8), THREADS * UNROLL));
  const size_t shared = 16 * sizeof(float);
  if (d.out_dtype == FLOAT32) return launch(dequantize_kernel<float>, grid, THREADS, shared, stream, args);
  if (d.out_dtype == BFLOAT16) return launch(dequantize_kernel<bf16>, grid, THREADS, shared, stream, args);
  if (d.out_dtype == FLOAT16) return launch(dequantize_kernel<f16>, grid, THREADS, shared, stream, args);
  return BAD_DTYPE;
}

bool linear4bit_small_is_fast(const Weight4bitCuda& w, const Matrix& x) {
  return w.K % UNIT == 0 && w.log_blocksize >= LOG_UNIT && w.N * (w.K / UNIT) < 1ll << 31 &&
         (uintptr_t)w.data % 16 == 0 && (uintptr_t)x.data % 16 == 0 && x.ld % 8 == 0;
}

int linear4bit_small(const Linear4bitSmallCuda& d, void* stream) {
  if (d.M == 0) return OK;
  if (d.x.dtype == BFLOAT16) return small_by_rows<bf16>(d, stream);
  if (d.x.dtype == FLOAT16) return small_by_rows<f16>(d, stream);
  return BAD_DTYPE;
}

}  // namespace fastpeft
