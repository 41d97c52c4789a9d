// The newest CUDA kernels of the layers. They can be turned off, to compare and to test what runs
// instead; a kernel that no GPU has run belongs behind a switch that is off.
#pragma once

#include <atomic>

namespace spectral {

inline std::atomic<bool> new_kernels_are_on{true};

}  // namespace spectral
