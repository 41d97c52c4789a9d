"""What the language experiments share: configs by method, data, saving, counting, results."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

METHODS = (
    "spectral-a",
    "spectral-r",
    "soda",
    "svdiff",
    "lora",
    "dora",
    "oft",
    "adalora",
    "full",
)
#: Said by every result of --smoke.
SMOKE_NOTE = "random weights and made-up data: this proves the path, not the result"
FRESH_WEIGHTS = "fresh.safetensors"
RESULT = "result.json"

Record = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a paper sets up the adapters it compares.

    Attributes:
        targets: endings of the names of the adapted modules.
        task_type: PEFT's name of the task.
        ranks: rank by method: columns of Spectral Adapters A and R, blocks of OFT.
        alpha, dropout: of LoRA, DoRA and AdaLoRA.
    """

    targets: tuple[str, ...]
    task_type: str
    ranks: dict[str, int]
    alpha: int
    dropout: float


def adapter_config(
    recipe: Recipe, method: str, rank: int | None, total_steps: int, **adalora: Any
) -> Any:
    """Return the PEFT config of a method, None for "full".

    Args:
        rank: None takes the recipe's.
        total_steps: optimizer steps of the run, by which AdaLoRA plans its budget.
        adalora: further arguments of ``AdaLoraConfig``.
    """
    import peft

    import spectral_adapters.peft as spectral
    from spectral_adapters.factors import PUBLISHED_FACTORS

    rank = rank or recipe.ranks.get(method)
    common = {"target_modules": list(recipe.targets), "task_type": recipe.task_type}
    low_rank = {**common, "lora_alpha": recipe.alpha, "lora_dropout": recipe.dropout}
    # AdaLoRA warms up for a tenth of the steps and keeps its final budget for three tenths.
    plan = {"tinit": total_steps // 10, "tfinal": 3 * total_steps // 10, "total_step": total_steps}
    makers: dict[str, Callable[[], Any]] = {
        "spectral-a": lambda: spectral.SpectralAdapterAConfig(r=rank, **common),
        "spectral-r": lambda: spectral.SpectralAdapterRConfig(r=rank, **common),
        "soda": lambda: spectral.SODAConfig(factors=PUBLISHED_FACTORS, **common),
        "svdiff": lambda: spectral.SVDiffConfig(**common),
        "lora": lambda: peft.LoraConfig(r=rank, **low_rank),
        "dora": lambda: peft.LoraConfig(r=rank, use_dora=True, **low_rank),
        "oft": lambda: peft.OFTConfig(r=rank, oft_block_size=0, block_share=True, **common),
        "adalora": lambda: peft.AdaLoraConfig(
            target_r=rank, init_r=3 * rank // 2, **low_rank, **plan, **adalora
        ),
        "full": lambda: None,
    }
    return makers[method]()


def adapt(model: nn.Module, config: Any) -> nn.Module:
    """Return ``model`` with the adapter of ``config``, or as it is for None."""
    from peft import get_peft_model

    return model if config is None else get_peft_model(model, config)


def count(model: nn.Module) -> tuple[int, float]:
    """Return the number of trained parameters, and their share of all in percent."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    return trained, 100 * trained / sum(size for size, _ in sizes)


def callbacks(method: str) -> list[Any]:
    """Return what the Trainer must call: AdaLoRA moves its budget after every step."""
    if method != "adalora":
        return []
    from transformers import TrainerCallback

    class Budget(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.base_model.update_and_allocate(state.global_step + 1)

    return [Budget()]


def load_base(
    cls: Any, model: str | Path, device: torch.device, **options: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Load a hub model or folder; return it and the weights that its checkpoint lacks.

    These are drawn at random, like DeBERTa's pooler, so an adapter means nothing without them. The
    model is moved to its device here, since that is where the adapters decompose its weights.
    """
    loaded, info = cls.from_pretrained(model, output_loading_info=True, **options)
    state = loaded.state_dict()
    fresh = {name: state[name].clone() for name in sorted(info["missing_keys"])}
    return loaded.to(device), fresh


def save(model: nn.Module, folder: Path, fresh: dict[str, Tensor]) -> None:
    """Write the adapter and the weights that the base checkpoint lacks, or the whole model."""
    from peft import PeftModel
    from safetensors.torch import save_file

    model.save_pretrained(folder)
    if fresh and isinstance(model, PeftModel):
        save_file({name: values.contiguous() for name, values in fresh.items()}, _fresh(folder))


def reload(
    cls: Any, base: str | Path, folder: Path, method: str, device: torch.device, **options: Any
) -> nn.Module:
    """Return what :func:`save` wrote, on a base that is loaded anew."""
    from peft import PeftModel
    from safetensors.torch import load_file

    if method == "full":
        return cls.from_pretrained(folder, **options).to(device)
    model, missing = load_base(cls, base, device, **options)
    if missing:
        model.load_state_dict(load_file(_fresh(folder)), strict=False)
    # PEFT's AdaLoRA computes no loss of an adapter that is not trainable.
    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def _fresh(folder: Path) -> Path:
    return folder / FRESH_WEIGHTS


def folder_bytes(folder: Path) -> int:
    """Size of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def read_records(path: Path, fields: Sequence[str]) -> list[Record]:
    """Read ``PATH.jsonl``, or ``PATH.tsv`` with a header line.

    Raises:
        ValueError: neither file exists, or a line lacks one of ``fields``; the message names it.
    """
    lines, tabs = path.with_suffix(".jsonl"), path.with_suffix(".tsv")
    if lines.is_file():
        found: Iterable[Record] = _json_lines(lines)
        source = lines
    elif tabs.is_file():
        text = tabs.read_text(encoding="utf-8").splitlines()
        found = csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
        source = tabs
    else:
        raise ValueError(f"--data needs {lines} or {tabs}; neither exists")
    records = []
    for number, record in enumerate(found, 1):
        missing = [name for name in fields if record.get(name) is None]
        if missing:
            raise ValueError(f"{source}, record {number}: must have {missing[0]!r}; got {record}")
        records.append(record)
    if not records:
        raise ValueError(f"{source} must hold records; it is empty")
    return records


def _json_lines(path: Path) -> Iterable[Record]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: must be JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: must be an object; got {line[:40]!r}")
        yield record


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def hub_dataset(name: str, config: str) -> Any:
    """Return a dataset of the hub.

    Raises:
        ImportError: the package ``datasets`` is missing.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{name} comes from the hub by `pip install datasets`; or give local files by --data"
        ) from error
    return load_dataset(name, config)


def add_common_options(parser: argparse.ArgumentParser, model: str) -> None:
    """Add the options that the language experiments share."""
    parser.add_argument("--method", choices=METHODS, default="spectral-a")
    parser.add_argument(
        "--model", default=model, metavar="FOLDER|ID", help="base model (default: %(default)s)"
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="local files instead of the hub's data set"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for all that is left")
    parser.add_argument("--rank", type=int, metavar="N", help="(default: the paper's)")
    parser.add_argument("--learning-rate", type=float, metavar="X", help="(default: the paper's)")
    parser.add_argument("--epochs", type=float, metavar="X", help="(default: the paper's)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="(default: the paper's)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="a tiny random model of the same architecture and made-up data, offline: "
        "proves the path, not the result",
    )
    parser.add_argument(
        "--count",
        action="store_true",
        help="only count trained parameters of the real model, without its weights",
    )


def check_common_options(
    parser: argparse.ArgumentParser, options: argparse.Namespace, recipe: Recipe
) -> None:
    """Refuse what cannot be; exit code 2 and one line."""
    if options.rank is not None and options.method not in recipe.ranks:
        owners = ", ".join(recipe.ranks)
        parser.error(f"--rank is an option of --method {owners}; not of {options.method}")
    for name in ("rank", "epochs", "batch_size", "learning_rate"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be above 0; got {value}")
    if options.count:
        return
    if options.output is None:
        parser.error("--output is missing: a folder for the adapter and the result")
    if options.smoke and (options.data is not None or options.model != parser.get_default("model")):
        parser.error("--smoke makes its own model and data; leave --model and --data out")
    if (options.output / RESULT).exists():
        parser.error(f"--output {options.output} holds a result; give another folder")
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data {options.data} must be a folder")


def counts(base: Callable[[], nn.Module], recipe: Recipe, methods: Sequence[str]) -> Record:
    """Count trained parameters on the meta device: {method: {trained, percent, rank}}."""
    found = {}
    for method in methods:
        with torch.device("meta"):
            model = adapt(base(), adapter_config(recipe, method, None, total_steps=1000))
        trained, percent = count(model)
        found[method] = {
            "trained_parameters": trained,
            "percent": percent,
            "rank": recipe.ranks.get(method),
        }
    return found


def trainer_options(options: argparse.Namespace, **more: Any) -> Record:
    """Return arguments of ``TrainingArguments`` that the language experiments share."""
    return {
        "output_dir": str(options.output / "checkpoints"),
        "learning_rate": options.learning_rate,
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "weight_decay": 0.01,
        "seed": options.seed,
        "use_cpu": options.cpu,
        "report_to": "none",
        "save_total_limit": 1,
        "disable_tqdm": options.smoke,
        **more,
    }


def finish(output: Path, smoke: bool, result: Record) -> int:
    """Write and print the result as one line of JSON, the last of standard output."""
    import peft
    import transformers

    result = {
        "smoke": smoke,
        **({"note": SMOKE_NOTE} if smoke else {}),
        **result,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
    text = json.dumps(result)
    (output / RESULT).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def usage_errors(parser: argparse.ArgumentParser, run: Callable[[], int]) -> int:
    """Run; what the user can put right becomes one line and exit code 2."""
    try:
        return run()
    except (ValueError, ImportError, FileNotFoundError) as error:
        parser.error(str(error).splitlines()[0])


def settings_of(config: Any) -> Record:
    """Return what a config sets, for the result."""
    if config is None:
        return {}
    found = dataclasses.asdict(config)
    names = ("target_r", "init_r") if "target_r" in found else ("r", "factors")
    return {name: found[name] for name in names if found.get(name)}
