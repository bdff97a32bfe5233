"""`tokensieve methods`: the registry as a table, for a terminal, a program or the documentation."""

from __future__ import annotations

from tokensieve.commands.output import print_json


def run(options) -> int:
    from tokensieve.compression import list_methods

    if options.json:
        for method in list_methods():
            print_json(facts(method))
    elif options.markdown:
        print(markdown(list_methods()))
    else:
        _print_table(list_methods())
    return 0


def facts(method) -> dict[str, object]:
    """Everything the registry knows about a method, as plain types."""
    return {
        "name": method.name,
        "title": method.title,
        "url": method.url,
        "place": method.place,
        "effect": method.effect,
        "needs": list(method.needs),
        "question_aware": method.question_aware,
        "output_length": method.output_length,
        "follows_tokens": method.follows_tokens,
        "options": method.options(),
        "licence": method.licence,
        "differs": method.differs,
    }


def markdown(methods) -> str:
    """The tables of docs/methods.md: one a place, and what differs from the official code below."""
    places = {
        "tower": "In the vision tower",
        "projector": "Before the language model",
        "decoder": "Inside the language model",
    }
    blocks = []
    for place, heading in places.items():
        rows = [
            "| method | paper | effect | looks at | question | tokens kept | official code |",
            "|---|---|---|---|---|---|---|",
        ]
        rows += [_row(m) for m in methods if m.place == place]
        blocks.append(f"### {heading}\n\n" + "\n".join(rows))
    notes = [f"- `{m.name}`: {m.differs}" for m in methods if m.differs]
    return "\n\n".join([*blocks, "### What differs from the papers' code\n\n" + "\n".join(notes)])


def _row(m) -> str:
    paper = f"[{m.title}]({m.url})" if m.url else m.title
    length = "exactly the budget" if m.output_length == "exact" else m.output_length
    cells = [
        f"`{m.name}`",
        paper,
        m.effect,
        ", ".join(n for n in m.needs if n != "question") or "-",
        "yes" if m.question_aware else "no",
        length,
        m.licence or "-",
    ]
    return f"| {' | '.join(cells)} |"


def _print_table(methods) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "place", "effect", "looks at", "paper", header_style="bold")
    for m in methods:
        table.add_row(
            m.name,
            m.place,
            m.effect,
            ", ".join(m.needs) or "-",
            f"{m.title}\n[dim]{m.url.removeprefix('https://')}[/dim]" if m.url else m.title,
        )
    console = Console()
    console.print(table)
    console.print("All keep exactly the budget, except:")
    for m in methods:
        if m.output_length != "exact":
            console.print(f"  {m.name}: {m.output_length}")
