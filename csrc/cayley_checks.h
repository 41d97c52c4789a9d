// The conditions both devices' ops need before they touch memory. The public function validates its
// arguments with better words; these keep a wrong call of a raw op from reading out of bounds.
#pragma once

#include <ATen/ATen.h>

namespace spectral {

inline void check_matrix_dtype(const at::Tensor& tensor, const char* name, std::size_t index) {
    TORCH_CHECK_TYPE(
        tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, name, "[", index,
        "] must be float32 or float64; got ", tensor.scalar_type());
}

inline void check_forward(at::TensorList packed, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(
        packed.size() == sizes.size(), "sizes must have one entry per batch in packed, ",
        packed.size(), "; got ", sizes.size());
    for (std::size_t i = 0; i < packed.size(); ++i) {
        const std::int64_t n = sizes[i];
        TORCH_CHECK_VALUE(n >= 1, "sizes[", i, "] must be at least 1; got ", n);
        TORCH_CHECK_VALUE(
            packed[i].dim() == 2 && packed[i].size(1) == n * (n - 1) / 2, "packed[", i,
            "] must have shape [B, n(n-1)/2] = [B, ", n * (n - 1) / 2, "] for n = ", n, "; got ",
            packed[i].sizes());
        check_matrix_dtype(packed[i], "packed", i);
        TORCH_CHECK_VALUE(
            packed[i].device() == packed[0].device(), "packed[", i, "] must be on ",
            packed[0].device(), " like packed[0]; got ", packed[i].device());
    }
}

inline void check_backward(at::TensorList grad_rotation, at::TensorList rotation) {
    TORCH_CHECK_VALUE(
        grad_rotation.size() == rotation.size(),
        "grad_rotation must have one entry per batch in rotation, ", rotation.size(), "; got ",
        grad_rotation.size());
    for (std::size_t i = 0; i < rotation.size(); ++i) {
        TORCH_CHECK_VALUE(
            rotation[i].dim() == 3 && rotation[i].size(1) == rotation[i].size(2) &&
                rotation[i].size(1) >= 1,
            "rotation[", i, "] must have shape [B, n, n] with n >= 1; got ", rotation[i].sizes());
        check_matrix_dtype(rotation[i], "rotation", i);
        TORCH_CHECK_VALUE(
            grad_rotation[i].sizes() == rotation[i].sizes(), "grad_rotation[", i,
            "] must have the shape of rotation[", i, "], ", rotation[i].sizes(), "; got ",
            grad_rotation[i].sizes());
        TORCH_CHECK_TYPE(
            grad_rotation[i].scalar_type() == rotation[i].scalar_type(), "grad_rotation[", i,
            "] must have the dtype of rotation[", i, "], ", rotation[i].scalar_type(), "; got ",
            grad_rotation[i].scalar_type());
        TORCH_CHECK_VALUE(
            rotation[i].device() == rotation[0].device() &&
                grad_rotation[i].device() == rotation[0].device(),
            "rotation and grad_rotation must all be on ", rotation[0].device(), "; got ",
            rotation[i].device(), " and ", grad_rotation[i].device(), " at index ", i);
    }
}

}  // namespace spectral
