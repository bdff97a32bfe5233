"""The recipe of the shipped model: a tower on mosaics, then a language model on clips.

Stage by stage, each leaving a folder that the next one reads, so that a run can be resumed at a stage:
`OUT/tower` (stage 1), `OUT/model` (stage 2, the shipped one), `OUT/logs/STAGE/metrics.csv`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.progress import Progress

from tokensieve.errors import BadOption
from tokensieve.pipeline.tiny_model import build_model, build_processor
from tokensieve.pipeline.tiny_recipe import STAGES, TinyRecipe
from tokensieve.pipeline.train_clips import CachedClips, ClipModule, clip_loader
from tokensieve.pipeline.train_tower import TowerModule, mosaic_loader


def train_tiny(out: Path, recipe: TinyRecipe, stages: tuple[str, ...] = STAGES) -> Path:
    """Runs the given stages and returns the folder of the last model, in Hugging Face layout.

    Raises:
        BadOption: a stage is unknown, or "clips" is asked for without a trained tower in `out`.
    """
    if unknown := set(stages) - set(STAGES):
        raise BadOption(f"stages must be among {STAGES}, got {sorted(unknown)}.")
    if "tower" not in stages and not (out / "tower").is_dir():
        raise BadOption(f"{out} has no trained tower.", hint="Run the stage 'tower' first.")
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    if "tower" in stages:
        _tower_stage(out, recipe)
    return _clips_stage(out, recipe) if "clips" in stages else out / "tower"


def _trainer(out: Path, name: str, steps: int, check_every: int) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=2 * steps,  # two optimizers step together and Lightning counts both
        val_check_interval=check_every,
        check_val_every_n_epoch=None,
        logger=CSVLogger(out, name="logs", version=name),
        log_every_n_steps=50,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[RichProgressBar()],
    )


def _save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


def _tower_stage(out: Path, recipe: TinyRecipe) -> Path:
    L.seed_everything(recipe.seed, verbose=False)
    model = build_model(build_processor().tokenizer)
    module = TowerModule(model, lr=recipe.tower_lr, total_steps=recipe.tower_steps, compile=recipe.compile)
    train = mosaic_loader("train", recipe.tower_batch, seed=recipe.seed + 1, num_batches=recipe.tower_steps)
    val = mosaic_loader("val", recipe.tower_batch, seed=recipe.seed + 2, num_batches=4)
    _trainer(out, "tower", recipe.tower_steps, min(250, recipe.tower_steps)).fit(module, train, val)
    return _save(model, out / "tower")


def _clips_stage(out: Path, recipe: TinyRecipe) -> Path:
    from transformers import AutoModelForImageTextToText

    L.seed_everything(recipe.seed, verbose=False)
    model = AutoModelForImageTextToText.from_pretrained(out / "tower", attn_implementation="eager")
    tokenizer = build_processor().tokenizer
    with Progress() as progress:
        task = progress.add_task("encoding clips", total=recipe.clips + recipe.val_clips)

        def advance(count: int) -> None:
            progress.advance(task, count)

        train = CachedClips(model, "train", 0, recipe.clips, recipe.seed, progress=advance)
        val = CachedClips(model, "val", 0, recipe.val_clips, recipe.seed, progress=advance)
    module = ClipModule(
        model,
        tokenizer,
        lr=recipe.clip_lr,
        total_steps=recipe.clip_steps,
        seed=recipe.seed,
        compile=recipe.compile,
    )
    _trainer(out, "clips", recipe.clip_steps, min(500, recipe.clip_steps)).fit(
        module,
        clip_loader(train, tokenizer, recipe.clip_batch, recipe.seed, shuffle=True),
        clip_loader(val, tokenizer, recipe.clip_batch, recipe.seed, shuffle=False),
    )
    return _save(model, out / "model")
