"""agrivision: train a UNet on four-band farmland imagery and turn scenes into maps.

Names are loaded when they are first used, so that `import agrivision` and the command line start
before torch does: a signal that arrives while torch is being imported must already find its handler.
"""

from __future__ import annotations

__version__ = "0.1.0"
