// Attention of packed rows, for other compiled code; see attention.cpp.

#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <tuple>

namespace pertoken {

std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                          const at::Tensor& sequences, int64_t window, double scale);

}  // namespace pertoken
