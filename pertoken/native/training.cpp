// What stands between the matrix products of a training pass, forward and backward, each in one sweep over memory:
// the softmax behind the head, RMS norms, gated activations, rotation. Sums are float32 or wider, whatever the tensors are.
// `pertoken/policy/head.py` and `layers.py` have the same in plain torch, and the derivations.

#include "numbers.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>

namespace {

using at::BFloat16;
using at::Tensor;
using pertoken::fast_exp;
using pertoken::largest;
using pertoken::narrow;
using pertoken::widen;
using pertoken::with_type;

constexpr int64_t kBlock = 1024;  // numbers that are added up in float32 before their sum goes into a double

// --- head -------------------------------------------------------------------------------------------------

// Of softmax(logits / temperature), row by row: log-prob of the target, log of the normaliser, entropy (nats).
std::tuple<Tensor, Tensor, Tensor> softmax_at(const Tensor& logits, const Tensor& targets, double temperature) {
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  const auto options = logits.options().dtype(at::kFloat);
  Tensor logprobs = at::empty({rows}, options), totals = at::empty({rows}, options), entropies = at::empty({rows}, options);
  float *to_logprob = logprobs.data_ptr<float>(), *to_total = totals.data_ptr<float>(),
        *to_entropy = entropies.data_ptr<float>();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const float warmth = 1.0 / temperature;
  with_type(logits, [&](auto kind) {
    using T = decltype(kind);
    const T* base = logits.const_data_ptr<T>();
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* z = base + r * vocabulary;
        const float top = largest(z, vocabulary);
        double mass = 0, moment = 0;
        for (int64_t first = 0; first < vocabulary; first += kBlock) {
          const int64_t last = std::min(vocabulary, first + kBlock);
          float weight = 0, weighted = 0;
          for (int64_t i = first; i < last; ++i) {
            const float x = (widen(z[i]) - top) * warmth, p = fast_exp(x);
            weight += p;
            weighted += p * x;
          }
          mass += weight;
          moment += weighted;
        }
        const double log_mass = std::log(mass);
        to_logprob[r] = static_cast<double>(widen(z[target[r]]) - top) * warmth - log_mass;
        to_total[r] = static_cast<double>(top) * warmth + log_mass;
        to_entropy[r] = log_mass - moment / mass;
      }
    });
  });
  return {logprobs, totals, entropies};
}

// Turns logits into the gradient of sum(by_logprob * logprob + by_entropy * entropy), in place.
void softmax_gradient_(Tensor logits, const Tensor& targets, const Tensor& totals, const Tensor& entropies,
                       const Tensor& by_logprob, const Tensor& by_entropy, double temperature) {
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const float *total = totals.const_data_ptr<float>(), *entropy = entropies.const_data_ptr<float>(),
              *l = by_logprob.const_data_ptr<float>(), *e = by_entropy.const_data_ptr<float>();
  const float warmth = 1.0 / temperature;
  with_type(logits, [&](auto kind) {
    using T = decltype(kind);
    T* base = logits.data_ptr<T>();
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* z = base + r * vocabulary;
        const float shift = total[r], h = entropy[r], by_l = l[r], by_e = e[r];
        const auto gradient = [&](float logit) {
          const float logp = logit * warmth - shift;
          return -(by_l + by_e * (logp + h)) * fast_exp(logp) * warmth;
        };
        const float chosen = gradient(widen(z[target[r]])) + by_l * warmth;
        for (int64_t i = 0; i < vocabulary; ++i) narrow(gradient(widen(z[i])), z + i);
        narrow(chosen, z + target[r]);
      }
    });
  });
}

// --- RMS norm ---------------------------------------------------------------------------------------------

// weight * x / sqrt(mean(x^2) + eps) over the last dimension, in the type `like`; and 1 / sqrt(...) of each row.
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, at::ScalarType like) {
  const int64_t width = x.size(-1), rows = x.numel() / width;
  Tensor out = at::empty(x.sizes(), x.options().dtype(like)), factors = at::empty({rows}, weight.options());
  const float* scale = weight.const_data_ptr<float>();
  float* to_factor = factors.data_ptr<float>();
  with_type(x, [&](auto in_kind) {
    with_type(out, [&](auto out_kind) {
      using In = decltype(in_kind);
      using Out = decltype(out_kind);
      const In* from = x.const_data_ptr<In>();
      Out* to = out.data_ptr<Out>();
      at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const In* in = from + r * width;
          float squares = 0;
          for (int64_t i = 0; i < width; ++i) squares += widen(in[i]) * widen(in[i]);
          const float factor = 1.0f / std::sqrt(squares / width + static_cast<float>(eps));
          to_factor[r] = factor;
          for (int64_t i = 0; i < width; ++i) narrow(widen(in[i]) * factor * scale[i], to + r * width + i);
        }
      });
    });
  });
  return {out, factors};
}

// With y = w f x and f = 1 / sqrt(mean(x^2) + eps):  dx = f (w dy - x f^2 mean(w dy x)),  dw = sum over rows of dy f x.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& gradient, const Tensor& x, const Tensor& weight,
                                             const Tensor& factors) {
  const int64_t width = x.size(-1), rows = x.numel() / width;
  Tensor to_x = at::empty(x.sizes(), x.options());
  const int threads = at::get_num_threads();
  Tensor shares = at::zeros({threads, width}, weight.options());
  const float *scale = weight.const_data_ptr<float>(), *factor = factors.const_data_ptr<float>();
  with_type(x, [&](auto in_kind) {
    with_type(gradient, [&](auto out_kind) {
      using In = decltype(in_kind);
      using Out = decltype(out_kind);
      const In* from = x.const_data_ptr<In>();
      const Out* by = gradient.const_data_ptr<Out>();
      In* to = to_x.data_ptr<In>();
      at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
        float* share = shares.data_ptr<float>() + at::get_thread_num() * width;
        for (int64_t r = begin; r < end; ++r) {
          const In* in = from + r * width;
          const Out* dy = by + r * width;
          const float f = factor[r];
          float along = 0;
          for (int64_t i = 0; i < width; ++i) {
            const float product = widen(dy[i]) * widen(in[i]);
            along += product * scale[i];
            share[i] += product * f;
          }
          along *= f * f / width;
          for (int64_t i = 0; i < width; ++i)
            narrow(f * (scale[i] * widen(dy[i]) - widen(in[i]) * along), to + r * width + i);
        }
      });
    });
  });
  return {to_x, shares.sum(0)};
}

// --- gated activation ---------------------------------------------------------------------------------------

// silu(gate) * up
Tensor gated_silu(const Tensor& gate, const Tensor& up) {
  Tensor out = at::empty(gate.sizes(), gate.options());
  with_type(gate, [&](auto kind) {
    using T = decltype(kind);
    const T *g = gate.const_data_ptr<T>(), *u = up.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    at::parallel_for(0, gate.numel(), 8192, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float x = widen(g[i]);
        narrow(x / (1.0f + fast_exp(-x)) * widen(u[i]), to + i);
      }
    });
  });
  return out;
}

// With s = sigmoid(g):  dg = dy u s (1 + g (1 - s)),  du = dy g s.
std::tuple<Tensor, Tensor> gated_silu_backward(const Tensor& gradient, const Tensor& gate, const Tensor& up) {
  Tensor to_gate = at::empty(gate.sizes(), gate.options()), to_up = at::empty(up.sizes(), up.options());
  with_type(gate, [&](auto kind) {
    using T = decltype(kind);
    const T *by = gradient.const_data_ptr<T>(), *g = gate.const_data_ptr<T>(), *u = up.const_data_ptr<T>();
    T *dg = to_gate.data_ptr<T>(), *du = to_up.data_ptr<T>();
    at::parallel_for(0, gate.numel(), 8192, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float x = widen(g[i]), dy = widen(by[i]), s = 1.0f / (1.0f + fast_exp(-x));
        narrow(dy * widen(u[i]) * s * (1.0f + x * (1.0f - s)), dg + i);
        narrow(dy * x * s, du + i);
      }
    });
  });
  return {to_gate, to_up};
}

// --- rotation -----------------------------------------------------------------------------------------------

// Rotary position embedding of x [N, heads, D] by cos and sin [N, D], the halves of D in pairs; `back` turns the other
// way, which is the gradient. Out comes the type `like`, [N, heads, D].
Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back, at::ScalarType like) {
  const int64_t cells = x.size(0), heads = x.size(1), width = x.size(2), half = width / 2;
  TORCH_CHECK(x.stride(2) == 1 && cos.is_contiguous() && sin.is_contiguous());
  Tensor out = at::empty({cells, heads, width}, x.options().dtype(like));
  const float *cosines = cos.const_data_ptr<float>(), *sines = sin.const_data_ptr<float>();
  with_type(x, [&](auto in_kind) {
    with_type(out, [&](auto out_kind) {
      const auto* base = x.const_data_ptr<decltype(in_kind)>();
      auto* to = out.data_ptr<decltype(out_kind)>();
      at::parallel_for(0, cells, 16, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const float *c = cosines + t * width, *s = sines + t * width;
          for (int64_t h = 0; h < heads; ++h) {
            const auto* in = base + t * x.stride(0) + h * x.stride(1);
            auto* o = to + (t * heads + h) * width;
            if (back) {
              for (int64_t i = 0; i < half; ++i) {
                const float a = widen(in[i]), b = widen(in[i + half]);
                narrow(a * c[i] + b * s[i + half], o + i);
                narrow(b * c[i + half] - a * s[i], o + i + half);
              }
            } else {
              for (int64_t i = 0; i < half; ++i) {
                const float a = widen(in[i]), b = widen(in[i + half]);
                narrow(a * c[i] - b * s[i], o + i);
                narrow(b * c[i + half] + a * s[i + half], o + i + half);
              }
            }
          }
        }
      });
    });
  });
  return out;
}

// --- gradients ----------------------------------------------------------------------------------------------

// total += share, of another type, without a copy of it in that of the total.
void add_(Tensor total, const Tensor& share) {
  TORCH_CHECK(total.is_contiguous() && share.is_contiguous() && total.sizes() == share.sizes());
  with_type(total, [&](auto total_kind) {
    with_type(share, [&](auto share_kind) {
      auto* to = total.data_ptr<decltype(total_kind)>();
      const auto* from = share.const_data_ptr<decltype(share_kind)>();
      at::parallel_for(0, total.numel(), 8192, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) narrow(widen(to[i]) + widen(from[i]), to + i);
      });
    });
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pertoken, m) {
  m.def("rotate", &rotate);
  m.def("add_", &add_);
  m.def("softmax_at", &softmax_at);
  m.def("softmax_gradient_", &softmax_gradient_);
  m.def("rms_norm", &rms_norm);
  m.def("rms_norm_backward", &rms_norm_backward);
  m.def("gated_silu", &gated_silu);
  m.def("gated_silu_backward", &gated_silu_backward);
}
