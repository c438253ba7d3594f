"""Configs that come from elsewhere: of another encoding, too large, or with aliases that multiply."""

import pytest

from stablekd_fast.cli import main
from stablekd_fast.cli.configs import LARGEST, MOST_VALUES, fault_of


def multiplied(doublings):
    """Lists of two, each of which stands for the one before twice."""
    return "\n".join(["l0: &l0 [1, 1]", *(f"l{k}: &l{k} [*l{k - 1}, *l{k - 1}]" for k in range(1, doublings))])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"data: \xff\xfe", "byte 6 is not UTF-8"),
        ("seed: 1\n".encode("utf-16"), "not UTF-8"),
        ("seed: 1\n".encode("utf-32-le"), "NUL character"),
        ("data: 'Gr\xfc\xdfe'".encode("latin-1"), "not UTF-8"),
        (b"#" * (LARGEST + 1), "larger than 1,048,576 bytes"),
        (multiplied(30).encode(), "aliases"),
        (b"a: &a {b: *a}", "aliases"),
        (b"&a [*a]", "aliases"),
    ],
)
@pytest.mark.parametrize("command", ["distill", "diagnose"])
def test_a_config_that_no_parser_should_read_is_refused(tmp_path, capsys, command, content, words):
    (tmp_path / "c.yaml").write_bytes(content)
    assert main([command, "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said and "c.yaml" in said and "Traceback" not in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"#" * LARGEST, b"\xef\xbb\xbfseed: 1", b"a: &a 1\nb: *a", b"a: [1,"])
def test_others_are_left_to_the_parser(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    assert fault_of(tmp_path / "c.yaml") is None


def test_values_are_counted_with_what_aliases_stand_for(tmp_path):
    whole, alias = f"[{', '.join('1' * 60_000)}]", tmp_path / "alias.yaml"
    alias.write_text(f"a: &a {whole}")
    assert MOST_VALUES == 100_000 and fault_of(alias) is None
    alias.write_text(f"a: &a {whole}\nb: *a")
    assert "aliases" in fault_of(alias)


@pytest.mark.parametrize("place", ["data", "student", "cache.directory", "out"])
def test_a_nul_in_a_setting_is_named(tmp_path, capsys, place):
    key, _, inner = place.partition(".")
    (tmp_path / "c.yaml").write_text(f'{key}: {{{inner}: "a\\0b"}}' if inner else f'{key}: "a\\0b"')
    assert main(["distill", "--config", str(tmp_path / "c.yaml")]) == 2
    assert f"stablekd: {place} holds a NUL character" in capsys.readouterr().err
