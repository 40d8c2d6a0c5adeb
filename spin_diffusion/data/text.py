"""Rows of a data set of text -> TextExample: a prompt and its real answer, and which of them are held out.

What a row means is told by its columns, of which `find_columns` picks at most three: prompt, real answer, worse answer.
Each may hold plain text or messages, and the answer's may hold whole conversations:

    messages                    [{"role": "user", "content": ...}, {"role": "assistant", ...}]
    conversations               the same as ShareGPT writes it: [{"from": "human", "value": ...}, {"from": "gpt", ...}]
    prompt, completion          plain text, or lists of messages
    prompt, chosen, rejected    a human preference; chosen is the real answer, or the whole conversation
    real, generated             conversations of SPIN's own data; generated is the worse answer

Other names are given by --prompt_column, --completion_column and --rejected_column. To recognise one without a flag,
add the answer's column to `ANSWER_COLUMNS`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from spin_diffusion.data.held_out import Aside, as_json, prompt_hash
from spin_diffusion.data.rows import (
    Bad,
    Expected,
    LeftOut,
    Message,
    ReadReport,
    Row,
    Seen,
    Source,
    TextExample,
    describe_columns,
    find_column,
    fresh,
    require_column,
    short_hash,
    usable,
    whole_text,
)
from spin_diffusion.data.settings import TextDataSettings
from spin_diffusion.data.sources import is_pattern, open_text_source
from spin_diffusion.store.input_error import InputError

ANSWER_COLUMNS = ("real", "chosen", "messages", "conversations", "completion")
"""The names that are looked for, in this order, when none is given."""
REJECTED_BESIDE = {"real": "generated"}
"""Column of the worse answer beside a column of the real one; "rejected" beside all others."""
CONVERSATION_COLUMNS = ("real", "messages", "conversations")
"""These hold their prompts themselves, whatever a column `prompt` beside them means."""
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
"""Role in the data -> role of a message; human and gpt are ShareGPT's."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold what."""

    prompt: str | None
    answer: str
    rejected: str | None

    def names(self) -> tuple[str, ...]:
        """Those that there are."""
        return tuple(column for column in (self.prompt, self.answer, self.rejected) if column is not None)


def read_text_examples(
    settings: TextDataSettings, *, with_rejected: bool = False, report: ReadReport | None = None
) -> Iterator[TextExample]:
    """The usable examples that are not held out, in the order of the data set, one in memory at a time.

    Args:
        with_rejected: read the worse answer of each pair too.
        report: a fresh one, filled while the examples are taken. Who takes one may still leave it out there.
    Raises:
        InputError: at once if the data set, a column or a setting is wrong; while reading if a file is damaged, or over
            100 rows and more than half are bad; at the end if more than `max_bad_share` are bad or no row was usable.
    """
    source = open_text_source(settings)
    if settings.rejected_column is not None:  # a misspelt one, even where it is not read
        require_column(source, settings.rejected_column, "--rejected_column")
    return _examples(source, find_columns(source, settings, with_rejected), settings, fresh(report))


def read_held_out(settings: TextDataSettings, *, report: ReadReport | None = None) -> list[TextExample]:
    """The examples that are never trained on, none if no flag asks for them; fewer than asked for are no error.

    Which ones are chosen depends on the hash of the prompt (or of the row, with `held_out_by` "row"), not on the order
    of the data. They come from the held-out data set or split if there is one. If not, from the training data, of which
    the first `max_train_samples + num_held_out` examples are looked at; whole prompts are then set aside until there
    are enough answers, and what is too many is on neither side.

    Args:
        report: a fresh one, of all the rows that were looked at.
    Raises:
        InputError: as `read_text_examples`.
    """
    report = fresh(report)
    if not settings.holds_out:
        return []
    if not settings.has_held_out_source:
        limit = settings.max_train_samples and settings.max_train_samples + settings.num_held_out
        return _aside(settings).choose(_all_examples(settings, limit, report))
    try:
        return _aside(settings).choose(_all_examples(_held_out_source(settings), None, report))
    except InputError as error:
        message = str(error).replace("--dataset_split", "--held_out_split")
        if settings.held_out_dataset_name is not None:
            message = message.replace("--dataset_name", "--held_out_dataset_name")
        raise InputError(message) from error


def find_columns(source: Source, settings: TextDataSettings, with_rejected: bool) -> Columns:
    """The columns that the settings name, else those that a layout has. Raises InputError: a column does not exist or
    is not known; worse answers are asked for and there are none."""
    columns = source.columns
    pairs = [name for name in ANSWER_COLUMNS if {name, REJECTED_BESIDE.get(name, "rejected")} <= {*columns}]
    first = pairs if with_rejected and settings.rejected_column is None else []
    answer = find_column(source, settings.completion_column, (*first, *ANSWER_COLUMNS), "--completion_column")
    prompt = settings.prompt_column
    if prompt is not None:
        require_column(source, prompt, "--prompt_column")
    elif "prompt" in columns and answer not in (*CONVERSATION_COLUMNS, "prompt"):
        prompt = "prompt"
    elif answer == "completion":
        raise InputError(
            f"{source.name} has a column 'completion' but none 'prompt'; {describe_columns(columns, ['prompt'])}; name "
            "the right one with --prompt_column"
        )
    if not with_rejected:
        return Columns(prompt, answer, None)
    if settings.rejected_column is not None:
        return Columns(prompt, answer, require_column(source, settings.rejected_column, "--rejected_column"))
    rejected = REJECTED_BESIDE.get(answer, "rejected")
    if rejected not in columns:
        raise InputError(
            f"{source.name} has no worse answers, which --objective dpo needs: columns chosen and rejected, real and "
            f"generated, or --rejected_column; its columns are {', '.join(columns)}"
        )
    return Columns(prompt, answer, rejected)


def last_question(prompt: str | list[Message]) -> str:
    """A prompt on one line for people: the plain text, or the last turn of the user."""
    if isinstance(prompt, str):
        return prompt
    return next((turn["content"] for turn in reversed(prompt) if turn["role"] == "user"), prompt[-1]["content"])


# Reading


def _each(source: Source, columns: Columns) -> Iterator[tuple[Row, Row]]:
    """Every row, in which all is found that an example is made of."""
    return ((row, row) for row in source.rows(columns.names()))


def _examples(
    source: Source, columns: Columns, settings: TextDataSettings, report: ReadReport
) -> Iterator[TextExample]:
    example_of, is_held_out = _example_reader(columns, settings), _held_out_rule(settings)

    def trained_on(row: Row) -> TextExample:
        example = example_of(row)
        if is_held_out(example):
            raise LeftOut(Expected.HELD_OUT, f"{last_question(example.prompt)[:80]!r} is held out")
        return example

    limits = settings.max_train_samples, settings.max_bad_share
    try:
        yield from usable(source, _each(source, columns), trained_on, report, *limits)
    except InputError as error:
        if report.used or not report.left_out[Expected.HELD_OUT]:
            raise
        number = settings.num_held_out or "all"
        raise InputError(
            f"{error}; hold out fewer (--num_held_out, now {number}), or let both sides share prompts "
            "(--held_out_by row)"
        ) from error


def _all_examples(settings: TextDataSettings, limit: int | None, report: ReadReport) -> Iterator[TextExample]:
    source = open_text_source(settings)
    columns = find_columns(source, settings, with_rejected=False)
    example_of = _example_reader(columns, settings)
    return usable(source, _each(source, columns), example_of, report, limit, settings.max_bad_share)


def _example_reader(columns: Columns, settings: TextDataSettings) -> Callable[[Row], TextExample]:
    """From row to example. It remembers the rows it has seen, and whether the first was a chat."""
    seen = Seen()
    first: list[TextExample] = []

    def example_of(row: Row) -> TextExample:
        example = _example(row, columns, settings)
        if not first:
            first.append(example)
        elif isinstance(example.prompt, str) != isinstance(first[0].prompt, str):
            kinds = ("plain text", "messages") if isinstance(example.prompt, str) else ("messages", "plain text")
            raise LeftOut(Bad.OTHER_LAYOUT, f"it is {kinds[0]}, and {first[0].where} is {kinds[1]}")
        if not settings.keep_repeated:
            known = short_hash(as_json([example.prompt, example.completion, example.rejected]))
            if known in seen:
                question = last_question(example.prompt)[:80]
                raise LeftOut(Expected.REPEATED_EXAMPLE, f"the same answer to {question!r} was used")
            seen.add(known)
        return example

    return example_of


def _example(row: Row, columns: Columns, settings: TextDataSettings) -> TextExample:
    values = row.values
    if missing := [column for column in columns.names() if column not in values]:
        raise LeftOut(Bad.OTHER_LAYOUT, f"it has no {missing[0]!r}; it has {', '.join(values) or 'nothing'}")
    given = None if columns.prompt is None else values[columns.prompt]
    if columns.prompt is not None and given is None:
        raise LeftOut(Bad.EMPTY_PROMPT, f"{columns.prompt!r} is null")
    prompt, completion = _prompt_and_answer(given, values[columns.answer], columns.answer, columns, settings)
    rejected = None
    if columns.rejected is not None:
        value = values[columns.rejected]
        if isinstance(value, str):
            rejected = _text(value, repr(columns.rejected))
            _check_not_blank(rejected, Bad.EMPTY_ANSWER, f"{columns.rejected!r} is blank")
        else:
            beside, rejected = _prompt_and_answer(given, value, columns.rejected, columns, settings)
            if beside != prompt:
                raise LeftOut(Bad.TWO_PROMPTS, f"{columns.answer!r} and {columns.rejected!r} answer different prompts")
        if rejected == completion:
            raise LeftOut(Expected.TIE, f"{columns.answer!r} and {columns.rejected!r} are the same answer")
    return TextExample(prompt, completion, rejected, row.where)


def _prompt_and_answer(
    given: object, value: object, column: str, columns: Columns, settings: TextDataSettings
) -> tuple[str | list[Message], str]:
    """What the row says before the answer, and the answer.

    Args:
        given: what is in the prompt's column; None = there is no such column.
        value: what is in `column`, the real or the worse answer's.
    """
    if value is None:
        raise LeftOut(Bad.EMPTY_ANSWER, f"{column!r} is null")
    prompt: str | list[Message]
    if isinstance(value, str) and isinstance(given, str):
        if settings.system_prompt is not None:
            raise InputError(
                "--system_prompt is for conversations, and the prompts of this data set are plain text: leave it away, "
                "or give a data set of messages"
            )
        prompt, answer = _text(given, repr(columns.prompt)), _text(value, repr(column))
        question = prompt
    else:
        prompt, answer = _split(_conversation(given, value, column, columns.prompt or ""), settings)
        question = prompt[-1]["content"]
    _check_not_blank(question, Bad.EMPTY_PROMPT, "the prompt is blank")
    _check_not_blank(answer, Bad.EMPTY_ANSWER, f"the answer in {column!r} is blank")
    if answer.strip() == question.strip():
        raise LeftOut(Bad.ANSWER_IS_PROMPT, f"both are {answer.strip()[:80]!r}")
    return prompt, answer


def _conversation(given: object, value: object, column: str, prompt_column: str) -> list[Message]:
    """The turns of a row in which the prompt or the answer is made of messages: the prompt's, then the answer's."""
    if isinstance(value, str):
        if given is None:
            detail = f"{column!r} is plain text without a prompt: name its column: --prompt_column"
            raise LeftOut(Bad.OTHER_LAYOUT, detail)
        return [*_turns(given, prompt_column), {"role": "assistant", "content": _text(value, repr(column))}]
    turns = _turns(value, column)
    if isinstance(given, str):
        if turns and turns[0]["role"] == "assistant":
            return [{"role": "user", "content": _text(given, repr(prompt_column))}, *turns]
        return turns
    before = _turns(given, prompt_column) if given is not None else []
    if turns[: len(before)] == before:
        return turns
    if turns and turns[0]["role"] != "assistant":
        raise LeftOut(Bad.TWO_PROMPTS, f"{column!r} begins with another prompt than {prompt_column!r}")
    return before + turns


def _split(turns: list[Message], settings: TextDataSettings) -> tuple[list[Message], str]:
    """The turns before the answer, and the answer: the last of the assistant, or the first if only that is wanted."""
    roles = [turn["role"] for turn in turns]
    shown = f"its turns are {', '.join(roles[:8])}" if roles else "it has no turns"
    if "user" not in roles:
        raise LeftOut(Bad.NO_USER_TURN, shown)
    if "assistant" not in roles:
        raise LeftOut(Bad.NO_ASSISTANT_TURN, shown)
    if settings.first_turn_only:
        user = roles.index("user")
        if roles[user + 1 : user + 2] != ["assistant"]:
            raise LeftOut(Bad.NO_ASSISTANT_TURN, f"none follows the first question: {shown}")
        prompt, answer = [turn for turn in turns[:user] if turn["role"] == "system"] + [turns[user]], turns[user + 1]
    else:
        last = len(roles) - 1 - roles[::-1].index("assistant")
        if roles[last - 1 : last] not in (["user"], ["tool"]):
            raise LeftOut(Bad.NO_USER_TURN, f"none before the last answer: {shown}")
        prompt, answer = turns[:last], turns[last]
    if settings.system_prompt is not None and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": settings.system_prompt}, *prompt]
    return prompt, answer["content"]


def _turns(value: object, column: str) -> list[Message]:
    """A list of messages in any of its spellings. Raises LeftOut if it is none."""
    if isinstance(value, Mapping):  # the datasets library writes a list of structs also as a struct of lists
        lists = [items for items in value.values() if isinstance(items, (list, tuple))]
        if len(lists) == len(value) and len({len(items) for items in lists}) == 1:
            value = [dict(zip(value, items, strict=True)) for items in zip(*lists, strict=True)]
    if not isinstance(value, (list, tuple)):
        raise LeftOut(Bad.WRONG_TYPE, f"{column!r} is {type(value).__name__}, not text or a list of messages")
    return [_turn(turn, f"turn {number} of {column!r}") for number, turn in enumerate(value, start=1)]


def _turn(value: object, what: str) -> Message:
    if not isinstance(value, Mapping):
        raise LeftOut(Bad.WRONG_TYPE, f'{what} is {type(value).__name__}, not {{"role": ..., "content": ...}}')
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise LeftOut(Bad.WRONG_TYPE, f"{what} has the role {role!r}; known are {', '.join(ROLES)}")
    if value.get("tool_calls"):
        raise LeftOut(Bad.WRONG_TYPE, f"{what} calls a tool, which is not text")
    return {"role": ROLES[role], "content": "" if content is None else _text(content, what)}


def _text(value: object, what: str) -> str:
    """Text, or a list of parts that are all text. Raises LeftOut if it is anything else."""
    if isinstance(value, (list, tuple)):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        if not all(isinstance(part, str) for part in parts):
            raise LeftOut(Bad.WRONG_TYPE, f"{what} has parts that are not text")
        value = "".join(str(part) for part in parts)
    if not isinstance(value, str):
        raise LeftOut(Bad.WRONG_TYPE, f"{what} is {type(value).__name__}, not text")
    return whole_text(value, what)


def _check_not_blank(text: str, reason: Bad, detail: str) -> None:
    if not text.strip():
        raise LeftOut(reason, detail)


# Held out


def _held_out_source(settings: TextDataSettings) -> TextDataSettings:
    """The settings of the held-out data set or split, as if it were to be trained on."""
    name = settings.held_out_dataset_name or settings.dataset_name
    is_same = name == settings.dataset_name
    if is_same and name is not None and (Path(name).expanduser().is_file() or is_pattern(name)):
        raise InputError(
            f"--held_out_split {settings.held_out_split!r}: {name} names files, which are read whatever their split: "
            "give --held_out_dataset_name, or --num_held_out alone to set some aside"
        )
    return replace(
        settings,
        dataset_name=name,
        dataset_split=settings.held_out_split or settings.dataset_split,
        dataset_config_name=settings.dataset_config_name if is_same else None,
        dataset_revision=settings.dataset_revision if is_same else None,
        held_out_dataset_name=None,
        held_out_split=None,
    )


def _held_out_rule(settings: TextDataSettings) -> Callable[[TextExample], bool]:
    """Whether an example of the training data is held out, to be asked of each once, in order."""
    if not settings.holds_out or (settings.has_held_out_source and settings.held_out_by == "row"):
        return lambda example: False
    return _aside(settings).rule(read_held_out(settings), settings.keep_repeated)


def _aside(settings: TextDataSettings) -> Aside[TextExample]:
    return Aside(settings.num_held_out, settings.held_out_by, lambda example: prompt_hash(example.prompt), _row_hash)


def _row_hash(example: TextExample) -> bytes:
    return short_hash(b"row", as_json([example.prompt, example.completion]))
