// A warp on the host: the lanes of a step one after another, and tensor cores' products in plain
// C++, by the layout of operands that PTX documents for mma.m16n8k16 and ldmatrix.
#pragma once

#include <memory>

#include "../csrc/tensor_core.cuh"

namespace spectral::cuda {

template <typename Lane>
struct HostWarp {
    Lane lanes[32];
    bool descending = false;

    template <typename Step>
    void each(const Step& step) {
        for (int i = 0; i < 32; ++i) {
            const int index = descending ? 31 - i : i;
            step(lanes[index], index);
        }
    }

    template <typename Sums, typename Left, typename Right>
    void multiply(const Sums& sums, const Left& left, const Right& right) {
        float a[16][16], b[16][8];
        for (int index = 0; index < 32; ++index) {
            const int group = index / 4, within = index % 4;
            for (int half = 0; half < 2; ++half) {
                const int shift = 16 * half, k = 2 * within + half;
                for (int i = 0; i < 4; ++i) {
                    const Pair pair = left(lanes[index])[i];
                    a[group + i % 2 * 8][k + i / 2 * 8] = widened(static_cast<Bits>(pair >> shift));
                }
                for (int i = 0; i < 2; ++i) {
                    const Pair pair = right(lanes[index])[i];
                    b[k + 8 * i][group] = widened(static_cast<Bits>(pair >> shift));
                }
            }
        }
        for (int index = 0; index < 32; ++index) {
            float* const c = sums(lanes[index]);
            for (int i = 0; i < 4; ++i) {
                const int row = index / 4 + (i < 2 ? 0 : 8), column = 2 * (index % 4) + i % 2;
                float sum = c[i];
                for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
                c[i] = sum;
            }
        }
    }

    template <int kPairs, int kStride>
    static void across(Pair* out, const Bits* tile, int index) {
        for (int i = 0; i < kPairs; ++i) {
            // ldmatrix.trans: row and column of the 8 x 8 matrix i change places.
            const Bits* const matrix =
                kPairs == 4 ? tile + i / 2 * 8 * kStride + i % 2 * 8 : tile + i * 8 * kStride;
            const Bits* const at = matrix + 2 * (index % 4) * kStride + index / 4;
            out[i] = static_cast<Pair>(at[0]) | static_cast<Pair>(at[kStride]) << 16;
        }
    }
};

// The kWarps warps that share a row, one after another between two meetings.
template <typename Warp, int kWarps>
struct RowOnHost {
    std::unique_ptr<Warp[]> warps = std::make_unique<Warp[]>(kWarps);
    bool descending;

    explicit RowOnHost(bool descends) : descending(descends) {
        for (int i = 0; i < kWarps; ++i) warps[i].descending = descends;
    }

    template <typename Step>
    void each(const Step& step) const {
        for (int i = 0; i < kWarps; ++i) {
            const int share = descending ? kWarps - 1 - i : i;
            step(warps[share], share);
        }
    }

    template <typename Step>
    void lanes(const Step& step) const {
        each([&](Warp& warp, int share) {
            warp.each([&](auto& lane, int index) { step(lane, share, index); });
        });
    }
};

}  // namespace spectral::cuda
