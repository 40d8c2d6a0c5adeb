import json
from pathlib import Path

import pytest

from spin_diffusion.data.reading import read_examples
from spin_diffusion.data.rows import MAX_KEPT_ROWS, ReadReport
from spin_diffusion.data.settings import DataSettings, FilterSettings
from spin_diffusion.store import sharing
from spin_diffusion.store.input_error import InputError
from tests.data.pictures import counts, picture, read, write_table

RED, BLUE, GREEN = picture("red"), picture("blue"), picture("green")


def table(tmp_path: Path, rows: list[tuple], **more) -> DataSettings:
    names = ("image", "text", "score")
    path = write_table(tmp_path / "a.parquet", [dict(zip(names, row, strict=False)) for row in rows])
    return DataSettings(dataset_name=str(path), **more)


def test_the_filter_keeps_what_is_within_its_bounds_and_counts_the_rest(tmp_path: Path) -> None:
    scores = [0.1, 0.5, 0.50001, 0.2, None, float("nan"), 0.19]
    rows = [(RED, f"{index}", score) for index, score in enumerate(scores)]
    bounds = {"filter": FilterSettings("score", 0.5, 0.2)}
    examples, report = read(table(tmp_path, rows, max_bad_share=0.0, **bounds))
    assert [example.prompt for example in examples] == ["1", "3"]
    assert counts(report) == {"filtered": 5}
    assert [row.detail for row in report.kept_rows["filtered"]][:2] == [
        "score is 0.1, below 0.2",
        "score is 0.50001, above 0.5",
    ]


def test_a_filtered_row_is_not_looked_at_further(tmp_path: Path) -> None:
    settings = table(tmp_path, [(RED, "a", 0.0), (b"no image", "b", 1.0)], filter=FilterSettings("score", 0.5))
    assert counts(read(settings)[1]) == {"filtered": 1}


def test_the_same_image_with_the_same_caption_is_used_once(tmp_path: Path) -> None:
    rows = [(RED, "a"), (RED, "b"), (BLUE, "a"), (RED, " a "), (BLUE, "a")]
    examples, report = read(table(tmp_path, rows))
    assert [(example.image, example.prompt) for example in examples] == [(RED, "a"), (RED, "b"), (BLUE, "a")]
    assert counts(report) == {"repeated example": 2}


def test_one_image_per_prompt_keeps_the_first_that_is_usable(tmp_path: Path) -> None:
    rows = [(b"no image", "a"), (RED, "a"), (BLUE, "a"), (GREEN, "b")]
    examples, report = read(table(tmp_path, rows, one_image_per_prompt=True, max_bad_share=0.25))
    assert [(example.image, example.prompt) for example in examples] == [(RED, "a"), (GREEN, "b")]
    assert counts(report) == {"corrupt image": 1, "repeated prompt": 1}


@pytest.mark.parametrize("cores", [1, 7])
def test_which_rows_are_used_does_not_depend_on_how_many_are_looked_at_at_once(tmp_path, cores, monkeypatch) -> None:
    monkeypatch.setattr(sharing, "_cores", lambda: cores)
    rows = [
        (b"no image", "a"),
        (b"", "a"),
        (RED, "a"),
        (b"", "a"),
        (BLUE, "a"),
        (GREEN, ""),
        (b"", "b"),
        (RED, "b"),
    ] * 9
    examples, report = read(table(tmp_path, rows, one_image_per_prompt=True, max_bad_share=0.9))
    assert [(example.image, example.prompt) for example in examples] == [(RED, "a"), (RED, "b")]
    assert counts(report) == {"corrupt image": 3, "empty caption": 9, "repeated prompt": 58}


def test_max_train_samples_counts_usable_examples_and_fewer_are_fine(tmp_path: Path) -> None:
    rows = [(RED, "a"), (RED, "a"), (RED, "b"), (RED, "c")]
    examples, report = read(table(tmp_path, rows, max_train_samples=2))
    assert [example.prompt for example in examples] == ["a", "b"]
    assert report.read == 3, "rows after the last example are not read"
    assert len(read(table(tmp_path, rows, max_train_samples=9))[0]) == 3


def test_more_bad_rows_than_the_share_are_an_error_at_the_end(tmp_path: Path) -> None:
    rows = [(RED, f"{index}") for index in range(8)] + [(RED, ""), (b"x", "c")]
    assert len(read(table(tmp_path, rows, max_bad_share=0.2))[0]) == 8, "exactly the share is allowed"
    settings = table(tmp_path, rows, max_bad_share=0.19)
    examples = read_examples(settings)
    assert len([next(examples) for _ in range(8)]) == 8
    with pytest.raises(InputError) as caught:
        next(examples)
    message = str(caught.value)
    assert "2 of 10 rows (20.0%) are bad (1 corrupt image, 1 empty caption): a.parquet row 9: not a PNG" in message
    assert "; a.parquet row 8: the caption is blank. Repair" in message, "each is named"
    assert "--max_bad_share (now 0.19)" in message
    assert "\n" not in message


def test_the_share_holds_also_when_reading_stops_at_max_train_samples(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 of 2 rows"):
        read(table(tmp_path, [(b"x", "a"), (RED, "b"), (RED, "c")], max_train_samples=1))


def test_a_hopeless_data_set_is_given_up_early(tmp_path: Path) -> None:
    report = ReadReport()
    settings = table(tmp_path, [(RED, "fine")] * 1 + [(b"x", f"{index}") for index in range(300)])
    with pytest.raises(InputError, match=r"reading stopped early: .*101 of 102 rows \(99.0%\) are bad"):
        list(read_examples(settings, report=report))
    assert report.read == 102


def test_who_allows_every_bad_row_is_not_stopped_early(tmp_path: Path) -> None:
    settings = table(tmp_path, [(b"x", f"{index}") for index in range(300)] + [(RED, "fine")], max_bad_share=1.0)
    examples, report = read(settings)
    assert (len(examples), report.bad) == (1, 300)


def test_no_usable_row_is_an_error_that_says_what_was_read_and_why(tmp_path: Path) -> None:
    settings = table(tmp_path, [(RED, "a", 0.9)] * 3, filter=FilterSettings("score", 0.5))
    with pytest.raises(InputError, match=r"a.parquet: read 3 rows and none can be used: 3 filtered$"):
        read(settings)


def test_a_few_broken_files_are_all_named_and_are_no_error(tmp_path: Path) -> None:
    rows = [(b"x", f"{n}") if n % 20 == 7 else (RED, f"{n}") for n in range(61)]
    _, report = read(table(tmp_path, rows))
    assert report.lines()[1:] == [
        "  corrupt image: 3",
        *(f"    a.parquet row {n}: not a PNG, JPEG, WebP, GIF, BMP or TIFF picture" for n in (7, 27, 47)),
    ]


def test_of_many_broken_files_twenty_are_named_and_the_others_counted(tmp_path: Path) -> None:
    _, report = read(table(tmp_path, [(b"x", f"{n}") for n in range(30)] + [(RED, "fine")], max_bad_share=1.0))
    assert len(report.lines()) == 2 + 20 + 1 and report.lines()[-1] == "    and 10 more"


def test_a_report_counts_every_row_and_keeps_the_first_hundred(tmp_path: Path) -> None:
    rows = [(RED, "a")] * 150 + [(b"x", "broken")]
    _, report = read(table(tmp_path, rows))
    assert report.left_out["repeated example"] == 149
    assert len(report.kept_rows["repeated example"]) == MAX_KEPT_ROWS
    assert report.lines() == [
        "read 151 rows: used 1, left out 150",
        "  corrupt image: 1",
        "    a.parquet row 150: not a PNG, JPEG, WebP, GIF, BMP or TIFF picture",
        "  repeated example: 149 (first: a.parquet row 1: the same image with the caption 'a' was used already)",
    ]
    written = json.loads(json.dumps(report.as_dict()))
    assert (written["read"], written["used"], written["left_out"]["repeated example"]) == (151, 1, 149)
    assert written["rows"]["corrupt image"] == [
        {"where": "a.parquet row 150", "detail": "not a PNG, JPEG, WebP, GIF, BMP or TIFF picture"}
    ]
    assert set(written["rows"]) == {"corrupt image", "repeated example"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset_name": "a", "train_data_dir": "b"}, "--dataset_name 'a' and --train_data_dir 'b' are both given"),
        ({"dataset_name": " "}, "--dataset_name is empty"),
        ({"max_train_samples": 0}, "--max_train_samples 0 must be at least 1"),
        ({"max_bad_share": 1.5}, "--max_bad_share 1.5 must be between 0 and 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataSettings(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max": 0.5}, "without a column"),
        ({"column": "score"}, "'score' is given without a bound"),
        ({"column": "score", "min": 0.6, "max": 0.5}, "0.6 is above its max 0.5"),
    ],
)
def test_a_filter_that_contradicts_itself_is_refused(given: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FilterSettings(**given)


def test_no_data_set_at_all_is_an_error() -> None:
    with pytest.raises(InputError, match="give --dataset_name .* or --train_data_dir"):
        read_examples(DataSettings())
