// spectral::low_rank_linear, spectral_a_linear and spectral_r_linear, forward and backward, for
// CUDA: ATen's products and a few passes over thin matrices, called from C++, where a call costs a
// fraction of a Triton kernel's launch from Python. Compiled with or without CUDA;
// `spectral_products` has the same functions for every device, for tests.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "low_rank.h"

namespace spectral::products {
namespace {

// A rotation above this size is multiplied by cuBLAS.
constexpr std::int64_t kMaxSmall = 64;

at::ScalarType accumulation_type(at::ScalarType type) {
    return type == at::kDouble ? at::kDouble : at::kFloat;
}

// Frozen [r, n] above the transpose of shift [n, r]: [2r, n] in the given type.
at::Tensor stacked(const at::Tensor& frozen, const at::Tensor& shift, at::ScalarType type) {
    const std::int64_t r = frozen.size(0), n = frozen.size(1);
    const at::Tensor result = at::empty({2 * r, n}, shift.options().dtype(type));
    result.narrow(0, 0, r).copy_(frozen);
    result.narrow(0, r, r).copy_(shift.t());
    return result;
}

// S1 * scaling in the type that products of the given type accumulate in.
at::Tensor scaled_values(const at::Tensor& singular_values, double scaling, at::ScalarType type) {
    const at::Tensor values = singular_values.to(accumulation_type(type));
    return scaling == 1 ? values : at::mul(values, scaling);
}

// For every row [w, a] of 2r numbers: [a * scale, (w + a) * scale].
at::Tensor mix_shifted(const at::Tensor& product, const at::Tensor& scale) {
    const std::int64_t r = product.size(1) / 2;
    const at::Tensor result = at::empty_like(product);
    const at::Tensor alone = product.narrow(1, r, r);
    at::Tensor first = result.narrow(1, 0, r), second = result.narrow(1, r, r);
    at::mul_out(first, alone, scale);
    at::add_out(second, product.narrow(1, 0, r), alone).mul_(scale);
    return result;
}

// scaling * (R_U S1 R_V^T - S1) [r, r]; exactly zero for identities, also where cuBLAS may use
// TF32.
at::Tensor rotated_middle(
    const at::Tensor& singular_values, const at::Tensor& left, const at::Tensor& right,
    double scaling) {
    const at::Tensor values = singular_values.to(left.scalar_type());
    const at::Tensor scaled = at::mul(left, values);
    at::Tensor middle = left.size(0) <= kMaxSmall
                            ? at::mul(scaled.unsqueeze(1), right.unsqueeze(0)).sum(-1)
                            : at::mm(scaled, right.t());
    middle.diagonal().sub_(values);
    scale_(middle, scaling);
    return middle;
}

}  // namespace

std::vector<at::Tensor> low_rank_linear_bwd(
    const at::Tensor& grad, const at::Tensor& x, const Optional& weight, const at::Tensor& thin,
    const at::Tensor& down, const at::Tensor& up, double scaling, bool needs_x,
    bool needs_factors) {
    const NoAutocast guard(c10::autocast_dispatch_keyset);
    const at::ScalarType type = grad.scalar_type();
    const at::Tensor flat_grad = flat(grad);
    const at::Tensor h = at::mm(flat_grad, up.to(type));
    scale_(h, scaling);
    std::vector<at::Tensor> results(3);
    if (needs_x) results[0] = grad_of_x(grad, weight, h, down.to(type));
    if (needs_factors) {
        results[1] = at::mm(h.t(), flat(x)).to(down.scalar_type());
        results[2] = at::mm(flat_grad.t(), thin).to(up.scalar_type());
    }
    return filled(std::move(results), grad);
}

std::tuple<at::Tensor, at::Tensor> spectral_a_linear_fwd(
    const at::Tensor& x, const Optional& base, const Optional& weight, const Optional& bias,
    const at::Tensor& left, const at::Tensor& singular_values, const at::Tensor& right,
    const at::Tensor& shift_left, const at::Tensor& shift_right, double scaling) {
    const NoAutocast guard(c10::autocast_dispatch_keyset);
    check_basis(left, singular_values, right);
    check_shape(shift_left, "shift_left", left.sizes());
    check_shape(shift_right, "shift_right", {right.size(1), right.size(0)});
    const at::ScalarType type = x.scalar_type();
    const at::Tensor product = at::mm(flat(x), stacked(right, shift_right, type).t());
    const at::Tensor thin = mix_shifted(product, scaled_values(singular_values, scaling, type));
    return {onto(x, base, weight, bias, thin, stacked(left.t(), shift_left, type)), thin};
}

std::vector<at::Tensor> spectral_a_linear_bwd(
    const at::Tensor& grad, const at::Tensor& x, const Optional& weight, const at::Tensor& thin,
    const at::Tensor& left, const at::Tensor& singular_values, const at::Tensor& right,
    const at::Tensor& shift_left, const at::Tensor& shift_right, double scaling, bool needs_x,
    bool needs_factors) {
    const NoAutocast guard(c10::autocast_dispatch_keyset);
    const at::ScalarType type = grad.scalar_type();
    const std::int64_t r = singular_values.size(0);
    const at::Tensor flat_grad = flat(grad);
    const at::Tensor product = at::mm(flat_grad, stacked(left.t(), shift_left, type).t());
    const at::Tensor mixed = mix_shifted(product, scaled_values(singular_values, scaling, type));
    std::vector<at::Tensor> results(3);
    if (needs_x) {
        results[0] = grad_of_x(grad, weight, mixed, stacked(right, shift_right, type));
    }
    if (needs_factors) {
        results[1] = at::mm(flat_grad.t(), thin.narrow(1, r, r)).to(shift_left.scalar_type());
        results[2] = at::mm(flat(x).t(), mixed.narrow(1, r, r)).to(shift_right.scalar_type());
    }
    return filled(std::move(results), grad);
}

std::tuple<at::Tensor, at::Tensor> spectral_r_linear_fwd(
    const at::Tensor& x, const Optional& base, const Optional& weight, const Optional& bias,
    const at::Tensor& left, const at::Tensor& singular_values, const at::Tensor& right,
    const at::Tensor& rotation_left, const at::Tensor& rotation_right, double scaling) {
    const NoAutocast guard(c10::autocast_dispatch_keyset);
    check_basis(left, singular_values, right);
    check_shape(rotation_left, "rotation_left", {left.size(1), left.size(1)});
    check_shape(rotation_right, "rotation_right", {left.size(1), left.size(1)});
    const at::ScalarType type = x.scalar_type();
    const at::Tensor middle =
        rotated_middle(singular_values, rotation_left, rotation_right, scaling).to(type);
    const at::Tensor thin = at::mm(flat(x), right.to(type).t());
    return {onto(x, base, weight, bias, at::mm(thin, middle.t()), left.to(type).t()), thin};
}

std::vector<at::Tensor> spectral_r_linear_bwd(
    const at::Tensor& grad, const Optional& weight, const at::Tensor& thin, const at::Tensor& left,
    const at::Tensor& singular_values, const at::Tensor& right, const at::Tensor& rotation_left,
    const at::Tensor& rotation_right, double scaling, bool needs_x, bool needs_factors) {
    const NoAutocast guard(c10::autocast_dispatch_keyset);
    const at::ScalarType type = grad.scalar_type();
    const at::Tensor h = at::mm(flat(grad), left.to(type));
    std::vector<at::Tensor> results(3);
    if (needs_x) {
        const at::Tensor middle =
            rotated_middle(singular_values, rotation_left, rotation_right, scaling).to(type);
        results[0] = grad_of_x(grad, weight, at::mm(h, middle), right.to(type));
    }
    if (needs_factors) {
        const at::Tensor grad_middle = at::mm(h.t(), thin).to(rotation_left.scalar_type());
        scale_(grad_middle, scaling);
        const at::Tensor values = singular_values.to(rotation_left.scalar_type());
        results[1] = at::mm(grad_middle, at::mul(rotation_right, values));
        results[2] = at::mm(grad_middle.t(), at::mul(rotation_left, values));
    }
    return filled(std::move(results), grad);
}

}  // namespace spectral::products

TORCH_LIBRARY_IMPL(spectral, CUDA, m) {
    m.impl("low_rank_linear_fwd", &spectral::low_rank_linear_fwd);
    m.impl("low_rank_linear_bwd", &spectral::products::low_rank_linear_bwd);
    m.impl("spectral_a_linear_fwd", &spectral::products::spectral_a_linear_fwd);
    m.impl("spectral_a_linear_bwd", &spectral::products::spectral_a_linear_bwd);
    m.impl("spectral_r_linear_fwd", &spectral::products::spectral_r_linear_fwd);
    m.impl("spectral_r_linear_bwd", &spectral::products::spectral_r_linear_bwd);
}

TORCH_LIBRARY_FRAGMENT(spectral_products, m) {
    const auto define = [&](const char* schema, auto function) {
        m.def(schema, torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, function));
    };
    define(
        "low_rank_linear_fwd(Tensor x, Tensor? base, Tensor? weight, Tensor? bias, Tensor down, "
        "Tensor up, float scaling) -> (Tensor, Tensor)",
        &spectral::low_rank_linear_fwd);
    define(
        "low_rank_linear_bwd(Tensor grad, Tensor x, Tensor? weight, Tensor thin, Tensor down, "
        "Tensor up, float scaling, bool needs_x, bool needs_factors) -> Tensor[]",
        &spectral::products::low_rank_linear_bwd);
    define(
        "spectral_a_linear_fwd(Tensor x, Tensor? base, Tensor? weight, Tensor? bias, Tensor left, "
        "Tensor singular_values, Tensor right, Tensor shift_left, Tensor shift_right, "
        "float scaling) -> (Tensor, Tensor)",
        &spectral::products::spectral_a_linear_fwd);
    define(
        "spectral_a_linear_bwd(Tensor grad, Tensor x, Tensor? weight, Tensor thin, Tensor left, "
        "Tensor singular_values, Tensor right, Tensor shift_left, Tensor shift_right, "
        "float scaling, bool needs_x, bool needs_factors) -> Tensor[]",
        &spectral::products::spectral_a_linear_bwd);
    define(
        "spectral_r_linear_fwd(Tensor x, Tensor? base, Tensor? weight, Tensor? bias, Tensor left, "
        "Tensor singular_values, Tensor right, Tensor rotation_left, Tensor rotation_right, "
        "float scaling) -> (Tensor, Tensor)",
        &spectral::products::spectral_r_linear_fwd);
    define(
        "spectral_r_linear_bwd(Tensor grad, Tensor? weight, Tensor thin, Tensor left, "
        "Tensor singular_values, Tensor right, Tensor rotation_left, Tensor rotation_right, "
        "float scaling, bool needs_x, bool needs_factors) -> Tensor[]",
        &spectral::products::spectral_r_linear_bwd);
}
