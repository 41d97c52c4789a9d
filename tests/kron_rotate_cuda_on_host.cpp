// Runs the algorithm of csrc/kron_rotate_cuda.cuh on the host, for machines without a GPU: the same
// blocks and warps, with the lanes of a step one after another (warp_on_host.h).
#include "../csrc/kron_rotate_cuda.cuh"

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "warp_on_host.h"

namespace {

using namespace spectral::cuda;

template <int P1, int P2, int kWarps>
void run(const RotateProblem& problem, bool descending) {
    using Tile = Rotate<P1, P2, kWarps>;
    using Warp = HostWarp<typename Tile::Lane>;
    const int n1 = problem.n1, n2 = problem.n2, width = n1 * n2;
    const auto matrices = std::make_unique<typename Tile::Matrices>();
    std::memset(matrices.get(), 0xff, sizeof(*matrices));
    for (int i = 0; i < P1 * P1; ++i) {
        Tile::fill_first(*matrices, i, problem.first, n1, problem.transpose != 0);
    }
    for (int i = 0; i < P2 * P2; ++i) {
        Tile::fill_second(*matrices, i, problem.second, n2, problem.transpose != 0);
    }
    std::vector<std::uint16_t> places;
    for (int i = 0; i < width / 2; ++i) {
        places.push_back(static_cast<std::uint16_t>(Tile::place(i, n2)));
    }
    const auto* const x = static_cast<const Bits*>(problem.x);
    auto* const y = static_cast<Bits*>(problem.y);
    const std::int64_t step = kRowsAtATime<kWarps> * problem.blocks;
    for (std::int64_t first = 0; first < step; ++first) {
        const RowOnHost<Warp, kWarps> warps(descending);
        warps.each([](Warp& warp, int) { std::memset(warp.lanes, 0xff, sizeof(warp.lanes)); });
        const auto tiles = std::make_unique<typename Tile::Tiles>();
        std::memset(tiles.get(), 0, sizeof(*tiles));
        for (std::int64_t row = first; row < problem.rows; row += step) {
            warps.lanes([&](auto&, int share, int index) {
                Tile::load(
                    32 * share + index, x + row * width, problem.before, places.data(), width,
                    *tiles);
            });
            const bool is_split = problem.before != nullptr;
            warps.each([&](Warp& warp, int share) {
                Tile::turn_first(warp, share, *matrices, *tiles, is_split, n1, n2);
            });
            warps.each([&](Warp& warp, int share) {
                Tile::turn_second(warp, share, *matrices, *tiles, problem.after, n1, n2);
            });
            warps.lanes([&](auto&, int share, int index) {
                Tile::store(32 * share + index, y + row * width, places.data(), width, *tiles);
            });
        }
    }
}

}  // namespace

extern "C" {

// All pointers are host pointers; 1 if the kernel takes these sizes.
std::int32_t run_rotate(
    const void* x, void* y, const float* first, const float* second, const float* before,
    const float* after, std::int64_t rows, std::int32_t n1, std::int32_t n2, std::int32_t transpose,
    std::int32_t blocks, std::int32_t descending) {
    if (!fits_a_tile(n1, n2)) return 0;
    const RotateProblem problem{x,    y,  first, second,    before, after,
                                rows, n1, n2,    transpose, blocks};
    with_tile(n1, n2, [&]<int P1, int P2, int kWarps>() {
        run<P1, P2, kWarps>(problem, descending != 0);
    });
    return 1;
}
}
