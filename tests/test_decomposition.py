"""Canonical bases, fingerprints: the same weights on every machine, or a refusal."""

import pytest
import torch
from support import randomise, relative_error

from spectral_adapters import SODALinear
from spectral_adapters.decomposition import Fingerprint, decompose

METHODS = [("svd", "left"), ("svd", "right"), ("svd", None), ("qr", "left"), ("qr", "right")]


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (7, 7), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize(("decomposition", "rotation"), METHODS)
def test_factors_multiply_back_and_are_orthonormal(decomposition, rotation, shape):
    weight = torch.randn(shape, dtype=torch.float64)
    left, values, right = decompose(weight, decomposition, rotation)
    k = min(shape)
    assert left.shape == (shape[0], k) and right.shape == (k, shape[1])
    middle = left if values is None else left * values
    torch.testing.assert_close(middle @ right, weight, rtol=1e-12, atol=1e-12)
    identity = torch.eye(k, dtype=torch.float64)
    if decomposition == "svd" or rotation == "left":
        torch.testing.assert_close(left.mT @ left, identity, rtol=0, atol=1e-13)
    if decomposition == "svd" or rotation == "right":
        torch.testing.assert_close(right @ right.mT, identity, rtol=0, atol=1e-13)


def test_signs_are_canonical():
    weight = torch.randn(30, 20)
    left, _, _ = decompose(weight, "svd", "left")
    largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()
    _, _, triangular = decompose(weight, "qr", "left")
    assert (triangular.diagonal() >= 0).all()
    lower, _, _ = decompose(weight, "qr", "right")
    assert (lower.diagonal() >= 0).all()


def test_equal_magnitudes_do_not_let_round_off_choose_the_sign():
    hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    for size in (2, 3):
        weight = torch.kron(torch.kron(hadamard, hadamard), hadamard)[:, :size].double()
        weight = weight * torch.arange(1, size + 1)
        reference = decompose(weight, "svd", "left").left
        for _ in range(10):
            noisy = weight + 1e-14 * torch.randn_like(weight)
            assert torch.allclose(decompose(noisy, "svd", "left").left, reference, atol=1e-9)


def _flipped(svd):
    def patched(matrix, full_matrices=True, **_):
        u, s, vh = svd(matrix, full_matrices=full_matrices)
        signs = torch.where(torch.rand(s.shape[0]) < 0.5, -1.0, 1.0).to(s.dtype)
        return u * signs, s, vh * signs[:, None]

    return patched


def _by_eigenvectors(svd):
    """Another algorithm altogether: eigenvectors of the Gram matrix, in float64."""

    def patched(matrix, full_matrices=True, **_):
        values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
        order = torch.argsort(values, descending=True)
        s = values[order].clamp_min(0).sqrt()
        u = vectors[:, order]
        return u, s, (u.mT @ matrix) / s[:, None]

    return patched


def _scipy_driver(svd):
    """LAPACK's gesvd (QR iteration) instead of torch's gesdd (divide and conquer)."""
    linalg = pytest.importorskip("scipy.linalg")

    def patched(matrix, full_matrices=True, **_):
        result = linalg.svd(matrix.numpy(), full_matrices=full_matrices, lapack_driver="gesvd")
        return tuple(torch.from_numpy(part) for part in result)

    return patched


def _other_thread_count(svd):
    def patched(matrix, full_matrices=True, **_):
        threads = torch.get_num_threads()
        torch.set_num_threads(2 if threads == 1 else 1)
        try:
            return svd(matrix, full_matrices=full_matrices)
        finally:
            torch.set_num_threads(threads)

    return patched


def _fp32(svd):
    """A decomposition with fp32 round-off, as a machine without float64 would make."""

    def patched(matrix, full_matrices=True, **_):
        return tuple(t.double() for t in svd(matrix.float(), full_matrices=full_matrices))

    return patched


@pytest.mark.parametrize(
    "another", [_flipped, _by_eigenvectors, _scipy_driver, _other_thread_count, _fp32]
)
def test_an_adapter_means_the_same_weights_with_another_decomposition(monkeypatch, another):
    """DESIGN section 5: W' reproduces to 1e-3 of the change, or the adapter is refused."""
    base = torch.nn.Linear(160, 128)
    trained = randomise(SODALinear.from_linear(base, save_factors=False), scale=0.05)
    monkeypatch.setattr(torch.linalg, "svd", another(torch.linalg.svd))
    elsewhere = SODALinear.from_linear(base, save_factors=False)
    change = trained.get_delta_weight()
    try:
        elsewhere.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        # Only round-off of fp32 may be large enough to be refused, and then with the remedy.
        assert another is _fp32 and "save_factors=True" in str(error)
    else:
        assert (elsewhere.get_delta_weight() - change).norm() <= 1e-3 * change.norm()


def test_fp32_round_off_would_not_be_accepted_blindly(monkeypatch):
    """A pair of nearly equal singular values that fp32 mixes is noticed."""
    u, _ = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))
    values = torch.linspace(1, 2, 24, dtype=torch.float64)
    values[1] = values[0] * (1 + 1e-9)
    base = torch.nn.Linear(24, 24, bias=False).double()
    base.weight.data = u @ torch.diag(values) @ v.mT
    trained = randomise(SODALinear.from_linear(base, save_factors=False))
    monkeypatch.setattr(torch.linalg, "svd", _fp32(torch.linalg.svd))
    elsewhere = SODALinear.from_linear(base, save_factors=False)
    with pytest.raises(
        RuntimeError, match=r"factorisation came out differently.*save_factors=True"
    ):
        elsewhere.load_state_dict(trained.state_dict())


def test_bf16_copy_of_the_base_is_refused_with_the_remedy_and_the_remedy_works():
    base = torch.nn.Linear(48, 32)
    narrow = torch.nn.Linear(48, 32, dtype=torch.bfloat16)
    narrow.load_state_dict(base.state_dict())
    trained = randomise(SODALinear.from_linear(narrow, save_factors=False))
    state = trained.state_dict()

    with pytest.raises(RuntimeError, match=r"base_dtype=torch\.bfloat16"):
        SODALinear.from_linear(base, save_factors=False).load_state_dict(state)
    rounded = SODALinear.from_linear(base, save_factors=False, base_dtype=torch.bfloat16)
    rounded.load_state_dict(state)
    assert torch.equal(rounded.get_delta_weight(), trained.get_delta_weight())

    upcast = torch.nn.Linear(48, 32)
    upcast.load_state_dict(narrow.state_dict())
    lossless = SODALinear.from_linear(upcast, save_factors=False)
    lossless.load_state_dict(state)
    assert torch.equal(lossless.get_delta_weight(), trained.get_delta_weight())


def test_another_base_is_refused_and_save_factors_is_the_remedy():
    first, second = torch.nn.Linear(20, 12), torch.nn.Linear(20, 12)
    trained = randomise(SODALinear.from_linear(first, save_factors=False))
    target = SODALinear.from_linear(second, save_factors=False)
    before = [parameter.clone() for parameter in target.parameters()]
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=r"another base weight.*save_factors=True") as caught:
            target.load_state_dict(trained.state_dict(), assign=assign)
        assert "Missing" not in str(caught.value)
        assert all(map(torch.equal, target.parameters(), before))
    trained.save_factors = True
    target.load_state_dict(trained.state_dict())
    x = torch.randn(3, 20)
    trained.bias = target.bias
    assert torch.equal(target(x), trained(x))


def test_degenerate_weights_are_reproduced_or_refused():
    """No unique basis exists for an identity weight; a different choice must be refused."""
    base = torch.nn.Linear(16, 16, bias=False)
    base.weight.data = torch.eye(16)
    trained = randomise(SODALinear.from_linear(base, save_factors=False))
    again = SODALinear.from_linear(base, save_factors=False)
    again.load_state_dict(trained.state_dict())
    assert relative_error(again.merged_weight(), trained.merged_weight()) < 1e-6
    turned, _ = torch.linalg.qr(torch.randn(16, 16))
    again.left.data, again.right.data = turned, turned.mT.contiguous()
    other = Fingerprint.of(base.weight, again.basis)
    assert "save_factors=True" in Fingerprint.of(base.weight, trained.basis).mismatch(other)


def test_fingerprint_round_trips_and_rejects_foreign_tensors():
    weight = torch.randn(6, 5, dtype=torch.bfloat16)
    print_ = Fingerprint.of(weight, decompose(weight, "svd", "left"))
    again = Fingerprint.from_tensor(print_.to_tensor())
    assert again.weight == print_.weight and again.base_dtype == torch.bfloat16
    assert torch.equal(again.basis, print_.basis) and print_.mismatch(again) is None
    for bad in (torch.zeros(3, dtype=torch.uint8), torch.zeros(161), print_.to_tensor() | 0xF0):
        with pytest.raises(ValueError, match="fingerprint must be a uint8 tensor"):
            Fingerprint.from_tensor(bad)


def test_fingerprint_is_pinned():
    """The same numbers on every machine and version: a changed hash would orphan saved adapters."""
    # Of full rank: the basis of a null space depends on the machine.
    weight = torch.arange(12.0).view(3, 4) + 3 * torch.eye(3, 4)
    print_ = Fingerprint.of(weight, decompose(weight, "qr", "left"))
    assert print_.weight == "6abef37143a9618553cf5ecbbc8f23edfe534f429e53c1780b89f1129d4dc235"
    expected = torch.tensor(
        [[0.4486, -2.2688, -0.8950, 0.4486], [-58.0309, 53.2988, -53.2988, 4.3782]]
    )
    torch.testing.assert_close(print_.basis[:, :4], expected, rtol=1e-4, atol=1e-4)


def test_sketch_distance_estimates_the_distance_of_bases():
    weight = torch.randn(64, 48)
    basis = decompose(weight, "svd", "left")
    ratios = []
    for _ in range(50):
        noise = 0.01 * torch.randn_like(basis.left)
        moved = Fingerprint.of(weight, basis._replace(left=basis.left + noise))
        sketched = (moved.basis[0] - Fingerprint.of(weight, basis).basis[0]).square().mean().sqrt()
        ratios.append(float(sketched / noise.norm()))
    assert 0.9 < sum(ratios) / len(ratios) < 1.1
    assert min(ratios) > 0.4 and max(ratios) < 1.7


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3, 3, dtype=torch.int64), "weight must have a floating-point dtype"),
        (torch.tensor([[1.0, float("nan")]]), "weight must be finite"),
        (torch.tensor([[1.0, float("inf")]]), "weight must be finite"),
        (torch.empty(0, 3), "weight must not be empty"),
        (torch.empty(3, 3, device="meta"), "meta device"),
        (torch.zeros(2, 2, 2), "weight must have 2 dimensions"),
    ],
)
def test_bad_weights_are_named(weight, message):
    with pytest.raises(ValueError, match=message):
        decompose(weight, "svd", "left")
