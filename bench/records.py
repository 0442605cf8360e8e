"""Files that a user brings, read strictly: JSON, JSON lines, lists of names, plain text.

All are UTF-8, with or without a byte order mark. Whatever else they hold is a UserError that names
file and line. json.loads alone takes a key twice and drops the first one's value, and makes texts
of half an emoji, which nothing can tokenize or write. A NUL that JSON writes ("\\u0000") is a sign
like others; one that stands in the file itself tells that it is UTF-16, or no text.
"""
import json
import os
import re
import reprlib
import warnings

import common
from common import UserError, check_text, is_texts, named_file

HALF = re.compile(r"\\u[dD][89a-fA-F]")         # how JSON writes half of a UTF-16 pair

# ------------------------------------------------------------------------------------------- JSON


def read_json(path: str, remedy: str):
    """The value of a JSON file."""
    return load_json(read_text(path, remedy), path, remedy)


def read_text(path: str, remedy: str) -> str:
    """The text of a file. A NUL in it is refused: it is UTF-16, or no text at all."""
    with named_file(path, remedy), open(path, encoding="utf-8-sig") as f:
        text = f.read()
        if "\0" in text:
            line = 1 + text.count("\n", 0, text.index("\0"))
            raise ValueError(f"line {line} holds a NUL, as text in UTF-16 does")
    return text


def load_json(text: str, where: str, remedy: str):
    """The value that a text of JSON stands for. NaN passes: some of SNI's files hold it, unread.

    Raises UserError, which starts with `where`, for a key twice and for texts that are no Unicode.
    """
    with named_file(where, remedy):
        try:
            value = json.loads(text, object_pairs_hook=_once_each)
        except _Twice as error:
            line = f", line {_line_of_second(text)}" if "\n" in text else ""
            raise UserError(f"{where}{line}: the key {brief(error.args[0])} is there twice; "
                            "keep one") from None
        if HALF.search(text):                   # a whole emoji has two of them, and passes
            check_texts(value, where)
    return value


class _Twice(ValueError):
    """A key that an object has twice."""


def _once_each(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return found


def _line_of_second(text: str) -> int:
    """The line on which an object's key comes for the second time: json's parser, told to look."""
    def parse_object(text_and_end, strict, scan, *others):
        starts = []                             # of this object's values, in its order

        def scan_value(text, start):
            starts.append(start)
            return scan(text, start)

        def locate(pairs):
            seen = set()
            for (key, _), start in zip(pairs, starts):
                if key in seen:
                    raise _Twice(start)
                seen.add(key)
            return dict(pairs)

        return json.decoder.JSONObject(text_and_end, strict, scan_value, None, locate)

    decoder = json.JSONDecoder()
    decoder.parse_object = parse_object
    try:
        json.scanner.py_make_scanner(decoder)(text, len(text) - len(text.lstrip()))
    except _Twice as error:
        return 1 + text.count("\n", 0, error.args[0])


def check_texts(value, where: str) -> None:
    """`check_text` for all texts in a value of JSON; `where` grows by the keys that lead to one."""
    if isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, dict):
        for key, part in value.items():
            check_text(key, f"{where}, a key")
            check_texts(part, f"{where}, {key}")
    elif isinstance(value, list):
        for n, part in enumerate(value):
            check_texts(part, f"{where} {n}")


def read_json_lines(path: str, remedy: str, **types: type) -> list[dict]:
    """The objects of a JSON-lines file, each with these keys, their values of these types.

    Raises UserError naming file and line for anything else, and for a file without lines.
    """
    return [row for _, row in numbered_rows(path, remedy, **types)]


def numbered_rows(path: str, remedy: str, **types: type) -> list[tuple[str, dict]]:
    """`read_json_lines` with each object's place, "FILE, line N", before it."""
    rows = []
    for n, line in enumerate(read_text(path, remedy).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {n}"
        row = load_json(line, where, remedy)
        if not isinstance(row, dict):
            raise UserError(f"{where}: no JSON object; {remedy}")
        for key, kind in types.items():
            if key not in row:
                raise UserError(f"{where}: no {key}; {remedy}")
            value = row[key]
            if not isinstance(value, kind) or (kind is list and not is_texts(value)):
                name = {str: "text", list: "list of texts"}.get(kind, "number")
                raise UserError(f"{where}: {key} is {brief(value)}, no {name}; {remedy}")
        rows.append((where, row))
    if not rows:
        raise UserError(f"{path} is empty; {remedy}")
    return rows


def brief(value) -> str:
    """A value as an error line shows it, however long or deep it is."""
    return value[:40] if isinstance(value, str) else reprlib.repr(value)


def id_text(row: dict, where: str, default: str | None = None) -> str:
    """A record's id as text. Raises UserError for one that is neither text nor a whole number."""
    value = row.get("id", default)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f"{where}: id is {brief(value)}, neither text nor a whole number")
    return str(value)


def text_of(row: dict, key: str, where: str) -> str | None:
    """A record's value, None where it has none. Raises UserError for one that is no text."""
    value = row.get(key)
    if not (value is None or isinstance(value, str)):
        raise UserError(f"{where}: {key} is {brief(value)}, no text")
    return value


# ------------------------------------------------------------------------------------- plain text

def read_names(path: str, remedy: str) -> list[str]:
    """The names in a file, one a line. Raises UserError for one twice and for a file without."""
    found = {}                                  # name -> its line
    for n, line in enumerate(read_text(path, remedy).split("\n"), 1):
        for name in line.split():
            if os.path.basename(name) != name:          # else one file has two names
                raise UserError(f"{path}, line {n}: {name[:80]} is a path; write the name alone")
            if name in found:
                raise UserError(f"{path}, line {n}: {name} is listed on line {found[name]} too; "
                                "keep one")
            found[name] = n
    if not found:
        raise UserError(f"{path} is empty; it should name one task a line")
    return list(found)


# Scripts that write no spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf"
                      "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]")


def read_documents(path: str) -> list[str]:
    """The documents of a file, one a line: plain text, or JSON lines with a "text".

    Which it is, its first line tells, whatever the file is called. Documents of less than three
    words, or nine signs of a script without spaces, are left out with a word. Raises UserError
    where the file cannot be read or has none.
    """
    remedy = "--text names plain text in UTF-8, one document a line, or JSON lines with a text"
    text = read_text(path, remedy)
    if path.endswith((".json", ".jsonl")) or _starts_as_json(text):
        lines = [row["text"] for row in read_json_lines(path, remedy, text=str)]     # C4's form
    else:
        lines = [line for line in text.splitlines() if line.strip()]
    documents = [line for line in lines if is_document(line)]
    if not documents:
        raise UserError(f"{path} has no document of three words or more; {remedy}")
    if len(documents) < len(lines):
        warnings.warn(f"{path}: {len(lines) - len(documents)} of {len(lines)} documents are left "
                      "out, as they have less than three words")
    return documents


def _starts_as_json(text: str) -> bool:
    """Whether text starts with an object, or with a list of objects or texts, as only JSON does."""
    return re.match(r'\s*(\{\s*"|\[\s*[{"])', text) is not None


def is_document(line: str) -> bool:
    return len(line.split(maxsplit=2)) == 3 or len(UNSPACED.findall(line)) >= 9


def hold_out(tasks: list, options) -> tuple[list, list]:
    """(those to train on, those that --hold-out K leaves out: K tasks, P3's whole data sets).

    They are the same whatever the seed, and those of a smaller K are among those of a larger.
    """
    def unit(task):
        return task.category if options.format == "p3" else task.name

    n = getattr(options, "hold_out", 0)         # earlier code had none
    names = sorted({unit(task) for task in tasks}, key=lambda x: common.digest(f"held out: {x}"))
    if n and n >= len(names):
        kind = "data sets" if options.format == "p3" else "tasks"
        raise UserError(f"--hold-out {n} leaves nothing to train on: {options.data} has "
                        f"{len(names)} training {kind}; hold out fewer")
    out = set(names[:n])
    return ([task for task in tasks if unit(task) not in out],
            [task for task in tasks if unit(task) in out])
