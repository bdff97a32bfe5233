"""`tokensieve export`: a compressed model as a folder of ONNX graphs that runs without torch."""

from __future__ import annotations

from dataclasses import asdict

from tokensieve.commands.output import budgets_of, load_compressed, print_json
from tokensieve.errors import BadOption


def run(options) -> int:
    """Exports a vision-language model, or with `--tower` a bare CLIP-like model, and says how well both sides agree."""
    manifest = _tower(options) if options.tower is not None else _vlm(options)
    if options.json:
        print_json({"out": options.out, **asdict(manifest)})
        return 0
    print(f"Wrote {', '.join(manifest.graphs)} ({manifest.precision}) into {options.out}.")
    for name, found in manifest.verified.items():
        print(f"  {name}: {found}")
    return 0


def _vlm(options):
    from tokensieve.export.vlm import export_vlm

    vlm = load_compressed(options)
    return export_vlm(vlm, options.out, precision=options.precision, verify=options.verify)


def _tower(options):
    from tokensieve.export.towers import export_tower
    from tokensieve.pipeline.towers.load import load_tower

    budgets = budgets_of(options)
    if options.policy is not None or len(budgets) > 1:
        raise BadOption("A tower takes one method with one budget, and no policy.")
    return export_tower(
        load_tower(options.tower),
        options.out,
        method=options.method,
        keep=budgets[0] if options.method else 1.0,
        precision=options.precision,
        verify=options.verify,
        **options.options,
    )
