// The kernels of low_rank_cuda.cu as functions of tensors. Only in a build with CUDA.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace spectral::low_rank_kernels {

// Whether they take matrices of this type that lie on a GPU: fp32, fp16 or bf16.
bool takes(const at::Tensor& matrix);

// The functions of these names that `Small` in low_rank.h lists, for matrices that are taken.
std::tuple<at::Tensor, at::Tensor> stacked(
    const at::Tensor& right, const at::Tensor& shift_right, const at::Tensor& left,
    const at::Tensor& shift_left, at::ScalarType type);
void mix_shifted_(const at::Tensor& product, const at::Tensor& singular_values, double scaling);
at::Tensor rotated_middle(
    const at::Tensor& singular_values, const at::Tensor& left, const at::Tensor& right,
    double scaling, at::ScalarType type);
std::tuple<at::Tensor, at::Tensor> turned_grads(
    const at::Tensor& grad, const at::Tensor& singular_values, const at::Tensor& left,
    const at::Tensor& right, double scaling);

}  // namespace spectral::low_rank_kernels
