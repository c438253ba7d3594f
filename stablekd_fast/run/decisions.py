"""What is decided for a run before its first step: stages, what is kept of the teacher, who trains what."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.cache.columns import Plan
from stablekd_fast.cache.fingerprint import image_fingerprint
from stablekd_fast.config import DistillConfig, identity
from stablekd_fast.data.bank import BankSource
from stablekd_fast.distributed import Layout
from stablekd_fast.engine.checkpoint import ends_of
from stablekd_fast.engine.schedule import PlannedStage, Stage, extended, method_stages, plan_stages, with_idle_end
from stablekd_fast.engine.synthesised import SynthesisedImages
from stablekd_fast.execution.capture import COMPILED
from stablekd_fast.models.black_box import BlackBox
from stablekd_fast.objectives import Facts, Objectives
from stablekd_fast.planning.costs import Planner
from stablekd_fast.planning.ranks import measured_layouts
from stablekd_fast.planning.rows import Costs
from stablekd_fast.run.builders import auxiliary_facts, embedding_layouts, fingerprint
from stablekd_fast.run.materials import Materials
from stablekd_fast.run.synthesised import synthesised_images
from stablekd_fast.teacher.cached import CachedTeacher
from stablekd_fast.teacher.live import LiveTeacher, Relay, Teacher


@dataclass(frozen=True)
class Decisions:
    """The decisions for one run, in the order in which they are made."""

    objectives: Objectives
    stages: list[PlannedStage]
    plan: Plan
    costs: Costs | None
    """What the plan was made from, if it was made from measurements."""
    teacher: Teacher
    layouts: list[Layout]
    identity: dict
    """What a resumed run must share with this one."""
    synthesised: SynthesisedImages | None = None
    """What makes the training images, where they are not read."""


def decide(materials: Materials) -> Decisions:
    """Decide. Ranks first compare teacher, images and how they compute; the plan is the first one's, and layouts are
    made from costs that all of them tell.

    A run that goes on goes on with the plan that it began with, and with its layouts if there are as many ranks.
    Raises ConfigError if ranks would train something else, or if what is asked for does not fit; CacheError if stored
    rows belong to something else.
    """
    config, source, paired = materials.config, materials.source, materials.paired
    objectives = materials.objectives
    asked = config.stages or _stages(config, paired)
    ends = _ends(config, materials.resumed)
    first, *later = (max(round(epochs * source.steps_per_epoch), 1) for epochs in ends)
    stages = plan_stages(asked, len(paired), first, source.steps_per_epoch)
    for total_steps in later:
        stages = extended(stages, total_steps)
    groupings = [planned.stage.groups for planned in stages]
    divided = {"accumulate": config.accumulate, "ranks": materials.ranks.size}
    for note in objectives.check(groupings, len(paired.cuts), **divided, mix=config.mix):
        warnings.warn(note, stacklevel=1)
    planner = Planner(paired, source, objectives, stages, materials.images.cache, materials.device, materials.capture)
    facts = _facts(materials)
    if materials.ranks.size > 1:  # before any of them opens a column
        chosen = {"precision": paired.precision.name, "image_dtype": str(materials.image_dtype)}
        materials.ranks.check_alike({**facts, **chosen, "images": image_fingerprint(source)})
    plan, costs, teacher = _teacher(materials, planner)
    layouts = _layouts(materials, objectives, groupings, teacher)
    inexact = [[output, kept.codec] for output, kept in sorted(plan.kept.items()) if kept.codec != "fp32"]
    if objectives.auxiliary is not None:
        objectives = objectives.made(_losses_facts(materials), config.seed)
    return Decisions(
        objectives, stages, plan, costs, teacher, layouts,
        {**identity(config), **facts, "inexact": inexact, "epochs": ends[0] if len(ends) == 1 else ends},
        synthesised_images(config, source, len(facts["classes"]), paired) if isinstance(source, BankSource) else None,
    )  # fmt: skip


def _stages(config: DistillConfig, paired: PairedBlocks) -> list[Stage]:
    """The stages of the method. A last block without weights joins the one before it, where nothing reads logits."""
    idle = config.head != "classifier" and paired.last_is_idle
    stages = method_stages(config.method, len(paired) - idle, config.recipe, config.optimizer)
    return with_idle_end(stages) if idle else stages


def _losses_facts(materials: Materials) -> Facts:
    config, paired, device, source = materials.config, materials.paired, materials.device, materials.source
    shape = materials.images.first(device).shape
    return auxiliary_facts(
        paired,
        len(materials.images.dataset.classes),
        source.split.total,
        config.batch_size // materials.ranks.size,
        (shape[2], shape[3]) if len(shape) == 4 else (1, 1),  # users have no size
        device,
        outputs=None if config.head != "embedding" else embedding_layouts(paired, materials.images.first(device)),
        has_teacher=config.has_teacher,
        popularity=materials.images.dataset.popularity,
        mean=source.mean,
        std=source.std,
    )


def _ends(config: DistillConfig, resumed: dict | None) -> list[float]:
    """The epochs that a run was to train when it began, and those to which it was extended since."""
    ends = ends_of((resumed or {}).get("identity", {}).get("epochs", config.epochs))
    if config.epochs == ends[-1]:
        return ends
    if config.extend and config.epochs > ends[-1]:
        return [*ends, config.epochs]
    return [config.epochs]  # which the comparison with the checkpoint refuses


def _teacher(materials: Materials, planner: Planner) -> tuple[Plan, Costs | None, Teacher]:
    """What is kept of the teacher, from which costs, and what serves its outputs."""
    examples = planner.examples() if materials.images.cache.keeps_rows else {}
    if materials.resumed is not None:
        plan, costs = Plan.from_plain(materials.resumed.get("plan", [])), None
    else:
        plan, costs = materials.ranks.from_first(lambda: planner.plan(examples))
    capture = "eager" if isinstance(materials.paired.teacher, BlackBox) else materials.capture
    live = LiveTeacher(materials.paired, capture, fall_back=materials.config.capture == "auto")
    if not plan.kept:
        return plan, costs, Relay(materials.paired, live)
    columns = planner.columns.open(plan, examples or planner.examples())
    samples = materials.source.split.total
    return plan, costs, CachedTeacher(materials.paired, columns, samples, materials.device, live)


def _facts(materials: Materials) -> dict:
    """What decides the numbers beside the settings: a resumed run must meet the same teacher and images."""
    config, images, paired = materials.config, materials.images, materials.paired
    return {
        "teacher_fingerprint": fingerprint(paired.teacher) if config.has_teacher else None,
        "source": images.stream.choice.name,
        "images": images.source.split.identity(),
        "training_images": images.source.steps_per_epoch * config.batch_size,
        "classes": images.dataset.classes,
        "mean": list(images.dataset.mean),
        "std": list(images.dataset.std),
        "compiled": materials.capture in COMPILED,
        "fused_norms": paired.fuses_norms,
        "folded_teacher": paired.folded,
    }


def _layouts(
    materials: Materials, objectives: Objectives, groupings: list[list[list[int]]], teacher: Teacher
) -> list[Layout]:
    """How the ranks divide each stage; nothing for a process alone."""
    ranks, resumed = materials.ranks, materials.resumed or {}
    if ranks.size == 1:
        return []
    size, kept = resumed.get("layouts", [0, []])
    if size == ranks.size:
        return [Layout.from_plain(values) for values in kept]
    return measured_layouts(
        materials.paired,
        objectives,
        groupings,
        materials.source,
        ranks,
        columns=teacher.columns if isinstance(teacher, CachedTeacher) else {},
        live=isinstance(teacher, Relay),
        axis=materials.config.parallel,
        accumulate=materials.config.accumulate,
        capture=materials.capture,
    )
