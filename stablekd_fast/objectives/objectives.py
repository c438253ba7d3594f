"""The objectives of a run: which losses train the student, and where."""

from __future__ import annotations

from dataclasses import dataclass

from stablekd_fast.objectives.registry import FeatureObjective, LogitObjective


@dataclass(frozen=True)
class Objectives:
    """What the student is trained towards.

    `align`: at which cuts features are aligned, `none`, `ends` (a group's own end) or `all` (cuts inside merged
    groups too). `use_teacher_logits`, `use_labels`: what the head's loss takes.
    """

    feature: FeatureObjective
    logits: LogitObjective
    align: str
    use_teacher_logits: bool = True
    use_labels: bool = True

    def aligned_cuts(self, group: list[int], cut_count: int) -> list[int]:
        """Return the cuts at which this group's features are aligned."""
        if self.align == "none":
            return []
        return [block for block in (group if self.align == "all" else group[-1:]) if block < cut_count]

    def teacher_outputs(self, groups: list[list[int]], cut_count: int) -> set[int]:
        """Return the teacher's outputs that these groups read: a cut's number, or `cut_count` for the logits."""
        wanted = {cut for group in groups for cut in self.aligned_cuts(group, cut_count)}
        wanted |= {group[0] - 1 for group in groups if group[0] > 0}
        has_head = any(cut_count in group for group in groups)
        return wanted | {cut_count} if has_head and self.use_teacher_logits else wanted
