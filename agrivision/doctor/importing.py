"""Imports modules one after the other, and says how each went: `python importing.py torch numpy …`.

A process of its own, without the rest of the package: a library of another build may well end it, and
the module whose name came last is then to blame. Each line is JSON: the module, and what went wrong.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def _torchvision(module: Any) -> None:
    """Its operators are a library of their own, which is left out in silence where it does not fit."""
    import torch  # noqa: PLC0415 - only where it is asked for

    module.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)


_USES: Mapping[str, Callable[[Any], None]] = {"torchvision": _torchvision}


def main() -> None:
    """Import what the command line names."""
    for name in sys.argv[1:]:
        _say(module=name)
        begin = time.perf_counter()
        try:
            _USES.get(name, lambda _: None)(importlib.import_module(name))
        except BaseException as error:  # some leave by SystemExit
            lines = str(error).strip().splitlines()
            _say(module=name, error=f"{type(error).__name__}: {lines[0] if lines else ''}")
        else:
            _say(module=name, seconds=time.perf_counter() - begin)


def _say(**content: object) -> None:
    # What a module prints when it is imported does not begin like this.
    sys.stdout.write(f"\nimporting: {json.dumps(content)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
