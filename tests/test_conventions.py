"""The conventions of docs/conventions.md, pinned by numbers worked out by hand."""

import torch

from spectral_adapters.functional import cayley, kron_gram, kron_rotate


def test_cayley_sign_and_packing_2x2():
    # P = [[0, 2t], [0, 0]] gives Q = [[0, t], [-t, 0]] and R = 1/(1+t^2) [[1-t^2, 2t], [-2t,
    # 1-t^2]].
    t = 0.5
    rotation = cayley(torch.tensor([[2 * t]], dtype=torch.float64), 2)[0]
    expected = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    torch.testing.assert_close(rotation, expected, rtol=1e-15, atol=1e-15)


def test_cayley_packs_the_upper_triangle_row_by_row():
    # Only entry number 4 of n = 4, which is P[1, 3], is set: the plane (1, 3) turns, nothing else.
    packed = torch.zeros(1, 6, dtype=torch.float64)
    packed[0, 4] = 1.0
    rotation = cayley(packed, 4)[0]
    expected = torch.eye(4, dtype=torch.float64)
    expected[1, 1] = expected[3, 3] = 0.6
    expected[1, 3], expected[3, 1] = 0.8, -0.8
    torch.testing.assert_close(rotation, expected, rtol=1e-15, atol=1e-15)


def test_first_factor_is_outermost():
    # k = 6 as (2, 3): entry i1 * 3 + i2. R1 swaps the two blocks of three, R2 shifts within a
    # block.
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    shift = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    row = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    rotated = kron_rotate(row, (swap, shift))
    assert rotated.tolist() == [[6.0, 4.0, 5.0, 3.0, 1.0, 2.0]]
    assert kron_rotate(rotated, (swap, shift), transpose=True).tolist() == row.tolist()


def test_gram_is_a_partial_trace():
    # a = (1, 2, 3, 4), b = (5, 6, 7, 8) as 2 x 2: gram_1[p, q] = sum_j a[p, j] b[q, j], and so on.
    a, b = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[5.0, 6.0, 7.0, 8.0]])
    (gram_1, gram_2), column_sums = kron_gram(a, b, (2, 2))
    assert gram_1.tolist() == [[17.0, 23.0], [39.0, 53.0]]
    assert gram_2.tolist() == [[26.0, 30.0], [38.0, 44.0]]
    assert column_sums.tolist() == [5.0, 12.0, 21.0, 32.0]
