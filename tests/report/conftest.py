"""Runs as the engine logs them, made up: the shapes are real, the numbers are arbitrary but plausible."""

import math
import random

import pytest

STAGES = {
    "stablekd": [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2, 3]]],
    "blocks": [[[0], [1], [2], [3]]],
}
REACHED = {"ce": 0.638, "kd": 0.664, "kd+features": 0.725, "stablekd": 0.773, "blocks": 0.36}
CUTS = ("layer1", "layer2", "layer3", "logits")


def group_name(group):
    return "+".join(str(block + 1) for block in group)


def make_up_run(method: str, seed: int, *, epochs: int = 8, steps_per_epoch: int = 78, log_every: int = 20):
    """(the run as in results.json, its events)"""
    draw = random.Random(f"{method}{seed}")
    total = epochs * steps_per_epoch
    stages = STAGES.get(method, [[[0, 1, 2, 3]]])
    final = REACHED.get(method, 0.5) + draw.gauss(0, 0.006)
    events = [
        {
            "kind": "run_start", "step": 0, "method": method, "seed": seed, "total_steps": total,
            "steps_per_epoch": steps_per_epoch,
            "config": {"data": "cifar10", "teacher": "resnet56", "student": "resnet20", "method": method, "seed": seed,
                       "epochs": epochs, "batch_size": 128, "subset": 10000.0, "cuts": None,
                       "optimizer": {"name": "adamw", "lr": 0.01 if method != "ce" else 0.1, "weight_decay": 0.05},
                       "out": f"runs/{method}-{seed}"},
            "machine": {"platform": "Linux-6.1-x86_64", "cpu": "AMD EPYC 7B13", "cores": 2, "usable_cores": 2,
                        "memory_bytes": 8 * 2**30, "torch_threads": 2, "gpus": []},
            "versions": {"python": "3.11.9", "torch": "2.6.0+cpu", "numpy": "2.1.0", "stablekd_fast": "0.1.0"},
        }
    ]  # fmt: skip
    for index, groups in enumerate(stages):
        first, last = (round(total * i / len(stages)) for i in (index, index + 1))
        names = [group_name(group) for group in groups]
        events.append({"kind": "stage_start", "step": first, "stage": index, "name": "|".join(names),
                       "groups": groups, "first_step": first, "last_step": last})  # fmt: skip
        for step in range(first + 1, last + 1):
            fraction, local = step / total, (step - first) / (last - first)
            if step % log_every == 0 or step == last:
                losses = {
                    name: (0.05 + 0.5 * math.exp(-3 * local)) * (group[-1] + 1) * 0.8**index * draw.uniform(0.93, 1.07)
                    for name, group in zip(names, groups)
                }
                events.append({"kind": "train", "step": step, "epoch": step / steps_per_epoch, "losses": losses,
                               "lr": 0.01 * (1 - local), "images_per_second": draw.gauss(830, 10),
                               "data_wait_share": 0.02})  # fmt: skip
            if step % steps_per_epoch == 0:
                accuracy = final * (1 - math.exp(-4 * fraction)) / (1 - math.exp(-4)) + draw.gauss(0, 0.008)
                events.append({"kind": "evaluate", "step": step, "epoch": step / steps_per_epoch, "split": "validation",
                               "accuracy": accuracy, "top5": 0.97, "loss": 1.4 - accuracy})  # fmt: skip
        if index:
            loss = {name: 0.4 * draw.uniform(0.8, 1.2) for name in names}
            events.append({"kind": "merge", "step": last, "merge_step": first, "stage": index, "merged": names,
                           "exposure_gap": {cut: draw.uniform(1.1, 6.0) for cut in CUTS[1:]}, "loss_at_merge": loss,
                           "max_output_difference": 0.0,
                           "steps_until_recovered": draw.choice([17, 42, None])})  # fmt: skip
        events.append({"kind": "checkpoint", "step": last})
    run = {"method": method, "seed": seed, "accuracy": final, "top5": 0.97, "epochs": float(epochs), "steps": total,
           "images_per_second": draw.gauss(830, 10), "wall_seconds": draw.gauss(96, 3)}  # fmt: skip
    events.append({"kind": "evaluate", "step": total, "epoch": float(epochs), "split": "test", "accuracy": final,
                   "top5": 0.97, "loss": 0.8})  # fmt: skip
    events.append({"kind": "run_end", "step": total, **run})
    return run, [{"time": 1e9 + i, **event} for i, event in enumerate(events)]


@pytest.fixture
def made_up_run():
    return make_up_run


@pytest.fixture(scope="session")
def comparison():
    """Runs, and events by name, of four methods with two seeds each."""
    runs, events = [], {}
    for method in ("ce", "kd", "kd+features", "stablekd"):
        for seed in range(2):
            run, logged = make_up_run(method, seed)
            runs.append(run)
            events[f"{method}, seed {seed}"] = logged
    return runs, events
