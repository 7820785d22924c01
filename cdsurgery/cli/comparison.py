"""One prompt decoded three ways -> both texts side by side, and what changed from one to the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cdsurgery.cli.screen import quoted, spelled, visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from cdsurgery.trace import Trace, TracedToken

CHANGED_STYLE = "bold underline yellow"
# More rows than this no longer explain anything; --json has them all.
MOST_ROWS = 12
MOST_COLUMNS = 120


@dataclass(frozen=True)
class Comparison:
    """One prompt decoded three ways.

    Attributes:
        plain: the text from the final layer, by the model before it was wrapped.
        confident, onnx: what each step selected, in PyTorch and in ONNX Runtime.
        said, unsaid: for each token of `confident`, its text, and the text of what the final layer preferred there.
    """

    prompt: str
    plain: str
    confident: Trace
    onnx: Trace
    said: tuple[str, ...]
    unsaid: tuple[str, ...]

    @property
    def compared(self) -> int:
        """How many tokens there are to agree on; a text that ends early disagrees on the rest of the other."""
        return max(len(self.confident.ids), len(self.onnx.ids))

    @property
    def equal(self) -> int:
        """How many tokens are the same in both runtimes."""
        return sum(a == b for a, b in zip(self.confident.ids, self.onnx.ids, strict=False))


class Summary:
    """All comparisons, counted.

    Attributes:
        tokens, moved, changed: in PyTorch: all, from before the final layer, other than the final layer's.
        mean_depth: layers back from the final one, over all tokens.
        compared, equal: in both runtimes.
    """

    def __init__(self, comparisons: Sequence[Comparison]) -> None:
        traces = [comparison.confident for comparison in comparisons]
        self.tokens = sum(len(trace.tokens) for trace in traces)
        self.moved = sum(trace.moved for trace in traces)
        self.changed = sum(trace.changed for trace in traces)
        self.mean_depth = sum(token.depth for trace in traces for token in trace.tokens) / max(self.tokens, 1)
        self.compared = sum(comparison.compared for comparison in comparisons)
        self.equal = sum(comparison.equal for comparison in comparisons)

    @property
    def passed(self) -> bool:
        """Whether both runtimes said the same."""
        return self.equal == self.compared

    def document(self) -> dict[str, Any]:
        """The counts as JSON takes them."""
        return vars(self) | {"passed": self.passed}

    def text(self) -> Iterator[RenderableType]:
        """The last lines of the demo."""
        from rich.text import Text

        share = self.moved / max(self.tokens, 1)
        yield f"{self.moved} of {self.tokens} tokens ({share:.1%}) moved to an earlier layer, {self.changed} changed."
        yield f"Mean depth: {self.mean_depth:.2f} layers before the final one."
        sign, style = ("=", "bold green") if self.passed else ("≠", "bold red")
        yield Text(f"PyTorch {sign} ONNX Runtime: {self.equal} of {self.compared} tokens equal", style)


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON takes it."""
    tokens = [
        {
            "token": token.token,
            "text": said,
            "final_token": token.final_token,
            "final_text": unsaid,
            "changed": token.changed,
            "selected_layer": token.selected_layer,
            "entropy": list(token.entropy),
        }
        for token, said, unsaid in zip(comparison.confident.tokens, comparison.said, comparison.unsaid, strict=True)
    ]
    return {
        "prompt": comparison.prompt,
        "plain": comparison.plain,
        "confident": "".join(comparison.said),
        "tokens": tokens,
        "onnx_tokens": comparison.onnx.ids,
    }


def comparison_text(comparison: Comparison, console: Console) -> Iterator[RenderableType]:
    """Both texts side by side, and a table of the tokens that changed."""
    yield _texts(comparison, console)
    changed = [
        (index, *row)
        for index, row in enumerate(zip(comparison.confident.tokens, comparison.said, comparison.unsaid, strict=True))
        if row[0].changed
    ]
    if changed:
        yield _changes(changed[:MOST_ROWS], console)
    if len(changed) > MOST_ROWS:
        yield f"  and {len(changed) - MOST_ROWS} more: --json lists them all"
    yield ""


def _texts(comparison: Comparison, console: Console) -> Table:
    from rich.text import Text

    table = _table(console)
    width = (min(console.width, MOST_COLUMNS) - 7) // 2  # 7: the borders and the space inside them
    table.add_column("final layer", width=width, overflow="fold")
    table.add_column("most confident layer", width=width, overflow="fold")
    prompt = Text(visible(comparison.prompt), "dim")
    confident = prompt.copy()
    for token, said in zip(comparison.confident.tokens, comparison.said, strict=True):
        confident.append_text(_marked(said, console) if token.changed else Text(visible(said)))
    table.add_row(prompt + Text(visible(comparison.plain), ""), confident)
    return table


def _marked(said: str, console: Console) -> Text:
    """A changed token, seen without colours too; a line break that changed is written out before it breaks."""
    from rich.text import Text

    head, line_break, rest = said.partition("\n")
    shown = spelled(head + line_break)
    marked = Text(shown if console.is_terminal else f"«{shown}»", CHANGED_STYLE)
    return marked + Text(line_break + visible(rest))


def _changes(rows: Sequence[tuple[int, TracedToken, str, str]], console: Console) -> Table:
    table = _table(console)
    table.add_column("token", justify="right")
    table.add_column("final layer")
    table.add_column("most confident", style=CHANGED_STYLE)
    table.add_column("layer", justify="right")
    table.add_column("entropy in nats, final -> selected", justify="right")
    for index, token, said, unsaid in rows:
        entropies = f"{token.entropy[0]:.3f} -> {token.entropy[token.depth]:.3f}"
        table.add_row(str(index + 1), quoted(unsaid), quoted(said), str(token.selected_layer), entropies)
    return table


def _table(console: Console) -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.ROUNDED if console.is_terminal else None, header_style="bold", border_style="dim")
