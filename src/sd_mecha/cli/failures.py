"""One clear message for what goes wrong, and the exit code for it.

0: done. 1: the command failed, or was stopped. 2: the command was called wrongly (click does that by itself).
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click

from sd_mecha.errors import MechaError

FAILED = 1


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn errors that a user can cause into a message and exit code 1.

    Errors of other kinds are faults of this library or of an extension: they get a message as well, and the
    advice to show the traceback.

    Args:
        debug: print the traceback as well.
    """
    try:
        yield
    except (click.ClickException, click.exceptions.Exit):
        raise
    except KeyboardInterrupt as error:
        _end(
            "stopped; a file that stood under the output's name is still there as it was",
            error,
            debug,
        )
    except (MechaError, OSError) as error:
        _end(message_of(error), error, debug)
    except Exception as error:
        _end(f"{type(error).__name__}: {message_of(error)}\nRun again with --debug to see where.", error, debug)


def message_of(error: BaseException) -> str:
    """What is to be said of an error; notes follow on lines of their own."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, MechaError):
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}"
    return "\n".join([str(error) or type(error).__name__, *getattr(error, "__notes__", ())])


def _end(message: str, error: BaseException, debug: bool) -> None:
    if debug:
        traceback.print_exception(type(error), error, error.__traceback__)
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(message, err=True)
    raise click.exceptions.Exit(FAILED) from None
