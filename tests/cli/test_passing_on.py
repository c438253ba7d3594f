"""What is typed reaches what is called: each setting and each option, at a value that is not its default."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from stablekd_fast import __version__, cli
from stablekd_fast.cache.settings import CacheSettings
from stablekd_fast.cli import bench as bench_module
from stablekd_fast.cli.benches import BENCHES
from stablekd_fast.config import DistillConfig
from stablekd_fast.data import open_dataset
from stablekd_fast.data.augmentation import AugmentSettings, CropSettings, EvaluationSettings
from stablekd_fast.diagnose.settings import NOT_USED, Probing
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.errors import ConfigError, StableKDError
from stablekd_fast.run.builders import eval_source
from stablekd_fast.run.distiller import Distiller

OTHER = {
    "data": "d", "teacher": "resnet8", "teacher_weights": "t.pt",
    "teacher_mean": [0.5, 0.25, 0.125], "teacher_std": [0.25, 0.5, 0.75],
    "teacher_image_size": 40, "student": "resnet14",
    "student_weights": "s.pt",
    "head": "embedding", "method": "kd", "recipe": "paper", "epochs": 3.5, "subset": 70.0, "subset_seed": 4,
    "validation": 0.25, "batch_size": 24, "image_size": 48, "views": 3, "jitter": 0.3, "mix": "cutmix",
    "mix_alpha": 0.7, "mean": [0.25, 0.5, 0.5], "std": [0.5, 0.25, 0.25], "flip": True, "crop": CropSettings(padding=3),
    "augment": AugmentSettings(operations=2, erasing=0.5), "interpolation": "bicubic",
    "evaluation": EvaluationSettings(resize=70, crop=60),
    "scaled_decode": True, "seed": 11, "view_seed": 12, "cuts": ["a", "b"], "blocks": 5, "bridge": "pca",
    "align": "ends", "copy_classifier": False, "feature": "cosine", "logits": "dkd", "precision": "bf16",
    "capture": "eager", "deterministic": True, "fuse_norms": "off", "fold_teacher": "on", "ema": 0.75, "bn_images": 100,
    "accumulate": 3, "parallel": "data", "sync_norms": True, "timeout": 5.5, "device": "cpu", "source": "torchvision",
    "workers": 5, "prefetch": 6, "on_bad_image": "skip", "evaluate_every": 0.5, "checkpoint_every": 9, "log_every": 8,
    "out": "o", "resume": True, "extend": True, "feature_options": {"weight": 0.5},
    "logits_options": {"temperature": 2.0}, "auxiliary": "fitnet", "auxiliary_options": {"cut": 2},
    "optimizer": Optimizer(name="sgd", lr=0.125, clip=1.5), "cache": CacheSettings(plan="all", directory="rows"),
    "stages": None, "synthesis": "fast-dfkd", "synthesis_options": {"steps": 2},
}  # fmt: skip
"""A value of each setting of a run; `stages` are typed in YAML only (`test_stages_can_be_given_in_yaml`)."""


def words_of(name, value):
    """How a setting is typed."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, dict):
        return [f"{option}.{key}={item}" for key, item in value.items()]
    if dataclasses.is_dataclass(value):
        default = type(value)()
        return [
            f"{option}.{field.name}={getattr(value, field.name)}"
            for field in dataclasses.fields(value)
            if getattr(value, field.name) != getattr(default, field.name)
        ]
    if isinstance(value, list):
        return [f"{option}={json.dumps(value)}"]
    return [f"{option}={str(value).lower() if isinstance(value, bool) else value}"]


def called(monkeypatch, place, result=None):
    """The calls of a function that is replaced: positional and named arguments."""
    calls = []
    monkeypatch.setattr(place, lambda *given, **named: (calls.append((given, named)), result)[1])
    return calls


class Made:
    """In place of a run: its settings."""

    ranks = SimpleNamespace(is_first=False)

    def __init__(self, config):
        made.append(config)

    def run(self):
        return None

    def build_cache(self):
        return {}


made = []


@pytest.fixture
def configs(monkeypatch):
    made.clear()
    monkeypatch.setattr("stablekd_fast.run.distiller.Distiller", Made)
    return made


@pytest.mark.parametrize("command", [["distill"], ["cache", "build"]], ids=" ".join)
def test_every_setting_of_a_run_is_passed_on(configs, command):
    fields = {field.name: field for field in dataclasses.fields(DistillConfig)}
    assert OTHER.keys() == fields.keys(), "give the new setting a value here"
    assert cli.main(command) == 0
    assert configs == [DistillConfig()]
    typed = [word for name, value in OTHER.items() if value is not None for word in words_of(name, value)]
    for name, value in OTHER.items():
        assert value != getattr(DistillConfig(), name) or name == "stages", name
    assert cli.main([*command, *typed]) == 0
    for name, value in OTHER.items():
        assert getattr(configs[1], name) == value, name


_MEASURED = dict.fromkeys(("entanglement", "snr", "cosine", "curvature", "drift"))
DIAGNOSED = SimpleNamespace(
    summary=SimpleNamespace(
        blocks=[{"block": 0, "snr_gain": None, "end to end": _MEASURED, "decomposed": _MEASURED}], cuts=[{"cut": "a"}]
    ),
    verdict=SimpleNamespace(headline="Yes.", why=["Because."], cuts="These.", how_long="Long."),
)


def test_every_setting_of_a_diagnosis_is_passed_on(monkeypatch):
    calls = called(monkeypatch, "stablekd_fast.diagnose.diagnosis.diagnose", DIAGNOSED)
    probing = {field.name: field.default for field in dataclasses.fields(Probing)}
    changed = {name: value + 1 if isinstance(value, (int, float)) else value for name, value in probing.items()}
    settings = {name: value for name, value in OTHER.items() if name not in NOT_USED and value is not None}
    typed = [word for name, value in {**settings, **changed, "out": "there"}.items() for word in words_of(name, value)]
    assert cli.main(["diagnose", *typed]) == 0
    [((config, given), named)] = calls
    assert named == {"out": "there"} and dataclasses.asdict(given) == changed
    for name, value in settings.items():
        assert name == "out" or getattr(config, name) == value, name


def test_a_diagnosis_says_where_it_is(monkeypatch, capsys, tmp_path):
    settings = tmp_path / "a.yaml"
    settings.write_text("batch_size: 24\n")
    calls = called(monkeypatch, "stablekd_fast.diagnose.diagnosis.diagnose", DIAGNOSED)
    assert cli.main(["diagnose", "--config", str(settings), "--out", "there"]) == 0
    assert calls[0][0][0].batch_size == 24
    printed = capsys.readouterr().out
    for text in ("Yes.", "Because.", "These.", "Long.", "Rows and plots: there"):
        assert text in printed


def test_what_is_evaluated_is_passed_on(monkeypatch, capsys):
    @dataclasses.dataclass
    class Reached:
        accuracy: float = 0.5
        ranking: None = None

    calls = called(monkeypatch, "stablekd_fast.run.exported.evaluate_file", Reached())
    assert cli.main(["evaluate", "w"]) == 0
    options = ["--data", "d", "--model", "m", "--split", "train", "--device", "cpu"]
    assert cli.main(["evaluate", "w", *options]) == 0
    assert [(str(given[0]), named) for given, named in calls] == [
        ("w", {"model": None, "data": None, "split": "test", "device": "auto"}),
        ("w", {"model": "m", "data": "d", "split": "train", "device": "cpu"}),
    ]
    assert "w on the train split" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["evaluate", "w", "--split", "other"]) == 2


def test_what_is_probed_is_passed_on(monkeypatch):
    calls = called(monkeypatch, "stablekd_fast.run.exported.probe_file", [{"probe": "knn"}])
    assert cli.main(["evaluate", "w", "--probe", "linear"]) == 0
    options = ["--data", "d", "--model", "m", "--split", "train", "--device", "cpu", "--probe-images", "7"]
    assert cli.main(["evaluate", "w", *options, "--probe", "knn,linear"]) == 0
    assert [(str(path), probes, named) for (path, probes), named in calls] == [
        ("w", ["linear"], {"images": None, "model": None, "data": None, "split": "test", "device": "auto"}),
        ("w", ["knn", "linear"], {"images": 7, "model": "m", "data": "d", "split": "train", "device": "cpu"}),
    ]


def test_a_demo_is_what_was_asked_for(monkeypatch):
    calls = called(monkeypatch, "stablekd_fast.run.demo.run_demo")
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--out", "o", "--data", "digits", "--seeds", "7", "--device", "cpu"]) == 0
    assert [(str(given[0]), named) for given, named in calls] == [
        ("demo", {"data": "fashion-mnist-small", "seeds": 3, "device": "auto"}),
        ("o", {"data": "digits", "seeds": 7, "device": "cpu"}),
    ]


BENCHED = {
    "kernels": ("operators.kernels.run_kernels", ["--ops", "kd_loss,rows", "--device", "cuda", "--no-compile",
                "--quick", "--threads", "3"], ["cuda", False, True, ["kd_loss", "rows"], 3]),
    "cache": ("runs.cache.run_cache", ["--directory", "there", "--quick"], ["there", True]),
    "teacher": ("runs.teacher.run_teacher", ["--directory", "there", "--small", "s", "--large", "l"],
                ["there", "s", "l"]),
    "step": ("runs.step.run_step", ["--directory", "there", "--small", "s", "--large", "l", "--no-compile"],
             ["there", "s", "l", False]),
    "plan": ("runs.plan.run_plan", ["--directory", "there", "--data", "d"], ["there", "d"]),
    "loader": ("runs.loader.run_loader", ["--small", "s", "--large", "l", "--batch-size", "65", "--workers", "9"],
               ["s", "l", 65, 9]),
    "dropin": ("runs.dropin.run_dropin", ["--directory", "there", "--data", "d", "--quick"], ["there", "d", True]),
    "own-loop": ("runs.own_loop.run_own_loop", ["--directory", "there", "--data", "d", "--quick"],
                 ["there", "d", True]),
}  # fmt: skip
"""By bench what runs it, what is typed, and what it must be given."""


def test_a_bench_shows_each_case_as_it_is_done(monkeypatch):
    measured = SimpleNamespace(rows=[], tables={}, settings={}, origin={}, refused=[])
    for name, (place, typed, _) in BENCHED.items():
        calls = called(monkeypatch, f"stablekd_fast.bench.{place}", measured)
        assert cli.main(["bench", name, *typed]) == 0
        assert any(callable(value) for value in [*calls[0][0], *calls[0][1].values()]), name


def test_every_option_of_every_command_says_what_it_is_for():
    """Commands whose options are settings take their words from these, and only for their help."""
    _, commands = cli._parser()
    for name in commands.keys() - {"distill", "plan", "diagnose", "cache build"}:
        for action in commands[name]._actions:
            assert action.help or not action.option_strings, f"{name} {action.option_strings[0]}"


def test_that_an_earlier_bench_ran_elsewhere_is_said_beside_the_results(monkeypatch, tmp_path, capsys):
    measured = SimpleNamespace(rows=[], tables={}, settings={}, origin={}, refused=[])
    called(monkeypatch, "stablekd_fast.bench.runs.cache.run_cache", measured)
    earlier = tmp_path / "earlier.json"
    assert cli.main(["bench", "cache", "--rounds", "5", "--json", str(earlier)]) == 0
    assert cli.main(["bench", "cache", "--rounds", "5", "--against", str(earlier)]) == 0
    assert capsys.readouterr().err == ""
    content = json.loads(earlier.read_text())
    content["settings"]["rounds"] = 4
    earlier.write_text(json.dumps(content))
    assert cli.main(["bench", "cache", "--rounds", "5", "--against", str(earlier)]) == 0
    written = capsys.readouterr()
    assert f"The run in {earlier} differs: " in written.err and "differs" not in written.out


NEEDED = {"plan": ["--data", "d"], "teacher": ["--small", "s"], "step": ["--small", "s"]}


def flattened(value):
    """All that is in arguments, those that are settings included; paths as texts."""
    if isinstance(value, (tuple, set)):
        return [inner for item in value for inner in flattened(item)]
    if isinstance(value, dict):
        return flattened(tuple(value.values()))
    if dataclasses.is_dataclass(value):
        return flattened(tuple(vars(value).values()))
    return [value if isinstance(value, (list, bool, int, float, type(None))) else str(value)]


@pytest.mark.parametrize("name", BENCHED)
def test_every_option_of_a_bench_is_passed_on(monkeypatch, name):
    place, typed, expected = BENCHED[name]
    measured = SimpleNamespace(rows=[], tables={}, settings={}, origin={}, refused=[])
    calls = called(monkeypatch, f"stablekd_fast.bench.{place}", measured)
    assert cli.main(["bench", name, *typed, "--rounds", "77"]) == 0
    assert cli.main(["bench", name, *NEEDED.get(name, [])]) == 0
    found = flattened(calls[0])
    for value in [*expected, 77]:
        assert value in found, value
    defaults = flattened(calls[1])
    assert BENCHES[name].rounds in defaults and 77 not in defaults


@pytest.mark.parametrize(
    "typed, trace", [(["--profile"], None), (["--trace", "t"], "t"), (["--profile", "--trace", "t"], "t")]
)
def test_a_step_is_profiled_instead_where_that_is_asked_for(monkeypatch, typed, trace):
    measured = SimpleNamespace(rows=[], tables={}, settings={}, origin={}, refused=[])
    calls = called(monkeypatch, "stablekd_fast.bench.runs.profile.profile_steps", measured)
    monkeypatch.setattr("stablekd_fast.bench.runs.step.run_step", None)
    assert cli.main(["bench", "step", "--small", "s", *typed]) == 0
    assert flattened(calls[0])[-1] == trace


@pytest.mark.parametrize("typed", [["--aot"], ["--every-variant"]])
def test_kernels_are_proved_instead_where_that_is_asked_for(monkeypatch, typed):
    proof = SimpleNamespace(compiled=[], moved=[], faults=["one"])
    calls = called(monkeypatch, "stablekd_fast.bench.operators.proof.prove", proof)
    for table in ("kernel_table", "traffic_table"):
        called(monkeypatch, f"stablekd_fast.bench.operators.proof.{table}", "a table")
    assert cli.main(["bench", "kernels", *typed, "--ops", "rows"]) == 1
    assert calls == [((["rows"], "--every-variant" in typed), {})]


def test_a_bench_records_what_changes_it(monkeypatch):
    asked = BENCHES["loader"].parser().parse_args(["--small=folder/s", "--workers=3", "--json=j", "--rounds=2"])
    found = bench_module._settings("loader", asked)
    assert found["command"] == "stablekd bench loader --small s --workers 3 --rounds 2" and found["rounds"] == 2
    asked = BENCHES["kernels"].parser().parse_args(["--no_compile", "--quick"])
    assert bench_module._settings("kernels", asked)["command"] == "stablekd bench kernels --no-compile --quick"


def test_exit_codes_and_where_errors_go(monkeypatch, capsys):
    def raising(error):
        def run(options):
            raise error

        return run

    assert cli.main([]) == 2
    assert cli.main(["distill", "--epohcs", "3"]) == 2
    printed = capsys.readouterr()
    assert "epochs" in printed.err and "epohcs" not in printed.out
    monkeypatch.setitem(cli.RUN, "demo", raising(StableKDError("It cannot be.")))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr() == ("", "stablekd: It cannot be.\n")
    monkeypatch.setitem(cli.RUN, "demo", raising(KeyboardInterrupt()))
    assert cli.main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code in (0, None) and __version__ in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(cli, "given_up", lambda: True)
    monkeypatch.setattr(cli, "_leave", lambda code: 100 + code)
    monkeypatch.setitem(cli.RUN, "demo", raising(StableKDError("A rank is lost.")))
    assert cli.main(["demo"]) == 102, "what waits for a device that hangs is left at once"


def test_commands_that_need_a_choice_say_so(capsys):
    for command in ("cache", "bench"):
        assert cli.main([command]) == 2
    assert cli.main(["cache", "gc", "there"]) == 2
    assert "Nothing was named to delete" in capsys.readouterr().err
    for command in ("info", "verify", "gc"):
        assert cli.main(["cache", command]) == 2
        assert "directory" in capsys.readouterr().err


@pytest.mark.parametrize("size", [None, 48])
def test_images_are_evaluated_at_the_size_that_was_asked_for(tmp_path, size):
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(5):
                Image.new("RGB", (100, 90)).save(tmp_path / part / name / f"{number}.png")
    dataset = open_dataset(tmp_path, image_size=size)
    config = DistillConfig(data=str(tmp_path), student="resnet8", method="ce", image_size=size, batch_size=2)
    whole = list(eval_source(dataset, dataset.test, config).batches())
    assert [tuple(batch.pixels.shape) for batch in whole] == [(n, 3, size or 224, size or 224) for n in (4, 4, 2)]
    parts = [list(eval_source(dataset, dataset.test, config, rank, 3).batches()) for rank in range(3)]
    assert sorted(torch.cat([one.sample_ids for part in parts for one in part]).tolist()) == list(range(10))
    config.evaluation.crop, config.evaluation.resize = 40, 50
    (first, *_) = eval_source(dataset, dataset.test, config).batches()
    assert first.pixels.shape[2:] == (40, 40)
    other = DistillConfig(data=str(tmp_path), student="resnet8", method="ce", image_size=32, batch_size=2)
    with pytest.raises(ConfigError, match="image_size=32 was given, but .* opened with images of"):
        _ = Distiller(other, dataset=dataset).materials
