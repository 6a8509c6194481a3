"""The command `asyncckpt`: parse, call, print. Each module here is a group of commands, which add themselves to
`app.app`; what they do to storage stands above this package, in functions that need no command line.
"""

from __future__ import annotations

import sys

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ImportError as exc:
    print(f"the command asyncckpt needs one more package ({exc.name}): pip install 'asyncckpt[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

from asyncckpt.cli import app, copy, diff, formats, ls, prune, report, show, verify, watch

__all__ = ["app", "copy", "diff", "formats", "ls", "main", "prune", "report", "show", "verify", "watch"]


def main() -> None:
    """Runs the command line and exits with its status."""
    app.app(prog_name="asyncckpt")
