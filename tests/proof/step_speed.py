"""Whether a change has made steps slower: two installations, each in a process of its own, take turns.

    python tests/proof/step_speed.py BEFORE_PYTHON AFTER_PYTHON

Both are interpreters of environments with the package, as it was and as it is. A turn is six steps of resnet56 ->
resnet20 on 128 images of 32 px; of seven turns each the median is shown, and that of their ratios (before over after).
"""

import random
import statistics
import subprocess
import sys

CASES = ("apart", "merged", "apart, live teacher", "merged, live teacher")

WORKER = """
import sys, time, torch
from torch import nn
from stablekd_fast import models
from stablekd_fast.blocks import pair_blocks
from stablekd_fast.data import Batch
from stablekd_fast.objectives import objective
try:
    from stablekd_fast.engine.schedule import Optimizer
    from stablekd_fast.engine.inputs import StageInputs, load_batch
from stablekd_fast.engine.step import GroupStep, Rates
    from stablekd_fast.execution.memory import keep_freed_memory
    from stablekd_fast.objectives import Objectives
    from stablekd_fast.teacher.live import Relay
except ImportError:  # before modules had rooms
    from stablekd_fast.memory import keep_freed_memory
    from stablekd_fast.schedule import Optimizer
    from stablekd_fast.step import GroupStep, Objectives, Rates, StageInputs, load_batch
    from stablekd_fast.teacher import Relay

keep_freed_memory()
torch.set_num_threads(2)
torch.manual_seed(0)
teacher, student = (models.build(n, 10, 32).to(memory_format=torch.channels_last) for n in ("resnet56", "resnet20"))
images = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last)
batch = Batch(torch.arange(128), 0, images, torch.randint(10, (128,)))
paired = pair_blocks(teacher.eval(), student, images)
paired.fuses_norms = True
aims, relay = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all"), Relay(paired)
blocks = list(range(len(paired)))
nn.ModuleList([student, *paired.student_blocks]).train()
turns = {}
for name, groups in (("apart", [[k] for k in blocks]), ("merged", [blocks])):
    inputs, wanted = StageInputs(torch.device("cpu")), aims.teacher_outputs(groups, len(paired.cuts))
    load_batch(inputs, relay, wanted, batch)
    rates = Rates.constant(0.0)
    steps = [GroupStep(paired, group, aims, Optimizer("sgd"), inputs, rates=rates) for group in groups]

    def alone(steps=steps):
        for step in steps:
            step.run()

    def live(alone=alone, inputs=inputs, wanted=wanted):
        load_batch(inputs, relay, wanted, batch)
        alone()

    turns |= {name: alone, f"{name}, live teacher": live}
for turn in turns.values():
    turn()
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(6):
        turns[line.strip()]()
    print((time.perf_counter() - start) / 6, flush=True)
"""


def main(interpreters: dict[str, str]) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": "/"}
    processes = {side: subprocess.Popen([python, "-c", WORKER], **pipes) for side, python in interpreters.items()}
    for process in processes.values():
        assert process.stdout.readline() == "ready\n"

    def seconds(side: str, case: str) -> float:
        processes[side].stdin.write(f"{case}\n")
        processes[side].stdin.flush()
        return float(processes[side].stdout.readline())

    for case in CASES:
        turns = [{side: seconds(side, case) for side in random.sample(sorted(processes), 2)} for _ in range(7)]
        medians = {side: 1e3 * statistics.median(turn[side] for turn in turns) for side in processes}
        shown = ", ".join(f"{side} {milliseconds:.1f} ms" for side, milliseconds in medians.items())
        ratios = sorted(turn["before"] / turn["after"] for turn in turns)
        spread = f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(f"{case}: {shown}; ratio {statistics.median(ratios):.3f} {spread}", flush=True)
    for process in processes.values():
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main({"before": sys.argv[1], "after": sys.argv[2]})
