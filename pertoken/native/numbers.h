// Reading and writing float32 and bfloat16 alike, in loops that the compiler turns into vector code.

#pragma once

#include <ATen/ATen.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <bit>
#include <cmath>
#include <cstdint>

namespace pertoken {

#define PERTOKEN_INLINE __attribute__((always_inline)) inline  // a call inside a loop keeps it from becoming vector code

PERTOKEN_INLINE float widen(float x) { return x; }
PERTOKEN_INLINE float widen(at::BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16); }

PERTOKEN_INLINE void narrow(float x, float* to) { *to = x; }
// To the nearest, ties to even. Without the branch for NaNs that c10 has: theirs stay NaNs here as well.
PERTOKEN_INLINE void narrow(float x, at::BFloat16* to) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  to->x = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp(x), relative error below 3e-7 down to exp(-87), and 0 from there on. libm's own has no vector form under the
// flags that keep NaNs and infinities; NaN stays NaN here.
PERTOKEN_INLINE float fast_exp(float x) {
  const float bounded = x > 88.0f ? 88.0f : x;
  const float n = __builtin_rintf(bounded * 1.4426950408889634f);  // exp(x) = 2^n exp(r), |r| <= ln(2) / 2
  const float r = bounded - n * 0.6931471805599453f;
  const float high = 1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720)));
  const float sum = 1.0f + r * (1.0f + r * (0.5f + r * high));
  const float power = std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  return x < -87.0f ? 0.0f : sum * power;
}

// Vectors by hand, where the compiler does not see one: 16 numbers at once.
constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef uint16_t Half __attribute__((vector_size(kLanes * 2), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4), aligned(4)));

PERTOKEN_INLINE Lanes load16(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
PERTOKEN_INLINE Lanes load16(const at::BFloat16* p) {
  Words wide = __builtin_convertvector(*reinterpret_cast<const Half*>(p), Words) << 16;
  return reinterpret_cast<Lanes&>(wide);
}

// Pairs of bfloat16 numbers, the first of each in the lower half: 16 of them are what a dot product takes at once.
constexpr int kPair = 2;
typedef Words __attribute__((aligned(2), may_alias)) Pairs;
typedef uint32_t __attribute__((aligned(2), may_alias)) Pair;

PERTOKEN_INLINE Words load_pairs(const at::BFloat16* p) { return *reinterpret_cast<const Pairs*>(p); }
PERTOKEN_INLINE Words same_pair(const at::BFloat16* p) { return Words{} + *reinterpret_cast<const Pair*>(p); }

// sum + a0 * b0 + a1 * b1 of each lane's pairs.
PERTOKEN_INLINE Lanes add_products(Lanes sum, Words a, Words b) {
#ifdef __AVX512BF16__
  return reinterpret_cast<Lanes>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else
  const Words high = Words{} + 0xffff0000u;
  sum += reinterpret_cast<Lanes>(a << 16) * reinterpret_cast<Lanes>(b << 16);
  return sum + reinterpret_cast<Lanes>(a & high) * reinterpret_cast<Lanes>(b & high);
#endif
}

// The largest of `count` numbers; NaNs are passed over (whoever sums the exponentials meets them).
template <typename T>
float largest(const T* numbers, int64_t count) {
  float top = -INFINITY;
  int64_t i = 0;
  if (count >= kLanes) {
    Lanes tops = load16(numbers);
    for (i = kLanes; i + kLanes <= count; i += kLanes) {
      const Lanes here = load16(numbers + i);
      tops = here > tops ? here : tops;
    }
    for (int lane = 0; lane < kLanes; ++lane) top = tops[lane] > top ? tops[lane] : top;
  }
  for (; i < count; ++i) top = widen(numbers[i]) > top ? widen(numbers[i]) : top;
  return top;
}

// work(T()), T the type of the numbers of `t`.
template <typename Work>
void with_type(const at::Tensor& t, Work work) {
  if (t.scalar_type() == at::kBFloat16)
    work(at::BFloat16());
  else {
    TORCH_CHECK(t.scalar_type() == at::kFloat, "float32 or bfloat16 expected, got ", t.scalar_type());
    work(float());
  }
}

}  // namespace pertoken
