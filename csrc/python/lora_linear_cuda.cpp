// The Python face of lora_linear's CUDA kernels: see csrc/lora_linear_cuda.h for what each computes. Lists have an
// entry a projection; a and b are None where one has no adapter. Ranks lie side by side in s and t, projection after
// projection.
#include "../lora_linear_cuda.h"

#include <algorithm>

#include "cuda.h"

namespace fastpeft {

namespace {

constexpr int64_t BLOCK_M = 64, BLOCK_K = 64, BLOCK_C = 128, BLOCK_R = 64;  // as in csrc/cuda/lora_linear.cu
constexpr CudaDropout NO_DROPOUT{nullptr, 0, 1.0f};
constexpr Scale ONE{nullptr, 0};

// ---- projections, a launch's worth at a time ----

struct Projection {
  Matrix adapter;     // A [R, K], or B [N, R]
  int64_t R, column;  // of s and t
  uint32_t number;
  Matrix da;  // [R, K]; may be absent
};
using Projections = std::vector<Projection>;

int64_t padded(int64_t R) { return ceil_div(R, 16) * 16; }

// At most MAX_PROJECTIONS of them. The columns of its spans count from the chunk's first column of s and t.
struct Chunk {
  Projections of;
  Spans spans{};
  int64_t first = 0, columns = 0, packed = 0;  // packed: ranks, padded

  Chunk(Projections::const_iterator begin, Projections::const_iterator end) : of(begin, end) {
    if (of.empty()) return;
    first = of.front().column, columns = of.back().column + of.back().R - first;
    for (const Projection& each : of) {
      const int i = spans.count++;
      spans.packed[i] = (int)packed, spans.rank[i] = (int)each.R, spans.index[i] = each.number;
      spans.column[i] = (int)(each.column - first);
      packed += padded(each.R);
    }
  }
};

std::vector<Chunk> chunks(const Projections& all) {
  std::vector<Chunk> found;
  for (size_t i = 0; i < all.size(); i += MAX_PROJECTIONS)
    found.emplace_back(all.begin() + i, all.begin() + std::min(i + MAX_PROJECTIONS, all.size()));
  return found;
}

// The first tensor of x's dtype that there is; s, which may be wider, where there is none.
template <class List>
const Tensor& first_of(const List& list, const Tensor& s) {
  for (const Tensor& t : list)
    if (t) return t;
  return s;
}

// Of A's [R, K] or, `transposed`, of B's [N, R], whatever K and N are; *total: their ranks.
Projections projections(const Pass& pass, const MaybeTensors& adapters, bool transposed, int64_t* total) {
  Projections all;
  *total = 0;
  for (size_t i = 0; i < adapters.size(); ++i) {
    const Tensor& t = adapters[i];
    if (t && t.dim() != 2) refuse(pass.op, transposed ? "b" : "a", transposed ? "[N, R]" : "[R, K]", t);
    const int64_t R = t ? t.size(transposed) : 0;
    const Matrix adapter =
        t ? pass.adapter(transposed ? "b" : "a", t, t.size(0), t.size(1)) : Matrix{nullptr, 0, FLOAT32};
    all.push_back({adapter, R, *total, (uint32_t)i, {nullptr, 0, FLOAT32}});
    *total += R;
  }
  return all;
}

// How many slabs of how many rows, so that slabs x tiles programs fill the device twice over.
std::pair<int64_t, int64_t> slabs(const Pass& pass, int64_t M, int64_t tiles) {
  const int64_t wanted = std::max<int64_t>(1, 2 * multiprocessors(pass.like) / std::max<int64_t>(tiles, 1));
  const int64_t rows = std::max<int64_t>(1, ceil_div(ceil_div(M, wanted), BLOCK_M)) * BLOCK_M;
  return {ceil_div(M, rows), rows};
}

// The chunk's adapters as rows of one matrix of s's dtype, scaled.
Matrix pack(Launches& launches, const Pass& pass, const Chunk& chunk, int64_t columns, bool transposed, Scale scale) {
  const int64_t ld = std::max<int64_t>(8, ceil_div(columns, 8) * 8);
  const Matrix out = launches.workspace(chunk.packed, ld, pass.wide);
  Matrix rows = out;
  for (const Projection& each : chunk.of) {
    const Matrix& from = each.adapter;
    const int64_t stride_i = transposed ? 1 : from.ld, stride_j = transposed ? from.ld : 1;
    launches.add(lora_linear_pack, LoraLinearPack{rows, from.data, from.dtype, stride_i, stride_j, scale.data,
                                                  scale.stride, each.R, columns, padded(each.R)});
    rows = fastpeft::columns(rows, padded(each.R) * ld);
  }
  return out;
}

// out [M, C] += Σ_i drop_i(s_i (scale·up_i)) + bias
void add_up(const Pass& pass, const Matrix& out, int64_t M, int64_t C, const Matrix& s, const Chunk& chunk,
            bool transposed, Scale scale, const Vector& bias, const CudaDropout& drop) {
  Launches launches(pass);
  const Matrix packed = pack(launches, pass, chunk, C, transposed, scale);
  launches.add(lora_linear_up, LoraLinearUpCuda{M, C, out, columns(s, chunk.first), packed, bias, (int)chunk.packed,
                                                chunk.spans, drop});
  launches.run({{"M", M}, {"columns", C}, {"R", chunk.packed}});
}

// ---- the passes ----

// s [M, ΣR] = drop(x) Aᵀ of all projections; x [M, K]
py::object down(const Tensor& x, const MaybeTensors& a, double p, const MaybeTensor& seed) {
  const Pass pass("lora_linear_down", "x", x);
  const int64_t K = x.size(-1), M = rows_of(x);
  const Matrix from = pass.rows("x", x, M, K);
  const CudaDropout drop = pass.dropout(p, seed);
  int64_t total;
  Projections all = projections(pass, a, false, &total);
  for (const Tensor& each : a)
    if (each && each.size(1) != K) refuse(pass.op, "a", text("[R, K] = [R, ", K, "]"), each);
  all.erase(std::remove_if(all.begin(), all.end(), [](const Projection& each) { return !each.R; }), all.end());
  const Result s = allocate(x, {M, total}, pass.wide);
  const Matrix to{s.data, total, pass.wide};
  if (M == 0) return s.object;
  for (const Chunk& chunk : chunks(all)) {
    Launches launches(pass);
    const Matrix packed = pack(launches, pass, chunk, K, false, ONE), out = columns(to, chunk.first);
    const int64_t tiles = ceil_div(M, BLOCK_M) * ceil_div(chunk.packed, BLOCK_R);
    const int64_t wanted = std::min({2 * multiprocessors(x) / tiles, ceil_div(K, 4 * BLOCK_K), int64_t(16)});
    const int64_t parts = std::max<int64_t>(wanted, 1), columns = chunk.columns;
    const Matrix sums = parts > 1 ? launches.workspace(parts * M, columns, FLOAT32) : out;
    launches.add(lora_linear_down, LoraLinearDownCuda{M, K, from, packed, sums.data, sums.ld, (int)parts,
                                                      (int)chunk.packed, chunk.spans, drop});
    if (parts > 1)
      launches.add(lora_linear_sum,
                   LoraLinearSum{(const float*)sums.data, parts, M * columns, M, columns, out, nullptr, 0});
    launches.run({{"M", M}, {"K", K}, {"R", total}});
  }
  return s.object;
}

// y_i += s_i (scale_i·B_i)ᵀ + lora_bias_i, in place
py::object up(py::object ys, const Tensor& s, const MaybeTensors& b, const MaybeTensors& scales,
              const MaybeTensors& lora_biases) {
  const Tensors tensors = ys.cast<Tensors>();
  const Pass pass("lora_linear_up", "y", first_of(tensors, s));
  pass.same_length(tensors.size(), b, scales, lora_biases);
  int64_t total, M = rows_of(s);
  const Projections all = projections(pass, b, true, &total);
  const Matrix ranks = pass.ranks("s", s, M, total);
  std::vector<std::function<void()>> calls;  // all is checked before anything is changed
  for (size_t i = 0; i < all.size(); ++i) {
    const Tensor& y = tensors[i];
    if (y.dim() < 1) refuse(pass.op, "y", "[M, N]", y);
    const int64_t N = y.size(-1), R = all[i].R;
    if (b[i] && b[i].size(0) != N) refuse(pass.op, "b", text("[N, R] = [", N, ", R]"), b[i]);
    const Matrix out = pass.rows("y", y, M, N);
    const Vector bias = pass.vector("lora_bias", lora_biases[i], N);
    const Scale scale = R ? pass.scale(scales[i], R) : ONE;
    const Chunk chunk(all.begin() + i, all.begin() + i + (R > 0));
    if (R || bias.data)
      calls.push_back([=, &pass] { add_up(pass, out, M, N, ranks, chunk, true, scale, bias, NO_DROPOUT); });
  }
  for (const auto& call : calls) call();
  return ys;
}

// -> t [M, ΣR] = dy (scale·B) or None, [dB_i], [dbias_i, float32]; None where not needed, and t 0, where there is no dy
py::tuple grad_up(const MaybeTensors& dys, const Tensor& s, const MaybeTensors& b, const MaybeTensors& scales,
                  bool wants_t, const std::vector<bool>& needs_b, const std::vector<bool>& needs_bias) {
  const Pass pass("lora_linear_grad_up", "dy", first_of(dys, s));
  const size_t n = dys.size();
  pass.same_length(n, b, scales, needs_b, needs_bias);
  int64_t total, M = rows_of(s);
  const Projections all = projections(pass, b, true, &total);
  const Matrix ranks = pass.ranks("s", s, M, total), none{nullptr, 0, FLOAT32};
  const Result t = wants_t ? allocate(s, {M, total}, pass.wide) : Result{};
  const Matrix to{t.data, total, pass.wide};
  py::list dbs(n), dbiases(n);
  for (size_t i = 0; i < n; ++i) {
    dbs[i] = py::none(), dbiases[i] = py::none();
    const int64_t R = all[i].R;
    const Chunk chunk(all.begin() + i, all.begin() + i + (R > 0));
    const Matrix ds = wants_t && R ? columns(to, chunk.first) : none;
    Launches launches(pass);
    if (!dys[i]) {
      if (!ds.data) continue;
      launches.add(lora_linear_sum, LoraLinearSum{nullptr, 0, 0, M, R, ds, nullptr, 0});  // of nothing
      launches.run({{"M", M}, {"R", R}});
      continue;
    }
    if (dys[i].dim() < 1) refuse(pass.op, "dy", "[M, N]", dys[i]);
    const int64_t N = dys[i].size(-1);
    if (b[i] && b[i].size(0) != N) refuse(pass.op, "b", text("[N, R] = [", N, ", R]"), b[i]);
    const Scale scale = R ? pass.scale(scales[i], R) : ONE;
    const int64_t tiles = ceil_div(N, BLOCK_C);
    const auto [count, slab_rows] = slabs(pass, M, tiles * std::max<int64_t>(1, ceil_div(chunk.packed, BLOCK_R)));
    const auto part = [&](bool wanted, int64_t rows, int64_t columns) {
      return wanted ? (float*)launches.workspace(rows, columns, FLOAT32).data : nullptr;
    };
    Matrix db = none, dbias = none;
    if (b[i] && needs_b[i]) {
      const Result made = allocate(s, {N, R}, b[i].dtype());
      dbs[i] = made.object, db = {made.data, R, b[i].dtype()};
    }
    if (needs_bias[i]) {
      const Result made = allocate(s, {N}, FLOAT32);
      dbiases[i] = made.object, dbias = {made.data, N, FLOAT32};
    }
    if (!ds.data && !db.data && !dbias.data) continue;
    const Matrix packed = ds.data ? pack(launches, pass, chunk, N, true, scale) : none;
    const LoraLinearColumnsCuda call{M,
                                     N,
                                     pass.rows("dy", dys[i], M, N),
                                     columns(ranks, chunk.first),
                                     packed,
                                     part(db.data, count * N, R),
                                     part(ds.data, tiles * M, R),
                                     part(dbias.data, count, N),
                                     false,
                                     slab_rows,
                                     (int)count,
                                     (int)std::max<int64_t>(chunk.packed, 1),
                                     (int)R,
                                     chunk.spans,
                                     NO_DROPOUT};
    launches.add(lora_linear_columns, call);
    if (ds.data) launches.add(lora_linear_sum, LoraLinearSum{call.ds, tiles, M * R, M, R, ds, nullptr, 0});
    if (db.data) launches.add(lora_linear_sum, LoraLinearSum{call.g, count, N * R, N, R, db, scale.data, scale.stride});
    if (dbias.data) launches.add(lora_linear_sum, LoraLinearSum{call.sums, count, N, 1, N, dbias, nullptr, 0});
    launches.run({{"M", M}, {"N", N}, {"R", R}});
  }
  return py::make_tuple(t.object, dbs, dbiases);
}

// -> dx, to which Σ_i drop_i(t_i A_i) was added in place (None stays None), and [dA_i = t_iᵀ drop_i(x)] where needed.
// `live`: which projections have a t.
py::tuple grad_down(py::object dx, const MaybeTensor& x, const Tensor& t, const MaybeTensors& a,
                    const std::vector<bool>& live, const std::vector<bool>& needs_a, double p,
                    const MaybeTensor& seed) {
  const MaybeTensor out = dx.cast<MaybeTensor>();
  const Tensor& sized = out ? (const Tensor&)out : x;
  const Pass pass("lora_linear_grad_down", "x or dx", sized ? sized : t);
  const size_t n = a.size();
  pass.same_length(n, live, needs_a);
  int64_t total, M = rows_of(t);
  const Projections all = projections(pass, a, false, &total);
  const Matrix ranks = pass.ranks("t", t, M, total);
  const CudaDropout drop = pass.dropout(p, seed);
  const int64_t K = sized && sized.dim() ? sized.size(-1) : 0;
  const Matrix from = pass.rows("x", x, M, K), to = pass.rows("dx", out, M, K);
  py::list das(n);
  Projections through, trained;
  for (size_t i = 0; i < n; ++i) {
    das[i] = py::none();
    if (!a[i] || !live[i]) continue;
    if (sized && a[i].size(1) != K) refuse(pass.op, "a", text("[R, K] = [R, ", K, "]"), a[i]);
    if (needs_a[i] && !x) refuse(pass.op, "x", "a tensor where dA is needed", x);
    if (all[i].R) through.push_back(all[i]);
    if (!needs_a[i]) continue;
    const Result da = allocate(t, {all[i].R, K}, a[i].dtype());
    das[i] = da.object;
    trained.push_back(all[i]);
    trained.back().da = {da.data, K, a[i].dtype()};
  }
  if (out)
    for (const Chunk& chunk : chunks(through))
      add_up(pass, to, M, K, ranks, chunk, false, ONE, {nullptr, FLOAT32}, drop);
  for (const Chunk& chunk : chunks(trained)) {
    Launches launches(pass);
    const auto [count, slab_rows] = slabs(pass, M, ceil_div(K, BLOCK_C) * ceil_div(chunk.packed, BLOCK_R));
    const int64_t stride = chunk.columns * K;
    float* const parts = (float*)launches.workspace(count * chunk.columns, K, FLOAT32).data;
    launches.add(lora_linear_columns, LoraLinearColumnsCuda{M,
                                                            K,
                                                            from,
                                                            columns(ranks, chunk.first),
                                                            {nullptr, 0, FLOAT32},
                                                            parts,
                                                            nullptr,
                                                            nullptr,
                                                            true,
                                                            slab_rows,
                                                            (int)count,
                                                            (int)chunk.packed,
                                                            (int)chunk.columns,
                                                            chunk.spans,
                                                            drop});
    for (const Projection& each : chunk.of)
      launches.add(lora_linear_sum, LoraLinearSum{parts + (each.column - chunk.first) * K, count, stride, each.R, K,
                                                  each.da, nullptr, 0});
    launches.run({{"M", M}, {"K", K}, {"R", total}});
  }
  return py::make_tuple(dx, das);
}

}  // namespace

void define_lora_linear(py::module_& m) {
  using namespace py::literals;
  m.def("lora_linear_down", down, "x"_a, "a"_a, "p"_a, "seed"_a.none(true));
  m.def("lora_linear_up", up, "ys"_a, "s"_a, "b"_a, "scales"_a, "lora_biases"_a);
  m.def("lora_linear_grad_up", grad_up, "dys"_a, "s"_a, "b"_a, "scales"_a, "wants_t"_a, "needs_b"_a, "needs_bias"_a);
  m.def("lora_linear_grad_down", grad_down, "dx"_a.none(true), "x"_a.none(true), "t"_a, "a"_a, "live"_a, "needs_a"_a,
        "p"_a, "seed"_a.none(true));
}

}  // namespace fastpeft
