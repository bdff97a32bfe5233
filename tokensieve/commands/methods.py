"""`tokensieve methods`: the registry as a table."""

from __future__ import annotations

from tokensieve.commands.output import print_json


def run(options) -> int:
    from tokensieve.compression import list_methods

    if options.json:
        for method in list_methods():
            print_json(
                {
                    "name": method.name,
                    "title": method.title,
                    "url": method.url,
                    "place": method.place,
                    "effect": method.effect,
                    "needs": list(method.needs),
                    "output_length": method.output_length,
                    "options": method.options(),
                    "licence": method.licence,
                    "differs": method.differs,
                }
            )
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "place", "needs", "paper", header_style="bold")
    for m in list_methods():
        table.add_row(
            m.name,
            m.place,
            ", ".join(m.needs) or "-",
            f"{m.title}\n[dim]{m.url.removeprefix('https://')}[/dim]" if m.url else m.title,
        )
    console = Console()
    console.print(table)
    console.print("All keep exactly the budget, except:")
    for m in list_methods():
        if m.output_length != "exact":
            console.print(f"  {m.name}: {m.output_length}")
    return 0
