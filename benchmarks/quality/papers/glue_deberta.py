"""DeBERTaV3-base on GLUE as in Table 1 of Zhang & Pilanci, "Spectral Adapter" (NeurIPS 2024).

Where each hyperparameter comes from is in README.md beside this file. ``--smoke`` runs the same
code on a tiny random DeBERTa and made-up sentences; it proves the path, not the result.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import stand_ins
import torch
from paper_methods import (
    METHODS,
    Recipe,
    Record,
    adapt,
    adapter_config,
    add_common_options,
    callbacks,
    check_common_options,
    count,
    counts,
    finish,
    folder_bytes,
    hub_dataset,
    load_base,
    read_records,
    reload,
    save,
    settings_of,
    trainer_options,
    usage_errors,
    write_jsonl,
)

MODEL = "microsoft/deberta-v3-base"

#: Its published config, but for what changes neither shapes nor counts.
DEBERTA_V3_BASE = {
    **stand_ins.DEBERTA_ATTENTION,
    "vocab_size": 128100,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "pooler_hidden_size": 768,
}

#: Columns of the text, and number of labels; 1 is a regression.
TASKS: dict[str, tuple[tuple[str, ...], int]] = {
    "mnli": (("premise", "hypothesis"), 3),
    "sst2": (("sentence",), 2),
    "mrpc": (("sentence1", "sentence2"), 2),
    "cola": (("sentence",), 2),
    "qnli": (("question", "sentence"), 2),
    "qqp": (("question1", "question2"), 2),
    "rte": (("sentence1", "sentence2"), 2),
    "stsb": (("sentence1", "sentence2"), 1),
}

# R with 192 columns trains as much as A with 24, r (r-1) = 36672 and 24 (768 + 768) = 36864 per
# layer; the paper has no R here.
RECIPE = Recipe(
    targets=("query_proj", "key_proj", "value_proj"),
    task_type="SEQ_CLS",
    ranks={"spectral-a": 24, "spectral-r": 192, "lora": 24, "dora": 24, "oft": 4, "adalora": 24},
    alpha=32,
    dropout=0.01,
)

_LORA_RATES = dict(zip(TASKS, (1e-4, 6e-5, 2e-4, 1e-4, 1e-4, 1e-4, 2e-4, 2e-4), strict=True))
#: Learning rates by method and task, in the order of TASKS.
RATES: dict[str, dict[str, float]] = {
    "spectral-a": dict(zip(TASKS, (1e-4, 1e-4, 7e-4, 3e-4, 1e-4, 1e-4, 3e-4, 5e-4), strict=True)),
    "lora": _LORA_RATES,
    "dora": _LORA_RATES,
    "oft": dict(zip(TASKS, (8e-5, 2e-4, 9e-4, 4e-4, 2e-4, 3e-4, 3e-4, 7e-4), strict=True)),
    "adalora": dict(
        zip(TASKS, (5e-4, 8e-4, 1e-3, 5e-4, 1.2e-3, 5e-4, 1.2e-3, 2.2e-3), strict=True)
    ),
    # Not in the paper, and not tuned.
    "spectral-r": dict.fromkeys(TASKS, 1e-3),
    "soda": dict.fromkeys(TASKS, 1e-3),
    "svdiff": dict.fromkeys(TASKS, 1e-3),
    "full": dict.fromkeys(TASKS, 2e-5),
}
EPOCHS = dict(zip(TASKS, (1, 5, 13, 8, 1, 10, 10, 30), strict=True))
ADALORA_EPOCHS = {**EPOCHS, "rte": 13}
#: Steps between two allocations of AdaLoRA's budget, and the weight of its regularisation.
ADALORA_PERIOD = dict(zip(TASKS, (100, 100, 1, 10, 100, 100, 1, 10), strict=True))
ADALORA_WEIGHT = dict(zip(TASKS, (0.1, 0.1, 0.1, 0.5, 0.1, 0.1, 0.3, 0.1), strict=True))
BATCH_SIZE = 32
EVALUATION_STEPS = 500

#: Trained parameters in percent, as printed in Table 1.
PUBLISHED_PERCENT = {
    "lora": 0.72,
    "dora": 0.73,
    "oft": 0.72,
    "adalora": 1.07,
    "spectral-a": 0.72,
}


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate, save, reload and evaluate again; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=tuple(TASKS), default="cola")
    add_common_options(parser, MODEL)
    options = parser.parse_args(argv)
    check_common_options(parser, options, RECIPE)
    if options.count:
        found = counts(real_model, RECIPE, METHODS)
        for method, percent in PUBLISHED_PERCENT.items():
            found[method]["published_percent"] = percent
        print(json.dumps(found))
        return 0
    epochs = ADALORA_EPOCHS if options.method == "adalora" else EPOCHS
    options.evaluation_steps = EVALUATION_STEPS
    if options.smoke:
        make_smoke(options)
    options.learning_rate = options.learning_rate or RATES[options.method][options.task]
    options.epochs = options.epochs or epochs[options.task]
    options.batch_size = options.batch_size or BATCH_SIZE
    return usage_errors(parser, lambda: run(options))


def real_model() -> torch.nn.Module:
    """Return DeBERTaV3-base for two labels, without its weights."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    return DebertaV2ForSequenceClassification(DebertaV2Config(**DEBERTA_V3_BASE, num_labels=2))


def make_smoke(options: argparse.Namespace) -> None:
    """Write a tiny model and data into the output folder, and shrink what does not fit them."""
    options.model, options.data = options.output / "model", options.output / "data"
    stand_ins.deberta(options.model)
    options.data.mkdir(parents=True)
    fields, labels = TASKS[options.task]
    for split, size in (("train", 32), ("validation", 16)):
        columns = [stand_ins.sentences(size, seed) for seed in range(len(fields))]
        records = []
        for texts in zip(*columns, strict=True):
            share = sum("good" in text for text in texts) / len(texts)
            label = 5 * share if labels == 1 else int(share > 0)
            records.append({**dict(zip(fields, texts, strict=True)), "label": label})
        write_jsonl(options.data / f"{split}.jsonl", records)
    if options.rank is None and options.method == "spectral-r":
        options.rank = 8
    options.learning_rate = options.learning_rate or 5e-3
    options.epochs = options.epochs or 2
    options.batch_size = options.batch_size or 8
    options.evaluation_steps = 4
    options.cpu = True


def run(options: argparse.Namespace) -> int:
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    began = time.perf_counter()
    fields, labels = TASKS[options.task]
    training, validation = load_data(options.task, options.data)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    encoded = [encode(tokenizer, records, fields) for records in (training, validation)]

    arguments = TrainingArguments(
        **trainer_options(options),
        eval_strategy="steps",
        eval_steps=options.evaluation_steps,
        save_strategy="steps",
        save_steps=options.evaluation_steps,
        logging_strategy="no",
        load_best_model_at_end=True,
    )
    set_seed(options.seed)
    kind = AutoModelForSequenceClassification
    base, fresh = load_base(kind, options.model, arguments.device, num_labels=labels)
    steps = int(-(-len(training) // options.batch_size) * options.epochs)
    config = adapter_config(
        RECIPE,
        options.method,
        options.rank,
        steps,
        deltaT=ADALORA_PERIOD[options.task],
        orth_reg_weight=ADALORA_WEIGHT[options.task],
    )
    model = adapt(base, config)
    trained, percent = count(model)

    def trainer(of: torch.nn.Module) -> Trainer:
        return Trainer(
            model=of,
            args=arguments,
            train_dataset=encoded[0],
            eval_dataset=encoded[1],
            processing_class=tokenizer,
            compute_metrics=lambda found: metrics(options.task, *found),
            callbacks=callbacks(options.method),
        )

    training_run = trainer(model)
    probe = encoded[1][: options.batch_size]
    start = training_run.predict(probe).predictions
    outcome = training_run.train()
    before = training_run.predict(encoded[1])
    folder = options.output / "adapter"
    save(model, folder, fresh)
    again = reload(kind, options.model, folder, options.method, arguments.device, num_labels=labels)
    after = trainer(again).predict(encoded[1])
    return finish(
        options.output,
        options.smoke,
        {
            "experiment": "glue_deberta",
            "task": options.task,
            "method": options.method,
            "model": str(options.model),
            "settings": settings_of(config),
            "learning_rate": options.learning_rate,
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "seed": options.seed,
            "steps": outcome.global_step,
            "loss": outcome.training_loss,
            "trained_parameters": trained,
            "trained_percent": percent,
            "saved_bytes": folder_bytes(folder),
            "metrics": metrics(options.task, before.predictions, before.label_ids),
            "metrics_reloaded": metrics(options.task, after.predictions, after.label_ids),
            "change": float(np.abs(before.predictions[: len(probe)] - start).max()),
            "reload_difference": float(np.abs(before.predictions - after.predictions).max()),
            "seconds": time.perf_counter() - began,
        },
    )


def load_data(task: str, folder: Path | None) -> tuple[list[Record], list[Record]]:
    """Return training and validation records (matched ones for MNLI) with checked labels.

    Raises:
        ValueError: a record without text or with a label that the task does not have.
    """
    fields, labels = TASKS[task]
    if folder is None:
        hub = hub_dataset("nyu-mll/glue", task)
        names = ("train", "validation_matched" if task == "mnli" else "validation")
        found = [[dict(record) for record in hub[name]] for name in names]
    else:
        found = [read_records(folder / n, (*fields, "label")) for n in ("train", "validation")]
    for records in found:
        for record in records:
            record["label"] = check_label(record["label"], labels)
    return found[0], found[1]


def check_label(label: Any, labels: int) -> int | float:
    """Return a label as a number.

    Raises:
        ValueError: it is not one.
    """
    expected = "a number" if labels == 1 else f"an integer from 0 to {labels - 1}"
    try:
        number = float(label)
    except (TypeError, ValueError):
        raise ValueError(f"label must be {expected}; got {label!r}") from None
    if labels == 1:
        return number
    if number not in range(labels):
        raise ValueError(f"label must be {expected}; got {label!r}")
    return int(number)


def encode(tokenizer: Any, records: list[Record], fields: tuple[str, ...]) -> list[Record]:
    """Return token ids and labels, not padded."""
    texts = [[record[field] for record in records] for field in fields]
    tokens = tokenizer(*texts, truncation=True)
    return [
        {**{name: values[row] for name, values in tokens.items()}, "labels": record["label"]}
        for row, record in enumerate(records)
    ]


def metrics(task: str, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return GLUE's measures of a task.

    Args:
        predictions: ``[N, labels]`` scores; ``[N]`` or ``[N, 1]`` values for STS-B.
        labels: ``[N]``.
    """
    if TASKS[task][1] == 1:
        values = predictions.reshape(-1).astype(np.float64)
        return {"pearson": pearson(values, labels), "spearman": spearman(values, labels)}
    chosen = predictions.argmax(-1)
    if task == "cola":
        return {"matthews": matthews(chosen, labels)}
    found = {"accuracy": float((chosen == labels).mean())}
    if task in ("mrpc", "qqp"):
        found["f1"] = f1(chosen, labels)
    return found


def f1(chosen: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 if it is never right."""
    right = float(((chosen == 1) & (labels == 1)).sum())
    return 2 * right / float((chosen == 1).sum() + (labels == 1).sum()) if right else 0.0


def matthews(chosen: np.ndarray, labels: np.ndarray) -> float:
    """Correlation of two binary vectors; 0 if one of them is constant."""
    return pearson(chosen.astype(np.float64), labels)


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of two vectors; 0 if one of them is constant."""
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / scale if scale else 0.0


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of ranks, equal values sharing theirs."""
    return pearson(ranks(first), ranks(second))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, the mean rank for equal values."""
    _, places, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return (last - (sizes - 1) / 2)[places]


if __name__ == "__main__":
    sys.exit(main())
