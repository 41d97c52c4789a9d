// spectral::stiefel_sgd_ and stiefel_adam_ on the CPU: checks, scheduling over threads,
// registration.
#include "stiefel_cpu.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "simd_level.h"

namespace spectral::cpu {
namespace {

// Work below this many multiply-adds is not worth waking another thread (about 10 us).
constexpr std::int64_t kCostPerThread = std::int64_t{1} << 18;

// As in the reference (spectral_kernels/ops/stiefel.py).
constexpr double kLongestStep = 1e3;
constexpr double kShortestBound = 1e-6;

struct AlignedFree {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

// One matrix, of dtype float or double.
struct Task {
    StiefelMatrix<char> matrix;
    bool is_double;
};

void check_lengths(at::TensorList factors, at::TensorList others, const char* name) {
    TORCH_CHECK_VALUE(
        others.size() == factors.size(), name, " must have one entry per factor, ", factors.size(),
        "; got ", others.size());
}

void check_factor(const at::Tensor& factor, std::size_t index) {
    TORCH_CHECK_VALUE(
        (factor.dim() == 2 || factor.dim() == 3) && factor.size(-1) == factor.size(-2), "factors[",
        index, "] must have shape [B, n, n] or [n, n]; got ", factor.sizes());
    TORCH_CHECK_TYPE(
        factor.scalar_type() == at::kFloat || factor.scalar_type() == at::kDouble, "factors[",
        index, "] must be float32 or float64; got ", factor.scalar_type());
}

void check_beside(
    const at::Tensor& tensor, const char* name, std::size_t index, at::IntArrayRef shape,
    at::ScalarType type) {
    TORCH_CHECK_VALUE(
        tensor.layout() == at::kStrided && tensor.sizes() == shape, name, "[", index,
        "] must be dense with shape ", shape, "; got layout ", tensor.layout(), ", shape ",
        tensor.sizes());
    TORCH_CHECK_TYPE(
        tensor.scalar_type() == type, name, "[", index, "] must be ", type, "; got ",
        tensor.scalar_type());
    TORCH_CHECK_VALUE(
        tensor.is_cpu(), name, "[", index, "] must be on cpu like its factor; got ",
        tensor.device());
}

// The tensors as contiguous memory. write_back() copies to those that were not.
class Contiguous {
 public:
    Contiguous(at::TensorList tensors, bool written) {
        for (const at::Tensor& tensor : tensors) {
            memory_.push_back(tensor.is_contiguous() ? tensor : tensor.contiguous());
            if (written && !tensor.is_contiguous()) copied_.emplace_back(tensor, memory_.back());
        }
    }

    char* at(std::size_t index) const {
        return static_cast<char*>(memory_[index].mutable_data_ptr());
    }

    const char* read(std::size_t index) const {
        return static_cast<const char*>(memory_[index].const_data_ptr());
    }

    void write_back() const {
        for (const auto& [tensor, memory] : copied_) tensor.copy_(memory);
    }

 private:
    std::vector<at::Tensor> memory_;
    std::vector<std::pair<at::Tensor, at::Tensor>> copied_;
};

template <typename T>
void run_task(
    const StiefelKernels& kernels, const StiefelRule& rule, const StiefelMatrix<char>& matrix,
    void* workspace) {
    const auto as = [](char* memory) { return reinterpret_cast<T*>(memory); };
    const StiefelMatrix<T> typed{
        as(matrix.factor),
        reinterpret_cast<const T*>(matrix.grad),
        as(matrix.velocity),
        as(matrix.square),
        matrix.n,
        matrix.unbias,
        matrix.unbias_square,
        matrix.longest};
    if constexpr (std::is_same_v<T, double>) {
        kernels.step_f64(rule, typed, workspace);
    } else {
        kernels.step_f32(rule, typed, workspace);
    }
}

void run(std::vector<Task>& tasks, const StiefelRule& rule) {
    if (tasks.empty()) return;
    // Largest first: the threads take tasks from the front, so the last ones taken are small.
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& left, const Task& right) {
        return left.matrix.n > right.matrix.n;
    });
    const StiefelKernels& kernels = active_level().stiefel;
    std::int64_t cost = 0;
    for (const Task& task : tasks) cost += 6 * task.matrix.n * task.matrix.n * (task.matrix.n + 8);
    const auto count = static_cast<std::int64_t>(tasks.size());
    const std::int64_t threads =
        std::clamp<std::int64_t>(std::min(cost / kCostPerThread, count), 1, at::get_num_threads());
    const std::size_t bytes = kernels.workspace_bytes(tasks.front().matrix.n, sizeof(double));
    std::atomic<std::int64_t> next{0};
    // Which thread takes a task does not change its result, so taking them as they come is safe.
    at::parallel_for(0, threads, 1, [&](std::int64_t, std::int64_t) {
        const std::unique_ptr<void, AlignedFree> workspace(
            ::operator new(bytes, std::align_val_t{64}));
        for (std::int64_t index = next++; index < count; index = next++) {
            const Task& task = tasks[index];
            task.is_double ? run_task<double>(kernels, rule, task.matrix, workspace.get())
                           : run_task<float>(kernels, rule, task.matrix, workspace.get());
        }
    });
}

// bound(n) and unbias(index, StiefelMatrix&) fill in what depends on the size and on the factor.
template <typename Bound, typename Unbias>
void step(
    at::TensorList factors, at::TensorList grads, std::optional<at::TensorList> velocities,
    std::optional<at::TensorList> squares, const StiefelRule& rule, const Bound& bound,
    const Unbias& unbias) {
    check_lengths(factors, grads, "grads");
    if (velocities.has_value()) check_lengths(factors, *velocities, "velocities");
    if (squares.has_value()) check_lengths(factors, *squares, "squares");
    for (std::size_t i = 0; i < factors.size(); ++i) {
        const at::Tensor& factor = factors[i];
        check_factor(factor, i);
        const auto check = [&](const at::Tensor& tensor, const char* name) {
            check_beside(tensor, name, i, factor.sizes(), factor.scalar_type());
        };
        check_beside(factor, "factors", i, factor.sizes(), factor.scalar_type());
        check(grads[i], "grads");
        if (velocities.has_value()) check((*velocities)[i], "velocities");
        if (squares.has_value()) check((*squares)[i], "squares");
    }
    const Contiguous factor(factors, true), grad(grads, false);
    const Contiguous velocity(velocities.value_or(at::TensorList()), true);
    const Contiguous square(squares.value_or(at::TensorList()), true);
    std::vector<Task> tasks;
    for (std::size_t i = 0; i < factors.size(); ++i) {
        const bool is_double = factors[i].scalar_type() == at::kDouble;
        const std::int64_t n = factors[i].size(-1);
        const std::int64_t bytes = n * n * (is_double ? 8 : 4);
        const std::int64_t count = factors[i].numel() == 0 ? 0 : factors[i].numel() / (n * n);
        StiefelMatrix<char> matrix{
            nullptr, nullptr, nullptr, nullptr,
            n,       1,       1,       std::min(std::max(bound(n), kShortestBound), kLongestStep)};
        unbias(i, matrix);
        for (std::int64_t index = 0; index < count; ++index) {
            matrix.factor = factor.at(i) + index * bytes;
            matrix.grad = grad.read(i) + index * bytes;
            if (velocities.has_value()) matrix.velocity = velocity.at(i) + index * bytes;
            if (squares.has_value()) matrix.square = square.at(i) + index * bytes;
            tasks.push_back({matrix, is_double});
        }
    }
    run(tasks, rule);
    factor.write_back();
    velocity.write_back();
    square.write_back();
}

}  // namespace

void stiefel_sgd_(
    at::TensorList factors, at::TensorList grads, at::TensorList velocities, double lr,
    double momentum, double metric) {
    const StiefelRule rule{0.5 * (1 - metric), momentum, 1, 0, 0, 0, lr};
    const auto velocity = momentum == 0 ? std::nullopt : std::optional(velocities);
    step(
        factors, grads, velocity, std::nullopt, rule, [](std::int64_t) { return kLongestStep; },
        [](std::size_t, StiefelMatrix<char>&) {});
}

void stiefel_adam_(
    at::TensorList factors, at::TensorList grads, at::TensorList velocities, at::TensorList squares,
    at::TensorList steps, double lr, double beta1, double beta2, double eps, double metric) {
    check_lengths(factors, steps, "steps");
    for (std::size_t i = 0; i < steps.size(); ++i)
        check_beside(steps[i], "steps", i, {}, at::kFloat);
    const StiefelRule rule{0.5 * (1 - metric), beta1, 1 - beta1, beta2, 1 - beta2, eps, lr};
    // The bound and its limit are those of the reference.
    const double spread = beta2 > 0 ? (1 - beta2) * (1 - beta1 * beta1 / beta2) : 0;
    const double largest = spread > 0 ? (1 - beta1) / std::sqrt(spread) : 1e30;
    const auto unbias = [](double beta, double count) {
        return -std::expm1(count * std::log(beta));
    };
    step(
        factors, grads, velocities, squares, rule,
        [&](std::int64_t n) { return lr * largest * static_cast<double>(n - 1); },
        [&](std::size_t i, StiefelMatrix<char>& matrix) {
            float& count = *steps[i].mutable_data_ptr<float>();
            count += 1;
            matrix.unbias = unbias(beta1, count);
            matrix.unbias_square = unbias(beta2, count);
        });
}

}  // namespace spectral::cpu

TORCH_LIBRARY_IMPL(spectral, CPU, m) {
    m.impl("stiefel_sgd_", &spectral::cpu::stiefel_sgd_);
    m.impl("stiefel_adam_", &spectral::cpu::stiefel_adam_);
}
