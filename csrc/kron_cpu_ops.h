// The Kronecker ops on the CPU as C++ functions, for the ops built on them.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

namespace spectral::cpu {

// The raw ops of these names.
at::Tensor kron_rotate(
    const at::Tensor& x, at::TensorList factors, bool transpose,
    const std::optional<at::Tensor>& scale_before, const std::optional<at::Tensor>& scale_after);
std::vector<at::Tensor> kron_gram(
    const at::Tensor& a, const at::Tensor& b, at::IntArrayRef dims,
    const std::optional<at::Tensor>& scale_b);

// In one pass: rotates the rows of `a` (contiguous fp32 or fp64) in place, takes kron_gram(a, b,
// dims, scale_b) of them, whose results are views of one tensor, and multiplies them by scale_b.
std::vector<at::Tensor> kron_rotate_gram_(
    const at::Tensor& a, at::TensorList factors, bool transpose, const at::Tensor& b,
    const std::optional<at::Tensor>& scale_b);

}  // namespace spectral::cpu
