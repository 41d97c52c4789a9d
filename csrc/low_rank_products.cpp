// spectral::low_rank_linear, spectral_a_linear and spectral_r_linear, forward and backward, for
// CUDA: ATen's products and, between them, small kernels (low_rank_cuda.cu) or ATen's passes,
// called from C++, where a call costs a fraction of a Triton kernel's launch from Python. Compiled
// with or without CUDA; `spectral_products` has the same functions for every device, for tests.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <tuple>
#include <utility>
#include <vector>

#include "low_rank.h"
#if defined(SPECTRAL_WITH_CUDA)
#include "low_rank_cuda.h"
#include "low_rank_kernels.h"
#include "new_kernels.h"
#endif

namespace spectral::products {
namespace {

struct Small {
    // A rotation above this size is multiplied by cuBLAS.
    static constexpr std::int64_t kMaxSummed = 64;

#if defined(SPECTRAL_WITH_CUDA)
    // Whether one kernel does it, else ATen's do.
    static bool has_kernel(std::initializer_list<const at::Tensor*> matrices) {
        if (!new_kernels_are_on) return false;
        return std::all_of(matrices.begin(), matrices.end(), [](const at::Tensor* matrix) {
            return low_rank_kernels::takes(*matrix);
        });
    }
#endif

    static at::Tensor rows(const at::Tensor& matrix, at::ScalarType type) {
        return matrix.to(type).t();
    }

    static std::tuple<at::Tensor, at::Tensor> stacked(
        const at::Tensor& right, const at::Tensor& shift_right, const at::Tensor& left,
        const at::Tensor& shift_left, at::ScalarType type) {
#if defined(SPECTRAL_WITH_CUDA)
        if (type != at::kDouble && has_kernel({&right, &shift_right, &left, &shift_left})) {
            return low_rank_kernels::stacked(right, shift_right, left, shift_left, type);
        }
#endif
        return {one_stack(right, shift_right, type), one_stack(left.t(), shift_left, type)};
    }

    static at::Tensor one_stack(
        const at::Tensor& frozen, const at::Tensor& shift, at::ScalarType type) {
        const std::int64_t n = shift.size(0), r = shift.size(1);
        const at::Tensor result = at::empty({2 * r, n}, shift.options().dtype(type));
        result.narrow(0, 0, r).copy_(frozen);
        result.narrow(0, r, r).copy_(shift.t());
        return result;
    }

    static at::Tensor mix_shifted(
        const at::Tensor& product, const at::Tensor& singular_values, double scaling) {
#if defined(SPECTRAL_WITH_CUDA)
        if (has_kernel({&product, &singular_values})) {
            low_rank_kernels::mix_shifted_(product, singular_values, scaling);
            return product;
        }
#endif
        const at::ScalarType type = product.scalar_type();
        at::Tensor scale = singular_values.to(type == at::kDouble ? type : at::kFloat);
        if (scaling != 1) scale = at::mul(scale, scaling);
        const std::int64_t r = product.size(1) / 2;
        const at::Tensor result = at::empty_like(product), alone = product.narrow(1, r, r);
        at::Tensor first = result.narrow(1, 0, r), second = result.narrow(1, r, r);
        at::mul_out(first, alone, scale);
        at::add_out(second, product.narrow(1, 0, r), alone).mul_(scale);
        return result;
    }

    // Products of half precision are summed in fp32 and need not be rounded in between.
    static at::Tensor product_as(at::ScalarType type, const at::Tensor& a, const at::Tensor& b) {
        const bool is_half = a.scalar_type() == at::kHalf || a.scalar_type() == at::kBFloat16;
        if (a.is_cuda() && is_half && type == at::kFloat) return at::mm(a, b, type);
        return at::mm(a, b).to(type);
    }

    static at::Tensor tall_product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) {
        return product_as(type, a.t(), b);
    }

    static at::Tensor scaled_columns(
        const at::Tensor& rotation, const at::Tensor& singular_values) {
        return at::mul(rotation, singular_values.to(rotation.scalar_type()));
    }

    // Small ones by a sum: exact for identities also where cuBLAS may use TF32.
    static at::Tensor rotated_middle(
        const at::Tensor& singular_values, const at::Tensor& left, const at::Tensor& right,
        double scaling, at::ScalarType type) {
#if defined(SPECTRAL_WITH_CUDA)
        if (type != at::kDouble && left.size(0) <= cuda::kMaxRotation &&
            has_kernel({&singular_values, &left, &right})) {
            return low_rank_kernels::rotated_middle(singular_values, left, right, scaling, type);
        }
#endif
        const at::Tensor scaled = scaled_columns(left, singular_values);
        const at::Tensor middle = left.size(0) <= kMaxSummed
                                      ? at::mul(scaled.unsqueeze(1), right.unsqueeze(0)).sum(-1)
                                      : at::mm(scaled, right.t());
        middle.diagonal().sub_(singular_values.to(left.scalar_type()));
        scale_(middle, scaling);
        return middle.to(type);
    }

    static std::tuple<at::Tensor, at::Tensor> turned_grads(
        const at::Tensor& h, const at::Tensor& thin, const at::Tensor& singular_values,
        const at::Tensor& left, const at::Tensor& right, double scaling) {
        const at::ScalarType type = left.scalar_type();
        const at::Tensor grad = product_as(type, h.t(), thin);
#if defined(SPECTRAL_WITH_CUDA)
        if (type == at::kFloat && right.scalar_type() == type &&
            left.size(0) <= cuda::kMaxRotation && has_kernel({&grad, &singular_values, &left})) {
            return low_rank_kernels::turned_grads(grad, singular_values, left, right, scaling);
        }
#endif
        return turned_by_products(
            grad, scaled_columns(left, singular_values), scaled_columns(right, singular_values),
            scaling);
    }
};

using Ops = LowRank<Small>;

}  // namespace
}  // namespace spectral::products

TORCH_LIBRARY_IMPL(spectral, CUDA, m) {
    m.impl("low_rank_linear_fwd", &spectral::products::Ops::low_rank_linear_fwd);
    m.impl("low_rank_linear_bwd", &spectral::products::Ops::low_rank_linear_bwd);
    m.impl("spectral_a_linear_fwd", &spectral::products::Ops::spectral_a_linear_fwd);
    m.impl("spectral_a_linear_bwd", &spectral::products::Ops::spectral_a_linear_bwd);
    m.impl("spectral_r_linear_fwd", &spectral::products::Ops::spectral_r_linear_fwd);
    m.impl("spectral_r_linear_bwd", &spectral::products::Ops::spectral_r_linear_bwd);
}

TORCH_LIBRARY_FRAGMENT(spectral_products, m) {
    const auto define = [&](const char* schema, auto function) {
        m.def(schema, torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, function));
    };
    define(
        "low_rank_linear_fwd(Tensor x, Tensor? base, Tensor? weight, Tensor? bias, Tensor down, "
        "Tensor up, float scaling) -> (Tensor, Tensor)",
        &spectral::products::Ops::low_rank_linear_fwd);
    define(
        "low_rank_linear_bwd(Tensor grad, Tensor x, Tensor? weight, Tensor thin, Tensor down, "
        "Tensor up, float scaling, bool needs_x, bool needs_factors) -> Tensor[]",
        &spectral::products::Ops::low_rank_linear_bwd);
    define(
        "spectral_a_linear_fwd(Tensor x, Tensor? base, Tensor? weight, Tensor? bias, Tensor left, "
        "Tensor singular_values, Tensor right, Tensor shift_left, Tensor shift_right, "
        "float scaling) -> (Tensor, Tensor)",
        &spectral::products::Ops::spectral_a_linear_fwd);
    define(
        "spectral_a_linear_bwd(Tensor grad, Tensor x, Tensor? weight, Tensor thin, Tensor left, "
        "Tensor singular_values, Tensor right, Tensor shift_left, Tensor shift_right, "
        "float scaling, bool needs_x, bool needs_factors) -> Tensor[]",
        &spectral::products::Ops::spectral_a_linear_bwd);
    define(
        "spectral_r_linear_fwd(Tensor x, Tensor? base, Tensor? weight, Tensor? bias, Tensor left, "
        "Tensor singular_values, Tensor right, Tensor rotation_left, Tensor rotation_right, "
        "float scaling) -> (Tensor, Tensor)",
        &spectral::products::Ops::spectral_r_linear_fwd);
    define(
        "spectral_r_linear_bwd(Tensor grad, Tensor? weight, Tensor thin, Tensor left, "
        "Tensor singular_values, Tensor right, Tensor rotation_left, Tensor rotation_right, "
        "float scaling, bool needs_x, bool needs_factors) -> Tensor[]",
        &spectral::products::Ops::spectral_r_linear_bwd);
}
