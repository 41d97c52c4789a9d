// spectral::rotated_linear_fwd and _bwd, soda_linear_fwd and _bwd over ATen's products. They do
// what the references do with fewer calls. How rows are rotated and their sums taken is the
// argument Kron:
//
//   rotate(x, factors, transpose, scale_before, scale_after) and gram(a, b, dims, scale_b), the raw
//   ops kron_rotate and kron_gram;
//   is_fused(type): whether there is rotate_gram_(a, factors, transpose, b, scale_b), which rotates
//   `a` in place, takes the sums, and multiplies `a` by the scale;
//   has_gradients(h, x, factors): whether there is gradients_(h, rotates, factors, transpose, x,
//   scale), which rotates h in place if it is to, takes the sums, multiplies h by the scale, and
//   returns the column sums and the factors' gradients;
//   kSumsShareMemory: whether the sums may be views of one tensor.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace spectral {

// What a Kron that only rotates and sums has not.
struct PlainKron {
    static bool is_fused(at::ScalarType) { return false; }
    static std::vector<at::Tensor> rotate_gram_(
        const at::Tensor&, at::TensorList, bool, const at::Tensor&,
        const std::optional<at::Tensor>&) {
        TORCH_INTERNAL_ASSERT(false, "not fused");
    }
    static bool has_gradients(const at::Tensor&, const at::Tensor&, at::TensorList) {
        return false;
    }
    static std::vector<at::Tensor> gradients_(
        const at::Tensor&, bool, at::TensorList, bool, const at::Tensor&,
        const std::optional<at::Tensor>&) {
        TORCH_INTERNAL_ASSERT(false, "has no gradients");
    }
};

template <typename Kron>
struct RotatedLinear {
    using Optional = std::optional<at::Tensor>;

    static at::Tensor flat(const at::Tensor& tensor) {
        TORCH_CHECK_VALUE(tensor.dim() >= 1, "x and grad must have at least one dimension");
        return tensor.dim() == 2 ? tensor : tensor.reshape({-1, tensor.size(-1)});
    }

    // tensor * scale in the tensor's type, by one pass whatever the scale's is.
    static at::Tensor times(const at::Tensor& tensor, const at::Tensor& scale) {
        at::Tensor result = at::empty(tensor.sizes(), tensor.options());
        return at::mul_out(result, tensor, scale);
    }

    // A matrix [rows, k] rotated in at least the given type, then in that type.
    static at::Tensor rotate_matrix(
        const at::Tensor& matrix, at::TensorList factors, bool transpose, at::ScalarType type) {
        const at::Tensor wide = matrix.to(at::promote_types(matrix.scalar_type(), type));
        return Kron::rotate(wide, factors, transpose, std::nullopt, std::nullopt).to(type);
    }

    // h = dy (M Q), rotated among the tokens; where they are wanted ds and dR_1, ..., dR_f, from
    // the sums kron_gram(h, x, dims, scale). h is then multiplied by the scale if `scaled` says so.
    struct TurnedGradient {
        at::Tensor h;
        std::vector<at::Tensor> gradients;
        bool scaled = false;
    };

    static TurnedGradient turned_gradient(
        const at::Tensor& flat_grad, const at::Tensor& flat_x, const at::Tensor& matrix,
        bool rotates, bool transpose, bool needs_sums, const Optional& scale,
        at::TensorList factors) {
        const at::ScalarType type = flat_grad.scalar_type();
        TurnedGradient result{at::mm(flat_grad, matrix), {}, false};
        if (needs_sums && Kron::has_gradients(result.h, flat_x, factors)) {
            result.gradients =
                Kron::gradients_(result.h, rotates, factors, transpose, flat_x, scale);
            if (scale.has_value()) {
                result.gradients[0] = result.gradients[0].to(scale->scalar_type());
                result.scaled = true;
            }
            return result;
        }
        if (rotates && needs_sums && Kron::is_fused(type)) {
            const std::vector<at::Tensor> sums =
                Kron::rotate_gram_(result.h, factors, transpose, flat_x, scale);
            result.gradients = gradients(sums, scale, transpose, factors);
            result.scaled = true;
            return result;
        }
        if (rotates) {
            result.h = Kron::rotate(result.h, factors, transpose, std::nullopt, std::nullopt);
        }
        if (needs_sums) {
            std::vector<std::int64_t> dims;
            for (const at::Tensor& factor : factors) dims.push_back(factor.size(0));
            const std::vector<at::Tensor> sums = Kron::gram(result.h, flat_x, dims, scale);
            result.gradients = gradients(sums, scale, transpose, factors);
        }
        return result;
    }

    // ds and dR_1, ..., dR_f from the Grams and the column sums.
    static std::vector<at::Tensor> gradients(
        const std::vector<at::Tensor>& sums, const Optional& scale, bool transpose,
        at::TensorList factors) {
        const at::Tensor& columns = sums.back();
        std::vector<at::Tensor> results;
        if (scale.has_value() && scale->scalar_type() != columns.scalar_type()) {
            results.push_back(columns.to(scale->scalar_type()));
        } else {
            // No result may share memory with another.
            results.push_back(Kron::kSumsShareMemory ? columns.clone() : columns);
        }
        for (std::size_t i = 0; i < factors.size(); ++i) {
            const at::Tensor gram = sums[i].to(factors[i].scalar_type());
            results.push_back(transpose ? at::mm(gram.t(), factors[i]) : at::mm(factors[i], gram));
        }
        return results;
    }

    static std::tuple<at::Tensor, at::Tensor> rotated_linear_fwd(
        const at::Tensor& x, const Optional& scale, const at::Tensor& matrix,
        const Optional& subtract, const Optional& bias, bool transpose, bool on_tokens,
        at::TensorList factors) {
        const at::ScalarType type = x.scalar_type();
        if (on_tokens) {
            const at::Tensor t = Kron::rotate(flat(x), factors, !transpose, scale, std::nullopt);
            const at::Tensor y = at::linear(t, matrix.to(type), bias);
            std::vector<std::int64_t> shape = x.sizes().vec();
            shape.back() = matrix.size(0);
            return {y.view(shape), at::empty({0}, x.options())};
        }
        const at::Tensor rotated = rotate_matrix(matrix, factors, transpose, type);
        if (!subtract.has_value()) {
            const at::Tensor t = scale.has_value() ? times(x, *scale) : x;
            return {at::linear(t, rotated, bias), rotated};
        }
        // Folding s and N into the basis keeps the difference exact: zero is zero.
        const at::Tensor folded = scale.has_value() ? times(rotated, *scale) : rotated;
        return {at::linear(x, folded - subtract->to(type), bias), rotated};
    }

    static std::vector<at::Tensor> rotated_linear_bwd(
        const at::Tensor& grad, const at::Tensor& x, const Optional& scale,
        const at::Tensor& matrix, const Optional& subtract, const Optional& rotated, bool transpose,
        bool needs_sums, at::TensorList factors) {
        const at::Tensor flat_grad = flat(grad), flat_x = flat(x);
        const at::ScalarType type = grad.scalar_type();
        auto [h, gradients, scaled] = turned_gradient(
            flat_grad, flat_x, rotated.has_value() ? *rotated : matrix.to(type),
            !rotated.has_value(), transpose, needs_sums, scale, factors);
        if (scale.has_value() && !scaled) h.mul_(*scale);
        if (subtract.has_value()) h = h - at::mm(flat_grad, subtract->to(type));

        std::vector<at::Tensor> results{h.view(x.sizes())};
        results.insert(results.end(), gradients.begin(), gradients.end());
        return results;
    }

    static std::vector<at::Tensor> soda_linear_fwd(
        const at::Tensor& x, const at::Tensor& scale, const at::Tensor& left,
        const at::Tensor& right, const Optional& bias, const Optional& rotated, bool on_tokens,
        at::TensorList factors) {
        const at::ScalarType type = x.scalar_type();
        const at::Tensor z = at::linear(x, right.to(type));
        if (on_tokens) {
            const at::Tensor t = Kron::rotate(flat(z), factors, true, scale, std::nullopt);
            std::vector<std::int64_t> shape = x.sizes().vec();
            shape.back() = left.size(0);
            return {at::linear(t, left.to(type), bias).view(shape), z};
        }
        const at::Tensor basis =
            rotated.has_value() ? rotated->to(type) : rotate_matrix(left, factors, false, type);
        // The scale goes into whichever is smaller.
        const at::Tensor y = z.numel() > basis.numel() ? at::linear(z, times(basis, scale), bias)
                                                       : at::linear(times(z, scale), basis, bias);
        if (rotated.has_value()) return {y, z};
        return {y, z, basis};
    }

    static std::vector<at::Tensor> soda_linear_bwd(
        const at::Tensor& grad, const at::Tensor& z, const at::Tensor& scale,
        const at::Tensor& left, const at::Tensor& right, const Optional& rotated, bool on_tokens,
        bool needs_x, bool needs_sums, at::TensorList factors) {
        const at::Tensor flat_grad = flat(grad), flat_z = flat(z);
        const at::ScalarType type = grad.scalar_type();
        const bool rotates =
            on_tokens || (!rotated.has_value() && flat_grad.size(0) <= left.size(0));
        const at::Tensor basis = rotates               ? left.to(type)
                                 : rotated.has_value() ? rotated->to(type)
                                                       : rotate_matrix(left, factors, false, type);
        auto [h, gradients, scaled] =
            turned_gradient(flat_grad, flat_z, basis, rotates, false, needs_sums, scale, factors);
        std::vector<at::Tensor> results;
        if (needs_x) {
            at::Tensor rows = right.to(type);
            if (!scaled && h.size(0) > rows.size(1)) {
                rows = times(rows, scale.unsqueeze(1));
            } else if (!scaled) {
                h.mul_(scale);
            }
            std::vector<std::int64_t> shape = grad.sizes().vec();
            shape.back() = right.size(1);
            results.push_back(at::mm(h, rows).view(shape));
        }
        results.insert(results.end(), gradients.begin(), gradients.end());
        return results;
    }
};

}  // namespace spectral
