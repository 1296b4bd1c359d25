"""The measured figures as the tables of a document, between two marks that stay."""

from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def recall_table(report: dict[str, Any]) -> list[str]:
    """Recall by task and length."""
    lines = [
        "| task and length in tokens | right | asked | share |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, row in report["recall"].items():
        share = f"{row['share']:.1%}".replace("%", " %")
        lines.append(f"| {name} | {row['right']} | {row['asked']} | {share} |")
    return lines


def text_table(report: dict[str, Any]) -> list[str]:
    """Perplexity by text."""
    lines = [
        "| text | tokens | perplexity | bits per byte |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, row in report["text"].items():
        lines.append(
            f"| {name} | {row['tokens']:,} | {row['perplexity']:.2f} | {row['bits_per_byte']:.3f} |"
        )
    return lines


def layer_table(report: dict[str, Any]) -> list[str]:
    """Attention mass at position 0 and the spread of the channels."""
    lines = [
        "| layer | mass at position 0, by query head | largest over median channel, keys | values |",
        "| ---: | --- | ---: | ---: |",
    ]
    rows = zip(report["first_position_mass"], report["channels"], strict=True)
    for layer, (mass, spread) in enumerate(rows):
        heads = ", ".join(f"{m:.2f}" for m in mass)
        lines.append(
            f"| {layer} | {heads} | {spread['key_largest_over_median']:.2f} "
            f"| {spread['value_largest_over_median']:.2f} |"
        )
    return lines


def continuation_table(report: dict[str, Any]) -> list[str]:
    """What it writes."""
    lines = ["| prompt | continuation |", "| --- | --- |"]
    for prompt, text in report["continuations"].items():
        cells = (repr(t).replace("|", "\\|").replace("`", "'") for t in (prompt, text))
        lines.append("| " + " | ".join(f"`{c}`" for c in cells) + " |")
    return lines


def render(report: dict[str, Any]) -> str:
    """All tables, headed by what was measured."""
    record = report["digest"]
    budgets = ", then ".join(
        f"{tokens:,} from token {start:,}" if start else f"{tokens:,}"
        for start, tokens in record["budgets"]
    )
    if record.get("extension_tokens"):
        budgets += f" and an extension of {record['extension_tokens']:,}"
    missed = report["missed"]
    source = (
        f"Weights `{record['sha256']}`, {record['parameters']:,} parameters, "
        f"{record['trained_tokens']:,} tokens trained (budget {budgets}), seed {record['seed']}; "
        f"measured with Python {report['python']} and torch {report['torch']}."
    )
    verdict = f"Bars missed: {', '.join(missed)}." if missed else "Every bar is reached."
    parts = [
        [source],
        [verdict],
        recall_table(report),
        text_table(report),
        layer_table(report),
        continuation_table(report),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def write(report: dict[str, Any], document: Path) -> None:
    """Replaces what stands between the marks.

    Raises:
        ValueError: the document has no marks
    """
    text = document.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{document} needs the lines {BEGIN} and {END}, once and in this order")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    document.write_text(f"{before}{BEGIN}\n\n{render(report)}\n\n{END}{after}", encoding="utf-8")
