#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "low_rank_cuda.h"
#include "low_rank_kernels.h"

namespace spectral::low_rank_kernels {
namespace {

cuda::Type type_of(at::ScalarType type) {
    if (type == at::kFloat) return cuda::Type::kFloat;
    return type == at::kHalf ? cuda::Type::kHalf : cuda::Type::kBFloat16;
}

cuda::Matrix matrix(const at::Tensor& tensor) {
    return {
        tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), type_of(tensor.scalar_type())};
}

// Entry (i, j) is (j, i) of the tensor.
cuda::Matrix transposed(const at::Tensor& tensor) {
    return {
        tensor.const_data_ptr(), tensor.stride(1), tensor.stride(0), type_of(tensor.scalar_type())};
}

cuda::Matrix vector(const at::Tensor& tensor) {
    return {tensor.const_data_ptr(), 0, tensor.stride(0), type_of(tensor.scalar_type())};
}

template <typename Problem>
void launch(
    int (*function)(const Problem&, CUstream_st*), const Problem& problem, at::Device device) {
    const c10::cuda::CUDAGuard guard(device);
    CUstream_st* const stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
    C10_CUDA_CHECK(static_cast<cudaError_t>(function(problem, stream)));
}

}  // namespace

bool takes(const at::Tensor& matrix) {
    const at::ScalarType type = matrix.scalar_type();
    return matrix.is_cuda() && (type == at::kFloat || type == at::kHalf || type == at::kBFloat16);
}

std::tuple<at::Tensor, at::Tensor> stacked(
    const at::Tensor& right, const at::Tensor& shift_right, const at::Tensor& left,
    const at::Tensor& shift_left, at::ScalarType type) {
    const std::int64_t r = right.size(0), in = right.size(1), out = left.size(0);
    const auto options = left.options().dtype(type);
    std::tuple<at::Tensor, at::Tensor> result{
        at::empty({2 * r, in}, options), at::empty({2 * r, out}, options)};
    const cuda::StackProblem problem{
        {{matrix(right), transposed(shift_right), std::get<0>(result).mutable_data_ptr(), in},
         {transposed(left), transposed(shift_left), std::get<1>(result).mutable_data_ptr(), out}},
        static_cast<std::int32_t>(r),
        type_of(type)};
    launch(&cuda::launch_stack, problem, left.device());
    return result;
}

void mix_shifted_(const at::Tensor& product, const at::Tensor& singular_values, double scaling) {
    const cuda::MixProblem problem{
        product.mutable_data_ptr(),
        vector(singular_values),
        product.size(0),
        static_cast<float>(scaling),
        static_cast<std::int32_t>(product.size(1) / 2),
        type_of(product.scalar_type())};
    launch(&cuda::launch_mix, problem, product.device());
}

at::Tensor rotated_middle(
    const at::Tensor& singular_values, const at::Tensor& left, const at::Tensor& right,
    double scaling, at::ScalarType type) {
    const at::Tensor result = at::empty(left.sizes(), left.options().dtype(type));
    const cuda::MiddleProblem problem{
        matrix(left),
        matrix(right),
        vector(singular_values),
        result.mutable_data_ptr(),
        static_cast<float>(scaling),
        static_cast<std::int32_t>(left.size(0)),
        type_of(type)};
    launch(&cuda::launch_middle, problem, left.device());
    return result;
}

std::tuple<at::Tensor, at::Tensor> turned_grads(
    const at::Tensor& grad, const at::Tensor& singular_values, const at::Tensor& left,
    const at::Tensor& right, double scaling) {
    std::tuple<at::Tensor, at::Tensor> result{
        at::empty(left.sizes(), left.options()), at::empty(right.sizes(), right.options())};
    const cuda::TurnProblem problem{
        matrix(grad),
        matrix(left),
        matrix(right),
        vector(singular_values),
        std::get<0>(result).mutable_data_ptr<float>(),
        std::get<1>(result).mutable_data_ptr<float>(),
        static_cast<float>(scaling),
        static_cast<std::int32_t>(left.size(0))};
    launch(&cuda::launch_turn, problem, left.device());
    return result;
}

}  // namespace spectral::low_rank_kernels
