"""docs/EVIDENCE.md and CLAIMS.md, in words. Every number comes from the experiments' result files; what they come to
is written by hand, in findings.md beside them.

`data` are an experiment's units (claims.py), seeds as a rule. A claim that has no figures is listed as not run.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from evidence import pictures, stats
from evidence.claims import Claim
from evidence.stats import arms_of, values
from support.files import read_json, write_text

# ---------------------------------------------------------------- claims and verdicts


@dataclass
class Row:
    """A primary claim and what the units say of it; without a difference where it was not run."""

    number: int
    experiment: str
    claim: Claim
    difference: stats.Difference | None
    unit: str
    p: float = 1.0  # corrected for the number of claims
    verdict: str = "not run"


def compare(claim, data):
    """The Difference a - b over the units that have both; None where there are none."""
    a = []
    b = []
    for arms in data.values():
        pair = [arms.get(arm, {}).get(claim.metric) for arm in (claim.a, claim.b)]
        if None not in pair:
            a.append(pair[0])
            b.append(pair[1])
    return stats.paired(a, b) if a else None


def favour(claim, difference):
    """The difference with its sign turned, so that what the claim says is positive."""
    return difference if claim.sign > 0 else difference.turned()


def p_value(claim, difference):
    difference = favour(claim, difference)
    return difference.p_not_less(claim.margin) if claim.kept else difference.p()


def judge(experiments, results):
    """A Row for each primary claim, numbered through all experiments. The p-values of all that were run over the
    same kind of unit are corrected together. results: {name: its JSON, or None}."""
    rows = []
    for name, experiment in experiments.items():
        data = experiment.data_of(results[name]["seeds"]) if results.get(name) else {}
        for claim in experiment.claims:
            rows.append(Row(len(rows) + 1, name, claim, compare(claim, data), experiment.unit))
    for unit in {row.unit for row in rows}:
        tested = [row for row in rows if row.unit == unit and row.difference]
        corrected = stats.holm([p_value(row.claim, row.difference) for row in tested])
        for row, p in zip(tested, corrected):
            row.p = p
            row.verdict = stats.verdict(favour(row.claim, row.difference), p, row.claim.margin, row.claim.kept)
    return rows


# ---------------------------------------------------------------- text


def number(x, digits):
    text = f"{x:.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def p_text(p):
    return "< 0.001" if p < 0.001 else number(p, 3)


def signed(x, digits):
    return "+" * (x > 0) + number(x, digits)


def difference_text(claim, difference):
    """'+0.31 [+0.20, +0.42]', to a tenth of what matters."""
    digits = max(0, 1 - math.floor(math.log10(claim.margin)))
    text = signed(difference.mean, digits)
    if math.isnan(difference.half):
        return text
    return f"{text} [{signed(difference.low, digits)}, {signed(difference.high, digits)}]"


def direction(claim):
    """What is claimed of arm a beside arm b."""
    if claim.kept:
        return "no less" if claim.sign > 0 else "no more"
    return "more" if claim.sign > 0 else "less"


def table(headings, rows):
    """Lines of a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def verdict_table(rows):
    """All primary claims, those that fail first, those that were not run last."""
    order = [*stats.VERDICTS, "not run"]
    lines = []
    for row in sorted(rows, key=lambda row: order.index(row.verdict)):
        cells = [row.number, row.experiment, row.claim.text]
        if row.difference:
            verdict = f"**{row.verdict}**"
            if row.verdict == "holds" and not row.claim.kept and is_small(row):
                verdict += ", too small to matter"
            p = p_text(row.p) if row.difference.n > 1 else ""
            cells += [verdict, difference_text(row.claim, row.difference), p, f"{row.difference.n} {row.unit}"]
        else:
            cells += ["not run", "", "", ""]
        lines.append(cells)
    return table(["", "experiment", "claim", "verdict", "difference [95%]", "p, Holm", "over"], lines)


def is_small(row):
    """Whether the interval excludes an effect of the size that matters."""
    return favour(row.claim, row.difference).high < row.claim.margin


def arm_table(columns, data):
    """An arm a row: mean ± half of the 95% t interval over units. Columns that no arm has are left out; what is alike
    in all arms stands below the table."""
    arms = arms_of(data)
    by_heading = {}
    shared = []
    for metric, heading in columns.items():
        by_arm = {arm: stats.interval(values(data, arm, metric)) for arm in arms if values(data, arm, metric)}
        cells = [mean_text(by_arm.get(arm), by_arm.values()) for arm in arms]
        if len(set(cells)) > 1:
            by_heading[heading] = cells
        elif by_arm:
            shared.append(f"{heading} {cells[0]}")
    lines = table(["arm", *by_heading], zip(arms, *by_heading.values()))
    if shared:
        lines += ["", f"The same for all arms: {'; '.join(shared)}."]
    return lines


def mean_text(mean_and_half, column):
    """A cell of a column of (mean, half), with so many digits as the largest mean of the column suggests."""
    if mean_and_half is None:
        return "-"
    mean, half = mean_and_half
    size = max(abs(other) for other, _ in column)
    digits = 3 - sum(size >= bound for bound in (2, 20, 200))
    return number(mean, digits) + ("" if math.isnan(half) else f" ±{number(half, digits)}")


def exploratory_text(claim, data):
    difference = compare(claim, data)
    if difference is None:
        return f"{claim.text}: not run"
    p = p_text(p_value(claim, difference))
    return f"{claim.text}: {difference_text(claim, difference)}, p {p} uncorrected"


def section(name, experiment, result):
    """The lines about an experiment that has results."""
    data = experiment.data_of(result["seeds"])
    machine = result["machine"]
    cost = f"{result['core_hours_a_seed']} core hours a seed with what it shares with other experiments"
    source = f"{machine.get('gpu') or machine['cpu']}, torch {machine['torch']}, {result['made']}"
    seeds = f"seeds {', '.join(result['seeds'])} of {experiment.seeds}"
    lines = [f"## {name}: {experiment.title}"]
    lines += [f"{experiment.about} `{result['command']}`: {seeds}; {cost}; last on {source}.", ""]
    lines += [*arm_table(experiment.columns, data), ""]
    if experiment.exploratory:
        texts = [exploratory_text(claim, data) for claim in experiment.exploratory]
        lines.append(f"Exploratory, thought of after the runs: {'; '.join(texts)}.")
    return [*lines, f"![{experiment.title}](evidence/{name}.png)", ""]


HEAD = """# Evidence: the papers' claims as experiments

Here the papers' claims are tested on the bundled world (data/world.py), a small synthetic English in which they can be
true or false. A question asks for the outcome of one to eight operations, and a checker knows the truth. An answer
given at once is a guess. An answer of a sentence an operation fails on long chains. An answer that writes each sum out
is long, and nearly always right up to seven operations; of eight it does not fit into the 192 tokens of the longest
limit. So length buys what short answers cannot hold, and the limit decides what training can find. The instruction data
teaches what PPO does not reward: facts, and a closing sentence. The models have 1.2 million parameters: what holds here
need not hold at seven billion, and what fails here may hold there.

The claims stood in [CLAIMS.md](../evidence/CLAIMS.md) before the runs, each with the least effect that matters. All
arms of an experiment have the same seeds, so two arms are compared by their differences seed by seed (paired t-test);
on the real model item by item. The p-values of all claims over seeds are corrected together by Holm's method, and those
over items. A claim **holds** where its corrected p is below 0.05 and the difference lies on the side that it names; "no
less" and "no more" are one-sided tests against a loss of the size that matters. It **fails** where the 95% interval,
uncorrected, excludes an effect of that size, or lies wholly beyond such a loss. Otherwise it is **undecided**. A
difference is the arm's figure less its rival's, as CLAIMS.md names them; ± is half a 95% interval.
"""


def page(experiments, results, findings=""):
    """The text of EVIDENCE.md. results: {name: its JSON, or None}; findings: what it comes to, in words."""
    lines = [HEAD, *verdict_table(judge(experiments, results)), "", findings]
    missing = [name for name in experiments if not results[name]]
    if missing:
        lines += [f"No results yet: `python evidence/experiments.py {' '.join(missing)}`.", ""]
    for name, experiment in experiments.items():
        if results[name]:
            lines += section(name, experiment, results[name])
    return "\n".join(lines)


CLAIMS_HEAD = """# The claims

What the experiments are to decide, as it stood before they ran: each claim compares two arms over the same
seeds, and says from what difference on it matters. [EVIDENCE.md](../docs/EVIDENCE.md) has the verdicts, and
says how they come about. `python evidence/experiments.py --claims` writes this page from claims.py.
"""


CLAIMS_TAIL = """
Those on SmolLM2-135M ([smollm2.py](smollm2.py)) are corrected among themselves. Intervals are over prompts and
questions, which stand in the place of seeds; scores are in deviations of the base's.
"""


def claims_page(experiments):
    """The text of CLAIMS.md."""
    headings = ["", "experiment", "claim", "measure", "arm", "direction", "rival", "matters from"]
    lines = []
    for row in judge(experiments, {}):
        claim = row.claim
        comparison = [f"`{claim.metric}`", claim.a, direction(claim), claim.b]
        lines.append([row.number, row.experiment, claim.text, *comparison, f"{claim.margin:g}"])
    return "\n".join([CLAIMS_HEAD, *table(headings, lines), CLAIMS_TAIL])


# ---------------------------------------------------------------- files


def read(experiments, results):
    """{name: what its JSON in the folder `results` holds, or None}."""
    paths = {name: Path(results) / f"{name}.json" for name in experiments}
    return {name: read_json(path) if path.exists() else None for name, path in paths.items()}


def write(experiments, results, docs):
    """EVIDENCE.md and evidence/NAME.png below `docs`, from the JSON files in `results`."""
    by_name = read(experiments, results)
    folder = Path(docs) / "evidence"
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in by_name.items():
        if result:
            experiment = experiments[name]
            pictures.draw(experiment, experiment.data_of(result["seeds"]), folder / f"{name}.png")
    path = Path(docs) / "EVIDENCE.md"
    findings = Path(results) / "findings.md"
    write_text(path, page(experiments, by_name, findings.read_text() if findings.exists() else ""))
    print(path)
