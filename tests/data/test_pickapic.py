from pathlib import Path

import pytest

from spin_diffusion.data.settings import DataSettings
from spin_diffusion.store.input_error import InputError
from tests.data.pictures import counts, cut_short, picture, read, write_table

RED, BLUE, GREEN = picture("red"), picture("blue"), picture("green")


def pair(
    caption: str = "a fox", jpg_0: object = RED, jpg_1: object = BLUE, label_0: float | None = 1.0, **more
) -> dict:
    label_1 = None if label_0 is None else 1 - label_0
    row = {"caption": caption, "jpg_0": jpg_0, "jpg_1": jpg_1, "label_0": label_0, "label_1": label_1}
    return {**row, "has_label": True, "are_different": True, **more}


def settings(path: Path, **more) -> DataSettings:
    return DataSettings(dataset_name=str(path), **more)


def test_the_winner_is_the_image_whose_label_is_1_on_either_side(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", [pair("first", label_0=1.0), pair("second", label_0=0.0)])
    examples, _ = read(settings(path))
    assert [(example.prompt, example.image, example.loser) for example in examples] == [
        ("first", RED, None),
        ("second", BLUE, None),
    ]
    assert [example.where for example in examples] == ["a.parquet row 0", "a.parquet row 1"]


def test_the_loser_is_kept_only_when_it_is_asked_for(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", [pair("first", label_0=1.0), pair("second", label_0=0.0)])
    examples, _ = read(settings(path), with_losers=True)
    assert [(example.image, example.loser) for example in examples] == [(RED, BLUE), (BLUE, RED)]


def test_the_colours_of_the_shared_parquet_file_come_from_its_winners(tiny_parquet: Path) -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(tiny_parquet).to_pylist()
    expected = [(row["caption"], row["jpg_0"] if row["label_0"] == 1 else row["jpg_1"]) for row in rows]
    examples, report = read(settings(tiny_parquet))
    assert [(example.prompt, example.image) for example in examples] == expected
    assert (report.read, report.used) == (24, 24)


def test_ties_and_rows_without_a_label_are_counted_and_are_no_error(tmp_path: Path) -> None:
    rows = [pair("used"), pair(label_0=0.5), pair(label_0=0.5), pair(has_label=False), pair(label_0=None)]
    path = write_table(tmp_path / "a.parquet", [*rows, pair(label_0=1.0, label_1=1.0)])
    examples, report = read(settings(path, max_bad_share=0.0))
    assert [example.prompt for example in examples] == ["used"]
    assert counts(report) == {"tie": 2, "no label": 3}
    assert [row.where for row in report.kept_rows["tie"]] == ["a.parquet row 1", "a.parquet row 2"]


def test_a_file_of_ties_alone_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", [pair(label_0=0.5), pair(label_0=0.5)])
    with pytest.raises(InputError, match=r"read 2 rows and none can be used: 2 tie$"):
        read(settings(path))


def test_a_corrupt_loser_matters_only_to_who_asks_for_losers(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", [pair("one"), pair("two", jpg_1=cut_short())])
    assert len(read(settings(path))[0]) == 2
    examples, report = read(settings(path, max_bad_share=0.5), with_losers=True)
    assert [example.prompt for example in examples] == ["one"]
    assert counts(report) == {"corrupt image": 1}


def test_a_pair_of_one_image_twice_gives_an_image_but_no_loser(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", [pair("one"), pair("two", jpg_1=RED, are_different=False)])
    assert len(read(settings(path))[0]) == 2
    examples, report = read(settings(path), with_losers=True)
    assert [example.prompt for example in examples] == ["one"]
    assert counts(report) == {"tie": 1}


def test_images_may_be_the_datasets_librarys_dicts(tmp_path: Path) -> None:
    row = pair(jpg_0={"bytes": GREEN, "path": "/elsewhere/0.jpg"}, jpg_1={"bytes": BLUE, "path": None})
    examples, _ = read(settings(write_table(tmp_path / "a.parquet", [row])))
    assert examples[0].image == GREEN


def test_naming_an_image_column_turns_the_layout_off(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", [pair("a", label_0=1.0), pair("b", label_0=0.5)])
    examples, _ = read(settings(path, image_column="jpg_1"))
    assert [example.image for example in examples] == [BLUE, BLUE]


def test_another_caption_column_can_be_named_and_a_wrong_one_is_an_error(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", [pair(short="fox")])
    assert read(settings(path, caption_column="short"))[0][0].prompt == "fox"
    with pytest.raises(InputError, match="no column 'captoin'.*the nearest is 'caption'"):
        read(settings(path, caption_column="captoin"))
