"""Folders written as a whole or not at all; one that is there is replaced only as it was written."""
import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError

import common
from common import UserError

LIST = "files.sha256"           # the digest of every file in a folder, as sha256sum writes it


@contextlib.contextmanager
def new_folder(folder: str, replace: bool = False):
    """Within: a folder beside it, which in the end becomes `folder`, whole; after an error it goes.

    Raises UserError where something is there already, unless it is to be replaced, and where it
    cannot be written.
    """
    told, folder = folder, os.path.abspath(os.path.expanduser(folder))
    if os.path.lexists(folder) and not replace:
        raise UserError(f"{told} is there already; choose another folder")
    above, made = os.path.dirname(folder), []
    while not os.path.lexists(above):
        made.append(above)
        above = os.path.dirname(above)
    above = os.path.dirname(folder)
    try:
        os.makedirs(above, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=above) as beside:
            new, old = f"{beside}/whole", f"{beside}/old"
            os.mkdir(new)
            yield new
            swap(folder, new, old)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{told} cannot be written: {reason}; choose another folder") from None
    finally:
        for parent in made:                             # those that are still empty
            with contextlib.suppress(OSError):
                os.rmdir(parent)


def swap(folder: str, new: str, old: str) -> None:
    """Put `new` in the place of `folder`, which becomes `old`."""
    if os.path.isdir(folder):
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        if os.path.isdir(old):
            os.rename(old, folder)
        raise


def write_list(folder: str) -> None:
    """Write LIST, by which the folder is known to be ours, and unchanged."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests(folder).items())]
    common.write_text(f"{folder}/{LIST}", "".join(lines))


def digests(folder: str) -> dict:
    """{path below the folder: its file's digest}; a link and an empty folder have none."""
    found = {}
    for above, folders, files in os.walk(folder):
        for name in [*folders, *files, "."]:
            path = Path(above, name)
            where = str(path.relative_to(folder))
            if path.is_symlink():
                found[where] = "link"
            elif path.is_file():
                with open(path, "rb") as f:
                    found[where] = hashlib.file_digest(f, "sha256").hexdigest()
            elif name == "." and not (folders or files) and where != ".":
                found[where] = "empty"
    return found


def replaceable(folder: str, is_own_name=None) -> str:
    """The real folder of this name, which may be replaced: it is not there, empty, or unchanged.

    is_own_name: whether a path in it is ours, for folders from before there was a LIST. Raises
    UserError for any other folder.
    """
    if not str(folder).strip():
        raise UserError("the folder to write has no name; name one, or leave the option out")
    real = Path(os.path.realpath(folder))
    for place, whose in ((os.getcwd(), "the current folder"), (Path.home(), "your home folder")):
        if Path(os.path.realpath(place)).is_relative_to(real):
            raise UserError(f"{folder} is {whose}, or above it; name a folder of its own")
    if real.exists() and not real.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
    with common.named_file(str(folder), "choose another folder"):
        found = digests(real)
        known = found.pop(LIST, None)
        if known is None:
            others = []
            for name, digest in found.items():
                if is_own_name is None or not is_own_name(name) or len(digest) < 64:
                    others.append(name)
        else:
            lines = Path(real, LIST).read_text(encoding="utf-8").splitlines()
            written = {line[66:]: line[:64] for line in lines}
            others = [name for name in found if found[name] != written.get(name)]
    if others:
        some = ascii(min(others))[:80]
        raise UserError(f"{folder} holds what was not written here, or was changed: {some}, "
                        f"{len(others)} in all; move it away, or choose another folder")
    return str(real)
