"""Factorisations are computed once, and nothing that can happen to a file changes a result."""

import copy
import errno
import os
import pickle
import re
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from spectral_adapters import (
    SODAConv2d,
    SODALinear,
    SpectralAdapterALinear,
    SpectralAdapterRLinear,
    SVDiffLinear,
    _processes,
    cli,
    decomposition,
    spectra,
)
from spectral_adapters.decomposition import (
    ColumnFactorisation,
    Fingerprint,
    RandomFactorisation,
    WholeFactorisation,
    decompose,
    decompose_columns,
    triple_errors,
)

SVD = WholeFactorisation("svd")
#: Large enough to be worth a file.
N = 128


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache of one GB for the test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(spectra.LIMIT_VARIABLE, "1e9")
    return spectra.cache_folder()


@pytest.fixture
def one_thread():
    """As other processes have: the last bits of a factorisation depend on the number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def computed(monkeypatch):
    """What was really decomposed: a list of shapes."""
    shapes = []
    for name in ("svd", "qr", "eigh"):
        original = getattr(torch.linalg, name)

        def counting(matrix, *args, _original=original, **kwargs):
            shapes.append(tuple(matrix.shape))
            return _original(matrix, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, counting)
    return shapes


def weight(seed=0, rows=N, columns=N, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def assert_same(first, second):
    """To the last bit, fingerprints included."""
    for mine, theirs in zip(first.basis, second.basis, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    assert torch.equal(first.fingerprint.to_tensor(), second.fingerprint.to_tensor())


def identify(matrix, factorisation):
    """What names a factorisation, and where it is kept."""
    return spectra._look_up(matrix, factorisation)[0]


def set_last_use(path, seconds):
    for file in (path, path.with_suffix(".checked")):
        os.utime(file, (seconds, seconds))


def only_file(folder):
    (path,) = folder.glob("*.safetensors")
    return path


# ---- hits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "factorisation",
    [
        SVD,
        WholeFactorisation("svd", "base"),
        WholeFactorisation("qr"),
        WholeFactorisation("lq", "base"),
        ColumnFactorisation(tuple(range(60)), "full"),
        ColumnFactorisation((1, 0, 127)),
    ],
    ids=str,
)
def test_a_hit_is_the_same_to_the_last_bit(cache, computed, factorisation, dtype, monkeypatch):
    monkeypatch.setattr(spectra, "_SMALLEST", 1)
    matrix = weight(rows=131, columns=129, dtype=dtype)
    basis = factorisation(matrix)
    expected = spectra.Decomposed(basis, Fingerprint.of(matrix, basis))
    assert_same(spectra.factorise(matrix, factorisation), expected)
    computed.clear()
    assert_same(spectra.factorise(matrix, factorisation), expected)
    assert not computed
    only_file(cache)


def test_whatever_determines_the_result_is_part_of_the_key(cache, computed):
    matrix = weight()
    half = matrix.bfloat16()
    changed = matrix.clone()
    changed[3, 4] = changed[3, 4].nextafter(torch.tensor(9.0))
    requests = [
        (matrix, SVD),
        (matrix, WholeFactorisation("svd", "base")),
        (matrix, WholeFactorisation("qr")),
        (matrix, WholeFactorisation("lq")),
        (matrix, ColumnFactorisation(tuple(range(60)))),
        (matrix, ColumnFactorisation(tuple(range(61)))),
        (matrix, ColumnFactorisation(tuple(range(60)), "full")),
        (matrix, ColumnFactorisation(tuple(range(59, -1, -1)))),
        (half, SVD),
        (half, WholeFactorisation("svd", "base")),
        (half.float(), SVD),
        (matrix.half(), SVD),
        (matrix.double(), SVD),
        (changed, SVD),
        (matrix.mT, SVD),
        (matrix.view(64, 256), SVD),
        (-matrix, SVD),
    ]
    names = [identify(*request) for request in requests]
    assert len({name.key for name in names}) == len({name.path for name in names}) == len(requests)
    for request in requests:
        computed.clear()
        spectra.factorise(*request)
        assert computed
    assert len(list(cache.glob("*.safetensors"))) == len(requests)


def test_the_code_s_version_is_part_of_the_key(monkeypatch):
    before = identify(weight(), SVD)
    monkeypatch.setattr(spectra, "VERSION", spectra.VERSION + 1)
    after = identify(weight(), SVD)
    assert after.key != before.key and after.path != before.path


def test_layout_does_not_matter_but_values_do(computed):
    matrix = weight()
    spectra.factorise(matrix, SVD)
    computed.clear()
    spectra.factorise(matrix.mT.contiguous().mT, SVD)
    spectra.factorise(torch.nn.Parameter(matrix.clone()), SVD)
    assert not computed


def test_half_precision_is_recognised_as_its_wider_copy():
    """What is hashed for the file's name is not what adapters remember."""
    half = weight(dtype=torch.bfloat16)
    for _ in range(2):
        found = spectra.factorise(half, SVD).fingerprint
        assert found.weight == Fingerprint.of(half.float(), SVD(half)).weight
        assert found.base_dtype == torch.bfloat16


def test_a_weight_is_hashed_once(monkeypatch):
    hashed = []
    original = spectra.hash_values
    for module in (spectra, decomposition):
        monkeypatch.setattr(
            module, "hash_values", lambda *args: hashed.append(args) or original(*args)
        )
    spectra.factorise(weight(), SVD)
    assert len(hashed) == 1
    spectra.factorise(weight(), SVD)
    assert len(hashed) == 1


def test_names_are_keyed(cache, computed, monkeypatch, tmp_path):
    """Nobody can make a weight that is taken for another: that needs the cache's own key."""
    spectra.factorise(weight(), SVD)
    path, key = only_file(cache), identify(weight(), SVD).key
    assert path == identify(weight(), SVD).path
    assert stat.S_IMODE((cache / "secret").stat().st_mode) == 0o600
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    other = identify(weight(), SVD)
    assert other.path.name != path.name
    # What processes of a job tell each other does not depend on their caches.
    assert other.key == key
    spectra.cache_folder().mkdir(parents=True, exist_ok=True)
    os.replace(path, other.path)
    with pytest.warns(RuntimeWarning, match="cannot be used"):
        spectra.factorise(weight(), SVD)


@pytest.mark.parametrize("secret", [b"", b"no number", b"\xff\xfe"])
def test_a_damaged_key_is_replaced(cache, computed, secret):
    spectra.factorise(weight(), SVD)
    (cache / "secret").write_bytes(secret)
    spectra.factorise(weight(), SVD)
    computed.clear()
    spectra.factorise(weight(), SVD)
    assert not computed


def test_every_stand_alone_layer_is_made_from_the_cache(computed):
    linear, conv = nn.Linear(N, N), nn.Conv2d(16, N, 3)
    options = {"columns": list(range(60))}

    def make():
        return [
            SODALinear.from_linear(linear),
            SODALinear.from_linear(linear, decomposition="qr"),
            SODALinear.from_linear(linear, decomposition="qr", rotation="right"),
            SVDiffLinear.from_linear(linear),
            SODAConv2d.from_conv2d(conv),
            SpectralAdapterALinear.from_linear(linear, **options),
            SpectralAdapterRLinear.from_linear(linear, **options),
        ]

    first = make()
    computed.clear()
    second = make()
    assert not computed
    for before, after in zip(first, second, strict=True):
        theirs = after.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in before.state_dict().items())


def test_factors_of_the_cache_do_all_that_tensors_do(cache):
    base = nn.Linear(N, N, dtype=torch.bfloat16)
    SODALinear.from_linear(base, basis_dtype="base")
    before = only_file(cache).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = SODALinear.from_linear(base, basis_dtype="base")
        assert layer.left.untyped_storage().nbytes() == layer.left.nbytes
        x = torch.randn(3, N, dtype=torch.bfloat16)
        expected = layer(x)
        twin = copy.deepcopy(layer)
        again = pickle.loads(pickle.dumps(layer))
        wide = copy.deepcopy(layer).to(torch.float64)
        assert wide.left.dtype == torch.float64
        moved = copy.deepcopy(layer).to("meta")
        assert moved.left.is_meta
        for other in (twin, again):
            assert torch.equal(other(x), expected)
            assert other.left.data_ptr() != layer.left.data_ptr()
        layer(x).sum().backward()
        assert layer.delta.grad is not None
        # Loading writes into the frozen parameters: into this process's memory, not into the file.
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        state["left"] += 1
        layer.load_state_dict(state)
        assert torch.equal(layer.left, state["left"])
    assert only_file(cache).read_bytes() == before
    assert torch.equal(SODALinear.from_linear(base, basis_dtype="base").left, twin.left)


@pytest.mark.parametrize("times", [1, 2], ids=["computed", "read"])
def test_made_in_inference_mode_for_training_later(times):
    with torch.inference_mode():
        base = nn.Linear(N, N)
    for _ in range(times):
        with torch.inference_mode():
            found = spectra.factorise(base.weight, SVD)
    assert not any(factor.is_inference() for factor in found.basis)


def test_fingerprints_without_a_weight_do_not_depend_on_the_default_dtype():
    factorisation, weight = RandomFactorisation(4, 3), torch.randn(6, 5)
    expected = spectra.factorise(weight, factorisation).fingerprint.to_tensor()
    torch.set_default_dtype(torch.float64)
    try:
        found = spectra.factorise(weight, factorisation).fingerprint.to_tensor()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_entries_that_are_in_use_can_be_removed(cache):
    spectra.factorise(weight(), SVD)
    found = spectra.factorise(weight(), SVD)
    expected = [factor.clone() for factor in found.basis]
    assert spectra.clear_cache() and not spectra.cache_entries()
    assert all(torch.equal(*pair) for pair in zip(found.basis, expected, strict=True))


def test_small_matrices_and_seeds_are_not_worth_a_file(cache):
    spectra.factorise(weight(rows=32, columns=32), SVD)
    spectra.factorise(weight(), RandomFactorisation(100, 100))
    assert not cache.exists()


def test_bad_weights_are_refused_as_without_a_cache(cache):
    bad = weight()
    bad[0, 0] = torch.nan
    for matrix, message in (
        (bad, "weight must be finite"),
        (torch.empty(N, N, device="meta"), "meta device"),
        (torch.empty(0, N), "weight must not be empty"),
        (torch.ones(N, N, dtype=torch.int64), "floating-point dtype"),
        (torch.ones(2, 2, 2), "2 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            spectra.factorise(matrix, SVD)
        with pytest.raises(ValueError, match=message):
            spectra.factorise_all([spectra.Request(lambda matrix=matrix: matrix, SVD)])
    assert not spectra.cache_entries()


# ---- files that are not as they were


def _truncated(path):
    os.truncate(path, path.stat().st_size - 100)


def _header_only(path):
    os.truncate(path, 200)


def _emptied(path):
    os.truncate(path, 0)


def _one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _zeroed_page(path):
    data = bytearray(path.read_bytes())
    data[8192:12288] = bytes(4096)
    path.write_bytes(data)


def _text(path):
    path.write_text("no safetensors")


def _without_metadata(path):
    save_file(load_file(path), path)


def _other_fingerprint(path):
    factors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["fingerprint"] = metadata["fingerprint"][:-1] + "f"
    save_file(factors, path, metadata)


def _other_dtype(path):
    factors = {name: factor.double() for name, factor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        save_file(factors, path, file.metadata())


def _of_another_weight(path):
    spectra.factorise(weight(seed=1), SVD)
    other = identify(weight(seed=1), SVD).path
    os.replace(other, path)


@pytest.mark.parametrize(
    "damage",
    [
        _truncated,
        _header_only,
        _emptied,
        _one_bit,
        _zeroed_page,
        _text,
        _without_metadata,
        _other_fingerprint,
        _other_dtype,
        _of_another_weight,
    ],
)
def test_a_damaged_file_is_not_used_and_replaced(cache, computed, damage):
    expected = spectra.factorise(weight(), SVD)
    path = only_file(cache)
    damage(path)
    computed.clear()
    with pytest.warns(RuntimeWarning, match=rf"{path.name} cannot be used, the weight is decomp"):
        assert_same(spectra.factorise(weight(), SVD), expected)
    assert computed
    computed.clear()
    assert_same(spectra.factorise(weight(), SVD), expected)
    assert not computed


def test_what_is_noted_as_whole_is_not_read_again(cache, monkeypatch):
    """Neither by the process that wrote it nor later; whatever happens to the file undoes that."""
    checked = []
    original = spectra._seal
    monkeypatch.setattr(
        spectra, "_seal", lambda path, *args: checked.append(path) or original(path, *args)
    )
    expected = spectra.factorise(weight(), SVD)
    path = only_file(cache)
    checked.clear()
    for _ in range(2):
        assert_same(spectra.factorise(weight(), SVD), expected)
    assert not checked
    os.utime(path)  # as any other change does, if only of its times
    for _ in range(3):
        assert_same(spectra.factorise(weight(), SVD), expected)
    assert checked == [path]
    path.with_suffix(".checked").write_bytes(b"\xff")
    for _ in range(3):
        assert_same(spectra.factorise(weight(), SVD), expected)
    assert checked == [path] * 2
    assert spectra.clear_cache() and [file.name for file in cache.iterdir()] == ["secret"]


def test_notes_on_nothing_are_swept(cache):
    spectra.factorise(weight(), SVD)
    only_file(cache).unlink()
    spectra.factorise(weight(seed=1), SVD)
    assert [note.stem for note in cache.glob("*.checked")] == [only_file(cache).stem]


def test_a_damaged_file_is_mentioned_once(cache):
    requests = [spectra.Request(lambda: weight(), SVD)]
    spectra.factorise_all(requests)
    _one_bit(only_file(cache))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spectra.factorise_all(requests)
    assert len(caught) == 1


def test_a_folder_in_place_of_a_file(cache):
    identify(weight(), SVD).path.mkdir(parents=True)
    with pytest.warns(RuntimeWarning):
        spectra.factorise(weight(), SVD)


# ---- where nothing can be written


def _expect_no_cache(cache, match):
    with pytest.warns(RuntimeWarning, match=f"not kept in {re.escape(str(cache))}.*: {match}"):
        found = spectra.factorise(weight(), SVD)
    torch.testing.assert_close((found.basis[0] * found.basis[1]) @ found.basis[2], weight())
    assert not spectra.cache_entries() and not list(cache.glob("*.tmp"))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_costs_a_warning(cache, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    _expect_no_cache(cache, "No space left on device")


def test_a_file_size_limit_costs_a_warning(cache):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        _expect_no_cache(cache, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_folder_that_cannot_be_made_costs_a_warning(cache):
    cache.parent.parent.write_text("a file where the folder of caches should be")
    _expect_no_cache(cache, "Not a directory|File exists")


def test_a_read_only_folder_costs_a_warning(cache, monkeypatch):
    with tempfile.TemporaryDirectory() as root:
        monkeypatch.setenv("XDG_CACHE_HOME", root)
        cache = spectra.cache_folder()
        cache.mkdir(parents=True)
        for folder in (root, cache.parent, cache):
            os.chmod(folder, 0o555)
        user = os.geteuid()
        # Permissions do not hold for root.
        os.seteuid(user or 65534)
        try:
            _expect_no_cache(cache, "Permission denied")
        finally:
            os.seteuid(user)
            for folder in (root, cache.parent, cache):
                os.chmod(folder, 0o755)


def test_a_read_only_cache_is_read(cache, computed, monkeypatch):
    spectra.factorise(weight(), SVD)
    computed.clear()

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectra.factorise(weight(), SVD)
    assert not computed


# ---- several at once


WRITER = """
import sys, torch
from spectral_adapters import spectra
from spectral_adapters.decomposition import WholeFactorisation
torch.set_num_threads(1)
spectra.factorise(torch.eye(128) + torch.arange(128.), WholeFactorisation("qr"))
identity, _ = spectra._look_up(torch.eye(256), WholeFactorisation("qr"))
made = spectra.factorise(torch.eye(256), WholeFactorisation("qr"))
print("ready", flush=True)
while True:
    spectra._keep(identity, made, 0.0)
"""


def test_killed_while_writing(cache, one_thread):
    """At any moment the entry is whole, and what is left over does no harm."""
    command = [sys.executable, "-c", WRITER]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    factorisation = WholeFactorisation("qr")
    expected = []
    for matrix in (torch.eye(256), torch.eye(128) + torch.arange(128.0)):
        basis = factorisation(matrix)
        whole = spectra.Decomposed(basis, Fingerprint.of(matrix, basis))
        expected.append((identify(matrix, factorisation), whole))
    for writer, delay in zip(writers, (0.0, 0.003, 0.007, 0.013), strict=True):
        time.sleep(delay)
        writer.kill()
        writer.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for identity, whole in expected:
                assert_same(spectra._read(identity.path).decomposed, whole)
    for left_over in cache.glob("*.tmp"):
        os.utime(left_over, (0, 0))
    spectra.factorise(weight(), SVD)
    assert not list(cache.glob("*.tmp"))


def test_concurrent_writers_and_readers(cache):
    expected = SVD(weight())
    with ThreadPoolExecutor(8) as pool, warnings.catch_warnings():
        warnings.simplefilter("error")
        identity = identify(weight(), SVD)
        made = spectra.factorise(weight(), SVD)
        jobs = [pool.submit(spectra._keep, identity, made, 0.0) for _ in range(40)]
        jobs += [pool.submit(spectra.factorise, weight(), SVD) for _ in range(40)]
        for job in jobs:
            found = job.result()
            assert found is None or torch.equal(found.basis.left, expected.left)
    only_file(cache)
    assert not list(cache.glob("*.tmp"))


# ---- size


def test_least_recently_used_entries_make_room(cache, monkeypatch):
    paths = [identify(weight(seed), SVD).path for seed in range(4)]
    for seed in range(3):
        spectra.factorise(weight(seed), SVD)
        set_last_use(paths[seed], 1000 + seed)
    size = paths[0].stat().st_size
    spectra.factorise(weight(0), SVD)  # now the last one used
    spectra.set_cache_limit(3 * size + 100)
    try:
        spectra.factorise(weight(3), SVD)
    finally:
        spectra.set_cache_limit(None)
    left = [entry.path for entry in spectra.cache_entries()]
    assert left == [paths[seed] for seed in (2, 0, 3)]


def test_a_model_that_does_not_fit_keeps_what_fits(cache, computed):
    """Plain least-recently-used would find nothing the next time."""
    spectra.factorise(weight(0), SVD)
    size = only_file(cache).stat().st_size
    set_last_use(only_file(cache), 1000)
    requests = [spectra.Request(lambda seed=seed: weight(seed), SVD) for seed in range(1, 6)]
    spectra.set_cache_limit(3 * size + 100)
    try:
        with pytest.warns(RuntimeWarning, match=f"limit of .* GB.*set {spectra.LIMIT_VARIABLE}"):
            spectra.factorise_all(requests)
        assert len(spectra.cache_entries()) == 3
        computed.clear()
        with pytest.warns(RuntimeWarning, match="not kept"):
            spectra.factorise_all(requests)
        assert len(computed) == 2
    finally:
        spectra.set_cache_limit(None)


def test_half_of_a_small_disk_is_left_alone(cache, monkeypatch):
    usage = spectra.shutil.disk_usage("/")
    monkeypatch.setattr(spectra.shutil, "disk_usage", lambda _: usage._replace(free=200_000))
    _expect_no_cache(cache, r"the limit of 0.0001 GB is reached")


@pytest.mark.parametrize("how", ["variable", "function"])
def test_switched_off(cache, computed, monkeypatch, how):
    spectra.factorise(weight(), SVD)
    computed.clear()
    before = only_file(cache).stat()
    if how == "variable":
        monkeypatch.setenv(spectra.LIMIT_VARIABLE, "0")
    else:
        spectra.set_cache_limit(0)
    try:
        spectra.factorise(weight(), SVD)
        spectra.factorise(weight(1), SVD)
    finally:
        spectra.set_cache_limit(None)
    assert len(computed) == 2
    assert only_file(cache).stat() == before


def test_limits_are_checked(monkeypatch):
    monkeypatch.setenv(spectra.LIMIT_VARIABLE, "2.5e9")
    assert spectra.cache_limit() == 2_500_000_000
    monkeypatch.delenv(spectra.LIMIT_VARIABLE)
    assert spectra.cache_limit() == spectra.DEFAULT_LIMIT
    for bad in ("lots", "-1", "nan", "inf"):
        monkeypatch.setenv(spectra.LIMIT_VARIABLE, bad)
        with pytest.raises(ValueError, match=f"{spectra.LIMIT_VARIABLE} must be a number of bytes"):
            spectra.factorise(weight(), SVD)
    for bad in (-1, 1.5, True, "1e9"):
        with pytest.raises(ValueError, match="limit must be None or an int of at least 0"):
            spectra.set_cache_limit(bad)
    with pytest.raises(ValueError, match="unused_days must be at least 0"):
        spectra.clear_cache(-1)


def test_the_default_place(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somebody")
    assert str(spectra.cache_folder()) == "/somebody/.cache/spectral-kernels/spectra"


# ---- the command line


def test_the_command_line_lists_and_clears(cache, capsys):
    assert cli.main(["cache"]) == 0
    assert capsys.readouterr().out == f"0 entries, 0 GB, of 1 GB in {cache}\n"
    spectra.factorise(weight(dtype=torch.bfloat16), WholeFactorisation("svd", "base"))
    spectra.factorise(weight(rows=200), SVD)
    old = identify(weight(rows=200), SVD).path
    set_last_use(old, 86400)
    (cache / "damaged.safetensors").write_text("no")
    assert cli.main(["cache", "list"]) == 0
    first, second, third, total = capsys.readouterr().out.splitlines()
    assert first.startswith("1970-01-0") and "float32 [200, 128]" in first and "MB" in first
    assert "bfloat16 [128, 128]" in second and "basis_dtype='base'" in second
    assert third.endswith("damaged")
    assert total.startswith("3 entries, 0.000") and total.endswith(f"of 1 GB in {cache}")

    assert cli.main(["cache", "clear", "--older-than", "30"]) == 0
    assert capsys.readouterr().out.startswith("removed: 1 entry, 0.000")
    assert not old.exists() and len(spectra.cache_entries()) == 2
    assert cli.main(["cache", "clear"]) == 0
    assert not spectra.cache_entries()


def test_the_command_line_names_what_is_wrong(monkeypatch, capsys):
    assert cli.main(["cache", "--older-than", "3"]) == 2
    assert "--older-than is for cache clear" in capsys.readouterr().err
    assert cli.main(["cache", "clear", "--older-than", "-3"]) == 2
    assert "--older-than: unused_days must be at least 0; got -3" in capsys.readouterr().err
    monkeypatch.setenv(spectra.LIMIT_VARIABLE, "much")
    assert cli.main(["cache"]) == 2
    assert spectra.LIMIT_VARIABLE in capsys.readouterr().err


# ---- many weights


def test_equal_weights_are_decomposed_once_and_share_the_result(computed):
    requests = [spectra.Request(lambda seed=seed: weight(seed), SVD) for seed in (0, 1, 0, 1, 0)]
    requests.append(spectra.Request(lambda: weight(0), WholeFactorisation("qr")))
    spectra.set_cache_limit(0)
    try:
        found = spectra.factorise_all(requests)
    finally:
        spectra.set_cache_limit(None)
    assert len(computed) == 3
    assert found[0].basis.left is found[2].basis.left is found[4].basis.left
    for request, result in zip(requests, found, strict=True):
        assert torch.equal(result.basis.left, request.factorisation(request.weight()).left)


def test_threads_are_given_back_and_do_not_change_results():
    threads = torch.get_num_threads()
    requests = [spectra.Request(lambda seed=seed: weight(seed), SVD) for seed in range(6)]
    seen = set()

    def watched(seed):
        seen.add(threading.get_ident())
        return weight(seed)

    requests += [spectra.Request(lambda: watched(7), RandomFactorisation(3, 3))]
    torch.set_num_threads(3)
    try:
        several = spectra.factorise_all(requests)
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
        assert threading.get_ident() not in seen or len(seen) > 1
        torch.set_num_threads(1)
        spectra.clear_cache()
        for mine, theirs in zip(several, spectra.factorise_all(requests), strict=True):
            assert_same(mine, theirs)
    finally:
        torch.set_num_threads(threads)


def test_not_all_weights_are_held_at_once(monkeypatch):
    """A quantised model must not be dequantised as a whole; what is not held is asked for again."""
    monkeypatch.setattr(spectra, "_HELD_WEIGHTS", 3 * N * N * 4)
    asked = []
    requests = [
        spectra.Request(lambda seed=seed: asked.append(seed) or weight(seed), SVD)
        for seed in range(5)
    ]
    spectra.factorise_all(requests)
    assert sorted(asked) == [0, 1, 2, 3, 3, 4, 4]


class Bar:
    def __init__(self, total):
        self.total, self.done, self.closed = total, 0, False

    def update(self, n):
        self.done += n

    def close(self):
        self.closed = True


def test_progress_is_shown_for_what_is_decomposed():
    bars = []

    def progress(total):
        bars.append(Bar(total))
        return bars[-1]

    requests = [spectra.Request(lambda seed=seed: weight(seed), SVD) for seed in (0, 1, 0)]
    for _ in range(2):
        spectra.factorise_all(requests, progress=progress)
    assert [(bar.total, bar.done, bar.closed) for bar in bars] == [(2, 2, True)]

    bad = spectra.Request(lambda: torch.full((N, N), torch.inf), SVD)
    with pytest.raises(ValueError, match="finite"):
        spectra.factorise_all([bad], progress=progress)
    assert bars[-1].closed


# ---- PEFT


def adapted(config="SODAConfig", layers=3, **options):
    peft = pytest.importorskip("peft")
    import spectral_adapters.peft as ours

    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(N, N) for _ in range(layers)])
    model[1].weight.data.copy_(model[0].weight)
    targets = [str(number) for number in range(layers)]
    return peft.inject_adapter_in_model(
        getattr(ours, config)(target_modules=targets, **options), model
    )


def factors(model):
    return [layer._factors["default"] for layer in model]


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("SODAConfig", {}),
        ("SODAConfig", {"decomposition": "qr", "rotation": "right"}),
        ("SVDiffConfig", {}),
        ("SpectralAdapterAConfig", {"r": 60}),
        ("SpectralAdapterRConfig", {"r": 60, "algorithm": "full"}),
    ],
)
def test_a_model_is_adapted_from_the_cache(computed, config, options):
    first = adapted(config, **options)
    assert [frozen.is_exact for frozen in factors(first)] == [True] * 3
    assert factors(first)[0].basis.left is factors(first)[1].basis.left
    computed.clear()
    second = adapted(config, **options)
    assert not computed
    theirs = second.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in first.state_dict().items())
    for mine, other in zip(factors(first), factors(second), strict=True):
        assert_same(
            spectra.Decomposed(mine.basis, mine.fingerprint),
            spectra.Decomposed(other.basis, other.fingerprint),
        )
        assert other.is_exact


def test_factors_of_the_cache_follow_an_adapted_model():
    adapted(basis_dtype="float32")
    model = adapted(basis_dtype="float32")
    x = torch.randn(2, N)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        twin.to(torch.bfloat16)
        assert factors(twin)[0].basis.left.dtype == torch.float32


def test_an_adapter_made_in_inference_mode_can_be_trained():
    ours = pytest.importorskip("spectral_adapters.peft")
    layer = nn.Linear(N, N)
    for _ in range(2):
        frozen = ours._factors.FrozenFactors((N, N), SVD, torch.float32, in_checkpoint=False)
        with torch.inference_mode():
            frozen.compute(layer.weight.detach())
        assert not frozen.basis.left.is_inference()


def test_the_bar_of_an_adapted_model(monkeypatch, capsys):
    pytest.importorskip("peft")
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    from spectral_adapters.peft import _layer

    enable_progress_bars()  # whatever another test left
    adapted()
    assert capsys.readouterr().err == ""  # no terminal

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = _layer._progress_bar(3)
    time.sleep(0.02)
    bar.update(1)
    assert capsys.readouterr().err == ""  # not yet a second
    bar.start_t -= 2
    bar.update(1)
    bar.refresh()
    bar.close()
    assert "Decomposing weights" in capsys.readouterr().err
    disable_progress_bars()
    try:
        assert _layer._progress_bar(3).disable
    finally:
        enable_progress_bars()


# ---- several processes


def test_shares_are_balanced_by_cost_and_what_is_held_is_sent():
    costs = {"big": 8.0, "a": 3.0, "b": 3.0, "c": 2.0}
    owners = _processes.assign([costs, costs], [[], []])
    assert owners == {"big": 0, "a": 1, "b": 1, "c": 1}
    owners = _processes.assign([{"x": 1.0, "y": 1.0}, {"z": 5.0}, {}], [["z"], [], ["y"]])
    assert owners == {"z": 0, "x": 0, "y": 2}


JOB = """
import os, sys, warnings
import peft, torch, torch.distributed as dist
import spectral_adapters.peft as ours
from spectral_adapters import _processes, spectra
from spectral_adapters.decomposition import WholeFactorisation

rank, folder = int(os.environ["RANK"]), sys.argv[1]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
made = []
provide = spectra._provide
spectra._provide = lambda *args: made.append(args[2].key) or provide(*args)

def model(seed, sizes=(64, 96, 64, 128, 64)):
    torch.manual_seed(seed)
    return torch.nn.Sequential(*[torch.nn.Linear(n, n) for n in sizes])

def adapt(model):
    config = ours.SODAConfig(target_modules=[str(i) for i in range(len(model))])
    model = peft.inject_adapter_in_model(config, model)
    return [layer._factors["default"].basis._asdict() for layer in model]

def same():
    return adapt(model(0))

def different():
    return adapt(model(rank, (64, 96 + rank)))

def alone():
    "The first process adapts something by itself, then both adapt the same."
    _processes.PATIENCE = 0.5
    if rank == 0:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapt(model(5))
        assert any("process 0 decomposes its 5 matrices alone" in str(w.message) for w in caught)
    dist.barrier()
    _processes.PATIENCE = 30.0
    made.clear()
    return adapt(model(0))

def broken():
    broken = model(0)
    broken[3].weight.data[0, 0] = torch.nan
    try:
        adapt(broken)
    except ValueError as refused:
        return str(refused)

def held():
    if rank == 1:
        os.environ["SPECTRAL_KERNELS_CACHE_LIMIT"] = "1e9"
        spectra.factorise(model(0)[3].weight, WholeFactorisation("svd", "base"))
        made.clear()
    return adapt(model(0))

for scene in (same, different, alone, broken, held):
    dist.barrier()
    made.clear()
    result = scene()
    torch.save((list(made), result), f"{folder}/{scene.__name__}-{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """What each of two processes without a cache decomposed in a scene, and what it got."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("job")
    settings = {spectra.LIMIT_VARIABLE: "0", "XDG_CACHE_HOME": str(folder)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, str(folder)],
            env={**os.environ, **settings, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], said
    return lambda scene: [torch.load(folder / f"{scene}-{rank}.pt") for rank in range(2)]


def equal_factors(first, second):
    return all(
        torch.equal(mine[name], theirs[name])
        for mine, theirs in zip(first, second, strict=True)
        for name in mine
    )


def test_two_processes_share_the_work(job, one_thread):
    (first, mine), (second, theirs) = job("same")
    assert len(first) + len(second) == 5 and not set(first) & set(second)
    assert first and second
    assert equal_factors(mine, theirs)
    torch.manual_seed(0)
    for size, found in zip((64, 96, 64, 128, 64), mine, strict=True):
        expected = decompose(nn.Linear(size, size).weight, "svd", None)
        assert torch.equal(found["left"], expected.left)


def test_two_processes_with_different_weights_do_not_wait_for_each_other(job):
    (first, mine), (second, theirs) = job("different")
    assert (len(first), len(second)) == (2, 2)
    assert mine[1]["left"].shape == (96, 96) and theirs[1]["left"].shape == (97, 97)


def test_a_process_that_adapts_alone_is_not_stuck_and_they_find_each_other_again(job):
    (first, mine), (second, theirs) = job("alone")
    assert len(first) + len(second) == 5 and not set(first) & set(second)
    assert equal_factors(mine, theirs)


def test_a_weight_that_cannot_be_decomposed_is_an_error_in_both(job):
    (_, mine), (_, theirs) = job("broken")
    assert mine == theirs == "weight must be finite; got NaN or infinity"


def test_what_one_process_has_cached_it_sends(job):
    (first, mine), (second, theirs) = job("held")
    assert len(first) + len(second) == 4
    assert equal_factors(mine, theirs)


# ---- accuracy


def with_spectrum(values, rows, columns):
    generator = torch.Generator().manual_seed(1)
    k = len(values)
    left = torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, k, generator=generator, dtype=torch.float64)).Q
    return left * values @ right.mT


@pytest.mark.parametrize("decay", [0.0, 1.0], ids=["flat", "falling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stated_errors_of_randomized_triples_hold(decay, dtype):
    values = 1 / torch.arange(1, 201, dtype=torch.float64) ** decay
    values = values * torch.linspace(1, 0.5, 200, dtype=torch.float64)
    matrix = with_spectrum(values, 240, 200).to(dtype)
    basis = decompose_columns(matrix, range(12))
    errors = triple_errors(matrix, basis)
    left, true, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert errors.shape == (12,) and errors.dtype == torch.float64
    distance = (basis.singular_values.double()[:, None] - true).abs()
    assert (distance.amin(dim=1) <= errors).all()
    if decay:
        assert (errors <= 3e-5).all()
    for i in range(12):
        gap = distance[i].sort().values[1]
        found = torch.cat([basis.left[:, i], basis.right[i]]).double()
        nearest = torch.cat([left, right.mT])[:, distance[i].argmin()]
        sine = (found - found @ nearest / 2 * nearest).norm() / found.norm()
        assert sine <= errors[i] / gap + 1e-6
    if not decay:
        assert errors.max() > 1e-3 * true[0]  # a flat spectrum is hard, and the bound says so


def test_stated_errors_grow_with_the_error():
    matrix = with_spectrum(torch.linspace(1, 2, 30, dtype=torch.float64), 40, 30)
    basis = decompose(matrix, "svd", None)
    assert triple_errors(matrix, basis).max() <= 1e-13
    off = basis._replace(singular_values=basis.singular_values + 0.01)
    torch.testing.assert_close(
        triple_errors(matrix, off), torch.full((30,), 0.01, dtype=torch.float64), rtol=1e-9, atol=0
    )
    with pytest.raises(
        ValueError, match=r"basis must hold singular triples of a weight \(40, 29\)"
    ):
        triple_errors(matrix[:, 1:], basis)
    with pytest.raises(ValueError, match="no singular values"):
        triple_errors(matrix, decompose(matrix, "qr", "left"))


@pytest.mark.parametrize("shape", [(256, 256), (300, 260), (260, 300)])
@pytest.mark.parametrize(
    ("condition", "by_gram"), [(10.0, True), (1e3, True), (1e6, False)], ids=str
)
def test_the_gram_matrix_is_used_where_it_is_exact(computed, shape, condition, by_gram):
    """Less time, and no vector that differs by more than the rounding to fp32."""
    k = min(shape)
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), k, dtype=torch.float64)
    matrix = with_spectrum(values, *shape).float()
    computed.clear()
    left, found, right = decomposition._svd(matrix.double(), matrix.dtype)
    assert len(computed) == (1 if by_gram else 2)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    signs = torch.sign((left * u).sum(dim=0))
    assert (left * signs - u).norm(dim=0).max() <= 2**-24
    assert (right * signs[:, None] - v).norm(dim=1).max() <= 2**-24
    torch.testing.assert_close(found, s, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["float64", "small", "singular", "repeated"])
def test_the_gram_matrix_is_not_used_where_it_is_not(computed, kind):
    matrix = with_spectrum(torch.linspace(1, 2, 256, dtype=torch.float64), 256, 300).float()
    if kind == "float64":
        matrix = matrix.double()
    elif kind == "small":
        matrix = matrix[:255]
    elif kind == "singular":
        matrix[0] = matrix[1]
    else:
        matrix = torch.eye(256, 300)
    computed.clear()
    left, values, right = decomposition._svd(matrix.double(), matrix.dtype)
    assert computed[-1] == matrix.shape
    torch.testing.assert_close(left * values @ right, matrix.double(), rtol=0, atol=1e-12)
