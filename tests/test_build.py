"""The build: what SPECTRAL_BUILD_EXT decides, what the metadata promises, that nvcc compiles."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def build():
    """setup.py as a module; it runs setuptools only as a script."""
    spec = importlib.util.spec_from_file_location("spectral_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def metadata():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "auto"), ("auto", "auto"), ("0", "0"), (" CPU ", "cpu")]
)
def test_parse_request(build, value, expected):
    environ = {} if value is None else {"SPECTRAL_BUILD_EXT": value}
    assert build.parse_request(environ) == expected


@pytest.mark.parametrize("value", ["", "1", "gpu", "cpu,cuda"])
def test_an_unknown_request_is_a_value_error(build, value):
    with pytest.raises(ValueError, match=re.escape(f"auto, 0, cpu, cuda; got '{value}'")):
        build.parse_request({"SPECTRAL_BUILD_EXT": value})


def tools(build, torch="2.13.0", torch_cuda="13.0", compiler="g++", nvcc="13.1"):
    return build.Toolchain(torch=torch, torch_cuda=torch_cuda, compiler=compiler, nvcc=nvcc)


@pytest.mark.parametrize(
    ("missing", "target", "reason"),
    [
        ({}, "cuda", "nvcc is 13.1"),
        ({"torch_cuda": None}, "cpu", "built without CUDA"),
        ({"nvcc": None}, "cpu", "no nvcc was found"),
        ({"nvcc": "12.9"}, "cpu", "built for CUDA 13.0 but nvcc is 12.9"),
        ({"compiler": None}, "none", "no C++ compiler"),
        ({"torch": None}, "none", "install torch first"),
    ],
)
def test_auto_builds_what_it_can_and_says_why(build, missing, target, reason):
    plan = build.plan_build("auto", tools(build, **missing))
    assert plan.target == target
    assert reason in plan.reason


def test_explicit_requests(build):
    nothing = build.Toolchain(None, None, None, None)
    assert build.plan_build("0", nothing).target == "none"
    assert build.plan_build("cpu", tools(build, torch_cuda=None, nvcc=None)).target == "cpu"
    assert build.plan_build("cpu", tools(build)).target == "cpu"
    assert build.plan_build("cuda", tools(build)).target == "cuda"


@pytest.mark.parametrize(
    ("request_", "missing", "reason"),
    [
        ("cpu", {"torch": None}, "install torch first"),
        ("cpu", {"compiler": None}, "no C++ compiler"),
        ("cuda", {"torch": None}, "install torch first"),
        ("cuda", {"torch_cuda": None}, "built without CUDA"),
        ("cuda", {"nvcc": None}, "no nvcc"),
        ("cuda", {"nvcc": "12.9"}, "12.9"),
    ],
)
def test_an_explicit_request_that_cannot_be_met_fails(build, request_, missing, reason):
    with pytest.raises(RuntimeError, match=re.escape(reason)) as caught:
        build.plan_build(request_, tools(build, **missing))
    assert f"SPECTRAL_BUILD_EXT={request_}" in str(caught.value)


def test_without_torch_there_is_no_toolchain(build, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: "/nowhere")
    assert build.find_toolchain() == build.Toolchain(None, None, None, None)


def test_an_isolated_build_sees_the_torch_of_its_environment(build, monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(build.sys, "path", ["first"])
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    build._see_installed_torch()
    assert build.sys.path == ["first", str(tmp_path)]
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: "here already")
    build._see_installed_torch()
    assert build.sys.path == ["first", str(tmp_path)]


def test_architectures(build):
    listing = "compute_75\ncompute_80\ncompute_90\ncompute_100\ncompute_100a\ncompute_120\n"
    known = build.parse_nvcc_architectures(listing)
    assert known == ["7.5", "8.0", "9.0", "10.0", "12.0"]
    assert build.architecture_list(known) == "8.0;9.0;10.0+PTX"
    assert build.architecture_list(["8.0", "8.6"]) == "8.0+PTX"
    with pytest.raises(RuntimeError, match="TORCH_CUDA_ARCH_LIST"):
        build.architecture_list(["12.0"])


def test_setup_names_every_file_of_csrc(build):
    named = {*build.CPU_SOURCES, *build.CUDA_SOURCES, *build.HEADERS}
    assert named == {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}


def test_kernels_have_no_torch_headers():
    kernels = [p.name for p in (ROOT / "csrc").iterdir() if p.suffix in (".cu", ".cuh")]
    headers = ("cayley_cuda.h", "kron_gram_cuda.h", "kron_rotate_cuda.h", "cayley_cpu_kernels.h")
    for name in (*kernels, *headers):
        assert not re.search(r"#include.*(torch|ATen|c10)/", (ROOT / "csrc" / name).read_text())


def test_an_isolated_build_downloads_no_torch(metadata):
    assert not any("torch" in requirement for requirement in metadata["build-system"]["requires"])


def test_constraints_pin_every_dependency(metadata):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    project = metadata["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = {
        re.split(r"[<>=;\[ ]", requirement)[0].lower() for group in groups for requirement in group
    }
    # triton: see the comment in constraints.txt.
    assert wanted - pins == {"triton", "spectral-kernels"}


@pytest.mark.parametrize("request_", ["auto", "cpu"])
def test_a_failed_compilation(build, tmp_path, request_):
    """Under auto the build goes on without the extension; an explicit request fails."""
    pytest.importorskip("torch.utils.cpp_extension")
    if build.find_toolchain().compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "csrc").mkdir()
    for name in build.CPU_SOURCES:
        (tmp_path / name).write_text("#error this file does not compile\n")
    shutil.copy(ROOT / "setup.py", tmp_path)
    environ = {key: value for key, value in os.environ.items() if key != "CUDA_HOME"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext"],
        cwd=tmp_path,
        env={**environ, "SPECTRAL_BUILD_EXT": request_},
        capture_output=True,
        text=True,
        timeout=150,
    )
    if request_ == "cpu":
        assert done.returncode != 0
        return
    assert done.returncode == 0, done.stderr
    assert "the cpu extension did not compile" in done.stderr
    assert "installing without the extension" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


#: Kernels and most registers of each file. Cayley: forward and backward in float and double, 256
#: threads a block, two of which fit on a multiprocessor at 128 registers. Kronecker: a kernel for
#: each tile, and one that adds; up to 128 threads a block, of which two, or three, fit.
KERNELS = {"cayley_cuda": (4, 128), "kron_gram_cuda": (9, 255), "kron_rotate_cuda": (8, 168)}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_cuda_kernels_compile_without_spills(tmp_path, architecture, name):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    number = architecture.removeprefix("sm_")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    if f"compute_{number}\n" not in known.stdout:
        pytest.skip(f"this nvcc does not know {architecture}")
    command = [nvcc, "-c", str(ROOT / "csrc" / f"{name}.cu"), "-o", str(tmp_path / "out.o")]
    command += ["-std=c++20", "-O3", f"-arch={architecture}", "-Xptxas", "-v"]
    command += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", done.stderr)]
    count, most = KERNELS[name]
    assert len(registers) == count and len(spills) == 2 * count
    assert max(registers) <= most
    assert max(spills) == 0
