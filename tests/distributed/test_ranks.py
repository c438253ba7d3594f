"""Several real processes as one run, on Gloo: forked, but for the one job that torchrun starts anew."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from stablekd_fast.distributed import ranks as ranks_module
from stablekd_fast.distributed.ranks import RESTARTS, Ranks
from stablekd_fast.engine.checkpoint import load_tensors
from stablekd_fast.errors import RankError


def events(out: Path, kind: str) -> list[dict]:
    return [event for event in map(json.loads, (out / "events.jsonl").open()) if event["kind"] == kind]


def assert_same_bits(first: Path, second: Path) -> None:
    for name in ("checkpoint.safetensors", "student.safetensors"):
        a, b = load_tensors(first / name)[0], load_tensors(second / name)[0]
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == [], name
    losses = [[(event["step"], event["losses"]) for event in events(out, "train")] for out in (first, second)]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def whole(launch, tmp_path_factory):
    """Where one process trained the blocks, and nothing disturbed it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    launch.finished(launch.alone("train", out, "blocks"))
    return out


@pytest.fixture(scope="module")
def merged(launch, tmp_path_factory):
    """Where two ranks trained the blocks and merged them, and nothing disturbed them."""
    out = tmp_path_factory.mktemp("merged") / "out"
    launch.finished(*launch.together(2, "stablekd", out, "blocks"))
    return out


def test_blocks_on_several_ranks_train_to_the_bits_of_one_process(launch, whole, tmp_path):
    """The live teacher's activations are passed on from rank to rank."""
    for ranks in (2, 4):
        out = tmp_path / f"on{ranks}"
        launch.finished(*launch.together(ranks, "train", out, "blocks"))
        assert_same_bits(whole, out)
        (report,) = events(out, "ranks")
        assert report["mesh"] == {"blocks": ranks, "data": 1}
        assert sorted(name for row in report["ranks"] for name in row["groups"]) == ["1", "2", "3", "4"]
        assert all(row["gradient_bytes"] == 0 and row["predicted_ms"] > 0 for row in report["ranks"])


def test_ranks_fill_one_cache_that_any_number_of_ranks_can_use(launch, tmp_path):
    rows = tmp_path / "rows"
    launch.finished(*launch.together(2, "cached", tmp_path / "on2", rows))
    stored = events(tmp_path / "on2", "cache")[0]["rows"]
    assert set(stored.values()) == {320 * 2}, "each column is whole, though each rank stored a part"
    launch.finished(*launch.together(4, "cached", tmp_path / "on4", rows))
    launch.finished(launch.alone("cached", tmp_path / "one", rows))
    for out in (tmp_path / "on4", tmp_path / "one"):
        assert events(out, "cache")[0]["live_batches"] == 0
        assert_same_bits(tmp_path / "on2", out)


@pytest.mark.parametrize("cached", [True, False])
def test_images_are_made_where_they_are_needed(launch, tmp_path, cached):
    """The rank that trains the first block makes them; the teacher's outputs come from rows, or from that rank."""
    rows = tmp_path / "rows" if cached else ""
    if cached:
        launch.finished(*launch.together(2, "counted", tmp_path / "filling", rows))
    output = launch.finished(*launch.together(2, "counted", tmp_path / "out", rows))
    made = [int(line.split()[2]) for line in sorted(output.splitlines()) if line.startswith("MADE")]
    (report,) = events(tmp_path / "out", "ranks")
    first = ["1" in row["groups"] for row in report["ranks"]].index(True)
    assert made[first] >= 60 and made[1 - first] < 20, (
        "60 steps; a few batches for the student's batch norms, and for exposure"
    )


def test_ranks_divide_the_cores_that_they_share(launch):
    found = {}
    for line in launch.finished(*launch.together(2, "cores")).splitlines():
        if line.startswith("CORES"):
            rank, *cores = line.split()[1:]
            found[int(rank)] = [set(side.split()) for side in " ".join(cores).split("->")]
    (all_cores, first), (_, second) = found[0], found[1]
    if len(all_cores) == 1:
        assert first == second == all_cores
    else:
        assert first and second and not first & second and first | second == all_cores


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_images_on_several_ranks_agree_with_whole_batches(launch, ranks):
    """Batch norms are synchronised or frozen. In float32 trajectories part by themselves: one step is compared."""
    output = launch.finished(*launch.together(ranks, "data"))
    lines = [line.split()[1:] for line in output.splitlines() if line.startswith("APART")]
    assert len(lines) == 8
    for dtype, norms, *numbers in lines:
        apart, moved, statistics, losses = map(float, numbers)
        bound = {"torch.float64": 1e-9, "torch.float32": 1e-5}[dtype]
        assert moved > 1e-3
        assert max(apart, statistics) <= bound and losses <= 1e-5, (dtype, norms, numbers)  # losses are kept in float32


def test_a_contrast_on_two_ranks_is_that_of_whole_batches(launch):
    output = launch.finished(*launch.together(2, "contrast"))
    lines = [line.split()[1:] for line in output.splitlines() if line.startswith("APART")]
    assert len(lines) == 2
    assert all(float(apart) < 1e-12 and int(count) == 36 for apart, count in lines), "3 batches of 12 on each rank"


def test_a_run_that_contrasts_on_two_ranks_remembers_what_one_process_does(launch, tmp_path):
    """The teacher's embeddings do not depend on the student; 60 steps of 32 images fill the queue nearly."""
    launch.finished(*launch.together(2, "ckd", tmp_path / "two"))
    launch.finished(launch.alone("ckd", tmp_path / "one"))
    two, one = (load_tensors(tmp_path / name / "checkpoint.safetensors")[0] for name in ("two", "one"))
    assert one["auxiliary/contrast.count"] == two["auxiliary/contrast.count"] == 60 * 32
    assert one["auxiliary/contrast.kept"].norm(dim=1).gt(0.9).sum() == 60 * 32
    torch.testing.assert_close(two["auxiliary/contrast.kept"], one["auxiliary/contrast.kept"], rtol=1e-4, atol=1e-5)
    assert events(tmp_path / "two", "ranks")[0]["mesh"] == {"blocks": 1, "data": 2}


def test_a_run_goes_on_with_another_number_of_ranks(launch, whole, tmp_path):
    """Two ranks are lost, then one goes on and is lost as well, then four go on. Ranks divide blocks alone, so that the
    bits do not depend on them."""
    log = tmp_path / "broken" / "events.jsonl"
    lose(launch.together(2, "train", tmp_path / "broken", "blocks"), log, 10)
    lose([launch.alone("resume", tmp_path / "broken")], log, 30)
    launch.finished(*launch.together(4, "resume", tmp_path / "broken"))
    assert_same_bits(whole, tmp_path / "broken")


def test_merged_stages_divide_images(merged):
    apart, together = events(merged, "ranks")
    assert apart["mesh"] == {"blocks": 2, "data": 1} and together["mesh"] == {"blocks": 1, "data": 2}
    assert all(row["gradient_bytes"] == 0 for row in apart["ranks"])
    student = load_tensors(merged / "checkpoint.safetensors")[0]
    trained = sum(
        t.nbytes for name, t in student.items() if name.startswith("student/") and name.endswith(("weight", "bias"))
    )
    assert all(row["gradient_bytes"] == trained + 4 * (1 + 3) for row in together["ranks"]), (
        "every gradient once a step, the loss, and the power of three targets"
    )


def test_a_rank_with_other_settings_is_refused_with_the_difference(launch, tmp_path):
    for process in launch.together(2, "different", tmp_path / "out"):
        output, _ = process.communicate(timeout=120)
        assert process.returncode != 0
        assert "Rank 0 and rank 1 differ" in output and "batch_size: 32 and 16" in output and "seed: 0 and 1" in output
    assert not (tmp_path / "out").exists()


def test_a_rank_with_another_teacher_is_refused_before_rows_are_stored(launch, tmp_path):
    processes = launch.together(2, "other weights", tmp_path / "out", tmp_path / "rows")
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode for process in processes)
    assert all("Rank 0 and rank 1 differ (teacher_fingerprint: " in output for output in outputs), outputs
    assert not (tmp_path / "rows").exists() and not (tmp_path / "out").exists()


def test_a_rank_that_hangs_is_named_within_the_timeout(launch, tmp_path):
    waiting, hanging = launch.together(2, "hanging", tmp_path / "out")
    try:
        output, _ = waiting.communicate(timeout=120)
    finally:
        hanging.kill()
        hanging.communicate()
    assert "Missing: rank 1, last heard of at step " in output, output


@pytest.mark.parametrize("how", ["between gradients", "in a norm"])
def test_a_rank_that_hangs_in_a_group_of_the_mesh_is_named_within_the_timeout(launch, how):
    """The timeout is 6 seconds: groups of a mesh must have it too, and every exchange must name who is missing."""
    processes = launch.together(4, "parting", how)
    try:
        output, _ = processes[2].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    (line,) = [line for line in output.splitlines() if line.startswith("ENDED")]
    _, seconds, kind, text = line.split(maxsplit=3)
    assert kind == "RankError" and 5 < float(seconds) < 20
    assert "Missing: rank 3, last heard of" in text and "rank 0" not in text, "the others are not in the group"
    assert "timeout 6 s" in text


def lose(processes, log: Path, step: int) -> None:
    """SIGKILL them all once the training of so many steps was logged."""
    while last_step(log) < step:
        assert not any(process.poll() is not None for process in processes), [one.said() for one in processes]
        time.sleep(0.02)
    for process in processes:
        process.kill()
    assert [process.wait() for process in processes] == [-signal.SIGKILL] * len(processes)


def last_step(log: Path) -> int:
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return max((event["step"] for event in map(json.loads, lines) if event["kind"] == "train"), default=0)


def kill_a_rank(process, after: float, out: Path) -> None:
    """SIGKILL one of the training processes so many seconds after a first step was logged since now."""
    began, log = time.time(), out / "events.jsonl"
    while not log.exists() or log.stat().st_mtime < began:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    time.sleep(after)
    while not (workers := workers_of(process.pid)):  # torchrun may just be starting them anew
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.kill(workers[-1], signal.SIGKILL)


def workers_of(agent: int) -> list[int]:
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    lines = {int(child): Path(f"/proc/{child}/cmdline") for child in children}
    return [child for child, line in lines.items() if line.exists() and b"worker.py" in line.read_bytes()]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_job_that_loses_ranks_ends_as_an_undisturbed_one(launch, merged, tmp_path, kills):
    job = launch.torchrun(2, "stablekd", tmp_path / "killed", "blocks", restarts=kills)
    generator = torch.Generator().manual_seed(kills)
    for _ in range(kills):
        kill_a_rank(job, 0.5 * torch.rand((), generator=generator).item(), tmp_path / "killed")
    launch.finished(job)
    assert_same_bits(merged, tmp_path / "killed")


@pytest.mark.parametrize("told, restarted", [(None, False), ("0", False), ("1", True), ("3", True)])
def test_a_process_was_restarted_if_torchrun_counts_more_than_none(monkeypatch, told, restarted):
    monkeypatch.delenv(RESTARTS, raising=False)
    if told is not None:
        monkeypatch.setenv(RESTARTS, told)
    assert Ranks().restarted == restarted


@pytest.mark.parametrize("rank, cores", [(0, [4, 5]), (1, [6, 7, 9])])
def test_cores_that_this_process_may_use_are_divided(monkeypatch, rank, cores):
    """Two ranks of a machine with five cores of ten: 0 stands for the process itself, 1 would be another."""
    bound = []
    monkeypatch.setattr(os, "sched_getaffinity", {0: {9, 4, 5, 6, 7}, 1: set(range(10))}.__getitem__)
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cores: bound.append(cores))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    both = SimpleNamespace(rank=rank, all_gather=lambda value: [value, value])
    ranks_module._divide_cores(both, torch.device("cpu"))
    assert bound and all(taken == cores for taken in bound)


@pytest.mark.parametrize("parallel", ["blocks", pytest.param("data", marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_ends_all_after_the_same_step(launch, whole, tmp_path, parallel):
    """Without an agent that would pass it on; ranks that train different blocks do not meet in every step."""
    out = tmp_path / "out"
    if parallel == "data":
        whole = tmp_path / "whole"
        launch.finished(*launch.together(2, "slow", whole, parallel))
    first, second = launch.together(2, "slow", out, parallel)
    until = time.time() + 120
    while not (out / "events.jsonl").exists() or not events(out, "train"):
        assert time.time() < until
        time.sleep(0.02)
    second.send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [128 + signal.SIGTERM] * 2, said
    step = events(out, "checkpoint")[-1]["step"]
    assert all(f"Ended by SIGTERM after step {step} of" in words for words in said)
    launch.finished(*launch.together(2, "slow", out, parallel, "resume"))
    for name in ("checkpoint.safetensors", "student.safetensors"):
        a, b = load_tensors(whole / name)[0], load_tensors(out / name)[0]
        assert [key for key in a if not torch.equal(a[key], b[key])] == [], name


@pytest.mark.parametrize("word", ["say_where", "name_once", "named"])
def test_who_keeps_the_words_of_all_and_is_killed_is_missed_in_a_sentence(word):
    """The first process holds the store: another finds the connection broken where it leaves or looks for a word."""
    told, telling = multiprocessing.Pipe()
    server = multiprocessing.get_context("fork").Process(target=keep_words, args=(telling,))
    server.start()
    store = dist.TCPStore("localhost", told.recv(), is_master=False)
    ranks = Ranks(1, 2, timeout=1.0, _store=store)
    ranks.name_once("stop", [3, 15])
    assert ranks.named("stop") == [3, 15] and ranks.named("nothing") is None
    os.kill(server.pid, signal.SIGKILL)
    server.join()
    said = {
        "say_where": ranks.say_where,
        "name_once": lambda: ranks.name_once("other", 1),
        "named": lambda: ranks.named("other"),
    }
    with pytest.raises(RankError, match="Rank 1 waited in vain at .*, where ranks leave word for each other"):
        for _ in range(3):  # the first word may still go out
            said[word]()


def keep_words(pipe):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    time.sleep(60)
