// The CUDA algorithm, as phases of one thread block per matrix: within a phase the threads write
// disjoint outputs that none of them reads, between phases they meet at a barrier, and nothing
// stays in registers across one. So the same code runs on a host, thread after thread in any order,
// which is how it is tested where there is no GPU (tests/cayley_cuda_on_host.cpp). No CUDA header
// here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cayley_cuda.h"

#if defined(__CUDACC__)
#define SPECTRAL_DEVICE __device__ __forceinline__
#else
#define SPECTRAL_DEVICE inline
#endif

namespace spectral::cuda {

inline constexpr int kThreads = 256;
// Width of a pivot block.
inline constexpr int kBlock = 8;
// Each thread keeps a kTile x kTile piece of a product in registers.
inline constexpr int kTile = 4;
// Shared memory for one matrix. Forward: two pivot panels, two copies of the pivot block and, if it
// is small, the matrix, in double. Backward: two products, if they are small.
constexpr std::int64_t forward_shared_bytes(std::int64_t n) {
    const std::int64_t matrix = n <= kMaxSharedForward ? n * n : 0;
    return (2 * kBlock * n + 2 * kBlock * kBlock + matrix) * std::int64_t{sizeof(double)};
}
template <typename T>
constexpr std::int64_t backward_shared_bytes(std::int64_t n) {
    return n <= kMaxSharedBackward<T> ? 2 * n * n * std::int64_t{sizeof(T)} : 0;
}
constexpr std::int64_t kSharedLimit = 48 * 1024;
static_assert(forward_shared_bytes(kMaxSize) <= kSharedLimit);
static_assert(forward_shared_bytes(kMaxSharedForward) <= kSharedLimit);
static_assert(backward_shared_bytes<float>(kMaxSharedBackward<float>) <= kSharedLimit);
static_assert(backward_shared_bytes<double>(kMaxSharedBackward<double>) <= kSharedLimit);

// What one launch is told, as a kernel parameter: 4 KiB is what every CUDA version passes.
inline constexpr int kMaxBatches = 64;
struct Batches {
    Batch batch[kMaxBatches];
    // Thread blocks before batch i; entry `count` is the size of the grid.
    std::int32_t first_block[kMaxBatches + 1];
    std::int32_t count;
};
static_assert(sizeof(Batches) <= 4096);

inline Batches make_batches(const Batch* first, std::int64_t count) {
    Batches batches{};
    batches.count = static_cast<std::int32_t>(std::min<std::int64_t>(count, kMaxBatches));
    for (int i = 0; i < batches.count; ++i) {
        batches.batch[i] = first[i];
        batches.first_block[i + 1] = batches.first_block[i] + first[i].count;
    }
    return batches;
}

// The index of the batch that a thread block belongs to.
SPECTRAL_DEVICE int find_batch(const Batches& batches, int block_index) {
    int low = 0;
    int high = batches.count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (block_index < batches.first_block[middle]) {
            high = middle;
        } else {
            low = middle;
        }
    }
    return low;
}

// Position of (row, column), row < column, in the packed strict upper triangle.
SPECTRAL_DEVICE int packed_index(int row, int column, int n) {
    return row * (2 * n - row - 1) / 2 + column - row - 1;
}

// The tiles of an n x n result: tile t holds rows 4 (t / side) + r and columns t % side + side c,
// so that neighbouring threads touch neighbouring columns.
struct Tiles {
    int n;
    int side;
    SPECTRAL_DEVICE explicit Tiles(int size) : n(size), side((size + kTile - 1) / kTile) {}
    SPECTRAL_DEVICE int count() const { return side * side; }
    SPECTRAL_DEVICE int row(int tile, int r) const { return kTile * (tile / side) + r; }
    SPECTRAL_DEVICE int column(int tile, int c) const { return tile % side + side * c; }
    // Loads outside the matrix repeat its last row or column; their sums are not stored.
    SPECTRAL_DEVICE int inside(int index) const { return index < n ? index : n - 1; }
};

// R = 2 (I - Q)^-1 - I. Blocked Gauss-Jordan in place without pivoting: I - Q has symmetric part I,
// so every pivot is >= 1. In double for float32 too, see cayley_cpu_kernels.h.
template <typename T, typename ThreadBlock>
SPECTRAL_DEVICE void cayley_forward(
    const ThreadBlock& block, const T* packed, T* rotation, int n, double* shared,
    double* workspace) {
    double* const column_panel = shared;                  // [kBlock, n], transposed
    double* const row_panel = column_panel + kBlock * n;  // [kBlock, n]
    double* const pivots = row_panel + kBlock * n;        // 2 x [kBlock, kBlock]
    double* const a = n <= kMaxSharedForward ? pivots + 2 * kBlock * kBlock : workspace;
    const Tiles tiles(n);

    block.phase([&](int thread) {
        for (int entry = thread; entry < n * n; entry += kThreads) {
            const int i = entry / n;
            const int j = entry % n;
            double value = 1.0;
            if (i < j) value = -0.5 * static_cast<double>(packed[packed_index(i, j, n)]);
            if (i > j) value = 0.5 * static_cast<double>(packed[packed_index(j, i, n)]);
            a[entry] = value;
        }
    });

    for (int start = 0; start < n; start += kBlock) {
        const int width = n - start < kBlock ? n - start : kBlock;
        block.phase([&](int thread) {
            for (int entry = thread; entry < n * width; entry += kThreads) {
                const int i = entry / width;
                const int q = entry % width;
                const double value = a[i * n + start + q];
                column_panel[q * n + i] = value;
                if (i >= start && i < start + width) pivots[(i - start) * kBlock + q] = value;
            }
        });
        // Invert the pivot block, from one copy into the other at every step.
        for (int k = 0; k < width; ++k) {
            const double* const from = pivots + k % 2 * kBlock * kBlock;
            double* const to = pivots + (k + 1) % 2 * kBlock * kBlock;
            block.phase([&](int thread) {
                const int i = thread / kBlock;
                const int j = thread % kBlock;
                if (i >= width || j >= width) return;
                const double scale = 1.0 / from[k * kBlock + k];
                const double in_row = (j == k ? 1.0 : from[k * kBlock + j]) * scale;
                const double kept = j == k ? 0.0 : from[i * kBlock + j];
                to[i * kBlock + j] = i == k ? in_row : kept - from[i * kBlock + k] * in_row;
            });
        }
        const double* const inverse = pivots + width % 2 * kBlock * kBlock;
        // The new pivot rows: D^-1 A[block, :], with D^-1 itself in the block's columns.
        block.phase([&](int thread) {
            for (int entry = thread; entry < width * n; entry += kThreads) {
                const int q = entry / n;
                const int j = entry % n;
                double sum = 0.0;
                if (j >= start && j < start + width) {
                    sum = inverse[q * kBlock + j - start];
                } else {
                    for (int p = 0; p < width; ++p) {
                        sum += inverse[q * kBlock + p] * a[(start + p) * n + j];
                    }
                }
                row_panel[q * n + j] = sum;
            }
        });
        // Every other row loses its entries in the block's columns times the new pivot rows.
        block.phase([&](int thread) {
            for (int tile = thread; tile < tiles.count(); tile += kThreads) {
                double sum[kTile][kTile];
                for (int r = 0; r < kTile; ++r) {
                    for (int c = 0; c < kTile; ++c) {
                        const int i = tiles.inside(tiles.row(tile, r));
                        const int j = tiles.inside(tiles.column(tile, c));
                        const bool in_block = j >= start && j < start + width;
                        sum[r][c] = in_block ? 0.0 : a[i * n + j];
                    }
                }
                for (int q = 0; q < width; ++q) {
                    double left[kTile];
                    double right[kTile];
                    for (int r = 0; r < kTile; ++r) {
                        left[r] = column_panel[q * n + tiles.inside(tiles.row(tile, r))];
                    }
                    for (int c = 0; c < kTile; ++c) {
                        right[c] = row_panel[q * n + tiles.inside(tiles.column(tile, c))];
                    }
                    for (int r = 0; r < kTile; ++r) {
                        for (int c = 0; c < kTile; ++c) sum[r][c] -= left[r] * right[c];
                    }
                }
                for (int r = 0; r < kTile; ++r) {
                    for (int c = 0; c < kTile; ++c) {
                        const int i = tiles.row(tile, r);
                        const int j = tiles.column(tile, c);
                        if (i >= n || j >= n) continue;
                        const bool pivot_row = i >= start && i < start + width;
                        a[i * n + j] = pivot_row ? row_panel[(i - start) * n + j] : sum[r][c];
                    }
                }
            }
        });
    }

    block.phase([&](int thread) {
        for (int entry = thread; entry < n * n; entry += kThreads) {
            const double identity = entry / n == entry % n ? 1.0 : 0.0;
            rotation[entry] = static_cast<T>(2.0 * a[entry] - identity);
        }
    });
}

// dP from dR and R: with Z = I + R and S = dR^T Z, dQ^T = 1/2 Z S (R orthogonal), and
// dP[i, j] = (dQ[i, j] - dQ[j, i]) / 2 for i < j. `scratch` holds 2 n^2 elements.
template <typename T, typename ThreadBlock>
SPECTRAL_DEVICE void cayley_backward(
    const ThreadBlock& block, const T* grad_rotation, const T* rotation, T* grad_packed, int n,
    T* scratch) {
    T* const inner = scratch;          // S
    T* const outer = scratch + n * n;  // Z S
    const Tiles tiles(n);

    block.phase([&](int thread) {
        for (int tile = thread; tile < tiles.count(); tile += kThreads) {
            T sum[kTile][kTile];
            for (int r = 0; r < kTile; ++r) {
                for (int c = 0; c < kTile; ++c) {
                    const int i = tiles.inside(tiles.row(tile, r));
                    const int j = tiles.inside(tiles.column(tile, c));
                    sum[r][c] = grad_rotation[j * n + i];
                }
            }
            for (int k = 0; k < n; ++k) {
                T left[kTile];
                T right[kTile];
                for (int r = 0; r < kTile; ++r) {
                    left[r] = grad_rotation[k * n + tiles.inside(tiles.row(tile, r))];
                }
                for (int c = 0; c < kTile; ++c) {
                    right[c] = rotation[k * n + tiles.inside(tiles.column(tile, c))];
                }
                for (int r = 0; r < kTile; ++r) {
                    for (int c = 0; c < kTile; ++c) sum[r][c] += left[r] * right[c];
                }
            }
            for (int r = 0; r < kTile; ++r) {
                for (int c = 0; c < kTile; ++c) {
                    const int i = tiles.row(tile, r);
                    const int j = tiles.column(tile, c);
                    if (i < n && j < n) inner[i * n + j] = sum[r][c];
                }
            }
        }
    });

    block.phase([&](int thread) {
        for (int tile = thread; tile < tiles.count(); tile += kThreads) {
            T sum[kTile][kTile];
            for (int r = 0; r < kTile; ++r) {
                for (int c = 0; c < kTile; ++c) {
                    const int i = tiles.inside(tiles.row(tile, r));
                    const int j = tiles.inside(tiles.column(tile, c));
                    sum[r][c] = inner[i * n + j];
                }
            }
            for (int k = 0; k < n; ++k) {
                T left[kTile];
                T right[kTile];
                for (int r = 0; r < kTile; ++r) {
                    left[r] = rotation[tiles.inside(tiles.row(tile, r)) * n + k];
                }
                for (int c = 0; c < kTile; ++c) {
                    right[c] = inner[k * n + tiles.inside(tiles.column(tile, c))];
                }
                for (int r = 0; r < kTile; ++r) {
                    for (int c = 0; c < kTile; ++c) sum[r][c] += left[r] * right[c];
                }
            }
            for (int r = 0; r < kTile; ++r) {
                for (int c = 0; c < kTile; ++c) {
                    const int i = tiles.row(tile, r);
                    const int j = tiles.column(tile, c);
                    if (i < n && j < n) outer[i * n + j] = sum[r][c];
                }
            }
        }
    });

    block.phase([&](int thread) {
        for (int entry = thread; entry < n * n; entry += kThreads) {
            const int i = entry / n;
            const int j = entry % n;
            if (i < j) {
                grad_packed[packed_index(i, j, n)] =
                    static_cast<T>(0.25) * (outer[j * n + i] - outer[i * n + j]);
            }
        }
    });
}

// The whole work of one thread block of a launch.
template <typename T, typename ThreadBlock>
SPECTRAL_DEVICE void forward_block(
    const ThreadBlock& block, const Batches& batches, int block_index, double* shared) {
    const int index = find_batch(batches, block_index);
    const Batch& batch = batches.batch[index];
    const std::int64_t matrix = block_index - batches.first_block[index];
    const std::int64_t n = batch.n;
    cayley_forward<T>(
        block, static_cast<const T*>(batch.input) + matrix * (n * (n - 1) / 2),
        static_cast<T*>(batch.output) + matrix * n * n, batch.n, shared,
        static_cast<double*>(batch.workspace) + matrix * n * n);
}

template <typename T, typename ThreadBlock>
SPECTRAL_DEVICE void backward_block(
    const ThreadBlock& block, const Batches& batches, int block_index, double* shared) {
    const int index = find_batch(batches, block_index);
    const Batch& batch = batches.batch[index];
    const std::int64_t matrix = block_index - batches.first_block[index];
    const std::int64_t n = batch.n;
    T* const scratch = n <= kMaxSharedBackward<T>
                           ? reinterpret_cast<T*>(shared)
                           : static_cast<T*>(batch.workspace) + matrix * 2 * n * n;
    cayley_backward<T>(
        block, static_cast<const T*>(batch.input) + matrix * n * n,
        static_cast<const T*>(batch.rotation) + matrix * n * n,
        static_cast<T*>(batch.output) + matrix * (n * (n - 1) / 2), batch.n, scratch);
}

}  // namespace spectral::cuda
