// What the low-rank ops of all devices share: checks, and the products with frozen weights.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace spectral {

using Optional = std::optional<at::Tensor>;

// The dtypes were chosen outside: a backward may run where autocast is on.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

inline at::Tensor flat(const at::Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.dim() >= 1, "x and grad must have at least one dimension");
    return tensor.dim() == 2 ? tensor : tensor.reshape({-1, tensor.size(-1)});
}

inline void check_shape(const at::Tensor& tensor, const char* name, at::IntArrayRef shape) {
    TORCH_CHECK_VALUE(
        tensor.sizes() == shape, name, " must have shape ", shape, "; got ", tensor.sizes());
}

inline void scale_(const at::Tensor& tensor, double scaling) {
    if (scaling != 1) tensor.mul_(scaling);
}

// start + thin @ up with thin [M, q] and up [q, out]; what the start is, see the reference.
inline at::Tensor onto(
    const at::Tensor& x, const Optional& base, const Optional& weight, const Optional& bias,
    const at::Tensor& thin, const at::Tensor& up) {
    TORCH_CHECK_VALUE(
        !base.has_value() || !weight.has_value(), "base and weight exclude each other");
    at::Tensor y;
    if (weight.has_value()) {
        const at::ScalarType type = x.scalar_type();
        y = at::linear(x, weight->to(type), bias.has_value() ? bias->to(type) : bias).contiguous();
        y.view({-1, y.size(-1)}).addmm_(thin, up);
        return y;
    }
    y = base.has_value() ? at::addmm(flat(*base), thin, up) : at::mm(thin, up);
    std::vector<std::int64_t> shape = x.sizes().vec();
    shape.back() = up.size(1);
    return y.view(shape);
}

// grad W + thin @ down [..., in]: thin [M, q], down [q, in].
inline at::Tensor grad_of_x(
    const at::Tensor& grad, const Optional& weight, const at::Tensor& thin,
    const at::Tensor& down) {
    std::vector<std::int64_t> shape = grad.sizes().vec();
    shape.back() = down.size(1);
    if (!weight.has_value()) return at::mm(thin, down).view(shape);
    const at::Tensor result = at::mm(flat(grad), weight->to(grad.scalar_type()));
    return result.addmm_(thin, down).view(shape);
}

// Nothing [0] where no gradient was asked for.
inline std::vector<at::Tensor> filled(std::vector<at::Tensor> results, const at::Tensor& like) {
    for (at::Tensor& result : results) {
        if (!result.defined()) result = at::empty({0}, like.options());
    }
    return results;
}

inline void check_basis(
    const at::Tensor& left, const at::Tensor& singular_values, const at::Tensor& right) {
    TORCH_CHECK_VALUE(
        left.dim() == 2 && right.dim() == 2, "left and right must be matrices; got shapes ",
        left.sizes(), " and ", right.sizes());
    check_shape(singular_values, "singular_values", {left.size(1)});
    check_shape(right, "right", {left.size(1), right.size(1)});
}

inline std::tuple<at::Tensor, at::Tensor> low_rank_linear_fwd(
    const at::Tensor& x, const Optional& base, const Optional& weight, const Optional& bias,
    const at::Tensor& down, const at::Tensor& up, double scaling) {
    const NoAutocast guard(c10::autocast_dispatch_keyset);
    const at::ScalarType type = x.scalar_type();
    const at::Tensor thin = at::mm(flat(x), down.to(type).t());
    scale_(thin, scaling);
    return {onto(x, base, weight, bias, thin, up.to(type).t()), thin};
}

}  // namespace spectral
