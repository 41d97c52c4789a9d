"""The command line, ``spectral-adapters``: one subcommand per job.

Heavy libraries are imported by the subcommand that needs them, so that help and wrong options
answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spectral_adapters.personalize.settings import (
    Settings,
    UsageError,
    flag,
    resumed,
    usage_errors,
    value_type,
)

USAGE_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return the exit code.

    2 for anything the user can put right (one line on standard error), 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="spectral-adapters", description="Fine-tune pretrained models in the spectral domain."
    )
    parser.add_argument("--version", action="version", version=version("spectral-kernels"))
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_personalize(commands)
    add_export(commands)
    add_fuse(commands)
    add_calibrate(commands)
    add_cache(commands)
    add_compare(commands)
    options = vars(parser.parse_args(argv))
    run, name = options.pop("run"), options.pop("command")
    try:
        return run(options)
    except UsageError as error:
        print(f"spectral-adapters {name}: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("spectral_"):
            raise
        extra = "quality" if name == "compare" else "demo"
        needed = f"needs {error.name}, in a clone: pip install '.[{extra}]'"
        print(f"spectral-adapters {name}: error: {needed}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print(f"spectral-adapters {name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def add_personalize(commands: Any) -> None:
    """Add ``personalize``; its options are the fields of :class:`Settings`."""
    parser = commands.add_parser(
        "personalize",
        help="teach a text-to-image pipeline a style or a subject from a few images",
        description=(
            "Train an adapter of a text-to-image pipeline on a few captioned images, save it, and "
            "report what it changed. Ctrl-C saves a usable adapter; --resume continues."
        ),
    )
    groups: dict[str, Any] = {}
    for option in dataclasses.fields(Settings):
        group = option.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        # Absent unless given: a resumed run must tell the options of now from defaults.
        arguments: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS}
        arguments["help"] = _help(option)
        kind, several = value_type(option)
        if kind is bool:
            arguments["action"] = "store_true"
        else:
            arguments["type"] = kind
            arguments["choices"] = option.metadata["choices"]
            arguments["metavar"] = option.metadata["metavar"]
            if arguments["metavar"] is None and arguments["choices"] is None:
                arguments["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
            if several:
                arguments["nargs"] = "+"
        groups[group].add_argument(flag(option.name), **arguments)
    parser.set_defaults(run=run_personalize, command="personalize")


def run_personalize(options: dict[str, Any]) -> int:
    """Check the options, then train."""
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    if given.get("resume"):
        if not given.get("output"):
            raise UsageError("--resume needs --output, the folder of the run to continue")
        settings = resumed(given, Path(given["output"]))
    else:
        settings = Settings(**given).checked()

    _quieten_libraries()
    from spectral_adapters.personalize.run import personalize

    return personalize(settings)


EXPORT_FORMATS = ("diffusers", "kohya", "peft", "merged")


def add_export(commands: Any) -> None:
    """Add ``export``."""
    parser = commands.add_parser(
        "export",
        help="write an adapter of a pipeline as a LoRA file, or as a merged pipeline",
        description=(
            "Write an adapter for tools that do not know this package. Spectral Adapters A and R, "
            "LiDB and LoRA are exactly LoRAs; SODA and SVDiff are cut to --rank, with the error of "
            "each layer printed, or merged."
        ),
    )
    parser.add_argument("--base", required=True, metavar="FOLDER|ID", help="the base pipeline")
    parser.add_argument(
        "--adapter", required=True, metavar="FOLDER", help="what personalize or save_adapter wrote"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--format",
        choices=EXPORT_FORMATS,
        default="diffusers",
        help="LoRA for load_lora_weights, with kohya's keys, or as a PEFT folder per component; "
        "or the merged pipeline (default: diffusers)",
    )
    parser.add_argument("--rank", type=int, metavar="N", help="of the LoRA, if it is not exact")
    parser.set_defaults(run=run_export, command="export")


def run_export(options: dict[str, Any]) -> int:
    """Load base and adapter, write, and print what was left out."""
    _quieten_libraries()
    from spectral_adapters import diffusers as adapters
    from spectral_adapters.peft import export_lora as export_component
    from spectral_adapters.personalize.pipelines import open_base

    output, rank = Path(options["output"]), options["rank"]
    if options["format"] == "merged" and rank is not None:
        raise UsageError("--rank is for LoRAs; a merged pipeline is exact")
    pipe, adapter = open_base(options["base"]), options["adapter"]
    with usage_errors(f"--adapter {adapter} cannot be loaded: "):
        try:
            adapters.load_adapter(pipe, adapter)
        except RuntimeError as error:  # trained on other base weights
            raise ValueError(" ".join(str(error).split())) from error
    adapted: dict[str, Any] = dict(adapters.adapted_components(pipe))
    errors: dict[str, Any] = {}
    with usage_errors():
        if all(module.peft_config["default"].peft_type == "LORA" for module in adapted.values()):
            if rank is not None:
                raise UsageError(f"--adapter {adapter} is a LoRA already; leave --rank out")
            errors = _export_plain_lora(pipe, adapted, output, options["format"])
        elif options["format"] == "merged":
            adapters.export_merged(pipe, output)
        elif options["format"] == "peft":
            errors = {
                name: export_component(module, output / name, rank=rank)
                for name, module in adapted.items()
            }
        else:
            errors = adapters.export_lora(pipe, output, rank=rank, file_format=options["format"])
    _print_errors(errors)
    print(f"written: {output}")
    return 0


def _export_plain_lora(
    pipe: Any, adapted: Mapping[str, Any], output: Path, file_format: str
) -> dict[str, Any]:
    """Write a LoRA of PEFT's own, exactly; return the errors by component and layer."""
    from spectral_adapters import diffusers as adapters
    from spectral_adapters.peft import changes_to_lora, merge_changes, weight_changes

    changes = {name: weight_changes(module) for name, module in adapted.items()}
    if file_format == "peft":  # which it is
        adapters.save_adapter(pipe, output)
        return {}
    if file_format == "merged":
        for name, module in adapted.items():
            merge_changes(module, changes[name])
        pipe.save_pretrained(str(output))
        return {}
    exports = {
        name: changes_to_lora(module, changes[name], rank=module.peft_config["default"].r)
        for name, module in adapted.items()
    }
    adapters.save_lora(pipe, output, exports, file_format=file_format)
    return {name: lora.errors for name, lora in exports.items()}


def _print_errors(errors: Mapping[str, Mapping[str, float]]) -> None:
    """What LoRAs leave out, by component and layer."""
    lines = [
        (f"{component}.{name}", lost)
        for component, found in errors.items()
        for name, lost in found.items()
    ]
    if any(lost > 1e-6 for _, lost in lines):
        print("relative error of the change of the weight, by layer:")
        for name, lost in lines:
            print(f"  {lost:8.4f}  {name}")
    elif lines:
        print(f"{len(lines)} layers, exact")


#: Those of ``spectral_adapters.peft.fuse`` and ``fuse_and_unload``.
FUSION_METHODS = ("spectral", "geodesic", "delta", "fedavg", "orthogonal", "gradient")


def add_fuse(commands: Any) -> None:
    """Add ``fuse``."""
    parser = commands.add_parser(
        "fuse",
        help="make one adapter, or one pipeline, of adapters that were trained apart",
        description=(
            "Fuse adapters of one base pipeline. spectral (Spectral Adapters A on columns of their "
            "own) and geodesic (SODA) write an adapter; the others write a LoRA if the fused "
            "change has a low rank or --rank cuts it. --merged writes the merged pipeline."
        ),
    )
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="ADAPTER[=WEIGHT]",
        help="what personalize or save_adapter wrote, and its weight (default: 1)",
    )
    parser.add_argument("--base", required=True, metavar="FOLDER|ID", help="the base pipeline")
    parser.add_argument("--method", required=True, choices=FUSION_METHODS, help="docs/fusion.md")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--merged", action="store_true", help="write the merged pipeline")
    parser.add_argument("--rank", type=int, metavar="N", help="of the LoRA, if it is not exact")
    parser.add_argument(
        "--allow-overlap",
        action="store_true",
        help="spectral: add up what several adapters do to the same column",
    )
    parser.add_argument(
        "--moments",
        nargs="+",
        metavar="FILE",
        help="gradient: one safetensors file per adapter, COMPONENT.LAYER to second moments",
    )
    parser.add_argument(
        "--regularization",
        type=float,
        default=1e-6,
        metavar="X",
        help="gradient: pull to the base weight (default: 1e-6)",
    )
    parser.add_argument(
        "--sheet",
        nargs="+",
        metavar="PROMPT",
        help="draw these with the base, each adapter and the fusion: OUTPUT/sheet.png",
    )
    parser.add_argument(
        "--sample-steps", type=int, metavar="N", help="--sheet: denoising steps (default: 50)"
    )
    parser.add_argument(
        "--guidance-scale", type=float, metavar="X", help="--sheet: guidance (default: 7.5)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="--sheet: of the noise (default: 0)")
    parser.set_defaults(run=run_fuse, command="fuse")


def run_fuse(options: dict[str, Any]) -> int:
    """Load base and adapters, fuse, write, and print what was fused."""
    given = [_weighted(text) for text in options["adapters"]]
    method, merged, rank = options["method"], options["merged"], options["rank"]
    if merged and rank is not None:
        raise UsageError("--rank is for LoRAs; a merged pipeline is exact")
    if options["allow_overlap"] and method != "spectral":
        raise UsageError("--allow-overlap is for --method spectral")
    if (options["moments"] is not None) != (method == "gradient"):
        raise UsageError("--moments is for --method gradient, which needs it")
    if options["moments"] is not None and len(options["moments"]) != len(given):
        raise UsageError(
            f"--moments needs one file for each of {len(given)} adapters; "
            f"got {len(options['moments'])}"
        )
    _check_sheet(options)
    _quieten_libraries()
    from spectral_adapters.diffusers import fuse_adapters
    from spectral_adapters.personalize.pipelines import open_base

    pipe = open_base(options["base"])
    if options["sheet"] is not None and not hasattr(pipe, "unet"):
        raise UsageError(
            f"--sheet draws with pipelines that have a unet; {type(pipe).__name__} has none"
        )
    with usage_errors():
        fusion = fuse_adapters(
            pipe,
            options["output"],
            [folder for folder, _ in given],
            [weight for _, weight in given],
            method=method,
            merged=merged,
            rank=rank,
            moments=options["moments"],
            regularization=options["regularization"],
            allow_overlap=options["allow_overlap"],
        )
    print(fusion.report)
    if fusion.overlap is not None:
        print(fusion.overlap)
    _print_errors(fusion.errors)
    print(f"written: {options['output']}, {fusion.kind}")
    if options["sheet"] is not None:
        *names, _ = fusion.report.norms
        folders = dict(zip(names, (folder for folder, _ in given), strict=True))
        _draw_sheet(options, pipe, folders, reload=fusion.kind == "LoRA")
    return 0


#: Options of ``fuse`` that say how ``--sheet`` draws: the least value, and what stands for None.
SHEET_OPTIONS: dict[str, tuple[int, Any]] = {
    "sample_steps": (1, 50),
    "guidance_scale": (0, 7.5),
    "seed": (0, 0),
}


def _check_sheet(options: Mapping[str, Any]) -> None:
    prompts = options["sheet"]
    if prompts is not None and not all(prompt.strip() for prompt in prompts):
        raise UsageError(f"--sheet must hold prompts that are not empty; got {prompts}")
    for name, (least, _) in SHEET_OPTIONS.items():
        value = options[name]
        if value is None:
            continue
        if prompts is None:
            raise UsageError(f"{flag(name)} is for --sheet")
        if not least <= value < float("inf"):
            raise UsageError(f"{flag(name)} must be at least {least}; got {value}")


def _draw_sheet(
    options: Mapping[str, Any], fused: Any, adapters: Mapping[str, str], *, reload: bool
) -> None:
    """Draw the prompts with the base, with each adapter, and with ``fused`` or the LoRA written."""
    from spectral_adapters.personalize import evaluation, report
    from spectral_adapters.personalize.pipelines import open_base
    from spectral_adapters.personalize.run import FOLDER_SAMPLING, SHEET, image_size

    output, prompts = Path(options["output"]), options["sheet"]
    steps, guidance, seed = (
        default if options[name] is None else options[name]
        for name, (_, default) in SHEET_OPTIONS.items()
    )
    pipe = open_base(options["base"])
    size = image_size(pipe, None)
    sampling = evaluation.Sampling(steps, guidance, FOLDER_SAMPLING[2], size, seed)
    # Names of adapters have no spaces.
    columns = {"base model": evaluation.draw(pipe, prompts, sampling, label="base model")}
    columns |= evaluation.draw_each(pipe, adapters, prompts, sampling)
    if reload:
        pipe.load_lora_weights(str(output))
        fused = pipe
    columns["fused"] = evaluation.draw(fused, prompts, sampling, label="fused")
    with usage_errors():
        report.save_png(report.sheet(prompts, columns), output / SHEET)
    print(f"written: {output / SHEET}")


def _weighted(text: str) -> tuple[str, float]:
    """(folder, weight) of ADAPTER[=WEIGHT]."""
    folder, mark, weight = text.rpartition("=")
    if not mark or Path(text).is_dir():
        return text, 1.0
    try:
        return folder, float(weight)
    except ValueError:
        raise UsageError(f"{text}: the weight must be a number; got {weight!r}") from None


#: Types of activations that the planner can be calibrated for.
CALIBRATED_TYPES = ("float32", "float64", "bfloat16", "float16")


def add_calibrate(commands: Any) -> None:
    """Add ``calibrate``."""
    parser = commands.add_parser(
        "calibrate",
        help="measure what the planner should know of this machine",
        description=(
            "Measure what rotations, their gradients, builds and calls cost beside a large product "
            "on a quiet machine, and keep it for all later runs. SODA layers with plan='auto' "
            "choose by it; without it they go by built-in constants."
        ),
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype", choices=CALIBRATED_TYPES, default="float32", help="type of the activations"
    )
    parser.set_defaults(run=run_calibrate, command="calibrate")


def run_calibrate(options: dict[str, Any]) -> int:
    """Measure, keep, and print the rates."""
    import torch

    import spectral_kernels  # noqa: F401  (declares the ops that are timed)
    from spectral_adapters.planner import calibrate, calibration_file

    try:
        rates = calibrate(options["device"], getattr(torch, options["dtype"]))
    except (RuntimeError, AssertionError) as error:  # how torch refuses a device
        raise UsageError(f"--device {options['device']}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise UsageError(f"{calibration_file()} cannot be written: {error}") from error
    print(rates.source)
    print(f"  an operation of a rotation costs {rates.rotation:.2f} of a large product")
    print(f"  an operation of its gradient     {rates.gram:.2f}")
    print(f"  an operation of a build          {rates.build:.2f}")
    print(f"  a call                           {rates.call:.2g} operations")
    print(f"written: {calibration_file()}")
    return 0


def add_cache(commands: Any) -> None:
    """Add ``cache``."""
    parser = commands.add_parser(
        "cache",
        help="list or clear the factorisations of weights that are kept on disk",
        description=(
            "Weights are decomposed once; the results are kept for the next start, the least "
            "recently used making room for new ones. SPECTRAL_KERNELS_CACHE_LIMIT sets how many "
            "bytes they may take in all; 0 switches the cache off."
        ),
    )
    parser.add_argument(
        "action", nargs="?", choices=("list", "clear"), default="list", help="(default: list)"
    )
    parser.add_argument(
        "--older-than", type=float, metavar="DAYS", help="clear: only what was not used that long"
    )
    parser.set_defaults(run=run_cache, command="cache")


def run_cache(options: dict[str, Any]) -> int:
    """Print what is in the cache, or remove it."""
    from spectral_adapters import spectra

    days = options["older_than"]
    if options["action"] == "clear":
        with usage_errors("--older-than: "):
            try:
                removed = spectra.clear_cache(0.0 if days is None else days)
            except OSError as error:
                raise UsageError(f"{spectra.cache_folder()} cannot be cleared: {error}") from error
        print(f"removed: {_entries(removed)} from {spectra.cache_folder()}")
        return 0
    if days is not None:
        raise UsageError("--older-than is for cache clear")
    with usage_errors():
        limit = spectra.cache_limit()
    entries = spectra.cache_entries()
    for entry in entries:
        about = entry.about()
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_use))
        what = f"{about['weight']:24}  {about['factorisation']:.90}" if about else "damaged"
        print(f"{used}  {entry.size / 1e6:9.2f} MB  {entry.path.stem[:12]}  {what}")
    print(f"{_entries(entries)} of {limit / 1e9:.3g} GB in {spectra.cache_folder()}")
    return 0


def _entries(entries: Sequence[Any]) -> str:
    size = sum(entry.size for entry in entries) / 1e9
    return f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}, {size:.3g} GB,"


def add_compare(commands: Any) -> None:
    """Add ``compare``."""
    parser = commands.add_parser(
        "compare",
        help="compare methods at equal numbers of trained parameters on real data",
        description=(
            "Carry out a plan of tasks, methods, budgets and seeds (benchmarks/quality/*.yaml): "
            "search each method's learning rate on a development split, then train with every "
            "seed and measure once on the test split. What is on record in --output is not done "
            "again, so an interrupted comparison continues where it was."
        ),
    )
    parser.add_argument("plan", metavar="PLAN", help="YAML file; see docs/results.md")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="records and sheets; also to continue"
    )
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes (default: 2)"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="X", help="start no further run after this time"
    )
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="only these of the plan")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these of the plan")
    parser.add_argument("--budgets", nargs="+", type=int, metavar="N", help="only these")
    parser.add_argument(
        "--costs",
        action="store_true",
        help="measure, all in one run, what the methods cost, and nothing else; on a quiet machine",
    )
    parser.add_argument(
        "--report", metavar="FILE", help="write tables and plots (Markdown, PNG beside it)"
    )
    parser.set_defaults(run=run_compare, command="compare")


def run_compare(options: dict[str, Any]) -> int:
    """Carry out what is left of the plan, then report."""
    from spectral_adapters.compare.plan import read_plan

    plan, output = read_plan(options["plan"]), Path(options["output"])
    if options["workers"] < 1:
        raise UsageError(f"--workers must be at least 1; got {options['workers']}")
    if options["costs"]:
        if plan.cost is None:
            raise UsageError(f"--costs: plan {options['plan']} has no entry cost")
        for name in ("tasks", "methods", "budgets"):
            if options[name] is not None:
                raise UsageError(f"--costs measures all methods together; leave --{name} out")
    in_plan: dict[str, set[Any]] = {
        "tasks": set(plan.tasks),
        "methods": {method for task in plan.tasks.values() for method in task.methods},
        "budgets": {
            budget
            for task in plan.tasks.values()
            for budgets in task.methods.values()
            for budget in budgets
        },
    }
    chosen = {}
    for name, known in in_plan.items():
        given = known if options[name] is None else set(options[name])
        if given - known:
            raise UsageError(
                f"--{name}: the plan has no {', '.join(map(str, sorted(given - known)))}; "
                f"it has {', '.join(map(str, sorted(known)))}"
            )
        chosen[name] = given
    _quieten_libraries()
    from spectral_adapters.compare.cells import Cell
    from spectral_adapters.compare.costs import measure_costs
    from spectral_adapters.compare.report import write_report
    from spectral_adapters.compare.runner import compare

    def say(text: str) -> None:
        print(text, flush=True)

    def only(cell: Cell) -> bool:
        return (
            cell.task.name in chosen["tasks"]
            and cell.method in chosen["methods"]
            and cell.budget in chosen["budgets"]
        )

    with usage_errors():
        if options["costs"]:
            finished = measure_costs(plan, output, minutes=options["minutes"], say=say)
        else:
            finished = compare(
                plan,
                output,
                workers=options["workers"],
                minutes=options["minutes"],
                only=only,
                say=say,
            )
        if options["report"] is not None:
            write_report(plan, output, Path(options["report"]))
    print(f"records: {output}" + ("" if finished else "; not finished, run it again to go on"))
    return 0


def _quieten_libraries() -> None:
    """Leave the terminal to our own progress and errors."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        # PEFT imports the first two where they are installed; they tell what they cannot use.
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _help(option: dataclasses.Field[Any]) -> str:
    text = option.metadata["help"].replace("%", "%%")
    default = option.default
    if default is None or default is False or "default" in text:
        return text
    shown = " ".join(default) if isinstance(default, tuple) else default
    return f"{text} (default: {shown})"
