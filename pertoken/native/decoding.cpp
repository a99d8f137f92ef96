// One decoding step of a Llama-shaped model as one call: no Python between the layers, packed bfloat16 weights,
// keys and values read in place. `pertoken/rollout/fused.py` calls it, and checks its numbers against the model.
//
// Layout of one layer's weights in the list: input norm, packed qkv, qkv bias (or empty), packed o, packed gate+up,
// packed down, norm before the MLP, query norm (or empty), key norm (or empty): `kPerLayer` tensors.
// The residual stream stays float32, as it does in training under autocast; products are bfloat16.

#include "attention.h"
#include "numbers.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using pertoken::fast_exp;
using pertoken::kLanes;
using pertoken::Lanes;
using pertoken::largest;
using pertoken::load16;
using pertoken::narrow;
using pertoken::widen;
using pertoken::with_type;

constexpr int64_t kPerLayer = 9;
struct Shape {
  int64_t heads, kv_heads, width, shared, queries, columns;
  Shape(int64_t heads, int64_t kv_heads, int64_t width)
      : heads(heads), kv_heads(kv_heads), width(width), shared(heads / kv_heads), queries(heads * width),
        columns((heads + 2 * kv_heads) * width) {}
};

Tensor packed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
                       .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
                                     c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>)>();
  return op.call(x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

// residual += update (if there is one); returns the normalised residual in bfloat16.
Tensor add_and_norm(Tensor& residual, const Tensor& update, const Tensor& scale, double eps) {
  const int64_t rows = residual.size(0), width = residual.size(1);
  Tensor out = at::empty({rows, width}, residual.options().dtype(at::kBFloat16));
  float* base = residual.data_ptr<float>();
  const BFloat16* add = update.defined() ? update.const_data_ptr<BFloat16>() : nullptr;
  const float* weight = scale.const_data_ptr<float>();
  BFloat16* target = out.data_ptr<BFloat16>();
  at::parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* x = base + r * width;
      float squares = 0;
      for (int64_t i = 0; i < width; ++i) {
        if (add) x[i] += widen(add[r * width + i]);
        squares += x[i] * x[i];
      }
      const float factor = 1.0f / std::sqrt(squares / width + static_cast<float>(eps));
      for (int64_t i = 0; i < width; ++i) narrow(x[i] * factor * weight[i], target + r * width + i);
    }
  });
  return out;
}

Tensor silu_product(const Tensor& gate_up) {
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  Tensor out = at::empty({rows, width}, gate_up.options());
  const BFloat16* in = gate_up.const_data_ptr<BFloat16>();
  BFloat16* target = out.data_ptr<BFloat16>();
  at::parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const BFloat16 *gate = in + r * 2 * width, *up = gate + width;
      for (int64_t i = 0; i < width; ++i) {
        const float g = widen(gate[i]);
        narrow(g / (1.0f + fast_exp(-g)) * widen(up[i]), target + r * width + i);
      }
    }
  });
  return out;
}

// Norm (where the family has one) and rotation of one head at one position.
template <typename T>
void rotate(const BFloat16* in, const float* norm, const float* cos, const float* sin, int64_t width, double eps, T* out) {
  const int64_t half = width / 2;
  const auto turn = [&](auto number) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = number(i), b = number(i + half);
      narrow(a * cos[i] - b * sin[i], out + i);
      narrow(b * cos[i + half] + a * sin[i + half], out + i + half);
    }
  };
  if (!norm) return turn([&](int64_t i) { return widen(in[i]); });
  float squares = 0;
  for (int64_t i = 0; i < width; ++i) squares += widen(in[i]) * widen(in[i]);
  const float factor = 1.0f / std::sqrt(squares / width + static_cast<float>(eps));
  turn([&](int64_t i) { return widen(in[i]) * factor * norm[i]; });
}

const float* maybe(const Tensor& t) { return t.numel() ? t.const_data_ptr<float>() : nullptr; }

// Keys lie in blocks of kLanes positions, [blocks, width, kLanes]: a block's scores are one vector, without sums across it.
inline int64_t blocks_of(int64_t count) { return (count + kLanes - 1) / kLanes; }

inline BFloat16* key_at(BFloat16* keys, int64_t position, int64_t width) {
  return keys + position / kLanes * width * kLanes + position % kLanes;  // the next number is kLanes further
}

// Scores of `count` keys for G queries of their head; scores[g * stride + j].
template <int G>
void add_scores_of(const float* queries, const BFloat16* keys, int64_t count, int64_t width, float scale, float* scores,
                   int64_t stride) {
  for (int64_t first = 0; first < count; first += kLanes, keys += width * kLanes) {
    Lanes totals[G] = {};
    for (int64_t i = 0; i < width; ++i) {
      const Lanes key = load16(keys + i * kLanes);
      for (int g = 0; g < G; ++g) totals[g] += queries[g * width + i] * key;
    }
    const int64_t here = std::min<int64_t>(kLanes, count - first);
    for (int g = 0; g < G; ++g)
      for (int64_t j = 0; j < here; ++j) scores[g * stride + first + j] = totals[g][j] * scale;
  }
}

void add_scores(const float* queries, const BFloat16* keys, int64_t count, int64_t shared, int64_t width, float scale,
                float* scores, int64_t stride) {
  for (int64_t g = 0; g < shared; g += 4, queries += 4 * width, scores += 4 * stride) {
    switch (std::min<int64_t>(4, shared - g)) {
      case 1: add_scores_of<1>(queries, keys, count, width, scale, scores, stride); break;
      case 2: add_scores_of<2>(queries, keys, count, width, scale, scores, stride); break;
      case 3: add_scores_of<3>(queries, keys, count, width, scale, scores, stride); break;
      default: add_scores_of<4>(queries, keys, count, width, scale, scores, stride);
    }
  }
}

// out[g] += sum over j of weights[g * stride + j] * values[j], for G queries of a head and W vectors of their width.
template <int G, int W>
void add_values_of(const float* weights, const BFloat16* values, int64_t count, int64_t width, int64_t stride,
                   float* out) {
  Lanes totals[G][W] = {};
  for (int64_t j = 0; j < count; ++j)
    for (int w = 0; w < W; ++w) {
      const Lanes value = load16(values + j * width + w * kLanes);
      for (int g = 0; g < G; ++g) totals[g][w] += weights[g * stride + j] * value;
    }
  for (int g = 0; g < G; ++g)
    for (int w = 0; w < W; ++w) *reinterpret_cast<Lanes*>(out + g * width + w * kLanes) += totals[g][w];
}

template <int W>
void add_values_in(const float* weights, const BFloat16* values, int64_t count, int64_t shared, int64_t width,
                   int64_t stride, float* out) {
  for (int64_t g = 0; g < shared; g += 4, weights += 4 * stride, out += 4 * width) {
    switch (std::min<int64_t>(4, shared - g)) {
      case 1: add_values_of<1, W>(weights, values, count, width, stride, out); break;
      case 2: add_values_of<2, W>(weights, values, count, width, stride, out); break;
      case 3: add_values_of<3, W>(weights, values, count, width, stride, out); break;
      default: add_values_of<4, W>(weights, values, count, width, stride, out);
    }
  }
}

void add_values(const float* weights, const BFloat16* values, int64_t count, int64_t shared, int64_t width,
                int64_t stride, float* out) {
  int64_t first = 0;
  for (; first + 4 * kLanes <= width; first += 4 * kLanes)
    add_values_in<4>(weights, values + first, count, shared, width, stride, out + first);
  for (; first < width; first += kLanes)
    add_values_in<1>(weights, values + first, count, shared, width, stride, out + first);
}

struct Memory {  // of one layer
  std::vector<const BFloat16*> prompt_keys, prompt_values;  // by row: [kv_heads, blocks of keys], [kv_heads, length, width]
  std::vector<int64_t> prompt_lengths;
  BFloat16 *own_keys, *own_values;  // the same by slot, for `capacity` positions, with `slot_stride` between slots
  int64_t slot_stride, capacity;
};

// Rotates, stores the new key and value, and attends; one task for each row and key head.
Tensor attend_step(const Tensor& qkv, const Memory& memory, const Tensor& positions, const Tensor& cos,
                   const Tensor& sin, const float* query_norm, const float* key_norm, double eps, const Shape& s) {
  const int64_t rows = qkv.size(0);
  Tensor out = at::empty({rows, s.queries}, qkv.options());
  const BFloat16* in = qkv.const_data_ptr<BFloat16>();
  BFloat16* target = out.data_ptr<BFloat16>();
  const int64_t* at_position = positions.const_data_ptr<int64_t>();
  const float *cosines = cos.const_data_ptr<float>(), *sines = sin.const_data_ptr<float>();
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.width));
  at::parallel_for(0, rows * s.kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> queries(s.shared * s.width), rotated(s.width), result(s.shared * s.width), scores;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t r = task / s.kv_heads, h = task % s.kv_heads, position = at_position[r];
      const int64_t prompt = memory.prompt_lengths[r], own = position - prompt, count = position + 1;
      const float *c = cosines + position * s.width, *n = sines + position * s.width;
      const BFloat16* row = in + r * s.columns;
      for (int64_t g = 0; g < s.shared; ++g)
        rotate(row + (h * s.shared + g) * s.width, query_norm, c, n, s.width, eps, queries.data() + g * s.width);
      BFloat16* keys = memory.own_keys + r * memory.slot_stride + h * memory.capacity * s.width;
      BFloat16* values = memory.own_values + r * memory.slot_stride + h * memory.capacity * s.width;
      rotate(row + s.queries + h * s.width, key_norm, c, n, s.width, eps, rotated.data());
      for (int64_t i = 0; i < s.width; ++i) {
        narrow(rotated[i], key_at(keys, own, s.width) + i * kLanes);
        values[own * s.width + i] = row[s.queries + (s.kv_heads + h) * s.width + i];
      }
      scores.resize(s.shared * count);
      const int64_t before = h * prompt * s.width, blocks_before = h * blocks_of(prompt) * kLanes * s.width;
      add_scores(queries.data(), memory.prompt_keys[r] + blocks_before, prompt, s.shared, s.width, scale, scores.data(), count);
      add_scores(queries.data(), keys, own + 1, s.shared, s.width, scale, scores.data() + prompt, count);
      for (int64_t g = 0; g < s.shared; ++g) {
        float *p = scores.data() + g * count, top = p[0], mass = 0;
        for (int64_t j = 1; j < count; ++j) top = std::max(top, p[j]);
        for (int64_t j = 0; j < count; ++j) mass += p[j] = fast_exp(p[j] - top);
        for (int64_t j = 0; j < count; ++j) p[j] /= mass;
      }
      std::fill(result.begin(), result.end(), 0.0f);
      add_values(scores.data(), memory.prompt_values[r] + before, prompt, s.shared, s.width, count, result.data());
      add_values(scores.data() + prompt, values, own + 1, s.shared, s.width, count, result.data());
      for (int64_t i = 0; i < s.shared * s.width; ++i)
        narrow(result[i], target + r * s.queries + h * s.shared * s.width + i);
    }
  });
  return out;
}

template <typename Attend>
Tensor run_layers(const Tensor& ids, const Tensor& embedding, const std::vector<Tensor>& weights,
                  const Tensor& last_norm, double eps, Attend attend) {
  Tensor residual = embedding.index_select(0, ids).to(at::kFloat);
  Tensor update;
  for (size_t layer = 0; layer * kPerLayer < weights.size(); ++layer) {
    const Tensor* w = weights.data() + layer * kPerLayer;
    std::optional<Tensor> bias;
    if (w[2].numel()) bias = w[2];
    Tensor x = add_and_norm(residual, update, w[0], eps);
    update = packed_linear(attend(layer, packed_linear(x, w[1], bias), maybe(w[7]), maybe(w[8])), w[3], std::nullopt);
    x = add_and_norm(residual, update, w[6], eps);
    update = packed_linear(silu_product(packed_linear(x, w[4], std::nullopt)), w[5], std::nullopt);
  }
  return add_and_norm(residual, update, last_norm, eps);
}

// Last hidden states [R, H] after one more token in each of the first R slots.
//   prompt_keys: by row [layers, kv_heads, blocks, width, kLanes], prompt_values: [layers, kv_heads, length, width];
//   own: both the same behind [slots, layers, kv_heads], for C positions, which kLanes divides
Tensor step(const Tensor& ids, const Tensor& positions, const Tensor& embedding, const std::vector<Tensor>& weights,
            const Tensor& last_norm, const Tensor& cos, const Tensor& sin, const std::vector<Tensor>& prompt_keys,
            const std::vector<Tensor>& prompt_values, Tensor own_keys, Tensor own_values, int64_t heads, double eps) {
  const Shape s(heads, own_values.size(2), own_values.size(4));
  const int64_t layer_stride = own_values.stride(1);
  return run_layers(ids, embedding, weights, last_norm, eps,
                    [&](size_t layer, const Tensor& qkv, const float* query_norm, const float* key_norm) {
                      Memory memory{{}, {}, {}, own_keys.data_ptr<BFloat16>() + layer * layer_stride,
                                    own_values.data_ptr<BFloat16>() + layer * layer_stride, own_values.stride(0),
                                    own_values.size(3)};
                      for (size_t r = 0; r < prompt_keys.size(); ++r) {
                        const auto at_layer = [&](const Tensor& t) {
                          return t.const_data_ptr<BFloat16>() + layer * t.stride(0);
                        };
                        memory.prompt_keys.push_back(at_layer(prompt_keys[r]));
                        memory.prompt_values.push_back(at_layer(prompt_values[r]));
                        memory.prompt_lengths.push_back(prompt_values[r].size(2));
                      }
                      return attend_step(qkv, memory, positions, cos, sin, query_norm, key_norm, eps, s);
                    });
}

// Last hidden states [n, H] of n prompts, whose `ids` stand one behind another; the keys and values of each go into its
// keys [layers, kv_heads, blocks, width, kLanes] and values [layers, kv_heads, length, width].
Tensor prefill(const Tensor& ids, const Tensor& embedding, const std::vector<Tensor>& weights, const Tensor& last_norm,
               const Tensor& cos, const Tensor& sin, const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
               int64_t heads, double eps) {
  const int64_t total = ids.size(0);
  const Shape s(heads, values[0].size(1), values[0].size(3));
  std::vector<int64_t> positions, lasts, rows;
  for (const Tensor& v : values) {
    rows.insert(rows.end(), {static_cast<int64_t>(positions.size()), v.size(2), -1});
    for (int64_t t = 0; t < v.size(2); ++t) positions.push_back(t);
    lasts.push_back(static_cast<int64_t>(positions.size()) - 1);
  }
  TORCH_CHECK(static_cast<int64_t>(positions.size()) == total, "prompts of ", positions.size(), " tokens, but ", total);
  const Tensor sequences = at::tensor(rows, ids.options()).view({-1, 3});
  Tensor hidden = run_layers(
      ids, embedding, weights, last_norm, eps,
      [&](size_t layer, const Tensor& qkv, const float* query_norm, const float* key_norm) {
        Tensor q = at::empty({total, heads, s.width}, qkv.options());
        Tensor k = at::empty({total, s.kv_heads, s.width}, qkv.options());
        const BFloat16* in = qkv.const_data_ptr<BFloat16>();
        BFloat16 *to_q = q.data_ptr<BFloat16>(), *to_k = k.data_ptr<BFloat16>();
        const float *cosines = cos.const_data_ptr<float>(), *sines = sin.const_data_ptr<float>();
        at::parallel_for(0, total, 8, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t)
            for (int64_t h = 0; h < heads + s.kv_heads; ++h) {
              const bool query = h < heads;
              BFloat16* out = query ? to_q + (t * heads + h) * s.width : to_k + (t * s.kv_heads + h - heads) * s.width;
              rotate(in + t * s.columns + h * s.width, query ? query_norm : key_norm, cosines + positions[t] * s.width,
                     sines + positions[t] * s.width, s.width, eps, out);
            }
        });
        Tensor v = qkv.narrow(1, s.queries + s.kv_heads * s.width, s.kv_heads * s.width)
                       .reshape({total, s.kv_heads, s.width})
                       .contiguous();
        int64_t start = 0;
        for (size_t p = 0; p < values.size(); ++p) {
          const int64_t length = values[p].size(2), blocks = blocks_of(length);
          const auto by_head = [&](const Tensor& t) { return t.narrow(0, start, length).transpose(0, 1); };
          keys[p][layer].copy_(at::constant_pad_nd(by_head(k), {0, 0, 0, blocks * kLanes - length})
                                   .view({s.kv_heads, blocks, kLanes, s.width})
                                   .transpose(2, 3));
          values[p][layer].copy_(by_head(v));
          start += length;
        }
        const double scale = 1.0 / std::sqrt(static_cast<double>(s.width));
        Tensor out = std::get<0>(pertoken::attend(q, k, v, sequences, 0, scale)).view({total, s.queries});
        return out;
      });
  return hidden.index_select(0, at::tensor(lasts, ids.options()));
}

// Inverse-CDF draws from softmax(logits / temperature), one uniform per row: ids, log-probs and entropies (nats). At
// temperature 0 the first of the most probable ids, as softmax(logits) has them.
std::tuple<Tensor, Tensor, Tensor> sample(const Tensor& logits, double temperature, const Tensor& uniforms) {
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  Tensor ids = at::empty({rows}, logits.options().dtype(at::kLong));
  Tensor logprobs = at::empty({rows}, logits.options().dtype(at::kDouble));
  Tensor entropies = at::empty({rows}, logits.options().dtype(at::kDouble));
  const double* points = uniforms.const_data_ptr<double>();
  const bool greedy = temperature == 0;
  const float warmth = greedy ? 1.0 : 1.0 / temperature;
  with_type(logits, [&](auto kind) {
    using T = decltype(kind);
    const T* in = logits.const_data_ptr<T>();
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      constexpr int64_t kBlock = 256;
      std::vector<float> p(vocabulary);
      std::vector<double> mass((vocabulary + kBlock - 1) / kBlock);
      for (int64_t r = begin; r < end; ++r) {
        const T* z = in + r * vocabulary;
        const float top = largest(z, vocabulary);
        double total = 0, moment = 0;
        for (size_t block = 0; block < mass.size(); ++block) {
          const int64_t first = block * kBlock, last = std::min(vocabulary, first + kBlock);
          float weight = 0, weighted = 0;
          for (int64_t i = first; i < last; ++i) {
            const float x = (widen(z[i]) - top) * warmth;
            p[i] = fast_exp(x);
            weight += p[i];
            weighted += p[i] * x;
          }
          mass[block] = weight;
          total += weight;
          moment += weighted;
        }
        double point = points[r] * total;
        size_t block = 0;
        while (block + 1 < mass.size() && point >= mass[block]) point -= mass[block++];
        const int64_t first = block * kBlock, last = std::min(vocabulary, first + kBlock);
        int64_t chosen = first;
        for (int64_t i = first; i < last && !greedy; ++i) {
          if (p[i] > 0) chosen = i;
          if (point < p[i]) break;
          point -= p[i];
        }
        if (greedy)
          for (chosen = 0; chosen + 1 < vocabulary && widen(z[chosen]) != top;) ++chosen;
        ids.data_ptr<int64_t>()[r] = chosen;
        const double log_total = std::log(total);
        logprobs.data_ptr<double>()[r] = (widen(z[chosen]) - top) * warmth - log_total;
        entropies.data_ptr<double>()[r] = log_total - moment / total;
      }
    });
  });
  return {ids, logprobs, entropies};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pertoken, m) {
  m.def("step", &step);
  m.def("prefill", &prefill);
  m.def("sample", &sample);
}
