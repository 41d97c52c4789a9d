// Vector types of one SIMD level. Included by simd_{baseline,avx2,avx512}.cpp inside a region
// compiled for that level, before the kernels, with these macros set:
//   SPECTRAL_SIMD_LEVEL  namespace of the level
//   SPECTRAL_SIMD_BYTES  width of a vector register
//   SPECTRAL_TILE        vectors in a row of the register tile (4 rows deep)
// No include guard (three inclusions with three meanings) and no standard header, here and in the
// kernels: an inline standard function compiled here for AVX could be the copy the linker keeps for
// everyone.

namespace spectral::cpu::SPECTRAL_SIMD_LEVEL {
namespace {

template <typename T>
struct VectorOf {
    typedef T type __attribute__((vector_size(SPECTRAL_SIMD_BYTES), may_alias));
    // For memory that is aligned to its elements only.
    typedef T unaligned
        __attribute__((vector_size(SPECTRAL_SIMD_BYTES), aligned(sizeof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr std::int64_t kLaneCount = SPECTRAL_SIMD_BYTES / std::int64_t{sizeof(T)};

constexpr std::int64_t kTileRows = 4;

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

}  // namespace
}  // namespace spectral::cpu::SPECTRAL_SIMD_LEVEL
