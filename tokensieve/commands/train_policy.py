"""`tokensieve train cacovid|rank|distil`: a LightningCLI, so options, YAML files and callbacks are Lightning's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from tokensieve.commands.config_file import check_config_files
from tokensieve.commands.output import print_json
from tokensieve.errors import BadOption


def run(kind: str, argv: Sequence[str]) -> int:
    """Trains a policy and leaves it in `OUT/policy`.

    Args:
        kind: "cacovid", "rank" or "distil".
        argv: the other words of the command line.

    Raises:
        BadOption: an option is not allowed, or OUT holds a training already, or none to resume.
        jsonargparse.ArgumentError: an option is unknown or not of its type.
    """
    check_config_files(argv)
    from jsonargparse import ActionYesNo
    from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from tokensieve.pipeline.policy.cacovid import CacovidModule
    from tokensieve.pipeline.policy.data import PolicyData
    from tokensieve.pipeline.policy.distil import DistilModule
    from tokensieve.pipeline.policy.last_checkpoint import LastCheckpoint
    from tokensieve.pipeline.policy.ranking import RankingModule

    module = {"cacovid": CacovidModule, "rank": RankingModule, "distil": DistilModule}[kind]

    class PolicyCLI(LightningCLI):
        def add_arguments_to_parser(self, parser) -> None:
            parser.add_argument("--out", type=str, default=f"runs/{kind}", help="folder for policy, checkpoint, logs")
            parser.add_argument("--max_steps", type=int, default=2000, help="optimizer steps")
            parser.add_argument("--save_every", type=int, default=200, help="steps between checkpoints")
            parser.add_argument("--resume", action=ActionYesNo, default=False, help="go on from the checkpoint in OUT")
            parser.add_argument("--json", action=ActionYesNo, default=False, help="one JSON object at the end")
            parser.link_arguments("max_steps", "trainer.max_steps")
            parser.link_arguments("out", "trainer.default_root_dir")

        def before_instantiate_classes(self) -> None:
            _check(self.config)

        def instantiate_trainer(self, **kwargs):
            given, out = self.config_init.trainer, Path(self.config.out)
            own = given.callbacks or []
            callbacks = [*own] if isinstance(own, Sequence) else [own]
            if given.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
                callbacks.append(RichProgressBar(console_kwargs={"stderr": True}))
            callbacks.append(LastCheckpoint(_last(out), self.config.save_every))
            logger = CSVLogger(out, name="logs") if given.logger is None else given.logger
            return super().instantiate_trainer(**{"callbacks": callbacks, "logger": logger, **kwargs})

    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # which is for what is done here
    try:
        cli = PolicyCLI(
            module,
            PolicyData,
            args=list(argv),
            run=False,
            seed_everything_default=0,
            trainer_defaults={
                "precision": "bf16-mixed",
                "log_every_n_steps": 10,
                "check_val_every_n_epoch": None,
                "val_check_interval": 200,
                "enable_model_summary": False,
            },
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": f"tokensieve train {kind}", "exit_on_error": False},
        )
        _fit(cli)
    except MisconfigurationException as error:
        raise BadOption(f"The Trainer refuses these options: {error}") from None
    if cli.trainer.is_global_zero:
        _report(cli, Path(cli.config.out) / "policy")
    return 0


def _last(out: str | Path) -> Path:
    return Path(out) / "checkpoints" / "last.ckpt"


def _check(config) -> None:
    if config.max_steps < 1 or config.save_every < 1:
        raise BadOption(f"max_steps and save_every must be above 0, got {config.max_steps} and {config.save_every}.")
    last = _last(config.out)
    if config.resume and not last.is_file():
        raise BadOption(f"There is no checkpoint {str(last)!r} to resume from.", hint="Leave --resume out.")
    if not config.resume and last.is_file():
        raise BadOption(
            f"{config.out!r} holds a training already.", hint="Add --resume to go on with it, or choose another --out."
        )


def _fit(cli) -> None:
    checkpoint = _last(cli.config.out) if cli.config.resume else None
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:  # how Lightning ends after Ctrl-C
        raise KeyboardInterrupt from None


def _report(cli, folder: Path) -> None:
    cli.model.policy.save_pretrained(folder)
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    if cli.config.json:
        print_json({"policy": str(folder), "steps": cli.trainer.global_step, "metrics": metrics})
    else:
        print(f"The policy is in {folder}: use it with --method cacovid --policy {folder}")
