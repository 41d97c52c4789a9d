#include "simd_level.h"

#include <atomic>
#include <stdexcept>

namespace spectral::cpu {
namespace {

std::vector<const CayleyKernels*> detect() {
    std::vector<const CayleyKernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
        found.push_back(&kAvx512Kernels);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.push_back(&kAvx2Kernels);
    }
#endif
    found.push_back(&kBaselineKernels);
    return found;
}

std::atomic<const CayleyKernels*>& active() {
    static std::atomic<const CayleyKernels*> kernels{detect().front()};
    return kernels;
}

}  // namespace

const CayleyKernels& active_kernels() { return *active().load(std::memory_order_relaxed); }

std::vector<std::string> available_levels() {
    std::vector<std::string> names;
    for (const CayleyKernels* kernels : detect()) names.emplace_back(kernels->name);
    return names;
}

void set_level(const std::string& name) {
    for (const CayleyKernels* kernels : detect()) {
        if (kernels->name == name) {
            active().store(kernels, std::memory_order_relaxed);
            return;
        }
    }
    throw std::invalid_argument("SIMD level '" + name + "' cannot run on this processor");
}

}  // namespace spectral::cpu
