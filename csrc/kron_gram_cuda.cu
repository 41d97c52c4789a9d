// kron_gram's sums on tensor cores: every warp, or the warps that share a row, walk rows of their
// own, a block adds its rows' sums, and a second kernel adds the blocks', in an order that is
// always the same, and makes gradients of them.
#include <cuda_runtime_api.h>

#include "kron_gram_cuda.cuh"

namespace spectral::cuda {
namespace {

// Shared memory: the rows' tiles, or once those are done their sums; then scale and places.
template <typename Tile, int kRows>
constexpr int first_bytes(int n1, int n2) {
    const int tiles = kRows * static_cast<int>(sizeof(typename Tile::Tiles));
    const int sums = kRows * 4 * static_cast<int>(gram_length(n1, n2));
    return ((tiles > sums ? tiles : sums) + 15) / 16 * 16;
}

template <int P1, int P2, int kWarps>
__global__ void __launch_bounds__(32 * kWarps * kRowsAtATime<kWarps>)
    gram_kernel(const GramProblem problem, int first, int length) {
    using Tile = Gram<P1, P2, kWarps>;
    constexpr int kRows = kRowsAtATime<kWarps>;
    constexpr int kThreads = Tile::kThreads * kRows;
    extern __shared__ char shared[];
    auto* const tiles = reinterpret_cast<typename Tile::Tiles*>(shared);
    auto* const scale = reinterpret_cast<float*>(shared + first);
    const int n1 = problem.n1, n2 = problem.n2, width = n1 * n2;
    auto* const places = reinterpret_cast<std::uint16_t*>(scale + width);
    const int thread = static_cast<int>(threadIdx.x);
    const int place = thread / Tile::kThreads, within = thread % Tile::kThreads;
    const int share = within / 32, index = within % 32;

    for (int i = thread; i < width; i += kThreads) {
        scale[i] = problem.scale == nullptr ? 1.0f : problem.scale[i];
    }
    for (int i = thread; i < width / 2; i += kThreads) {
        places[i] = static_cast<std::uint16_t>(Tile::place(i, n2));
    }
    auto* const zeros = reinterpret_cast<Pair*>(shared);
    for (int i = thread; i < first / 4; i += kThreads) zeros[i] = 0;
    __syncthreads();

    typename Tile::Lane lane;
    Tile::clear(lane);
    DeviceWarp<typename Tile::Lane> self{lane, index};
    const auto* const a = static_cast<const Bits*>(problem.a);
    const auto* const b = static_cast<const Bits*>(problem.b);
    auto* const scaled = static_cast<Bits*>(problem.scaled);
    const std::int64_t step = std::int64_t{kRows} * problem.blocks;
    for (std::int64_t row = std::int64_t{kRows} * blockIdx.x + place; row < problem.rows;
         row += step) {
        Tile::load(
            lane, within, a + row * width, b + row * width, scale,
            scaled == nullptr ? nullptr : scaled + row * width, places, width, tiles[place]);
        meet<kWarps>();
        Tile::multiply(self, share, tiles[place], n1, n2);
        meet<kWarps>();
    }

    __syncthreads();
    auto* const sums = reinterpret_cast<float*>(shared);
    Tile::flush(lane, share, index, sums + place * length, n1, n2);
    __syncthreads();
    float* const out = problem.partial + std::int64_t{blockIdx.x} * length;
    for (int i = thread; i < length; i += kThreads) {
        float sum = 0;
        SPECTRAL_UNROLL
        for (int turn = 0; turn < kRows; ++turn) sum += sums[turn * length + i];
        out[i] = sum;
    }
}

__global__ void __launch_bounds__(Finish::kLength* Finish::kSplits)
    finish_kernel(const GramProblem problem) {
    __shared__ Finish::Parts parts;
    const int thread = static_cast<int>(threadIdx.x);
    const Finish finish(problem, static_cast<int>(blockIdx.x));
    finish.add(parts, thread);
    __syncthreads();
    finish.join(parts, thread);
    __syncthreads();
    finish.multiply(parts, thread);
    __syncthreads();
    finish.store(parts, thread);
}

struct Launch {
    const GramProblem& problem;
    int length;
    cudaStream_t stream;

    template <int P1, int P2, int kWarps>
    cudaError_t operator()() const {
        using Tile = Gram<P1, P2, kWarps>;
        constexpr int kRows = kRowsAtATime<kWarps>;
        const int width = problem.n1 * problem.n2;
        const int first = first_bytes<Tile, kRows>(problem.n1, problem.n2);
        const int bytes = first + 4 * width + 2 * (width / 2);
        const auto kernel = gram_kernel<P1, P2, kWarps>;
        const cudaError_t set =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (set != cudaSuccess) return set;
        kernel<<<problem.blocks, kRows * Tile::kThreads, bytes, stream>>>(problem, first, length);
        return cudaGetLastError();
    }
};

}  // namespace

int launch_gram(const GramProblem& problem, CUstream_st* stream) {
    const int length = static_cast<int>(gram_length(problem.n1, problem.n2));
    if (problem.blocks > 0) {
        const cudaError_t error =
            with_tile(problem.n1, problem.n2, Launch{problem, length, stream});
        if (error != cudaSuccess) return error;
    }
    finish_kernel<<<Finish::blocks(problem), Finish::kLength * Finish::kSplits, 0, stream>>>(
        problem);
    return cudaGetLastError();
}

}  // namespace spectral::cuda
