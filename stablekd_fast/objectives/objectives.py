"""The objectives of a run: which losses train the student, and where."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stablekd_fast.errors import ConfigError
from stablekd_fast.objectives.auxiliary import Auxiliary, Facts
from stablekd_fast.objectives.registry import AuxiliaryObjective, FeatureObjective, LogitObjective


@dataclass(frozen=True)
class Objectives:
    """The losses that train a student.

    `align`: at which cuts features are aligned, `none`, `ends` (a group's own end) or `all` (cuts inside merged
    groups too). `use_teacher_logits`, `use_labels`: what the head's loss takes. `auxiliary`: a further loss;
    `module` is what was made of it for this run. `head`: what the networks' last output is; a pair without a classifier
    has no loss of logits, and the auxiliary one reads its embedding, if any does.
    """

    feature: FeatureObjective
    logits: LogitObjective
    align: str
    use_teacher_logits: bool = True
    use_labels: bool = True
    head: str = "classifier"
    auxiliary: AuxiliaryObjective | None = None
    module: Auxiliary | None = None

    def made(self, facts: Facts, seed: int) -> Objectives:
        """Make the auxiliary loss, if there is one."""
        return self if self.auxiliary is None else replace(self, module=self.auxiliary.build(facts, seed))

    def without_auxiliary(self) -> Objectives:
        """The other losses alone: what is measured before the run must not change the auxiliary loss's memory."""
        return replace(self, auxiliary=None, module=None)

    @property
    def takes_any_width(self) -> bool:
        """Whether no loss at a cut needs the teacher's outputs in the student's width."""
        aligns_any = self.align == "none" or self.feature.any_width
        return aligns_any and (self.auxiliary is None or self.auxiliary.kind.any_width)

    @property
    def needs_cuts(self) -> bool:
        """Whether a loss reads outputs at cuts."""
        if self.auxiliary is None:
            return self.align != "none"
        own, some = self.auxiliary, 9  # asked as if there were so many cuts
        reads = own.kind.student_outputs(own.config, some) | own.kind.teacher_outputs(own.config, some)
        return self.align != "none" or reads - {some} != set()

    def aligned_cuts(self, group: list[int], cut_count: int) -> list[int]:
        """Return the cuts at which this group's features are aligned."""
        if self.align == "none":
            return []
        if self.head == "none":  # the last block ends in what no loss reads
            group = [block for block in group if block < cut_count]
        return [block for block in (group if self.align == "all" else group[-1:]) if block < cut_count]

    def helps(self, group: list[int], cut_count: int) -> bool:
        """Whether the auxiliary loss belongs to this group, which then has all that it reads of the student."""
        if self.auxiliary is None:
            return False
        own, config = self.auxiliary.kind, self.auxiliary.config
        reads = own.student_outputs(config, cut_count)
        starts = own.reads_input_gradient or own.second is not None
        return reads <= set(group) and (group[0] == 0 or not starts)

    def teacher_outputs(self, groups: list[list[int]], cut_count: int) -> set[int]:
        """Return the teacher's outputs that these groups read: a cut's number, or `cut_count` for the logits."""
        wanted = {cut for group in groups for cut in self.aligned_cuts(group, cut_count)}
        wanted |= {group[0] - 1 for group in groups if group[0] > 0}
        if self.auxiliary is not None and any(self.helps(group, cut_count) for group in groups):
            wanted |= self.auxiliary.kind.teacher_outputs(self.auxiliary.config, cut_count)
        has_head = any(cut_count in group for group in groups)
        return wanted | {cut_count} if has_head and self.use_teacher_logits else wanted

    def check(
        self, stages: list[list[list[int]]], cut_count: int, *, accumulate: int, ranks: int, mix: str | None
    ) -> list[str]:
        """Return in which stages the auxiliary loss rests, by sentences for the user.

        Raises ConfigError where it, or the loss at the head, cannot work at all: in no stage is there a group with all
        that it reads; it compares samples of a batch that is divided, among `accumulate` parts or `ranks` processes;
        or it needs a class for each image, where `mix` leaves none.
        """
        classes = [self.logits.name] if self.logits.needs_classes else []
        classes += [self.auxiliary.name] if self.auxiliary is not None and self.auxiliary.kind.needs_classes else []
        if classes and mix:
            raise ConfigError(f"{classes[-1]} needs one class for each image, which mix={mix} does not leave.")
        if self.auxiliary is not None and self.auxiliary.kind.needs_mix and not mix:
            raise ConfigError(f"{self.auxiliary.name} learns from mixed images; give mix=cutmix, or mixup.")
        relating = [self.logits.name] if self.logits.relates else []
        relating += [self.auxiliary.name] if self.auxiliary is not None and self.auxiliary.kind.relates else []
        if relating and accumulate > 1:
            raise ConfigError(
                f"{relating[-1]} compares the samples of a batch, which accumulate={accumulate} would divide; use "
                "accumulate=1."
            )
        gathers = self.auxiliary is not None and self.auxiliary.kind.gathers
        divided = relating[:-1] if gathers else relating
        if divided and ranks > 1:
            raise ConfigError(
                f"{divided[-1]} compares the samples of a batch, which {ranks} processes would divide; use one."
            )
        if self.auxiliary is None:
            return []
        if self.auxiliary.kind.learns and ranks > 1:
            raise ConfigError(
                f"{self.auxiliary.name} learns before the first step, which {ranks} processes would each "
                "do in their own way; use one."
            )
        rests = [not any(self.helps(group, cut_count) for group in groups) for groups in stages]
        if all(rests):
            raise ConfigError(
                f"{self.auxiliary.name} reads outputs of blocks that never train as one group in this run; merge them "
                "in a stage, or use a method that trains end to end."
            )
        if not any(rests):
            return []
        names = ", ".join(str(place + 1) for place, rest in enumerate(rests) if rest)
        return [f"{self.auxiliary.name} rests in stage {names}, whose groups do not hold all blocks that it reads."]
