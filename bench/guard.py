"""Regression guard: compares the ratios of fresh results with the stored ones; times are not compared.

    python bench/table.py --run cpu --results /tmp/fresh
    python bench/guard.py /tmp/fresh

Takes JSON files or folders of them and looks each up by name under --stored (bench/results). Compared are the numbers
whose names begin with `ratio` or hold `share_of`: ours / peer, ours / limit of that machine in that run. One that is
lower than stored by more than --tolerance (a share of it), or is gone, is a regression, and so is a `max_abs_diff`
over 1e-5 that was below it. One line each, then exit status 1; 2 where nothing could be compared; else 0.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAME_WORK = 1e-5  # the largest difference between two sides that do the same


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


def regressions(fresh, stored, tolerance):
    """A line for each ratio that fell by more than `tolerance`, is gone, or is no number."""
    now = ratios(fresh)
    lines = []
    for place, before in ratios(stored).items():
        if place not in now:
            lines.append(f"{place}: {before:.3g} before, missing now")
        elif not now[place] >= before * (1 - tolerance):  # a NaN is no pass
            lines.append(f"{place}: {before:.3g} before, {now[place]:.3g} now ({now[place] / before - 1:+.0%})")
    before = stored.get("max_abs_diff", 1.0)
    after = fresh.get("max_abs_diff", 0.0)
    if before <= SAME_WORK and not after <= SAME_WORK:
        lines.append(f"max_abs_diff: {before:.1e} before, {after:.1e} now: no longer the same work")
    return lines


def pairs(paths, stored):
    """(name, fresh result, stored one) of each JSON file, and of those in folders. What cannot be compared gets a line.
    ValueError where a file is not JSON."""
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    for file in files:
        if not file.exists():
            print(f"{file.name}: no such file, not compared", file=sys.stderr)
        elif not (stored / file.name).exists():
            print(f"{file.name}: nothing stored, not compared", file=sys.stderr)
        else:
            try:
                yield file.stem, json.loads(file.read_text()), json.loads((stored / file.name).read_text())
            except ValueError as error:
                raise ValueError(f"{file.name}: not JSON: {error}") from None


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("fresh", nargs="+", type=Path, help="JSON files, or folders of them")
    add("--stored", type=Path, default=ROOT / "bench/results")
    add("--tolerance", type=float, default=0.15, help="share of a ratio that may be lost (default 0.15)")
    options = parser.parse_args(argv)
    if not 0 <= options.tolerance < 1:
        parser.error(f"--tolerance {options.tolerance}: a share, 0 or more and below 1")
    count = 0
    lines = []
    try:
        for name, fresh, stored in pairs(options.fresh, options.stored):
            count += len(ratios(stored))
            lines += [f"{name}: {line}" for line in regressions(fresh, stored, options.tolerance)]
    except ValueError as error:
        parser.error(str(error))
    for line in lines:
        print(line)
    if not count and not lines:
        parser.error("nothing could be compared")
    print(f"{count} ratios compared, {len(lines)} regressions", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
