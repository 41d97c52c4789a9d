// What layers' backward passes leave for others, in eager code: GradientPool, Deferral and
// KeptGradient of spectral_adapters/autograd.py.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/custom_class.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace spectral {

using Optional = std::optional<at::Tensor>;

// In the smallest type that holds the tensor's numbers and those of another type.
inline at::Tensor at_least(const at::Tensor& tensor, at::ScalarType type) {
    return tensor.to(c10::promoteTypes(tensor.scalar_type(), type));
}

// What layers name by a number, as an op that takes an object is looked through in Python at every
// call.
template <typename Object>
class Numbered : public torch::CustomClassHolder {
 public:
    ~Numbered() override {
        const std::lock_guard<std::mutex> lock(all_mutex());
        all().erase(number_);
    }

    std::int64_t number() const { return number_; }

    // The object of a number, or none if nobody has it any more.
    static c10::intrusive_ptr<Object> find(std::int64_t number) {
        const std::lock_guard<std::mutex> lock(all_mutex());
        const auto found = all().find(number);
        if (found == all().end()) return {};
        return c10::intrusive_ptr<Object>::reclaim_copy(static_cast<Object*>(found->second));
    }

    // The object of a number, which must be there.
    static c10::intrusive_ptr<Object> of(std::int64_t number) {
        auto found = find(number);
        TORCH_CHECK_VALUE(
            found, Object::kName, " must be the number of a ", Object::kName, "; got ", number);
        return found;
    }

 protected:
    Numbered() {
        const std::lock_guard<std::mutex> lock(all_mutex());
        static std::int64_t next = 0;
        number_ = next++;
        all()[number_] = this;
    }

 private:
    static std::mutex& all_mutex() {
        static std::mutex mutex;
        return mutex;
    }
    static std::unordered_map<std::int64_t, Numbered*>& all() {
        static std::unordered_map<std::int64_t, Numbered*> objects;
        return objects;
    }

    std::int64_t number_ = -1;
};

// What a class of TorchScript can have as a method: one of a base class it cannot.
template <typename Object>
std::int64_t number_of(const c10::intrusive_ptr<Object>& object) {
    return object->number();
}

// The backward of a model on several devices has a thread for each. The node behind the token owns
// it, and who has a gradient for the pool has an edge to that. Every backward pass has sums of its
// own: one may run inside another (a reentrant checkpoint), or beside it in a thread of its own.
class GradientPool : public Numbered<GradientPool> {
 public:
    static constexpr auto kName = "pool";

    explicit GradientPool(std::int64_t count) : count_(count) {}

    // `source` is what the gradients were made of. Returns the token's gradient: none, as the pool
    // has it all. Compiled autograd, which runs a backward outside of its node, cannot add two of
    // none and gets an empty one, like the token.
    at::Tensor add(std::int64_t first, std::vector<at::Tensor> grads, const at::Tensor& source) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const at::NoGradGuard no_grad;
        Pass& pass = pass_now();
        if (source.requires_grad()) pass.source = source;
        for (std::size_t i = 0; i < grads.size(); ++i) {
            Optional& sum = pass.sums.at(first + i);
            sum = sum.has_value() ? *sum + grads[i] : grads[i];
        }
        if (torch::autograd::get_current_node() || grads.empty()) return {};
        return at::empty({0}, grads[0].options());
    }

    // The rotations whose gradients these are, if the node behind the token is the extension's.
    // They are nothing that it saves: it may run backward several times, a checkpoint counts
    // nothing of it, and compiled autograd takes no list of tensors.
    std::vector<at::Tensor> rotations() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return rotations_;
    }
    void set_rotations(std::vector<at::Tensor> rotations) {
        const std::lock_guard<std::mutex> lock(mutex_);
        TORCH_CHECK_VALUE(
            static_cast<std::int64_t>(rotations.size()) == count_, "rotations must hold ", count_,
            " tensors, as many as the pool was made for; got ", rotations.size());
        rotations_ = std::move(rotations);
    }

    // The sums of this pass, and one of their sources that has a gradient itself, if any has.
    std::tuple<std::vector<Optional>, Optional> take() {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = passes_.find(torch::autograd::get_current_graph_task_id());
        if (found == passes_.end()) return {std::vector<Optional>(count_), std::nullopt};
        Pass pass = std::move(found->second);
        passes_.erase(found);
        return {std::move(pass.sums), std::move(pass.source)};
    }

 private:
    struct Pass {
        std::vector<Optional> sums;
        Optional source;
    };

    // Sums that nobody takes go when their pass ends; those of one that failed go with the pool,
    // at the next change of the parameters.
    Pass& pass_now() {
        const std::int64_t number = torch::autograd::get_current_graph_task_id();
        const auto [place, is_new] = passes_.try_emplace(number);
        if (!is_new) return place->second;
        place->second.sums.resize(count_);
        if (number != -1) {
            auto self = c10::intrusive_ptr<GradientPool>::reclaim_copy(this);
            torch::autograd::Engine::get_default_engine().queue_callback([self, number] {
                const std::lock_guard<std::mutex> lock(self->mutex_);
                self->passes_.erase(number);
            });
        }
        return place->second;
    }

    const std::int64_t count_;
    std::mutex mutex_;
    std::vector<at::Tensor> rotations_;
    std::unordered_map<std::int64_t, Pass> passes_;  // by the number of the graph task
};

class Deferral : public torch::CustomClassHolder {
 public:
    bool is_on() const { return is_on_; }
    void set(bool is_on) { is_on_ = is_on; }

 private:
    std::atomic<bool> is_on_ = false;
};

class KeptGradient : public Numbered<KeptGradient> {
 public:
    static constexpr auto kName = "gradient";

    explicit KeptGradient(c10::intrusive_ptr<Deferral> deferral) : deferral_(std::move(deferral)) {}

    Optional sum() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return sum_;
    }
    void set_sum(Optional sum) {
        const std::lock_guard<std::mutex> lock(mutex_);
        sum_ = std::move(sum);
    }

    Optional pass_on(const at::Tensor& grad) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const at::NoGradGuard no_grad;
        const at::Tensor total = sum_.has_value() ? sum_->add_(grad) : grad;
        sum_ = std::nullopt;
        if (!deferral_->is_on()) return total;
        sum_ = at_least(total, at::kFloat);
        return std::nullopt;
    }

 private:
    const c10::intrusive_ptr<Deferral> deferral_;
    std::mutex mutex_;
    Optional sum_;
};

}  // namespace spectral
