// The Python face of prefix_attention's CPU kernels: see csrc/prefix_attention.h for what each computes. The prefix is
// nine arguments: prefix_k, prefix_v [A, Hk, P, D], or flat [Hk, ΣP, D] with offsets; gate_k, gate_v [B, H, T, P], each
// dimension whole or 1; log_bias [A or 1, H, P]; gate_out [A or 1, H]; index [B], lengths [A], offsets [A + 1].
#include "../prefix_attention.h"

#include <string.h>

#include "cpu.h"

namespace fastpeft {

namespace {

struct Heads {
  int64_t B, H, T, D;
  int dtype;
  bool empty() const { return B * H * T * D == 0; }
};

// ---- arguments ----

bool on_cpu(const Tensor& t) { return t.view.device.type == dlpack::CPU; }

Heads heads_of(const char* op, const Tensor& q) {
  if (q.dim() != 4 || !q.is_real() || !on_cpu(q) || q.size(3) > MAX_HEAD_DIM)
    refuse(op, "q", text("[B, H, T, D], D up to ", MAX_HEAD_DIM, ", float32, bfloat16 or float16, on the CPU"), q);
  return {q.size(0), q.size(1), q.size(2), q.size(3), q.dtype()};
}

HeadRows rows(const char* op, const char* argument, const Tensor& t, const Heads& n) {
  if (!t) return {};
  if (!t.is({n.B, n.H, n.T, n.D}) || t.dtype() != n.dtype || !on_cpu(t) || (n.D > 1 && t.stride(3) != 1))
    refuse(op, argument, text("[", n.B, ", ", n.H, ", ", n.T, ", ", n.D, "], contiguous rows, of q's dtype"), t);
  return {t.data(), t.stride(0), t.stride(1), t.stride(2)};
}

HeadNumbers lse_of(const char* op, const Tensor& t, const Heads& n) {
  if (!t.is({n.B, n.H, n.T}) || t.dtype() != FLOAT32 || !on_cpu(t))
    refuse(op, "lse", text("[", n.B, ", ", n.H, ", ", n.T, "], float32, on the CPU"), t);
  return {(float*)t.data(), t.stride(0), t.stride(1), t.stride(2)};
}

// k or v of a segment, [A, Hk, N, D] or, flat, [Hk, ΣN, D]
HeadKeys keys(const char* op, const char* argument, const Tensor& t, bool flat, const Heads& n) {
  const bool fits = t.dim() == (flat ? 3 : 4) && t.is_real() && on_cpu(t) && t.size(-1) == n.D &&
                    (n.D <= 1 || t.numel() == 0 || t.stride(-1) == 1);
  if (!fits) refuse(op, argument, text(flat ? "[Hk, ΣP, " : "[A, Hk, P, ", n.D, "], contiguous rows, on the CPU"), t);
  return {t.data(), flat ? 0 : t.stride(0), t.stride(-3), t.stride(-2), t.dtype()};
}

// t as a plane whose dimension i is whole[i], of size sizes[i], or 1
Plane plane(const char* op, const char* argument, const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (!t) return {};
  Plane p{t.data(), 0, 0, 0, 0, false, false, false, false, t.dtype() == BOOL ? MASK : t.dtype(), false};
  bool fits = t.dim() == 4 && on_cpu(t) && (t.is_real() || t.dtype() == BOOL);
  int64_t* const strides[] = {&p.b, &p.h, &p.t, &p.n};
  bool* const whole[] = {&p.has_b, &p.has_h, &p.has_t, &p.has_n};
  std::string expected = "[";
  for (int i = 0; i < 4; ++i) {
    const int64_t size = sizes.begin()[i];
    expected += text(i ? ", " : "", size, size == 1 ? "" : " or 1");
    if (!fits) continue;
    *whole[i] = t.size(i) == size;
    *strides[i] = t.size(i) == 1 ? 0 : t.stride(i);
    fits = t.size(i) == size || t.size(i) == 1;
  }
  if (!fits) refuse(op, argument, expected + "], on the CPU", t);
  return p;
}

// the same of what belongs to keys, [A or 1, H, columns] or, without columns, [A or 1, H]
Plane plane_by_key(const char* op, const char* argument, const Tensor& t, int64_t A, int64_t H, int64_t columns) {
  if (!t) return {};
  const bool has_n = columns >= 0, has_b = t.dim() > 0 && t.size(0) == A;
  const bool fits = t.dim() == 2 + has_n && t.is_real() && on_cpu(t) && (has_b || t.size(0) == 1) && t.size(1) == H &&
                    (!has_n || t.size(2) == columns);
  if (!fits)
    refuse(op, argument, text("[", A, " or 1, ", H, has_n ? text(", ", columns) : "", "], floating, on the CPU"), t);
  return {
      t.data(), has_b ? t.stride(0) : 0, t.stride(1), 0, has_n ? t.stride(2) : 0, has_b, true, false, has_n, t.dtype(),
      true};
}

template <class Number>
const Number* numbers(const char* op, const char* argument, const Tensor& t, int64_t count) {
  if (!t) return nullptr;
  const int dtype = sizeof(Number) == 4 ? INT32 : INT64;
  if (!t.is({count}) || t.dtype() != dtype || !on_cpu(t) || !t.contiguous())
    refuse(op, argument, text("[", count, "], contiguous, int", 8 * sizeof(Number), ", on the CPU"), t);
  return (const Number*)t.data();
}

struct Prefix {
  const Tensor &k, &v;
  const MaybeTensor &gate_k, &gate_v, &log_bias, &gate_out, &index, &lengths, &offsets;

  bool flat() const { return k.dim() == 3; }
  int64_t columns() const { return k.size(-2); }

  Segment segment(const char* op, const Heads& n, double p, const Tensor& seed, double scale) const {
    Segment s{};
    s.k = keys(op, "prefix_k", k, flat(), n), s.v = keys(op, "prefix_v", v, flat(), n);
    s.Hk = k.size(-3), s.N = columns(), s.A = flat() ? 0 : k.size(0);
    for (int i = 0; i < k.dim(); ++i)
      if (v.size(i) != k.size(i)) refuse(op, "prefix_v", "of prefix_k's shape " + shape_of(k), v);
    if (s.Hk < 1 || n.H % s.Hk) refuse(op, "prefix_k", text("of a number of heads that divides H = ", n.H), k);
    if (flat()) {
      if (!offsets || offsets.dim() != 1 || offsets.size(0) < 1)
        refuse(op, "offsets", "[A + 1] where prefix_k is flat", offsets);
      s.A = offsets.size(0) - 1;
      s.offsets = numbers<int64_t>(op, "offsets", offsets, s.A + 1);
      s.N = longest(op, s.offsets, s.A);
      for (const Tensor* gate : {(const Tensor*)&gate_k, (const Tensor*)&gate_v})
        if (*gate && gate->dim() == 4) s.N = std::max(s.N, gate->size(3));
    } else if (offsets) {
      refuse(op, "offsets", "None where prefix_k is [A, Hk, P, D]", offsets);
    }
    s.index = numbers<int32_t>(op, "index", index, n.B);
    if (!index && s.A != 1) refuse(op, "index", text("[B] where there are A = ", s.A, " prefixes"), index);
    s.lengths = numbers<int32_t>(op, "lengths", lengths, s.A);
    s.gate_k = plane(op, "gate_k", gate_k, {n.B, n.H, n.T, s.N});
    s.gate_v = plane(op, "gate_v", gate_v, {n.B, n.H, n.T, s.N});
    s.bias = plane_by_key(op, "log_bias", log_bias, flat() ? 1 : s.A, n.H, columns());
    if (flat()) s.bias.b = 0, s.bias.has_b = false;
    s.gate_out = plane_by_key(op, "gate_out", gate_out, s.A, n.H, -1);
    s.scale = (float)scale;
    s.dropout = dropout(op, p, seed);
    return s;
  }

  int64_t longest(const char* op, const int64_t* all, int64_t A) const {
    int64_t most = 0;
    bool fits = all[0] >= 0 && all[A] <= columns();
    for (int64_t a = 0; a < A; ++a) {
      fits = fits && all[a] <= all[a + 1];
      most = std::max(most, all[a + 1] - all[a]);
    }
    if (!fits) refuse(op, "offsets", text("ascending, within 0 .. ΣP = ", columns()), offsets);
    return most;
  }
};

// Tokens: a row's own keys.
Segment token_segment(const char* op, const Heads& n, const Tensor& k, const Tensor& v, bool causal,
                      const MaybeTensor& mask, double p, const Tensor& seed, double scale) {
  Segment s{};
  s.k = keys(op, "k", k, false, n), s.v = keys(op, "v", v, false, n);
  s.A = n.B, s.Hk = k.size(1), s.N = k.size(2), s.by_row = true;
  if (s.Hk < 1 || n.H % s.Hk || !k.is({n.B, s.Hk, s.N, n.D}) || k.dtype() != n.dtype)
    refuse(op, "k", text("[", n.B, ", Hk, S, ", n.D, "], Hk a divisor of H = ", n.H, ", of q's dtype"), k);
  if (!v.is({n.B, s.Hk, s.N, n.D}) || v.dtype() != n.dtype) refuse(op, "v", "as k, " + shape_of(k), v);
  if (mask && mask.dim() == 2) {
    if (!mask.is({n.B, s.N}) || mask.dtype() != BOOL || !on_cpu(mask))
      refuse(op, "mask", text("[B, S] = [", n.B, ", ", s.N, "], bool, or [b, h, T, S]"), mask);
    s.bias = {mask.data(), mask.stride(0), 0, 0, mask.stride(1), true, false, false, true, MASK, false};
  } else {
    s.bias = plane(op, "mask", mask, {n.B, n.H, n.T, s.N});
  }
  s.causal = causal;
  s.scale = (float)scale;
  s.dropout = dropout(op, p, seed);
  s.projection = 1;
  return s;
}

// ---- results ----

// [B, H, T, D] of q's dtype; `by_t`: in memory [B, T, H, D]
Result allocate_rows(const Tensor& q, const Heads& n, bool by_t, HeadRows* rows) {
  Result made = by_t ? allocate(q, {n.B, n.T, n.H, n.D}, n.dtype) : allocate(q, {n.B, n.H, n.T, n.D}, n.dtype);
  const int64_t b = n.H * n.T * n.D;
  *rows = by_t ? HeadRows{made.data, b, n.D, n.H * n.D} : HeadRows{made.data, b, n.T * n.D, n.D};
  if (by_t) made.object = made.object.attr("transpose")(1, 2);
  return made;
}
Result allocate_lse(const Tensor& q, const Heads& n, HeadNumbers* lse) {
  const Result made = allocate(q, {n.B, n.H, n.T}, FLOAT32);
  *lse = {(float*)made.data, n.H * n.T, n.T, 1};
  return made;
}
bool lies_by_t(const Tensor& t) { return t.stride(1) < t.stride(2); }

// of t's shape; zeros where no kernel will run
Result allocate_like(const Tensor& t, int dtype, bool zeros) {
  Result made = allocate(t, t.view.shape, t.dim(), dtype);
  if (zeros && t.numel()) memset(made.data, 0, (size_t)(t.numel() * size_of(dtype)));
  return made;
}

HeadKeys contiguous_keys(const Result& made, const Tensor& like) {
  const int64_t D = like.size(-1), N = like.size(-2);
  return {made.data, like.dim() == 4 ? like.size(1) * N * D : 0, N * D, D, like.dtype()};
}

template <class Call>
void run_segment(const char* op, const Heads& n, const Segment& s, const Call& call, int (*kernel)(const Call&)) {
  int status;
  {
    py::gil_scoped_release release;
    status = kernel(call);
  }
  if (status == OK) return;
  const std::string what = text(op, ": no memory for its workspace at B=", n.B, ", H=", n.H, ", T=", n.T, ", D=", n.D,
                                ", keys=", s.N, ", A=", s.A);
  PyErr_SetString(PyExc_MemoryError, what.c_str());
  throw py::error_already_set();
}

// ---- the passes ----

#define PREFIX_ARGUMENTS                                                                                              \
  const Tensor &prefix_k, const Tensor &prefix_v, const MaybeTensor &gate_k, const MaybeTensor &gate_v,               \
      const MaybeTensor &log_bias, const MaybeTensor &gate_out, const MaybeTensor &index, const MaybeTensor &lengths, \
      const MaybeTensor &offsets
#define PREFIX {prefix_k, prefix_v, gate_k, gate_v, log_bias, gate_out, index, lengths, offsets}

// -> o, lse. joint: both are those given, in place; separate: new ones, o + c · o_p and the prefix's lse.
py::tuple forward(const Tensor& q, PREFIX_ARGUMENTS, py::object o, py::object lse, bool separate, double p,
                  const MaybeTensor& seed, double scale) {
  const char* const op = "prefix_attention_forward";
  const Heads n = heads_of(op, q);
  const Prefix prefix PREFIX;
  const Segment s = prefix.segment(op, n, p, seed, scale);
  const Tensor before = o.cast<Tensor>(), lse_before = lse.cast<Tensor>();
  Attend call{};
  call.B = n.B, call.H = n.H, call.T = n.T, call.D = n.D, call.dtype = n.dtype;
  call.q = rows(op, "q", q, n), call.o = rows(op, "o", before, n), call.lse = lse_of(op, lse_before, n);
  call.separate = separate, call.segment = s, call.way = way();
  if (separate) {
    call.before = call.o;
    o = allocate_rows(q, n, lies_by_t(before), &call.o).object;
    lse = allocate_lse(q, n, &call.lse).object;
  }
  if (!n.empty()) run_segment(op, n, s, call, prefix_attention().attend);
  return py::make_tuple(o, lse);
}

// -> d_prefix_k, d_prefix_v, d_gate_k, d_gate_v, d_log_bias, d_gate_out, None where not needed; dq is added to in place
py::tuple backward(const Tensor& grad_o, const Tensor& q, PREFIX_ARGUMENTS, const MaybeTensor& o, const Tensor& lse,
                   const MaybeTensor& dq, bool separate, double p, const MaybeTensor& seed, double scale,
                   const std::array<bool, 6>& needs) {
  const char* const op = "prefix_attention_backward";
  const Heads n = heads_of(op, q);
  const Prefix prefix PREFIX;
  GradAttend call{};
  call.segment = prefix.segment(op, n, p, seed, scale);
  call.B = n.B, call.H = n.H, call.T = n.T, call.D = n.D, call.dtype = n.dtype;
  call.grad_o = rows(op, "do", grad_o, n), call.q = rows(op, "q", q, n), call.grad_q = rows(op, "dq", dq, n);
  if (!separate) {
    if (!o) refuse(op, "o", "a tensor in joint mode", o);
    call.o = rows(op, "o", o, n);
  }
  call.lse = lse_of(op, lse, n);
  call.separate = separate, call.columns = prefix.columns(), call.way = way();

  const Tensor* const of[] = {&prefix_k, &prefix_v, &gate_k, &gate_v, &log_bias, &gate_out};
  float** const planes[] = {&call.grad_gate_k, &call.grad_gate_v, &call.grad_bias, &call.grad_gate_out};
  py::tuple all(6);
  bool any = (bool)dq;
  for (int i = 0; i < 6; ++i) {
    all[i] = py::none();
    if (!needs[i] || !*of[i] || (i == 5 && !separate)) continue;
    const Result made = allocate_like(*of[i], i < 2 ? of[i]->dtype() : (int)FLOAT32, n.empty());
    all[i] = made.object, any = true;
    if (i < 2)
      (i ? call.grad_v : call.grad_k) = contiguous_keys(made, *of[i]);
    else
      *planes[i - 2] = (float*)made.data;
  }
  if (any && !n.empty()) run_segment(op, n, call.segment, call, prefix_attention().grad);
  return all;
}

// -> o [B, H, T, D], lse [B, H, T] of tokens alone
py::tuple tokens(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, const MaybeTensor& mask, double p,
                 const MaybeTensor& seed, double scale) {
  const char* const op = "prefix_attention_tokens";
  const Heads n = heads_of(op, q);
  const Segment s = token_segment(op, n, k, v, causal, mask, p, seed, scale);
  Attend call{};
  call.B = n.B, call.H = n.H, call.T = n.T, call.D = n.D, call.dtype = n.dtype;
  call.q = rows(op, "q", q, n), call.fresh = true, call.segment = s, call.way = way();
  const Result o = allocate_rows(q, n, true, &call.o), lse = allocate_lse(q, n, &call.lse);
  if (!n.empty()) run_segment(op, n, s, call, prefix_attention().attend);
  return py::make_tuple(o.object, lse.object);
}

// -> dq, dk, dv, None where not needed
py::tuple grad_tokens(const Tensor& grad_o, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                      const Tensor& lse, bool causal, const MaybeTensor& mask, double p, const MaybeTensor& seed,
                      double scale, const std::array<bool, 3>& needs) {
  const char* const op = "prefix_attention_grad_tokens";
  const Heads n = heads_of(op, q);
  GradAttend call{};
  call.segment = token_segment(op, n, k, v, causal, mask, p, seed, scale);
  call.B = n.B, call.H = n.H, call.T = n.T, call.D = n.D, call.dtype = n.dtype;
  call.grad_o = rows(op, "do", grad_o, n), call.q = rows(op, "q", q, n), call.o = rows(op, "o", o, n);
  call.lse = lse_of(op, lse, n), call.fresh = true, call.way = way();
  py::object dq = py::none(), dk = py::none(), dv = py::none();
  if (needs[0]) dq = allocate_rows(q, n, lies_by_t(q), &call.grad_q).object;
  if (needs[1]) {
    const Result made = allocate_like(k, n.dtype, n.empty());
    dk = made.object, call.grad_k = contiguous_keys(made, k);
  }
  if (needs[2]) {
    const Result made = allocate_like(v, n.dtype, n.empty());
    dv = made.object, call.grad_v = contiguous_keys(made, v);
  }
  if (!n.empty()) run_segment(op, n, call.segment, call, prefix_attention().grad);
  return py::make_tuple(dq, dk, dv);
}

}  // namespace

void define_prefix_attention(py::module_& m) {
  using namespace py::literals;
  m.def("prefix_attention_forward", forward, "q"_a, "prefix_k"_a, "prefix_v"_a, "gate_k"_a.none(true),
        "gate_v"_a.none(true), "log_bias"_a.none(true), "gate_out"_a.none(true), "index"_a.none(true),
        "lengths"_a.none(true), "offsets"_a.none(true), "o"_a, "lse"_a, "separate"_a, "p"_a, "seed"_a.none(true),
        "scale"_a);
  m.def("prefix_attention_backward", backward, "do"_a, "q"_a, "prefix_k"_a, "prefix_v"_a, "gate_k"_a.none(true),
        "gate_v"_a.none(true), "log_bias"_a.none(true), "gate_out"_a.none(true), "index"_a.none(true),
        "lengths"_a.none(true), "offsets"_a.none(true), "o"_a.none(true), "lse"_a, "dq"_a.none(true), "separate"_a,
        "p"_a, "seed"_a.none(true), "scale"_a, "needs"_a);
  m.def("prefix_attention_tokens", tokens, "q"_a, "k"_a, "v"_a, "causal"_a, "mask"_a.none(true), "p"_a,
        "seed"_a.none(true), "scale"_a);
  m.def("prefix_attention_grad_tokens", grad_tokens, "do"_a, "q"_a, "k"_a, "v"_a, "o"_a, "lse"_a, "causal"_a,
        "mask"_a.none(true), "p"_a, "seed"_a.none(true), "scale"_a, "needs"_a);
}

}  // namespace fastpeft
