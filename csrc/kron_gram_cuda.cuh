// The algorithm of kron_gram_cuda.cu, as steps of the warps that share a row: within a step the
// lanes write disjoint shared memory that none of them reads, between steps they meet. So the same
// code runs on a host, lane after lane, which is how it is tested where there is no GPU
// (tests/kron_gram_cuda_on_host.cpp). No CUDA header here.
//
// Tensor cores multiply bf16 numbers exactly and add in fp32. a is bf16; b * scale is split into
// two bf16 numbers, of which the second holds what the first one's rounding lost: 2^-17 of it is
// missing, as much as a sum in fp32 loses elsewhere.
#pragma once

#include <cstdint>

#include "kron_gram_cuda.h"

#include "tensor_core.cuh"

namespace spectral::cuda {

// Sizes P1 x P2 of a tile, multiples of 16, with zeros beyond n1 x n2; warp number `share` of
// kWarps has the rows of both Grams from 16 * share * their number on.
template <int P1, int P2, int kWarps>
struct Gram {
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kFirst = P1 / 16 / kWarps;
    static constexpr int kSecond = P2 / 16 / kWarps;
    static_assert(kFirst * kWarps * 16 == P1 && kSecond * kWarps * 16 == P2);
    // Eight rows of a tile begin in eight different quarters of the banks.
    static constexpr int kStride = P2 + 8;
    static constexpr int kTile = P1 * kStride;
    static constexpr int kChunks = (P1 * P2 / 8 + kThreads - 1) / kThreads;

    // Shared memory of one row: a, and the two parts of b * scale.
    struct Tiles {
        Bits a[kTile];
        Bits high[kTile];
        Bits low[kTile];
    };

    // Registers of one lane.
    struct Lane {
        float first[kFirst][P1 / 8][4];
        float second[kSecond][P2 / 8][4];
        float column[kChunks][8];
        Pair left[4];
        Pair high[2];
        Pair low[2];
    };

    // Where pair number j of a row goes in a tile.
    SPECTRAL_BOTH static int place(int j, int n2) { return 2 * j / n2 * kStride + 2 * j % n2; }

    SPECTRAL_BOTH static void clear(Lane& lane) {
        for (auto& row : lane.first)
            for (auto& tile : row)
                for (float& sum : tile) sum = 0;
        for (auto& row : lane.second)
            for (auto& tile : row)
                for (float& sum : tile) sum = 0;
        for (auto& chunk : lane.column)
            for (float& sum : chunk) sum = 0;
    }

    // One row of a and b into the tiles, and into the column sums; a * scale to `scaled` if that is
    // wanted. `places` are those of all pairs, `thread` counts through the warps of the row.
    SPECTRAL_BOTH static void load(
        Lane& lane, int thread, const Bits* a, const Bits* b, const float* scale, Bits* scaled,
        const std::uint16_t* places, int width, Tiles& tiles) {
        SPECTRAL_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const int start = 8 * (kThreads * chunk + thread);
            if (start >= width) continue;
            const Quad left = *reinterpret_cast<const Quad*>(a + start);
            const Quad right = *reinterpret_cast<const Quad*>(b + start);
            Quad product;
            SPECTRAL_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int to = places[start / 2 + i];
                Pair high = 0, low = 0, both = 0;
                SPECTRAL_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const float x = widened(left.pair[i], half), y = widened(right.pair[i], half);
                    lane.column[chunk][2 * i + half] += x * y;
                    const float factor = scale[start + 2 * i + half];
                    const Split parts = split(y * factor);
                    high |= static_cast<Pair>(parts.high) << (16 * half);
                    low |= static_cast<Pair>(parts.low) << (16 * half);
                    both |= static_cast<Pair>(rounded(x * factor)) << (16 * half);
                }
                product.pair[i] = both;
                *reinterpret_cast<Pair*>(tiles.a + to) = left.pair[i];
                *reinterpret_cast<Pair*>(tiles.high + to) = high;
                *reinterpret_cast<Pair*>(tiles.low + to) = low;
            }
            if (scaled != nullptr) *reinterpret_cast<Quad*>(scaled + start) = product;
        }
    }

    // Whether a block of 16 has nothing but zeros; told where a tile is much larger than its row.
    SPECTRAL_BOTH static bool is_zero(int start, int n) { return kWarps > 1 && start >= n; }

    // Adds the products of the row that is in the tiles.
    template <typename Warp>
    SPECTRAL_BOTH static void multiply(Warp& warp, int share, const Tiles& tiles, int n1, int n2) {
        const auto left = [](Lane& lane) -> Pair* { return lane.left; };
        // gram_1[p, q] = sum over c of a[p, c] b[q, c]
        SPECTRAL_UNROLL
        for (int c = 0; c < P2; c += 16) {
            if (is_zero(c, n2)) continue;
            SPECTRAL_UNROLL
            for (int p = 0; p < kFirst; ++p) {
                const int start = 16 * (kFirst * share + p);
                if (is_zero(start, n1)) continue;
                warp.each([&](Lane& lane, int index) {
                    along<4, kStride>(lane.left, tiles.a, start, c, index);
                });
                SPECTRAL_UNROLL
                for (int q = 0; q < P1 / 8; ++q) {
                    warp.each([&](Lane& lane, int index) {
                        along<2, kStride>(lane.high, tiles.high, 8 * q, c, index);
                        along<2, kStride>(lane.low, tiles.low, 8 * q, c, index);
                    });
                    const auto sums = [=](Lane& lane) -> float* { return lane.first[p][q]; };
                    warp.multiply(sums, left, [](Lane& lane) -> Pair* { return lane.high; });
                    warp.multiply(sums, left, [](Lane& lane) -> Pair* { return lane.low; });
                }
            }
        }
        // gram_2[p, q] = sum over o of a[o, p] b[o, q]
        SPECTRAL_UNROLL
        for (int o = 0; o < P1; o += 16) {
            if (is_zero(o, n1)) continue;
            SPECTRAL_UNROLL
            for (int p = 0; p < kSecond; ++p) {
                const int start = 16 * (kSecond * share + p);
                if (is_zero(start, n2)) continue;
                warp.each([&](Lane& lane, int index) {
                    Warp::template across<4, kStride>(
                        lane.left, tiles.a + o * kStride + start, index);
                });
                SPECTRAL_UNROLL
                for (int q = 0; q < P2 / 8; ++q) {
                    warp.each([&](Lane& lane, int index) {
                        Warp::template across<2, kStride>(
                            lane.high, tiles.high + o * kStride + 8 * q, index);
                        Warp::template across<2, kStride>(
                            lane.low, tiles.low + o * kStride + 8 * q, index);
                    });
                    const auto sums = [=](Lane& lane) -> float* { return lane.second[p][q]; };
                    warp.multiply(sums, left, [](Lane& lane) -> Pair* { return lane.high; });
                    warp.multiply(sums, left, [](Lane& lane) -> Pair* { return lane.low; });
                }
            }
        }
    }

    // One warp's part of its row's [gram_length]. The Grams are turned: a column is read at once.
    SPECTRAL_BOTH static void flush(
        const Lane& lane, int share, int index, float* sums, int n1, int n2) {
        put<kFirst, P1>(lane.first, kFirst * share, index, sums, n1);
        put<kSecond, P2>(lane.second, kSecond * share, index, sums + n1 * n1, n2);
        float* const columns = sums + n1 * n1 + n2 * n2;
        SPECTRAL_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const int start = 8 * (kThreads * chunk + 32 * share + index);
            if (start >= n1 * n2) continue;
            SPECTRAL_UNROLL
            for (int i = 0; i < 8; ++i) columns[start + i] = lane.column[chunk][i];
        }
    }

    template <int kRows, int P>
    SPECTRAL_BOTH static void put(
        const float (&tiles)[kRows][P / 8][4], int first, int index, float* sums, int n) {
        SPECTRAL_UNROLL
        for (int p = 0; p < kRows; ++p) {
            SPECTRAL_UNROLL
            for (int q = 0; q < P / 8; ++q) {
                SPECTRAL_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const int row = 16 * (first + p) + index / 4 + (i < 2 ? 0 : 8);
                    const int column = 8 * q + 2 * (index % 4) + i % 2;
                    if (row < n && column < n) sums[column * n + row] = tiles[p][q][i];
                }
            }
        }
    }
};

// Adds up what the blocks have, and multiplies a Gram by its factor: one column of a Gram, or
// kLength column sums, by one block of kLength * kSplits threads in four steps. Every step is one
// thread's, and all threads meet between two of them.
struct Finish {
    static constexpr int kLength = 64;
    static constexpr int kSplits = 16;
    static_assert(kLength >= kMostFirst && kLength >= kMostSecond);

    // Shared memory of the block.
    struct Parts {
        float part[kSplits][kLength];
        float column[kLength];
    };

    const GramProblem& problem;
    int start;   // of what is added, in a block's share
    int count;   // how many numbers
    int column;  // of the Gram, or -1: column sums
    const float* factor;
    float* out;

    static SPECTRAL_BOTH int blocks(const GramProblem& problem) {
        const int width = problem.n1 * problem.n2;
        return problem.n1 + problem.n2 + (width + kLength - 1) / kLength;
    }

    SPECTRAL_BOTH Finish(const GramProblem& given, int block) : problem(given) {
        const int n1 = problem.n1, n2 = problem.n2, grams = n1 * n1 + n2 * n2;
        if (block < n1) {
            start = block * n1, count = n1, column = block;
            factor = problem.first, out = problem.gram_first;
        } else if (block < n1 + n2) {
            column = block - n1;
            start = n1 * n1 + column * n2, count = n2;
            factor = problem.second, out = problem.gram_second;
        } else {
            const int first = (block - n1 - n2) * kLength;
            const int rest = n1 * n2 - first;
            start = grams + first, count = rest < kLength ? rest : kLength, column = -1;
            factor = nullptr, out = problem.columns + first;
        }
    }

    SPECTRAL_BOTH void add(Parts& parts, int thread) const {
        const int i = thread % kLength, split = thread / kLength;
        if (i >= count) return;
        const int n1 = problem.n1, n2 = problem.n2;
        const std::int64_t length = n1 * n1 + n2 * n2 + n1 * n2;
        const float* const from = problem.partial + start + i;
        float sum = 0;
        SPECTRAL_UNROLL_BY(8)
        for (int block = split; block < problem.blocks; block += kSplits) {
            sum += from[block * length];
        }
        parts.part[split][i] = sum;
    }

    SPECTRAL_BOTH float total(const Parts& parts, int i) const {
        float sum = 0;
        SPECTRAL_UNROLL
        for (int split = 0; split < kSplits; ++split) sum += parts.part[split][i];
        return sum;
    }

    SPECTRAL_BOTH void join(Parts& parts, int thread) const {
        if (thread < count) parts.column[thread] = total(parts, thread);
    }

    // Column `column` of R gram, or with `transpose` that row of gram^T R.
    SPECTRAL_BOTH void multiply(Parts& parts, int thread) const {
        const int i = thread % kLength, split = thread / kLength;
        if (factor == nullptr || i >= count) return;
        float sum = 0;
        for (int p = split; p < count; p += kSplits) {
            const int at = problem.transpose != 0 ? p * count + i : i * count + p;
            sum += factor[at] * parts.column[p];
        }
        parts.part[split][i] = sum;
    }

    SPECTRAL_BOTH void store(const Parts& parts, int thread) const {
        const int i = thread;
        if (i >= count) return;
        const float value = factor == nullptr ? parts.column[i] : total(parts, i);
        const bool is_row = factor != nullptr && problem.transpose != 0;
        const int at = column < 0 ? i : is_row ? column * count + i : i * count + column;
        out[at] = value;
    }
};

}  // namespace spectral::cuda
