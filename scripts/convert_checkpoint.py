"""``python scripts/convert_checkpoint.py MODEL SOURCE DESTINATION [--verify]``: the command ``cast-convert``."""

from __future__ import annotations

from cast_jax.convert.command import main

if __name__ == "__main__":
    main()
