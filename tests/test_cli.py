"""The commands themselves: versions, packages that are missing, exporting, the backend report."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from peft import LoraConfig
from tiny_pipelines import tiny_pipeline

from spectral_adapters import cli, diffusers
from spectral_adapters.personalize.pipelines import load_pipeline


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == version("spectral-kernels")


#: A fresh process in which a package is not installed.
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from spectral_adapters.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        ("diffusers", "personalize --base x --images x --output o", "demo"),
        ("diffusers", "export --base x --adapter x --output o", "demo"),
        ("diffusers", "fuse x y --base x --method delta --output o", "demo"),
        ("yaml", "compare x.yaml --output o", "quality"),
    ],
)
def test_a_missing_package_is_one_line_and_code_2(tmp_path, package, command, extra):
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT, package, *command.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    name = command.split()[0]
    assert line.startswith(f"spectral-adapters {name}: error: needs {package}")
    assert line.endswith(f"pip install '.[{extra}]'")


def drawn(pipe):
    start = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    return pipe("red", num_inference_steps=2, generator=start, output_type="pt").images


@pytest.mark.parametrize("file_format", cli.EXPORT_FORMATS)
def test_a_plain_lora_is_exported(tmp_path, capsys, file_format):
    tiny_pipeline(tmp_path / "tokenizer").save_pretrained(tmp_path / "base")
    pipe = load_pipeline(tmp_path / "base")
    plain = drawn(pipe)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["to_k", "conv1"])
    torch.manual_seed(0)
    pipe.unet.add_adapter(config)
    for name, values in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(values, std=0.3)
    wanted = drawn(pipe)
    assert (wanted - plain).abs().max() > 1e-2
    diffusers.save_adapter(pipe, tmp_path / "lora")

    command = ["export", f"--base={tmp_path / 'base'}", f"--adapter={tmp_path / 'lora'}"]
    command += [f"--output={tmp_path / 'out'}", f"--format={file_format}"]
    assert cli.main(command) == 0
    assert cli.main([*command, "--rank=2"]) == 2
    assert "--rank" in capsys.readouterr().err
    pipe = load_pipeline(tmp_path / ("out" if file_format == "merged" else "base"))
    if file_format == "peft":
        diffusers.load_adapter(pipe, tmp_path / "out")
    elif file_format != "merged":
        pipe.load_lora_weights(tmp_path / "out")
    torch.testing.assert_close(drawn(pipe), wanted, rtol=0, atol=1e-4)


def test_the_report_on_the_sources_says_how_to_ask_for_what_is_installed():
    import spectral_kernels

    checkout = Path(__file__).parents[1]
    installed = Path(spectral_kernels.__file__).parent
    if installed.parent == checkout or list((checkout / "spectral_kernels").glob("_C*")):
        pytest.skip("needs an installed package, and a checkout without the extension")
    told = f"of {installed} tells: python -P -m spectral_kernels"
    for options, is_told in (["-m"], True), (["-P", "-m"], False):
        command = [sys.executable, *options, "spectral_kernels"]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
        assert (told in done.stdout) == is_told
