// Batched Cayley map on CUDA: plain launchers without headers of torch or CUDA. All data pointers
// are device pointers.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace spectral::cuda {

// cudaStream_t and cudaError_t by their plain types.
using Stream = CUstream_st*;
using Error = int;

// The largest matrix the kernels take: two pivot panels of 8 rows must fit in 48 KiB.
inline constexpr std::int64_t kMaxSize = 256;

// A batch of matrices of one size, contiguous and row-major.
//   forward:  input  packed         [count, n(n-1)/2]   output  rotation     [count, n, n]
//   backward: input  grad_rotation  [count, n, n]       output  grad_packed  [count, n(n-1)/2]
//             rotation              [count, n, n]
struct Batch {
    const void* input;
    const void* rotation;
    void* output;
    // Scratch of forward_ or backward_workspace_bytes(n) per matrix.
    void* workspace;
    std::int32_t n;
    std::int32_t count;
};

// Up to these sizes the working matrix is in shared memory, within the 48 KiB every device grants.
inline constexpr int kMaxSharedForward = 64;
template <typename T>
inline constexpr int kMaxSharedBackward = sizeof(T) == 4 ? 72 : 48;

// Bytes of scratch in global memory per matrix: 0 where shared memory is enough.
constexpr std::int64_t forward_workspace_bytes(std::int64_t n) {
    return n <= kMaxSharedForward ? 0 : n * n * std::int64_t{sizeof(double)};
}
template <typename T>
constexpr std::int64_t backward_workspace_bytes(std::int64_t n) {
    return n <= kMaxSharedBackward<T> ? 0 : 2 * n * n * std::int64_t{sizeof(T)};
}

// Computes all batches, 1 <= n <= kMaxSize and count >= 1 each, in one launch for up to 64 of them,
// on `stream`; returns without waiting and may be captured into a graph. T is float or double; the
// forward pass computes in double for both.
template <typename T>
Error launch_forward(const Batch* batches, std::int64_t count, Stream stream);
template <typename T>
Error launch_backward(const Batch* batches, std::int64_t count, Stream stream);

}  // namespace spectral::cuda
