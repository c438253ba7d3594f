"""The package's public names are where it says, for Python and for checkers of types alike."""

import ast
from pathlib import Path

import stablekd_fast


def test_every_public_name_can_be_imported():
    for name in stablekd_fast.__all__:
        assert getattr(stablekd_fast, name) is not None


def test_the_stub_says_the_same():
    stub = ast.parse(Path(stablekd_fast.__file__).with_suffix(".pyi").read_text())
    imported = {
        name.asname: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert imported == stablekd_fast._HOMES
    assert {*imported, "__version__"} == set(stablekd_fast.__all__)
