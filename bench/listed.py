"""A list of what a folder holds, by which it is known to be ours and unchanged: else it stays."""
import hashlib
import os
from pathlib import Path

import common
from common import UserError

LIST = "files.sha256"           # the digest of every file in a folder, as sha256sum writes it


def write_list(folder: str) -> None:
    """Write LIST, by which the folder is known to be ours, and unchanged."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests(folder).items())]
    common.write_text(f"{folder}/{LIST}", "".join(lines))


def digests(folder: str) -> dict:
    """{path below the folder: its file's digest, or where a link points to, hashed}.

    An empty folder has none.
    """
    found = {}
    for above, folders, files in os.walk(folder):
        for name in [*folders, *files, "."]:
            path = Path(above, name)
            where = str(path.relative_to(folder))
            if path.is_symlink():
                target = hashlib.sha256(os.fsencode(os.readlink(path))).hexdigest()
                found[where] = "link " + target[:59]
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
                is_file = len(digest) == 64 and not digest.startswith("link")
                if is_own_name is None or not is_own_name(name) or not is_file:
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
