// What lies between the products of Spectral Adapters A and R: a thread per number.
#include <cuda_runtime_api.h>

#include "low_rank_cuda.cuh"

namespace spectral::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Problem, void (*kOne)(const Problem&, std::int64_t)>
__global__ void __launch_bounds__(kThreads)
    every_kernel(const Problem problem, std::int64_t count) {
    const std::int64_t index = std::int64_t{kThreads} * blockIdx.x + threadIdx.x;
    if (index < count) kOne(problem, index);
}

template <typename Problem, void (*kOne)(const Problem&, std::int64_t)>
int launch(const Problem& problem, std::int64_t count, cudaStream_t stream) {
    if (count == 0) return cudaSuccess;
    const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
    every_kernel<Problem, kOne><<<blocks, kThreads, 0, stream>>>(problem, count);
    return cudaGetLastError();
}

}  // namespace

int launch_stack(const StackProblem& problem, CUstream_st* stream) {
    return launch<StackProblem, stack_one>(problem, stack_count(problem), stream);
}

int launch_mix(const MixProblem& problem, CUstream_st* stream) {
    return launch<MixProblem, mix_one>(problem, problem.count * problem.r, stream);
}

int launch_middle(const MiddleProblem& problem, CUstream_st* stream) {
    const std::int64_t r = problem.r;
    return launch<MiddleProblem, middle_one>(problem, r * r, stream);
}

int launch_turn(const TurnProblem& problem, CUstream_st* stream) {
    const std::int64_t r = problem.r;
    return launch<TurnProblem, turn_one>(problem, 2 * r * r, stream);
}

}  // namespace spectral::cuda
