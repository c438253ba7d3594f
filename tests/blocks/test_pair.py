import pytest
import torch
from torch import nn

from stablekd_fast.blocks import describe_blocks, pair_blocks
from stablekd_fast.errors import CutError

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def convnet(widths: tuple[int, ...], depth: int = 1, classes: int = 5) -> nn.Sequential:
    """A stage per width, each halving the size, then pooling and classifier."""
    layers: list[nn.Module] = []
    for i, (inside, width) in enumerate(zip((3, *widths), widths)):
        convs = [nn.Conv2d(inside, width, 3, stride=2 if i else 1, padding=1), nn.ReLU()]
        for _ in range(depth - 1):
            convs += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        layers.append(nn.Sequential(*convs))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def test_automatic_cuts_are_where_the_size_changes():
    paired = pair_blocks(convnet((4, 8, 16), 3), convnet((4, 8, 16)), IMAGES)
    assert [(cut.teacher, cut.student) for cut in paired.cuts] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert paired.bridges == [None] * 3
    assert len(paired) == 4


def test_a_block_of_little_cost_joins_the_next():
    teacher, student = convnet((4, 64, 64), 2), convnet((4, 64, 64))
    assert [cut.student for cut in pair_blocks(teacher, student, IMAGES).cuts] == ["1", "2"]


def test_blocks_are_balanced_when_their_number_is_given():
    def even(depth):
        convs = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth)]
        return nn.Sequential(nn.Conv2d(3, 8, 1), *convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    paired = pair_blocks(even(12), even(6), IMAGES, blocks=4)
    assert [(cut.teacher, cut.student) for cut in paired.cuts] == [("4", "2"), ("8", "4"), ("12", "6")]


def test_every_block_has_products_to_train_however_many_there_are():
    """A ReLU follows each product, so that cuts would fit before and behind it."""
    teacher, student = convnet((4, 8), 6), convnet((4, 8), 3)
    assert [len(pair_blocks(teacher, student, IMAGES, blocks=blocks)) for blocks in range(2, 8)] == list(range(2, 8))
    for block in pair_blocks(teacher, student, IMAGES, blocks=7).student_blocks:
        assert any(isinstance(module, (nn.Conv2d, nn.Linear)) for module in block.modules())
    with pytest.raises(CutError, match="8 blocks were asked for"):
        pair_blocks(teacher, student, IMAGES, blocks=8)


def test_student_parameters_are_shared_and_keep_their_names():
    student = convnet((4, 8, 16))
    names = list(student.state_dict())
    paired = pair_blocks(convnet((4, 8, 16), 2), student, IMAGES)
    with torch.no_grad():
        for block in paired.student_blocks:
            for parameter in block.parameters():
                parameter.fill_(0.5)
    assert list(student.state_dict()) == names
    assert all((value == 0.5).all() for value in student.state_dict().values())


def test_teacher_outputs_run_each_block_once_and_only_as_far_as_asked():
    paired = pair_blocks(convnet((4, 8, 16), 2), convnet((4, 8, 16)), IMAGES)
    calls = []
    for k, block in enumerate(paired.teacher_blocks):
        block.register_forward_hook(lambda *_, k=k: calls.append(k))
    assert list(paired.teacher_outputs(IMAGES, [0, 1])) == [0, 1]
    assert calls == [0, 1]
    assert torch.equal(paired.teacher_outputs(IMAGES)[3], paired.teacher(IMAGES))
    assert paired.teacher_outputs(IMAGES, []) == {}
    calls.clear()
    known = paired.teacher_outputs(IMAGES, [1])
    calls.clear()
    on = paired.teacher_outputs(IMAGES, [0, 2, 3], known)
    assert calls == [0, 2, 3]
    assert torch.equal(on[3], paired.teacher(IMAGES))


def test_bridges_stand_where_widths_differ():
    paired = pair_blocks(convnet((8, 16, 32), 2), convnet((4, 16, 16)), IMAGES)
    outputs = paired.teacher_outputs(IMAGES)
    assert paired.bridges[1] is None and paired.bridges[0] is not None
    assert [outputs[k].shape[1] for k in range(3)] == [4, 16, 16]


def test_description_adds_up():
    teacher, student = convnet((8, 16, 32), 2), convnet((4, 8, 16))
    paired = pair_blocks(teacher, student, IMAGES)
    rows = describe_blocks(paired)
    assert sum(row["student_parameters"] for row in rows) == sum(p.numel() for p in student.parameters())
    assert sum(row["teacher_parameters"] for row in rows) == sum(p.numel() for p in teacher.parameters())
    assert rows[0]["activation_bytes"] == 4 * 16 * 16 * 4
    assert rows[-1]["teacher_end"] == "logits"


def test_block_lists_by_hand():
    teacher, student = convnet((4, 8), 2).eval(), convnet((4, 8)).eval()
    parts = [[model[0], model[1:]] for model in (teacher, student)]
    paired = pair_blocks(teacher, student, IMAGES, teacher_blocks=parts[0], student_blocks=parts[1])
    x = IMAGES
    for block in paired.student_blocks:
        x = block(x)
    assert torch.equal(x, student(IMAGES))
    assert paired.cuts[0].student_shape == (4, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cuts": ["layer9"]}, "no such module.*Cuts near that name"),
        ({"cuts": ["1", "0"]}, "order of execution"),
        ({"cuts": [("0", "4")]}, r"Shapes differ at the cut '0' / '4'.*\[4, 16, 16\].*\[16\].*would do: 0.0, 0,"),
        ({"blocks": 1}, "at least 2"),
        ({"blocks": 40}, "40 blocks were asked for.*Ask for 4, or"),
        ({"teacher_blocks": [nn.Identity()]}, "give both"),
        ({"teacher_blocks": [nn.Identity()] * 2, "student_blocks": [nn.Identity()]}, "equally many"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(CutError, match=message):
        pair_blocks(convnet((4, 8, 16), 2), convnet((4, 8, 16)), IMAGES, **arguments)


def test_the_nearest_cut_names_are_offered():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1, self.layer2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 1)

        def forward(self, x):
            return self.layer2(self.layer1(x)).mean((2, 3))

    with pytest.raises(CutError, match="layer1"):
        pair_blocks(Named(), Named(), IMAGES, cuts=["layr1"])


def test_block_lists_that_do_not_compose_are_refused():
    teacher, student = convnet((4, 8)), convnet((4, 8))
    wrong = [student[0], nn.Sequential(student[1], nn.ReLU6(), *student[2:])]
    with torch.no_grad():
        student[1][0].bias.fill_(50.0)
    with pytest.raises(CutError, match="student's blocks do not compose"):
        pair_blocks(teacher, student, IMAGES, teacher_blocks=[teacher[0], teacher[1:]], student_blocks=wrong)


def test_a_parameter_in_two_blocks_is_refused_by_name():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.shared, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

        def forward(self, x):
            x = self.shared(self.stem(x)).relu()
            return self.head(self.shared(x).mean((2, 3)))

    with pytest.raises(CutError, match="'shared.weight' is used in blocks 0 and 1"):
        pair_blocks(Tied(), Tied(), IMAGES, cuts=["relu"])


def test_automatic_cuts_lie_outside_the_uses_of_a_shared_parameter():
    """Two stages of CoaT share their position encodings."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.Sequential(*convnet((4, 8, 8, 8))[:4])
            self.shared, self.head = nn.Parameter(torch.ones(8, 1, 1)), nn.Linear(8, 5)

        def forward(self, x):
            for number, stage in enumerate(self.stages):
                x = stage(x)
                x = x * self.shared if number in (1, 2) else x
            return self.head(x.mean((2, 3)))

    paired = pair_blocks(convnet((4, 8, 8, 8)), Tied(), torch.randn(4, 3, 32, 32))
    assert [cut.student_shape[1] for cut in paired.cuts] == [32, 16, 4]  # at 16 before the first use
    with pytest.raises(CutError, match="'shared' is used in blocks 0 and 1"):
        pair_blocks(convnet((4, 8, 8, 8)), Tied(), torch.randn(4, 3, 32, 32), [("1", "mul")])
