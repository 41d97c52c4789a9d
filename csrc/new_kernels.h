// Kernels for CUDA that no GPU has run as they are now: the layers leave them alone until one has
// shown that they are right and faster, unless they are turned on.
#pragma once

#include <atomic>

namespace spectral {

inline std::atomic<bool> new_kernels_are_on{false};

}  // namespace spectral
