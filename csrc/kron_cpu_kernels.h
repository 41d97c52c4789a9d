// The Kronecker kernels of one SIMD level; see simd_vector.h for how this file is included.
//
// A few rows at a time are copied to the workspace, where all axes are dealt with while the rows
// are in the cache. Seen from an axis of n indices a row is [before, n, after]. Everything is a
// small product of matrices whose columns are cut into vectors:
//   after >= a vector   y[b] = M^T x[b] for every b; the Gram adds a[b] b[b]^T, with b[b]
//   transposed after == 1          y = x M with all rows below each other; the Gram adds a^T b in
//   between          like after == 1, with the axis moved to the end and back
//
// Vectors may reach over the end of a matrix of the workspace, whose buffers have room for that:
// what is read there ends in columns that nobody looks at, what is written there is overwritten by
// the next row.

namespace spectral::cpu::SPECTRAL_SIMD_LEVEL {
namespace {

struct Axis {
    std::int64_t n, before, after;
};

template <typename T>
constexpr bool in_between(const Axis& axis) {
    return axis.after > 1 && axis.after < kLaneCount<T>;
}

// The axes of a shape, first to last: call(index, axis).
template <typename Call>
inline void for_each_axis(const KronShape& shape, Call call) {
    std::int64_t before = 1, after = shape.width;
    for (std::int64_t i = 0; i < shape.count; ++i) {
        after /= shape.dims[i];
        call(i, Axis{shape.dims[i], before, after});
        before *= shape.dims[i];
    }
}

// Rows dealt with at a time: about what half a first-level cache holds, and enough of them to load
// a large factor for many.
inline std::int64_t block_rows(const KronShape& shape) {
    std::int64_t widest = 1;
    for (std::int64_t i = 0; i < shape.count; ++i) {
        widest = shape.dims[i] > widest ? shape.dims[i] : widest;
    }
    const std::int64_t cached = 4096 / shape.width, shared = 64 * widest / shape.width;
    const std::int64_t rows = cached > shared ? cached : shared;
    return rows < 1 ? 1 : rows;
}

// run(first row, number of rows) for the rows in blocks.
template <typename Run>
inline void for_each_block(const KronShape& shape, std::int64_t rows, const Run& run) {
    const std::int64_t block = block_rows(shape);
    for (std::int64_t start = 0; start < rows; start += block) {
        const std::int64_t left = rows - start;
        run(start, left < block ? left : block);
    }
}

// Moves an axis between its place and the end: [outer, n, after] to [outer, after, n].
template <typename T>
void axis_to_end(const T* in, const Axis& axis, std::int64_t outer, T* out) {
    for (std::int64_t b = 0; b < outer; ++b) {
        const std::int64_t start = b * axis.n * axis.after;
        transpose(in + start, axis.after, axis.n, axis.after, out + start, axis.n);
    }
}

template <typename T>
void axis_from_end(const T* in, const Axis& axis, std::int64_t outer, T* out) {
    for (std::int64_t b = 0; b < outer; ++b) {
        const std::int64_t start = b * axis.n * axis.after;
        transpose(in + start, axis.n, axis.after, axis.n, out + start, axis.after);
    }
}

template <typename T>
void copy_scaled(
    const T* in, const T* scale, std::int64_t rows, std::int64_t width, T* __restrict out) {
    for (std::int64_t r = 0; r < rows; ++r) {
        const T* const from = in + r * width;
        T* const to = out + r * width;
        if (scale == nullptr) {
            for (std::int64_t i = 0; i < width; ++i) to[i] = from[i];
        } else {
            for (std::int64_t i = 0; i < width; ++i) to[i] = from[i] * scale[i];
        }
    }
}

template <typename T>
std::int64_t padded_matrix(std::int64_t n) {
    return with_overhang<T>(n * round_up(n, kLaneCount<T>));
}

template <typename T>
std::size_t rotate_elements(const KronShape& shape) {
    std::int64_t elements = 2 * with_overhang<T>(block_rows(shape) * shape.width);
    for_each_axis(shape, [&](std::int64_t, const Axis& axis) {
        if (axis.after < kLaneCount<T>) elements += padded_matrix<T>(axis.n);
    });
    return static_cast<std::size_t>(elements);
}

// Two buffers of rows, and what multiplies the axes dealt with at the end of the row, with rows
// padded to whole vectors.
template <typename T>
struct Rotation {
    const KronShape& shape;
    const RotateArguments<T>& arguments;
    T* first;
    T* second;
    T* matrices;

    Rotation(const KronShape& kron_shape, const RotateArguments<T>& given, void* workspace)
        : shape(kron_shape), arguments(given) {
        const std::int64_t buffer = with_overhang<T>(block_rows(shape) * shape.width);
        first = static_cast<T*>(workspace);
        second = first + buffer;
        matrices = second + buffer;
        T* matrix = matrices;
        for_each_axis(shape, [&](std::int64_t index, const Axis& axis) {
            if (axis.after >= kLaneCount<T>) return;
            const std::int64_t n = axis.n, stride = round_up(n, kLaneCount<T>);
            const T* const factor = arguments.factors[index];
            for (std::int64_t i = 0; i < n; ++i) {
                for (std::int64_t j = 0; j < stride; ++j) {
                    matrix[i * stride + j] =
                        j >= n ? 0 : factor[arguments.transpose ? j * n + i : i * n + j];
                }
            }
            matrix += padded_matrix<T>(n);
        });
    }

    // The rotated rows from start on, without the scale that comes after; in one of the buffers.
    const T* rows(std::int64_t start, std::int64_t count) const {
        T *current = first, *other = second;
        const auto swap = [&] {
            T* const swapped = current;
            current = other;
            other = swapped;
        };
        copy_scaled(
            arguments.x + start * shape.width, arguments.scale_before, count, shape.width, current);
        const T* matrix = matrices;
        for_each_axis(shape, [&](std::int64_t index, const Axis& axis) {
            const std::int64_t n = axis.n, after = axis.after, outer = count * axis.before;
            if (after >= kLaneCount<T>) {
                const T* const factor = arguments.factors[index];
                const bool transposed = arguments.transpose;
                for (std::int64_t b = 0; b < outer; ++b) {
                    product<T, false>(
                        other + b * n * after, after, factor, transposed ? n : 1,
                        transposed ? 1 : n, current + b * n * after, after, n, n, after);
                }
                swap();
                return;
            }
            if (after > 1) {
                axis_to_end(current, axis, outer, other);
                swap();
            }
            product<T, false>(
                other, n, current, n, 1, matrix, round_up(n, kLaneCount<T>), n, outer * after, n);
            matrix += padded_matrix<T>(n);
            if (after > 1) {
                axis_from_end(other, axis, outer, current);
            } else {
                swap();
            }
        });
        return current;
    }
};

template <typename T>
void rotate(const KronShape& shape, const RotateArguments<T>& arguments, void* workspace) {
    const Rotation<T> rotation(shape, arguments, workspace);
    for_each_block(shape, arguments.rows, [&](std::int64_t start, std::int64_t count) {
        copy_scaled(
            rotation.rows(start, count), arguments.scale_after, count, shape.width,
            arguments.out + start * shape.width);
    });
}

template <typename T>
std::size_t gram_elements(const KronShape& shape) {
    const std::int64_t rows = with_overhang<T>(block_rows(shape) * shape.width);
    std::int64_t elements = 2 * rows, scratch = 0;
    for_each_axis(shape, [&](std::int64_t, const Axis& axis) {
        elements += padded_matrix<T>(axis.n);
        const std::int64_t needed =
            in_between<T>(axis)
                ? 2 * rows
                : (axis.after > 1 ? with_overhang<T>(axis.after * round_up(axis.n, kLaneCount<T>))
                                  : 0);
        scratch = needed > scratch ? needed : scratch;
    });
    return static_cast<std::size_t>(elements + scratch);
}

// Rows of b times scale, the sums with rows padded to whole vectors, scratch for what is
// transposed.
template <typename T>
struct GramSums {
    const KronShape& shape;
    const GramArguments<T>& arguments;
    T* b;
    T* sums;
    T* scratch;

    GramSums(const KronShape& kron_shape, const GramArguments<T>& given, void* workspace)
        : shape(kron_shape), arguments(given) {
        b = static_cast<T*>(workspace);
        sums = b + buffer();
        scratch = sums;
        for_each_axis(
            shape, [&](std::int64_t, const Axis& axis) { scratch += padded_matrix<T>(axis.n); });
        for (T* entry = sums; entry < scratch; ++entry) *entry = 0;
        for (std::int64_t i = 0; i < shape.width; ++i) arguments.column_sums[i] = 0;
    }

    std::int64_t buffer() const { return with_overhang<T>(block_rows(shape) * shape.width); }

    // Adds rows of a, which lie in the workspace, and the rows of b from start on.
    void add(const T* a, std::int64_t start, std::int64_t count) const {
        const std::int64_t width = shape.width;
        copy_scaled(arguments.b + start * width, arguments.scale_b, count, width, b);
        for (std::int64_t r = 0; r < count; ++r) {
            const T* const left = a + r * width;
            const T* const right = arguments.b + (start + r) * width;
            T* const __restrict out = arguments.column_sums;
            for (std::int64_t i = 0; i < width; ++i) out[i] += left[i] * right[i];
        }
        T* sum = sums;
        for_each_axis(shape, [&](std::int64_t, const Axis& axis) {
            const std::int64_t n = axis.n, after = axis.after, outer = count * axis.before;
            const std::int64_t stride = round_up(n, kLaneCount<T>);
            if (after == 1) {
                product<T, true>(sum, stride, a, 1, n, b, n, outer, n, n);
            } else if (in_between<T>(axis)) {
                axis_to_end(a, axis, outer, scratch);
                axis_to_end(b, axis, outer, scratch + buffer());
                product<T, true>(
                    sum, stride, scratch, 1, n, scratch + buffer(), n, outer * after, n, n);
            } else {
                // The columns of padding: what lies there may be denormal, which is slow.
                for (std::int64_t i = 0; i < after * stride; ++i) scratch[i] = 0;
                for (std::int64_t k = 0; k < outer; ++k) {
                    transpose(b + k * n * after, after, n, after, scratch, stride);
                    product<T, true>(
                        sum, stride, a + k * n * after, after, 1, scratch, stride, after, n, n);
                }
            }
            sum += padded_matrix<T>(n);
        });
    }

    void store() const {
        const T* sum = sums;
        for_each_axis(shape, [&](std::int64_t index, const Axis& axis) {
            const std::int64_t stride = round_up(axis.n, kLaneCount<T>);
            for (std::int64_t i = 0; i < axis.n; ++i) {
                for (std::int64_t j = 0; j < axis.n; ++j) {
                    arguments.grams[index][i * axis.n + j] = sum[i * stride + j];
                }
            }
            sum += padded_matrix<T>(axis.n);
        });
    }
};

template <typename T>
void gram(const KronShape& shape, const GramArguments<T>& arguments, void* workspace) {
    T* const a = static_cast<T*>(workspace);
    const GramSums<T> sums(shape, arguments, a + with_overhang<T>(block_rows(shape) * shape.width));
    for_each_block(shape, arguments.rows, [&](std::int64_t start, std::int64_t count) {
        copy_scaled<T>(arguments.a + start * shape.width, nullptr, count, shape.width, a);
        sums.add(a, start, count);
    });
    sums.store();
}

// Both at once: the Gram of the rotated rows, while they are in the cache, with b.
template <typename T>
void rotate_gram(
    const KronShape& shape, const RotateArguments<T>& rotate_arguments,
    const GramArguments<T>& gram_arguments, void* workspace) {
    const Rotation<T> rotation(shape, rotate_arguments, workspace);
    const GramSums<T> sums(
        shape, gram_arguments, static_cast<T*>(workspace) + rotate_elements<T>(shape));
    for_each_block(shape, rotate_arguments.rows, [&](std::int64_t start, std::int64_t count) {
        const T* const rotated = rotation.rows(start, count);
        sums.add(rotated, start, count);
        copy_scaled(
            rotated, rotate_arguments.scale_after, count, shape.width,
            rotate_arguments.out + start * shape.width);
    });
    sums.store();
}

std::size_t rotate_bytes(const KronShape& shape, std::size_t element) {
    return element * (element == sizeof(float) ? rotate_elements<float>(shape)
                                               : rotate_elements<double>(shape));
}

std::size_t gram_bytes(const KronShape& shape, std::size_t element) {
    return element *
           (element == sizeof(float) ? gram_elements<float>(shape) : gram_elements<double>(shape));
}

}  // namespace

inline constexpr KronKernels kKronKernels{rotate_bytes,       gram_bytes,         rotate<float>,
                                          rotate<double>,     gram<float>,        gram<double>,
                                          rotate_gram<float>, rotate_gram<double>};

}  // namespace spectral::cpu::SPECTRAL_SIMD_LEVEL
