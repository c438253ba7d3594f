"""What a probe sees, against plain autograd in float64, and that it leaves no trace."""

import copy

import pytest
import torch
from torch.nn import functional as F

from stablekd_fast.diagnose.probe import Probe
from stablekd_fast.diagnose.settings import ARMS, DECOMPOSED, END_TO_END, Probing
from stablekd_fast.errors import ConfigError


@pytest.mark.parametrize("arm", ARMS)
def test_probes_leave_training_as_it_was_to_the_bit(twin, arm):
    ends = []
    for look in (True, False):
        both = twin(dropout=0.3)
        rows, _ = both.train(arm, look=look)
        assert len(rows) == (9 if look else 0)
        ends.append([*both.parts.paired.student.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*ends))


def test_decomposed_blocks_are_not_entangled_at_all(twin):
    rows, cuts = twin(dropout=0.3).train(DECOMPOSED)
    assert not cuts, "no cut lies inside a group"
    for row in rows:
        assert row["entanglement"] == 0.0 and row["own_change"] > 0
        assert row["drift"] in (None, 0.0)


def test_blocks_trained_end_to_end_are(twin):
    rows, cuts = twin().train(END_TO_END)
    for row in rows:
        assert row["entanglement"] > 0.001 and row["own_change"] > 0.001
        if row["step"] > 1:
            assert row["drift"] == 0 if row["block"] == 0 else row["drift"] > 0.001
    assert {cut["cut"] for cut in cuts} == {0, 1} and all(cut["entanglement"] > 0.001 for cut in cuts)


def begun(twin, arm=END_TO_END, **settings):
    """A probe on a student that has not trained, and its weights."""
    both = twin(**settings)
    paired = both.parts.paired
    paired.student.train()
    probe = Probe(paired, both.groups(arm), both.objectives, both.inputs)
    return both, probe, probe.weights()


def moved(probe, blocks, generator=None):
    """Take a step in these blocks."""
    generator = torch.Generator().manual_seed(3)
    for k in blocks:
        for parameter in probe.parameters[k]:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_a_block_among_frozen_ones_is_not_entangled(twin):
    _, probe, before = begun(twin)
    moved(probe, [1])
    rows, cuts = probe.look(0, before)
    assert rows[1]["entanglement"] == 0.0 and rows[1]["own_change"] > 0
    for k in (0, 2):
        assert rows[k]["own_change"] == 0.0 and rows[k]["entanglement"] > 0.001
    assert all(cut["entanglement"] > 0 for cut in cuts)


def test_a_step_that_moves_nothing_changes_nothing(twin):
    _, probe, before = begun(twin)
    rows, cuts = probe.look(0, before)
    for row in rows:
        assert row["entanglement"] == row["own_change"] == 0.0 and row["cosine"] == pytest.approx(1.0)
    assert all(cut["entanglement"] == 0.0 for cut in cuts)


def test_of_two_blocks_the_cut_takes_away_all_entanglement(twin):
    _, probe, before = begun(twin, cuts=["1"])
    moved(probe, [0, 1])
    rows, (cut,) = probe.look(0, before)
    assert cut["entanglement"] == sum(row["entanglement"] for row in rows) / 2


def test_figures_are_those_of_plain_autograd(twin):
    """Cross entropy alone, on the student as one network in float64: the bound is float32's rounding over a few
    layers."""
    options = {"kl_weight": 0.0}
    both, probe, before = begun(twin, align="ends", logits_options=options, copy_classifier=False)
    moved(probe, [0, 1, 2])
    after = probe.weights()
    rows, cuts = probe.look(4, before)  # of three probe batches the one at 4 mod 3
    student, owners = both.parts.paired.student, probe.parameters

    def gradients(updated, inputs):
        for k, own in enumerate(owners):
            for parameter, value in zip(own, (after if k in updated else before)[k]):
                parameter.data.copy_(value)
        plain = copy.deepcopy(student).double().train()
        names = {id(p): name for name, p in student.named_parameters()}
        twins = dict(plain.named_parameters())
        loss = F.cross_entropy(plain(inputs["images"].double()), inputs["labels"])
        found = torch.autograd.grad(loss, list(twins.values()))
        by_name = dict(zip(twins, found))
        return [torch.cat([by_name[names[id(p)]].flatten() for p in own]) for own in owners]

    batch = both.inputs[1]
    old, new = gradients((), batch), gradients((0, 1, 2), batch)
    for k, row in enumerate(rows):
        own = gradients((k,), batch)[k]
        move = torch.cat([(a - b).flatten().double() for a, b in zip(after[k], before[k])])
        assert row["entanglement"] == pytest.approx(((new[k] - own).norm() / old[k].norm()).item(), rel=1e-4)
        assert row["own_change"] == pytest.approx(((own - old[k]).norm() / old[k].norm()).item(), rel=1e-4)
        assert row["cosine"] == pytest.approx(F.cosine_similarity(new[k], old[k], 0).item(), rel=1e-4)
        assert row["curvature"] == pytest.approx((move @ (new[k] - old[k]) / (move @ move)).item(), rel=1e-3)
        each = torch.stack([gradients((), inputs)[k] for inputs in both.inputs])
        noise = each.var(0).sum()
        assert row["noise"] == pytest.approx(noise.item(), rel=1e-4)
        assert row["signal"] == pytest.approx((each.mean(0).square().sum() - noise / 3).item(), rel=1e-3)
    for cut in cuts:
        first, second = (0,) if cut["cut"] == 0 else (0, 1), (1, 2) if cut["cut"] == 0 else (2,)
        apart = [(gradients(first, batch) if k in first else gradients(second, batch))[k] for k in range(3)]
        taken = [((new[k] - apart[k]).norm() / old[k].norm()).item() for k in range(3)]
        assert cut["entanglement"] == pytest.approx(sum(taken) / 3, rel=1e-4)


def test_losses_are_those_of_training_and_of_the_student_s_own_chain(twin):
    _, probe, before = begun(twin, DECOMPOSED)
    rows, _ = probe.look(0, before)
    assert rows[0]["loss"] == rows[0]["composed_loss"]
    assert rows[1]["loss"] != rows[1]["composed_loss"]
    _, whole, before = begun(twin, END_TO_END)
    for alone, joined in zip(rows, whole.look(0, before)[0]):
        assert joined["composed_loss"] == joined["loss"] == pytest.approx(alone["composed_loss"], rel=1e-6)


def test_both_arms_start_alike_and_see_the_same_batches(twin):
    """With a learning rate of zero they stay alike."""
    both = twin(probing=Probing(steps=2, probes=2, probe_batches=2))
    both.parts.config.optimizer.lr = 0.0
    losses = {arm: [row["composed_loss"] for row in both.train(arm)[0]] for arm in ARMS}
    assert losses[END_TO_END] == pytest.approx(losses[DECOMPOSED], rel=1e-6)


def test_probe_batches_begin_epochs_after_the_training(twin):
    """Each epoch is a new order and a new view of the images: the batches are independent draws."""
    both = twin()
    source, steps = both.parts.source, both.probing.steps
    after = [step for step in range(steps, steps + 100) if step % source.steps_per_epoch == 0][:3]
    for inputs, step in zip(both.inputs, after, strict=True):
        assert torch.equal(inputs["images"], next(source.batches(step, step + 1)).images)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"seeds": 1}, "an interval over seeds needs at least 2"),
        ({"probes": 1}, "needs at least 2"),
        ({"probe_batches": 1}, "noise between batches needs at least 2"),
        ({"steps": 5, "probes": 6}, "give fewer"),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Probing(**settings)


def test_steps_looked_at_are_spread_evenly():
    assert Probing(steps=200).at == list(range(10, 200, 20))
    assert Probing(steps=3, probes=3).at == [0, 1, 2]
