// Runs the algorithm of csrc/kron_gram_cuda.cuh on the host, for machines without a GPU: the same
// blocks and warps, with the lanes of a step one after another (warp_on_host.h).
#include "../csrc/kron_gram_cuda.cuh"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "warp_on_host.h"

namespace {

using namespace spectral::cuda;

template <int P1, int P2, int kWarps>
void run(const GramProblem& problem, bool descending) {
    using Tile = Gram<P1, P2, kWarps>;
    using Warp = HostWarp<typename Tile::Lane>;
    constexpr int kRows = kRowsAtATime<kWarps>;
    const int n1 = problem.n1, n2 = problem.n2, width = n1 * n2;
    std::vector<float> scale(width, 1.0f);
    if (problem.scale != nullptr) std::copy(problem.scale, problem.scale + width, scale.begin());
    std::vector<std::uint16_t> places;
    for (int i = 0; i < width / 2; ++i) {
        places.push_back(static_cast<std::uint16_t>(Tile::place(i, n2)));
    }
    const auto length = gram_length(n1, n2);
    const auto* const a = static_cast<const Bits*>(problem.a);
    const auto* const b = static_cast<const Bits*>(problem.b);
    auto* const scaled = static_cast<Bits*>(problem.scaled);
    for (int block = 0; block < problem.blocks; ++block) {
        float* const sums = problem.partial + block * length;
        std::fill(sums, sums + length, 0.0f);
        std::vector<float> share(length, std::numeric_limits<float>::quiet_NaN());
        for (int number = 0; number < kRows; ++number) {
            const RowOnHost<Warp, kWarps> warps(descending);
            const auto tiles = std::make_unique<typename Tile::Tiles>();
            for (auto* tile : {tiles->a, tiles->high, tiles->low}) {
                std::fill(tile, tile + Tile::kTile, Bits{0});
            }
            warps.lanes([](auto& lane, int, int) { Tile::clear(lane); });
            for (std::int64_t row = kRows * block + number; row < problem.rows;
                 row += kRows * problem.blocks) {
                warps.lanes([&](auto& lane, int share, int index) {
                    Tile::load(
                        lane, 32 * share + index, a + row * width, b + row * width, scale.data(),
                        scaled == nullptr ? nullptr : scaled + row * width, places.data(), width,
                        *tiles);
                });
                warps.each(
                    [&](Warp& warp, int share) { Tile::multiply(warp, share, *tiles, n1, n2); });
            }
            warps.lanes([&](auto& lane, int part, int index) {
                Tile::flush(lane, part, index, share.data(), n1, n2);
            });
            for (std::int64_t i = 0; i < length; ++i) sums[i] += share[i];
        }
    }
    const int threads = Finish::kLength * Finish::kSplits;
    for (int block = 0; block < Finish::blocks(problem); ++block) {
        const Finish finish(problem, block);
        Finish::Parts parts;
        const auto all = [&](auto step) {
            for (int i = 0; i < threads; ++i) step(descending ? threads - 1 - i : i);
        };
        all([&](int thread) { finish.add(parts, thread); });
        all([&](int thread) { finish.join(parts, thread); });
        all([&](int thread) { finish.multiply(parts, thread); });
        all([&](int thread) { finish.store(parts, thread); });
    }
}

}  // namespace

extern "C" {

// All pointers are host pointers; 1 if the kernel takes these sizes.
std::int32_t run_gram(
    const void* a, const void* b, const float* scale, void* scaled, const float* first,
    const float* second, float* gram_first, float* gram_second, float* columns, std::int64_t rows,
    std::int32_t n1, std::int32_t n2, std::int32_t blocks, std::int32_t transpose,
    std::int32_t descending) {
    if (!fits_a_tile(n1, n2)) return 0;
    std::vector<float> partial(
        static_cast<std::size_t>(blocks * gram_length(n1, n2)),
        std::numeric_limits<float>::quiet_NaN());
    const GramProblem problem{a,     b,      scale,      scaled,      partial.data(),
                              first, second, gram_first, gram_second, columns,
                              rows,  n1,     n2,         blocks,      transpose};
    with_tile(n1, n2, [&]<int P1, int P2, int kWarps>() {
        run<P1, P2, kWarps>(problem, descending != 0);
    });
    return 1;
}
}
