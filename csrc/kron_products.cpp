#include "kron_products.h"

#include <cstddef>
#include <cstdint>

namespace spectral::products {
namespace {

at::ScalarType accumulation_type(const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_rows(const at::Tensor& tensor, const char* name, std::int64_t width) {
    TORCH_CHECK_VALUE(
        tensor.dim() == 2 && tensor.size(1) == width, name, " must have shape [M, ", width,
        "]; got ", tensor.sizes());
}

std::int64_t product_of(at::IntArrayRef sizes, const char* name) {
    TORCH_CHECK_VALUE(!sizes.empty(), name, " must not be empty");
    std::int64_t product = 1;
    for (const std::int64_t n : sizes) product *= n;
    return product;
}

}  // namespace

at::Tensor kron_rotate(
    const at::Tensor& x, at::TensorList factors, bool transpose,
    const std::optional<at::Tensor>& scale_before, const std::optional<at::Tensor>& scale_after) {
    const at::ScalarType type = accumulation_type(x);
    std::vector<std::int64_t> dims;
    for (const at::Tensor& factor : factors) {
        TORCH_CHECK_VALUE(
            factor.dim() == 2 && factor.size(0) == factor.size(1),
            "factors must be square matrices; got ", factor.sizes());
        dims.push_back(factor.size(0));
    }
    check_rows(x, "x", product_of(dims, "factors"));

    at::Tensor y = x.to(type).contiguous();
    if (scale_before.has_value()) y = at::mul(y, scale_before->to(type));
    std::int64_t rows = x.size(0), inner = x.size(1);
    for (std::size_t axis = 0; axis < factors.size(); ++axis) {
        const std::int64_t n = dims[axis];
        inner /= n;
        const at::Tensor factor = factors[axis].to(type);
        if (inner == 1) {
            y = at::mm(y.view({rows, n}), transpose ? factor.t() : factor);
        } else {
            // R^T from the left, the same for every row of the batch.
            const at::Tensor turned = (transpose ? factor : factor.t()).unsqueeze(0);
            y = at::bmm(turned.expand({rows, n, n}), y.view({rows, n, inner}));
        }
        rows *= n;
    }
    y = y.view(x.sizes());
    if (scale_after.has_value()) y.mul_(scale_after->to(type));
    return y.to(x.scalar_type());
}

std::vector<at::Tensor> kron_gram(
    const at::Tensor& a, const at::Tensor& b, at::IntArrayRef dims,
    const std::optional<at::Tensor>& scale_b) {
    const std::int64_t width = product_of(dims, "dims");
    check_rows(a, "a", width);
    check_rows(b, "b", width);
    TORCH_CHECK_VALUE(
        a.size(0) == b.size(0), "b must have as many rows as a, ", a.size(0), "; got ", b.size(0));
    const at::ScalarType type = accumulation_type(a);
    const at::Tensor left = a.to(type).contiguous(), right = b.contiguous();
    // Products of mixed types are of the wider one: only `a` is cast by a pass of its own.
    const at::Tensor column_sums = at::mul(left, right).sum(0);
    const at::Tensor scaled =
        scale_b.has_value() ? at::mul(right, scale_b->to(type)) : right.to(type);

    std::vector<at::Tensor> results;
    std::int64_t rows = a.size(0), inner = width;
    for (const std::int64_t n : dims) {
        inner /= n;
        const at::Tensor p = left.view({rows, n, inner}), q = scaled.view({rows, n, inner});
        if (inner == 1) {
            results.push_back(at::mm(p.squeeze(2).t(), q.squeeze(2)));
        } else if (n <= inner) {
            results.push_back(at::bmm(p, q.mT()).sum(0));
        } else {
            // The products of the rows would be larger than the rows.
            const auto unfolded = [&](const at::Tensor& t) {
                return t.transpose(0, 1).reshape({n, rows * inner});
            };
            results.push_back(at::mm(unfolded(p), unfolded(q).t()));
        }
        rows *= n;
    }
    results.push_back(column_sums);
    return results;
}

}  // namespace spectral::products
