"""`tokensieve train tiny`: the shipped model, from nothing."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from tokensieve.commands.output import print_json
from tokensieve.pipeline.tiny_recipe import TinyRecipe


def run(options) -> int:
    from tokensieve.pipeline.train_tiny import train_tiny

    recipe = TinyRecipe(**{f.name: options[f.name] for f in fields(TinyRecipe)})
    folder = train_tiny(Path(options.out), recipe, tuple(options.stages))
    if options.json:
        print_json({"model": str(folder)})
    else:
        print(f"The model is in {folder}: use it with --model {folder}")
    return 0
