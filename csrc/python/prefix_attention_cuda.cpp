// The Python face of prefix_attention's CUDA kernels: see csrc/prefix_attention_cuda.h for what each computes. A prefix
// is nine arguments: prefix_k, prefix_v [A, Hk, P, D] (flat: [Hk, P, D]); gate_k, gate_v [B, H, T, P], 1 where they
// broadcast; log_bias [A, H, P] or [1, H, P]; gate_out [A, H] or [1, H], these four float32; index int32 [B]; lengths
// int32 [A]; offsets int64 [A + 1]. All but the first two may be None.
#include "../prefix_attention_cuda.h"

#include <algorithm>

#include "cuda.h"

namespace fastpeft {

namespace {

// ---- what the passes take ----

struct PrefixTensors {
  const Tensor &k, &v;
  const MaybeTensor &gate_k, &gate_v, &log_bias, &gate_out, &index, &lengths, &offsets;
};

// q, its prefixes and how they are read, each refused where the kernels could not.
class PrefixPass {
 public:
  const char* const op;
  const Tensor& q;
  PrefixAttentionCuda call{};

  PrefixPass(const char* op, const Tensor& q, const PrefixTensors& from, bool separate, double p,
             const MaybeTensor& seed, double scale)
      : op(op), q(q) {
    if (q.dim() != 4 || !q.is_real()) refuse(op, "q", "[B, H, T, D], float32, bfloat16 or float16", q);
    check_device(op, "q", q);
    PrefixAttentionCuda& c = call;
    counted("q", q, q.size(0) * q.size(1) * q.size(2));
    c.dtype = q.dtype();
    c.B = (int)q.size(0), c.H = (int)q.size(1), c.T = (int)q.size(2), c.D = (int)q.size(3);
    const int64_t widest = PREFIX_MAX_ROW / size_of(c.dtype);
    if (c.D < 1 || c.D > widest) refuse(op, "q", text("[B, H, T, D] with D from 1 to ", widest), q);
    c.q = heads("q", q);
    const bool flat = (bool)from.offsets;
    if (from.k.dim() != 4 - flat) refuse(op, "prefix_k", flat ? "[Hk, P, D]" : "[A, Hk, P, D]", from.k);
    if (flat) c.offsets = (const int64_t*)numbers("offsets", from.offsets, -1, 64);
    const int64_t A = flat ? from.offsets.size(0) - 1 : from.k.size(0), P = from.k.size(-2);
    counted("prefix_k", from.k, A * c.H * P);
    c.A = (int)A, c.Hk = (int)from.k.size(-3), c.P = (int)P;
    if (c.Hk < 1 || c.H % c.Hk) refuse(op, "prefix_k", text("of Hk heads that divide H = ", c.H), from.k);
    c.k = rows("prefix_k", from.k), c.v = rows("prefix_v", from.v);
    c.longest = c.P;
    c.gate_k = gate("gate_k", from.gate_k), c.gate_v = gate("gate_v", from.gate_v);
    for (const Tensor* gate : {(const Tensor*)&from.gate_k, (const Tensor*)&from.gate_v})
      if (*gate && gate->size(3) != 1) c.longest = std::min(c.longest, (int)gate->size(3));
    if (from.log_bias) c.log_bias = of_prefix("log_bias", from.log_bias, {flat ? 1 : c.A, c.H, c.P});
    if (from.gate_out && separate) c.gate_out = of_prefix("gate_out", from.gate_out, {c.A, c.H});
    c.index = (const int32_t*)numbers("index", from.index, c.B, 32);
    c.lengths = (const int32_t*)numbers("lengths", from.lengths, c.A, 32);
    c.separate = separate, c.scale = (float)scale, c.dropout = dropout(op, q, p, seed);
  }

  // [B, H, T, D] of q's dtype
  HeadsCuda heads(const char* argument, const Tensor& t) const {
    on_device(argument, t);
    const bool fits = t && t.dtype() == call.dtype && t.is({call.B, call.H, call.T, call.D}) && side_by_side(t);
    if (!fits) refuse(op, argument, sizes({call.B, call.H, call.T, call.D}, ", contiguous rows, of q's dtype"), t);
    return {t.data(), t.stride(0), t.stride(1), t.stride(2)};
  }

  // [B, H, T], float32
  HeadsCuda sums(const char* argument, const Tensor& t) const {
    on_device(argument, t);
    if (!t || t.dtype() != FLOAT32 || !t.is({call.B, call.H, call.T}))
      refuse(op, argument, sizes({call.B, call.H, call.T}, ", float32"), t);
    return {t.data(), t.stride(0), t.stride(1), t.stride(2)};
  }

  int tiles() const { return (int)ceil_div(call.T, PREFIX_BLOCK_T); }
  bool empty() const { return !call.B || !call.H || !call.T || !call.P; }
  // Into how many parts to split a sum of so many terms, where each part is so many programs: they fill the device
  // twice.
  int parts(int64_t programs, int64_t terms) const {
    return (int)std::max<int64_t>(1, std::min(2 * multiprocessors(q) / std::max<int64_t>(programs, 1), terms));
  }

 private:
  void counted(const char* argument, const Tensor& t, int64_t rows) const {
    if (rows > INT32_MAX) refuse(op, argument, "of at most 2^31 - 1 rows of all heads", t);
  }
  static bool side_by_side(const Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1; }
  static int64_t step(const Tensor& t, int dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); }
  static std::string sizes(std::initializer_list<int64_t> all, const char* rest) {
    std::string found;
    for (int64_t n : all) found += (found.empty() ? "[" : ", ") + std::to_string(n);
    return found + "]" + rest;
  }

  void on_device(const char* argument, const Tensor& t) const {
    if (t && !t.same_device(q)) refuse(op, argument, "on the other tensors' device", t);
  }

  PrefixRowsCuda rows(const char* argument, const Tensor& t) const {
    on_device(argument, t);
    const bool flat = call.offsets;
    const bool fits = flat ? t.is({call.Hk, call.P, call.D}) : t.is({call.A, call.Hk, call.P, call.D});
    const char* const rest = ", contiguous rows, float32, bfloat16 or float16";
    if (!fits || !t.is_real() || !side_by_side(t))
      refuse(op, argument,
             flat ? sizes({call.Hk, call.P, call.D}, rest) : sizes({call.A, call.Hk, call.P, call.D}, rest), t);
    return {t.data(), t.dtype(), flat ? 0 : t.stride(0), t.stride(-3), t.stride(-2)};
  }

  PrefixGateCuda gate(const char* argument, const Tensor& t) const {
    on_device(argument, t);
    if (!t) return {};
    bool fits = t.dim() == 4 && t.dtype() == FLOAT32;
    const int64_t full[] = {call.B, call.H, call.T, call.P};
    for (int i = 0; fits && i < 3 + !call.offsets; ++i) fits = t.size(i) == full[i] || t.size(i) == 1;
    if (!fits) refuse(op, argument, sizes({full[0], full[1], full[2], full[3]}, " or 1 for each, float32"), t);
    return {(const float*)t.data(), step(t, 0), step(t, 1), step(t, 2), step(t, 3)};
  }

  // [A, H, P] or [A, H]; 1 for A
  PrefixGateCuda of_prefix(const char* argument, const Tensor& t, std::initializer_list<int64_t> full) const {
    on_device(argument, t);
    bool fits = t.dim() == (int)full.size() && t.dtype() == FLOAT32;
    for (int i = 0; fits && i < t.dim(); ++i) fits = t.size(i) == full.begin()[i] || (i == 0 && t.size(i) == 1);
    if (!fits) refuse(op, argument, sizes(full, " or 1 for the first, float32"), t);
    return {(const float*)t.data(), step(t, 0), t.stride(1), 0, t.dim() == 3 ? t.stride(2) : 0};
  }

  // [n] integers of so many bits; n < 0: any number of them, at least 1
  const void* numbers(const char* argument, const Tensor& t, int64_t n, int bits) const {
    on_device(argument, t);
    if (!t) return nullptr;
    const bool fits = t.dim() == 1 && t.view.dtype.code == 0 && t.view.dtype.bits == bits && t.contiguous() &&
                      (n < 0 ? t.size(0) > 0 : t.size(0) == n);
    if (!fits) refuse(op, argument, text("[", n < 0 ? "A + 1" : std::to_string(n), "], contiguous, int", bits), t);
    return t.data();
  }
};

// ---- the passes ----

// out = o and the prefix's part, lse_out = L, both in place where they are o and lse (always in joint mode)
void prefix_forward(const Tensor& q, const Tensor& prefix_k, const Tensor& prefix_v, const MaybeTensor& gate_k,
                    const MaybeTensor& gate_v, const MaybeTensor& log_bias, const MaybeTensor& gate_out,
                    const MaybeTensor& index, const MaybeTensor& lengths, const MaybeTensor& offsets, const Tensor& o,
                    const Tensor& lse, const Tensor& out, const Tensor& lse_out, bool separate, double p,
                    const MaybeTensor& seed, double scale) {
  const PrefixPass pass("prefix_attention_forward", q,
                        {prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets}, separate, p,
                        seed, scale);
  Launches launches(pass.op, q);
  launches.add(prefix_attention_forward,
               PrefixAttentionForwardCuda{pass.call, pass.heads("o", o), pass.heads("out", out), pass.sums("lse", lse),
                                          pass.sums("lse_out", lse_out)});
  launches.run({{"B", pass.call.B}, {"H", pass.call.H}, {"T", pass.call.T}, {"P", pass.call.P}, {"D", pass.call.D}});
}

// -> the gradients of the prefix's first six, None where not needed; dq is added to in place
py::tuple prefix_backward(const Tensor& grad_o, const Tensor& q, const Tensor& prefix_k, const Tensor& prefix_v,
                          const MaybeTensor& gate_k, const MaybeTensor& gate_v, const MaybeTensor& log_bias,
                          const MaybeTensor& gate_out, const MaybeTensor& index, const MaybeTensor& lengths,
                          const MaybeTensor& offsets, const MaybeTensor& o, const Tensor& lse, const MaybeTensor& dq,
                          bool separate, double p, const MaybeTensor& seed, double scale,
                          const std::vector<bool>& needs) {
  const PrefixPass pass("prefix_attention_backward", q,
                        {prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets}, separate, p,
                        seed, scale);
  const PrefixAttentionCuda& c = pass.call;
  const Tensor* const of[] = {&prefix_k, &prefix_v, &gate_k, &gate_v, &log_bias, &gate_out};
  if (needs.size() != 6) throw py::value_error(text(pass.op, ": needs must have 6 entries, got ", needs.size()));
  std::vector<Result> results(6);
  for (int i = 0; i < 6; ++i)
    if (needs[i] && *of[i]) results[i] = allocate(q, of[i]->view.shape, of[i]->dim(), i < 2 ? of[i]->dtype() : FLOAT32);
  Launches launches(pass.op, q);
  // result i [rows, columns] = the sum of `count` partial ones
  const auto sum = [&](int i, const float* parts, int64_t count, int64_t rows, int64_t columns) {
    const int dtype = i < 2 ? of[i]->dtype() : FLOAT32;
    launches.add(
        lora_linear_sum,
        LoraLinearSum{parts, count, rows * columns, rows, columns, {results[i].data, columns, dtype}, nullptr, 0});
  };
  const auto partial = [&](bool wanted, int64_t count, int64_t elements) {
    return wanted ? (float*)launches.workspace(count, elements, FLOAT32).data : nullptr;
  };
  PrefixAttentionGradCuda grad{c, pass.heads("do", grad_o), pass.sums("lse", lse), nullptr};
  const HeadsCuda to_q = dq ? pass.heads("dq", dq) : HeadsCuda{};
  if (!pass.empty()) {
    float* const delta = (float*)launches.workspace(c.B * c.H, c.T, FLOAT32).data;
    if (separate)
      launches.add(prefix_attention_grad_gates,
                   PrefixAttentionGradGatesCuda{grad, nullptr, nullptr, delta, c.B, c.H, c.T, 1, 1});
    else
      launches.add(prefix_attention_delta, PrefixAttentionDeltaCuda{grad, pass.heads("o", o), delta});
    grad.delta = delta;
    if (dq) launches.add(prefix_attention_grad_query, PrefixAttentionGradQueryCuda{grad, to_q});

    const auto gates = [&](const Tensor& like, bool k, bool v) {
      const int b = (int)like.size(0), h = (int)like.size(1), t = (int)like.size(2), n = (int)like.size(3);
      const int64_t programs = (int64_t)b * h * (t == 1 ? 1 : pass.tiles()) * ceil_div(n, PREFIX_BLOCK_P);
      const int parts = pass.parts(programs, (int64_t)(c.B / b) * (c.H / h) * (t == 1 ? pass.tiles() : 1));
      const int64_t elements = like.numel();
      float* const to_k = partial(k, parts, elements);
      float* const to_v = partial(v, parts, elements);
      launches.add(prefix_attention_grad_gates,
                   PrefixAttentionGradGatesCuda{grad, to_k, to_v, nullptr, b, h, t, n, parts});
      if (k) sum(2, to_k, parts, 1, elements);
      if (v) sum(3, to_v, parts, 1, elements);
    };
    const bool k = (bool)results[2].data, v = (bool)results[3].data;
    bool alike = k && v;
    for (int i = 0; alike && i < 4; ++i) alike = gate_k.size(i) == gate_v.size(i);
    if (alike) {
      gates(gate_k, true, true);
    } else {
      if (k) gates(gate_k, true, false);
      if (v) gates(gate_v, false, true);
    }

    if (results[0].data || results[1].data || results[4].data) {
      const int64_t A = c.offsets ? 1 : c.A, G = c.H / c.Hk, rows = A * c.Hk * c.P;
      const int64_t programs = c.H * A * ceil_div(c.P, PREFIX_BLOCK_P) * ceil_div(c.D, PREFIX_COLUMNS);
      const int parts = pass.parts(programs, (int64_t)c.B * pass.tiles());
      float* const to_k = partial(results[0].data, parts * G, rows * c.D);
      float* const to_v = partial(results[1].data, parts * G, rows * c.D);
      float* const to_bias = partial(results[4].data, parts, A * c.H * c.P);
      launches.add(prefix_attention_grad_prefix, PrefixAttentionGradPrefixCuda{grad, to_k, to_v, to_bias, parts});
      if (to_k) sum(0, to_k, parts * G, rows, c.D);
      if (to_v) sum(1, to_v, parts * G, rows, c.D);
      if (to_bias) sum(4, to_bias, parts * A / log_bias.size(0), log_bias.size(0), c.H * c.P);
    }
    if (results[5].data)
      launches.add(prefix_attention_grad_out,
                   PrefixAttentionGradOutCuda{grad, (float*)results[5].data, (int)gate_out.size(0)});
  } else {
    for (int i = 0; i < 6; ++i)
      if (results[i].data) sum(i, nullptr, 0, 1, of[i]->numel());
  }
  launches.run({{"B", c.B}, {"H", c.H}, {"T", c.T}, {"P", c.P}, {"D", c.D}});
  py::tuple all(6);
  for (int i = 0; i < 6; ++i) all[i] = results[i].object;
  return all;
}

}  // namespace

void define_prefix_attention(py::module_& m) {
  using namespace py::literals;
  m.def("prefix_attention_forward", prefix_forward, "q"_a, "prefix_k"_a, "prefix_v"_a, "gate_k"_a.none(true),
        "gate_v"_a.none(true), "log_bias"_a.none(true), "gate_out"_a.none(true), "index"_a.none(true),
        "lengths"_a.none(true), "offsets"_a.none(true), "o"_a, "lse"_a, "out"_a, "lse_out"_a, "separate"_a, "p"_a,
        "seed"_a.none(true), "scale"_a);
  m.def("prefix_attention_backward", prefix_backward, "do"_a, "q"_a, "prefix_k"_a, "prefix_v"_a, "gate_k"_a.none(true),
        "gate_v"_a.none(true), "log_bias"_a.none(true), "gate_out"_a.none(true), "index"_a.none(true),
        "lengths"_a.none(true), "offsets"_a.none(true), "o"_a.none(true), "lse"_a, "dq"_a.none(true), "separate"_a,
        "p"_a, "seed"_a.none(true), "scale"_a, "needs"_a);
}

}  // namespace fastpeft
