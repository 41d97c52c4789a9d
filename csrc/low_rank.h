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

// The gradients of rotations [r, r] from dN and the rotations' columns times S1.
inline std::tuple<at::Tensor, at::Tensor> turned_by_products(
    const at::Tensor& grad_middle, const at::Tensor& left_scaled, const at::Tensor& right_scaled,
    double scaling) {
    scale_(grad_middle, scaling);
    return {at::mm(grad_middle, right_scaled), at::mm(grad_middle.t(), left_scaled)};
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

inline void check_shifted(
    const at::Tensor& left, const at::Tensor& singular_values, const at::Tensor& right,
    const at::Tensor& shift_left, const at::Tensor& shift_right) {
    check_basis(left, singular_values, right);
    check_shape(shift_left, "shift_left", left.sizes());
    check_shape(shift_right, "shift_right", {right.size(1), right.size(0)});
}

inline void check_rotated(
    const at::Tensor& left, const at::Tensor& singular_values, const at::Tensor& right,
    const at::Tensor& rotation_left, const at::Tensor& rotation_right) {
    check_basis(left, singular_values, right);
    check_shape(rotation_left, "rotation_left", {left.size(1), left.size(1)});
    check_shape(rotation_right, "rotation_right", {left.size(1), left.size(1)});
}

// The ops over ATen's products. What lies between these, passes over thin or small matrices, is the
// argument Small:
//
//   rows(matrix, type): the transpose of a thin matrix [n, q];
//   stacked(right, shift_right, left, shift_left, type): right [r, in] above the transpose of
//   shift_right [in, r], and the transposes of left and shift_left [out, r];
//   mix_shifted(product, singular_values, scaling): for every row [w, a] of 2r numbers
//   [a * scale, (w + a) * scale], perhaps in place;
//   tall_product(a, b, type): a^T b [n, q] from a [M, n] and b [M, q];
//   rotated_middle(singular_values, left, right, scaling, type): N = scaling * (R_U S1 R_V^T - S1)
//   [r, r], exactly zero for identities;
//   turned_grads(h, thin, singular_values, left, right, scaling): dR_U = scaling * dN R_V S1 and
//   dR_V = scaling * dN^T R_U S1 [r, r] with dN = h^T thin, in the rotations' type.
template <typename Small>
struct LowRank {
    static std::tuple<at::Tensor, at::Tensor> low_rank_linear_fwd(
        const at::Tensor& x, const Optional& base, const Optional& weight, const Optional& bias,
        const at::Tensor& down, const at::Tensor& up, double scaling) {
        const NoAutocast guard(c10::autocast_dispatch_keyset);
        const at::ScalarType type = x.scalar_type();
        const at::Tensor thin = at::mm(flat(x), down.to(type).t());
        scale_(thin, scaling);
        return {onto(x, base, weight, bias, thin, up.to(type).t()), thin};
    }

    static std::vector<at::Tensor> low_rank_linear_bwd(
        const at::Tensor& grad, const at::Tensor& x, const Optional& weight, const at::Tensor& thin,
        const at::Tensor& down, const at::Tensor& up, double scaling, bool needs_x,
        bool needs_factors) {
        const NoAutocast guard(c10::autocast_dispatch_keyset);
        const at::ScalarType type = grad.scalar_type();
        const at::Tensor flat_grad = flat(grad);
        const at::Tensor h = at::mm(flat_grad, Small::rows(up, type).t());
        scale_(h, scaling);
        std::vector<at::Tensor> results(3);
        if (needs_x) results[0] = grad_of_x(grad, weight, h, down.to(type));
        if (needs_factors) {
            results[1] = at::mm(h.t(), flat(x)).to(down.scalar_type());
            results[2] = Small::tall_product(flat_grad, thin, up.scalar_type());
        }
        return filled(std::move(results), grad);
    }

    static std::tuple<at::Tensor, at::Tensor> spectral_a_linear_fwd(
        const at::Tensor& x, const Optional& base, const Optional& weight, const Optional& bias,
        const at::Tensor& left, const at::Tensor& singular_values, const at::Tensor& right,
        const at::Tensor& shift_left, const at::Tensor& shift_right, double scaling) {
        const NoAutocast guard(c10::autocast_dispatch_keyset);
        check_shifted(left, singular_values, right, shift_left, shift_right);
        const at::ScalarType type = x.scalar_type();
        const auto [down, up] = Small::stacked(right, shift_right, left, shift_left, type);
        const at::Tensor product = at::mm(flat(x), down.t());
        const at::Tensor thin = Small::mix_shifted(product, singular_values, scaling);
        return {onto(x, base, weight, bias, thin, up), thin};
    }

    static std::vector<at::Tensor> spectral_a_linear_bwd(
        const at::Tensor& grad, const at::Tensor& x, const Optional& weight, const at::Tensor& thin,
        const at::Tensor& left, const at::Tensor& singular_values, const at::Tensor& right,
        const at::Tensor& shift_left, const at::Tensor& shift_right, double scaling, bool needs_x,
        bool needs_factors) {
        const NoAutocast guard(c10::autocast_dispatch_keyset);
        check_shifted(left, singular_values, right, shift_left, shift_right);
        const at::ScalarType type = grad.scalar_type();
        const std::int64_t r = singular_values.size(0);
        const at::Tensor flat_grad = flat(grad);
        check_shape(thin, "thin", {flat_grad.size(0), 2 * r});
        const auto [down, up] = Small::stacked(right, shift_right, left, shift_left, type);
        const at::Tensor product = at::mm(flat_grad, up.t());
        const at::Tensor mixed = Small::mix_shifted(product, singular_values, scaling);
        std::vector<at::Tensor> results(3);
        if (needs_x) results[0] = grad_of_x(grad, weight, mixed, down);
        if (needs_factors) {
            results[1] =
                Small::tall_product(flat_grad, thin.narrow(1, r, r), shift_left.scalar_type());
            results[2] =
                Small::tall_product(flat(x), mixed.narrow(1, r, r), shift_right.scalar_type());
        }
        return filled(std::move(results), grad);
    }

    static std::tuple<at::Tensor, at::Tensor> spectral_r_linear_fwd(
        const at::Tensor& x, const Optional& base, const Optional& weight, const Optional& bias,
        const at::Tensor& left, const at::Tensor& singular_values, const at::Tensor& right,
        const at::Tensor& rotation_left, const at::Tensor& rotation_right, double scaling) {
        const NoAutocast guard(c10::autocast_dispatch_keyset);
        check_rotated(left, singular_values, right, rotation_left, rotation_right);
        const at::ScalarType type = x.scalar_type();
        const at::Tensor middle =
            Small::rotated_middle(singular_values, rotation_left, rotation_right, scaling, type);
        const at::Tensor thin = at::mm(flat(x), right.to(type).t());
        return {onto(x, base, weight, bias, at::mm(thin, middle.t()), left.to(type).t()), thin};
    }

    static std::vector<at::Tensor> spectral_r_linear_bwd(
        const at::Tensor& grad, const Optional& weight, const at::Tensor& thin,
        const at::Tensor& left, const at::Tensor& singular_values, const at::Tensor& right,
        const at::Tensor& rotation_left, const at::Tensor& rotation_right, double scaling,
        bool needs_x, bool needs_factors) {
        const NoAutocast guard(c10::autocast_dispatch_keyset);
        check_rotated(left, singular_values, right, rotation_left, rotation_right);
        const at::ScalarType type = grad.scalar_type();
        const at::Tensor h = at::mm(flat(grad), Small::rows(left, type).t());
        check_shape(thin, "thin", h.sizes());
        std::vector<at::Tensor> results(3);
        if (needs_x) {
            const at::Tensor middle = Small::rotated_middle(
                singular_values, rotation_left, rotation_right, scaling, type);
            results[0] = grad_of_x(grad, weight, at::mm(h, middle), right.to(type));
        }
        if (needs_factors) {
            std::tie(results[1], results[2]) = Small::turned_grads(
                h, thin, singular_values, rotation_left, rotation_right, scaling);
        }
        return filled(std::move(results), grad);
    }
};

}  // namespace spectral
