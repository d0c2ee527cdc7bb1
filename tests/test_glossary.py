"""The glossary of docs/TOUR.md explains every name that the stages log, once, and quotes the lines that compute it."""

import inspect
import re

import pytest
from command_line import rows
from test_docs import cells, read, resolve

import c2f
from support.options import build_parser

GLOSSARY = read("docs/TOUR.md").partition("## The metrics")[2]
HEADINGS = ["metric", "what it is, its unit", "healthy", "when it is not", "line"]


def entries():
    """The rows of all tables, five cells each."""
    tables = [cells(line) for line in GLOSSARY.splitlines() if line.startswith("|")]
    return [row for row in tables if row != HEADINGS and set(row[0]) != {"-"}]


def names():
    return [row[0].strip("`") for row in entries()]


@pytest.fixture(scope="module")
def log(run_stage, tmp_path_factory):
    """The lines of metrics.jsonl of every stage that trains. With a clip range of 0 every ratio but 1 is clipped, which
    warns from step 5 on."""
    folder = tmp_path_factory.mktemp("glossary")
    for stage in ("reward", "sft", "plus", "coarse"):
        result = run_stage(stage, folder, "--second-score", "judge:length", "--clip", "0")
        assert (result.code, result.err) == (0, "")
    return rows(folder)


def test_the_names_are_those_that_the_stages_log_each_once(log):
    logged = set()
    for row in log:
        held_out = row.pop("held_out", {})
        logged |= row.keys() | {f"held_out/{name}" for name in held_out}
    assert sorted(names()) == sorted(logged - {"stage", "step"})


@pytest.mark.parametrize("row", entries(), ids=names())
def test_the_functions_hold_the_lines_that_are_quoted_and_one_of_them_names_the_metric(row):
    assert len(row) == len(HEADINGS) and all(row)
    name = row[0].strip("`").rpartition("/")[2]
    quotes = re.findall("`([^`]+)`: `([^`]+)`", row[-1])
    assert row[-1] == "; ".join(f"`{function}`: `{expression}`" for function, expression in quotes)
    matches = []
    for function, expression in quotes:
        lines = inspect.getsource(resolve(function)).splitlines()
        quoted = [line for line in lines if expression in line]
        assert quoted, (function, expression)
        matches += [line for line in quoted if re.search(rf"\b{name}\b", line)]
    assert matches


def test_the_options_are_there():
    known = set(build_parser(c2f.Options, "c2f.py", "", "")._option_string_actions)
    assert set(re.findall(r"--[a-z][a-z-]*", GLOSSARY)) <= known
