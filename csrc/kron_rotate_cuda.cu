// kron_rotate on tensor cores: every warp, or the warps that share a row, walk rows of their own,
// load one, rotate it in shared memory and registers, and store it.
#include <cuda_runtime_api.h>

#include <vector>

#include "kron_rotate_cuda.cuh"

namespace spectral::cuda {
namespace {

template <int P1, int P2, int kWarps>
struct Shared {
    using Tile = Rotate<P1, P2, kWarps>;
    typename Tile::Tiles tiles[kRowsAtATime<kWarps>];
    typename Tile::Matrices matrices;
    float before[P1 * P2];
    float after[P1 * P2];
    std::uint16_t places[P1 * P2 / 2];
};

template <int P1, int P2, int kWarps>
__global__ void __launch_bounds__(32 * kWarps * kRowsAtATime<kWarps>)
    rotate_kernel(const RotateProblem problem) {
    using Tile = Rotate<P1, P2, kWarps>;
    constexpr int kRows = kRowsAtATime<kWarps>;
    constexpr int kThreads = Tile::kThreads * kRows;
    extern __shared__ double memory[];
    auto& shared = *reinterpret_cast<Shared<P1, P2, kWarps>*>(memory);
    const int n1 = problem.n1, n2 = problem.n2, width = n1 * n2;
    const int thread = static_cast<int>(threadIdx.x);
    const int place = thread / Tile::kThreads, within = thread % Tile::kThreads;
    const int share = within / 32, index = within % 32;
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
    auto& tiles = shared.tiles[place];
    const bool is_split = problem.before != nullptr;
    const float* const before = is_split ? shared.before : nullptr;
    const float* const after = problem.after == nullptr ? nullptr : shared.after;
    const auto* const x = static_cast<const Bits*>(problem.x);
    auto* const y = static_cast<Bits*>(problem.y);
    const std::int64_t step = std::int64_t{kRows} * gridDim.x;
    for (std::int64_t row = std::int64_t{kRows} * blockIdx.x + place; row < problem.rows;
         row += step) {
        Tile::load(within, x + row * width, before, shared.places, width, tiles);
        meet<kWarps>();
        Tile::turn_first(self, share, shared.matrices, tiles, is_split, n1, n2);
        meet<kWarps>();
        Tile::turn_second(self, share, shared.matrices, tiles, after, n1, n2);
        meet<kWarps>();
        Tile::store(within, y + row * width, shared.places, width, tiles);
        meet<kWarps>();
    }
}

struct Launch {
    const RotateProblem& problem;
    cudaStream_t stream;

    template <int P1, int P2, int kWarps>
    cudaError_t operator()() const {
        const int bytes = sizeof(Shared<P1, P2, kWarps>);
        const auto kernel = rotate_kernel<P1, P2, kWarps>;
        const cudaError_t set =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (set != cudaSuccess) return set;
        kernel<<<problem.blocks, 32 * kWarps * kRowsAtATime<kWarps>, bytes, stream>>>(problem);
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
