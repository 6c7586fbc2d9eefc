"""Which commit this code is, for whoever has to find it again."""

from __future__ import annotations

import subprocess
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
FILE = "COMMIT"  # beside the packages, in a copy that has no repository any more


def commit() -> str | None:
    """The commit of a checkout that this package runs from, with `-dirty` after changes.

    Returns:
        What a copy of a checkout was given to say; None for an installed package, which has a version.
    """
    if not (_ROOT / ".git").exists():  # installed: a repository around it is another one's
        return _noted(_ROOT / FILE)
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _noted(file: Path) -> str | None:
    try:
        with file.open(encoding="utf-8") as opened:
            text = opened.read(100).strip()
    except (OSError, ValueError):
        return None
    return text if text.isprintable() and text else None
