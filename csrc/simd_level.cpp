#include "simd_level.h"

#include <atomic>
#include <stdexcept>

namespace spectral::cpu {
namespace {

std::vector<const SimdLevel*> detect() {
    std::vector<const SimdLevel*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
        found.push_back(&kAvx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.push_back(&kAvx2);
    }
#endif
    found.push_back(&kBaseline);
    return found;
}

std::atomic<const SimdLevel*>& active() {
    static std::atomic<const SimdLevel*> level{detect().front()};
    return level;
}

}  // namespace

const SimdLevel& active_level() { return *active().load(std::memory_order_relaxed); }

std::vector<std::string> available_levels() {
    std::vector<std::string> names;
    for (const SimdLevel* level : detect()) names.emplace_back(level->name);
    return names;
}

void set_level(const std::string& name) {
    for (const SimdLevel* level : detect()) {
        if (level->name == name) {
            active().store(level, std::memory_order_relaxed);
            return;
        }
    }
    throw std::invalid_argument("SIMD level '" + name + "' cannot run on this processor");
}

}  // namespace spectral::cpu
