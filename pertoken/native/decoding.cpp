// One decoding step of a Llama-shaped model as one call: no Python between the layers, packed bfloat16 weights,
// keys and values read in place. `pertoken/rollout/fused.py` calls it, and checks its numbers against the model.
//
// Layout of one layer's weights in the list: input norm, packed qkv, qkv bias (or empty), packed o, packed gate+up,
// packed down, norm before the MLP, query norm (or empty), key norm (or empty): `kPerLayer` tensors.
// The residual stream stays float32, as it does in training under autocast; products are bfloat16.

#include "attention.h"
#include "numbers.h"
#include "products.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cmath>
#include <type_traits>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using pertoken::add_products;
using pertoken::fast_exp;
using pertoken::kLanes;
using pertoken::kPair;
using pertoken::Lanes;
using pertoken::largest;
using pertoken::load_pairs;
using pertoken::narrow;
using pertoken::same_pair;
using pertoken::widen;
using pertoken::with_type;
using pertoken::Words;

constexpr int64_t kPerLayer = 9;
struct Shape {
  int64_t heads, kv_heads, width, shared, queries, columns;
  Shape(int64_t heads, int64_t kv_heads, int64_t width)
      : heads(heads), kv_heads(kv_heads), width(width), shared(heads / kv_heads), queries(heads * width),
        columns((heads + 2 * kv_heads) * width) {}
};

// `weight`: in panels (products.cpp), or as oneDNN packs it.
Tensor packed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (!weight.is_mkldnn()) return pertoken::multiply(x, weight, bias);
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

// Keys and values lie so that a dot product of pairs of bfloat16 numbers goes through them from end to end, without sums
// across a vector: keys in blocks of kLanes positions, [blocks, width / 2, kLanes, 2]; values [pairs of positions, width, 2].
inline int64_t blocks_of(int64_t count) { return (count + kLanes - 1) / kLanes; }

void put_key(const BFloat16* key, int64_t position, int64_t width, BFloat16* keys) {
  BFloat16* to = keys + position / kLanes * width * kLanes + position % kLanes * kPair;
  for (int64_t i = 0; i < width; ++i) to[i / kPair * kLanes * kPair + i % kPair] = key[i];
}

void put_value(const BFloat16* value, int64_t position, int64_t width, BFloat16* values) {
  BFloat16* to = values + position / kPair * width * kPair;
  const bool second = position % kPair;
  for (int64_t i = 0; i < width; ++i) {
    to[i * kPair + second] = value[i];
    if (!second) to[i * kPair + 1] = 0;  // its weight is 0 until there is a value, and 0 times what memory held may be NaN
  }
}

// Scores of B blocks of keys for G queries of their head; scores[g * stride + j].
template <int G, int B>
void score_blocks(const BFloat16* queries, const BFloat16* keys, const BFloat16* next, int64_t width, float scale,
                  float* scores, int64_t stride) {
  Lanes totals[G][B] = {};
  for (int64_t i = 0; i < width; i += kPair)
    for (int b = 0; b < B; ++b) {
      const int64_t at = b * width * kLanes + i * kLanes;
      const Words key = load_pairs(keys + at);
      __builtin_prefetch(next + at);
      for (int g = 0; g < G; ++g) totals[g][b] = add_products(totals[g][b], key, same_pair(queries + g * width + i));
    }
  for (int g = 0; g < G; ++g)
    for (int b = 0; b < B; ++b) *reinterpret_cast<Lanes*>(scores + g * stride + b * kLanes) = totals[g][b] * scale;
}

// Scores of the first `count` keys, and -inf up to the end of the last block.
template <int G>
void score_keys(const BFloat16* queries, const BFloat16* keys, const BFloat16* next, int64_t count, int64_t width,
                float scale, float* scores, int64_t stride) {
  constexpr int kAtOnce = 4;  // blocks: with fewer sums side by side each waits for the one before
  const int64_t blocks = blocks_of(count), size = kLanes * width;
  int64_t block = 0;
  for (; block + kAtOnce <= blocks; block += kAtOnce)
    score_blocks<G, kAtOnce>(queries, keys + block * size, next + block * size, width, scale, scores + block * kLanes, stride);
  for (; block < blocks; ++block)
    score_blocks<G, 1>(queries, keys + block * size, next + block * size, width, scale, scores + block * kLanes, stride);
  for (int g = 0; g < G; ++g)
    for (int64_t j = count; j < blocks * kLanes; ++j) scores[g * stride + j] = -INFINITY;
}

// out[g] += sum over j of weights[g * stride + j] * values[j], for G queries of a head and W vectors of their width.
template <int G, int W>
void add_values_of(const BFloat16* weights, const BFloat16* values, const BFloat16* next, int64_t count, int64_t width,
                   int64_t stride, float* out) {
  Lanes totals[G][W] = {};
  for (int64_t j = 0; j < count; j += kPair, values += width * kPair, next += width * kPair)
    for (int w = 0; w < W; ++w) {
      const Words value = load_pairs(values + w * kLanes * kPair);
      __builtin_prefetch(next + w * kLanes * kPair);
      for (int g = 0; g < G; ++g) totals[g][w] = add_products(totals[g][w], value, same_pair(weights + g * stride + j));
    }
  for (int g = 0; g < G; ++g)
    for (int w = 0; w < W; ++w) *reinterpret_cast<Lanes*>(out + g * width + w * kLanes) += totals[g][w];
}

template <int G>
void add_values(const BFloat16* weights, const BFloat16* values, const BFloat16* next, int64_t count, int64_t width,
                int64_t stride, float* out) {
  int64_t first = 0;
  for (; first + 4 * kLanes <= width; first += 4 * kLanes)
    add_values_of<G, 4>(weights, values + first * kPair, next + first * kPair, count, width, stride, out + first);
  for (; first < width; first += kLanes)
    add_values_of<G, 1>(weights, values + first * kPair, next + first * kPair, count, width, stride, out + first);
}

// work(first, integral_constant of how many): queries that share a key head, as many at once as registers hold.
constexpr int64_t kMostQueries = 4;
template <typename Work>
void in_portions(int64_t shared, Work work) {
  for (int64_t g = 0; g < shared; g += kMostQueries) {
    switch (std::min(kMostQueries, shared - g)) {
      case 1: work(g, std::integral_constant<int, 1>()); break;
      case 2: work(g, std::integral_constant<int, 2>()); break;
      case 3: work(g, std::integral_constant<int, 3>()); break;
      default: work(g, std::integral_constant<int, kMostQueries>());
    }
  }
}

// Of a row, in one layer and head. More time goes by waiting for memory than by computing, so that while keys are read
// their values are called for, and while values are read the keys that come `next`.
struct Part {
  const BFloat16 *keys, *values, *next;
  int64_t count;
};

// What G queries of a head see of a row: attention over its prompt and its own part. `scores` and `weights` are room.
template <int G>
void attend_parts(const BFloat16* queries, const Part (&parts)[2], int64_t width, float scale, std::vector<float>& scores,
                  std::vector<BFloat16>& weights, float* out) {
  const int64_t firsts[2] = {0, blocks_of(parts[0].count) * kLanes};
  const int64_t stride = firsts[1] + blocks_of(parts[1].count) * kLanes;
  scores.resize(G * stride);
  weights.resize(G * stride);
  for (int k = 0; k < 2; ++k)
    score_keys<G>(queries, parts[k].keys, parts[k].values, parts[k].count, width, scale, scores.data() + firsts[k], stride);
  float masses[G];
  for (int g = 0; g < G; ++g) {
    const float *z = scores.data() + g * stride, top = largest(z, stride);
    BFloat16* weight = weights.data() + g * stride;
    float mass = 0;
    for (int64_t j = 0; j < stride; ++j) {
      const float p = fast_exp(z[j] - top);
      mass += p;
      narrow(p, weight + j);
    }
    masses[g] = mass;
  }
  std::fill(out, out + G * width, 0.0f);
  for (int k = 0; k < 2; ++k)
    add_values<G>(weights.data() + firsts[k], parts[k].values, parts[k].next, parts[k].count, width, stride, out);
  for (int g = 0; g < G; ++g)
    for (int64_t i = 0; i < width; ++i) out[g * width + i] /= masses[g];
}

struct Memory {  // of one layer
  std::vector<const BFloat16*> prompt_keys, prompt_values;  // by row, heads one behind another
  const int64_t* prompt_lengths;
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
    std::vector<BFloat16> queries(s.shared * s.width), key(s.width), weights;
    std::vector<float> result(s.shared * s.width), scores;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t r = task / s.kv_heads, h = task % s.kv_heads, position = at_position[r];
      const int64_t prompt = memory.prompt_lengths[r], own = position - prompt;
      const float *c = cosines + position * s.width, *n = sines + position * s.width;
      const BFloat16* row = in + r * s.columns;
      for (int64_t g = 0; g < s.shared; ++g)
        rotate(row + (h * s.shared + g) * s.width, query_norm, c, n, s.width, eps, queries.data() + g * s.width);
      rotate(row + s.queries + h * s.width, key_norm, c, n, s.width, eps, key.data());
      const auto own_at = [&](BFloat16* memory_of, int64_t row, int64_t head) {
        return memory_of + row * memory.slot_stride + head * memory.capacity * s.width;
      };
      const auto in_prompt = [&](int64_t row, int64_t head) {
        return head * blocks_of(memory.prompt_lengths[row]) * kLanes * s.width;
      };
      BFloat16 *keys = own_at(memory.own_keys, r, h), *values = own_at(memory.own_values, r, h);
      put_key(key.data(), own, s.width, keys);
      put_value(row + s.queries + (s.kv_heads + h) * s.width, own, s.width, values);
      const int64_t then = std::min(task + 1, end - 1), r_then = then / s.kv_heads, h_then = then % s.kv_heads;
      const Part parts[2] = {
          {memory.prompt_keys[r] + in_prompt(r, h), memory.prompt_values[r] + in_prompt(r, h),
           memory.prompt_keys[r_then] + in_prompt(r_then, h_then), prompt},
          {keys, values, own_at(memory.own_keys, r_then, h_then), own + 1}};
      in_portions(s.shared, [&](int64_t g, auto here) {
        attend_parts<decltype(here)::value>(queries.data() + g * s.width, parts, s.width, scale, scores, weights,
                                            result.data() + g * s.width);
      });
      for (int64_t i = 0; i < s.shared * s.width; ++i)
        narrow(result[i], target + r * s.queries + h * s.shared * s.width + i);
    }
  });
  return out;
}

// Sums over `width` numbers of T, one for each of G queries.
template <int G, typename T>
PERTOKEN_INLINE void dot(const float* queries, const T* key, int64_t width, float* out) {
  float sums[G] = {};
  for (int64_t i = 0; i < width; ++i) {
    const float number = widen(key[i]);
    for (int g = 0; g < G; ++g) sums[g] += queries[g * width + i] * number;
  }
  for (int g = 0; g < G; ++g) out[g] = sums[g];
}

// What G queries of a head see of keys [low, high) and their values; `scores` is room for G * high numbers.
template <int G, typename T>
void attend_plain(const float* queries, const T* keys, const T* values, int64_t low, int64_t high, int64_t width,
                  int64_t v_width, float scale, float* scores, float* out) {
  for (int64_t j = low; j < high; ++j) {
    float here[G];
    dot<G>(queries, keys + j * width, width, here);
    for (int g = 0; g < G; ++g) scores[g * high + j] = here[g] * scale;
  }
  float factors[G];
  for (int g = 0; g < G; ++g) {
    float *z = scores + g * high, top = largest(z + low, high - low), mass = 0;
    for (int64_t j = low; j < high; ++j) mass += z[j] = fast_exp(z[j] - top);
    factors[g] = 1.0f / mass;
  }
  std::fill(out, out + G * v_width, 0.0f);
  for (int64_t j = low; j < high; ++j)
    for (int64_t i = 0; i < v_width; ++i) {
      const float number = widen(values[j * v_width + i]);
      for (int g = 0; g < G; ++g) out[g * v_width + i] += scores[g * high + j] * number;
    }
  for (int g = 0; g < G; ++g)
    for (int64_t i = 0; i < v_width; ++i) out[g * v_width + i] *= factors[g];
}

// Puts the new key and value of each of R rows behind the `before` ones that its slot holds, and attends to them all, or
// to the last `window` if that is not 0: [R, Hq, Dv]. For any model; `step` has a layout of its own.
//   q: [R, Hq, D], k: [R, Hk, D], v: [R, Hk, Dv], before: [R], keys: [slots, Hk, L, D], values: [slots, Hk, L, Dv]
Tensor attend_slots(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& before, Tensor keys, Tensor values,
                    int64_t window, double scale) {
  const int64_t rows = q.size(0), kv_heads = keys.size(1), length = keys.size(2), shared = q.size(1) / kv_heads;
  const int64_t width = q.size(2), v_width = values.size(3);
  for (const Tensor& x : {q, k, v, Tensor(keys), Tensor(values)})
    TORCH_CHECK(x.is_contiguous() && x.scalar_type() == keys.scalar_type());
  Tensor out = at::empty({rows, q.size(1), v_width}, q.options());
  const int64_t* taken = before.const_data_ptr<int64_t>();
  with_type(keys, [&](auto kind) {
    using T = decltype(kind);
    const T *from_q = q.const_data_ptr<T>(), *from_k = k.const_data_ptr<T>(), *from_v = v.const_data_ptr<T>();
    T *all_keys = keys.data_ptr<T>(), *all_values = values.data_ptr<T>(), *to = out.data_ptr<T>();
    at::parallel_for(0, rows * kv_heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> queries(shared * width), result(shared * v_width), scores;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t count = taken[task / kv_heads] + 1, low = window ? std::max<int64_t>(0, count - window) : 0;
        T *own_keys = all_keys + task * length * width, *own_values = all_values + task * length * v_width;
        std::copy_n(from_k + task * width, width, own_keys + (count - 1) * width);
        std::copy_n(from_v + task * v_width, v_width, own_values + (count - 1) * v_width);
        for (int64_t i = 0; i < shared * width; ++i) queries[i] = widen(from_q[task * shared * width + i]);
        scores.resize(kMostQueries * count);
        in_portions(shared, [&](int64_t g, auto here) {
          attend_plain<decltype(here)::value>(queries.data() + g * width, own_keys, own_values, low, count, width, v_width,
                                              scale, scores.data(), result.data() + g * v_width);
        });
        for (int64_t i = 0; i < shared * v_width; ++i) narrow(result[i], to + task * shared * v_width + i);
      }
    });
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
//   positions, prompt_lengths: [R]
//   prompt_keys: by row [layers, kv_heads, blocks, width / 2, kLanes, 2], prompt_values: [layers, kv_heads, pairs, width, 2];
//   own: both the same behind [slots, layers, kv_heads], for as many positions as kLanes divides
Tensor step(const Tensor& ids, const Tensor& positions, const Tensor& prompt_lengths, const Tensor& embedding,
            const std::vector<Tensor>& weights, const Tensor& last_norm, const Tensor& cos, const Tensor& sin,
            const std::vector<Tensor>& prompt_keys, const std::vector<Tensor>& prompt_values, Tensor own_keys,
            Tensor own_values, int64_t heads, double eps) {
  const Shape s(heads, own_values.size(2), own_values.size(4));
  const int64_t layer_stride = own_values.stride(1);
  return run_layers(ids, embedding, weights, last_norm, eps,
                    [&](size_t layer, const Tensor& qkv, const float* query_norm, const float* key_norm) {
                      Memory memory{{}, {}, prompt_lengths.const_data_ptr<int64_t>(),
                                    own_keys.data_ptr<BFloat16>() + layer * layer_stride,
                                    own_values.data_ptr<BFloat16>() + layer * layer_stride, own_values.stride(0),
                                    own_values.size(3) * kPair};
                      const auto at_layer = [&](const Tensor& t) {
                        return t.const_data_ptr<BFloat16>() + layer * t.stride(0);
                      };
                      for (size_t r = 0; r < prompt_keys.size(); ++r) {
                        memory.prompt_keys.push_back(at_layer(prompt_keys[r]));
                        memory.prompt_values.push_back(at_layer(prompt_values[r]));
                      }
                      return attend_step(qkv, memory, positions, cos, sin, query_norm, key_norm, eps, s);
                    });
}

// Last hidden states [n, H] of n prompts of `lengths` tokens, whose `ids` stand one behind another; the keys and values
// of each go into its keys [layers, kv_heads, blocks, width / 2, kLanes, 2] and values [layers, kv_heads, pairs, width, 2].
Tensor prefill(const Tensor& ids, const Tensor& lengths, const Tensor& embedding, const std::vector<Tensor>& weights,
               const Tensor& last_norm, const Tensor& cos, const Tensor& sin, const std::vector<Tensor>& keys,
               const std::vector<Tensor>& values, int64_t heads, double eps) {
  const int64_t total = ids.size(0), prompts = lengths.size(0);
  const Shape s(heads, values[0].size(1), values[0].size(3));
  const int64_t* length = lengths.const_data_ptr<int64_t>();
  std::vector<int64_t> positions, firsts, lasts, rows;
  for (int64_t p = 0; p < prompts; ++p) {
    firsts.push_back(positions.size());
    rows.insert(rows.end(), {firsts[p], length[p], -1});
    for (int64_t t = 0; t < length[p]; ++t) positions.push_back(t);
    lasts.push_back(firsts[p] + length[p] - 1);
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
        at::parallel_for(0, prompts * s.kv_heads, 1, [&](int64_t begin, int64_t end) {
          for (int64_t task = begin; task < end; ++task) {
            const int64_t p = task / s.kv_heads, h = task % s.kv_heads;
            BFloat16* own_keys = keys[p][layer][h].data_ptr<BFloat16>();
            BFloat16* own_values = values[p][layer][h].data_ptr<BFloat16>();
            for (int64_t t = 0; t < length[p]; ++t) {
              const int64_t cell = firsts[p] + t;
              put_key(to_k + (cell * s.kv_heads + h) * s.width, t, s.width, own_keys);
              put_value(in + cell * s.columns + s.queries + (s.kv_heads + h) * s.width, t, s.width, own_values);
            }
          }
        });
        Tensor v = qkv.narrow(1, s.queries + s.kv_heads * s.width, s.kv_heads * s.width)
                       .reshape({total, s.kv_heads, s.width})
                       .contiguous();
        const double scale = 1.0 / std::sqrt(static_cast<double>(s.width));
        return std::get<0>(pertoken::attend(q, k, v, sequences, 0, scale)).view({total, s.queries});
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
  m.def("attend_slots", &attend_slots);
  m.def("sample", &sample);
}
