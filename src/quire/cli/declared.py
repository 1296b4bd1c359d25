"""Options that several commands declare alike: what measures takes a model, a text, outliers, and says it as JSON.

    def command(model: Model = None, text: Text = None, dtype: Dtype = None, ..., json: Json = False) -> None

The defaults stay with the commands. An option whose help text is a command's own (`text`, `seed`, `inject`) is a
function of that text.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = ["BlockTokens", "Device", "Dtype", "Json", "Model", "inject", "seed", "text"]

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A model folder, or a hub id. Without it the model that QUIRE_MODEL names, else the packaged one.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", show_default=False, help="float32, bfloat16, …; default: the file's."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="cpu|cuda", show_default=False, help="Default: cuda where there is one."),
]
BlockTokens = Annotated[int, typer.Option(metavar="N", help="Tokens per block.")]
Json = Annotated[
    bool,
    typer.Option("--json", metavar=" ", help="One JSON document on stdout and nothing else."),
]


def text(says: str) -> Any:
    """`--text FILE`: what a command reads."""
    return typer.Option(metavar="FILE", show_default=False, help=says)


def seed(of: str) -> Any:
    """`--seed S`: what is drawn with it."""
    return typer.Option(metavar="S", help=of)


def inject(says: str) -> Any:
    """`--inject`: the model with outliers put in (`quire.evaluate.inject`)."""
    return typer.Option("--inject", metavar=" ", help=says)
