"""``python -m cast_jax.main --config configs/demo.py:cast --workdir runs/demo``"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from cast_jax import pipeline
from cast_jax.core.errors import DivergedError, UserError
from cast_jax.core.logging import setup_logging
from cast_jax.core.runtime import setup

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same command continues what is there.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "What to run: configs/<name>.py:<step>[,key=value ...].")

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Runs the step of the configuration; what the user can mend ends with its message and exit code 1."""
    if len(argv) > 1:
        sys.exit(f"unknown arguments: {' '.join(argv[1:])}; see --help")
    workdir, config = Path(_WORKDIR.value), _CONFIG.value.to_dict()
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        setup_logging(workdir / "log.txt")
        setup(config["runtime"])
        pipeline.run(config, workdir)
    except (UserError, DivergedError, OSError) as error:
        logger.error("error: %s", error)
        sys.exit(1)


def run() -> None:
    """The entry point: parses flags, with readable messages for unknown ones."""
    sys.path.insert(0, str(Path.cwd()))  # configuration files import configs/common.py
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {error}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        sys.exit(f"error: --config: {error}")


if __name__ == "__main__":
    run()
