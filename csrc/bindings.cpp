// The Python module spectral_kernels._C: what was built and how. The ops need no binding; each
// source file registers its own with the dispatcher when the module is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <string>

#include "simd_level.h"

#if defined(SPECTRAL_WITH_CUDA)
#include <cuda_runtime_api.h>

#include "new_kernels.h"
#endif

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown";
#endif
}

// The dictionary's keys are documented in build_info's docstring below.
py::dict build_info() {
    py::dict info;
    info["compiler"] = compiler();
    info["cxx_standard"] = static_cast<long>(__cplusplus);
    info["torch"] = TORCH_VERSION;
    info["simd"] = spectral::cpu::active_level().name;
#if defined(_OPENMP)
    info["multithreaded"] = true;
#else
    info["multithreaded"] = false;
#endif
#if defined(SPECTRAL_WITH_CUDA)
    info["cuda"] =
        std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    info["cuda_architectures"] = SPECTRAL_CUDA_ARCHITECTURES;
#else
    info["cuda"] = py::none();
    info["cuda_architectures"] = py::none();
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.doc() = "Compiled ops of spectral_kernels, registered with torch.ops.spectral on import.";
    m.def(
        "build_info", &build_info,
        "Facts of this build: compiler, cxx_standard (value of __cplusplus), torch (version built\n"
        "against), cuda (toolkit version or None), cuda_architectures (as in "
        "TORCH_CUDA_ARCH_LIST,\n"
        "or None), simd, the level the CPU kernels run at here: avx512, avx2 or baseline, and\n"
        "multithreaded, whether they use torch's threads.");
    m.def(
        "_simd_levels", &spectral::cpu::available_levels,
        "Names of the SIMD levels that can run here, widest first.");
    m.def(
        "_set_simd_level", &spectral::cpu::set_level, py::arg("name"),
        "Switch the CPU kernels to a level of _simd_levels(), for tests; ValueError otherwise.");
#if defined(SPECTRAL_WITH_CUDA)
    m.def(
        "_use_wide_tiles", [](bool on) { spectral::wide_tiles_are_on = on; }, py::arg("on"),
        "Whether the tensor-core kernels take rows of more than 32 x 48; no GPU has run these.");
    m.def(
        "_layers_use_tile", &spectral::layers_use_tile, py::arg("n1"), py::arg("n2"),
        "Whether bf16 rows of two factors are rotated on tensor cores where there are any.");
    m.def(
        "_use_new_kernels", [](bool on) { spectral::new_kernels_are_on = on; }, py::arg("on"),
        "Whether layers use the newest CUDA kernels: SODA in bf16 on tensor cores, and what lies\n"
        "between the products of A and R. On at first; off for comparisons and tests.");
#endif
}
