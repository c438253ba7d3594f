"""Graphs on the stand-in: what a failed capture leaves behind, and in which order groups exchange gradients."""

import pytest
import torch
from torch import nn

from stablekd_fast.bench.standin.device import Graph
from stablekd_fast.blocks import pair_blocks
from stablekd_fast.data import Batch
from stablekd_fast.distributed.layout import Averaging
from stablekd_fast.distributed.ranks import Ranks
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.engine.stage import stage_steps
from stablekd_fast.engine.step import Rates
from stablekd_fast.errors import CaptureError
from stablekd_fast.execution.capture import CompiledRunner, EagerRunner, make_runner
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.teacher.live import Relay

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


def waits():
    torch.cuda.synchronize()


def fails():
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def runs_out():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def is_interrupted():
    raise KeyboardInterrupt


def only_when_captured(stand, what):
    """A body that warms up well and does `what` while it is captured."""

    def body():
        if stand.capturing:
            what()

    return body


def net(depth: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    parts, inside = [], 3
    for width in (4, 8):
        layers = [nn.Conv2d(inside, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 3, 1, 1, bias=False)] * (depth - 1)
        parts.append(nn.Sequential(*layers))
        inside = width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def loaded_steps(groups, **options):
    """The steps of a stage with a batch in their inputs, on the CPU; the same weights and batch every time."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    paired = pair_blocks(net(2, 1).eval(), net(1, 2), images, ["0", "1"])
    aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
    nn.ModuleList(paired.student_blocks).train()
    steps = stage_steps(paired, groups, aims, Optimizer("sgd"), rates=Rates.constant(0.1), **options)
    steps.load(Relay(paired), Batch(torch.arange(8), 0, images, torch.randint(0, 10, (8,))))
    return steps


@pytest.mark.parametrize("device", [FIRST, SECOND])
@pytest.mark.parametrize("what", [waits, fails, runs_out])
def test_ten_failed_captures_leave_the_device_as_it_was_and_a_good_one_follows(gpu, what, device):
    """torch neither ends the pool of a capture that it cannot end, nor makes the stream before it current again."""
    for _ in range(10):
        body = only_when_captured(gpu, what)
        with pytest.raises((CaptureError, torch.OutOfMemoryError)):
            make_runner("cudagraph", [body, body], [], device, fall_back=False)
        assert gpu.sound, vars(gpu)
        with pytest.warns(RuntimeWarning, match="without a captured graph"):
            assert isinstance(make_runner("cudagraph", [body], [], device, fall_back=True), EagerRunner)
        assert gpu.sound and gpu.index == 0
    runner = make_runner("cudagraph", [lambda: 1, lambda: 2], [], device, fall_back=False)
    assert runner.run() == [1, 2]
    runner.close()
    assert gpu.sound


@pytest.mark.parametrize("error", [RuntimeError("operation would make the legacy stream depend"), None])
def test_a_capture_that_cannot_be_ended_gives_its_memory_back(gpu, error):
    gpu.capture_fails = lambda: error
    if error is not None:
        with pytest.raises(CaptureError, match="would make the legacy stream depend"):
            make_runner("cudagraph", [lambda: None], [], FIRST, fall_back=False)
    else:
        with pytest.raises(KeyboardInterrupt):
            make_runner("cudagraph", [only_when_captured(gpu, is_interrupted)], [], FIRST, fall_back=True)
    assert gpu.sound


def test_the_stand_in_without_recovery_is_broken(gpu):
    """What is recovered from is really there."""
    gpu.capture_fails = lambda: RuntimeError("no")
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), (0, 1), torch.cuda.Stream()):
        pass
    assert not gpu.sound and gpu.filling == {(0, 1)} and gpu.generators[0].capturing
    with pytest.raises(RuntimeError, match="captures_underway"):
        with torch.cuda.graph(torch.cuda.CUDAGraph(), (0, 2), torch.cuda.Stream()):
            pass


def test_memory_that_runs_out_in_a_capture_is_reported_as_such(gpu):
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        make_runner("cudagraph", [only_when_captured(gpu, runs_out)], [], FIRST, fall_back=False)


# Compiled steps in graphs.


@pytest.fixture(scope="module")
def compiler():
    """torch.compile, which from its first use on knows torch's functions by what they are: not those of a stand-in."""
    torch.compile(lambda x: torch.relu(x), backend="aot_eager")(torch.zeros(1))


def says_how_it_runs():
    """A body that returns 1 where it is what torch.compile made, and 0 where it runs as it was written."""

    def write(x):
        return x + (1 if torch.compiler.is_compiling() else 0)

    written, x = torch.compile(write, backend="aot_eager"), torch.zeros(1)
    return lambda: written(x)


def test_what_is_captured_of_a_compiled_step_is_what_torch_compile_made(compiler, gpu):
    """torch.compile steps aside where a dispatch mode watches: the graph would repeat the step as it was written."""
    for mode, compiled in (("cudagraph", 0.0), ("cudagraph+compile", 1.0)):
        runner = make_runner(mode, [says_how_it_runs()], [], FIRST, fall_back=False)
        assert runner.results[0].item() == compiled
        runner.close()
    assert gpu.sound


def test_a_compiled_step_that_cannot_be_captured_goes_on_compiled_or_is_refused(gpu):
    body = only_when_captured(gpu, fails)
    with pytest.raises(CaptureError, match="^the step cannot be captured: CUDA error: operation not permitted"):
        make_runner("cudagraph+compile", [body], [], FIRST, fall_back=False)
    with pytest.warns(RuntimeWarning, match="without a captured graph"):
        assert isinstance(make_runner("cudagraph+compile", [body], [], FIRST, fall_back=True), CompiledRunner)
    assert gpu.sound


def test_a_step_is_not_compiled_anew_while_it_is_captured(compiler, gpu):
    """Compiling waits for the device and allocates outside of the graph's pool."""
    written = torch.compile(lambda x: x * 2, backend="aot_eager", dynamic=False)
    body = only_when_captured(gpu, lambda: written(torch.zeros(5)))
    written(torch.zeros(3))
    with pytest.raises(CaptureError, match="the step cannot be captured: .*recompile"):
        make_runner("cudagraph+compile", [body], [], FIRST, fall_back=False)
    assert gpu.sound


def test_captured_compiled_steps_have_the_bits_of_compiled_ones(compiler, gpu, monkeypatch):
    """On the stand-in a captured step computes on the CPU, and a replay does again what was captured."""
    states = {}
    for mode in ("eager", "compile", "cudagraph+compile"):
        steps = loaded_steps([[0], [1], [2]], compiled=mode != "eager")
        monkeypatch.setattr(Graph, "replay", lambda graph, steps=steps: steps.run())
        steps.inputs.device = FIRST
        runner = steps.runner(mode)
        for _ in range(4 if mode == "cudagraph+compile" else 5):  # capturing is the first one
            runner.run()
        runner.close()
        states[mode] = [tensor.detach().clone() for tensor in steps.state()]
    same = [torch.equal(*both) for both in zip(states["compile"], states["cudagraph+compile"], strict=True)]
    assert all(same) and gpu.sound
    assert not all(torch.equal(*both) for both in zip(states["compile"], states["eager"], strict=True))


# Exchanges in graphs.


def captured_exchanges(gpu, groups, **options):
    """What one captured step of a stage exchanges, as (operation, stream, bytes), and the steps."""
    steps = loaded_steps(groups, averaging=Averaging(Ranks(0, 2), None, 2), **options)
    seen, note = [], gpu.note

    def noting(what, stream, *facts):
        if gpu.capturing and what in ("all_reduce", "all_gather"):
            seen.append((what, stream.number, facts[0]))
        note(what, stream, *facts)

    gpu.note = noting
    steps.inputs.device = FIRST  # whose streams are read; the tensors are on the CPU
    steps.runner("cudagraph").close()
    assert gpu.sound
    return seen, steps


def test_groups_of_a_step_exchange_their_gradients_at_once_and_on_one_stream(gpu):
    """A communicator that branches of a graph use side by side can hang, or give wrong sums."""
    seen, steps = captured_exchanges(gpu, [[0], [1], [2]])
    gradients = sum(p.nbytes for step in steps.steps for p in step.parameters.values())
    powers, step_s = seen
    assert powers[2] == 2 * 4, "the power of two targets"
    assert step_s == ("all_reduce", powers[1], gradients + 3 * 4), "all gradients, and a loss for each group"


def test_groups_that_synchronise_norms_come_one_after_the_other(gpu):
    seen, _ = captured_exchanges(gpu, [[0], [1], [2]], sync_norms=True)
    assert len({stream for _, stream, _ in seen}) == 1
    kinds = [what for what, *_ in seen]
    assert kinds.count("all_gather") == 2 and kinds[0] == kinds[-1] == "all_reduce"


def test_groups_that_exchange_nothing_run_side_by_side(gpu):
    streams = set()
    bodies = [lambda: streams.add(torch.cuda.current_stream().number) for _ in range(3)]
    make_runner("cudagraph", bodies, [], FIRST, fall_back=False).close()
    assert len(streams) == 3


def test_phases_wait_for_each_other(gpu):
    """Each phase forks from the first stream and joins it again, before the next one begins."""
    order = []

    def body(name):
        return lambda: order.append((name, torch.cuda.current_stream().number)) if gpu.capturing else None

    first = [body("a"), body("b")]
    make_runner("cudagraph", first, [], FIRST, fall_back=False, then=[[body("c")], [body("d"), body("e")]]).close()
    names, streams = zip(*order)
    assert names == ("a", "b", "c", "d", "e")
    main = streams[0]
    assert streams == (main, streams[1], main, main, streams[1]) and streams[1] != main
    waits = [entry for entry in gpu.log if entry[0] == "wait"][-4:]
    assert [(entry[1], entry[2].number) for entry in waits] == [
        (streams[1], main), (main, streams[1]), (streams[1], main), (main, streams[1]),
    ]  # fmt: skip


def test_a_graph_is_replayed_on_its_own_device(gpu):
    runner = make_runner("cudagraph", [lambda: None], [], SECOND, fall_back=False)
    seen = []
    gpu.note = lambda what, stream, *facts: seen.append((what, stream.device))
    runner.run()
    assert seen == [("replay", SECOND)] and gpu.index == 0
