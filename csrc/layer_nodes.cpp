// Nodes of the autograd graph for the layers of SODA, A and R: what the Functions of
// spectral_adapters/autograd.py do for eager code, without the interpreter. A Function in Python
// takes longer than all the products of a small layer.
//
// `spectral_nodes::GradientPool` takes the gradients of a model's rotations to the one node that
// all layers share, which is `shared_cayley`, `KeptGradient` holds back those of merged weights,
// and `spectral_nodes::soda_linear`, `merged_linear`, `spectral_a_linear` and `spectral_r_linear`
// are the layers. Once differentiable; what is frozen has no gradient.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "gradient_pool.h"

namespace spectral {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Optional optional(const Tensor& tensor) {
    return tensor.defined() ? Optional(tensor) : std::nullopt;
}

Tensor or_none(const Optional& tensor) { return tensor.has_value() ? *tensor : Tensor(); }

// What a layer's backward runs under: the types that the forward chose, no graph of its own, and
// the ops below their guards, as in the forward, whose result is then nobody's view. Saved tensors
// are asked for before: a checkpoint makes them anew then.
struct InsideNode {
    at::NoGradGuard no_grad;
    c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
    at::AutoDispatchBelowADInplaceOrView below;
};

// Gradients that refuse to be differentiated again, if somebody could.
class Once : public torch::autograd::Function<Once> {
 public:
    static variable_list forward(AutogradContext*, const Tensor&, at::TensorList results) {
        variable_list same;
        for (const Tensor& result : results) same.push_back(result.detach());
        return same;
    }
    static variable_list backward(AutogradContext*, const variable_list&) {
        TORCH_CHECK(
            false,
            "trying to differentiate twice a function that was marked with @once_differentiable");
    }
};

variable_list once(const Tensor& grad, variable_list results) {
    if (!at::GradMode::is_enabled() || !grad.requires_grad()) return results;
    variable_list defined;
    for (const Tensor& result : results) {
        if (result.defined()) defined.push_back(result);
    }
    if (defined.empty()) return results;
    const variable_list guarded = Once::apply(grad, at::TensorList(defined));
    std::size_t next = 0;
    for (Tensor& result : results) {
        if (result.defined()) result = guarded[next++];
    }
    return results;
}

template <typename Signature>
auto raw_op(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor bias_gradient(const Tensor& grad, at::ScalarType type) {
    return grad.reshape({-1, grad.size(-1)}).sum(0).to(type);
}

// --- The rotations of a model: SharedCayleyFunction

using CayleyBackward = std::vector<Tensor>(at::TensorList, at::TensorList);

class SharedCayley : public torch::autograd::Function<SharedCayley> {
 public:
    struct Known {
        std::int64_t pool;
        at::TensorList rotations;
    };

    static Tensor forward(AutogradContext* ctx, at::TensorList packed, const Known& given) {
        const Tensor token = at::empty({0}, given.rotations[0].options());
        ctx->set_materialize_grads(false);
        const auto pool = GradientPool::of(given.pool);
        pool->set_rotations(given.rotations.vec());
        auto& data = ctx->saved_data;
        data["pool"] = given.pool;
        data["owner"] = owner(pool);
        std::vector<std::int64_t> types;
        for (const Tensor& values : packed) {
            types.push_back(static_cast<std::int64_t>(values.scalar_type()));
        }
        data["types"] = std::move(types);
        return token;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list&) {
        const auto pool = GradientPool::of(ctx->saved_data["pool"].toInt());
        const auto [sums, source] = pool->take();
        variable_list results = gradients(ctx, pool->rotations(), sums);
        return source.has_value() ? once(*source, std::move(results)) : results;
    }

 private:
    static variable_list gradients(
        AutogradContext* ctx, const std::vector<Tensor>& rotations,
        const std::vector<Optional>& sums) {
        const InsideNode inside;
        const std::vector<std::int64_t> types = ctx->saved_data["types"].toIntVector();
        std::vector<std::size_t> wanted;
        std::vector<Tensor> grads, turns;
        for (std::size_t i = 0; i < sums.size(); ++i) {
            if (!sums[i].has_value() || !ctx->needs_input_grad(i)) continue;
            wanted.push_back(i);
            grads.push_back(*sums[i]);
            turns.push_back(rotations[i]);
        }
        static const auto op = raw_op<CayleyBackward>("spectral::cayley_bwd");
        const std::vector<Tensor> found = op.call(grads, turns);
        variable_list results(rotations.size() + 1);
        for (std::size_t k = 0; k < wanted.size(); ++k) {
            results[wanted[k]] = found[k].to(static_cast<at::ScalarType>(types[wanted[k]]));
        }
        return results;
    }

    // The pool lives as long as the node. A tensor, since compiled autograd takes no objects.
    static Tensor owner(const c10::intrusive_ptr<GradientPool>& pool) {
        return at::from_blob(pool.get(), {0}, [pool](void*) {}, at::kByte);
    }
};

Tensor shared_cayley(std::int64_t pool, at::TensorList rotations, at::TensorList packed) {
    TORCH_CHECK_VALUE(
        !packed.empty() && packed.size() == rotations.size(),
        "packed must hold one tensor for each of the ", rotations.size(),
        " rotations, and at least one; got ", packed.size());
    return SharedCayley::apply(packed, SharedCayley::Known{pool, rotations});
}

// --- SODA, svd left: SODALinearFunction

using SODAForward = std::vector<Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&,
    bool, at::TensorList);
using SODABackward = std::vector<Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&,
    bool, bool, bool, at::TensorList);

class SODALinear : public torch::autograd::Function<SODALinear> {
 public:
    struct Frozen {
        const Tensor& scale;
        const Tensor& left;
        const Tensor& right;
        const Optional& rotated;
        bool on_tokens;
        bool recompute;
        bool keep;
        std::int64_t pool;
        std::int64_t first;
        at::TensorList factors;
        // U R, if U is rotated here. Not an output: compiled autograd takes none without gradient.
        std::vector<Tensor>& made;
    };

    static Tensor forward(
        AutogradContext* ctx, const Tensor& x, const Tensor& offset, const Tensor& token,
        const Optional& bias, const Frozen& given) {
        std::vector<Tensor> found;
        {
            const at::AutoDispatchBelowADInplaceOrView below;
            static const auto op = raw_op<SODAForward>("spectral::soda_linear_fwd");
            found = op.call(
                x, given.scale, given.left, given.right, bias, given.rotated, given.on_tokens,
                given.factors);
        }
        if (found.size() > 2) given.made.push_back(found[2]);
        ctx->set_materialize_grads(false);

        // What somebody keeps is not among what a checkpoint counts: there may be a keeper by the
        // time it recomputes.
        Tensor rotated;
        if (given.keep && !given.on_tokens) {
            rotated = given.made.empty() ? or_none(given.rotated) : given.made[0];
        }
        auto& data = ctx->saved_data;
        data["rotated"] = optional(rotated);
        GradientPool::of(given.pool);  // there must be one
        data["pool"] = given.pool;
        data["first"] = given.first;
        data["on_tokens"] = given.on_tokens;
        data["bias"] = static_cast<std::int64_t>(
            bias.has_value() ? bias->scalar_type() : at::ScalarType::Undefined);
        data["offset"] = static_cast<std::int64_t>(offset.scalar_type());
        variable_list saved{
            given.recompute ? x : Tensor(), given.recompute ? Tensor() : found[1], given.scale,
            given.left, given.right};
        saved.insert(saved.end(), given.factors.begin(), given.factors.end());
        ctx->save_for_backward(std::move(saved));
        return found[0];
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        variable_list results(5);
        const Tensor& grad = grads[0];
        if (!grad.defined()) return results;
        const variable_list saved = ctx->get_saved_variables();
        variable_list found;
        {
            const InsideNode inside;
            found = gradients(ctx, saved, grad);
        }
        std::copy(found.begin(), found.end(), results.begin());
        return once(grad, std::move(results));
    }

 private:
    // Of x, the offset, the token (none: the pool has them) and the bias.
    static variable_list gradients(
        AutogradContext* ctx, const variable_list& saved, const Tensor& grad) {
        auto& data = ctx->saved_data;
        variable_list results(4);
        const auto bias_type = static_cast<at::ScalarType>(data["bias"].toInt());
        if (bias_type != at::ScalarType::Undefined && ctx->needs_input_grad(3)) {
            results[3] = bias_gradient(grad, bias_type);
        }
        const bool needs_x = ctx->needs_input_grad(0), needs_offset = ctx->needs_input_grad(1);
        const bool needs_turns = ctx->needs_input_grad(2);
        const bool needs_sums = needs_offset || needs_turns;
        if (!needs_x && !needs_sums) return results;
        const Tensor& x = saved[0];
        const Tensor& right = saved[4];
        const Tensor z = saved[1].defined() ? saved[1] : at::linear(x, right.to(x.scalar_type()));
        const variable_list factors(saved.begin() + 5, saved.end());
        static const auto op = raw_op<SODABackward>("spectral::soda_linear_bwd");
        std::vector<Tensor> found = op.call(
            grad, z, saved[2], saved[3], right, data["rotated"].toOptional<Tensor>(),
            data["on_tokens"].toBool(), needs_x, needs_sums, factors);
        auto next = found.begin();
        if (needs_x) results[0] = *next++;
        if (!needs_sums) return results;
        if (needs_offset) {
            results[1] = next->to(static_cast<at::ScalarType>(data["offset"].toInt()));
        }
        ++next;
        if (needs_turns) {
            results[2] =
                GradientPool::of(data["pool"].toInt())
                    ->add(data["first"].toInt(), std::vector<Tensor>(next, found.end()), grad);
        }
        return results;
    }
};

std::vector<Tensor> soda_linear(
    const Tensor& x, const Tensor& scale, const Tensor& left, const Tensor& right,
    const Optional& bias, const Optional& rotated, bool on_tokens, bool recompute, bool keep,
    const Tensor& offset, const Tensor& token, std::int64_t pool, std::int64_t first,
    at::TensorList factors) {
    std::vector<Tensor> results(1), made;
    results[0] = SODALinear::apply(
        x, offset, token, bias,
        SODALinear::Frozen{
            scale, left, right, rotated, on_tokens, recompute, keep, pool, first, factors, made});
    results.insert(results.end(), made.begin(), made.end());
    return results;
}

// --- SODA, svd left, merged: MergedLinearFunction

using KronRotate = Tensor(const Tensor&, at::TensorList, bool, const Optional&, const Optional&);
using KronGram =
    std::vector<Tensor>(const Tensor&, const Tensor&, at::IntArrayRef, const Optional&);

// eager_op of spectral_kernels/ops/kron.py.
template <typename Signature>
const auto& kron_op(const Tensor& x, const char* on_cpu, const char* on_gpu) {
    static const auto cpu = raw_op<Signature>(on_cpu);
    if (!x.is_cuda()) return cpu;
    static const auto gpu = raw_op<Signature>(on_gpu);
    return gpu;
}

class MergedLinear : public torch::autograd::Function<MergedLinear> {
 public:
    struct Basis {
        const Tensor& scale;
        const Tensor& left;
        const Tensor& singular_values;
        const Tensor& right;
        const Optional& base;
    };
    struct Frozen {
        const Basis& basis;
        const Optional& weight;
        const Optional& rotated;
        std::optional<std::int64_t> gradient;
        bool recompute;
        std::int64_t pool;
        std::int64_t first;
        at::TensorList factors;
        std::vector<Tensor>& made;  // W' and U R, as far as they are built here
    };

    static Tensor forward(
        AutogradContext* ctx, const Tensor& x, const Tensor& offset, const Tensor& token,
        const Optional& base, const Optional& bias, const Frozen& given) {
        Tensor y, weight = or_none(given.weight), rotated = or_none(given.rotated);
        {
            const at::AutoDispatchBelowADInplaceOrView below;
            if (!weight.defined()) {
                const bool is_known = rotated.defined();
                if (!is_known) rotated = rotated_basis(given.basis.left, given.factors);
                weight = merged_weight(rotated, given.basis, x.scalar_type());
                given.made.push_back(weight);
                if (!is_known) given.made.push_back(rotated);
            }
            y = at::linear(x, weight, bias);
        }
        ctx->set_materialize_grads(false);
        auto& data = ctx->saved_data;
        GradientPool::of(given.pool);  // there must be one
        data["pool"] = given.pool;
        data["first"] = given.first;
        if (given.gradient.has_value()) KeptGradient::of(*given.gradient);
        data["gradient"] = given.gradient.value_or(-1);
        data["bias"] = static_cast<std::int64_t>(
            bias.has_value() ? bias->scalar_type() : at::ScalarType::Undefined);
        data["offset"] = static_cast<std::int64_t>(offset.scalar_type());
        if (given.recompute) weight = rotated = Tensor();
        const Basis& basis = given.basis;
        variable_list saved{x,           basis.scale,   basis.left, basis.singular_values,
                            basis.right, or_none(base), weight,     rotated};
        saved.insert(saved.end(), given.factors.begin(), given.factors.end());
        ctx->save_for_backward(std::move(saved));
        return y;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        variable_list results(6);
        const Tensor& grad = grads[0];
        if (!grad.defined()) return results;
        const variable_list saved = ctx->get_saved_variables();
        {
            const InsideNode inside;
            gradients(ctx, saved, grad, results);
        }
        return once(grad, std::move(results));
    }

 private:
    // Of x, the offset, the token (none: the pool has them), the base and the bias.
    static void gradients(
        AutogradContext* ctx, const variable_list& saved, const Tensor& grad,
        variable_list& results) {
        auto& data = ctx->saved_data;
        const Tensor &x = saved[0], &left = saved[2], &right = saved[4];
        const Optional base = optional(saved[5]);
        const Basis basis{saved[1], left, saved[3], right, base};
        Tensor weight = saved[6], rotated = saved[7];
        const variable_list factors(saved.begin() + 8, saved.end());

        const bool needs_x = ctx->needs_input_grad(0), needs_offset = ctx->needs_input_grad(1);
        const bool needs_turns = ctx->needs_input_grad(2);
        const bool needs_sums = needs_offset || needs_turns;
        std::size_t edge = 3;  // inputs that are not there have no edge
        const bool needs_base = base.has_value() && ctx->needs_input_grad(edge++);
        const auto bias_type = static_cast<at::ScalarType>(data["bias"].toInt());
        if (bias_type != at::ScalarType::Undefined && ctx->needs_input_grad(edge)) {
            results[4] = bias_gradient(grad, bias_type);
        }
        const Tensor flat = grad.reshape({-1, grad.size(-1)});
        Tensor weight_grad;
        if (needs_sums || needs_base) {
            weight_grad = flat.mT().matmul(x.reshape({-1, x.size(-1)}));
        }
        if (needs_base) results[3] = weight_grad.to(base->scalar_type());
        if (needs_sums) {
            // Without its keeper there is nothing that waits, and nobody to wait for.
            const auto kept = KeptGradient::find(data["gradient"].toInt());
            if (kept) weight_grad = or_none(kept->pass_on(weight_grad));
        }
        if (!rotated.defined()) rotated = rotated_basis(left, factors);
        if (needs_x) {
            if (!weight.defined()) weight = merged_weight(rotated, basis, grad.scalar_type());
            results[0] = flat.matmul(weight).view(x.sizes());
        }
        if (!needs_sums || !weight_grad.defined()) return;
        const auto type = x.scalar_type();
        const Tensor turned =
            weight_grad.to(type).matmul(right.to(type).mT()).to(rotated.scalar_type());
        std::vector<std::int64_t> sizes;
        for (const Tensor& factor : factors) sizes.push_back(factor.size(0));
        std::vector<Tensor> turns = gram(rotated, turned, sizes, basis.scale);
        if (needs_offset) {
            const Tensor sums = turns.back().to(basis.scale.scalar_type());
            results[1] = sums.to(static_cast<at::ScalarType>(data["offset"].toInt()));
        }
        if (!needs_turns) return;
        turns.pop_back();
        for (std::size_t i = 0; i < turns.size(); ++i) {
            turns[i] = factors[i].matmul(turns[i].to(factors[i].scalar_type()));
        }
        results[2] = GradientPool::of(data["pool"].toInt())
                         ->add(data["first"].toInt(), std::move(turns), grad);
    }

    static std::vector<Tensor> gram(
        const Tensor& a, const Tensor& b, at::IntArrayRef sizes, const Tensor& scale) {
        return kron_op<KronGram>(a, "spectral::kron_gram", "spectral_products::kron_gram")
            .call(a, b, sizes, scale);
    }

    static Tensor rotated_basis(const Tensor& left, at::TensorList factors) {
        const Tensor wide = at_least(left, at::kFloat);
        return kron_op<KronRotate>(wide, "spectral::kron_rotate", "spectral_products::kron_rotate")
            .call(wide, factors, false, std::nullopt, std::nullopt);
    }

    static Tensor merged_weight(const Tensor& rotated, const Basis& basis, at::ScalarType type) {
        Tensor folded = rotated * basis.scale;
        const Tensor right = basis.right.to(type);
        if (!basis.base.has_value()) return folded.to(type).matmul(right);
        folded.sub_(basis.left * basis.singular_values);
        return (*basis.base + folded.to(type).matmul(right)).to(type);
    }
};

std::vector<Tensor> merged_linear(
    const Tensor& x, const Tensor& scale, const Tensor& left, const Tensor& singular_values,
    const Tensor& right, const Optional& base, const Optional& bias, const Optional& weight,
    const Optional& rotated, std::optional<std::int64_t> gradient, bool recompute,
    const Tensor& offset, const Tensor& token, std::int64_t pool, std::int64_t first,
    at::TensorList factors) {
    const MergedLinear::Basis basis{scale, left, singular_values, right, base};
    std::vector<Tensor> results(1), made;
    results[0] = MergedLinear::apply(
        x, offset, token, base, bias,
        MergedLinear::Frozen{
            basis, weight, rotated, gradient, recompute, pool, first, factors, made});
    results.insert(results.end(), made.begin(), made.end());
    return results;
}

// --- A and R: SpectralALinearFunction and SpectralRLinearFunction

using LowRankForward = std::tuple<Tensor, Tensor>(
    const Tensor&, const Optional&, const Optional&, const Optional&, const Tensor&, const Tensor&,
    const Tensor&, const Tensor&, const Tensor&, double);
using ABackward = std::vector<Tensor>(
    const Tensor&, const Tensor&, const Optional&, const Tensor&, const Tensor&, const Tensor&,
    const Tensor&, const Tensor&, const Tensor&, double, bool, bool);
using RBackward = std::vector<Tensor>(
    const Tensor&, const Optional&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    const Tensor&, const Tensor&, double, bool, bool);

struct LowRank {
    const Optional& weight;
    const Tensor& left;
    const Tensor& singular_values;
    const Tensor& right;
    const Tensor& first;   // A_U or R_U
    const Tensor& second;  // A_V or R_V
    double scaling;
};

// y, after saving what the backward needs; `trained` is how many inputs there are between x and
// the base.
template <typename Op>
Tensor low_rank_forward(
    AutogradContext* ctx, const Op& op, const Tensor& x, const Optional& base, const Optional& bias,
    const LowRank& given, bool keeps_x) {
    const auto [y, thin] = [&] {
        const at::AutoDispatchBelowADInplaceOrView below;
        return op.call(
            x, base, given.weight, bias, given.left, given.singular_values, given.right,
            given.first, given.second, given.scaling);
    }();
    ctx->set_materialize_grads(false);
    auto& data = ctx->saved_data;
    data["scaling"] = given.scaling;
    data["has_base"] = base.has_value();
    data["bias"] = static_cast<std::int64_t>(
        bias.has_value() ? bias->scalar_type() : at::ScalarType::Undefined);
    ctx->save_for_backward(
        {keeps_x ? x : Tensor(), or_none(given.weight), thin, given.left, given.singular_values,
         given.right, given.first, given.second});
    return y;
}

// The gradients of base and bias, behind `trained` inputs that come after x.
void base_and_bias(
    AutogradContext* ctx, const Tensor& grad, std::size_t trained, variable_list& results) {
    auto& data = ctx->saved_data;
    std::size_t edge = 1 + trained;  // inputs that are not there have no edge
    if (data["has_base"].toBool() && ctx->needs_input_grad(edge++)) results[1 + trained] = grad;
    const auto type = static_cast<at::ScalarType>(data["bias"].toInt());
    if (type != at::ScalarType::Undefined && ctx->needs_input_grad(edge)) {
        results[2 + trained] = bias_gradient(grad, type);
    }
}

class SpectralALinear : public torch::autograd::Function<SpectralALinear> {
 public:
    static variable_list forward(
        AutogradContext* ctx, const Tensor& x, const Tensor& shift_left, const Tensor& shift_right,
        const Optional& base, const Optional& bias, const LowRank& given) {
        static const auto op = raw_op<LowRankForward>("spectral::spectral_a_linear_fwd");
        return {low_rank_forward(ctx, op, x, base, bias, given, true)};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        variable_list results(6);
        const Tensor& grad = grads[0];
        if (!grad.defined()) return results;
        const variable_list s = ctx->get_saved_variables();
        {
            const InsideNode inside;
            const bool needs_x = ctx->needs_input_grad(0);
            const bool needs_left = ctx->needs_input_grad(1),
                       needs_right = ctx->needs_input_grad(2);
            base_and_bias(ctx, grad, 2, results);
            if (needs_x || needs_left || needs_right) {
                static const auto op = raw_op<ABackward>("spectral::spectral_a_linear_bwd");
                const std::vector<Tensor> found = op.call(
                    grad, s[0], optional(s[1]), s[2], s[3], s[4], s[5], s[6], s[7],
                    ctx->saved_data["scaling"].toDouble(), needs_x, needs_left || needs_right);
                if (needs_x) results[0] = found[0];
                if (needs_left) results[1] = found[1];
                if (needs_right) results[2] = found[2];
            }
        }
        return once(grad, std::move(results));
    }
};

class SpectralRLinear : public torch::autograd::Function<SpectralRLinear> {
 public:
    struct Shared {
        const LowRank& product;
        std::int64_t pool;
        std::int64_t first;
    };

    static variable_list forward(
        AutogradContext* ctx, const Tensor& x, const Tensor& token, const Optional& base,
        const Optional& bias, const Shared& given) {
        static const auto op = raw_op<LowRankForward>("spectral::spectral_r_linear_fwd");
        GradientPool::of(given.pool);  // there must be one
        ctx->saved_data["pool"] = given.pool;
        ctx->saved_data["first"] = given.first;
        return {low_rank_forward(ctx, op, x, base, bias, given.product, false)};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        variable_list results(5);
        const Tensor& grad = grads[0];
        if (!grad.defined()) return results;
        const variable_list s = ctx->get_saved_variables();
        {
            const InsideNode inside;
            const bool needs_x = ctx->needs_input_grad(0), needs_turns = ctx->needs_input_grad(1);
            base_and_bias(ctx, grad, 1, results);
            if (needs_x || needs_turns) {
                static const auto op = raw_op<RBackward>("spectral::spectral_r_linear_bwd");
                auto& data = ctx->saved_data;
                const std::vector<Tensor> found = op.call(
                    grad, optional(s[1]), s[2], s[3], s[4], s[5], s[6], s[7],
                    data["scaling"].toDouble(), needs_x, needs_turns);
                if (needs_x) results[0] = found[0];
                if (needs_turns) {
                    results[1] = GradientPool::of(data["pool"].toInt())
                                     ->add(data["first"].toInt(), {found[1], found[2]}, grad);
                }
            }
        }
        return once(grad, std::move(results));
    }
};

Tensor spectral_a_linear(
    const Tensor& x, const Optional& base, const Optional& weight, const Optional& bias,
    const Tensor& left, const Tensor& singular_values, const Tensor& right,
    const Tensor& shift_left, const Tensor& shift_right, double scaling) {
    const LowRank given{weight, left, singular_values, right, shift_left, shift_right, scaling};
    return SpectralALinear::apply(x, shift_left, shift_right, base, bias, given)[0];
}

Tensor spectral_r_linear(
    const Tensor& x, const Optional& base, const Optional& weight, const Optional& bias,
    const Tensor& left, const Tensor& singular_values, const Tensor& right,
    const Tensor& rotation_left, const Tensor& rotation_right, double scaling, const Tensor& token,
    std::int64_t pool, std::int64_t first) {
    const LowRank given{weight,        left,           singular_values, right,
                        rotation_left, rotation_right, scaling};
    return SpectralRLinear::apply(
        x, token, base, bias, SpectralRLinear::Shared{given, pool, first})[0];
}

}  // namespace
}  // namespace spectral

TORCH_LIBRARY(spectral_nodes, m) {
    m.class_<spectral::GradientPool>("GradientPool")
        .def(torch::init<std::int64_t>())
        .def("add", &spectral::GradientPool::add)
        .def("take", &spectral::GradientPool::take)
        .def("number", &spectral::number_of<spectral::GradientPool>);
    m.class_<spectral::Deferral>("Deferral")
        .def(torch::init<>())
        .def("is_on", &spectral::Deferral::is_on)
        .def("set", &spectral::Deferral::set);
    m.class_<spectral::KeptGradient>("KeptGradient")
        .def(torch::init<c10::intrusive_ptr<spectral::Deferral>>())
        .def("sum", &spectral::KeptGradient::sum)
        .def("set_sum", &spectral::KeptGradient::set_sum)
        .def("pass_on", &spectral::KeptGradient::pass_on)
        .def("number", &spectral::number_of<spectral::KeptGradient>);
    const auto define = [&](const char* schema, auto function) {
        m.def(schema, torch::dispatch(c10::DispatchKey::CompositeImplicitAutograd, function));
    };
    define(
        "shared_cayley(int pool, Tensor[] rotations, Tensor[] packed) -> Tensor",
        &spectral::shared_cayley);
    define(
        "soda_linear(Tensor x, Tensor scale, Tensor left, Tensor right, Tensor? bias, "
        "Tensor? rotated, bool on_tokens, bool recompute, bool keep, Tensor offset, Tensor token, "
        "int pool, int first, Tensor[] factors) "
        "-> Tensor[]",
        &spectral::soda_linear);
    define(
        "merged_linear(Tensor x, Tensor scale, Tensor left, Tensor singular_values, Tensor right, "
        "Tensor? base, Tensor? bias, Tensor? weight, Tensor? rotated, int? gradient, "
        "bool recompute, Tensor offset, Tensor token, int pool, int first, Tensor[] factors) "
        "-> Tensor[]",
        &spectral::merged_linear);
    define(
        "spectral_a_linear(Tensor x, Tensor? base, Tensor? weight, Tensor? bias, Tensor left, "
        "Tensor singular_values, Tensor right, Tensor shift_left, Tensor shift_right, "
        "float scaling) -> Tensor",
        &spectral::spectral_a_linear);
    define(
        "spectral_r_linear(Tensor x, Tensor? base, Tensor? weight, Tensor? bias, Tensor left, "
        "Tensor singular_values, Tensor right, Tensor rotation_left, Tensor rotation_right, "
        "float scaling, Tensor token, int pool, int first) -> Tensor",
        &spectral::spectral_r_linear);
}
