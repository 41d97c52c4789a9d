// spectral::cayley_fwd and cayley_bwd on the CPU: checks, scheduling over threads, registration.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "cayley_checks.h"
#include "cayley_cpu.h"
#include "simd_level.h"

namespace spectral::cpu {
namespace {

// Work below this many multiply-adds is not worth waking another thread (about 10 us).
constexpr std::int64_t kCostPerThread = std::int64_t{1} << 17;

// One matrix: inputs and output, of dtype float or double.
struct Task {
    const void* first;
    const void* second;  // backward only
    void* out;
    std::int64_t n;
    bool is_double;
};

// Consecutive tasks of one size and dtype, handed to a kernel together.
struct Group {
    std::int64_t begin;
    std::int64_t count;
    std::int64_t cost;
};

struct AlignedFree {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

void append_batch(
    std::vector<Task>& tasks, const at::Tensor& first, const at::Tensor* second,
    const at::Tensor& out, std::int64_t n, std::int64_t count) {
    const bool is_double = out.scalar_type() == at::kDouble;
    const std::int64_t bytes = is_double ? 8 : 4;
    const auto at_batch = [&](const at::Tensor& tensor, std::int64_t index) {
        return static_cast<char*>(tensor.data_ptr()) + index * bytes * (tensor.numel() / count);
    };
    for (std::int64_t index = 0; index < count; ++index) {
        tasks.push_back(
            {at_batch(first, index), second == nullptr ? nullptr : at_batch(*second, index),
             at_batch(out, index), n, is_double});
    }
}

std::vector<Group> group_tasks(std::vector<Task>& tasks) {
    // Largest first: the threads take groups from the front, so the last ones taken are small.
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& left, const Task& right) {
        return left.n != right.n ? left.n > right.n : left.is_double > right.is_double;
    });
    std::vector<Group> groups;
    const auto total = static_cast<std::int64_t>(tasks.size());
    for (std::int64_t begin = 0; begin < total;) {
        const Task& head = tasks[begin];
        const std::int64_t limit = head.n <= kMaxLaneSizeForward ? kGroup : 1;
        std::int64_t count = 1;
        while (count < limit && begin + count < total && tasks[begin + count].n == head.n &&
               tasks[begin + count].is_double == head.is_double) {
            ++count;
        }
        groups.push_back({begin, count, count * head.n * head.n * (head.n + 8)});
        begin += count;
    }
    return groups;
}

template <typename T>
void run_group(
    const CayleyKernels& kernels, const Task* tasks, std::int64_t count, bool backward,
    void* workspace) {
    const T* first[kGroup];
    const T* second[kGroup];
    T* out[kGroup];
    for (std::int64_t i = 0; i < count; ++i) {
        first[i] = static_cast<const T*>(tasks[i].first);
        second[i] = static_cast<const T*>(tasks[i].second);
        out[i] = static_cast<T*>(tasks[i].out);
    }
    const std::int64_t n = tasks[0].n;
    if constexpr (std::is_same_v<T, double>) {
        backward ? kernels.backward_f64(first, second, out, count, n, workspace)
                 : kernels.forward_f64(first, out, count, n, workspace);
    } else {
        backward ? kernels.backward_f32(first, second, out, count, n, workspace)
                 : kernels.forward_f32(first, out, count, n, workspace);
    }
}

void run(std::vector<Task>& tasks, bool backward) {
    if (tasks.empty()) return;
    const std::vector<Group> groups = group_tasks(tasks);
    const CayleyKernels& kernels = active_level().cayley;
    std::int64_t cost = 0;
    for (const Group& group : groups) cost += group.cost;
    const std::int64_t threads = std::clamp<std::int64_t>(
        std::min<std::int64_t>(cost / kCostPerThread, static_cast<std::int64_t>(groups.size())), 1,
        at::get_num_threads());
    // Not the largest matrix's: sixteen small ones at a time take more than one of middle size.
    std::size_t bytes = 0;
    for (const Group& group : groups) {
        bytes = std::max(bytes, kernels.workspace_bytes(tasks[group.begin].n));
    }
    std::atomic<std::size_t> next{0};
    // Which thread takes a group does not change its result, so taking them as they come is safe.
    at::parallel_for(0, threads, 1, [&](std::int64_t, std::int64_t) {
        const std::unique_ptr<void, AlignedFree> workspace(
            ::operator new(bytes, std::align_val_t{64}));
        for (std::size_t index = next++; index < groups.size(); index = next++) {
            const Task* const head = tasks.data() + groups[index].begin;
            head->is_double
                ? run_group<double>(kernels, head, groups[index].count, backward, workspace.get())
                : run_group<float>(kernels, head, groups[index].count, backward, workspace.get());
        }
    });
}

}  // namespace

std::vector<at::Tensor> cayley_fwd(at::TensorList packed, at::IntArrayRef sizes) {
    check_forward(packed, sizes);
    std::vector<at::Tensor> inputs;
    std::vector<at::Tensor> rotations;
    std::vector<Task> tasks;
    for (std::size_t i = 0; i < packed.size(); ++i) {
        inputs.push_back(packed[i].contiguous());
        rotations.push_back(empty_rotations(packed[i], sizes[i]));
        append_batch(
            tasks, inputs.back(), nullptr, rotations.back(), sizes[i],
            matrix_count(rotations.back()));
    }
    run(tasks, false);
    return rotations;
}

std::vector<at::Tensor> cayley_bwd(at::TensorList grad_rotation, at::TensorList rotation) {
    check_backward(grad_rotation, rotation);
    std::vector<at::Tensor> inputs;
    std::vector<at::Tensor> grads;
    std::vector<Task> tasks;
    for (std::size_t i = 0; i < rotation.size(); ++i) {
        const at::Tensor grad = grad_rotation[i].contiguous();
        const at::Tensor matrix = rotation[i].contiguous();
        inputs.insert(inputs.end(), {grad, matrix});
        grads.push_back(empty_packed(matrix));
        append_batch(tasks, grad, &matrix, grads.back(), matrix.size(-1), matrix_count(matrix));
    }
    run(tasks, true);
    return grads;
}

}  // namespace spectral::cpu

TORCH_LIBRARY_IMPL(spectral, CPU, m) {
    m.impl("cayley_fwd", &spectral::cpu::cayley_fwd);
    m.impl("cayley_bwd", &spectral::cpu::cayley_bwd);
}
