#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kron_gram_cuda.h"
#include "kron_rotate_cuda.h"
#include "kron_tensor_core.h"

namespace spectral::tensor_core {
namespace {

std::atomic<bool> on{false};

// Enough blocks to fill the device, and not more than there are rows for.
std::int32_t block_count(const at::Tensor& rows, std::int64_t warps, std::int64_t each) {
    const std::int64_t most = cuda::device_facts(rows.get_device()).multiprocessors * each;
    return static_cast<std::int32_t>(std::min((rows.size(0) + warps - 1) / warps, most));
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
        takes(rows, sizes) && rows.dim() == 2 && rows.size(1) == sizes[0] * sizes[1], name,
        " must be bf16 rows of two factors that the kernel takes; got ", rows.scalar_type(),
        rows.sizes(), " and factors of sizes ", sizes);
}

void check_scale(const std::optional<at::Tensor>& scale, const char* name, std::int64_t width) {
    TORCH_CHECK_VALUE(
        !scale.has_value() || (scale->dim() == 1 && scale->size(0) == width), name,
        " must have shape [", width, "]; got ", scale->sizes());
}

}  // namespace

bool is_on() { return on; }
void turn_on(bool value) { on = value; }

bool takes(const at::Tensor& rows, at::IntArrayRef sizes) {
    return rows.is_cuda() && rows.scalar_type() == at::kBFloat16 && sizes.size() == 2 &&
           cuda::rotate_is_supported(sizes[0], sizes[1]) &&
           cuda::gram_is_supported(sizes[0], sizes[1]) &&
           cuda::device_facts(rows.get_device()).major >= 8;
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
    const cuda::RotateProblem problem{
        rows.const_data_ptr(),
        y.mutable_data_ptr(),
        data(first),
        data(second),
        data(before),
        data(after),
        x.size(0),
        static_cast<std::int32_t>(sizes[0]),
        static_cast<std::int32_t>(sizes[1]),
        transpose,
        block_count(x, cuda::kRotateWarps, 3)};
    C10_CUDA_CHECK(static_cast<cudaError_t>(cuda::launch_rotate(problem, stream_of(x))));
    return y;
}

std::vector<at::Tensor> kron_gram(
    const at::Tensor& a, const at::Tensor& b, at::IntArrayRef dims,
    const std::optional<at::Tensor>& scale_b) {
    check_rows(a, "a", dims);
    check_rows(b, "b", dims);
    TORCH_CHECK_VALUE(
        a.size(0) == b.size(0), "b must have as many rows as a, ", a.size(0), "; got ", b.size(0));
    check_scale(scale_b, "scale_b", a.size(1));
    const c10::cuda::CUDAGuard guard(a.device());
    const at::Tensor left = aligned(a), right = aligned(b), scale = small(scale_b);
    const std::int64_t n1 = dims[0], n2 = dims[1], length = cuda::gram_length(n1, n2);
    const std::int32_t blocks = block_count(a, cuda::kGramWarps, 2);
    const auto options = left.options().dtype(at::kFloat);
    const at::Tensor partial = at::empty({blocks, length}, options);
    const at::Tensor sums = at::empty({length}, options);
    const cuda::GramProblem problem{
        left.const_data_ptr(),
        right.const_data_ptr(),
        data(scale),
        partial.mutable_data_ptr<float>(),
        sums.mutable_data_ptr<float>(),
        a.size(0),
        static_cast<std::int32_t>(n1),
        static_cast<std::int32_t>(n2),
        blocks};
    C10_CUDA_CHECK(static_cast<cudaError_t>(cuda::launch_gram(problem, stream_of(a))));
    return {
        sums.narrow(0, 0, n1 * n1).view({n1, n1}), sums.narrow(0, n1 * n1, n2 * n2).view({n2, n2}),
        sums.narrow(0, n1 * n1 + n2 * n2, n1 * n2)};
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
    m.impl(
        "kron_gram_on_tensor_cores",
        [](const at::Tensor& a, const at::Tensor& b, at::IntArrayRef dims,
           const std::optional<at::Tensor>& scale_b) {
            std::vector<at::Tensor> sums = spectral::tensor_core::kron_gram(a, b, dims, scale_b);
            // An op's results must not share memory.
            for (at::Tensor& part : sums) part = part.clone();
            return sums;
        });
}
