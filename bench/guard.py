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


def ratios(result, path=""):
    """{place: number} of what is compared, from nested dicts and lists; rows are named by their batch."""
    found = {}
    items = result.items() if isinstance(result, dict) else []
    if isinstance(result, list):
        items = [
            (f"batch {r['batch']}" if isinstance(r, dict) and "batch" in r else i, r) for i, r in enumerate(result)
        ]
    for name, value in items:
        place = f"{path} {name}".strip()
        if isinstance(value, (dict, list)):
            if not str(name).endswith("_spread"):
                found |= ratios(value, place)
        elif str(name).startswith("ratio") or "share_of" in str(name):
            found[place] = value
    return found


def regressions(fresh, stored, tolerance):
    """A line for each ratio that fell by more than `tolerance`, is gone, or is no number."""
    new, lines = ratios(fresh), []
    for place, was in ratios(stored).items():
        now = new.get(place)
        if now is None:
            lines.append(f"{place}: {was:.3g} before, missing now")
        elif not now >= was * (1 - tolerance):  # a NaN is no pass
            lines.append(f"{place}: {was:.3g} before, {now:.3g} now ({now / was - 1:+.0%})")
    limit, now = 1e-5, fresh.get("max_abs_diff", 0.0)
    if stored.get("max_abs_diff", 1.0) <= limit and not now <= limit:
        lines.append(f"max_abs_diff: {stored['max_abs_diff']:.1e} before, {now:.1e} now: no longer the same work")
    return lines


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("fresh", nargs="+", type=Path, help="JSON files, or folders of them")
    p.add_argument("--stored", type=Path, default=ROOT / "bench/results")
    p.add_argument("--tolerance", type=float, default=0.15, help="share of a ratio that may be lost (default 0.15)")
    o = p.parse_args(argv)
    if not 0 <= o.tolerance < 1:
        p.error(f"--tolerance {o.tolerance}: a share, 0 or more and below 1")
    files = [f for path in o.fresh for f in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    compared, found = 0, []
    for file in files:
        stored = o.stored / file.name
        if not file.exists() or not stored.exists():
            print(
                f"{file.name}: {'nothing stored' if file.exists() else 'no such file'}, not compared", file=sys.stderr
            )
            continue
        try:
            pair = [json.loads(f.read_text()) for f in (file, stored)]
        except ValueError as error:
            p.error(f"{file.name}: not JSON: {error}")
        compared += len(ratios(pair[1]))
        found += [f"{file.stem}: {line}" for line in regressions(*pair, o.tolerance)]
    print(*found, sep="\n", end="\n" if found else "")
    if not compared and not found:
        p.error("nothing could be compared")
    print(f"{compared} ratios compared, {len(found)} regressions", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
