// spectral::cayley_fwd and cayley_bwd on CUDA: checks, scratch memory, launches, registration.
#include <ATen/ATen.h>
#include <ATen/TensorIndexing.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "cayley_checks.h"
#include "cayley_cuda.h"

namespace spectral::cuda {
namespace {

// Above kMaxSize one matrix keeps the whole device busy, which is what cuSOLVER and cuBLAS are for.
// In float64, so that neither the accuracy nor TF32 differs from the kernels.
at::Tensor forward_large(const at::Tensor& packed, std::int64_t n) {
    const auto options = packed.options().dtype(at::kDouble);
    const at::Tensor indices = at::triu_indices(n, n, 1, options.dtype(at::kLong));
    at::Tensor upper = empty_rotations(packed, n).to(at::kDouble).zero_();
    upper.index_put_(
        {at::indexing::Ellipsis, indices[0], indices[1]}, packed.to(at::kDouble).mul(0.5));
    const at::Tensor identity = at::eye(n, options);
    const at::Tensor inverse = std::get<0>(at::linalg_inv_ex(identity - upper + upper.mT()));
    return inverse.mul(2).sub(identity).to(packed.scalar_type());
}

at::Tensor backward_large(const at::Tensor& grad_rotation, const at::Tensor& rotation) {
    const std::int64_t n = rotation.size(-1);
    const at::Tensor indices = at::triu_indices(n, n, 1, rotation.options().dtype(at::kLong));
    const at::Tensor matrix = rotation.to(at::kDouble);
    const at::Tensor shifted = matrix + at::eye(n, matrix.options());
    const at::Tensor outer =
        at::matmul(shifted, at::matmul(grad_rotation.to(at::kDouble).mT(), shifted));
    return outer.mT()
        .sub(outer)
        .mul(0.25)
        .index({at::indexing::Ellipsis, indices[0], indices[1]})
        .to(rotation.scalar_type());
}

Batch describe(
    const at::Tensor& input, const at::Tensor* rotation, const at::Tensor& output, std::int64_t n,
    std::int64_t count) {
    return {
        input.const_data_ptr(),       rotation == nullptr ? nullptr : rotation->const_data_ptr(),
        output.mutable_data_ptr(),    nullptr,
        static_cast<std::int32_t>(n), static_cast<std::int32_t>(count)};
}

template <typename Bytes, typename Launch>
void run(
    std::vector<Batch>& batches, c10::Device device, const Bytes& bytes, const Launch& launch) {
    if (batches.empty()) return;
    // The largest matrices start first, so that none of them is what the launch ends with.
    std::stable_sort(batches.begin(), batches.end(), [](const Batch& left, const Batch& right) {
        return left.n > right.n;
    });
    std::int64_t total = 0;
    for (const Batch& batch : batches) total += batch.count * bytes(batch.n);
    // Freed on return and reused by later work of this stream only, so the kernel need not be
    // awaited.
    const at::Tensor workspace = at::empty({total}, at::dtype(at::kByte).device(device));
    auto* next = static_cast<char*>(workspace.mutable_data_ptr());
    for (Batch& batch : batches) {
        batch.workspace = next;
        next += batch.count * bytes(batch.n);
    }
    const Error error = launch(
        batches.data(), static_cast<std::int64_t>(batches.size()),
        c10::cuda::getCurrentCUDAStream(device.index()).stream());
    C10_CUDA_CHECK(static_cast<cudaError_t>(error));
}

}  // namespace

std::vector<at::Tensor> cayley_fwd(at::TensorList packed, at::IntArrayRef sizes) {
    check_forward(packed, sizes);
    if (packed.empty()) return {};
    const c10::cuda::CUDAGuard guard(packed[0].device());
    std::vector<at::Tensor> inputs;
    std::vector<at::Tensor> rotations;
    std::vector<Batch> single;
    std::vector<Batch> twofold;
    for (std::size_t i = 0; i < packed.size(); ++i) {
        const std::int64_t n = sizes[i];
        if (n > kMaxSize) {
            rotations.push_back(forward_large(packed[i], n));
            continue;
        }
        inputs.push_back(packed[i].contiguous());
        rotations.push_back(empty_rotations(packed[i], n));
        const std::int64_t count = matrix_count(rotations.back());
        if (count == 0) continue;
        auto& batches = packed[i].scalar_type() == at::kDouble ? twofold : single;
        batches.push_back(describe(inputs.back(), nullptr, rotations.back(), n, count));
    }
    run(single, packed[0].device(), forward_workspace_bytes, launch_forward<float>);
    run(twofold, packed[0].device(), forward_workspace_bytes, launch_forward<double>);
    return rotations;
}

std::vector<at::Tensor> cayley_bwd(at::TensorList grad_rotation, at::TensorList rotation) {
    check_backward(grad_rotation, rotation);
    if (rotation.empty()) return {};
    const c10::cuda::CUDAGuard guard(rotation[0].device());
    std::vector<at::Tensor> inputs;
    std::vector<at::Tensor> grads;
    std::vector<Batch> single;
    std::vector<Batch> twofold;
    for (std::size_t i = 0; i < rotation.size(); ++i) {
        const std::int64_t n = rotation[i].size(-1);
        if (n > kMaxSize) {
            grads.push_back(backward_large(grad_rotation[i], rotation[i]));
            continue;
        }
        const at::Tensor grad = grad_rotation[i].contiguous();
        const at::Tensor matrix = rotation[i].contiguous();
        inputs.insert(inputs.end(), {grad, matrix});
        grads.push_back(empty_packed(matrix));
        // Size 1 has no entries to differentiate.
        if (grads.back().numel() == 0) continue;
        auto& batches = matrix.scalar_type() == at::kDouble ? twofold : single;
        batches.push_back(describe(grad, &matrix, grads.back(), n, matrix_count(matrix)));
    }
    const auto device = rotation[0].device();
    run(single, device, backward_workspace_bytes<float>, launch_backward<float>);
    run(twofold, device, backward_workspace_bytes<double>, launch_backward<double>);
    return grads;
}

}  // namespace spectral::cuda

TORCH_LIBRARY_IMPL(spectral, CUDA, m) {
    m.impl("cayley_fwd", &spectral::cuda::cayley_fwd);
    m.impl("cayley_bwd", &spectral::cuda::cayley_bwd);
}
