import pytest
import torch
from torch import nn


class SmallNet(nn.Module):
    """Three named stages on small images and a classifier for ten classes."""

    def __init__(self, depth: int, seed: int, widths: tuple[int, ...] = (8, 16, 16), classes: int = 10) -> None:
        super().__init__()
        torch.manual_seed(seed)
        inside = 3
        for number, (width, stride) in enumerate(zip(widths, (1, 2, 2)), start=1):
            layers = []
            for place in range(depth):
                convolution = nn.Conv2d(inside, width, 3, stride if place == 0 else 1, 1, bias=False)
                layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
                inside = width
            self.add_module(f"layer{number}", nn.Sequential(*layers))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(inside, classes)

    def forward(self, x):
        return self.fc(self.pool(self.layer3(self.layer2(self.layer1(x)))).flatten(1))


@pytest.fixture(name="small_net")
def small_net_fixture():
    return SmallNet


def random_batch(seed: int, count: int = 8, size: int = 8, classes: int = 10):
    """Images and labels by seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator), torch.randint(
        0, classes, (count,), generator=generator
    )


@pytest.fixture(name="random_batch")
def random_batch_fixture():
    return random_batch


def settled(teacher: nn.Module) -> nn.Module:
    """In eval mode with batch-norm statistics of random images, as a trained teacher's."""
    with torch.no_grad():
        for seed in range(30):
            teacher.train()(random_batch(seed, 32)[0])
    return teacher.eval()


@pytest.fixture(name="settled")
def settled_fixture():
    return settled


@pytest.fixture
def engine_gradients():
    """Gradients of the engine's group steps on one batch, by the student's parameter names."""
    from stablekd_fast.data import Batch
    from stablekd_fast.engine.schedule import Optimizer
    from stablekd_fast.engine.stage import stage_steps
    from stablekd_fast.engine.step import Rates
    from stablekd_fast.objectives import Objectives, objective
    from stablekd_fast.teacher.live import Relay

    def take(paired, groups, images, labels) -> dict[str, torch.Tensor]:
        aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
        stage = stage_steps(paired, groups, aims, Optimizer(), rates=Rates.constant(0.01))
        stage.load(Relay(paired), Batch(torch.arange(len(images)), 0, images, labels))
        found = {}
        for step in stage.steps:
            outputs, gradients, _ = step.forward()
            step.backward(outputs, gradients)
            found |= {name: parameter.grad.clone() for name, parameter in step.parameters.items()}
        return found

    return take


@pytest.fixture(autouse=True)
def no_more_threads(one_thread):
    """One for all of these tests."""
