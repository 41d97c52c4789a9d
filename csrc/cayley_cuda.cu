// Kernels and launchers of the batched Cayley map. One thread block per matrix, every batch of the
// list in the same launch; the list travels as a kernel parameter, so nothing is copied or awaited.
#include "cayley_cuda.cuh"

#include <cuda_runtime_api.h>

#include <type_traits>

namespace spectral::cuda {

static_assert(std::is_same_v<Stream, cudaStream_t>);

namespace {

struct ThreadBlock {
    template <typename Phase>
    __device__ __forceinline__ void phase(const Phase& phase) const {
        phase(static_cast<int>(threadIdx.x));
        __syncthreads();
    }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    cayley_forward_kernel(const __grid_constant__ Batches batches) {
    extern __shared__ double shared[];
    forward_block<T>(ThreadBlock{}, batches, static_cast<int>(blockIdx.x), shared);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    cayley_backward_kernel(const __grid_constant__ Batches batches) {
    extern __shared__ double shared[];
    backward_block<T>(ThreadBlock{}, batches, static_cast<int>(blockIdx.x), shared);
}

template <typename Bytes, typename Kernel>
Error launch(
    const Batch* batches, std::int64_t count, Stream stream, const Bytes& shared_bytes,
    const Kernel& kernel) {
    for (std::int64_t start = 0; start < count; start += kMaxBatches) {
        const Batches chunk = make_batches(batches + start, count - start);
        std::int64_t bytes = 0;
        for (int i = 0; i < chunk.count; ++i) {
            bytes = std::max(bytes, shared_bytes(chunk.batch[i].n));
        }
        kernel<<<chunk.first_block[chunk.count], kThreads, bytes, stream>>>(chunk);
        const cudaError_t error = cudaGetLastError();
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

}  // namespace

template <typename T>
Error launch_forward(const Batch* batches, std::int64_t count, Stream stream) {
    return launch(batches, count, stream, forward_shared_bytes, cayley_forward_kernel<T>);
}

template <typename T>
Error launch_backward(const Batch* batches, std::int64_t count, Stream stream) {
    return launch(batches, count, stream, backward_shared_bytes<T>, cayley_backward_kernel<T>);
}

template Error launch_forward<float>(const Batch*, std::int64_t, Stream);
template Error launch_forward<double>(const Batch*, std::int64_t, Stream);
template Error launch_backward<float>(const Batch*, std::int64_t, Stream);
template Error launch_backward<double>(const Batch*, std::int64_t, Stream);

}  // namespace spectral::cuda
