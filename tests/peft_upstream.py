"""Write ``docs/peft_upstream.md``: PEFT's own test suite, run on the methods of this project.

    python tests/peft_upstream.py [FOLDER]

FOLDER is an unpacked source distribution of the installed PEFT; pip downloads one otherwise. None
of PEFT's code is kept: its tests are copied to a temporary folder, and this file is loaded there as
a pytest plug-in. Where PEFT parametrizes a test over methods, every LoRA row becomes a row of each
of our methods; where a test makes a ``LoraConfig`` itself, it gets a config of ours in its place.
Models of the Hub are replaced by small ones of the same architecture with random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig

from spectral_adapters.peft import (
    LiDBConfig,
    SODAConfig,
    SpectralAdapterAConfig,
    SpectralAdapterRConfig,
    SVDiffConfig,
)

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs" / "peft_upstream.md"

METHODS: dict[str, type[PeftConfig]] = {
    "SODA": SODAConfig,
    "SVDiff": SVDiffConfig,
    "Spectral Adapter A": SpectralAdapterAConfig,
    "Spectral Adapter R": SpectralAdapterRConfig,
    "LiDB": LiDBConfig,
}
MODULES = (
    "test_config",
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_stablediffusion",
    "test_low_level_api",
)

#: Rows of the table of custom models beyond those of LoRA: other layers, and options of our own.
LAYERS: dict[str, list[str]] = {
    "Conv1dBigger": ["conv1d", "lin0"],
    "Conv1dGroups": ["conv1d"],
    "Conv2d1x1": ["conv2d"],
    "Conv2d2": ["conv2d", "lin1"],
}
#: Models where PEFT allows 1e-3 to a method that computes the convolution and its change apart, and
#: so rounds twice; and a config of such a method.
CONVOLUTIONS = dict.fromkeys(["Conv2d", "Conv2d2", "Conv3d"], "LoraConfig")
CONVOLUTIONS |= dict.fromkeys(["Conv1dGroups", "Conv2dGroups", "Conv2dGroups2"], "LoHaConfig")
AS_LORA = {"Spectral Adapter A", "Spectral Adapter R", "LiDB"}
LINEAR = {"target_modules": ["lin0", "lin1"]}
OPTIONS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "SODA": [
        ("MLP", {**LINEAR, "rotation": "right", "spectrum_activation": "softplus"}),
        ("MLP", {**LINEAR, "decomposition": "qr"}),
        ("MLP", {**LINEAR, "rotation": None, "plan": "merged", "save_factors": True}),
        ("Conv2d", {"target_modules": ["conv2d", "lin0"], "rotation": "right"}),
        ("EmbConv1D", {"target_modules": ["emb", "conv1d"], "decomposition": "qr"}),
    ],
    "SVDiff": [
        ("MLP", {**LINEAR, "spectrum_activation": "identity", "plan": "factored"}),
        ("Conv2d", {"target_modules": ["conv2d"], "spectrum_activation": "softplus"}),
        ("MLP", {**LINEAR, "save_factors": True}),
    ],
    "Spectral Adapter A": [
        ("MLP", {"target_modules": ["lin0"], "r": 4, "columns": "bottom", "offset": 1}),
        ("MLP", {**LINEAR, "columns": [0, 1], "algorithm": "full"}),
        ("MLP", {**LINEAR, "r": 8, "rank_pattern": {"lin1": 2}, "save_factors": True}),
    ],
    "Spectral Adapter R": [
        ("MLP", {"target_modules": ["lin0"], "r": 4, "columns": "bottom", "offset": 1}),
        ("MLP", {**LINEAR, "columns": [0, 1], "algorithm": "full"}),
        ("MLP", {**LINEAR, "r": 8, "rank_pattern": {"lin1": 2}, "save_factors": True}),
    ],
    "LiDB": [
        ("MLP", {"target_modules": ["lin0"], "r": 3, "a": 5, "b": 4, "seed": 1}),
        ("Conv2d", {"target_modules": ["conv2d"], "r": 4, "save_factors": True}),
    ],
}

#: Options of ``LoraConfig`` without a meaning for other methods, which are left out.
LORA_ONLY = {"lora_alpha", "lora_dropout", "r"}


class NotApplicable(Exception):
    """The config of LoRA has no counterpart."""


def translate(method: str, options: Mapping[str, Any], model: str | None = None) -> dict[str, Any]:
    """Arguments of ``LoraConfig`` -> arguments of the config of ``method``.

    Raises:
        NotApplicable: naming the option of LoRA, or the layer, that the method does not have.
    """
    fields = {field.name for field in dataclasses.fields(METHODS[method])}
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name == "init_lora_weights" and isinstance(value, bool):
            found["init_weights"] = value
        elif name in ("text_encoder", "unet"):
            found[name] = translate(method, value)
        elif name in fields:
            found[name] = value
        elif name not in LORA_ONLY and (name, value) != ("bias", "none"):
            raise NotApplicable(f"LoRA's option {name}")
    targets = found.get("target_modules") or ()
    if "mha" in targets:
        raise NotApplicable("nn.MultiheadAttention is refused by name")
    if method == "LiDB" and "unet" not in found:
        found.setdefault("r", LoraConfig().r)
    if "columns" in fields and "unet" not in found:
        # A weight has no more columns than its rank, and some are 2 wide, some 1.
        found["r"] = min(found.get("r", 2), 4)
        narrow = {"conv1d", "conv2d"} if model == "Conv2d1x1" else {"conv1d"}
        if narrow.intersection(targets) and model not in ("Conv1dBigger", "Conv1dGroups"):
            if method == "Spectral Adapter R":
                raise NotApplicable("a layer of rank 1 has no two columns to rotate")
            found["rank_pattern"] = dict.fromkeys(narrow.intersection(targets), 1)
    return found


def set_options(config: PeftConfig) -> dict[str, Any]:
    """The arguments that a config was made with, other than defaults."""
    fresh = type(config)()
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value != getattr(fresh, name)}


def translate_row(method: str, row: tuple[Any, ...]) -> tuple[Any, ...]:
    """One row of a table of PEFT's tests."""
    model = next((cell for cell in row[1:] if isinstance(cell, str)), None)
    cells = []
    for cell in row:
        if cell is LoraConfig:
            cell = METHODS[method]
        elif type(cell) is LoraConfig:
            cell = METHODS[method](**translate(method, set_options(cell)))
        elif isinstance(cell, Mapping):
            cell = translate(method, cell, model)
        elif isinstance(cell, str):
            cell = re.sub("lora", method, cell, flags=re.IGNORECASE)
        cells.append(copy.deepcopy(cell))
    return tuple(cells)


def names_method(value: Any) -> bool:
    """Whether a cell of a table is a config, or the class of one."""
    return isinstance(value, PeftConfig) or (
        inspect.isclass(value) and issubclass(value, PeftConfig)
    )


def our_rows(names: list[str], rows: list[tuple[Any, ...]]) -> list[Any]:
    """The rows of our methods in place of those of PEFT's."""
    found = []
    layers = [("", name, LoraConfig, {"target_modules": parts}) for name, parts in LAYERS.items()]
    is_custom = names == ["test_name", "model_id", "config_cls", "config_kwargs"]
    for method, config in METHODS.items():
        own = [("", name, config, options) for name, options in OPTIONS[method]]
        seen = []
        for row in [*rows, *layers, *own] if is_custom else rows:
            if not any(cell is config or LoraConfig in (cell, type(cell)) for cell in row):
                continue
            marks: list[Any] = []
            try:
                row = translate_row(method, row)
            except NotApplicable as reason:
                if "option" in str(reason):
                    continue
                marks, row = [pytest.mark.skip(reason=f"n.a.: {reason}")], row
            # Rows that differed in options of LoRA only are one row now.
            key = [repr(cell) for cell in row[1 if names[0] == "test_name" else 0 :]]
            if key not in seen:
                seen.append(key)
                label = f"{method} {row[1]}" if is_custom else method
                found.append(pytest.param(*row, id=f"{label} {len(seen)}", marks=marks))
    return found


class StandIn(type):
    """A class in place of ``LoraConfig`` that is the config of one of our methods."""

    method: str

    def __call__(cls, **options: Any) -> PeftConfig:
        try:
            return METHODS[cls.method](**translate(cls.method, options))
        except NotApplicable as reason:
            pytest.skip(f"n.a.: {reason}")

    def __eq__(cls, other: object) -> bool:
        return other is METHODS[cls.method]

    def __hash__(cls) -> int:
        return hash(METHODS[cls.method])

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, METHODS[cls.method])

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, METHODS[cls.method])


@pytest.fixture(autouse=True)
def lora_stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a config of ours in the place of ``LoraConfig`` in tests that make one themselves."""
    method, name = getattr(request, "param", None), "LoraConfig"
    if method is None and (found := re.search("|".join(METHODS), request.node.name)):
        # Tables of several methods: where LoRA alone is let through, or its rounding allowed for.
        model = request.node.callspec.params.get("model_id")
        is_as_lora = found[0] in AS_LORA and model in CONVOLUTIONS
        method = found[0] if is_as_lora or "mixed" in request.node.name else None
        name = CONVOLUTIONS.get(model, name)
    if method is None:
        return
    stand_in = StandIn(name, (), {"method": method})
    for module in (request.module, importlib.import_module("tests.testing_common")):
        monkeypatch.setattr(module, name, stand_in, raising=False)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Rewrite the tables, or parametrize a test without one over our methods."""
    marks = metafunc.definition.own_markers
    if hasattr(metafunc.module, "check_beft_config"):
        # It means to skip models without biases for BEFT, and skips them for all methods.
        metafunc.module.check_beft_config = lambda *args: None
    has_table = False
    for index, mark in enumerate(marks):
        if mark.name != "parametrize":
            continue
        names = [name.strip() for name in mark.args[0].split(",")]
        rows = [row if len(names) > 1 else (row,) for row in mark.args[1]]
        if any(names_method(cell) for row in rows for cell in row):
            has_table = True
            marks[index] = pytest.mark.parametrize(names, our_rows(names, rows)).mark
    if not has_table:
        metafunc.fixturenames.append("lora_stand_in")
        metafunc.parametrize("lora_stand_in", METHODS, indirect=True)


#: Sources of tests of LoRA's insides.
INSIDES = re.compile(r"lora_[ABE]\b|lora_embedding|lora_magnitude|\blora\.|\.scaling\b")
#: Tests that cannot hold here, and why.
NOT_APPLICABLE = {
    "test_base_model_module_named_like_peft_prefix": "lists the prefixes of PEFT's own methods",
    "test_custom_lora_layer_issues_warning": "registers a layer of LoRA",
    "test_custom_lora_layer_used": "registers a layer of LoRA",
    "test_saving_and_loading": "registers a layer of LoRA",
    "test_load_resized_embedding_ignore_mismatched_sizes": "a resized embedding is another base "
    "weight, on which the adapter is refused",
    "test_merge_and_unload_fixes_tie_word_embeddings_config": "needs weights of the Hub that "
    "contradict their config",
    "test_get_peft_model_state_dict": "looks for 'lora' in the names of parameters",
    "test_nested_config_survives_save_load_roundtrip": "about configs inside LoRA's",
    "test_inject_from_state_dict_low_cpu_mem_usage": "the fingerprint, a buffer of 161 bytes, is "
    "not on the meta device as the parameters are",
}
#: Tests of errors that have another text here.
OWN_WORDS = {
    "test_lora_config_layers_to_transform_validation",
    "test_mixed_adapter_batches_length_mismatch_raises",
    "test_mixed_adapter_batches_lora_wrong_adapter_name_raises",
    "test_mixed_adapter_batches_merged_raises",
    "test_mixed_adapter_batches_training_mode_raises",
    "test_multiple_adapters_same_modules_to_save_merging_adapters_raises",
    "test_multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters",
    "test_regex_with_layer_indexing_lora",
}


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark what is about one method of PEFT's."""
    for item in items:
        if item.originalname in NOT_APPLICABLE:
            reason = f"n.a.: {NOT_APPLICABLE[item.originalname]}"
            item.add_marker(pytest.mark.skip(reason=reason))
        if "lora_stand_in" not in getattr(getattr(item, "callspec", None), "params", {}):
            continue
        source = inspect.getsource(item.function)
        if INSIDES.search(source):
            item.add_marker(pytest.mark.skip(reason="n.a.: about the insides of LoRA"))
        elif "LoraConfig" not in source:
            others = set(re.findall(r"\b(\w+)Config\(", source)) - {"Peft"}
            if others:
                reason = f"n.a.: about another method ({', '.join(sorted(others))})"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A test that asks the Hub for a file is not a failure."""
    report: Any = yield
    error = call.excinfo and call.excinfo.value
    if not report.failed or error is None:
        return report
    reason = None
    chain: list[Any] = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    if any(re.search("huggingface.co| the Hub ", str(link)) for link in chain):
        reason = "needs a file of the Hub"
    elif isinstance(error, ImportError):
        reason = "needs a package that is not installed"
    elif "Regex pattern did not match" in str(error) and item.originalname in OWN_WORDS:
        reason = "the error is raised, of the type expected, but in words of our own"
    elif re.search("a weighted sum of|or their sum is no", str(error)):
        reason = "the method has no weighted sum of adapters, and says so"
    elif "not compatible with the `PeftMixedModel`" in str(error):
        reason = "PeftMixedModel is closed to methods outside PEFT"
    if reason:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"n.a.: {reason}")
    return report


# Models in place of those of the Hub.

# Weights are large enough for adapters to change what is generated.
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"vocab_size": 1000, "initializer_range": 0.1}
HEADS = {"num_attention_heads": 4}
GROUPED = {**HEADS, "num_key_value_heads": 2}
TRANSFORMER = {**SIZES, **HEADS, "max_position_embeddings": 64}
OPT = {**TRANSFORMER, "ffn_dim": 64, "word_embed_proj_dim": 32}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT |= {"vocab_size": 1000, "initializer_range": 0.3}
#: Pattern in the name on the Hub -> model type and sizes; the first that is found counts.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt-125m": ("opt", {**OPT, "num_hidden_layers": 6}),
    "OPT": ("opt", OPT),
    "GPTJ": ("gptj", {**GPT, "rotary_dim": 4}),
    "gpt-?2": ("gpt2", GPT),
    "Gemma3": ("gemma3_text", {**SIZES, **GROUPED, "head_dim": 8}),
    "Mistral": ("mistral", {**SIZES, **GROUPED}),
    "Qwen2": ("qwen2", {**SIZES, **GROUPED}),
    "Qwen3": ("qwen3", {**SIZES, **GROUPED, "head_dim": 8}),
    "Llama": ("llama", {**SIZES, **GROUPED}),
    "T5": (
        "t5",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 1000,
            "decoder_start_token_id": 0,
        },
    ),
    "Bart": (
        "bart",
        {"d_model": 32, "vocab_size": 1000, "max_position_embeddings": 64, "init_std": 0.3}
        | {
            f"{part}_{name}": size
            for part in ("encoder", "decoder")
            for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
        },
    ),
    "DebertaV2": ("deberta-v2", TRANSFORMER),
    "Deberta": ("deberta", TRANSFORMER),
    "Roberta": ("roberta", TRANSFORMER),
    "Bert": ("bert", TRANSFORMER),
}


def tiny_model(original: Any, cls: Any, name: str, *args: Any, **options: Any) -> Any:
    """``from_pretrained`` of the Auto classes: the same weights at every call for a name."""
    if Path(name).is_dir():
        return original(cls, name, *args, **options)
    from transformers import AutoConfig

    found = [entry for pattern, entry in ARCHITECTURES.items() if re.search(f"(?i){pattern}", name)]
    if not found:
        raise OSError(f"{name} is on huggingface.co only")
    kind, sizes = found[0]
    known = {key: options[key] for key in ("num_labels", "tie_word_embeddings") if key in options}
    config = AutoConfig.for_model(kind, **sizes, **known)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls.from_config(config).eval()
    model.name_or_path = model.config._name_or_path = str(name)
    return model.to(options.get("dtype") or options.get("torch_dtype") or torch.float32)


@functools.cache
def pipeline() -> Any:
    """A Stable Diffusion pipeline with random weights."""
    from tiny_pipelines import tiny_pipeline

    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        return tiny_pipeline(Path(folder) / "tokenizer")


def pytest_configure() -> None:
    """Cut what PEFT's tests share off from the Hub, before they are collected."""
    from diffusers import StableDiffusionPipeline
    from transformers.models.auto import modeling_auto

    diffusion: Any = StableDiffusionPipeline

    # Imported for data on the Hub; for the import alone, as others look whether it is installed.
    missing = importlib.util.find_spec("datasets") is None
    if missing:
        datasets: Any = types.ModuleType("datasets")
        datasets.load_dataset = data_of_the_hub
        sys.modules["datasets"] = datasets
    utilities: Any = importlib.import_module("tests.testing_utils")
    if missing:
        del sys.modules["datasets"]
    utilities.hub_online_once = lambda name: contextlib.nullcontext()
    common: Any = importlib.import_module("tests.testing_common")
    # Conv1D of transformers is one of our layers.
    common._skip_if_conv1d_not_supported = lambda *args: None
    kinds: list[Any] = list(vars(modeling_auto).values())
    for kind in kinds:
        if inspect.isclass(kind) and issubclass(kind, modeling_auto._BaseAutoModelClass):
            replaced: Any = functools.partial(tiny_model, kind.from_pretrained.__func__)
            kind.from_pretrained = classmethod(replaced)
    diffusion.from_pretrained = lambda *args, **options: copy.deepcopy(pipeline())


def data_of_the_hub(name: str) -> None:
    raise OSError(f"{name} is on huggingface.co only")


# The report.

HEAD = """# PEFT's own tests on the methods of this project

Written by `python tests/peft_upstream.py`; not by hand. It takes the tests of PEFT {peft} out of
its source distribution and runs them with transformers {transformers}, diffusers {diffusers} and
torch {torch}. What a test is applied to:

* Tables of methods: every row of LoRA becomes a row of each method here, less LoRA's own options
  (DoRA, aLoRA, biases, trainable tokens, ...); the table of custom models has further layers and
  options of ours. Ranks are cut to those of the small layers.
* Tests that make a `LoraConfig` themselves get a config of ours in its place.
* Models of the Hub are replaced by small ones of the same architecture with random weights.
* Tests of mixed batches, which PEFT keeps to LoRA, run for all; so do those of `Conv1D` layers and,
  on Llama and Gemma, those of merging, which PEFT skips for others than LoRA, or for all.
* A, R and LiDB add to the output of a convolution, as LoRA and LoHa do, and get their tolerance for
  convolutions, 1e-3; SODA and SVDiff keep the one of other methods, 1e-6.

Further modules of PEFT's suite are about single methods of PEFT (`test_vera`, `test_initialization`
of LoRA, `test_mixed`, ...), need a GPU (`test_gpu_examples`, `test_quantization`, ...) or data of
the Hub (`test_vision_models`, `test_torch_compile`, `test_hub_features`, ...), or test PEFT's own
tools (`test_tuners_utils`, `test_other`, ...); they are left out.

A cell counts cases: passed, failed, skipped by PEFT itself, and not applicable.
"""
#: What is known about failures.
EXPLAINED = {
    "test_only_params_are_updated": "A of LiDB has no gradient before B, which starts at zero, has "
    "moved: three steps of SGD at 0.5 change it by less than the 1e-4 that the test looks for. "
    "PEFT raises the learning rate here for methods of its own.",
    "test_mixed_adapter_batches_different_target_layers": "It compares log-probabilities near zero "
    "to a relative 1e-5, on random weights. Of 150 draws of such weights PEFT's own LoRA fails it "
    "on 4, SODA, A and R on 5 each.",
}
TITLES = {
    "failed": "Failures",
    "skipped": "Skipped by PEFT",
    "not applicable": "Not applicable",
}


def source(folder: Path) -> Path:
    """Download and unpack the source distribution of the installed PEFT."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", ":all:", f"peft=={peft.__version__}", "-d", str(folder)]
    subprocess.run(command, check=True)
    (archive,) = folder.glob("peft-*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    return folder / f"peft-{peft.__version__}"


def run(tests: Path, modules: list[str], workers: str, select: str) -> list[ElementTree.Element]:
    """The cases of PEFT's test modules in a copy of its folder ``tests``."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(tests, Path(folder) / "tests")
        (Path(folder) / "tests" / "__init__.py").touch()
        report = Path(folder) / "report.xml"
        paths = [str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "peft_upstream", "-n", workers]
        command += ["-p", "no:cacheprovider", "-W", "ignore", "--tb=short", "-rfEs", "-k", select]
        command += [f"--junitxml={report}", *(f"tests/{module}.py" for module in modules)]
        # Two processes with several threads each get in each other's way.
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(command, cwd=folder, env={**os.environ, **environment}, check=False)
        return list(ElementTree.parse(report).getroot().iter("testcase"))


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    """What became of a case, and why."""
    for bad in ("failure", "error"):
        if (found := case.find(bad)) is not None:
            return "failed", found.attrib["message"].splitlines()[0]
    skipped = case.find("skipped")
    if skipped is None:
        return "passed", ""
    # One reason for all methods, configs and models.
    reason = re.sub(r"<class '[\w.]*\.(\w+)'>", r"\1", skipped.attrib["message"])
    reason = re.sub("|".join(config.__name__ for config in METHODS.values()), "this config", reason)
    reason = re.sub(r"got empty parameter set.*", "n.a.: a table without LoRA", reason)
    if reason.startswith("n.a.: "):
        return "not applicable", reason.removeprefix("n.a.: ")
    return "skipped", reason


def text(cases: list[ElementTree.Element]) -> str:
    """The report."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    reasons: dict[tuple[str, str], dict[str, Counter[str]]] = defaultdict(
        lambda: defaultdict(Counter)
    )
    for case in cases:
        kind, reason = outcome(case)
        name = case.attrib["classname"].split(".")[1]
        method = re.search("|".join(METHODS), case.attrib["name"])
        counts[name, method[0] if method else ""][kind] += 1
        if kind != "passed":
            reasons[kind, reason][name][case.attrib["name"].partition("[")[0]] += 1
    versions = {name: version(name) for name in ("peft", "transformers", "diffusers", "torch")}
    lines = [HEAD.format(**versions), f"| module | {' | '.join(METHODS)} |", "|---" * 6 + "|"]
    for name in MODULES:
        cells = [cell(counts[name, column]) for column in METHODS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    total = sum(counts.values(), Counter())
    lines.append(f"\nAll in all: {cell(total)}.")
    for kind, title in TITLES.items():
        lines.append(f"\n## {title}\n")
        found = [(reason, where) for (k, reason), where in reasons.items() if k == kind]
        for reason, where in sorted(found, key=lambda item: (list(item[1]), item[0])):
            cases_of = sum(sum(tests.values()) for tests in where.values())
            places = "; ".join(f"{m}: {', '.join(sorted(t))}" for m, t in where.items())
            known = " ".join(EXPLAINED.get(test, "") for tests in where.values() for test in tests)
            lines.append(f"* {reason} ({cases_of}): {places}. {known}".rstrip())
        if not found:
            lines.append("None.")
    return "\n".join(lines) + "\n"


def cell(counts: Mapping[str, int]) -> str:
    """``"120 passed, 3 skipped"``."""
    kinds = ("passed", "failed", "skipped", "not applicable")
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts.get(kind)) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("-m", "--modules", nargs="*", default=list(MODULES))
    parser.add_argument("-n", "--workers", default="2")
    parser.add_argument("-k", "--select", default="")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        peft_source = arguments.folder or source(Path(folder))
        cases = run(peft_source / "tests", arguments.modules, arguments.workers, arguments.select)
    if arguments.modules != list(MODULES) or arguments.select:
        return
    REPORT.write_text(text(cases), encoding="utf-8")
    print(f"{REPORT.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
