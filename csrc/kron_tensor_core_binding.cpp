#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "kron_gram_cuda.h"
#include "kron_rotate_cuda.h"
#include "kron_tensor_core.h"
#include "new_kernels.h"

namespace spectral::tensor_core {
namespace {

// Enough blocks to fill the device, of so many warps for each of its processors, and not more than
// there are rows for when a block has `times` turns.
std::int32_t block_count(
    const at::Tensor& rows, at::IntArrayRef sizes, std::int64_t warps, std::int64_t times) {
    const std::int64_t per_row =
        cuda::warps_per_row(static_cast<int>(sizes[0]), static_cast<int>(sizes[1]));
    const std::int64_t at_a_time = per_row == 1 ? cuda::kRowsAtATime<1> : cuda::kRowsAtATime<2>;
    const std::int64_t each = warps / (per_row * at_a_time), share = times * at_a_time;
    const std::int64_t most = cuda::device_facts(rows.get_device()).multiprocessors * each;
    return static_cast<std::int32_t>(std::min((rows.size(0) + share - 1) / share, most));
}

at::Tensor small(const at::Tensor& tensor) { return tensor.to(at::kFloat).contiguous(); }

at::Tensor small(const std::optional<at::Tensor>& scale) {
    return scale.has_value() ? small(*scale) : at::Tensor();
}

const float* data(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

// Loads are of sixteen bytes.
at::Tensor aligned(const at::Tensor& rows) {
    const at::Tensor whole = rows.contiguous();
    const auto address = reinterpret_cast<std::uintptr_t>(whole.const_data_ptr());
    return address % 16 == 0 ? whole : whole.clone();
}

CUstream_st* stream_of(const at::Tensor& tensor) {
    return c10::cuda::getCurrentCUDAStream(tensor.get_device()).stream();
}

std::vector<std::int64_t> sizes_of(at::TensorList factors) {
    std::vector<std::int64_t> sizes;
    for (const at::Tensor& factor : factors) {
        TORCH_CHECK_VALUE(
            factor.dim() == 2 && factor.size(0) == factor.size(1),
            "factors must be square matrices; got ", factor.sizes());
        sizes.push_back(factor.size(0));
    }
    return sizes;
}

void check_rows(const at::Tensor& rows, const char* name, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(
        can_take(rows, sizes) && rows.dim() == 2 && rows.size(1) == sizes[0] * sizes[1], name,
        " must be bf16 rows of two factors that the kernel takes; got ", rows.scalar_type(),
        rows.sizes(), " and factors of sizes ", sizes);
}

void check_scale(const std::optional<at::Tensor>& scale, const char* name, std::int64_t width) {
    TORCH_CHECK_VALUE(
        !scale.has_value() || (scale->dim() == 1 && scale->size(0) == width), name,
        " must have shape [", width, "]; got ", scale->sizes());
}

void check_as_many(
    const at::Tensor& rows, const at::Tensor& others, const char* name, const char* of) {
    TORCH_CHECK_VALUE(
        rows.size(0) == others.size(0), name, " must have as many rows as ", of, "; got ",
        rows.size(0), " and ", others.size(0));
}

void launch_rotate(
    const at::Tensor& x, const at::Tensor& y, const at::Tensor& first, const at::Tensor& second,
    const at::Tensor& before, const at::Tensor& after, bool transpose) {
    const cuda::RotateProblem problem{
        x.const_data_ptr(),
        y.mutable_data_ptr(),
        data(first),
        data(second),
        data(before),
        data(after),
        x.size(0),
        static_cast<std::int32_t>(first.size(0)),
        static_cast<std::int32_t>(second.size(0)),
        transpose,
        block_count(x, {first.size(0), second.size(0)}, 12, 1)};
    C10_CUDA_CHECK(static_cast<cudaError_t>(cuda::launch_rotate(problem, stream_of(x))));
}

// Both Grams, each times its factor where there is one, and the column sums.
std::vector<at::Tensor> launch_gram(
    const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale, at::IntArrayRef dims,
    const at::Tensor& first, const at::Tensor& second, const at::Tensor& scaled, bool transpose) {
    const std::int64_t n1 = dims[0], n2 = dims[1];
    // What a block adds up at its end takes as long as a few rows.
    const std::int32_t blocks = block_count(a, dims, 8, 2);
    const auto options = a.options().dtype(at::kFloat);
    const at::Tensor partial = at::empty({blocks, cuda::gram_length(n1, n2)}, options);
    std::vector<at::Tensor> sums{
        at::empty({n1, n1}, options), at::empty({n2, n2}, options), at::empty({n1 * n2}, options)};
    const cuda::GramProblem problem{
        a.const_data_ptr(),
        b.const_data_ptr(),
        data(scale),
        scaled.defined() ? scaled.mutable_data_ptr() : nullptr,
        partial.mutable_data_ptr<float>(),
        data(first),
        data(second),
        sums[0].mutable_data_ptr<float>(),
        sums[1].mutable_data_ptr<float>(),
        sums[2].mutable_data_ptr<float>(),
        a.size(0),
        static_cast<std::int32_t>(n1),
        static_cast<std::int32_t>(n2),
        blocks,
        transpose};
    C10_CUDA_CHECK(static_cast<cudaError_t>(cuda::launch_gram(problem, stream_of(a))));
    return sums;
}

}  // namespace

bool can_take(const at::Tensor& rows, at::IntArrayRef sizes) {
    return rows.is_cuda() && rows.scalar_type() == at::kBFloat16 && sizes.size() == 2 &&
           cuda::fits_a_tile(sizes[0], sizes[1]) &&
           cuda::device_facts(rows.get_device()).major >= 8;
}

bool takes(const at::Tensor& rows, at::IntArrayRef sizes) {
    return can_take(rows, sizes) && layers_use_tile(sizes[0], sizes[1]);
}

at::Tensor kron_rotate(
    const at::Tensor& x, at::TensorList factors, bool transpose,
    const std::optional<at::Tensor>& scale_before, const std::optional<at::Tensor>& scale_after) {
    const std::vector<std::int64_t> sizes = sizes_of(factors);
    check_rows(x, "x", sizes);
    check_scale(scale_before, "scale_before", x.size(1));
    check_scale(scale_after, "scale_after", x.size(1));
    const c10::cuda::CUDAGuard guard(x.device());
    const at::Tensor rows = aligned(x), first = small(factors[0]), second = small(factors[1]);
    const at::Tensor before = small(scale_before), after = small(scale_after);
    const at::Tensor y = at::empty(x.sizes(), rows.options());
    launch_rotate(rows, y, first, second, before, after, transpose);
    return y;
}

std::vector<at::Tensor> kron_gram(
    const at::Tensor& a, const at::Tensor& b, at::IntArrayRef dims,
    const std::optional<at::Tensor>& scale_b) {
    check_rows(a, "a", dims);
    check_rows(b, "b", dims);
    check_as_many(a, b, "b", "a");
    check_scale(scale_b, "scale_b", a.size(1));
    const c10::cuda::CUDAGuard guard(a.device());
    return launch_gram(
        aligned(a), aligned(b), small(scale_b), dims, at::Tensor(), at::Tensor(), at::Tensor(),
        false);
}

std::vector<at::Tensor> kron_gradients_(
    const at::Tensor& h, bool rotates, at::TensorList factors, bool transpose, const at::Tensor& x,
    const std::optional<at::Tensor>& scale) {
    const std::vector<std::int64_t> sizes = sizes_of(factors);
    check_rows(h, "h", sizes);
    check_rows(x, "x", sizes);
    check_as_many(x, h, "x", "h");
    check_scale(scale, "scale", h.size(1));
    const c10::cuda::CUDAGuard guard(h.device());
    const at::Tensor rows = aligned(h);
    TORCH_CHECK_VALUE(rows.is_same(h), "h must be contiguous and begin at 16 bytes");
    const at::Tensor first = small(factors[0]), second = small(factors[1]);
    if (rotates) launch_rotate(h, h, first, second, at::Tensor(), at::Tensor(), transpose);
    const at::Tensor wide = small(scale);
    std::vector<at::Tensor> results = launch_gram(
        h, aligned(x), wide, sizes, first, second, wide.defined() ? h : at::Tensor(), transpose);
    std::rotate(results.begin(), results.end() - 1, results.end());
    return results;
}

}  // namespace spectral::tensor_core

// For tests and benchmarks.
TORCH_LIBRARY_FRAGMENT(spectral_products, m) {
    m.def(
        "kron_rotate_on_tensor_cores(Tensor x, Tensor[] factors, bool transpose, "
        "Tensor? scale_before, Tensor? scale_after) -> Tensor");
    m.def("kron_gram_on_tensor_cores(Tensor a, Tensor b, int[] dims, Tensor? scale_b) -> Tensor[]");
}
TORCH_LIBRARY_IMPL(spectral_products, CUDA, m) {
    m.impl("kron_rotate_on_tensor_cores", &spectral::tensor_core::kron_rotate);
    m.impl("kron_gram_on_tensor_cores", &spectral::tensor_core::kron_gram);
}
