"""Every cell of a report against the events that it tells of. All values differ, so that none can stand for another."""

import re
from html.parser import HTMLParser

import pytest

from stablekd_fast.report import write_report


class Cells(HTMLParser):
    """By heading the tables as lists of rows of texts, and the pairs of its lists."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.pairs = {}, {}
        self.heading, self._into, self._key = "", None, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag in ("h2", "h3", "td", "th", "dt", "dd"):
            self._into = ""
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        if tag == "br" and self._into is not None:
            self._into += "\n"

    def handle_data(self, data):
        if self._into is not None:
            self._into += data

    def handle_endtag(self, tag):
        if tag in ("h2", "h3"):
            self.heading = self._into
        elif tag in ("td", "th"):
            self.tables[self.heading][-1].append(self._into)
        elif tag == "dt":
            self._key = self._into
        elif tag == "dd":
            self.pairs.setdefault(self.heading, {})[self._key] = self._into
        if tag in ("h2", "h3", "td", "th", "dt", "dd"):
            self._into = None


def events(method, seed, **config):
    """Two merges, at steps 12 and 30 of 40; 8 steps are an epoch."""
    names = ["1|2|3", "1+2|3", "1+2+3"]
    found = [
        {"kind": "run_start", "step": 0, "method": method, "seed": seed, "steps_per_epoch": 8,
         "config": {"method": method, "seed": seed, "out": f"out{seed}", "epochs": 5.0, "lr": 0.25, **config},
         "machine": {"cpu": f"processor {seed}", "cores": 2, "memory_bytes": 3 * 2**30}, "versions": {"torch": "2.9"}},
    ]  # fmt: skip
    for stage, (first, last) in enumerate(((0, 12), (12, 30), (30, 40))):
        found.append({"kind": "stage_start", "step": first, "stage": stage, "name": names[stage], "first_step": first,
                      "last_step": last, "groups": []})  # fmt: skip
        found.append(
            {"kind": "train", "step": last, "epoch": last / 8, "losses": {names[stage].split("|")[0]: 1.0 + stage}}
        )
        found.append(
            {"kind": "evaluate", "step": last, "epoch": last / 8, "split": "validation", "accuracy": 0.1 * (stage + 1)}
        )
    for stage, (step, end, recovered) in enumerate(((12, 30, 7), (30, 40, None)), 1):
        found.append({"kind": "merge", "step": end, "merge_step": step, "stage": stage, "merged": ["1+2"],
                      "exposure_gap": {"layer2": 1.5 + stage, "logits": 2.25 + stage},
                      "loss_at_merge": {"1+2": 0.125 * stage, "3": 0.375 * stage},
                      "max_output_difference": 0.0009765625 * stage, "steps_until_recovered": recovered})  # fmt: skip
    return found


def run(method, seed, accuracy, **more):
    return {"method": method, "seed": seed, "accuracy": accuracy, "top5": 0.99, "epochs": 5.0, "steps": 40,
            "images_per_second": 1000.0 + 2 * seed, "wall_seconds": 60.0 * (seed + 1), **more}  # fmt: skip


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    path = tmp_path_factory.mktemp("cells") / "report.html"
    runs = [run("stablekd", 0, 0.5), run("stablekd", 1, 0.6), run("kd", 2, 0.4)]
    logs = {
        "stablekd, seed 0": events("stablekd", 0, batch_size=64, ema=None),
        "stablekd, seed 1": events("stablekd", 1, batch_size=64, ema=0.5),
        "kd, seed 2": events("kd", 2, batch_size=32, ema=0.5),
    }
    write_report(path, runs, logs, "Three runs", baseline="kd")
    return Cells(path.read_text())


def test_accuracies(cells):
    header, *rows = cells.tables["Accuracy"]
    assert header == ["method", "runs", "accuracy %", "vs kd", "range %", "images/s", "time"]
    found = {row[0]: row[1:] for row in rows}
    assert found["stablekd"] == ["2", "55.00 ± 7.07", "+15.00", "50.0–60.0", "1,001", "1 min 30 s"]
    assert found["kd"] == ["1", "40.00", "", "40.0–40.0", "1,004", "3 min 00 s"]


def test_merges(cells):
    header, *rows = cells.tables["Merges"]
    assert header == ["run", "epoch", "groups", "exposure gap", "loss at merge", "recovered after", "output difference"]
    first = ["1.50", "1|2|3 → 1+2|3", "layer2: ×2.50\nlogits: ×3.25", "1+2: 0.125\n3: 0.375", "7 steps", "0.000976562"]
    second = [
        "3.75",
        "1+2|3 → 1+2+3",
        "layer2: ×3.50\nlogits: ×4.25",
        "1+2: 0.25\n3: 0.75",
        "not within the stage",
        "0.00195312",
    ]
    labels = ["stablekd, seed 0", "stablekd, seed 1", "kd, seed 2"]
    assert rows == [[label, *row] for label in labels for row in (first, second)]


def test_settings_are_shared_where_all_runs_have_them(cells):
    assert cells.pairs["Shared by all runs"] == {"epochs": "5", "lr": "0.25"}
    header, *rows = cells.tables["Where runs differ"]
    assert header == ["method", "seeds", "batch_size", "ema"]
    assert rows == [["stablekd", "0", "64", "–"], ["stablekd", "1", "64", "0.5"], ["kd", "2", "32", "0.5"]]


def test_where_it_ran(cells):
    machine = {"cpu": "processor 0 / processor 1 / processor 2", "cores": "2", "memory": "3.0 GiB"}
    assert cells.pairs["Machine"] == machine
    assert cells.pairs["Versions"] == {"torch": "2.9"}


def test_a_page_has_no_section_without_content(tmp_path):
    write_report(
        tmp_path / "a.html",
        [],
        {"a": [{"kind": "evaluate", "step": 1, "epoch": 0.1, "split": "test", "accuracy": 0.2}]},
        "Nothing",
    )
    text = (tmp_path / "a.html").read_text()
    assert "No run has finished yet." in text
    assert re.findall("<h2>(.*?)</h2>", text) == []
