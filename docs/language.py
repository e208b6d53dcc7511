"""Make the tables of what was measured on real language: a small chat model, and real answers."""

from __future__ import annotations

from collections.abc import Callable

from tables import Columns, Row, number, result_table, text, with_error

# Members of the largest ensemble of the pools.
LARGEST = 5


def scales(row: Row) -> dict[str, float]:
    """Return the scale of each trait in a row of guidance."""
    prefix = "scale_"
    return {name.removeprefix(prefix): row[name] for name in row if name.startswith(prefix)}


def setting(row: Row) -> str:
    """Return the scales of a row in words."""
    return ", ".join(f"{trait} {scale:g}" for trait, scale in scales(row).items())


GUIDANCE: Columns = [
    ("scale", setting),
    ("sentiment", with_error("cheerful")),
    ("reading ease", with_error("simple", 0)),
    ("tokens", with_error("tokens", 0)),
    ("log p per token", with_error("logprob_per_token")),
    ("distinct word pairs", number("distinct_pairs")),
]


def guidance_real() -> str:
    """Return the effect of each trait by its scale."""
    return result_table("guidance_real", GUIDANCE, lambda row: len(scales(row)) == 1)


def guidance_grid() -> str:
    """Return the effect of two traits together."""
    return result_table("guidance_real", GUIDANCE, lambda row: len(scales(row)) > 1)


def guidance_upstream() -> str:
    """Return the effect of a trait before an upstream."""
    return result_table("guidance_upstream", GUIDANCE)


def real(trait: str) -> Callable[[], str]:
    """Return a table of every method for one trait."""
    columns: Columns = [
        ("method", text("method")),
        (trait, with_error("gold")),
        ("- one sample", with_error("effect", sign="+")),
        ("tokens read or written", number("cost", 0)),
        ("CPU, ms", number("cpu_ms", 0)),
        ("log p per token", number("logprob_per_token")),
        ("distinct word pairs", number("distinct_pairs")),
    ]
    return lambda: result_table("real", columns, lambda row: row["trait"] == trait)


def vas_fits() -> str:
    """Return how far a value steers per nat, by the target of its fit and its replies."""
    columns: Columns = [
        ("target of each token", text("target")),
        ("replies per prompt", number("replies", 0)),
        ("gain at 1 nat", with_error("gain_at_1_nat", 3)),
        ("- first row", with_error("difference", 3, sign="+")),
    ]
    return result_table("vas_fits_simple", columns)


def vas_real(name: str) -> Callable[[], str]:
    """Return a table of reward, KL and guards of the forms of VAS on a small model."""

    def optional(column: str) -> Callable[[Row], str]:
        cell = number(column)
        return lambda row: cell(row) if column in row else ""

    def beta(row: Row) -> str:
        return f"{row['beta']:g}" if row.get("beta") else ""

    columns: Columns = [
        ("form", text("form")),
        ("beta", beta),
        ("reading ease", with_error("gold")),
        ("- plain draws", with_error("effect", sign="+")),
        ("KL, nats", number("kl")),
        ("log p per token", optional("logprob_per_token")),
        ("distinct word pairs", optional("distinct_pairs")),
    ]
    return lambda: result_table(name, columns)


def pools() -> str:
    """Return the gold of the best of n real answers, by the rate of wrong labels."""

    def labels(row: Row) -> str:
        return "" if row["noise"] is None else f"{row['noise']:.0%} wrong"

    def chooser(row: Row) -> str:
        return row["selector"] + (", length-free" if row["length_free"] else "")

    def null(row: Row) -> str:
        share = row.get("null_beats")
        return "" if share is None else f"{share:.2f}"

    def accuracy(name: str) -> Callable[[Row], str]:
        cell = with_error(name)
        # The accuracy is that of the mean of the members, or of a baseline.
        return lambda row: cell(row) if row["selector"] == "mean" or not row["members"] else ""

    def include(row: Row) -> bool:
        chosen = ("single", "mean", "wco", "uwo 0.5", "uwo 4", "ranks", "pessimistic mean")
        if not row["members"]:
            return True
        if row["length_free"]:
            return row["members"] == LARGEST and row["selector"] in ("mean", "wco")
        return row["members"] == LARGEST and row["selector"] in chosen

    columns: Columns = [
        ("labels", labels),
        ("chosen by", chooser),
        ("best of 8", with_error("gold_8")),
        ("best of 57", with_error("gold_57")),
        ("- one member", with_error("minus_single", sign="+")),
        ("pairs right", accuracy("accuracy")),
        ("of one length", accuracy("accuracy_matched")),
        ("NullModel beats", null),
    ]
    return result_table("pools", columns, include)


def preference_pairs() -> str:
    """Return the share of real pairs that fitted rewards order right."""

    def interval(name: str) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            low, high = row[name]["low"], row[name]["high"]
            return f"{row[name]['value']:.1%} ({100 * low:.1f} to {100 * high:.1f})"

        return cell

    columns: Columns = [
        ("labels", lambda row: f"{row['flipped']:.0%} wrong"),
        ("members", number("members", 0)),
        ("`--length-free`", lambda row: "yes" if row["length_free"] else "no"),
        ("`--noise`", text("noise")),
        ("pairs right", interval("accuracy")),
        ("of one length", interval("length_matched")),
    ]
    return result_table("preference_pairs", columns)


TABLES: dict[str, Callable[[], str]] = {
    "guidance-real": guidance_real,
    "guidance-grid": guidance_grid,
    "guidance-upstream": guidance_upstream,
    "real-cheerful": real("cheerful"),
    "real-simple": real("simple"),
    "vas-real": vas_real("vas_real_simple"),
    "vas-lookahead": vas_real("vas_real_lookahead"),
    "vas-fits": vas_fits,
    "pools": pools,
    "preference-pairs": preference_pairs,
}
