"""Prompts to evaluate with: the user's own file, a set that papers use, or one of ours, each with its hash and licence.

A file is text (one prompt per line), JSON lines, JSON, TSV, CSV or parquet. A named set is downloaded once, at a pinned
revision. Our own sets are the files of evaluation/prompts/, named without suffix. To add one, put a file there; to add
a published set, add it to `PUBLISHED` below.
"""

import csv
import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq

from spin_diffusion.samples.drawn import Request, requests_of
from spin_diffusion.store.input_error import InputError, broken_character, one_line, open_regular, printable, read_bytes
from spin_diffusion.store.shipped import ROOT

OWN_SETS = ROOT / "evaluation" / "prompts"
SUFFIXES = (".txt", ".jsonl", ".json", ".tsv", ".csv", ".parquet")
PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text")
"""Where a prompt is looked for, whatever the case of the name."""
MAX_BYTES = 1 << 30
"""A larger file is no set of prompts."""
CATEGORY_COLUMNS = ("category", "tag", "style")


@dataclass(frozen=True)
class PromptRow:
    """One prompt."""

    id: str
    """Its place in the set, from 00000; part of file names."""
    prompt: str
    category: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order, every one once."""

    name: str
    rows: tuple[PromptRow, ...]
    sha256: str
    """`prompts_hash` of the prompts in their order. Categories are not part of it."""
    licence: str
    source: str
    """Where it came from: an address with its revision, or the name of the file."""
    duplicates: int = 0
    """Repeated prompts that were left out, before the limit."""
    broken: int = 0
    """Prompts that were left out as they hold half a character, or bytes that are not UTF-8."""

    def requests(self, per_prompt: int, seed: int) -> list[Request]:
        """What every model is asked for: each prompt `per_prompt` times, each time with a seed of its own."""
        return requests_of([vars(row) for row in self.rows], per_prompt, seed)

    def said_left_out(self) -> str:
        """What was left out, as the end of a line; empty if nothing was."""
        counts = ((self.duplicates, "repeated prompts"), (self.broken, "prompts with broken characters"))
        return "".join(f"; {count} {what} left out" for count, what in counts if count)


@dataclass(frozen=True)
class Published:
    """Where a named set is."""

    files: tuple[str, ...]
    licence: str
    repository: str
    """Data set of the hub."""
    revision: str
    file_is_category: bool = False
    """Each file is one category, named like it."""

    @property
    def address(self) -> str:
        """A page where a person can get the files."""
        return f"https://huggingface.co/datasets/{self.repository}/tree/{self.revision}"


PUBLISHED = {
    "parti": Published(
        files=("PartiPrompts.tsv",),
        licence="Apache-2.0",
        repository="nateraw/parti-prompts",
        revision="944b156abfdad7627c3221b5ec4f6a6fb060a197",
    ),
    "hpdv2": Published(
        files=tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")),
        licence="not stated by its page; prompts from DiffusionDB (CC0) and COCO captions (CC BY 4.0)",
        repository="zhwang/HPDv2",
        revision="3246bc66b01b69837fabf975bddbcbb52a9afac2",
        file_is_category=True,
    ),
    "pickapic_test": Published(
        files=("data/test_unique-00000-of-00001-e852c19ead276a89.parquet",),
        licence="not stated; written by users, some of it explicit",
        repository="yuvalkirstain/pickapic_v2_no_images",
        revision="main",  # the name of the file contains a hash of its content
    ),
    "drawbench": Published(
        files=("data/test-00000-of-00001.parquet",),
        licence="not stated",
        repository="Jialuo21/DrawBench",
        revision="870c4ef7e6c67eafa7c6e26ba79b7c0d52c9cb16",
    ),
}
"""Sets that papers use, by name."""


def load_prompts(spec: str, limit: int | None = None) -> PromptSet:
    """The prompts of a file or of a named set, in their order, each once.

    White space around a prompt is dropped; nothing else is changed. A JSON file is a list of strings or of objects, or
    an object of category -> list of strings.

    Args:
        spec: path of a file; or the name of a set in `PUBLISHED`, or of one of our own in `OWN_SETS`.
        limit: only the first ones of those that are left when repeated ones are gone. None = all.

    Raises:
        InputError: no such file or set, a set that cannot be downloaded, a line that cannot be read, or fewer than
            2 prompts.
    """
    if limit is not None and limit < 2:
        raise InputError(f"{limit} prompts are too few to compare models, give 2 or more (200 say more)")
    place = _find(spec)
    prompts: dict[str, str | None] = {}
    total = broken = 0
    for file, category_of_file in place.files:
        for where, prompt, category in _read(file):
            total += 1
            if isinstance(prompt, str) and broken_character(prompt) is not None:
                broken += 1
            else:
                prompts.setdefault(_checked(prompt, where), category_of_file or category)
    first = list(prompts.items())[:limit]
    if len(first) < 2:
        few = f"{spec}: {len(first)} prompts are too few to compare models, give 2 or more (200 say more)"
        raise InputError(few + (f"; {broken} with broken characters were left out" if broken else ""))
    return PromptSet(
        name=place.name,
        rows=tuple(PromptRow(f"{number:05d}", prompt, category) for number, (prompt, category) in enumerate(first)),
        sha256=prompts_hash([prompt for prompt, _ in first]),
        licence=place.licence,
        source=place.source,
        duplicates=total - broken - len(prompts),
        broken=broken,
    )


@dataclass(frozen=True)
class _Place:
    """Where the prompts of a set are read."""

    name: str
    licence: str
    source: str
    files: list[tuple[Path, str | None]]
    """Each with the category of all its prompts, where the file is one."""


def _find(spec: str) -> _Place:
    path = Path(spec)
    if os.path.exists(path) and not os.path.isdir(path):
        is_own = path.resolve().parent == OWN_SETS.resolve()
        licence = "CC0-1.0" if is_own else "not stated"
        return _Place(printable(path.stem), licence, printable(path.name), [(path, None)])
    own = {path.stem: path for path in sorted(OWN_SETS.glob("*")) if path.suffix in SUFFIXES}
    if spec in own:
        return _Place(spec, "CC0-1.0", f"evaluation/prompts/{own[spec].name}", [(own[spec], None)])
    if spec not in PUBLISHED:
        raise InputError(_unknown(spec, [*own, *PUBLISHED]))
    published = PUBLISHED[spec]
    files = [_download(spec, published, file) for file in published.files]
    source = f"{published.address}, {', '.join(published.files)}"
    return _Place(
        spec, published.licence, source, [(file, file.stem if published.file_is_category else None) for file in files]
    )


def prompts_hash(prompts: Sequence[str]) -> str:
    """SHA-256 of the prompts in their order, as a JSON list in UTF-8: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(prompts), ensure_ascii=False).encode()).hexdigest()


def _unknown(spec: str, names: list[str]) -> str:
    if Path(spec).suffix or "/" in spec:
        return f"{spec}: there is no such file; the named prompt sets are {', '.join(names)}"
    nearest = difflib.get_close_matches(spec, names, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return f"there is no prompt set {spec!r}: {hint}There are {', '.join(names)}; the path of a file works too"


def _download(name: str, published: Published, file: str) -> Path:
    try:
        repository, revision = published.repository, published.revision
        return Path(huggingface_hub.hf_hub_download(repository, file, repo_type="dataset", revision=revision))
    except Exception as error:  # the hub's client raises kinds of its HTTP library, which differs between versions
        wanted = file if len(published.files) == 1 else f"{file} (and {len(published.files) - 1} more files)"
        raise InputError(
            f"prompt set {name!r} cannot be downloaded ({one_line(error)}): get {wanted} from {published.address} and "
            "give the path of the local file in place of the name"
        ) from error


_Rows = Iterator[tuple[str, object, str | None]]
"""(where, prompt as it was written, category) of every row."""


def _column(names: Sequence[str], usual: tuple[str, ...]) -> str | None:
    """The first usual one of these columns or keys, whatever its case."""
    by_folded = {name.strip().casefold(): name for name in reversed(names)}
    return next((by_folded[name] for name in usual if name in by_folded), None)


def _columns(path: Path, names: Sequence[str]) -> tuple[str, str | None]:
    """The columns of the prompt and of the category of a table; InputError where it lacks the prompt."""
    prompt = _column(names, PROMPT_COLUMNS)
    if prompt is None:
        wanted = f"of the prompt ({', '.join(PROMPT_COLUMNS)})"
        raise InputError(f"{path} has no column {wanted}; its columns are {', '.join(names) or 'none'}")
    return prompt, _column(names, CATEGORY_COLUMNS)


def _read(path: Path) -> _Rows:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: prompts are read from {', '.join(SUFFIXES)} files")
    if suffix == ".parquet":
        return _read_parquet(path)
    text = _text(path)
    if suffix == ".txt":
        return ((f"{path} line {n}", line, None) for n, line in enumerate(text.split("\n"), start=1) if line.strip())
    if suffix == ".jsonl":
        return _read_objects(_json_lines(path, text))
    if suffix == ".json":
        return _read_json(path, text)
    return _read_table(path, text)


def _text(path: Path) -> str:
    """The whole file with \\n at the end of its lines. Other separators of Unicode are part of a prompt."""
    data = read_bytes(path, MAX_BYTES)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path} line {line} is not UTF-8: save the file as UTF-8") from error


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path} line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f'{path} line {number} is not JSON ({one_line(error)}): expected an object such as {{"prompt": '
                    '"a red fox"}'
                ) from None


def _read_json(path: Path, text: str) -> _Rows:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return _read_objects(_json_lines(path, text))
        raise InputError(f"{path} is not JSON: {one_line(error)}") from error
    if isinstance(value, dict) and value and all(isinstance(item, list) for item in value.values()):
        return (
            (f"{path} entry {number} of {category!r}", item, category)
            for category, items in value.items()
            for number, item in enumerate(items, start=1)
        )
    entries = value if isinstance(value, list) else [value]
    named = ((f"{path} entry {number}", item) for number, item in enumerate(entries, start=1))
    return _read_objects(named)


def _read_objects(values: Iterator[tuple[str, object]]) -> _Rows:
    for where, value in values:
        if isinstance(value, str):
            yield where, value, None
        elif isinstance(value, dict):
            prompt, category = _column(list(value), PROMPT_COLUMNS), _column(list(value), CATEGORY_COLUMNS)
            if prompt is None:
                raise InputError(f'{where} has no \'prompt\': expected an object such as {{"prompt": "a red fox"}}')
            # Not every object needs a category
            yield where, value[prompt], None if category is None else _category(value[category])
        else:
            raise InputError(f'{where}: expected a string or an object such as {{"prompt": "a red fox"}}')


def _read_table(path: Path, text: str) -> _Rows:
    lines = _tsv_lines(text) if path.suffix.lower() == ".tsv" else _csv_lines(path, text)
    _, header = next(lines, (0, []))
    prompt, category = _columns(path, header)
    for number, fields in lines:
        where = f"{path} line {number}"
        if len(fields) > len(header):
            raise InputError(
                f"{where} has {len(fields)} fields and the header {len(header)}: put quotes around a prompt with "
                f"{'tabs' if path.suffix.lower() == '.tsv' else 'commas'}"
            )
        values = dict(zip(header, fields, strict=False))
        yield where, values.get(prompt), None if category is None else _category(values.get(category))


def _csv_lines(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """(number of the last line, fields) of every row, also of one whose prompt has several lines."""
    # Not splitlines: a prompt may hold other line separators of Unicode
    reader = csv.reader((f"{line}\n" for line in text.split("\n")), strict=True)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        raise InputError(
            f"{path} line {reader.line_num} is not CSV ({one_line(error)}): put a field with quotes in quotes and "
            "double those inside it"
        ) from error


def _tsv_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """(number of the line, fields): quotes belong to a field, unless it is one that a spreadsheet quoted as a whole.

    A CSV reader would turn PartiPrompts' `"G I G G L E" painted in ...` into a prompt without its quotes.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, [_unquoted(field) for field in line.split("\t")]


def _unquoted(field: str) -> str:
    inner = field[1:-1]
    quoted = len(field) >= 2 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else field


def _read_parquet(path: Path) -> _Rows:
    try:
        with open_regular(path) as file:
            schema = pq.read_schema(file)
            prompt, category = _columns(path, schema.names)
            table = pq.read_table(file, columns=list(dict.fromkeys(filter(None, (prompt, category)))))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable parquet file: {one_line(error)}") from error
    classes = _class_names(schema, category)
    for number in range(table.num_rows):
        value = None if category is None else _whole(table[category][number])
        if isinstance(value, int) and 0 <= value < len(classes):
            value = classes[value]
        yield f"{path} row {number}", _whole(table[prompt][number]), _category(value)


def _whole(cell: pa.Scalar) -> object:
    """The value of a cell; half characters in a text that is not UTF-8, which a writer of parquet need not check."""
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return "\udcff"


def _class_names(schema: pa.Schema, column: str | None) -> list[str]:
    """Names of a column of class numbers, which the datasets library keeps beside the schema; else none."""
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = described.get("info", {}).get("features", {}).get(column, {})
    names = feature.get("names", []) if isinstance(feature, dict) else []
    return names if isinstance(names, list) else []


def _category(value: object) -> str | None:
    text = "" if value is None else printable(str(value).strip())
    return text or None


def _checked(prompt: object, where: str) -> str:
    """The prompt without white space around it, if it is one."""
    if not isinstance(prompt, str) or not (stripped := prompt.strip()):
        raise InputError(f"{where}: expected a prompt, got {json.dumps(prompt, default=str)[:80]}")
    return stripped
