"""A look at a YAML file before its options are read: what YAML accepts in silence is refused with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from tokensieve.errors import BadOption

MAX_BYTES = 1_000_000
MAX_DEPTH = 20  # options are two levels deep; the time to read YAML grows with the square of its depth


def check_config_files(argv: Sequence[str]) -> None:
    """Checks every file given as `--config FILE` or `--config=FILE`; one that is not there is left to the parser.

    Raises:
        BadOption: larger than 1 MB, not YAML, nested too deep, an alias (nine lines of them can fill any memory),
            or a key given twice (YAML would take the last one).
    """
    paths = [value for flag, value in zip(argv, argv[1:], strict=False) if flag == "--config"]
    paths += [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    for path in map(Path, paths):
        if path.is_file():
            _check(path)


def _check(path: Path) -> None:
    if path.stat().st_size > MAX_BYTES:
        raise BadOption(f"The options in {str(path)!r} take {path.stat().st_size} bytes; {MAX_BYTES} are allowed.")
    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise BadOption(f"{str(path)!r} has YAML aliases (*name).", hint="Write the value out.")
            if depth > MAX_DEPTH:
                raise BadOption(f"{str(path)!r} is nested more than {MAX_DEPTH} levels deep.")
        _check_keys(yaml.compose(text, yaml.SafeLoader), path)
    except (yaml.YAMLError, UnicodeDecodeError):
        raise BadOption(f"{str(path)!r} is not a YAML file.", hint="Write one `option: value` a line.") from None


def _check_keys(node: yaml.Node | None, path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise BadOption(f"{str(path)!r} gives {twice[0]!r} twice.", hint="Keep one of them.")
        for _, value in node.value:
            _check_keys(value, path)
