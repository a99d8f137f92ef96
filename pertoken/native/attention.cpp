// Attention of packed rows, forward and backward: sequences that follow one another in one long row, each of which sees
// the sequence that it continues (its prompt) and its own tokens up to the one that asks.
//
// It goes tile by tile and never makes a whole matrix of scores (Dao et al. 2022, https://arxiv.org/abs/2205.14135).
// Tiles have one size whatever the lengths are, so that oneDNN generates the code of each product once. Products are made
// in the type of the tensors, sums and softmax in float32. Query heads that share a key head are rows of one tile.

#include "attention.h"
#include "numbers.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using at::native::cpublas::brgemm;
using pertoken::fast_exp;
using pertoken::narrow;
using pertoken::widen;
using pertoken::with_type;

constexpr int64_t kTile = 64;  // queries, and keys, of a tile

inline int64_t tiles_of(int64_t count) { return (count + kTile - 1) / kTile; }

typedef uint32_t __attribute__((aligned(2), may_alias)) Word;
inline const uint16_t* bits(const BFloat16* x) { return &x->x; }

template <typename T>
constexpr bool kPairs = std::is_same_v<T, BFloat16>;  // right operands of bfloat16 products have their rows in pairs

// out += (add) or = a [m, k] times b, a right operand of [k, n]; all without gaps between their rows.
template <typename T>
void multiply(int64_t m, int64_t n, int64_t k, bool add, const T* a, const T* b, float* out) {
  brgemm(m, n, k, k, n, n, add, a, b, out, kPairs<T>);
}

// `count` rows of `columns` numbers, `stride` apart, as the right operand [height, width], which zeros fill up. Pairs of
// bfloat16 numbers are moved as one word, in loops that become vector code.
template <typename T>
void as_right(const T* rows, int64_t stride, int64_t count, int64_t columns, int64_t height, int64_t width, T* out) {
  if (count < height || columns < width) std::fill(out, out + height * width, T(0.0f));
  if constexpr (kPairs<T>) {
    Word* to = reinterpret_cast<Word*>(out);
    for (int64_t k = 0; k < count; k += 2, to += width) {
      const uint16_t* upper = bits(rows + k * stride);
      const uint16_t* lower = bits(rows + (k + 1) * stride);
      if (k + 1 < count)
        for (int64_t n = 0; n < columns; ++n) to[n] = static_cast<uint32_t>(lower[n]) << 16 | upper[n];
      else
        for (int64_t n = 0; n < columns; ++n) to[n] = upper[n];
    }
  } else {
    for (int64_t k = 0; k < count; ++k) std::copy_n(rows + k * stride, columns, out + k * width);
  }
}

// The same of the transposed rows: [columns, count] as [height, width].
template <typename T>
void as_right_turned(const T* rows, int64_t stride, int64_t count, int64_t columns, int64_t height, int64_t width, T* out) {
  if (columns < height || count < width) std::fill(out, out + height * width, T(0.0f));
  if constexpr (kPairs<T>) {
    Word* to = reinterpret_cast<Word*>(out);
    for (int64_t n = 0; n < count; ++n) {
      const uint16_t* row = bits(rows + n * stride);
      const Word* pairs = reinterpret_cast<const Word*>(row);
      for (int64_t k = 0; k < columns / 2; ++k) to[k * width + n] = pairs[k];
      if (columns % 2) to[columns / 2 * width + n] = row[columns - 1];
    }
  } else {
    for (int64_t n = 0; n < count; ++n)
      for (int64_t k = 0; k < columns; ++k) out[k * width + n] = rows[n * stride + k];
  }
}

struct Sequence {
  int64_t start, length, prompt;  // first cell; tokens; number of the sequence that it continues, or -1
};

std::vector<Sequence> sequences_of(const Tensor& table) {
  TORCH_CHECK(table.is_contiguous() && table.size(1) == 3);
  const int64_t* t = table.const_data_ptr<int64_t>();
  std::vector<Sequence> found;
  for (int64_t i = 0; i < table.size(0); ++i) found.push_back({t[3 * i], t[3 * i + 1], t[3 * i + 2]});
  return found;
}

struct Shape {
  int64_t heads, kv_heads, shared, width, v_width;  // as they are
  int64_t depth, v_depth;                           // widths as the tiles have them
  Shape(const Tensor& q, const Tensor& k, const Tensor& v)
      : heads(q.size(1)), kv_heads(k.size(1)), shared(heads / kv_heads), width(q.size(2)), v_width(v.size(2)),
        depth((width + 15) / 16 * 16), v_depth((v_width + 15) / 16 * 16) {
    for (const Tensor& x : {q, k, v}) TORCH_CHECK(x.is_contiguous() && x.scalar_type() == v.scalar_type());
  }
};

// Threads take the next piece of work when they have done theirs; what each piece writes does not depend on who does it.
template <typename T, typename Work>
void in_turns(int64_t count, Work work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t task = next++; task < count; task = next++) work(task);
    at::native::cpublas::brgemm_release(kPairs<T>);
  });
}

// Rows of a tile of queries: row r of a sequence is head r % shared of its token r / shared.
struct Queries {
  int64_t first, count;  // rows of the sequence
  Queries(const Sequence& s, const Shape& shape, int64_t tile)
      : first(tile * kTile), count(std::min(kTile, s.length * shape.shared - tile * kTile)) {}
  // Where row r begins in a tensor [N, heads, width], for the key head h.
  int64_t cell(const Sequence& s, const Shape& shape, int64_t h, int64_t r) const {
    const int64_t row = first + r;
    return (s.start + row / shape.shared) * shape.heads + h * shape.shared + row % shape.shared;
  }
};

// Keys [first, first + count) of a sequence that queries of `asker` look at: `ahead` tokens lie between the first of these
// keys and the first token of the asker (negative where the asker's own tokens are the keys).
struct Keys {
  int64_t first, count, ahead;
};

// Which keys of the tile row `row` of a sequence sees: [low, high).
inline std::pair<int64_t, int64_t> seen(const Keys& keys, int64_t row, const Shape& shape, int64_t window) {
  const int64_t distance = keys.ahead + row / shape.shared;  // from the first key of the tile to the query
  const int64_t high = std::min(keys.count, distance + 1);
  const int64_t low = window ? std::max<int64_t>(0, distance - window + 1) : 0;
  return {std::min(low, std::max<int64_t>(high, 0)), std::max<int64_t>(high, 0)};
}

// Calls work(number of the sequence, tile, keys) for each tile of keys that the query rows [first, first + count) can see.
template <typename Work>
void for_seen_tiles(const std::vector<Sequence>& all, const Sequence& asker, int64_t own, const Queries& queries,
                    const Shape& shape, int64_t window, Work work) {
  const int64_t before = asker.prompt < 0 ? 0 : all[asker.prompt].length;
  for (const int64_t number : {asker.prompt, own}) {
    if (number < 0) continue;
    const int64_t length = all[number].length, offset = number == own ? 0 : before;
    for (int64_t tile = 0; tile < tiles_of(length); ++tile) {
      const Keys keys{tile * kTile, std::min(kTile, length - tile * kTile), offset - tile * kTile};
      const bool begun = seen(keys, queries.first + queries.count - 1, shape, window).second > 0;
      const bool past = seen(keys, queries.first, shape, window).first >= keys.count;
      if (begun && !past) work(number, tile, keys);
    }
  }
}

template <typename T>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<Sequence>& all, int64_t window,
             float scale, const Shape& shape, Tensor& out, Tensor& masses) {
  const T *from_q = q.const_data_ptr<T>(), *from_k = k.const_data_ptr<T>(), *from_v = v.const_data_ptr<T>();
  T* to = out.data_ptr<T>();
  float* to_mass = masses.data_ptr<float>();
  std::vector<int64_t> tile_at;  // number of the first tile of each sequence
  int64_t tiles = 0;
  for (const Sequence& s : all) {
    tile_at.push_back(tiles);
    tiles += tiles_of(s.length);
  }
  const int64_t key_size = kTile * shape.depth, value_size = kTile * shape.v_depth;
  std::vector<T> keys(tiles * shape.kv_heads * key_size), values(tiles * shape.kv_heads * value_size);
  std::vector<std::pair<int64_t, int64_t>> key_tiles, query_tiles;  // sequence, tile
  for (size_t n = 0; n < all.size(); ++n) {
    for (int64_t tile = 0; tile < tiles_of(all[n].length); ++tile) key_tiles.push_back({n, tile});
    for (int64_t tile = 0; tile < tiles_of(all[n].length * shape.shared); ++tile) query_tiles.push_back({n, tile});
  }
  at::parallel_for(0, tiles * shape.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const auto [n, tile] = key_tiles[task / shape.kv_heads];
      const int64_t h = task % shape.kv_heads, first = all[n].start + tile * kTile;
      const int64_t count = std::min(kTile, all[n].length - tile * kTile);
      as_right_turned(from_k + (first * shape.kv_heads + h) * shape.width, shape.kv_heads * shape.width, count,
                      shape.width, shape.depth, kTile, keys.data() + task * key_size);
      as_right(from_v + (first * shape.kv_heads + h) * shape.v_width, shape.kv_heads * shape.v_width, count,
               shape.v_width, kTile, shape.v_depth, values.data() + task * value_size);
    }
  });
  const int64_t pieces = static_cast<int64_t>(query_tiles.size()) * shape.kv_heads;
  in_turns<T>(pieces, [&](int64_t task) {
    const auto [n, tile] = query_tiles[task / shape.kv_heads];
    const int64_t h = task % shape.kv_heads;
    const Sequence& s = all[n];
    const Queries queries(s, shape, tile);
    std::vector<T> query(kTile * shape.depth, T(0.0f)), weights(kTile * kTile);
    std::vector<float> scores(kTile * kTile), sums(kTile * shape.v_depth, 0.0f), tops(kTile, -INFINITY), mass(kTile, 0.0f);
    for (int64_t r = 0; r < queries.count; ++r)
      std::copy_n(from_q + queries.cell(s, shape, h, r) * shape.width, shape.width, query.data() + r * shape.depth);
    for_seen_tiles(all, s, n, queries, shape, window, [&](int64_t number, int64_t key_tile, const Keys& seen_keys) {
      const int64_t at = (tile_at[number] + key_tile) * shape.kv_heads + h;
      multiply(kTile, kTile, shape.depth, false, query.data(), keys.data() + at * key_size, scores.data());
      for (int64_t r = 0; r < kTile; ++r) {
        float* x = scores.data() + r * kTile;
        T* p = weights.data() + r * kTile;
        const auto [low, high] = r < queries.count ? seen(seen_keys, queries.first + r, shape, window)
                                                   : std::pair<int64_t, int64_t>{0, 0};
        if (low >= high) {
          std::fill(p, p + kTile, T(0.0f));
          continue;
        }
        std::fill(x, x + low, -INFINITY);
        std::fill(x + high, x + kTile, -INFINITY);
        float top = -INFINITY;
        for (int64_t j = 0; j < kTile; ++j) top = x[j] > top ? x[j] : top;
        top = std::max(tops[r], top * scale);
        float sum = 0;
        for (int64_t j = 0; j < kTile; ++j) {
          const float weight = fast_exp(x[j] * scale - top);
          sum += weight;
          narrow(weight, p + j);
        }
        if (top > tops[r]) {
          const float shrink = fast_exp(tops[r] - top);
          mass[r] *= shrink;
          float* o = sums.data() + r * shape.v_depth;
          for (int64_t i = 0; i < shape.v_depth; ++i) o[i] *= shrink;
          tops[r] = top;
        }
        mass[r] += sum;
      }
      multiply(kTile, shape.v_depth, kTile, true, weights.data(), values.data() + at * value_size, sums.data());
    });
    for (int64_t r = 0; r < queries.count; ++r) {
      const int64_t cell = queries.cell(s, shape, h, r);
      const float factor = 1.0f / mass[r], *o = sums.data() + r * shape.v_depth;
      for (int64_t i = 0; i < shape.v_width; ++i) narrow(o[i] * factor, to + cell * shape.v_width + i);
      to_mass[cell] = tops[r] + std::log(mass[r]);
    }
  });
}

// With P = exp(scale Q K' - mass) and D = rowsum(dO * O):
//   dV = P' dO,  dS = P * (dO V' - D),  dQ = scale dS K,  dK = scale dS' Q.
// A piece of work has some rows behind a prompt (the first has the prompt as well), and all keys that they look at; it computes
// P and dS with keys as rows. What pieces of one prompt add to its keys and values is kept by share, and summed in the end.
template <typename T>
void backward(const Tensor& gradient, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
              const Tensor& masses, const std::vector<Sequence>& all, int64_t window, float scale, const Shape& shape,
              int64_t shares, Tensor& to_q, Tensor& to_k, Tensor& to_v) {
  const T *by = gradient.const_data_ptr<T>(), *from_q = q.const_data_ptr<T>(), *from_k = k.const_data_ptr<T>(),
          *from_v = v.const_data_ptr<T>(), *from_out = out.const_data_ptr<T>();
  const float* mass = masses.const_data_ptr<float>();
  T *into_q = to_q.data_ptr<T>(), *into_k = to_k.data_ptr<T>(), *into_v = to_v.data_ptr<T>();
  const auto room = [&](const Tensor& t) {  // [shares, *t], of which the cells of prompts are used
    return at::empty(shares == 1 ? 0 : shares * t.numel(), t.options().dtype(at::kFloat));
  };
  const Tensor k_room = room(k), v_room = room(v);
  float *k_shares = k_room.data_ptr<float>(), *v_shares = v_room.data_ptr<float>();
  std::vector<std::vector<int64_t>> families;  // a sequence that continues none, and those that continue it
  std::vector<int64_t> family_of(all.size());
  for (size_t n = 0; n < all.size(); ++n) {
    if (all[n].prompt < 0) families.emplace_back();
    family_of[n] = all[n].prompt < 0 ? static_cast<int64_t>(families.size()) - 1 : family_of[all[n].prompt];
    families[family_of[n]].push_back(n);
  }
  const int64_t pieces = static_cast<int64_t>(families.size()) * shape.kv_heads * shares;
  const int64_t k_size = kTile * shape.depth, v_size = kTile * shape.v_depth;
  in_turns<T>(pieces, [&](int64_t task) {
    const int64_t share = task % shares, h = task / shares % shape.kv_heads;
    const std::vector<int64_t>& family = families[task / shares / shape.kv_heads];
    const int64_t rows_of_family = family.size() - 1;
    const auto row_at = [&](int64_t portion) { return family.begin() + 1 + rows_of_family * portion / shares; };
    const std::vector<int64_t> mine(row_at(share), row_at(share + 1));
    struct Asker {
      int64_t number;
      Queries queries;
    };
    std::vector<Asker> askers;
    const auto asks = [&](int64_t n) {
      for (int64_t tile = 0; tile < tiles_of(all[n].length * shape.shared); ++tile)
        askers.push_back({n, Queries(all[n], shape, tile)});
    };
    if (share == 0) asks(family[0]);
    for (const int64_t n : mine) asks(n);
    const int64_t count = askers.size();
    std::vector<T> q_right(count * k_size), q_turned(count * k_size), g_right(count * v_size), g_turned(count * v_size);
    std::vector<float> logs(count * kTile, INFINITY), dots(count * kTile, 0.0f), q_sums(count * k_size, 0.0f);
    std::vector<T> rows(kTile * std::max(shape.depth, shape.v_depth));
    for (int64_t a = 0; a < count; ++a) {
      const auto& [n, queries] = askers[a];
      for (int64_t r = 0; r < queries.count; ++r)
        std::copy_n(from_q + queries.cell(all[n], shape, h, r) * shape.width, shape.width, rows.data() + r * shape.width);
      as_right(rows.data(), shape.width, queries.count, shape.width, kTile, shape.depth, q_right.data() + a * k_size);
      as_right_turned(rows.data(), shape.width, queries.count, shape.width, shape.depth, kTile, q_turned.data() + a * k_size);
      for (int64_t r = 0; r < queries.count; ++r) {
        const int64_t cell = queries.cell(all[n], shape, h, r);
        const T *g = by + cell * shape.v_width, *o = from_out + cell * shape.v_width;
        float dot = 0;
        for (int64_t i = 0; i < shape.v_width; ++i) dot += widen(g[i]) * widen(o[i]);
        dots[a * kTile + r] = dot;
        logs[a * kTile + r] = mass[cell];
        std::copy_n(g, shape.v_width, rows.data() + r * shape.v_width);
      }
      as_right(rows.data(), shape.v_width, queries.count, shape.v_width, kTile, shape.v_depth, g_right.data() + a * v_size);
      as_right_turned(rows.data(), shape.v_width, queries.count, shape.v_width, shape.v_depth, kTile,
                      g_turned.data() + a * v_size);
    }
    std::vector<T> key(k_size), key_turned(k_size), value(v_size), p(kTile * kTile), ds(kTile * kTile), ds_right(kTile * kTile);
    std::vector<float> scores(kTile * kTile), dp(kTile * kTile), k_sums(k_size), v_sums(v_size);
    const auto look_at_keys_of = [&](int64_t n) {
      for (int64_t tile = 0; tile < tiles_of(all[n].length); ++tile) {
        const int64_t first = all[n].start + tile * kTile, keys_here = std::min(kTile, all[n].length - tile * kTile);
        std::fill(key.begin(), key.end(), T(0.0f));
        std::fill(key_turned.begin(), key_turned.end(), T(0.0f));
        std::fill(value.begin(), value.end(), T(0.0f));
        std::fill(k_sums.begin(), k_sums.end(), 0.0f);
        std::fill(v_sums.begin(), v_sums.end(), 0.0f);
        for (int64_t j = 0; j < keys_here; ++j) {
          const T* in = from_k + ((first + j) * shape.kv_heads + h) * shape.width;
          std::copy_n(in, shape.width, key.data() + j * shape.depth);
          for (int64_t i = 0; i < shape.width; ++i) key_turned[i * kTile + j] = in[i];
          std::copy_n(from_v + ((first + j) * shape.kv_heads + h) * shape.v_width, shape.v_width,
                      value.data() + j * shape.v_depth);
        }
        for (int64_t a = 0; a < count; ++a) {
          const auto& [asker, queries] = askers[a];
          if (asker != n && all[asker].prompt != n) continue;
          const int64_t before = asker == n ? 0 : all[n].length;
          const int64_t ahead = before - tile * kTile;  // from the first key here to the first query of its sequence
          // Key j is seen by rows from (j - ahead) * shared on, up to the end of its window.
          const auto columns = [&](int64_t j) {
            const int64_t low = (j - ahead) * shape.shared - queries.first;
            const int64_t high = window ? (j - ahead + window) * shape.shared - queries.first : queries.count;
            const int64_t begin = std::clamp<int64_t>(low, 0, queries.count);
            return std::pair{begin, std::clamp<int64_t>(high, begin, queries.count)};
          };
          if (columns(0).first >= queries.count || (window && columns(keys_here - 1).second == 0)) continue;
          multiply(kTile, kTile, shape.depth, false, key.data(), q_turned.data() + a * k_size, scores.data());
          multiply(kTile, kTile, shape.v_depth, false, value.data(), g_turned.data() + a * v_size, dp.data());
          const float *log = logs.data() + a * kTile, *dot = dots.data() + a * kTile;
          for (int64_t j = 0; j < kTile; ++j) {
            const auto [begin, end] = j < keys_here ? columns(j) : std::pair<int64_t, int64_t>{0, 0};
            const float *x = scores.data() + j * kTile, *y = dp.data() + j * kTile;
            T *to_p = p.data() + j * kTile, *to_ds = ds.data() + j * kTile;
            for (int64_t r = 0; r < kTile; ++r) {
              const float weight = r >= begin && r < end ? fast_exp(x[r] * scale - log[r]) : 0.0f;
              narrow(weight, to_p + r);
              narrow(weight * (y[r] - dot[r]) * scale, to_ds + r);
            }
          }
          as_right(ds.data(), kTile, kTile, kTile, kTile, kTile, ds_right.data());
          multiply(kTile, shape.v_depth, kTile, true, p.data(), g_right.data() + a * v_size, v_sums.data());
          multiply(kTile, shape.depth, kTile, true, ds.data(), q_right.data() + a * k_size, k_sums.data());
          multiply(shape.depth, kTile, kTile, true, key_turned.data(), ds_right.data(), q_sums.data() + a * k_size);
        }
        const auto write = [&](auto* k_at, auto* v_at) {
          for (int64_t j = 0; j < keys_here; ++j) {
            const int64_t cell = (first + j) * shape.kv_heads + h;
            for (int64_t i = 0; i < shape.width; ++i) narrow(k_sums[j * shape.depth + i], k_at + cell * shape.width + i);
            for (int64_t i = 0; i < shape.v_width; ++i)
              narrow(v_sums[j * shape.v_depth + i], v_at + cell * shape.v_width + i);
          }
        };
        if (shares > 1 && n == family[0])
          write(k_shares + share * k.numel(), v_shares + share * v.numel());
        else
          write(into_k, into_v);
      }
    };
    look_at_keys_of(family[0]);
    for (const int64_t n : mine) look_at_keys_of(n);
    for (int64_t a = 0; a < count; ++a) {
      const auto& [n, queries] = askers[a];
      for (int64_t r = 0; r < queries.count; ++r) {
        T* cell = into_q + queries.cell(all[n], shape, h, r) * shape.width;
        for (int64_t i = 0; i < shape.width; ++i) narrow(q_sums[a * k_size + i * kTile + r], cell + i);
      }
    }
  });
  if (shares == 1) return;
  const auto add_up = [&](const float* from, int64_t first, int64_t count, int64_t size, T* to) {
    for (int64_t i = first; i < first + count; ++i) {
      float sum = 0;
      for (int64_t share = 0; share < shares; ++share) sum += from[share * size + i];
      narrow(sum, to + i);
    }
  };
  for (const std::vector<int64_t>& family : families) {
    const Sequence& prompt = all[family[0]];
    const int64_t k_cells = shape.kv_heads * shape.width, v_cells = shape.kv_heads * shape.v_width;
    add_up(k_shares, prompt.start * k_cells, prompt.length * k_cells, k.numel(), into_k);
    add_up(v_shares, prompt.start * v_cells, prompt.length * v_cells, v.numel(), into_v);
  }
}

std::tuple<Tensor, Tensor, Tensor> attend_backward(const Tensor& gradient, const Tensor& q, const Tensor& k, const Tensor& v,
                                                   const Tensor& out, const Tensor& masses, const Tensor& sequences,
                                                   int64_t window, double scale) {
  const Shape shape(q, k, v);
  TORCH_CHECK(gradient.is_contiguous() && gradient.scalar_type() == v.scalar_type());
  const std::vector<Sequence> all = sequences_of(sequences);
  const int64_t families = std::count_if(all.begin(), all.end(), [](const Sequence& s) { return s.prompt < 0; });
  const int64_t pieces = std::max<int64_t>(1, families * shape.kv_heads), wanted = 3 * at::get_num_threads();
  const int64_t shares = at::get_num_threads() == 1 ? 1 : (wanted + pieces - 1) / pieces;
  Tensor to_q = at::empty_like(q), to_k = at::empty_like(k), to_v = at::empty_like(v);
  with_type(v, [&](auto kind) {
    backward<decltype(kind)>(gradient, q, k, v, out, masses, all, window, scale, shape, shares, to_q, to_k, to_v);
  });
  return {to_q, to_k, to_v};
}

}  // namespace

// Of q [N, heads, D], k and v [N, kv_heads, D and Dv]: what each query attends to [N, heads, Dv], and the log of its mass
// [N, heads]. `sequences` [n, 3] has the first cell, the length and the number of the prompt (-1: none) of each; together
// they are all N cells, and a prompt comes before those that continue it. window 0: none.
std::tuple<Tensor, Tensor> pertoken::attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& sequences, int64_t window,
                                  double scale) {
  const Shape shape(q, k, v);
  Tensor out = at::empty({q.size(0), shape.heads, shape.v_width}, v.options());
  Tensor masses = at::empty({q.size(0), shape.heads}, v.options().dtype(at::kFloat));
  with_type(v, [&](auto kind) {
    forward<decltype(kind)>(q, k, v, sequences_of(sequences), window, scale, shape, out, masses);
  });
  return {out, masses};
}

TORCH_LIBRARY_FRAGMENT(pertoken, m) {
  m.def("attend", &pertoken::attend);
  m.def("attend_backward", &attend_backward);
}
