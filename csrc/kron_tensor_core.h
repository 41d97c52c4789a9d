// kron_rotate and kron_gram on tensor cores (kron_rotate_cuda.cu, kron_gram_cuda.cu) as functions
// of tensors. Only in a build with CUDA.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

namespace spectral::tensor_core {

// Whether the kernels can take rows like these: bf16 on a device of capability 8.0 or later, two
// factors of sizes that fit; and whether layers give them such rows (new_kernels.h). What they do
// is what the raw ops of these names do.
bool can_take(const at::Tensor& rows, at::IntArrayRef sizes);
bool takes(const at::Tensor& rows, at::IntArrayRef sizes);
at::Tensor kron_rotate(
    const at::Tensor& x, at::TensorList factors, bool transpose,
    const std::optional<at::Tensor>& scale_before, const std::optional<at::Tensor>& scale_after);
std::vector<at::Tensor> kron_gram(
    const at::Tensor& a, const at::Tensor& b, at::IntArrayRef dims,
    const std::optional<at::Tensor>& scale_b);

// Rotates the rows of `h` in place if `rotates` says so; returns the column sums of h * x and, with
// the Grams of h and x * scale, the gradients of the factors: R gram, or with `transpose` gram^T R;
// and multiplies h by the scale. Three kernels. The factors are fp32, h contiguous.
std::vector<at::Tensor> kron_gradients_(
    const at::Tensor& h, bool rotates, at::TensorList factors, bool transpose, const at::Tensor& x,
    const std::optional<at::Tensor>& scale);

}  // namespace spectral::tensor_core
