// spectral::kron_rotate and kron_gram on the CPU: checks, types, threads, registration.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "kron_cpu.h"
#include "simd_level.h"

namespace spectral::cpu {
namespace {

// Work below this many multiply-adds is not worth waking another thread (about 10 us).
constexpr std::int64_t kCostPerThread = std::int64_t{1} << 18;

struct AlignedFree {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};
using Workspace = std::unique_ptr<void, AlignedFree>;

Workspace allocate(std::size_t bytes) {
    return Workspace(::operator new(bytes, std::align_val_t{64}));
}

at::ScalarType accumulation_type(const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The number of threads that a pass over the rows is worth, at least 1.
std::int64_t thread_count(std::int64_t rows, const KronShape& shape) {
    std::int64_t per_row = 0;
    for (std::int64_t i = 0; i < shape.count; ++i) per_row += shape.dims[i];
    const std::int64_t cost = rows * shape.width * per_row;
    const std::int64_t most = std::min<std::int64_t>(at::get_num_threads(), rows);
    return std::clamp<std::int64_t>(cost / kCostPerThread, 1, std::max<std::int64_t>(most, 1));
}

// run(thread, first row, row past the last) for equal shares, which depend on the arguments alone.
template <typename Run>
void share_rows(std::int64_t rows, std::int64_t threads, const Run& run) {
    at::parallel_for(0, threads, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t thread = begin; thread < end; ++thread) {
            run(thread, rows * thread / threads, rows * (thread + 1) / threads);
        }
    });
}

void check_rows(const at::Tensor& tensor, const char* name, std::int64_t width) {
    TORCH_CHECK_TYPE(
        at::isFloatingType(tensor.scalar_type()), name, " must be floating-point; got ",
        tensor.scalar_type());
    TORCH_CHECK_VALUE(
        tensor.dim() == 2 && tensor.size(1) == width, name, " must have shape [M, ", width,
        "]; got ", tensor.sizes());
}

// A scale [width] in the accumulation type, or an undefined tensor.
at::Tensor scale_of(
    const std::optional<at::Tensor>& scale, const char* name, std::int64_t width,
    at::ScalarType type) {
    if (!scale.has_value()) return {};
    TORCH_CHECK_VALUE(
        scale->dim() == 1 && scale->size(0) == width, name, " must have shape [", width, "]; got ",
        scale->sizes());
    return scale->to(type).contiguous();
}

template <typename T>
const T* pointer(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

std::int64_t product_of(at::IntArrayRef sizes, const char* name) {
    TORCH_CHECK_VALUE(!sizes.empty(), name, " must not be empty");
    std::int64_t product = 1;
    for (const std::int64_t n : sizes) {
        TORCH_CHECK_VALUE(n >= 1, name, " must have sizes of at least 1; got ", sizes);
        product *= n;
    }
    return product;
}

template <typename T>
void rotate(
    const KronShape& shape, const at::Tensor& x, const std::vector<at::Tensor>& factors,
    bool transpose, const at::Tensor& before, const at::Tensor& after, const at::Tensor& out) {
    const KronKernels& kernels = active_level().kron;
    std::vector<const T*> matrices;
    for (const at::Tensor& factor : factors) matrices.push_back(pointer<T>(factor));
    const std::size_t bytes = kernels.rotate_bytes(shape, sizeof(T));
    const T* const source = pointer<T>(x);
    T* const target = out.mutable_data_ptr<T>();
    const std::int64_t rows = x.size(0);
    share_rows(
        rows, thread_count(rows, shape), [&](std::int64_t, std::int64_t begin, std::int64_t end) {
            const Workspace workspace = allocate(bytes);
            const RotateArguments<T> arguments{
                source + begin * shape.width,
                target + begin * shape.width,
                end - begin,
                matrices.data(),
                transpose,
                pointer<T>(before),
                pointer<T>(after)};
            if constexpr (std::is_same_v<T, double>) {
                kernels.rotate_f64(shape, arguments, workspace.get());
            } else {
                kernels.rotate_f32(shape, arguments, workspace.get());
            }
        });
}

template <typename T>
void gram(
    const KronShape& shape, const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale,
    std::int64_t threads, const std::vector<std::int64_t>& offsets, const at::Tensor& partial) {
    const KronKernels& kernels = active_level().kron;
    const std::size_t bytes = kernels.gram_bytes(shape, sizeof(T));
    T* const sums = partial.mutable_data_ptr<T>();
    share_rows(a.size(0), threads, [&](std::int64_t thread, std::int64_t begin, std::int64_t end) {
        const Workspace workspace = allocate(bytes);
        T* const own = sums + thread * partial.size(1);
        std::vector<T*> grams;
        for (std::int64_t i = 0; i < shape.count; ++i) grams.push_back(own + offsets[i]);
        const GramArguments<T> arguments{
            pointer<T>(a) + begin * shape.width,
            pointer<T>(b) + begin * shape.width,
            end - begin,
            pointer<T>(scale),
            grams.data(),
            own + offsets.back()};
        if constexpr (std::is_same_v<T, double>) {
            kernels.gram_f64(shape, arguments, workspace.get());
        } else {
            kernels.gram_f32(shape, arguments, workspace.get());
        }
    });
}

}  // namespace

at::Tensor kron_rotate(
    const at::Tensor& x, at::TensorList factors, bool transpose,
    const std::optional<at::Tensor>& scale_before, const std::optional<at::Tensor>& scale_after) {
    std::vector<std::int64_t> dims;
    for (const at::Tensor& factor : factors) {
        TORCH_CHECK_VALUE(
            factor.dim() == 2 && factor.size(0) == factor.size(1),
            "factors must be square matrices; got ", factor.sizes());
        dims.push_back(factor.size(0));
    }
    const KronShape shape{
        dims.data(), static_cast<std::int64_t>(dims.size()), product_of(dims, "factors")};
    check_rows(x, "x", shape.width);

    const at::ScalarType type = accumulation_type(x);
    std::vector<at::Tensor> matrices;
    for (const at::Tensor& factor : factors) matrices.push_back(factor.to(type).contiguous());
    const at::Tensor before = scale_of(scale_before, "scale_before", shape.width, type);
    const at::Tensor after = scale_of(scale_after, "scale_after", shape.width, type);
    const at::Tensor wide = x.to(type).contiguous();
    const at::Tensor out = at::empty(x.sizes(), wide.options());
    if (out.numel() > 0) {
        type == at::kDouble ? rotate<double>(shape, wide, matrices, transpose, before, after, out)
                            : rotate<float>(shape, wide, matrices, transpose, before, after, out);
    }
    return out.to(x.scalar_type());
}

std::vector<at::Tensor> kron_gram(
    const at::Tensor& a, const at::Tensor& b, at::IntArrayRef dims,
    const std::optional<at::Tensor>& scale_b) {
    const KronShape shape{
        dims.data(), static_cast<std::int64_t>(dims.size()), product_of(dims, "dims")};
    check_rows(a, "a", shape.width);
    check_rows(b, "b", shape.width);
    TORCH_CHECK_VALUE(
        a.size(0) == b.size(0), "b must have as many rows as a, ", a.size(0), "; got ", b.size(0));

    const at::ScalarType type = accumulation_type(a);
    const at::Tensor left = a.to(type).contiguous(), right = b.to(type).contiguous();
    const at::Tensor scale = scale_of(scale_b, "scale_b", shape.width, type);
    // All sums of one thread are one row; the threads' rows are added up in order.
    std::vector<std::int64_t> offsets{0};
    for (const std::int64_t n : dims) offsets.push_back(offsets.back() + n * n);
    const std::int64_t threads = thread_count(a.size(0), shape);
    const at::Tensor partial = at::empty({threads, offsets.back() + shape.width}, left.options());
    type == at::kDouble ? gram<double>(shape, left, right, scale, threads, offsets, partial)
                        : gram<float>(shape, left, right, scale, threads, offsets, partial);
    for (std::int64_t thread = 1; thread < threads; ++thread) partial[0].add_(partial[thread]);

    std::vector<at::Tensor> results;
    for (std::size_t i = 0; i < dims.size(); ++i) {
        const std::int64_t n = dims[i];
        results.push_back(at::empty({n, n}, left.options()));
        results.back().copy_(partial[0].narrow(0, offsets[i], n * n).view({n, n}));
    }
    results.push_back(partial[0].narrow(0, offsets.back(), shape.width).clone());
    return results;
}

}  // namespace spectral::cpu

TORCH_LIBRARY_IMPL(spectral, CPU, m) {
    m.impl("kron_rotate", &spectral::cpu::kron_rotate);
    m.impl("kron_gram", &spectral::cpu::kron_gram);
}
