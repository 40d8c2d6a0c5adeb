import gzip
import json
import os
import random
import tracemalloc
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin_diffusion.data import held_out
from spin_diffusion.data.files import PEEK_LINES
from spin_diffusion.data.rows import ReadReport, Seen, TextExample, short_hash
from spin_diffusion.data.settings import TextDataSettings
from spin_diffusion.data.text import read_held_out, read_text_examples
from spin_diffusion.store.input_error import InputError

Rows = Sequence[Mapping[str, object]]


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Turns of user, assistant, user, ..."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [
        {"role": ("user", "assistant")[place % 2], "content": content} for place, content in enumerate(contents)
    ]


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    """One row a line; text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def settings(path: Path | str, **more) -> TextDataSettings:
    return TextDataSettings(dataset_name=str(path), **more)


def lines(tmp_path: Path, rows: Sequence[object], **more) -> TextDataSettings:
    return settings(write_lines(tmp_path / "a.jsonl", rows), **more)


def read(given: TextDataSettings, with_rejected: bool = False) -> tuple[list[TextExample], ReadReport]:
    """All examples, and the report, which must account for every row."""
    report = ReadReport()
    examples = list(read_text_examples(given, with_rejected=with_rejected, report=report))
    assert report.used == len(examples)
    assert report.read == report.used + sum(report.left_out.values())
    return examples, report


def one(tmp_path: Path, row: Mapping[str, object], with_rejected: bool = False, **more) -> TextExample:
    (example,) = read(lines(tmp_path, [row], **more), with_rejected)[0]
    return example


def counts(report: ReadReport) -> dict[str, int]:
    return {reason: count for reason, count in report.left_out.items() if count}


def why(tmp_path: Path, row: object, with_rejected: bool = False, good: Mapping[str, object] | None = None) -> str:
    """The reason and the detail for which a row is left out beside a good one."""
    good = good or ({"prompt": "a", "completion": "b"} if not with_rejected else PAIR)
    _, report = read(lines(tmp_path, [good, row], max_bad_share=0.5), with_rejected)
    ((reason, count),) = counts(report).items()
    assert (count, report.kept_rows[reason][0].where) == (1, "a.jsonl line 2")
    return f"{reason}: {report.kept_rows[reason][0].detail}"


CHAT = {"messages": turns("who?", "he")}
PAIR = {"prompt": "who?", "chosen": "he", "rejected": "she"}
PLAIN = [{"prompt": f"prompt {number}", "completion": f"answer {number}"} for number in range(100)]


# Layouts


@pytest.mark.parametrize(
    "row",
    [
        {"messages": turns("who?", "he")},
        {"messages": turns("who?", "he"), "prompt": "who?", "prompt_id": "1"},
        {"messages": turns("who?", "he"), "prompt": None},
        {"messages": turns("who?", "he"), "prompt": turns("a title")},
        {"messages": {"role": ["user", "assistant"], "content": ["who?", "he"]}},
        {
            "messages": [
                {"role": r, "content": [{"type": "text", "text": t}]}
                for r, t in (("user", "who?"), ("assistant", "he"))
            ]
        },
        {"conversations": [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "he"}]},
        {"prompt": turns("who?"), "completion": [{"role": "assistant", "content": "he"}]},
        {"prompt": turns("who?"), "completion": "he"},
        {"prompt": "who?", "completion": [{"role": "assistant", "content": "he"}]},
        {"real": turns("who?", "he"), "generated": turns("who?", "")},
        {"prompt": turns("who?"), "chosen": turns("who?", "he")[1:], "rejected": turns("who?", "she")[1:]},
        {"chosen": turns("who?", "he"), "rejected": turns("who?", "she")},
        {
            "prompt": "who?",
            "chosen": turns("who?", "he"),
            "rejected": turns("who?", "she"),
            "messages": turns("no", "no"),
        },
        {"prompt": turns("who?"), "chosen": turns("who?", "he"), "rejected": turns("who?", "she")},
    ],
)
def test_every_layout_of_conversations_is_recognised(tmp_path: Path, row: dict) -> None:
    assert one(tmp_path, row) == TextExample(turns("who?"), "he", None, "a.jsonl line 1")
    table = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row]), table)
    assert read(settings(table))[0] == [TextExample(turns("who?"), "he", None, "a.parquet row 0")]


@pytest.mark.parametrize("row", [{"prompt": " who?\n", "completion": " he "}, {"prompt": " who?\n", "chosen": " he "}])
def test_plain_text_keeps_its_white_space(tmp_path: Path, row: dict) -> None:
    assert one(tmp_path, row) == TextExample(" who?\n", " he ", None, "a.jsonl line 1")


def test_columns_can_be_named(tmp_path: Path) -> None:
    row = {
        "prompt": "no",
        "completion": "no",
        "instruction": "who?",
        "output": "he",
        "bad": "she",
        "talk": turns("q", "a"),
    }
    named = {"prompt_column": "instruction", "completion_column": "output", "rejected_column": "bad"}
    assert one(tmp_path, row, with_rejected=True, **named) == TextExample("who?", "he", "she", "a.jsonl line 1")
    assert one(tmp_path, row, **named).rejected is None, "it was not asked for"
    assert one(tmp_path, row, completion_column="output").prompt == "no"
    assert one(tmp_path, row, completion_column="talk").prompt == turns("q")


def test_the_last_answer_counts_and_what_comes_after_it_does_not(tmp_path: Path) -> None:
    talk = turns("q1", "a1", "q2", "a2", "q3", system="be brief")
    assert one(tmp_path, {"messages": talk}) == TextExample(talk[:4], "a2", None, "a.jsonl line 1")
    first = one(tmp_path, {"messages": talk}, first_turn_only=True)
    assert (first.prompt, first.completion) == (talk[:2], "a1")
    greeting = [{"role": "assistant", "content": "hello"}, *turns("q1", "a1", "q2", "a2")]
    first = one(tmp_path, {"messages": greeting}, first_turn_only=True)
    assert (first.prompt, first.completion) == (turns("q1"), "a1")


def test_a_system_prompt_is_put_before_conversations_that_have_none(tmp_path: Path) -> None:
    rows = [{"messages": turns("q1", "a1", "q2", "a2")}, {"messages": turns("q", "a", system="theirs")}]
    for first_turn_only in (False, True):
        examples, _ = read(lines(tmp_path, rows, system_prompt="ours", first_turn_only=first_turn_only))
        assert [example.prompt[0] for example in examples] == [
            {"role": "system", "content": "ours"}, {"role": "system", "content": "theirs"},
        ]  # fmt: skip
        assert [turn["role"] for turn in examples[0].prompt].count("system") == 1
    with pytest.raises(
        InputError, match="--system_prompt is for conversations, and the prompts of this data set are plain"
    ):
        read(lines(tmp_path, PLAIN, system_prompt="ours"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": turns("who?"), "chosen": turns("who?", "he")[1:], "rejected": turns("who?", "she")[1:]},
        {"chosen": turns("who?", "he"), "rejected": turns("who?", "she")},
        {"prompt": "who?", "chosen": turns("who?", "he"), "rejected": turns("who?", "she")},
        {"prompt": "who?", "chosen": turns("who?", "he"), "rejected": "she"},
        {"real": turns("who?", "he"), "generated": turns("who?", "she"), "rejected": "no"},
        {"messages": turns("who?", "he"), "rejected": turns("who?", "she")},
        {"messages": turns("no", "no"), "real": turns("who?", "he"), "generated": turns("who?", "she")},
        {"real": turns("q", "a"), "chosen": turns("who?", "he"), "rejected": turns("who?", "she")},
    ],
)
def test_the_worse_answer_is_read_if_it_is_asked_for(tmp_path: Path, row: dict) -> None:
    assert one(tmp_path, row, with_rejected=True) == TextExample(turns("who?"), "he", "she", "a.jsonl line 1")
    assert one(tmp_path, row).rejected is None


def test_worse_answers_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_text_examples(lines(tmp_path, PLAIN), with_rejected=True)
    assert str(caught.value) == (
        f"{tmp_path / 'a.jsonl'} has no worse answers, which --objective dpo needs: columns chosen and rejected, real "
        "and generated, or --rejected_column; its columns are prompt, completion"
    )


def test_a_missing_column_is_an_error_with_the_columns_there_are_and_the_nearest(tmp_path: Path) -> None:
    given = lines(tmp_path, [{"question": "a", "completions": "b"}])
    with pytest.raises(
        InputError, match="none of the columns real, chosen, .*question, completions; the nearest is 'comp"
    ):
        read_text_examples(given)
    given = lines(tmp_path, [{"promt": "a", "completion": "b", "bad": "c"}])
    with pytest.raises(InputError, match="'completion' but none 'prompt'.*nearest is 'promt'.*with --prompt_column"):
        read_text_examples(given)
    for flag in ("prompt_column", "completion_column", "rejected_column"):
        named = {"prompt_column": "promt"} | {flag: "baad"}
        with pytest.raises(InputError, match=rf"no column 'baad' \(--{flag}\); .*the nearest is 'bad'"):
            read_text_examples(settings(tmp_path / "a.jsonl", **named), with_rejected=True)


# Rows that are left out


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": "a", "completion": ', "malformed line: not JSON: Expecting value at character 32"),
        ('["a", "b"]', 'malformed line: not an object like {"prompt": "...", "completion": "..."}'),
        (CHAT, "another layout: it has no 'prompt'; it has messages"),
        ({}, "another layout: it has no 'prompt'; it has nothing"),
        ({"prompt": turns("a"), "completion": "b"}, "another layout: it is messages, and a.jsonl line 1 is plain text"),
        ({"prompt": 3, "completion": "b"}, "wrong type: 'prompt' is int, not text or a list of messages"),
        ({"prompt": "a", "completion": 3}, "wrong type: 'completion' is int, not text or a list of messages"),
        ({"prompt": "\ud800", "completion": "b"},
         "broken characters in the text: character 1 of 'prompt' is half of one, or its bytes are not UTF-8"),
        ({"prompt": "a", "completion": "b\udfff"},
         "broken characters in the text: character 2 of 'completion' is half of one, or its bytes are not UTF-8"),
        ({"prompt": None, "completion": "b"}, "empty prompt: 'prompt' is null"),
        ({"prompt": " \n", "completion": "b"}, "empty prompt: the prompt is blank"),
        ({"prompt": "a", "completion": None}, "empty answer: 'completion' is null"),
        ({"prompt": "a", "completion": "\t "}, "empty answer: the answer in 'completion' is blank"),
        ({"prompt": " a", "completion": "a\n"}, "answer equal to the prompt: both are 'a'"),
        ({"prompt": "a", "completion": "b"}, "repeated example: the same answer to 'a' was used"),
    ],
)  # fmt: skip
def test_a_row_of_plain_text_that_cannot_be_used_is_counted_with_its_reason(tmp_path: Path, row, reason: str) -> None:
    assert why(tmp_path, row) == reason


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("text", "another layout: 'messages' is plain text without a prompt: name its column: --prompt_column"),
        (None, "empty answer: 'messages' is null"),
        ([], "no user turn: it has no turns"),
        ({"role": "user"}, "wrong type: 'messages' is dict, not text or a list of messages"),
        (["who?", "he"], 'wrong type: turn 1 of \'messages\' is str, not {"role": ..., "content": ...}'),
        ([{"role": "user", "content": 3}], "wrong type: turn 1 of 'messages' is int, not text"),
        ([{"role": "user", "content": [{"type": "image"}]}],
         "wrong type: turn 1 of 'messages' has parts that are not text"),
        ([{"role": "narrator", "content": "x"}],
         "wrong type: turn 1 of 'messages' has the role 'narrator'; "
         "known are system, user, human, assistant, gpt, tool"),
        ([*turns("q"), {"role": "assistant", "content": None, "tool_calls": [{"x": 1}]}],
         "wrong type: turn 2 of 'messages' calls a tool, which is not text"),
        (turns("who?"), "no assistant turn: its turns are user"),
        (turns("who?", "he")[1:], "no user turn: its turns are assistant"),
        ([*turns("q", "a"), {"role": "assistant", "content": "b"}],
         "no user turn: none before the last answer: its turns are user, assistant, assistant"),
        (turns("who?", ""), "empty answer: the answer in 'messages' is blank"),
        ([*turns("who?"), {"role": "assistant", "content": None}], "empty answer: the answer in 'messages' is blank"),
        (turns(" ", "he"), "empty prompt: the prompt is blank"),
        (turns("who?", "he", "so?", " so? "), "answer equal to the prompt: both are 'so?'"),
        (turns("who?", "he"), "repeated example: the same answer to 'who?' was used"),
    ],
)  # fmt: skip
def test_a_conversation_that_cannot_be_used_is_counted_with_its_reason(tmp_path: Path, messages, reason: str) -> None:
    assert why(tmp_path, {"messages": messages}, good=CHAT) == reason


def test_a_first_question_without_an_answer_is_counted_with_its_reason(tmp_path: Path) -> None:
    rows = [CHAT, {"messages": [*turns("q"), *turns("q", "a")]}]
    _, report = read(lines(tmp_path, rows, first_turn_only=True, max_bad_share=0.5))
    (row,) = report.kept_rows["no assistant turn"]
    assert row.detail == "none follows the first question: its turns are user, user, assistant"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "x", "rejected": "she"}, "another layout: it has no 'prompt'; it has chosen, rejected"),
        (PAIR | {"rejected": " "}, "empty answer: 'rejected' is blank"),
        (PAIR | {"rejected": None}, "empty answer: 'rejected' is null"),
        (PAIR | {"rejected": "he"}, "tie: 'chosen' and 'rejected' are the same answer"),
        (PAIR | {"rejected": 3}, "wrong type: 'rejected' is int, not text or a list of messages"),
        (PAIR | {"chosen": turns("who?", "he"), "rejected": turns("why?", "she")},
         "pair of two prompts: 'chosen' and 'rejected' answer different prompts"),
        (PAIR | {"prompt": turns("who?"), "chosen": turns("why?", "he"), "rejected": "she"},
         "pair of two prompts: 'chosen' begins with another prompt than 'prompt'"),
    ],
)  # fmt: skip
def test_a_pair_that_cannot_be_used_is_counted_with_its_reason(tmp_path: Path, row: dict, reason: str) -> None:
    assert why(tmp_path, row, with_rejected=True) == reason


def test_one_answer_against_two_worse_ones_makes_two_pairs(tmp_path: Path) -> None:
    rows = [PAIR, PAIR | {"rejected": "it"}]
    assert len(read(lines(tmp_path, rows), with_rejected=True)[0]) == 2
    assert counts(read(lines(tmp_path, rows))[1]) == {"repeated example": 1}


def test_repeated_rows_can_be_kept(tmp_path: Path) -> None:
    rows = [PLAIN[0], PLAIN[0] | {"completion": "another"}, PLAIN[0]]
    assert len(read(lines(tmp_path, rows))[0]) == 2
    assert len(read(lines(tmp_path, rows, keep_repeated=True))[0]) == 3


def test_too_many_bad_rows_are_an_error_with_the_counts_and_the_first_of_them(tmp_path: Path) -> None:
    rows = [*PLAIN[:8], '{"prompt"', {"prompt": "a", "completion": ""}]
    assert len(read(lines(tmp_path, rows, max_bad_share=0.2))[0]) == 8
    with pytest.raises(InputError) as caught:
        read(lines(tmp_path, rows))
    assert str(caught.value) == (
        f"{tmp_path / 'a.jsonl'}: 2 of 10 rows (20.0%) are bad (1 malformed line, 1 empty answer): "
        "a.jsonl line 9: not JSON: Expecting ':' delimiter at character 11; a.jsonl line 10: the answer in "
        "'completion' is blank. Repair the data, or allow the share with --max_bad_share (now 0.1)"
    )


def test_a_hopeless_data_set_is_given_up_early_also_by_what_the_taker_refuses(tmp_path: Path) -> None:
    rows = [{"prompt": f"{number}", "completion": ""} for number in range(300)]
    with pytest.raises(InputError, match="reading stopped early: .*101 of 102 rows"):
        read(lines(tmp_path, [PLAIN[0], *rows]))
    report = ReadReport()
    many = [{"prompt": f"p{number}", "completion": "a"} for number in range(300)]
    with pytest.raises(
        InputError, match=r"stopped early: .*101 of 101 rows .*\(101 refused by the chat template\): a.jsonl"
    ):
        for example in read_text_examples(lines(tmp_path, many), report=report):
            report.used -= 1
            report.leave_out(example.where, "refused by the chat template", "for a reason")


def test_what_the_taker_refuses_does_not_count_towards_max_train_samples(tmp_path: Path) -> None:
    report, kept = ReadReport(), []
    for example in read_text_examples(lines(tmp_path, PLAIN, max_train_samples=5), report=report):
        if len(kept) < 5 and int(example.completion.split()[1]) % 2:
            report.used -= 1
            report.leave_out(example.where, "prompt longer than --max_length", "9 tokens")
        else:
            kept.append(example.completion)
    assert kept == ["answer 0", "answer 2", "answer 4", "answer 6", "answer 8"]


# Files


def test_files_are_read_in_order_and_rows_named_by_file_and_line(tmp_path: Path) -> None:
    for number in (1, 0, 2):
        rows = [{"prompt": f"{number} {row}", "completion": "x"} for row in range(3)]
        write_lines(tmp_path / "data" / f"train-{number}.jsonl", ["", *rows] if number else rows)
    for name in ("data/train-*.jsonl", "data/train-{0..2}.jsonl", "data", ""):
        examples, _ = read(settings(tmp_path / name))
        assert [example.prompt for example in examples] == [
            f"{number} {row}" for number in range(3) for row in range(3)
        ]
        assert examples[4].where.endswith("train-1.jsonl line 3")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_a_list_of_objects_is_read_too(tmp_path: Path, name: str, indent: int | None) -> None:
    text = "\ufeff" * (indent is None) + json.dumps([*PLAIN[:2], "rubbish"], indent=indent)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    examples, report = read(settings(path, max_bad_share=0.5))
    assert [example.where for example in examples] == [f"{name} entry 1", f"{name} entry 2"]
    assert report.kept_rows["malformed line"][0].where == f"{name} entry 3"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
def test_one_object_a_line_is_read_as_a_stream_whatever_the_name(tmp_path: Path, name: str) -> None:
    text = "\ufeff" + "".join(json.dumps(row) + "\r\n" for row in PLAIN)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert [example.prompt for example in read(settings(path))[0]] == [row["prompt"] for row in PLAIN]


def test_a_line_whose_text_is_not_utf_8_is_left_out(tmp_path: Path) -> None:
    """What is wrong in a column that is not used harms nothing."""
    path = write_lines(tmp_path / "a.jsonl", PLAIN)
    path.write_bytes(
        path.read_bytes()
        + b'{"prompt": "\xe9", "completion": "b"}\n{"prompt": "whole", "completion": "b", "author": "Andr\xe9"}\n'
    )
    examples, report = read(settings(path))
    assert counts(report) == {"broken characters in the text": 1} and examples[-1].prompt == "whole"
    assert "character 1 of 'prompt'" in report.kept_rows["broken characters in the text"][0].detail


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.jsonl has no rows$"),
        ("[]", "a.jsonl has no rows$"),
        (
            "prompt,completion\na,b\n",
            r'a.jsonl: line 1 is not JSON: Expecting value at character 1; one object like \{"prompt": "..."',
        ),
        ("x\n" * (2 * PEEK_LINES), "a.jsonl: line 1 is not JSON"),
        (
            '{\n "prompt": "a",\n "completion": "b"\n}',
            "a.jsonl: line 1 is not JSON: .*one object like .* a line is right",
        ),
        ('[{"prompt": "a"}\n', "a.jsonl begins with '\\[' but is not one JSON list: Expecting ',' delimiter: line 2"),
        ('["a", "b"]\n["c"]\n', "a.jsonl begins with '\\[' but is not one JSON list: Extra data: line 2"),
    ],
)
def test_a_file_without_a_row_that_can_be_read_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_text_examples(settings(tmp_path / "a.jsonl"))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_short_is_an_error_with_the_line(tmp_path: Path) -> None:
    text = "".join(json.dumps(row | {"junk": random.Random(row["prompt"]).random()}) + "\n" for row in PLAIN * 50)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode())[:-2000])
    with pytest.raises(
        InputError, match=r"a.jsonl.gz is damaged after line \d+: Compressed file ended .*; fetch it again"
    ):
        read(settings(tmp_path / "a.jsonl.gz", max_bad_share=1.0))


def test_files_with_other_columns_are_an_error_that_names_both(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", PLAIN)
    write_lines(tmp_path / "b.jsonl", [CHAT])
    with pytest.raises(InputError, match="b.jsonl has no column 'prompt', unlike a.jsonl; it has messages"):
        read(settings(tmp_path / "*.jsonl"))
    write_lines(tmp_path / "b.jsonl", [])
    assert len(read(settings(tmp_path / "*.jsonl"))[0]) == len(PLAIN), "an empty file has no other columns"


def test_files_of_an_unknown_or_mixed_kind_are_errors(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", ["x"])
    with pytest.raises(InputError, match=r"a.txt is neither .parquet nor .jsonl, .json, .jsonl.gz, .json.gz"):
        read_text_examples(settings(tmp_path / "a.txt"))
    with pytest.raises(InputError, match=r"has no parquet files or JSON files \(.jsonl, .json"):
        read_text_examples(settings(tmp_path))
    write_lines(tmp_path / "a.jsonl", PLAIN)
    pq.write_table(pa.Table.from_pylist(PLAIN), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="has parquet files and JSON files: name one kind, as in"):
        read_text_examples(settings(tmp_path))
    with pytest.raises(InputError, match="matches parquet files and JSON files: name one kind"):
        read_text_examples(settings(tmp_path / "a.[jp]*"))
    assert len(read(settings(tmp_path / "a.parquet"))[0]) == len(PLAIN)
    with pytest.raises(InputError, match="none.jsonl does not exist: give a path that does, or a hub id"):
        read_text_examples(settings("none.jsonl"))
    with pytest.raises(InputError, match=r"no data set is given: give --dataset_name \(hub id, folder, .jsonl"):
        read_text_examples(TextDataSettings())


def test_splits_of_a_folder_and_of_what_save_to_disk_wrote(tmp_path: Path) -> None:
    write_lines(tmp_path / "lines" / "train.jsonl", PLAIN[:2])
    write_lines(tmp_path / "lines" / "test.jsonl", PLAIN[2:])
    write_lines(tmp_path / "lines" / "dataset_info.json", [{"features": {}}])
    splits = {"train": datasets.Dataset.from_list(PLAIN[:2]), "test": datasets.Dataset.from_list(PLAIN[2:])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    for name in ("lines", "saved"):
        assert len(read(settings(tmp_path / name))[0]) == 2
        assert len(read(settings(tmp_path / name, dataset_split="test"))[0]) == 98
        assert len(read_held_out(settings(tmp_path / name, held_out_split="test"))) == 98


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_is_asked_for_with_its_split_and_revision(
    streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, **more):
        asked.append((path, name, more["split"], more["revision"], more["streaming"]))
        loaded = datasets.Dataset.from_list([{"messages": turns("q", more["split"])}])
        return loaded.to_iterable_dataset() if more["streaming"] else loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    same = {"dataset_config_name": "small", "dataset_revision": "v1", "streaming": streaming, "held_out_by": "row"}
    given = settings("user/set", **same, held_out_split="test")
    assert read(given)[0] == [TextExample(turns("q"), "train", None, "user/set[train] row 0")]
    assert [example.completion for example in read_held_out(given)] == ["test"]
    read_held_out(settings("user/set", **same, held_out_dataset_name="user/other"))
    assert asked == [
        ("user/set", "small", "train", "v1", streaming),
        ("user/set", "small", "test", "v1", streaming),
        ("user/other", None, "train", None, streaming),
    ]


# Held out


def keys(examples: Sequence[TextExample]) -> list[tuple[str, str]]:
    return [(str(example.prompt), example.completion) for example in examples]


def shuffled(rows: Rows) -> list[Mapping[str, object]]:
    return random.Random(3).sample(list(rows), len(rows))


ANSWERS = [{"prompt": f"prompt {number // 4}", "completion": f"answer {number}"} for number in range(200)]


def test_no_flag_holds_nothing_out(tmp_path: Path) -> None:
    assert read_held_out(lines(tmp_path, PLAIN)) == []
    assert not lines(tmp_path, PLAIN).holds_out
    assert len(read(lines(tmp_path, PLAIN))[0]) == 100


@pytest.mark.parametrize("by", ["prompt", "row"])
def test_as_many_as_asked_for_are_set_aside_and_never_trained_on_whatever_the_order(tmp_path: Path, by: str) -> None:
    asked = {"num_held_out": 30, "held_out_by": by}
    held_out = read_held_out(lines(tmp_path, ANSWERS, **asked))
    trained, report = read(lines(tmp_path, ANSWERS, **asked))
    assert len(held_out) == 30
    assert not set(keys(held_out)) & set(keys(trained))
    again = read_held_out(lines(tmp_path, shuffled(ANSWERS), **asked))
    assert keys(again) == keys(held_out)
    assert set(keys(read(lines(tmp_path, shuffled(ANSWERS), **asked))[0])) == set(keys(trained))
    prompts = {example.prompt for example in held_out}
    shared = prompts & {example.prompt for example in trained}
    if by == "prompt":
        assert len(prompts) == 8, "seven prompts with 4 answers each are 28, so an eighth is set aside too"
        assert not shared
        assert (len(trained), counts(report)) == (200 - 32, {"held out": 32})
    else:
        assert len(shared) > 10, "rows are held out, not prompts"
        assert (len(trained), counts(report)) == (170, {"held out": 30})


def test_few_more_held_out_keep_the_ones_that_were(tmp_path: Path) -> None:
    few, more = (keys(read_held_out(lines(tmp_path, PLAIN, num_held_out=number))) for number in (10, 15))
    assert more[:10] == few


def test_prompts_are_the_same_whatever_their_case_white_space_and_system_turn(tmp_path: Path) -> None:
    rows = [{"messages": turns(f"Prompt {number}", "a", system="s" if number % 2 else None)} for number in range(50)]
    rows += [{"messages": turns(f" prompt  {number}\n", "b")} for number in range(50)]
    held_out = read_held_out(lines(tmp_path, rows, num_held_out=20))
    trained, _ = read(lines(tmp_path, rows, num_held_out=20))
    assert len(held_out) + len(trained) == 100
    numbers = [{example.prompt[-1]["content"].split()[1] for example in side} for side in (held_out, trained)]
    assert len(numbers[0]) == 10 and not numbers[0] & numbers[1]


def test_copies_of_a_row_are_held_out_one_by_one_if_they_are_kept(tmp_path: Path) -> None:
    rows = PLAIN[:2] * 50
    given = lines(tmp_path, rows, num_held_out=40, held_out_by="row", keep_repeated=True)
    held_out, trained = Counter(keys(read_held_out(given))), Counter(keys(read(given)[0]))
    assert held_out.total() == 40 and trained.total() == 60
    assert set(held_out) == set(trained), "not all copies of one row"
    assert set((held_out + trained).values()) == {50}


def test_of_a_row_in_several_pairs_none_is_trained_on(tmp_path: Path) -> None:
    rows = [PAIR | {"prompt": f"p{number}", "rejected": f"bad {bad}"} for number in range(20) for bad in range(3)]
    given = lines(tmp_path, rows, num_held_out=5, held_out_by="row")
    held_out, trained = read_held_out(given), read(given, with_rejected=True)[0]
    assert (len(held_out), len(trained)) == (5, 45)
    assert not set(keys(held_out)) & set(keys(trained))


def test_max_train_samples_are_trained_on_beside_those_held_out(tmp_path: Path) -> None:
    given = lines(tmp_path, PLAIN, max_train_samples=20, num_held_out=10)
    held_out, (trained, report) = read_held_out(given), read(given)
    assert (len(held_out), len(trained)) == (10, 20)
    assert set(keys(held_out)) | set(keys(trained)) == {(row["prompt"], row["completion"]) for row in PLAIN[:30]}
    assert report.read <= 30, "the rest is not read"


@pytest.mark.parametrize("by", ["prompt", "row"])
def test_held_out_answers_come_from_their_own_data_set(tmp_path: Path, by: str) -> None:
    other = write_lines(tmp_path / "other.jsonl", ANSWERS[:40])
    given = lines(tmp_path, ANSWERS, held_out_dataset_name=str(other), held_out_by=by)
    assert keys(read_held_out(given)) == [(row["prompt"], row["completion"]) for row in ANSWERS[:40]], "in their order"
    trained, report = read(given)
    if by == "prompt":
        assert counts(report) == {"held out": 40}
        assert report.kept_rows["held out"][0].detail == "'prompt 0' is held out"
    else:
        assert len(trained) == 200, "both sides may share prompts, and rows that were drawn twice"
    some = read_held_out(lines(tmp_path, ANSWERS, held_out_dataset_name=str(other), held_out_by=by, num_held_out=6))
    assert len(some) == 6 and set(keys(some)) < set(keys(read_held_out(given)))
    few = lines(tmp_path, ANSWERS, held_out_dataset_name=str(other), held_out_by=by, num_held_out=60)
    assert len(read_held_out(few)) == 40, "fewer are no error"


def test_max_train_samples_does_not_shorten_the_held_out_data_set(tmp_path: Path) -> None:
    other = write_lines(tmp_path / "other.jsonl", ANSWERS)
    given = lines(tmp_path, PLAIN, held_out_dataset_name=str(other), max_train_samples=3, held_out_by="row")
    assert (len(read_held_out(given)), len(read(given)[0])) == (200, 3)


def test_errors_of_the_held_out_data_set_name_its_flags(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^--held_out_dataset_name none.jsonl does not exist"):
        read(lines(tmp_path, PLAIN, held_out_dataset_name="none.jsonl"))
    write_lines(tmp_path / "data" / "train.jsonl", PLAIN)
    with pytest.raises(InputError, match=r"has no files of split 'test' \(--held_out_split\); it has train"):
        read_held_out(settings(tmp_path / "data", held_out_split="test"))
    with pytest.raises(
        InputError, match=r"--held_out_split 'test': .*a.jsonl names files, which are read whatever their"
    ):
        read_held_out(lines(tmp_path, PLAIN, held_out_split="test"))
    bad = write_lines(tmp_path / "bad.jsonl", [PLAIN[0], {"prompt": "a", "completion": ""}])
    with pytest.raises(InputError, match="bad.jsonl: 1 of 2 rows"):
        read_held_out(lines(tmp_path, PLAIN, held_out_dataset_name=str(bad)))


def test_if_everything_is_held_out_the_error_says_what_to_do(tmp_path: Path) -> None:
    other = write_lines(tmp_path / "other.jsonl", PLAIN)
    with pytest.raises(InputError) as caught:
        read(lines(tmp_path, PLAIN, held_out_dataset_name=str(other)))
    assert str(caught.value) == (
        f"{tmp_path / 'a.jsonl'}: read 100 rows and none can be used: 100 held out; hold out fewer (--num_held_out, "
        "now all), or let both sides share prompts (--held_out_by row)"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset_name": " "}, "--dataset_name is empty: give a value, or leave it away"),
        ({"max_train_samples": 0}, "--max_train_samples 0 must be at least 1"),
        ({"max_bad_share": -0.1}, "--max_bad_share -0.1 must be between 0 and 1"),
        ({"prompt_column": ""}, "--prompt_column is empty"),
        ({"system_prompt": " "}, "--system_prompt is empty"),
        ({"held_out_dataset_name": ""}, "--held_out_dataset_name is empty"),
        ({"held_out_split": ""}, "--held_out_split is empty"),
        ({"num_held_out": -1}, "--num_held_out -1 must be at least 0"),
        ({"prompt_column": "x", "completion_column": "x"}, "--prompt_column and --completion_column are both 'x'"),
        ({"dataset_name": "a", "held_out_split": "train"},
         r"the held-out data are the training data \(--dataset_name a, split 'train'\): give another --held_out_split"),
        ({"dataset_name": "a", "held_out_dataset_name": "a"}, "the held-out data are the training data"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(given: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TextDataSettings(**given)


def test_choosing_single_rows_keeps_eight_bytes_of_each_of_the_others(monkeypatch) -> None:
    monkeypatch.setattr(held_out, "Seen", lambda: Seen(most_fresh=256))
    aside = held_out.Aside(
        20, "row", lambda example: b"", lambda example: short_hash(example.prompt.encode(), example.completion.encode())
    )
    tracemalloc.start()
    found = aside.choose(TextExample(f"prompt {n}", f"answer {n}", None, "") for n in range(5_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 20 and peak < 350_000


@pytest.mark.timeout(20)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
def test_a_pipe_or_a_device_in_the_place_of_the_data_is_an_error(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(InputError, match=f"is a .*{name}, not a file"):
            read_text_examples(settings(tmp_path / f"{name}{suffix}"))


def test_a_conversation_with_broken_characters_is_left_out(tmp_path: Path) -> None:
    texts = pa.array([b"whole", b"caf\xe9", b"half \xed\xa0\xbd", b"last"], pa.binary()).view(pa.string())
    turns = pa.StructArray.from_arrays([pa.array(["user"] * 4), texts], ["role", "content"])
    prompts = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3, 4], pa.int32()), turns)
    pq.write_table(pa.table({"prompt": prompts, "completion": ["a", "b", "c", "d"]}), tmp_path / "a.parquet")
    examples, report = read(settings(tmp_path / "a.parquet", max_bad_share=0.5))
    assert [example.prompt[-1]["content"] for example in examples] == ["whole", "last"]
    assert counts(report) == {"broken characters in the text": 2}
    assert [row.where for row in report.kept_rows["broken characters in the text"]] == [
        "a.parquet row 1",
        "a.parquet row 2",
    ]
