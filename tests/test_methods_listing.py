"""``hf-sage methods``: what it says of each method is what the method is."""

from __future__ import annotations

import inspect
import json
import re

import pytest

from hf_sage.benchmark.methods import listings, main
from hf_sage.methods import METHODS


def test_every_method_says_what_it_does_and_where_it_was_published(capsys):
    assert main(["--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(METHODS)
    for name, row in rows.items():
        method = METHODS[name]()
        assert len(row["summary"]) > 10, name
        assert row["paper"] or name == "erm", name
        assert row["arxiv"] is None or re.fullmatch(r"\d{4}\.\d{5}", row["arxiv"]), name
        assert not re.search(r"arXiv|\d{4}", row["summary"]), name  # the citation was understood
        assert (row["forwards"], row["backwards"]) == (method.forwards, method.backwards), name
        assert set(row["needs"]) == method.needs, name
        assert list(row["hyperparameters"]) == list(inspect.signature(METHODS[name]).parameters), name


def test_defaults_are_those_of_the_builder():
    rows = {row.name: row for row in listings()}
    assert rows["gsam"].hyperparameters == {"rho": 0.05, "alpha": 0.4}
    assert (rows["sam"].paper, rows["sam"].arxiv) == ("Foret et al. 2021", "2010.01412")
    assert rows["align_sam"].needs == ("auxiliary",)
    assert rows["sam"].cost == "2 F + 2 B"
    assert rows["align_sam"].cost == "2.01 F + 2.01 B + 2.02 (F + B)ₐ"
    assert rows["x_sam"].cost == "3.67 F + 5.33 B"


def test_the_table_has_a_row_for_each_method_named(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["gsam", "vasso"]) == 0
    text = capsys.readouterr().out
    assert "alpha=0.4" in text
    assert "2309.15639" in text
    assert "sagm" not in text


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="look_sam"):
        main(["lookahead_sam"])
