// spectral::rotated_linear_fwd and _bwd, soda_linear_fwd and _bwd for CUDA: nothing but ATen's
// products, so it is compiled with or without CUDA. `spectral_products` has the same functions for
// every device: the Kronecker ones are what eager code calls on a GPU, the others are for tests.
#include <torch/library.h>

#include <cstdint>
#include <vector>

#include "kron_products.h"
#include "rotated_linear.h"
#if defined(SPECTRAL_WITH_CUDA)
#include "kron_tensor_core.h"
#endif

namespace spectral::products {
namespace {

struct Kron : PlainKron {
    static constexpr bool kSumsShareMemory = false;

#if defined(SPECTRAL_WITH_CUDA)
    static bool has_gradients(const at::Tensor& h, const at::Tensor& x, at::TensorList factors) {
        if (x.scalar_type() != h.scalar_type()) return false;
        std::vector<std::int64_t> sizes;
        for (const at::Tensor& factor : factors) {
            if (factor.scalar_type() != at::kFloat) return false;
            sizes.push_back(factor.size(0));
        }
        return tensor_core::takes(h, sizes);
    }
    static constexpr auto gradients_ = &tensor_core::kron_gradients_;

    static at::Tensor rotate(
        const at::Tensor& x, at::TensorList factors, bool transpose,
        const std::optional<at::Tensor>& scale_before,
        const std::optional<at::Tensor>& scale_after) {
        std::vector<std::int64_t> sizes;
        for (const at::Tensor& factor : factors) sizes.push_back(factor.size(0));
        const bool fits = tensor_core::takes(x, sizes);
        const auto function = fits ? &tensor_core::kron_rotate : &kron_rotate;
        return function(x, factors, transpose, scale_before, scale_after);
    }

    static std::vector<at::Tensor> gram(
        const at::Tensor& a, const at::Tensor& b, at::IntArrayRef dims,
        const std::optional<at::Tensor>& scale_b) {
        const bool fits = tensor_core::takes(a, dims) && tensor_core::takes(b, dims);
        return (fits ? &tensor_core::kron_gram : &kron_gram)(a, b, dims, scale_b);
    }
#else
    static constexpr auto rotate = &kron_rotate;
    static constexpr auto gram = &kron_gram;
#endif
};

using Layers = RotatedLinear<Kron>;

}  // namespace
}  // namespace spectral::products

TORCH_LIBRARY_IMPL(spectral, CUDA, m) {
    m.impl("rotated_linear_fwd", &spectral::products::Layers::rotated_linear_fwd);
    m.impl("rotated_linear_bwd", &spectral::products::Layers::rotated_linear_bwd);
    m.impl("soda_linear_fwd", &spectral::products::Layers::soda_linear_fwd);
    m.impl("soda_linear_bwd", &spectral::products::Layers::soda_linear_bwd);
}

TORCH_LIBRARY_FRAGMENT(spectral_products, m) {
    const auto any = c10::DispatchKey::CompositeExplicitAutograd;
    const auto define = [&](const char* schema, auto function) {
        m.def(schema, torch::dispatch(any, function));
    };
    define(
        "kron_rotate(Tensor x, Tensor[] factors, bool transpose, Tensor? scale_before, "
        "Tensor? scale_after) -> Tensor",
        &spectral::products::kron_rotate);
    define(
        "kron_gram(Tensor a, Tensor b, int[] dims, Tensor? scale_b) -> Tensor[]",
        &spectral::products::kron_gram);
    define(
        "rotated_linear_fwd(Tensor x, Tensor? scale, Tensor matrix, Tensor? subtract, Tensor? "
        "bias, "
        "bool transpose, bool on_tokens, Tensor[] factors) -> (Tensor, Tensor)",
        &spectral::products::Layers::rotated_linear_fwd);
    define(
        "rotated_linear_bwd(Tensor grad, Tensor x, Tensor? scale, Tensor matrix, Tensor? subtract, "
        "Tensor? rotated, bool transpose, bool needs_sums, Tensor[] factors) -> Tensor[]",
        &spectral::products::Layers::rotated_linear_bwd);
    define(
        "soda_linear_fwd(Tensor x, Tensor scale, Tensor left, Tensor right, Tensor? bias, "
        "Tensor? rotated, bool on_tokens, Tensor[] factors) -> Tensor[]",
        &spectral::products::Layers::soda_linear_fwd);
    define(
        "soda_linear_bwd(Tensor grad, Tensor z, Tensor scale, Tensor left, Tensor right, "
        "Tensor? rotated, bool on_tokens, bool needs_x, bool needs_sums, Tensor[] factors) "
        "-> Tensor[]",
        &spectral::products::Layers::soda_linear_bwd);
}
