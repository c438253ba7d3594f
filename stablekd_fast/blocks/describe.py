"""The blocks of a pairing as rows of plain values."""

from __future__ import annotations

import math

from stablekd_fast.blocks.pair import PairedBlocks


def describe_blocks(paired: PairedBlocks, bytes_per_value: int = 4) -> list[dict]:
    """One row per block: where it ends, shapes per image, parameters, FLOPs per image, bridge, activation bytes.

    `activation_bytes` is the size of the teacher's (bridged) activation at the block's end for one image.
    """
    rows = []
    for k in range(len(paired)):
        cut = paired.cuts[k] if k < len(paired.cuts) else None
        bridge = paired.bridges[k] if cut else None
        rows.append(
            {
                "block": k,
                "teacher_end": cut.teacher if cut else "logits",
                "student_end": cut.student if cut else "logits",
                "teacher_shape": list(cut.teacher_shape) if cut else None,
                "student_shape": list(cut.student_shape) if cut else None,
                "teacher_parameters": sum(p.numel() for p in paired.teacher_blocks[k].parameters()),
                "student_parameters": sum(p.numel() for p in paired.student_blocks[k].parameters()),
                "teacher_flops": paired.teacher_flops[k],
                "student_flops": paired.student_flops[k],
                "bridge": bridge.extra_repr() if bridge else None,
                "activation_bytes": math.prod(cut.student_shape) * bytes_per_value if cut else None,
            }
        )
    return rows


def blocks_text(paired: PairedBlocks) -> str:
    """The rows of `describe_blocks` as a table in plain text: a line for each block, counted from 1, with shapes,
    parameters and FLOPs per image of teacher and student where these differ."""
    lines = [["block", "ends at", "shape", "bridge", "parameters", "FLOPs"]]
    for row in describe_blocks(paired):
        shapes = ["x".join(map(str, row[f"{side}_shape"] or [])) for side in ("teacher", "student")]
        ends = [row["teacher_end"], row["student_end"]]
        counts = [[f"{row[f'{side}_{what}']:,}" for side in ("teacher", "student")] for what in ("parameters", "flops")]
        both = [" -> ".join(dict.fromkeys(pair)) for pair in (ends, shapes, *counts)]
        lines.append([str(row["block"] + 1), *both[:2], row["bridge"] or "", *both[2:]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip() for line in lines)
