// The algorithm of kron_rotate_cuda.cu, as steps of the warps of a row; on a host lane after lane
// (tests/kron_rotate_cuda_on_host.cpp). No CUDA header here.
//
// A row X [n1, n2] becomes R1^T X R2. A warp makes its rows of T = R1^T X first, whose sums lie in
// registers just as the right operand of the second product wants them if that is the transposed
// one, Y^T = R2^T T^T; so T never leaves them. The matrices and T are split into two bf16 numbers
// each, and so is X where a scale comes before.
#pragma once

#include <cstdint>

#include "kron_rotate_cuda.h"
#include "tensor_core.cuh"

namespace spectral::cuda {

template <int P1, int P2, int kWarps>
struct Rotate {
    static constexpr int kThreads = 32 * kWarps;
    // Blocks of 16 rows of T and Y that a warp has; number `share` of them begins with the
    // (kRows * share)th.
    static constexpr int kRows = P1 / 16 / kWarps;
    static_assert(kRows * kWarps * 16 == P1);
    static constexpr int kStride = P2 + 8;
    static constexpr int kFirstStride = P1 + 8;
    static constexpr int kChunks = (P1 * P2 / 8 + kThreads - 1) / kThreads;

    // Shared memory of one row: the row, later the result.
    struct Tiles {
        Bits high[P1 * kStride];
        Bits low[P1 * kStride];
    };

    // Shared memory of the block: the transposes of both matrices, zero beyond n1 and n2.
    struct Matrices {
        Bits first_high[P1 * kFirstStride];
        Bits first_low[P1 * kFirstStride];
        Bits second_high[P2 * kStride];
        Bits second_low[P2 * kStride];
    };

    // Registers of one lane.
    struct Lane {
        float turned[kRows][P2 / 8][4];
        // The same as two bf16 each: [..][0] of the upper eight rows, [..][1] of the lower.
        Pair high[kRows][P2 / 8][2];
        Pair low[kRows][P2 / 8][2];
        float result[4];
        Pair left_high[4];
        Pair left_low[4];
        Pair right_high[2];
        Pair right_low[2];
    };

    // Entry number i of the transposes, for whoever fills them; `transpose` rotates by R^T.
    SPECTRAL_BOTH static void fill_first(
        Matrices& to, int i, const float* matrix, int n, bool transpose) {
        fill<P1, kFirstStride>(to.first_high, to.first_low, i, matrix, n, transpose);
    }
    SPECTRAL_BOTH static void fill_second(
        Matrices& to, int i, const float* matrix, int n, bool transpose) {
        fill<P2, kStride>(to.second_high, to.second_low, i, matrix, n, transpose);
    }

    template <int P, int kRowStride>
    SPECTRAL_BOTH static void fill(
        Bits* high, Bits* low, int i, const float* matrix, int n, bool transpose) {
        const int row = i / P, column = i % P;
        const bool is_live = row < n && column < n;
        const int from = transpose ? row * n + column : column * n + row;
        const Split parts = split(is_live ? matrix[from] : 0.0f);
        high[row * kRowStride + column] = parts.high;
        low[row * kRowStride + column] = parts.low;
    }

    SPECTRAL_BOTH static void load(
        int thread, const Bits* x, const float* before, const std::uint16_t* places, int width,
        Tiles& tiles) {
        SPECTRAL_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const int start = 8 * (kThreads * chunk + thread);
            if (start >= width) continue;
            const Quad from = *reinterpret_cast<const Quad*>(x + start);
            SPECTRAL_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int to = places[start / 2 + i];
                if (before == nullptr) {
                    *reinterpret_cast<Pair*>(tiles.high + to) = from.pair[i];
                    continue;
                }
                Pair high = 0, low = 0;
                SPECTRAL_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const float value = widened(from.pair[i], half);
                    const Split parts = split(value * before[start + 2 * i + half]);
                    high |= static_cast<Pair>(parts.high) << (16 * half);
                    low |= static_cast<Pair>(parts.low) << (16 * half);
                }
                *reinterpret_cast<Pair*>(tiles.high + to) = high;
                *reinterpret_cast<Pair*>(tiles.low + to) = low;
            }
        }
    }

    // Whether a block has nothing but zeros; told where a tile is much larger than its row.
    SPECTRAL_BOTH static bool is_zero(int start, int n) { return kWarps > 1 && start >= n; }

    // The warp's rows of T = R1^T X, in its registers.
    template <typename Warp>
    SPECTRAL_BOTH static void turn_first(
        Warp& warp, int share, const Matrices& matrices, const Tiles& tiles, bool is_split, int n1,
        int n2) {
        const auto left_high = [](Lane& lane) -> Pair* { return lane.left_high; };
        const auto left_low = [](Lane& lane) -> Pair* { return lane.left_low; };
        const auto right_high = [](Lane& lane) -> Pair* { return lane.right_high; };
        const auto right_low = [](Lane& lane) -> Pair* { return lane.right_low; };

        // T[i, c] = sum over p of R1[p, i] X[p, c]
        warp.each([](Lane& lane, int) {
            for (auto& row : lane.turned)
                for (auto& tile : row)
                    for (float& sum : tile) sum = 0;
        });
        SPECTRAL_UNROLL
        for (int p = 0; p < P1; p += 16) {
            if (is_zero(p, n1)) continue;
            SPECTRAL_UNROLL
            for (int i = 0; i < kRows; ++i) {
                const int row = 16 * (kRows * share + i);
                if (is_zero(row, n1)) continue;
                warp.each([&](Lane& lane, int index) {
                    along<4, kFirstStride>(lane.left_high, matrices.first_high, row, p, index);
                    along<4, kFirstStride>(lane.left_low, matrices.first_low, row, p, index);
                });
                SPECTRAL_UNROLL
                for (int c = 0; c < P2 / 8; ++c) {
                    if (is_zero(8 * c, n2)) continue;
                    const int at = p * kStride + 8 * c;
                    const auto sums = [=](Lane& lane) -> float* { return lane.turned[i][c]; };
                    warp.each([&](Lane& lane, int index) {
                        Warp::template across<2, kStride>(lane.right_high, tiles.high + at, index);
                    });
                    warp.multiply(sums, left_high, right_high);
                    warp.multiply(sums, left_low, right_high);
                    if (is_split) {
                        warp.each([&](Lane& lane, int index) {
                            Warp::template across<2, kStride>(
                                lane.right_low, tiles.low + at, index);
                        });
                        warp.multiply(sums, left_high, right_low);
                    }
                }
            }
        }
    }

    // The warp's rows of Y = T R2, in bf16 and times `after` if there is one: into the tile `high`,
    // which all warps of the row have read by now.
    template <typename Warp>
    SPECTRAL_BOTH static void turn_second(
        Warp& warp, int share, const Matrices& matrices, Tiles& tiles, const float* after, int n1,
        int n2) {
        const auto left_high = [](Lane& lane) -> Pair* { return lane.left_high; };
        const auto left_low = [](Lane& lane) -> Pair* { return lane.left_low; };
        const auto right_high = [](Lane& lane) -> Pair* { return lane.right_high; };
        const auto right_low = [](Lane& lane) -> Pair* { return lane.right_low; };
        warp.each([](Lane& lane, int) {
            SPECTRAL_UNROLL
            for (int i = 0; i < kRows; ++i) {
                SPECTRAL_UNROLL
                for (int c = 0; c < P2 / 8; ++c) {
                    SPECTRAL_UNROLL
                    for (int half = 0; half < 2; ++half) {
                        const Split first = split(lane.turned[i][c][2 * half]);
                        const Split second = split(lane.turned[i][c][2 * half + 1]);
                        lane.high[i][c][half] = first.high | static_cast<Pair>(second.high) << 16;
                        lane.low[i][c][half] = first.low | static_cast<Pair>(second.low) << 16;
                    }
                }
            }
        });
        // Y[i, j] = sum over c of T[i, c] R2[c, j], as its transpose
        SPECTRAL_UNROLL
        for (int j = 0; j < P2 / 16; ++j) {
            if (is_zero(16 * j, n2)) continue;
            SPECTRAL_UNROLL
            for (int i = 0; i < 2 * kRows; ++i) {
                const int first = 8 * (2 * kRows * share + i);
                if (is_zero(first, n1)) continue;
                const auto sums = [](Lane& lane) -> float* { return lane.result; };
                warp.each([](Lane& lane, int) {
                    for (float& sum : lane.result) sum = 0;
                });
                SPECTRAL_UNROLL
                for (int c = 0; c < P2 / 16; ++c) {
                    if (is_zero(16 * c, n2)) continue;
                    warp.each([&](Lane& lane, int index) {
                        along<4, kStride>(
                            lane.left_high, matrices.second_high, 16 * j, 16 * c, index);
                        along<4, kStride>(
                            lane.left_low, matrices.second_low, 16 * j, 16 * c, index);
                        SPECTRAL_UNROLL
                        for (int part = 0; part < 2; ++part) {
                            lane.right_high[part] = lane.high[i / 2][2 * c + part][i % 2];
                            lane.right_low[part] = lane.low[i / 2][2 * c + part][i % 2];
                        }
                    });
                    warp.multiply(sums, left_high, right_high);
                    warp.multiply(sums, left_low, right_high);
                    warp.multiply(sums, left_high, right_low);
                }
                warp.each([&](Lane& lane, int index) {
                    SPECTRAL_UNROLL
                    for (int k = 0; k < 4; ++k) {
                        const int row = first + 2 * (index % 4) + k % 2;
                        const int column = 16 * j + index / 4 + (k < 2 ? 0 : 8);
                        if (row >= n1 || column >= n2) continue;
                        const float scale = after == nullptr ? 1.0f : after[row * n2 + column];
                        tiles.high[row * kStride + column] = rounded(lane.result[k] * scale);
                    }
                });
            }
        }
    }

    SPECTRAL_BOTH static void store(
        int thread, Bits* y, const std::uint16_t* places, int width, const Tiles& tiles) {
        SPECTRAL_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const int start = 8 * (kThreads * chunk + thread);
            if (start >= width) continue;
            Quad out;
            SPECTRAL_UNROLL
            for (int i = 0; i < 4; ++i) {
                out.pair[i] = *reinterpret_cast<const Pair*>(tiles.high + places[start / 2 + i]);
            }
            *reinterpret_cast<Quad*>(y + start) = out;
        }
    }

    // Where pair number j of a row goes in a tile.
    SPECTRAL_BOTH static int place(int j, int n2) { return 2 * j / n2 * kStride + 2 * j % n2; }
};

}  // namespace spectral::cuda
