// spectral::low_rank_linear, spectral_a_linear and spectral_r_linear, forward and backward, on the
// CPU. They do what the references do with fewer calls: the matrix products are ATen's, what lies
// between them are loops over thin or small matrices, where a call would take longer than the work.
//
// Thin matrices are laid out as [q, n], a long row per column of the adapter: with q = 8, oneMKL
// takes half the time of [n, q] for products over n.
#include "low_rank.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

namespace spectral::cpu {
namespace {

struct Small {
    // Writes the transpose of a contiguous matrix.
    template <typename T>
    static void transpose_to(const at::Tensor& matrix, T* target) {
        const std::int64_t rows = matrix.size(0), columns = matrix.size(1);
        const T* const source = matrix.const_data_ptr<T>();
        for (std::int64_t column = 0; column < columns; ++column) {
            for (std::int64_t row = 0; row < rows; ++row) {
                target[column * rows + row] = source[row * columns + column];
            }
        }
    }

    // A transposed copy, contiguous, in the given type.
    static at::Tensor rows(const at::Tensor& matrix, at::ScalarType type) {
        const at::Tensor source = matrix.contiguous().to(type);
        const at::Tensor result = at::empty({source.size(1), source.size(0)}, source.options());
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "transposed", [&] {
            transpose_to(source, result.mutable_data_ptr<scalar_t>());
        });
        return result;
    }

    static std::tuple<at::Tensor, at::Tensor> stacked(
        const at::Tensor& right, const at::Tensor& shift_right, const at::Tensor& left,
        const at::Tensor& shift_left, at::ScalarType type) {
        return {
            one_stack(right, false, shift_right, type), one_stack(left, true, shift_left, type)};
    }

    // Frozen [r, n] (or, with `turn`, [n, r]) above the transpose of shift [n, r]: [2r, n].
    static at::Tensor one_stack(
        const at::Tensor& frozen, bool turn, const at::Tensor& shift, at::ScalarType type) {
        const at::Tensor top = frozen.contiguous().to(type);
        const at::Tensor bottom = shift.contiguous().to(type);
        const std::int64_t n = bottom.size(0), r = bottom.size(1);
        const at::Tensor result = at::empty({2 * r, n}, bottom.options());
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "stacked", [&] {
            scalar_t* const target = result.mutable_data_ptr<scalar_t>();
            if (turn) {
                transpose_to(top, target);
            } else {
                const scalar_t* const source = top.const_data_ptr<scalar_t>();
                std::copy(source, source + r * n, target);
            }
            transpose_to(bottom, target + r * n);
        });
        return result;
    }

    // In place, for every row [w, a] of 2r numbers: [a * scale, (w + a) * scale].
    static at::Tensor mix_shifted(
        const at::Tensor& product, const at::Tensor& singular_values, double scaling) {
        const std::int64_t rows = product.size(0), r = product.size(1) / 2;
        AT_DISPATCH_FLOATING_TYPES_AND2(
            at::kHalf, at::kBFloat16, product.scalar_type(), "mix_shifted", [&] {
                using Wide = at::opmath_type<scalar_t>;
                const at::Tensor wide =
                    singular_values.to(c10::CppTypeToScalarType<Wide>::value).contiguous();
                const Wide* const values = wide.const_data_ptr<Wide>();
                scalar_t* row = product.mutable_data_ptr<scalar_t>();
                for (std::int64_t i = 0; i < rows; ++i, row += 2 * r) {
                    for (std::int64_t j = 0; j < r; ++j) {
                        const Wide scale = values[j] * static_cast<Wide>(scaling);
                        const Wide whole = row[j], alone = row[r + j];
                        row[j] = static_cast<scalar_t>(alone * scale);
                        row[r + j] = static_cast<scalar_t>((whole + alone) * scale);
                    }
                }
            });
        return product;
    }

    // rotation * S1 [r, r]: its columns scaled.
    static at::Tensor scaled_columns(
        const at::Tensor& rotation, const at::Tensor& singular_values) {
        const at::Tensor source = rotation.contiguous();
        const at::Tensor scale = singular_values.to(source.scalar_type()).contiguous();
        const std::int64_t r = source.size(0);
        const at::Tensor result = at::empty({r, r}, source.options());
        AT_DISPATCH_FLOATING_TYPES(source.scalar_type(), "scaled_columns", [&] {
            const scalar_t* const from = source.const_data_ptr<scalar_t>();
            const scalar_t* const values = scale.const_data_ptr<scalar_t>();
            scalar_t* const to = result.mutable_data_ptr<scalar_t>();
            for (std::int64_t i = 0; i < r; ++i) {
                for (std::int64_t j = 0; j < r; ++j) to[i * r + j] = from[i * r + j] * values[j];
            }
        });
        return result;
    }

    // scaling * (R_U S1 R_V^T - S1) [r, r].
    static at::Tensor rotated_middle(
        const at::Tensor& singular_values, const at::Tensor& left, const at::Tensor& right,
        double scaling, at::ScalarType type) {
        const at::Tensor middle = at::mm(scaled_columns(left, singular_values), right.t());
        const at::Tensor values = singular_values.to(middle.scalar_type()).contiguous();
        AT_DISPATCH_FLOATING_TYPES(middle.scalar_type(), "rotated_middle", [&] {
            const std::int64_t r = middle.size(0);
            const scalar_t* const diagonal = values.const_data_ptr<scalar_t>();
            scalar_t* const entries = middle.mutable_data_ptr<scalar_t>();
            for (std::int64_t i = 0; i < r; ++i) entries[i * r + i] -= diagonal[i];
            for (std::int64_t i = 0; i < r * r; ++i) entries[i] *= static_cast<scalar_t>(scaling);
        });
        return middle.to(type);
    }

    static std::tuple<at::Tensor, at::Tensor> turned_grads(
        const at::Tensor& h, const at::Tensor& thin, const at::Tensor& singular_values,
        const at::Tensor& left, const at::Tensor& right, double scaling) {
        return turned_by_products(
            at::mm(h.t(), thin).to(left.scalar_type()), scaled_columns(left, singular_values),
            scaled_columns(right, singular_values), scaling);
    }

    // a^T b [n, q] from a [M, n] and b [M, q], in the type of a factor.
    static at::Tensor tall_product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) {
        return rows(at::mm(b.t(), a), type);
    }
};

using Ops = LowRank<Small>;

}  // namespace
}  // namespace spectral::cpu

TORCH_LIBRARY_IMPL(spectral, CPU, m) {
    m.impl("low_rank_linear_fwd", &spectral::cpu::Ops::low_rank_linear_fwd);
    m.impl("low_rank_linear_bwd", &spectral::cpu::Ops::low_rank_linear_bwd);
    m.impl("spectral_a_linear_fwd", &spectral::cpu::Ops::spectral_a_linear_fwd);
    m.impl("spectral_a_linear_bwd", &spectral::cpu::Ops::spectral_a_linear_bwd);
    m.impl("spectral_r_linear_fwd", &spectral::cpu::Ops::spectral_r_linear_fwd);
    m.impl("spectral_r_linear_bwd", &spectral::cpu::Ops::spectral_r_linear_bwd);
}
