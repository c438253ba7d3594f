"""The page of options says what the settings say, and every option on it is taken as it stands there."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest

from stablekd_fast import cli
from stablekd_fast.cli.spelling import underscored

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "options.md"
ROW = re.compile(r"^\| `--(?P<name>[\w.-]+)` \| .*? \| `?(?P<default>.*?)`? \| ", re.MULTILINE)
NEEDED = {"plan": ["--teacher", "resnet56", "--student", "resnet20"]}


@pytest.fixture
def make_options():
    return runpy.run_path(str(ROOT / "docs" / "make_options.py"))


def test_the_page_is_up_to_date(make_options):
    assert make_options["filled"](PAGE.read_text()) == PAGE.read_text(), "Run `python docs/make_options.py`."
    losses = PAGE.with_name("objectives.md").read_text()
    assert make_options["filled"](losses, make_options["OF_LOSSES"]) == losses, "Run `python docs/make_options.py`."


def test_a_stale_table_is_noticed(make_options):
    page = PAGE.read_text()
    for old, new in (
        ("| `0.02` |", "| `0.03` |"),
        ("Steps of each training.", "Steps."),
        ("| `--seed` |", "| `--sed` |"),
    ):
        assert page.count(old) >= 1
        assert make_options["filled"](page.replace(old, new)) == page


def test_a_field_that_is_left_out_or_shown_twice_or_unknown_is_an_error(make_options):
    page = PAGE.read_text()
    for fields in (
        "steps seeds probes",
        "steps seeds probes probe_batches seeds",
        "steps seeds probes probe_batches sed",
    ):
        with pytest.raises(ValueError, match="exactly one table"):
            make_options["filled"](page.replace("steps seeds probes probe_batches -->", f"{fields} -->"))


def test_a_field_without_a_docstring_is_an_error(make_options):
    """A class from a file, as its docstrings are read from the source."""
    assert make_options["docstrings"](Described) == {"told": "What it means."}
    with pytest.raises(ValueError, match="Described.untold has no docstring"):
        make_options["table"](Described, ["untold"])


@dataclasses.dataclass
class Described:
    told: int = 0
    """What
    it means."""
    untold: int = 1


def test_the_example_of_a_file_is_taken(tmp_path):
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "run.yaml").write_text(example)
    parser, commands = cli._parser()
    settings = parser.parse_args(["distill", "--config", str(tmp_path / "run.yaml"), "--epochs", "12"]).distill
    settings = commands["distill"].instantiate(settings)
    assert settings.epochs == 12 and settings.stages[1].optimizer.lr == 0.002


def test_every_option_is_taken_with_its_default():
    parser, _ = cli._parser()
    sections = re.split(r"^## `stablekd (\w+)`$", PAGE.read_text(), flags=re.MULTILINE)
    for command, text in zip(["distill", *sections[1::2]], sections[::2]):
        rows = [row.groupdict() for row in ROW.finditer(text) if row["default"] not in ("required", "its defaults")]
        assert len(rows) > 3, command
        for row in rows:
            words = [command, *NEEDED.get(command, []), f"--{row['name']}={row['default']}"]
            parser.parse_args([underscored(word) for word in words])
