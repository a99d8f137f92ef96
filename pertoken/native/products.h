// Products with packed weights, for other compiled code; see products.cpp.

#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace pertoken {

at::Tensor multiply(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias);

}  // namespace pertoken
