"""Regression guard: compares the ratios of fresh results with the stored ones; times are not compared.

    python bench/table.py --run --results /tmp/fresh
    python bench/guard.py /tmp/fresh

Each JSON file of the folder is compared with the one of its name in bench/results: the numbers whose names
begin with `ratio` or hold `share_of`, which are ours / peer, or ours / limit of that machine in that run. One
that is lower by more than 15%, or is gone, is a regression, and so is a `max_abs_diff` over 1e-5 that was
below it. One line each, then exit status 1; 2 where nothing could be compared; else 0.
"""

import argparse
import sys
from pathlib import Path

from common import ROOT

from support.files import InputError, read_json

SAME_WORK = 1e-5  # the largest difference between two sides that do the same
TOLERANCE = 0.15  # share of a ratio that may be lost


def ratios(result, path=""):
    """{place: number} of what is compared, from nested dicts and lists; rows are named by their batch."""
    if isinstance(result, list):
        items = [(f"batch {row['batch']}", row) for row in result if isinstance(row, dict) and "batch" in row]
    else:
        items = result.items()
    numbers = {}
    for name, value in items:
        place = f"{path} {name}".strip()
        if name.endswith("_spread"):
            continue
        if isinstance(value, (dict, list)):
            numbers |= ratios(value, place)
        elif name.startswith("ratio") or "share_of" in name:
            numbers[place] = value
    return numbers


def regressions(fresh, stored):
    """A line for each ratio that fell by more than TOLERANCE, is gone, or is no number."""
    now = ratios(fresh)
    lines = []
    for place, before in ratios(stored).items():
        if place not in now:
            lines.append(f"{place}: {before:.3g} before, missing now")
        elif not now[place] >= before * (1 - TOLERANCE):  # a NaN is no pass
            change = now[place] / before - 1
            lines.append(f"{place}: {before:.3g} before, {now[place]:.3g} now ({change:+.0%})")
    before = stored.get("max_abs_diff", 1.0)
    after = fresh.get("max_abs_diff", 0.0)
    if before <= SAME_WORK and not after <= SAME_WORK:
        lines.append(f"max_abs_diff: {before:.1e} before, {after:.1e} now: no longer the same work")
    return lines


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("fresh", type=Path, help="folder of JSON files")
    parser.add_argument("--stored", type=Path, default=ROOT / "bench/results")
    options = parser.parse_args(argv)
    count = 0
    lines = []
    try:
        for path in sorted(options.fresh.glob("*.json")):
            if (options.stored / path.name).exists():
                stored = read_json(options.stored / path.name)
                count += len(ratios(stored))
                lines += [f"{path.stem}: {line}" for line in regressions(read_json(path), stored)]
    except InputError as error:
        parser.error(str(error))
    if not count:
        parser.error(f"{options.fresh}: nothing in it that could be compared")
    for line in lines:
        print(line)
    print(f"{count} ratios compared, {len(lines)} regressions", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
