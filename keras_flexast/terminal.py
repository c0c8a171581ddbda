"""What the terminal shows: errors and warnings in one line, tables, nothing of TensorFlow's."""

import contextlib
import os
import sys
import warnings

from rich.console import Console

from tf_data_pipelines.settings import DataWarning

# Names of files and classes are text, neither markup nor emoji.
errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


@contextlib.contextmanager
def nothing_on_stderr():
    """Hide what is written to standard error, also from C++: TensorFlow's start-up lines."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def show_warning(message, category, filename, lineno, file=None, line=None):
    """A warning about the user's sounds as one line; those of other packages as they are."""
    if issubclass(category, DataWarning):
        errors.print(f"Warning: {message}", style="yellow")
    else:
        errors.print(warnings.formatwarning(message, category, filename, lineno, line).rstrip())


def print_tables(*tables):
    """Print tables; names of files and classes are text."""
    Console(markup=False, emoji=False).print(*tables)
