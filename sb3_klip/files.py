"""Writing files atomically, so that no file is ever incomplete."""

import contextlib
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def naming(path: str | pathlib.Path) -> Iterator[None]:
    """
    Errors of writing that name the file: the system does not where the disk is full, or where another file stands in for it.

    :param path: the file that is written
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """
    Write a file so that at any moment, a kill or a power cut included, there is the old one or the new one, and whole.

    :param path: file to write; a file that is there is replaced
    :param content: what to write
    :raises OSError: naming the file, if it cannot be written
    """
    path = pathlib.Path(os.path.realpath(path))  # what a link points to
    if path.exists() and not path.is_file():  # a pipe, or a device
        with naming(path):
            path.write_bytes(content)
        return
    # In the same folder: a rename from another file system would be a copy. Two threads may write the same file. A name has a
    # greatest length.
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            if path.exists():
                shutil.copymode(path, temporary)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for pause in (0.1, 1.0, 5.0, None):
            try:
                temporary.replace(path)
                break
            except PermissionError:  # Windows replaces no file that a program has open, such as a virus scanner
                if os.name == "posix" or pause is None:
                    raise
                time.sleep(pause)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name must reach the disk, too; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some file systems cannot
                os.fsync(folder)
        finally:
            os.close(folder)
