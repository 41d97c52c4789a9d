// Runs the CUDA algorithm of csrc/cayley_cuda.cuh on the host, for machines without a GPU: the same
// launches, blocks and phases, with the threads of a phase one after another in a chosen order. A
// phase in which one thread read what another writes would give different results in other orders.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "../csrc/cayley_cuda.cuh"

namespace {

using spectral::cuda::Batch;
using spectral::cuda::Batches;

// Scratch memory starts as this. Its two halves are NaN as floats too.
const double kPoison = std::bit_cast<double>(~std::uint64_t{0});

enum Order : std::int32_t { kAscending, kDescending, kShuffled };

struct ThreadBlock {
    Order order;
    std::mt19937* generator;
    template <typename Phase>
    void phase(const Phase& run) const {
        std::vector<int> threads(spectral::cuda::kThreads);
        std::iota(threads.begin(), threads.end(), 0);
        if (order == kDescending) std::reverse(threads.begin(), threads.end());
        if (order == kShuffled) std::shuffle(threads.begin(), threads.end(), *generator);
        for (int thread : threads) run(thread);
    }
};

template <typename T>
void run(const Batch* batches, std::int64_t count, bool backward, Order order) {
    std::mt19937 generator(0);
    for (std::int64_t start = 0; start < count; start += spectral::cuda::kMaxBatches) {
        const Batches chunk = spectral::cuda::make_batches(batches + start, count - start);
        std::int64_t bytes = 0;
        for (int i = 0; i < chunk.count; ++i) {
            const std::int64_t n = chunk.batch[i].n;
            bytes = std::max(
                bytes, backward ? spectral::cuda::backward_shared_bytes<T>(n)
                                : spectral::cuda::forward_shared_bytes(n));
        }
        // Exactly what the launch asks for, so that a sanitizer sees an access beyond it.
        std::vector<double> shared(static_cast<std::size_t>(bytes + 7) / 8);
        const int blocks = chunk.first_block[chunk.count];
        for (int block = 0; block < blocks; ++block) {
            std::fill(shared.begin(), shared.end(), kPoison);
            const ThreadBlock threads{order, &generator};
            if (backward) {
                spectral::cuda::backward_block<T>(threads, chunk, block, shared.data());
            } else {
                spectral::cuda::forward_block<T>(threads, chunk, block, shared.data());
            }
        }
    }
}

}  // namespace

extern "C" {

// All pointers are host pointers. n and count have one entry per batch.
void run_cayley(
    std::int64_t batches, const std::int32_t* n, const std::int32_t* count, void* const* input,
    void* const* rotation, void* const* output, std::int32_t is_double, std::int32_t backward,
    std::int32_t order) {
    std::vector<Batch> list;
    std::vector<std::vector<double>> workspaces;
    for (std::int64_t i = 0; i < batches; ++i) {
        const std::int64_t bytes = !backward ? spectral::cuda::forward_workspace_bytes(n[i])
                                   : is_double
                                       ? spectral::cuda::backward_workspace_bytes<double>(n[i])
                                       : spectral::cuda::backward_workspace_bytes<float>(n[i]);
        workspaces.emplace_back(static_cast<std::size_t>(count[i] * bytes / 8), kPoison);
        list.push_back(
            {input[i], rotation[i], output[i], workspaces.back().data(), n[i], count[i]});
    }
    const auto chosen = static_cast<Order>(order);
    if (is_double) {
        run<double>(list.data(), batches, backward != 0, chosen);
    } else {
        run<float>(list.data(), batches, backward != 0, chosen);
    }
}

}  // extern "C"
