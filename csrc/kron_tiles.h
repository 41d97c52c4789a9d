// Which rows the tensor-core kernels take, and how many warps share a row. No header of CUDA here.
//
// A row of two factors n1 x n2 is a tile in shared memory. Up to 32 x 48 it is one warp's, and the
// Grams' sums of all its rows stay in the registers of that warp. Of a larger one two or four warps
// have 16 or more rows each, of the tile and of the sums.
#pragma once

#include <cstdint>

namespace spectral::cuda {

inline constexpr int kMostFirst = 64;
inline constexpr int kMostSecond = 64;

constexpr bool is_narrow(std::int64_t n1, std::int64_t n2) { return n1 <= 32 && n2 <= 48; }

constexpr bool fits_a_tile(std::int64_t n1, std::int64_t n2) {
    // Sixteen bytes at a time are loaded, and two neighbours are stored.
    return n1 >= 1 && n2 >= 1 && n1 <= kMostFirst && n2 <= kMostSecond && n2 % 2 == 0 &&
           n1 * n2 % 8 == 0;
}

// Rows that a block has at a time: all its threads meet where several warps share one.
template <int kWarps>
inline constexpr int kRowsAtATime = kWarps == 1 ? 4 : 1;

// Calls `run.template operator()<P1, P2, kWarps>()` with the smallest tile that holds n1 x n2 and
// the warps that share it.
template <typename Run>
constexpr auto with_tile(int n1, int n2, const Run& run) {
    if (!is_narrow(n1, n2)) {
        if (n1 <= 32) return run.template operator()<32, 64, 2>();
        return run.template operator()<64, 64, 4>();
    }
    if (n1 <= 16) {
        if (n2 <= 16) return run.template operator()<16, 16, 1>();
        if (n2 <= 32) return run.template operator()<16, 32, 1>();
        return run.template operator()<16, 48, 1>();
    }
    if (n2 <= 16) return run.template operator()<32, 16, 1>();
    if (n2 <= 32) return run.template operator()<32, 32, 1>();
    return run.template operator()<32, 48, 1>();
}

struct WarpsOfTile {
    template <int, int, int kWarps>
    constexpr int operator()() const {
        return kWarps;
    }
};

// Warps that share a row.
constexpr int warps_per_row(int n1, int n2) { return with_tile(n1, n2, WarpsOfTile{}); }

}  // namespace spectral::cuda
