"""DeepSpeed's ZeRO on two processes of the CPU, where DeepSpeed is installed; it is no dependency.

This file is also the script that the two processes run.
"""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import TaskType
from test_training import BATCH, RANDOM, adapted, batches, sgd, train
from two_processes import SAME, run_together

deepspeed = pytest.importorskip("deepspeed")

METHODS = ("SODA", "Spectral Adapter R", "Spectral Adapter A")
STAGES = (1, 2, 3)


def train_with(method, stage):
    model = adapted(method, TaskType.CAUSAL_LM, **RANDOM)
    if stage == 3:
        # Our layers use parameters of modules that are not called.
        for layer in model.modules():
            if hasattr(layer, "_factors"):
                for parameter in layer.parameters():
                    deepspeed.zero.register_external_parameter(layer, parameter)
    config = {
        "train_micro_batch_size_per_gpu": BATCH // 2,
        # Of the base weights here, all are larger.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 64},
        # 1 by default.
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
    for batch in batches(TaskType.CAUSAL_LM, rank=dist.get_rank(), processes=2):
        engine.backward(engine(**batch).loss)
        engine.step()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values()), enabled=stage == 3):
        return {name: p.detach().clone() for name, p in trained.items()}


def worker(folder):
    # It would be compiled, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.update(WORLD_SIZE="2", LOCAL_RANK=os.environ["RANK"], MASTER_ADDR="127.0.0.1")
    deepspeed.init_distributed(dist_backend="gloo")
    for method in METHODS:
        for stage in STAGES:
            numbers = train_with(method, stage)
            if dist.get_rank() == 0:
                save_file(numbers, folder / f"{method} {stage}.safetensors")
    dist.barrier()


def test_two_processes_are_one(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run_together([[__file__, str(tmp_path)]] * 2, tmp_path)
    for method in METHODS:
        start, reference = (adapted(method, TaskType.CAUSAL_LM, **RANDOM) for _ in range(2))
        train(reference, sgd(reference), batches(TaskType.CAUSAL_LM))
        for stage in STAGES:
            numbers = load_file(tmp_path / f"{method} {stage}.safetensors")
            for name, value in numbers.items():
                expected = reference.get_parameter(name)
                assert (expected - start.get_parameter(name)).abs().amax() >= 100 * SAME
                torch.testing.assert_close(
                    value,
                    expected.detach(),
                    rtol=0,
                    atol=SAME,
                    msg=lambda text, name=name, stage=stage: f"ZeRO-{stage}, {name}: {text}",
                )


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
