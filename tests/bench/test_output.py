"""What every bench leaves behind: files, comparisons, a page. The rows are made up, so that every number is known."""

import csv
import json
import re
import subprocess

import pytest

from stablekd_fast.bench import output
from stablekd_fast.bench.against import compare, differences, fallen
from stablekd_fast.bench.output import by_case, cells_of, commit, document, read_json, write_csv, write_json
from stablekd_fast.bench.report import write_bench_report
from stablekd_fast.cli import main
from stablekd_fast.errors import StableKDError


def row(contender, seconds, role="rival", case="case <1>", **more):
    limited = {"limit": "floor", "limit_seconds": 0.5, "share_of_limit": 0.5 / seconds}
    times = {"median_seconds": seconds, "spread_seconds": 0.1, "ratio": 4.0 / seconds, "baseline": "plain"}
    return {"bench": "made up", "case": case, "contender": contender, "role": role, **times, **limited, **more}


@pytest.fixture
def rows():
    return [row("plain", 4.0), row("ours, fast", 1.0, "ours"), row("floor", 0.5, "limit")]


@pytest.fixture
def found(rows):
    more = [{**one, "case": "another"} for one in rows]
    tables = {"compiling & more": [{"contender": "x", "first_step_seconds": 1.5}]}
    return document({"rows": rows + more, "tables": tables}, {"command": "stablekd bench made-up", "seeds": [0, 1]})


def files(folder, **documents):
    for name, one in documents.items():
        write_json(folder / f"{name}.json", one)
    return [str(folder / f"{name}.json") for name in documents]


def test_ratios_are_compared_within_runs_and_times_between_them(rows):
    slower_machine = [{**one, "median_seconds": 3 * one["median_seconds"]} for one in rows]
    slower_machine[1]["ratio"] = 5.0
    plain, ours, _ = compare(rows, slower_machine)
    assert (plain["ratio_against"], plain["speed_against"]) == (1.0, 3.0)
    assert (ours["ratio_against"], ours["speed_against"]) == (0.8, 3.0)


def test_rows_are_matched_by_bench_case_and_contender(rows):
    for name in ("bench", "case", "contender"):
        (new,) = compare(rows[:1], [{**rows[0], name: "other"}])
        assert new["ratio_against"] is None and new["speed_against"] is None
    (other,) = compare(rows[:1], [{**rows[0], "baseline": "other"}])
    assert other["ratio_against"] is None and other["speed_against"] == 1.0


def test_only_what_is_ours_can_fall(rows):
    assert fallen(rows, 4.0) == [] and "ours, fast is at 4.00 times plain, below 4.1" in fallen(rows, 4.1)[0]
    then = [{**one, "ratio": 10 * one["ratio"]} for one in rows]
    assert len(fallen(compare(rows, then), 0.2)) == 1, "rivals may fall"
    assert fallen(compare(rows, then), 0.1) == []
    for nothing in (rows[:1], compare(rows, [])):
        with pytest.raises(StableKDError, match="No row can be held to --fail-below 0.5"):
            fallen(nothing, 0.5)


def test_differences_of_machine_versions_and_settings_are_named(found):
    then = json.loads(json.dumps(found))
    assert differences(found, then) == []
    then["machine"]["cpu"], then["versions"]["torch"], then["settings"]["commit"] = "abacus", "1.0", "another"
    told = differences(found, then)
    assert len(told) == 2 and "machine.cpu was abacus" in told[0] and "versions.torch was 1.0" in told[1]


def test_each_line_of_a_csv_stands_by_itself(found, tmp_path):
    write_csv(tmp_path / "rows.csv", found)
    with (tmp_path / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    for line in lines:
        assert line["machine.cpu"] == found["machine"]["cpu"] and line["versions.torch"] == found["versions"]["torch"]
        assert line["settings.seeds"] == "[0, 1]" and line["settings.commit"] == (commit() or "")


def test_the_commit_is_that_of_the_checkout_or_none(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    (tmp_path / "bench").mkdir()
    monkeypatch.setattr(output, "__file__", str(tmp_path / "bench" / "output.py"))
    assert commit() is None
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert commit() == head
    (tmp_path / "file").write_text("2")
    assert commit() == f"{head}-dirty"


def test_cells_say_which_limit_and_what_share(rows):
    assert cells_of(rows[1])["of limit"] == "50 % of floor" and cells_of(rows[2])["of limit"] == ""
    peak = row("peak", 1.0, "limit", limit="peak", flops=1e9, gflops_per_second=1.0)
    assert cells_of(peak)["of limit"] == "1 GFLOP/s" and cells_of(peak)["ratio"] == "", "its task is another"
    assert cells_of(row("slow", 1234.5))["ms"] == "1,234,500"


def test_a_page_needs_nothing_else_and_shows_every_case(found, tmp_path):
    found["rows"] = compare(found["rows"], [{**found["rows"][1], "ratio": 2.0}])
    write_bench_report(tmp_path / "page.html", found, ["machine.cpu was <abacus>, is x"])
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?://|<script|@import|<1>|<abacus>", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and text.count("<svg") == 2
    assert not re.search(r"(stroke|fill): #0000", text), "a stand-in colour was left in a plot"
    for name in set(re.findall(r"var\((--[\w-]+)\)", text)):
        assert text.count(f"{name}:") == 2, f"{name} has a colour for light and for dark"
    for part in ("case &lt;1&gt;", "ours, fast", "50 % of floor", "4.00×", "Compiling &amp; more", "2.00",
                 "stablekd bench made-up",
                 "Summary", found["versions"]["torch"], "&lt;abacus&gt;"):  # fmt: skip
        assert part in text, part


def test_a_file_is_shown_compared_and_made_a_page(found, tmp_path, capsys):
    then = json.loads(json.dumps(found))
    then["rows"][1]["ratio"] *= 2
    then["machine"]["cpu"] = found["machine"]["cpu"] = "abacus"
    then["versions"]["torch"] = "1.0"
    now, earlier = files(tmp_path, now=found, then=then)
    words = [
        "bench",
        "show",
        now,
        "--against",
        earlier,
        "--html",
        str(tmp_path / "page.html"),
        "--json",
        str(tmp_path / "kept.json"),
    ]
    assert main([*words, "--fail-below", "0.5"]) == 0
    shown = capsys.readouterr()
    assert "versions.torch was 1.0" in shown.err and "machine" not in shown.err, "the file's own machine, not this one"
    assert "now/then" in shown.out and "0.50" in shown.out
    assert read_json(tmp_path / "kept.json")["machine"]["cpu"] == "abacus"
    assert "abacus" in (tmp_path / "page.html").read_text()
    assert main([*words, "--fail-below", "0.51"]) == 1
    assert "case <1>: ours, fast is at 0.50 of its earlier ratio to plain" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{}", '{"rows": [{"bench": "x"}]}', '{"rows": 3}'])
def test_a_file_that_is_no_bench_file_is_refused(content, tmp_path, capsys):
    (tmp_path / "rows.json").write_text(content)
    assert main(["bench", "show", str(tmp_path / "rows.json")]) == 2
    assert "Give the file of an earlier --json" in capsys.readouterr().err


def test_tables_without_rows_make_a_page_and_no_csv(found, tmp_path):
    found["rows"] = []
    write_bench_report(tmp_path / "page.html", found)
    assert "first step seconds" in (tmp_path / "page.html").read_text()
    with pytest.raises(StableKDError, match="There are no rows"):
        write_csv(tmp_path / "rows.csv", found)
    assert not (tmp_path / "rows.csv").exists()


def test_rows_of_a_case_stay_together(rows):
    other = {**rows[0], "case": "another"}
    assert by_case([rows[0], other, rows[1]]) == [[rows[0], rows[1]], [other]]
