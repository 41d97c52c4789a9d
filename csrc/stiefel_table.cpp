// spectral_products::stiefel_table: the table of addresses that the Triton kernels of stiefel_sgd_
// and stiefel_adam_ read (spectral_kernels/triton_kernels/stiefel.py). A model has thousands of
// these tensors, and Python takes microseconds for each.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

namespace spectral {
namespace {

constexpr std::int64_t kColumns = 8;

// Numbers and place as the kernels want them.
bool fits(const at::Tensor& tensor, at::IntArrayRef shape, at::Device device) {
    return tensor.layout() == at::kStrided && tensor.scalar_type() == at::kFloat &&
           tensor.device() == device && tensor.sizes() == shape && tensor.is_contiguous();
}

std::int64_t address(const at::Tensor& tensor) {
    return reinterpret_cast<std::int64_t>(tensor.const_data_ptr());
}

// The table [rows, 8] and the numbers of rows of every class of sizes, in which the rows are
// ordered, with the length of the scratch behind them; nothing [0, 8] and [0] where a tensor is not
// fp32, contiguous, of its factor's shape and on the first factor's device, or n is not in
// `classes`, the class of every n. Lists that an optimizer does not have are empty.
std::tuple<at::Tensor, at::Tensor> stiefel_table(
    at::TensorList factors, at::TensorList grads, at::TensorList velocities, at::TensorList squares,
    at::TensorList steps, at::IntArrayRef classes, bool pin) {
    const auto options = at::TensorOptions().dtype(at::kLong);
    const std::tuple<at::Tensor, at::Tensor> refused{
        at::empty({0, kColumns}, options), at::empty({0}, options)};
    const std::size_t count = factors.size();
    const at::TensorList beside[] = {grads, velocities, squares};
    if (count == 0 || grads.size() != count) return refused;
    for (const at::TensorList list : {velocities, squares, steps}) {
        if (!list.empty() && list.size() != count) return refused;
    }
    const at::Device device = factors[0].device();
    const auto sizes = static_cast<std::int64_t>(classes.size());
    std::int64_t classes_in_use = 0;
    for (const std::int64_t index : classes) classes_in_use = std::max(classes_in_use, index + 1);

    std::vector<std::vector<std::int64_t>> rows(classes_in_use);
    std::vector<std::int64_t> empty;
    std::int64_t scratch = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const at::Tensor& factor = factors[i];
        const at::IntArrayRef shape = factor.sizes();
        if (shape.size() < 2 || shape.size() > 3 || shape.back() != shape[shape.size() - 2]) {
            return refused;
        }
        const std::int64_t n = shape.back();
        if (n >= sizes || !fits(factor, shape, device)) return refused;
        for (const at::TensorList list : beside) {
            if (!list.empty() && !fits(list[i], shape, device)) return refused;
        }
        if (!steps.empty() && !fits(steps[i], {}, device)) return refused;
        const auto at = [&](at::TensorList list) { return list.empty() ? 0 : address(list[i]); };
        const std::int64_t step = at(steps);
        if (factor.numel() == 0) {
            empty.insert(empty.end(), {0, 0, 0, 0, step, 0, 0, step != 0});
            continue;
        }
        const std::int64_t matrices = shape.size() == 3 ? shape[0] : 1;
        std::int64_t place[] = {address(factor), at(grads), at(velocities), at(squares)};
        std::vector<std::int64_t>& group = rows[classes[n]];
        for (std::int64_t matrix = 0; matrix < matrices; ++matrix) {
            group.insert(group.end(), place, place + 4);
            group.insert(group.end(), {step, n, scratch, matrix == 0 && step != 0});
            for (std::int64_t& where : place) where += where == 0 ? 0 : 4 * n * n;
            scratch += 2 * n * n;
        }
    }

    std::int64_t total = static_cast<std::int64_t>(empty.size());
    for (const auto& group : rows) total += static_cast<std::int64_t>(group.size());
    const at::Tensor table = at::empty({total / kColumns, kColumns}, options.pinned_memory(pin));
    const at::Tensor counts = at::empty({classes_in_use + 1}, options);
    std::int64_t* next = table.mutable_data_ptr<std::int64_t>();
    std::int64_t* const found = counts.mutable_data_ptr<std::int64_t>();
    for (std::int64_t index = 0; index < classes_in_use; ++index) {
        next = std::copy(rows[index].begin(), rows[index].end(), next);
        found[index] = static_cast<std::int64_t>(rows[index].size()) / kColumns;
    }
    std::copy(empty.begin(), empty.end(), next);
    found[classes_in_use] = scratch;
    return {table, counts};
}

}  // namespace
}  // namespace spectral

TORCH_LIBRARY_FRAGMENT(spectral_products, m) {
    m.def(
        "stiefel_table(Tensor[] factors, Tensor[] grads, Tensor[] velocities, Tensor[] squares, "
        "Tensor[] steps, int[] classes, bool pin) -> (Tensor, Tensor)",
        torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, &spectral::stiefel_table));
}
