"""Files that appear whole or not at all."""

import os
import pathlib
import uuid

PARTIAL = ".partial"  # ending of the name of what is being written


def atomic_write(path, content):
    """Write text or bytes to a file that appears whole or not at all, also after a power cut."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode(errors="surrogateescape")  # names of files may be any bytes
    partial = hidden(path)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} cannot be written: {reason}. Choose another place.") from error
    finally:
        partial.unlink(missing_ok=True)


def hidden(path):
    """A name beside a path for what is being written."""
    path = pathlib.Path(path)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
