"""``python -m cast_jax.main --config configs/demo.py:cast --workdir runs/demo``"""

from __future__ import annotations

import ast
import contextlib
import logging
import re
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict, config_flags

from cast_jax import pipeline
from cast_jax.core import distributed
from cast_jax.core.errors import DivergedError, UserError
from cast_jax.core.files import is_full
from cast_jax.core.logging import setup_logging
from cast_jax.core.runtime import StopSignals, platform_notes, setup
from cast_jax.workdir import make_workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same command continues what is there.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "What to run: configs/<name>.py:<step>[,key=value ...].")

# A field of a model, a step, a view or the loader: not in the configuration unless it differs from the default (a
# model's: of its name).
_FIELD = re.compile(r"--config\.(model|steps|data(?=\.view\.|\.loader\.))\.(\w+)\.([\w.]+)=(.*)", re.DOTALL)

# How XLA's errors begin, or what they say, where a process does not get an answer from another.
_OTHERS_FAULT = re.compile(
    r"^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)|gloo|nccl|heartbeat|connection|socket|remote process", re.I
)

_AGAIN = "start all processes again with the same command to continue"

logger = logging.getLogger("cast_jax.main")  # run as a program, __name__ is "__main__"


def main(argv: list[str]) -> None:
    """Runs the step of the configuration; what the user can mend ends with its message and exit code 1."""
    if len(argv) > 1:
        sys.exit(f"unknown arguments: {' '.join(argv[1:])}; see --help")
    workdir, config = Path(_WORKDIR.value or ""), _CONFIG.value.to_dict()
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        setup(config["runtime"])
        distributed.initialize(config["distributed"])
        make_workdir(workdir)
        setup_logging(workdir / "log.txt")
        for note in platform_notes():
            logger.warning("%s", note)
        with StopSignals() as stop, stop.by_force(distributed.patience()):
            pipeline.run(config, workdir)
    except (UserError, DivergedError, OSError) as error:
        full = is_full(error)
        hint = f" (for {workdir}): free some, then run the same command again to continue" if full else ""
        logger.error("error: %s%s", error, hint)
        distributed.leave(1)
    except SystemExit as stopped:  # by a signal
        distributed.leave(int(stopped.code or 0))
    except JaxRuntimeError as error:
        if not distributed.several():
            raise
        reason = str(error).splitlines()[0][:200]
        if _OTHERS_FAULT.search(reason):
            logger.error("error: another process is gone, or cannot be reached (%s); %s", reason, _AGAIN)
        else:
            logger.exception("error: %s", reason)
        distributed.leave(1)
    except BaseException:
        if not distributed.several():
            raise
        logger.exception("unexpected")
        distributed.leave(1)
    distributed.barrier()


def run() -> None:
    """The entry point."""
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags and loads the configuration; what is wrong with them ends with a line and exit code 1."""
    argv = _joined(argv)
    fields = [found for argument in argv if (found := _FIELD.fullmatch(argument))]
    others = [argument for argument in argv if not _FIELD.fullmatch(argument)]
    # Configuration files import configs/common.py: from here, or from where they lie themselves.
    files = [argument.removeprefix("--config=").partition(".py")[0] for argument in argv[1:] if ".py" in argument]
    sys.path[:0] = [str(Path.cwd()), *(str(Path(file).resolve().parent.parent) for file in files)]
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    sys.argv = others  # where ml_collections looks for what the configuration must have
    try:
        rest = flags.FLAGS(others)
        _CONFIG.value.to_dict()  # a file that could not be read is only reported when it is used
        for found in fields:
            with _CONFIG.value.unlocked():
                _set_field(_CONFIG.value, found)
        return rest
    except SystemExit:
        sys.exit(0)  # --help was printed, after which absl would exit with 1
    except (KeyError, AttributeError) as error:  # --config.a.b=c, where there is no a.b
        reason: object = error
        while isinstance(reason, BaseException):  # ml_collections wraps one in the other
            reason = reason.args[0]
        overrides = " ".join(argument for argument in argv if argument.startswith("--config."))
        sys.exit(f"error: {overrides}: the configuration has no {str(reason).replace(chr(10), '. ')}")
    except ImportError as error:
        sys.exit(f"error: {error}; configurations import configs/common.py: run where the folder configs is")
    except (flags.Error, OSError, TypeError, ValueError) as error:
        # Of an error in a configuration file, ml_collections makes a whole traceback, which ends with the reason.
        lines = str(error).strip().splitlines()
        sys.exit(f"error: {lines[-1] if any(line.startswith('Traceback') for line in lines) else error}")


def _joined(argv: list[str]) -> list[str]:
    """``--config.steps.… VALUE`` as one argument, like ``--config.steps.…=VALUE``."""
    joined: list[str] = []
    for argument in argv:
        if joined and not argument.startswith("--") and "=" not in joined[-1] and _FIELD.fullmatch(f"{joined[-1]}="):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _set_field(config: ConfigDict, argument: re.Match[str]) -> None:
    """Sets a field that the configuration may leave unsaid; the settings know which there are, and their types.

    Raises:
      TypeError: the configuration says it, with a value of another type.
    """
    section, owner, path, text = argument.groups()
    part, (*groups, name) = config[section][owner], path.split(".")
    for group in groups:
        if group not in part:
            part[group] = {}
        part = part[group]
    value: Any = {"true": True, "false": False}.get(text.lower(), text)
    if value is text and not isinstance(part.get(name), str):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(text)
    try:
        part[name] = value
    except TypeError as error:
        held = part[name]
        of_one = f"holds {', '.join(held)}; set one of them" if isinstance(held, ConfigDict) else ""
        raise TypeError(f"{argument[0]}: {name} {of_one or f'must be of type {type(held).__name__}'}") from error


if __name__ == "__main__":
    run()
