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
        const std::int64_t dim = packed[i].dim();
        TORCH_CHECK_VALUE(
            (dim == 1 || dim == 2) && packed[i].size(dim - 1) == n * (n - 1) / 2, "packed[", i,
            "] must have shape [B, n(n-1)/2] or [n(n-1)/2], with n(n-1)/2 = ", n * (n - 1) / 2,
            " for n = ", n, "; got ", packed[i].sizes());
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
            (rotation[i].dim() == 2 || rotation[i].dim() == 3) &&
                rotation[i].size(-1) == rotation[i].size(-2) && rotation[i].size(-1) >= 1,
            "rotation[", i, "] must have shape [B, n, n] or [n, n] with n >= 1; got ",
            rotation[i].sizes());
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

// Empty outputs for one batch: [B, n, n] rotations for packed [B, n(n-1)/2], [n, n] for one alone.
inline at::Tensor empty_rotations(const at::Tensor& packed, std::int64_t n) {
    return packed.dim() == 1 ? at::empty({n, n}, packed.options())
                             : at::empty({packed.size(0), n, n}, packed.options());
}

inline at::Tensor empty_packed(const at::Tensor& rotation) {
    const std::int64_t n = rotation.size(-1), length = n * (n - 1) / 2;
    return rotation.dim() == 2 ? at::empty({length}, rotation.options())
                               : at::empty({rotation.size(0), length}, rotation.options());
}

// The number of matrices in a batch of rotations.
inline std::int64_t matrix_count(const at::Tensor& rotation) {
    return rotation.dim() == 2 ? 1 : rotation.size(0);
}

}  // namespace spectral
