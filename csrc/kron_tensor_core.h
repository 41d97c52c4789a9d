// kron_rotate and kron_gram on tensor cores (kron_rotate_cuda.cu, kron_gram_cuda.cu) as functions
// of tensors. Only in a build with CUDA.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

namespace spectral::tensor_core {

// Whether the layers use them; they do not by themselves, until a GPU has shown that they are
// faster.
bool is_on();
void turn_on(bool on);

// Whether the kernels take rows like these: bf16 on a device of capability 8.0 or later, two
// factors of sizes that fit. What they do is what the raw ops of these names do.
bool takes(const at::Tensor& rows, at::IntArrayRef sizes);
at::Tensor kron_rotate(
    const at::Tensor& x, at::TensorList factors, bool transpose,
    const std::optional<at::Tensor>& scale_before, const std::optional<at::Tensor>& scale_after);
// The sums are views of one tensor.
std::vector<at::Tensor> kron_gram(
    const at::Tensor& a, const at::Tensor& b, at::IntArrayRef dims,
    const std::optional<at::Tensor>& scale_b);

}  // namespace spectral::tensor_core
