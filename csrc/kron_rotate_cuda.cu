// kron_rotate on tensor cores: every warp walks rows of its own, loads one, rotates it in shared
// memory and registers, and stores it.
#include <cuda_runtime_api.h>

#include <vector>

#include "kron_rotate_cuda.cuh"

namespace spectral::cuda {
namespace {

template <int P1, int P2>
struct Shared {
    typename Rotate<P1, P2>::Tiles tiles[kRotateWarps];
    typename Rotate<P1, P2>::Matrices matrices;
    float before[P1 * P2];
    float after[P1 * P2];
    std::uint16_t places[P1 * P2 / 2];
};

template <int P1, int P2>
__global__ void __launch_bounds__(32 * kRotateWarps) rotate_kernel(const RotateProblem problem) {
    using Tile = Rotate<P1, P2>;
    extern __shared__ double memory[];
    auto& shared = *reinterpret_cast<Shared<P1, P2>*>(memory);
    const int n1 = problem.n1, n2 = problem.n2, width = n1 * n2;
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / 32, index = thread % 32;
    constexpr int kThreads = 32 * kRotateWarps;
    const bool transpose = problem.transpose != 0;

    auto* const zeros = reinterpret_cast<Pair*>(shared.tiles);
    for (int i = thread; i < static_cast<int>(sizeof(shared.tiles) / 4); i += kThreads)
        zeros[i] = 0;
    for (int i = thread; i < P1 * P1; i += kThreads) {
        Tile::fill_first(shared.matrices, i, problem.first, n1, transpose);
    }
    for (int i = thread; i < P2 * P2; i += kThreads) {
        Tile::fill_second(shared.matrices, i, problem.second, n2, transpose);
    }
    for (int i = thread; i < width; i += kThreads) {
        if (problem.before != nullptr) shared.before[i] = problem.before[i];
        if (problem.after != nullptr) shared.after[i] = problem.after[i];
    }
    for (int i = thread; i < width / 2; i += kThreads) {
        shared.places[i] = static_cast<std::uint16_t>(Tile::place(i, n2));
    }
    __syncthreads();

    typename Tile::Lane lane;
    DeviceWarp<typename Tile::Lane> self{lane, index};
    auto& tiles = shared.tiles[warp];
    const bool is_split = problem.before != nullptr;
    const float* const before = is_split ? shared.before : nullptr;
    const float* const after = problem.after == nullptr ? nullptr : shared.after;
    const auto* const x = static_cast<const Bits*>(problem.x);
    auto* const y = static_cast<Bits*>(problem.y);
    const std::int64_t step = std::int64_t{kRotateWarps} * gridDim.x;
    for (std::int64_t row = std::int64_t{kRotateWarps} * blockIdx.x + warp; row < problem.rows;
         row += step) {
        Tile::load(index, x + row * width, before, shared.places, width, tiles);
        self.meet();
        Tile::turn(self, shared.matrices, tiles, is_split, after, n1, n2);
        Tile::store(index, y + row * width, shared.places, width, tiles);
        self.meet();
    }
}

struct Launch {
    const RotateProblem& problem;
    cudaStream_t stream;

    template <int P1, int P2>
    cudaError_t operator()() const {
        const int bytes = sizeof(Shared<P1, P2>);
        const cudaError_t set = cudaFuncSetAttribute(
            rotate_kernel<P1, P2>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (set != cudaSuccess) return set;
        rotate_kernel<P1, P2><<<problem.blocks, 32 * kRotateWarps, bytes, stream>>>(problem);
        return cudaGetLastError();
    }
};

}  // namespace

DeviceFacts device_facts(int device) {
    static const std::vector<DeviceFacts> all = [] {
        int count = 0;
        if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
        std::vector<DeviceFacts> facts(count, DeviceFacts{1, 0});
        for (int i = 0; i < count; ++i) {
            cudaDeviceGetAttribute(&facts[i].multiprocessors, cudaDevAttrMultiProcessorCount, i);
            cudaDeviceGetAttribute(&facts[i].major, cudaDevAttrComputeCapabilityMajor, i);
        }
        return facts;
    }();
    const bool is_known = device >= 0 && device < static_cast<int>(all.size());
    return is_known ? all[device] : DeviceFacts{1, 0};
}

int launch_rotate(const RotateProblem& problem, CUstream_st* stream) {
    if (problem.blocks == 0) return cudaSuccess;
    return with_tile(problem.n1, problem.n2, Launch{problem, stream});
}

}  // namespace spectral::cuda
