// The CUDA algorithm, as phases of one thread block per matrix: within a phase the threads write
// disjoint outputs that none of them reads, between phases they meet at a barrier, and nothing
// stays in registers across one. So the same code runs on a host, thread after thread in any order,
// which is how it is tested where there is no GPU (tests/cayley_cuda_on_host.cpp). No CUDA header
// here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cayley_cuda.h"
#include "cayley_pivoting.h"

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
// Shared memory for one matrix. Forward: two pivot panels, two copies of the pivot block, the
// norm and, if it is small, the matrix, in double. Backward: two products, if they are small.
constexpr std::int64_t forward_shared_bytes(std::int64_t n) {
    const std::int64_t matrix = n <= kMaxSharedForward ? n * n : 0;
    return (2 * kBlock * n + 2 * kBlock * kBlock + 1 + matrix) * std::int64_t{sizeof(double)};
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

// What one launch is told, as a kernel parameter, of which CUDA passes 32,764 bytes since 12.1:
// half the factors of an SDXL adapter, each of its own.
inline constexpr int kMaxBatches = 560;
struct Batches {
    Batch batch[kMaxBatches];
    // Thread blocks before batch i; entry `count` is the size of the grid.
    std::int32_t first_block[kMaxBatches + 1];
    std::int32_t count;
};
static_assert(sizeof(Batches) <= 32764);

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

SPECTRAL_DEVICE double magnitude(double value) { return value < 0.0 ? -value : value; }

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

// Shared memory of the forward pass.
struct ForwardShared {
    double* column_panel;  // [kBlock, n], transposed
    double* row_panel;     // [kBlock, n]
    double* pivots;        // 2 x [kBlock, kBlock]
    double* squared_norm;  // [1], written once
    double* matrix;        // [n, n], if it is small
    SPECTRAL_DEVICE ForwardShared(double* shared, int n)
        : column_panel(shared),
          row_panel(column_panel + kBlock * n),
          pivots(row_panel + kBlock * n),
          squared_norm(pivots + 2 * kBlock * kBlock),
          matrix(squared_norm + 1) {}
};

// Inverts a [n, n] in place by blocked Gauss-Jordan without pivoting.
template <typename ThreadBlock>
SPECTRAL_DEVICE void invert(
    const ThreadBlock& block, double* a, int n, const ForwardShared& shared) {
    double* const column_panel = shared.column_panel;
    double* const row_panel = shared.row_panel;
    double* const pivots = shared.pivots;
    const Tiles tiles(n);
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
}

// Inverts a [n, n] in place by Gauss-Jordan with partial pivoting, one column at a time.
template <typename ThreadBlock>
SPECTRAL_DEVICE void invert_pivoted(
    const ThreadBlock& block, double* a, int n, const ForwardShared& shared) {
    double* const column = shared.column_panel;
    double* const pivot_row = shared.row_panel;
    double* const exchanged = pivot_row + n;      // with which row k was exchanged, for every k
    double* const displaced = pivot_row + 2 * n;  // the row that makes place for the pivot row
    for (int k = 0; k < n; ++k) {
        block.phase([&](int thread) {
            for (int i = thread; i < n; i += kThreads) column[i] = a[i * n + k];
        });
        block.phase([&](int thread) {
            if (thread != 0) return;
            int pivot = k;
            for (int i = k + 1; i < n; ++i) {
                if (magnitude(column[i]) > magnitude(column[pivot])) pivot = i;
            }
            exchanged[k] = pivot;
        });
        block.phase([&](int thread) {
            const int pivot = static_cast<int>(exchanged[k]);
            for (int j = thread; j < n; j += kThreads) {
                pivot_row[j] = (j == k ? 1.0 : a[pivot * n + j]) / column[pivot];
                displaced[j] = a[k * n + j];
            }
        });
        block.phase([&](int thread) {
            const int pivot = static_cast<int>(exchanged[k]);
            for (int entry = thread; entry < n * n; entry += kThreads) {
                const int i = entry / n;
                const int j = entry % n;
                const double before = i == pivot ? displaced[j] : a[entry];
                const double factor = column[i == pivot ? k : i];
                const double after = (j == k ? 0.0 : before) - factor * pivot_row[j];
                a[entry] = i == k ? pivot_row[j] : after;
            }
        });
    }
    // Rows of A were exchanged, so columns of its inverse are, in the opposite order.
    block.phase([&](int thread) {
        for (int i = thread; i < n; i += kThreads) {
            for (int k = n - 1; k >= 0; --k) {
                const int pivot = static_cast<int>(exchanged[k]);
                const double moved = a[i * n + k];
                a[i * n + k] = a[i * n + pivot];
                a[i * n + pivot] = moved;
            }
        }
    });
}

// R = 2 (I - Q)^-1 - I, computed in double for float32 too: see cayley_cpu_kernels.h for why, and
// cayley_pivoting.h for when rows are exchanged.
template <typename T, typename ThreadBlock>
SPECTRAL_DEVICE void cayley_forward(
    const ThreadBlock& block, const T* packed, T* rotation, int n, double* shared_memory,
    double* workspace) {
    const ForwardShared shared(shared_memory, n);
    double* const a = n <= kMaxSharedForward ? shared.matrix : workspace;

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
    block.phase([&](int thread) {
        for (int j = thread; j < n; j += kThreads) {
            double sum = -1.0;  // of Q: without the diagonal of I - Q
            for (int i = 0; i < n; ++i) sum += a[i * n + j] * a[i * n + j];
            shared.column_panel[j] = sum;
        }
    });
    block.phase([&](int thread) {
        if (thread != 0) return;
        double sum = 0.0;
        for (int j = 0; j < n; ++j) sum += shared.column_panel[j];
        *shared.squared_norm = sum;
    });
    // All threads read the same number, which nothing overwrites: they take the same branch.
    if (*shared.squared_norm > 2.0 * kPivotAbove<T> * kPivotAbove<T>) {
        invert_pivoted(block, a, n, shared);
    } else {
        invert(block, a, n, shared);
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
