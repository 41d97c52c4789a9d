"""Choosing the sizes of the Kronecker factors of a rotation."""

from __future__ import annotations

from math import isqrt

from spectral_adapters._validation import check_factor_sizes

#: Sizes used by the published SODA experiments, by rotated dimension.
PUBLISHED_FACTORS: dict[int, tuple[int, ...]] = {
    640: (8, 8, 10),
    768: (6, 8, 16),
    1280: (4, 16, 20),
    2048: (4, 8, 64),
}

#: Automatic choices keep every factor at or below this size where a divisor allows it.
LARGEST_AUTOMATIC_FACTOR = 128


def balanced_factors(dimension: int) -> tuple[int, ...]:
    """Factor sizes for a rotated dimension: as few and as equal as possible, ascending.

    The most equal pair is taken if both are at most 128, else the most equal triple, and so on. A
    dimension with a prime factor above 128 cannot obey the limit: that prime becomes one factor of
    its own and the rest is balanced, so a prime dimension p gets the single factor ``(p,)``, a
    full rotation with p(p-1)/2 parameters. Factors of size 1 are left out (they rotate nothing)
    except for dimension 1.

    Args:
        dimension: the rotated dimension, at least 1.

    Raises:
        TypeError, ValueError: ``dimension`` is not a positive int.
    """
    if isinstance(dimension, bool) or not isinstance(dimension, int):
        raise TypeError(f"dimension must be an int; got {dimension!r}")
    if dimension < 1:
        raise ValueError(f"dimension must be at least 1; got {dimension}")
    largest_prime = _largest_prime_factor(dimension)
    if largest_prime > LARGEST_AUTOMATIC_FACTOR:
        rest = dimension // largest_prime
        return (largest_prime,) if rest == 1 else (*balanced_factors(rest), largest_prime)
    count = 2
    while True:
        factors = _most_equal(dimension, count)
        if max(factors) <= LARGEST_AUTOMATIC_FACTOR:
            return tuple(sorted(size for size in factors if size > 1)) or (1,)
        count += 1


def resolve_factors(factors: object, dimension: int, meaning: str) -> tuple[int, ...]:
    """``None`` -> the balanced choice; anything else is checked to multiply to ``dimension``."""
    if factors is None:
        return balanced_factors(dimension)
    return check_factor_sizes("factors", factors, dimension, meaning)


def packed_size(sizes: tuple[int, ...]) -> int:
    """Trained numbers of a Cayley-parametrised rotation: sum of n(n-1)/2 over the factors."""
    return sum(n * (n - 1) // 2 for n in sizes)


def _largest_prime_factor(number: int) -> int:
    largest, divisor = 1, 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            largest, number = divisor, number // divisor
        divisor += 1
    return max(largest, number)


def _most_equal(dimension: int, count: int) -> tuple[int, ...]:
    """The ``count`` divisors with product ``dimension`` whose maximum is smallest."""
    if count == 1:
        return (dimension,)
    if count == 2:
        small = isqrt(dimension)
        while dimension % small:
            small -= 1
        return (small, dimension // small)
    candidates = [
        (divisor, *_most_equal(dimension // divisor, count - 1))
        for divisor in range(1, dimension + 1)
        if dimension % divisor == 0
    ]
    return min(candidates, key=lambda sizes: (max(sizes), sum(sizes)))
