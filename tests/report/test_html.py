import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from matplotlib import rcParams

from stablekd_fast.errors import StableKDError
from stablekd_fast.report import write_report, write_results, write_run_report
from stablekd_fast.report.history import History
from stablekd_fast.report.palette import block_colours, method_colours
from stablekd_fast.report.plots import last_block, mean_curve

VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Tags, ids, addresses and text; complains about tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.addresses, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.note(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.note(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def note(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "data", "xlink:href"):
                self.addresses.append(value)


@pytest.fixture(scope="module")
def written(comparison, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, *comparison, "Four methods & two seeds", baseline="kd")
    return path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_nothing_else(written):
    page = Page(written)
    assert not re.search(r"https?://|@import|//cdn", written)
    assert all(address.startswith("#") and address[1:] in page.ids for address in page.addresses)
    assert all(name in page.ids for name in re.findall(r"url\(#([^)]+)\)", written))
    assert len(page.ids) == len(set(page.ids)), "ids of different plots collide"
    assert "script" not in page.tags and page.tags.count("svg") == 3


def test_every_colour_is_defined_for_light_and_dark(written):
    used = set(re.findall(r"var\((--[\w-]+)\)", written))
    assert {"--method-0", "--method-3", "--block-0", "--block-3", "--grid"} <= used
    dark = "".join(re.findall(r"prefers-color-scheme: dark\) \{(.*?)\}\s*\}", written, re.DOTALL))
    for name in used:
        assert f"{name}:" in dark and written.count(f"{name}:") == 2, name
    assert not re.search(r"(stroke|fill): #0000", written), "a stand-in colour was left in a plot"


def test_the_page_tells_what_it_should(written, comparison):
    text = " ".join(Page(written).text)
    for run in comparison[0]:
        assert run["method"] in text
    shown = ("Four methods & two seeds", "vs kd", "1|2|3|4 → 1+2|3+4", "layer2: ×", "4, then 3+4, then 1+2+3+4",
             "optimizer.lr", "AMD EPYC 7B13", "8.0 GiB", "2.6.0+cpu", "validation accuracy",
             "training loss")  # fmt: skip
    for part in shown:
        assert part in text, part


def test_hostile_names_stay_text(tmp_path, made_up_run):
    name = "<script>alert('$x_1$')</script>&\"--><b>"
    run, events = made_up_run(name, 0)
    events[0]["config"] |= {"data": name, name: name}
    events[0]["machine"]["cpu"] = events[0]["versions"][name] = name
    events[1]["name"] = name
    for event in events:
        if event["kind"] == "train":
            event["losses"] = {name: 0.5, "{0}%s": 0.25}
    merge = {"kind": "merge", "step": 9, "stage": 0, "exposure_gap": {name: 1.0}, "loss_at_merge": {name: None},
             "max_output_difference": 1e-7, "steps_until_recovered": 3}  # fmt: skip
    write_report(tmp_path / "r.html", [run], {name: [*events, merge]}, name, baseline=name)
    page = Page((tmp_path / "r.html").read_text())
    assert "script" not in page.tags and "b" not in page.tags
    assert "".join(page.text).count(name) >= 8


def test_unfinished_broken_and_empty_runs_are_shown_too(tmp_path, made_up_run):
    _, events = made_up_run("stablekd", 0)
    for event in events:
        if event["kind"] == "train":
            event["losses"] = {key: None for key in event["losses"]}
    begun = [event for event in events if event["step"] <= 300]
    write_report(tmp_path / "r.html", [], {"begun": begun, "empty": [], "only started": begun[:1]}, "Unfinished")
    text = " ".join(Page((tmp_path / "r.html").read_text()).text)
    assert "No run has finished yet" in text and "over epochs" in text
    write_report(tmp_path / "r.html", [], {}, "Nothing")
    Page((tmp_path / "r.html").read_text())


def test_without_held_out_images_there_is_no_curve(tmp_path, made_up_run):
    run, events = made_up_run("kd", 0)
    events = [event for event in events if event.get("split") != "validation"]
    write_report(tmp_path / "r.html", [run], {"kd": events}, "No validation")
    assert "over epochs" not in (tmp_path / "r.html").read_text()


def test_an_unknown_baseline_writes_nothing(tmp_path, comparison):
    with pytest.raises(StableKDError, match="'none' is not among"):
        write_report(tmp_path / "r.html", *comparison, "Title", baseline="none")
    assert not list(tmp_path.iterdir())


def test_a_run_directory_gets_its_report(tmp_path, made_up_run):
    run, events = made_up_run("stablekd", 3)
    write_results(tmp_path / "results.json", [run])
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    write_run_report(tmp_path)
    text = " ".join(Page((tmp_path / "report.html").read_text()).text)
    assert "Distillation run: stablekd, seed 3" in text and "Merges" in text


def test_reporting_leaves_matplotlib_as_it_was(tmp_path, comparison):
    before = dict(rcParams)
    write_report(tmp_path / "r.html", *comparison, "Title")
    assert dict(rcParams) == before


def test_importing_the_report_imports_no_plotting():
    code = "import sys, stablekd_fast.report; assert not {'matplotlib', 'tensorboard'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_resumed_run_logged_twice_counts_once(made_up_run):
    _, events = made_up_run("stablekd", 0)
    again = [event for event in events if event["kind"] in ("stage_start", "evaluate")]
    once, twice = (History.from_events("run", logged) for logged in (events, events + again))
    assert twice.stages == once.stages and twice.evaluations == once.evaluations
    assert once.merge_epochs() == [208 / 78, 416 / 78]


def test_losses_belong_to_the_stage_that_trained_them(made_up_run):
    _, events = made_up_run("stablekd", 0, epochs=3, steps_per_epoch=20)
    curves = History.from_events("run", events).losses()
    assert list(curves) == [(0, "1"), (0, "2"), (0, "3"), (0, "4"), (1, "1+2"), (1, "3+4"), (2, "1+2+3+4")]
    assert [epoch for epoch, _ in curves[1, "3+4"]] == [2.0]


def test_the_mean_is_taken_where_all_runs_have_a_value():
    curves = [[(1, 0.2), (2, 0.4), (3, None)], [(1, 0.4), (2, 0.5), (3, 0.6), (4, 0.9)]]
    assert mean_curve(curves) == [(1, pytest.approx(0.3)), (2, pytest.approx(0.45))]
    assert mean_curve([]) == []


def test_a_group_has_the_colour_of_its_last_block():
    assert [last_block(name) for name in ("1", "1+2", "3+4+12", "all")] == [0, 1, 11, 0]


def test_a_known_method_has_one_colour_in_every_report():
    alone, among = (
        method_colours(["stablekd"]),
        method_colours(["mine", "ce", "stablekd", "kd", "kd+features", "blocks"]),
    )
    assert among[2] == alone[0] and len(set(among)) == 6


@pytest.mark.parametrize("pairs", [method_colours([*"abcdef"]), block_colours(1), block_colours(12)])
def test_colours_can_be_read_on_their_page(pairs):
    """Contrast of at least 3 to 1 with the page, as WCAG 2.1 asks of graphics (criterion 1.4.11)."""

    def luminance(colour):
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for light, dark in pairs:
        assert (luminance("#fcfcfb") + 0.05) / (luminance(light) + 0.05) >= 3
        assert (luminance(dark) + 0.05) / (luminance("#15181c") + 0.05) >= 3
    assert len(set(pairs)) == len(pairs)
