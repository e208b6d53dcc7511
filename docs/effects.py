"""Make the tables of what each method changes in the answers."""

from __future__ import annotations

from collections.abc import Callable

from tables import (
    Columns,
    Row,
    estimate,
    number,
    recorded,
    result_table,
    table,
    text,
    with_error,
    yes,
)

# The table "which method when": a need, the keys of `align`, what they need, a row of quality.json.
CHOICES = [
    ("a plain answer", "none", "nothing", "one sample"),
    ("the likeliest answer", "none; `temperature` 0", "nothing", "greedy"),
    (
        "the best of several answers",
        "`best_of_n`, `ensemble`",
        "a reward: a model, rules or a function",
        "best of 8, uwo",
    ),
    (
        "a better answer for the tokens of one",
        "`vas`",
        "a value fitted to the model and a reward",
        "VAS head, beta 8",
    ),
    (
        "both together",
        "`vas`, `best_of_n`",
        "a reward and a value",
        "VAS head, beta 4, best of 8",
    ),
    (
        "a trade-off that the user sets",
        "`dpa`",
        "a model that was trained on directions",
        "DPA, helpful and brief",
    ),
    (
        "a trade-off that the model knows badly",
        "`dpa`, `rps`",
        "the same, and a reward for each attribute",
        "RPS, 5 directions, 1 each",
    ),
    (
        "the best of several, without a reward model",
        "`best_of_n`, `trust_judge`",
        "a model that can judge",
        "best of 8, judge",
    ),
]


# Answers that stand beside every shape of rewards.
SELECTION_BASELINES = ("uwo of five", "gold oracle")


def choosing() -> str:
    """Return which method to use when, with its cost and effect in quality.json."""
    result = recorded("quality")
    if result is None:
        return "Not recorded yet: benchmarks/results/quality.json.\n"
    measured = {row["name"]: row for row in result["rows"]}
    rows = []
    for need, keys, requirement, name in CHOICES:
        row = measured[name]
        gain = estimate("minus_baseline")(row)
        gain = f"+{gain}" if gain else ""
        cost = [number("tokens", 0)(row), f"{row['seconds']:.2g}"]
        rows.append([need, keys, requirement, *cost, gain])
    head = ["you want", "`align`", "it needs", "tokens", "seconds", "true reward gained"]
    return table(head, rows)


BEST_OF_N: Columns = [
    ("answer", text("answer")),
    ("tokens spent", number("tokens", 0)),
    ("proxy", number("proxy")),
    ("gold", number("gold")),
    ("± s.e.", number("gold_se")),
]


def demo_summary() -> str:
    """Return best-of-n in short: one reward model against the ensemble."""
    objectives = {"base", "greedy", "single", "uwo"}
    return result_table(
        "best_of_n",
        BEST_OF_N,
        lambda row: row["n"] in {1, 8, 512} and row["objective"] in objectives,
    )


def demo_results() -> str:
    """Return best-of-n under every objective."""
    return result_table("best_of_n", BEST_OF_N, lambda row: row["n"] in {1, 8, 64, 512})


def demo_replication() -> str:
    """Return best-of-n with fresh reward models, prompts and samples."""
    columns: Columns = [
        ("set", text("set")),
        ("objective", text("objective")),
        ("best n", text("best_n")),
    ]
    for n in (1, 8, 64, 512):
        columns.append((f"gold at n = {n}", number(f"gold_{n}")))
    return result_table(
        "best_of_n_retrained", columns, lambda row: row["objective"] in {"single", "uwo"}
    )


def vas_results() -> str:
    """Return the effect of steering by values."""
    columns: Columns = [
        ("answer", text("answer")),
        ("tokens spent", number("tokens", 0)),
        ("gold", number("gold")),
        ("± s.e.", number("gold_se")),
        ("KL, nats", number("kl")),
        ("proxy", number("proxy")),
    ]
    return result_table("vas", columns)


def selection_scale() -> str:
    """Return what shapes do if one of five rewards is on a wrong scale."""
    columns: Columns = [
        ("answer", text("answer")),
        ("n", text("n")),
        ("gold", with_error("gold")),
        ("difference to greedy", with_error("minus_greedy", sign="+")),
    ]

    def include(row: Row) -> bool:
        is_baseline = row["section"] == "frozen" or row["answer"] in SELECTION_BASELINES
        return row["section"] == "scale" or (is_baseline and row["n"] in {1, 8, 64})

    return result_table("selection", columns, include)


def selection_proxy() -> str:
    """Return the gold of every rule over one reward model, one column for each n."""
    result = recorded("selection")
    if result is None:
        return "Not recorded yet: benchmarks/results/selection.json.\n"
    curves: dict[str, dict[int, str]] = {}
    for row in result["rows"]:
        if row["section"] in {"baseline", "proxy"}:
            curves.setdefault(row["answer"], {})[row["n"]] = with_error("gold")(row)
    sizes = sorted(next(iter(curves.values())))
    ends = result["setup"]["fall_from_best_n"]
    rows = []
    for name, golds in curves.items():
        end = ends.get(name)
        fall = "" if end is None else f"{end[0]:.2f} ± {end[1]:.2f}"
        rows.append([name, *(golds[n] for n in sizes), fall])
    heads = [
        "answer",
        *(f"n = {n}" for n in sizes),
        f"gold at the best n, minus gold at n = {sizes[-1]}",
    ]
    return table(heads, rows)


def selection_groups() -> str:
    """Return how rules serve three groups."""
    columns: Columns = [("answer", text("answer"))]
    for group in ("brief", "ornate", "polite"):
        columns.append((group, with_error(group)))
    columns += [
        ("worst group", number("worst_group")),
        ("Condorcet", number("condorcet_share")),
        ("returned", number("condorcet_chosen")),
        ("worst case of pairs", number("worst_case_win", 3)),
    ]
    return result_table("selection", columns, lambda row: row["section"] == "groups")


def selection_length() -> str:
    """Return quality and length of the returned answers."""
    columns: Columns = [
        ("answer", text("answer")),
        ("gold", with_error("gold")),
        ("tokens returned", with_error("returned_tokens", 1)),
    ]
    return result_table("selection", columns, lambda row: row["section"] == "length")


def early_stop() -> str:
    """Return the saving and the loss of early stopping."""

    def minus_budget(row: Row) -> str:
        has_baseline = "after" in row["answer"] or row["answer"] == "greedy"
        return with_error("minus_budget", sign="+")(row) if has_baseline else ""

    columns: Columns = [
        ("answer", text("answer")),
        ("tokens spent", number("tokens", 0)),
        ("gold", with_error("gold")),
        ("- best-of-n at the same tokens", minus_budget),
        ("- best of 32", with_error("minus_whole", sign="+")),
    ]
    return result_table("early_stop", columns)


def adaptive() -> str:
    """Return the tokens that an adaptive number of draws saves at equal reward."""

    def saved(row: Row) -> str:
        return f"{row['saved']:+.0%} ± {row['saved_se']:.0%}" if "saved" in row else ""

    def minus_budget(row: Row) -> str:
        return with_error("minus_budget", 3, sign="+")(row) if "saved" in row else ""

    columns: Columns = [
        ("prompts and reward", text("set")),
        ("answer", text("answer")),
        ("draws", number("draws", 1)),
        ("tokens", number("tokens", 0)),
        ("value", with_error("value", 3)),
        ("- best-of-n at the same tokens", minus_budget),
        ("tokens saved at equal value", saved),
    ]
    sizes = {f"best of {n}" for n in (4, 8, 16, 32, 64)}
    return result_table("adaptive", columns, lambda row: "saved" in row or row["answer"] in sizes)


def free_rewards() -> str:
    """Return the gold of the best of n by rewards without a reward model."""
    columns: Columns = [("candidates chosen by", text("selector"))]
    for n in (1, 8, 64):
        columns.append((f"best of {n}", with_error(f"gold_{n}")))
    return result_table("free_rewards", columns)


def dpa_results() -> str:
    """Return how answers follow the angle of a direction."""
    columns: Columns = [
        ("answer", text("answer")),
        ("trained", yes("trained")),
        ("helpfulness", number("helpfulness")),
        ("± s.e.", number("helpfulness_se")),
        ("verbosity", number("verbosity")),
        ("± s.e.", number("verbosity_se")),
        ("v . r", number("projected")),
        ("gold", number("gold")),
        ("± s.e.", number("gold_se")),
    ]
    return result_table("dpa", columns, lambda row: not row["answer"].endswith("degrees, greedy"))


def rps_results() -> str:
    """Return the gain of neighbouring directions."""

    def outcomes(row: Row) -> str:
        return " / ".join(f"{100 * row[name]:.0f}" for name in ("win", "tie", "loss"))

    columns: Columns = [
        ("target", text("target")),
        ("trained", yes("trained")),
        ("answer", text("answer")),
        ("v . r", number("projected")),
        ("minus best of 5", lambda row: f"{row['minus_baseline']:+.3f}"),
        ("± s.e.", number("minus_baseline_se", 3)),
        ("win / tie / loss, %", outcomes),
    ]
    return result_table("rps", columns)


def judge_scores() -> str:
    """Return how well a judge's single scores order the answers."""
    columns: Columns = [
        ("readout", text("readout")),
        ("accuracy", with_error("accuracy", 3)),
        ("ties", with_error("ties", 3)),
        ("conflicts, first label", with_error("conflicts_first_label", 3)),
        ("conflicts, likelihood", with_error("conflicts_likelihood", 3)),
    ]
    return result_table("trust_judge", columns, lambda row: row["kind"] == "score")


def judge_relations() -> str:
    """Return how well a judge's comparisons order the answers."""
    columns: Columns = [
        ("readout", text("readout")),
        ("accuracy", with_error("accuracy", 3)),
        ("ties", with_error("ties", 3)),
    ]
    for size in (3, 4, 5):
        columns.append((f"nontransitivity, {size}", with_error(f"nontransitivity_{size}", 3)))
    return result_table("trust_judge", columns, lambda row: row["kind"] == "relation")


def composition_results() -> str:
    """Return the effect of methods in combination."""
    columns: Columns = [
        ("", text("section")),
        ("answer", text("answer")),
        ("tokens spent", number("tokens", 0)),
        ("gold", with_error("gold")),
        ("v . r", with_error("projected")),
        ("verbosity", with_error("verbosity")),
    ]
    return result_table("compositions", columns)


def profile_results() -> str:
    """Return the share of the gain of knowing a user, by the number of choices."""
    result = recorded("profiles")
    if result is None:
        return "Not recorded yet: benchmarks/results/profiles.json.\n"
    counts = list(dict.fromkeys(row["choices"] for row in result["rows"]))
    share = with_error("share")
    rows: dict[str, list[str]] = {}
    for row in result["rows"]:
        rows.setdefault(row["way"], [row["way"]]).append(share(row))
    return table(["choices", *map(str, counts)], list(rows.values()))


def quality() -> str:
    """Return every setting of the demo's grid; settings on the front of tokens are bold."""

    def name(row: Row) -> str:
        return f"**{row['name']}**" if "tokens" in row["fronts"] else str(row["name"])

    columns: Columns = [
        ("setting", name),
        ("tokens", number("tokens", 0)),
        ("seconds", lambda row: f"{row['seconds']:.2g} ± {row['seconds_error']:.1g}"),
        ("upper bound of KL", number("kl_bound")),
        ("gold", estimate("gold")),
        ("difference to baseline", estimate("minus_baseline")),
        ("difference to greedy", estimate("minus_greedy")),
        ("difference to equal budget", estimate("minus_equal")),
    ]
    return result_table("quality", columns)


TABLES: dict[str, Callable[[], str]] = {
    "choosing": choosing,
    "demo-summary": demo_summary,
    "demo-results": demo_results,
    "demo-replication": demo_replication,
    "vas-results": vas_results,
    "selection-scale": selection_scale,
    "selection-proxy": selection_proxy,
    "selection-groups": selection_groups,
    "selection-length": selection_length,
    "early-stop": early_stop,
    "adaptive": adaptive,
    "free-rewards": free_rewards,
    "dpa-results": dpa_results,
    "rps-results": rps_results,
    "judge-scores": judge_scores,
    "judge-relations": judge_relations,
    "composition-results": composition_results,
    "profile-results": profile_results,
    "quality": quality,
}
