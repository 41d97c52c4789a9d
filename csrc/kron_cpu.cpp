// spectral::kron_rotate and kron_gram on the CPU: checks, types, threads, registration.
#include "kron_cpu_ops.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
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
    const KronShape& shape, const at::Tensor& x, const std::vector<const T*>& factors,
    bool transpose, const at::Tensor& before, const at::Tensor& after, const at::Tensor& out) {
    const KronKernels& kernels = active_level().kron;
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
                factors.data(),
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

// The Grams one after the other, then the column sums: [sum of n_i^2 + width]. With factors, `a` is
// rotated by them in place and then multiplied by scale_a; its Grams are taken in between.
template <typename T>
at::Tensor gram(
    const KronShape& shape, const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale_b,
    const std::vector<const T*>* factors, bool transpose, const at::Tensor& scale_a) {
    const KronKernels& kernels = active_level().kron;
    const std::size_t bytes = kernels.gram_bytes(shape, sizeof(T)) +
                              (factors == nullptr ? 0 : kernels.rotate_bytes(shape, sizeof(T)));
    std::int64_t length = shape.width;
    for (std::int64_t i = 0; i < shape.count; ++i) length += shape.dims[i] * shape.dims[i];
    const std::int64_t threads = thread_count(a.size(0), shape);
    const at::Tensor sums = at::empty({length}, a.options());
    std::vector<T> others((threads - 1) * length);
    T* const total = sums.mutable_data_ptr<T>();
    T* const rotated = factors == nullptr ? nullptr : a.mutable_data_ptr<T>();
    share_rows(a.size(0), threads, [&](std::int64_t thread, std::int64_t begin, std::int64_t end) {
        const Workspace workspace = allocate(bytes);
        T* next = thread == 0 ? total : others.data() + (thread - 1) * length;
        std::vector<T*> grams;
        for (std::int64_t i = 0; i < shape.count; ++i) {
            grams.push_back(next);
            next += shape.dims[i] * shape.dims[i];
        }
        const std::int64_t offset = begin * shape.width, rows = end - begin;
        const GramArguments<T> arguments{pointer<T>(a) + offset, pointer<T>(b) + offset, rows,
                                         pointer<T>(scale_b),    grams.data(),           next};
        if (factors == nullptr) {
            if constexpr (std::is_same_v<T, double>) {
                kernels.gram_f64(shape, arguments, workspace.get());
            } else {
                kernels.gram_f32(shape, arguments, workspace.get());
            }
            return;
        }
        const RotateArguments<T> rotation{rotated + offset,   rotated + offset, rows,
                                          factors->data(),    transpose,        nullptr,
                                          pointer<T>(scale_a)};
        if constexpr (std::is_same_v<T, double>) {
            kernels.rotate_gram_f64(shape, rotation, arguments, workspace.get());
        } else {
            kernels.rotate_gram_f32(shape, rotation, arguments, workspace.get());
        }
    });
    for (std::int64_t thread = 1; thread < threads; ++thread) {
        const T* const part = others.data() + (thread - 1) * length;
        for (std::int64_t i = 0; i < length; ++i) total[i] += part[i];
    }
    return sums;
}

// Square factors in the accumulation type, their sizes and their data.
struct Factors {
    std::vector<at::Tensor> matrices;
    std::vector<std::int64_t> dims;

    Factors(at::TensorList factors, at::ScalarType type) {
        for (const at::Tensor& factor : factors) {
            TORCH_CHECK_VALUE(
                factor.dim() == 2 && factor.size(0) == factor.size(1),
                "factors must be square matrices; got ", factor.sizes());
            dims.push_back(factor.size(0));
            matrices.push_back(factor.to(type).contiguous());
        }
    }

    template <typename T>
    std::vector<const T*> pointers() const {
        std::vector<const T*> data;
        for (const at::Tensor& matrix : matrices) data.push_back(pointer<T>(matrix));
        return data;
    }
};

KronShape shape_of(at::IntArrayRef dims, const char* name) {
    return {dims.data(), static_cast<std::int64_t>(dims.size()), product_of(dims, name)};
}

}  // namespace

at::Tensor kron_rotate(
    const at::Tensor& x, at::TensorList factors, bool transpose,
    const std::optional<at::Tensor>& scale_before, const std::optional<at::Tensor>& scale_after) {
    const at::ScalarType type = accumulation_type(x);
    const Factors matrices(factors, type);
    const KronShape shape = shape_of(matrices.dims, "factors");
    check_rows(x, "x", shape.width);

    const at::Tensor before = scale_of(scale_before, "scale_before", shape.width, type);
    const at::Tensor after = scale_of(scale_after, "scale_after", shape.width, type);
    const at::Tensor wide = x.to(type).contiguous();
    const at::Tensor out = at::empty(x.sizes(), wide.options());
    if (out.numel() > 0) {
        const auto run = [&](auto data) {
            rotate(shape, wide, data, transpose, before, after, out);
        };
        type == at::kDouble ? run(matrices.pointers<double>()) : run(matrices.pointers<float>());
    }
    return out.to(x.scalar_type());
}

std::vector<at::Tensor> kron_gram(
    const at::Tensor& a, const at::Tensor& b, at::IntArrayRef dims,
    const std::optional<at::Tensor>& scale_b) {
    const KronShape shape = shape_of(dims, "dims");
    check_rows(a, "a", shape.width);
    check_rows(b, "b", shape.width);
    TORCH_CHECK_VALUE(
        a.size(0) == b.size(0), "b must have as many rows as a, ", a.size(0), "; got ", b.size(0));

    const at::ScalarType type = accumulation_type(a);
    const at::Tensor left = a.to(type).contiguous(), right = b.to(type).contiguous();
    const at::Tensor scale = scale_of(scale_b, "scale_b", shape.width, type);
    const at::Tensor sums = type == at::kDouble
                                ? gram<double>(shape, left, right, scale, nullptr, false, {})
                                : gram<float>(shape, left, right, scale, nullptr, false, {});
    std::vector<at::Tensor> results;
    const char* next = static_cast<const char*>(sums.const_data_ptr());
    const auto take = [&](at::IntArrayRef sizes) {
        results.push_back(at::empty(sizes, sums.options()));
        std::memcpy(results.back().mutable_data_ptr(), next, results.back().nbytes());
        next += results.back().nbytes();
    };
    for (const std::int64_t n : dims) take({n, n});
    take({shape.width});
    return results;
}

std::vector<at::Tensor> kron_rotate_gram_(
    const at::Tensor& a, at::TensorList factors, bool transpose, const at::Tensor& b,
    const std::optional<at::Tensor>& scale_b) {
    const at::ScalarType type = a.scalar_type();
    TORCH_INTERNAL_ASSERT(type == accumulation_type(a) && a.is_contiguous());
    const Factors matrices(factors, type);
    const KronShape shape = shape_of(matrices.dims, "factors");
    check_rows(a, "a", shape.width);
    check_rows(b, "b", shape.width);
    TORCH_CHECK_VALUE(
        a.size(0) == b.size(0), "b must have as many rows as a, ", a.size(0), "; got ", b.size(0));
    const at::Tensor right = b.to(type).contiguous();
    const at::Tensor scale = scale_of(scale_b, "scale_b", shape.width, type);
    const auto run = [&](auto data) {
        return gram(shape, a, right, scale, &data, transpose, scale);
    };
    const at::Tensor sums =
        type == at::kDouble ? run(matrices.pointers<double>()) : run(matrices.pointers<float>());
    std::vector<at::Tensor> results;
    std::int64_t next = 0;
    for (const std::int64_t n : matrices.dims) {
        results.push_back(sums.narrow(0, next, n * n).view({n, n}));
        next += n * n;
    }
    results.push_back(sums.narrow(0, next, shape.width));
    return results;
}

}  // namespace spectral::cpu

TORCH_LIBRARY_IMPL(spectral, CPU, m) {
    m.impl("kron_rotate", &spectral::cpu::kron_rotate);
    m.impl("kron_gram", &spectral::cpu::kron_gram);
}
