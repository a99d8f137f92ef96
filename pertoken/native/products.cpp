// x @ weight.T + bias in bfloat16 with float32 sums, for processors that have dot products of bfloat16 pairs and no
// matrix unit: oneDNN reaches three fifths of what their vector units can do, this four fifths.
//
// A weight [N, K] lies in panels of 48 of its rows, each [K / 2, rows, 2]: three vectors are what a pair of columns brings for
// as many outputs. Eight rows of x times three vectors are 24 sums that stay in registers from the first pair to the
// last; one panel serves all rows of x while it is in the cache, and the next one is called for meanwhile.

#include "products.h"

#include "numbers.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using pertoken::add_products;
using pertoken::kLanes;
using pertoken::kPair;
using pertoken::Lanes;
using pertoken::load16;
using pertoken::load_pairs;
using pertoken::narrow;
using pertoken::same_pair;
using pertoken::Words;

constexpr int64_t kVectors = 3, kPanel = kVectors * kLanes;  // of a panel
constexpr int64_t kRows = 8;                                 // of x, at once

// Whether this is the faster way on the processor that the code was made for.
bool multiplies() {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
  return true;
#else
  return false;
#endif
}

// Weight [N, K] in panels; the shape stays. kLanes divides N, kPair divides K.
Tensor pack(const Tensor& weight) {
  const int64_t n = weight.size(0), k = weight.size(1);
  TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == at::kBFloat16);
  TORCH_CHECK(n % kLanes == 0 && k % kPair == 0, "a weight of ", n, " x ", k, " does not lie in panels");
  Tensor packed = at::empty_like(weight);
  const BFloat16* from = weight.const_data_ptr<BFloat16>();
  BFloat16* to = packed.data_ptr<BFloat16>();
  at::parallel_for(0, (n + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanel, rows = std::min(kPanel, n - first);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < k; i += kPair)
          for (int64_t s = 0; s < kPair; ++s) to[first * k + i * rows + r * kPair + s] = from[(first + r) * k + i + s];
    }
  });
  return packed;
}

// R rows of x with W vectors of a panel. `ahead`: memory to call for, one line for each pair of columns, or null.
template <int R, int W>
void multiply_block(const BFloat16* x, int64_t k, const BFloat16* panel, const BFloat16* ahead, const BFloat16* bias,
                    BFloat16* out, int64_t columns) {
  Lanes sums[R][W] = {};
  for (int64_t i = 0; i < k; i += kPair) {
    Words weights[W];
    for (int w = 0; w < W; ++w) weights[w] = load_pairs(panel + (i * W + w * kPair) * kLanes);
    if (ahead) __builtin_prefetch(ahead + i * kLanes, 0, 2);
    for (int r = 0; r < R; ++r) {
      const Words number = same_pair(x + r * k + i);
      for (int w = 0; w < W; ++w) sums[r][w] = add_products(sums[r][w], number, weights[w]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) {
      const Lanes sum = bias ? sums[r][w] + load16(bias + w * kLanes) : sums[r][w];
      for (int lane = 0; lane < kLanes; ++lane) narrow(sum[lane], out + r * columns + w * kLanes + lane);
    }
}

template <int W>
void multiply_rows(int64_t rows, const BFloat16* x, int64_t k, const BFloat16* panel, const BFloat16* ahead,
                   const BFloat16* bias, BFloat16* out, int64_t columns) {
  switch (rows) {
    case 1: return multiply_block<1, W>(x, k, panel, ahead, bias, out, columns);
    case 2: return multiply_block<2, W>(x, k, panel, ahead, bias, out, columns);
    case 3: return multiply_block<3, W>(x, k, panel, ahead, bias, out, columns);
    case 4: return multiply_block<4, W>(x, k, panel, ahead, bias, out, columns);
    case 5: return multiply_block<5, W>(x, k, panel, ahead, bias, out, columns);
    case 6: return multiply_block<6, W>(x, k, panel, ahead, bias, out, columns);
    case 7: return multiply_block<7, W>(x, k, panel, ahead, bias, out, columns);
    default: return multiply_block<8, W>(x, k, panel, ahead, bias, out, columns);
  }
}

}  // namespace

namespace pertoken {

// x [..., K] times a packed weight [N, K]: [..., N].
Tensor multiply(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias) {
  const int64_t n = packed.size(0), k = packed.size(1);
  TORCH_CHECK(x.size(-1) == k && x.scalar_type() == at::kBFloat16, "x [..., ", k, "] in bfloat16 expected");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n;
  const Tensor in = x.contiguous();
  Tensor out = at::empty(shape, x.options());
  const int64_t rows = k ? in.numel() / k : 0;
  const BFloat16 *from = in.const_data_ptr<BFloat16>(), *weights = packed.const_data_ptr<BFloat16>();
  const BFloat16* add = bias ? bias->const_data_ptr<BFloat16>() : nullptr;
  BFloat16* to = out.data_ptr<BFloat16>();
  const int64_t panels = (n + kPanel - 1) / kPanel;
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t first = number * kPanel, vectors = std::min(kPanel, n - first) / kLanes;
      const BFloat16* panel = weights + first * k;
      for (int64_t r = 0; r < rows; r += kRows) {
        const int64_t third = r / kRows;  // of the next panel
        const BFloat16* ahead = number + 1 < end && third < kVectors ? panel + (kPanel + third * kLanes) * k : nullptr;
        const auto block = [&](auto multiply_some) {
          multiply_some(std::min(kRows, rows - r), from + r * k, k, panel, ahead, add ? add + first : nullptr,
                        to + r * n + first, n);
        };
        switch (vectors) {
          case 1: block(multiply_rows<1>); break;
          case 2: block(multiply_rows<2>); break;
          default: block(multiply_rows<3>);
        }
      }
    }
  });
  return out;
}

}  // namespace pertoken

TORCH_LIBRARY_FRAGMENT(pertoken, m) {
  m.def("multiplies", &multiplies);
  m.def("pack", &pack);
  m.def("multiply", &pertoken::multiply);
}
