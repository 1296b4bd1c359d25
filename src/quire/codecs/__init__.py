"""Codecs, one per file: the file's name is the codec's name on the command line.

A file holds a frozen dataclass `Codec` with the protocol's methods (`quire.spec.KVCodec`); its fields are the
parameters that a recipe may set (`"kivi:bits=2,residual=128"`). Packages outside register the same class under the
entry point group `quire.codecs`. Reading parameters and bytes never imports torch.

`quire tour` gives each codec a row of its own accord. A class attribute `shown: ClassVar[tuple[str, ...]]` names the
recipes that are worth one, as in `("kivi:bits=4", "kivi:bits=2,residual=128")`; the default is the bare name. Another,
`searched`, names those that `quire tune` tries; the default is `shown`.
"""

from quire.codecs.recipe import Recipe, available, load_codec, parse_recipe

__all__ = ["Recipe", "available", "load_codec", "parse_recipe"]
