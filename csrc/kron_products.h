// kron_rotate and kron_gram as ATen's own products, for devices whose host is what is waited for:
// from C++ a call costs a fraction of a Triton kernel's launch from Python.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

namespace spectral::products {

// The raw ops of these names.
at::Tensor kron_rotate(
    const at::Tensor& x, at::TensorList factors, bool transpose,
    const std::optional<at::Tensor>& scale_before, const std::optional<at::Tensor>& scale_after);
std::vector<at::Tensor> kron_gram(
    const at::Tensor& a, const at::Tensor& b, at::IntArrayRef dims,
    const std::optional<at::Tensor>& scale_b);

}  // namespace spectral::products
