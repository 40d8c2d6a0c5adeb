from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ImageFile

from spin_diffusion.data.reading import read_examples
from spin_diffusion.data.rows import ReadReport
from spin_diffusion.data.settings import DataSettings, FilterSettings
from spin_diffusion.store import pictures
from spin_diffusion.store.input_error import InputError
from tests.data.pictures import counts, cut_short, picture, read, write_table

RED, BLUE = picture("red"), picture("blue")


def settings(path: Path | str, **more) -> DataSettings:
    return DataSettings(dataset_name=str(path), **more)


def one(tmp_path: Path, **more) -> Path:
    """A file with one usable row and one row with these values."""
    return write_table(tmp_path / "a.parquet", [{"image": RED, "text": "fine"}, {"image": BLUE, "text": "odd"} | more])


def corrupt(tmp_path: Path, encoded: bytes) -> str:
    """Why the bytes are refused as an image."""
    _, report = read(settings(one(tmp_path, image=encoded), max_bad_share=0.5))
    assert counts(report) == {"corrupt image": 1}
    return report.kept_rows["corrupt image"][0].detail


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_the_bytes_come_out_as_they_went_in(tmp_path: Path, format: str) -> None:
    encoded = picture("red", format=format)
    examples, _ = read(settings(write_table(tmp_path / "a.parquet", [{"image": encoded, "text": " a  fox\n"}])))
    assert [(example.image, example.prompt, example.loser) for example in examples] == [(encoded, "a  fox", None)]


@pytest.mark.parametrize(
    ("image", "caption"), [("image", "text"), ("jpg", "caption"), ("webp", "prompt"), ("png", "txt")]
)
def test_the_usual_column_names_are_found(tmp_path: Path, image: str, caption: str) -> None:
    path = write_table(tmp_path / "a.parquet", [{"id": 1, image: RED, caption: "a fox"}])
    assert [example.prompt for example in read(settings(path))[0]] == ["a fox"]


def test_columns_can_be_named(tmp_path: Path) -> None:
    row = {"image": RED, "text": "no", "photo": BLUE, "words": "yes"}
    path = write_table(tmp_path / "a.parquet", [row])
    (example,) = read(settings(path, image_column="photo", caption_column="words"))[0]
    assert (example.prompt, example.image) == ("yes", BLUE)


def test_a_missing_column_is_an_error_with_the_columns_there_are_and_the_nearest(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", [{"image": RED, "captions": "a", "id": 1}])
    with pytest.raises(
        InputError, match="none of the columns text, caption.*image, captions, id.*nearest is 'captions'"
    ):
        read_examples(settings(path))
    with pytest.raises(InputError, match="no column 'capton'.*image, captions, id.*nearest is 'captions'"):
        read_examples(settings(path, caption_column="capton"))
    with pytest.raises(InputError, match=r"no column 'imge' \(--image_column\).*nearest is 'image'"):
        read_examples(settings(path, image_column="imge", caption_column="captions"))
    with pytest.raises(InputError, match=r"no column 'idd' \(--filter column\).*nearest is 'id'"):
        read_examples(settings(path, caption_column="captions", filter=FilterSettings("idd", 1.0)))


def test_of_a_list_of_captions_the_first_is_used(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "a.parquet", [{"image": RED, "text": ["first", "second"]}, {"image": RED, "text": []}]
    )
    examples, report = read(settings(path, max_bad_share=0.5))
    assert [example.prompt for example in examples] == ["first"]
    assert counts(report) == {"empty caption": 1}


@pytest.mark.parametrize("caption", ["", "  \n", None])
def test_a_row_without_a_caption_is_bad(tmp_path: Path, caption: str | None) -> None:
    examples, report = read(settings(one(tmp_path, text=caption), max_bad_share=0.5))
    assert len(examples) == 1
    assert counts(report) == {"empty caption": 1}


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_an_image_that_is_cut_short_is_corrupt_even_if_another_library_allows_it(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    corrupt(tmp_path, cut_short(format))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True, "the other library's setting must be left as it was"


def test_bytes_that_are_no_image_or_of_another_format_are_corrupt(tmp_path: Path) -> None:
    assert corrupt(tmp_path, b"not an image") == "not a PNG, JPEG, WebP, GIF, BMP or TIFF picture"
    assert corrupt(tmp_path, picture("red", format="PPM")) == "not a PNG, JPEG, WebP, GIF, BMP or TIFF picture"
    assert corrupt(tmp_path, b"") == "the image has 0 bytes"


def test_an_image_below_8_px_a_side_is_corrupt_and_one_of_8_px_is_not(tmp_path: Path) -> None:
    assert corrupt(tmp_path, picture("red", side_px=1)) == "1 x 1 px is smaller than 8 px a side"
    assert corrupt(tmp_path, picture("red", side_px=7)) == "7 x 7 px is smaller than 8 px a side"
    assert len(read(settings(one(tmp_path, image=picture("red", side_px=8))))[0]) == 2


def test_a_decompression_bomb_is_a_corrupt_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(
        tmp_path / "a.parquet", [{"image": picture("red", 8), "text": "a"}, {"image": picture("red", 16), "text": "b"}]
    )
    monkeypatch.setattr(pictures, "MAX_PIXELS", 16 * 16 - 1)
    examples, report = read(settings(path, max_bad_share=0.5))
    assert [example.prompt for example in examples] == ["a"]
    assert report.kept_rows["corrupt image"][0].detail.startswith("16 x 16 px, at most 255 pixels")


def test_an_image_may_be_a_dict_or_a_path_in_the_folder_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "red.png").write_bytes(RED)
    dicts = write_table(
        tmp_path / "dicts.parquet",
        [
            {"image": {"bytes": BLUE, "path": "/nowhere/x.png"}, "text": "a"},
            {"image": {"bytes": None, "path": "pictures/red.png"}, "text": "b"},
        ],
    )
    assert [example.image for example in read(settings(dicts))[0]] == [BLUE, RED]
    rows = [{"image": f"pictures/{name}.png", "text": name} for name in ("red", "gone")]
    examples, report = read(settings(write_table(tmp_path / "paths.parquet", rows), max_bad_share=0.5))
    assert [example.image for example in examples] == [RED]
    assert report.kept_rows["missing image file"][0].where == "paths.parquet row 1"


@pytest.mark.parametrize("name", ["../out.png", "a/../../out.png", "/etc/out.png", "..\\out.png", "C:\\out.png"])
def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "out.png").write_bytes(RED)
    path = write_table(tmp_path / "folder" / "a.parquet", [{"image": name, "text": "a"}])
    with pytest.raises(InputError, match="leads out of the folder"):
        read(settings(path))


def test_an_address_as_the_image_is_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", [{"image": "https://example.org/a.png", "text": "a"}])
    with pytest.raises(InputError, match="is an address: download the images"):
        read(settings(path))


def test_a_column_of_numbers_is_no_image_column(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", [{"image": 3, "text": "a"}])
    with pytest.raises(InputError, match="row 0: the image column holds int"):
        read(settings(path))


def test_files_are_read_in_order_and_rows_named_by_file(tmp_path: Path) -> None:
    for index in (1, 0, 2):
        write_table(tmp_path / f"train-{index}.parquet", [{"image": RED, "text": f"{index}{row}"} for row in range(20)])
    expected = [f"{index}{row}" for index in range(3) for row in range(20)]
    for name in ("train-*.parquet", "train-{0..2}.parquet", "train-{0,1,2}.parquet", ""):
        examples, _ = read(settings(tmp_path / name))
        assert [example.prompt for example in examples] == expected
        assert examples[37].where == "train-1.parquet row 17"


def test_files_with_other_columns_are_an_error(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", [{"image": RED, "text": "a"}])
    write_table(tmp_path / "b.parquet", [{"image": RED, "caption": "b"}])
    with pytest.raises(InputError, match="b.parquet has no column 'text', unlike a.parquet"):
        read(settings(tmp_path / "*.parquet"))


def test_a_file_that_is_no_parquet_and_one_that_is_damaged_are_errors(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("hello, this is text and no table")
    with pytest.raises(InputError, match="text.parquet is not a readable parquet file"):
        read_examples(settings(tmp_path / "text.parquet"))
    path = tmp_path / "damaged.parquet"
    table = pa.table({"image": [RED] * 4, "text": ["abcdefgh"] * 4})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged.parquet is damaged after row 0.*fetch it again"):
        read(settings(path))


def test_only_the_needed_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = pq.ParquetFile.iter_batches

    def iter_batches(self, *args, **kwargs):
        asked.append(kwargs["columns"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    path = write_table(tmp_path / "a.parquet", [{"image": RED, "text": "a", "big": BLUE, "score": 0.1}])
    read(settings(path, filter=FilterSettings("score", 1.0)))
    assert asked == [["image", "text", "score"]]


def test_losers_need_the_columns_of_pairs(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", [{"image": RED, "text": "a"}])
    with pytest.raises(InputError, match="has no worse images.*jpg_0, jpg_1.*its columns are image, text"):
        read_examples(settings(path), with_losers=True)


def test_examples_are_read_one_by_one(tmp_path: Path) -> None:
    report = ReadReport()
    path = write_table(tmp_path / "a.parquet", [{"image": RED, "text": f"{index}"} for index in range(50)])
    examples = read_examples(settings(path), report=report)
    next(examples)
    next(examples)
    assert report.read == 2
