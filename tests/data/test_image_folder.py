import json
from pathlib import Path

import pytest

from spin_diffusion.data import DataSettings, read_examples
from spin_diffusion.input_error import InputError
from tests.data.pictures import counts, picture, read, write_table

RED, BLUE = picture("red"), picture("blue", format="JPEG")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """photos/ with cat.png and sub/dog.jpg, and a picture outside of it."""
    (tmp_path / "secret.png").write_bytes(picture("black"))
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "photos" / "cat.png").write_bytes(RED)
    (tmp_path / "photos" / "sub" / "dog.jpg").write_bytes(BLUE)
    return tmp_path / "photos"


def jsonl(folder: Path, *rows: dict) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def settings(folder: Path, **more) -> DataSettings:
    return DataSettings(train_data_dir=str(folder), **more)


DOG, CAT = {"file_name": "sub/dog.jpg", "text": "a dog, wet"}, {"file_name": "cat.png", "text": "a cat"}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_images_and_captions_come_in_the_order_of_the_metadata(folder: Path, kind: str) -> None:
    if kind == "jsonl":
        jsonl(folder, DOG, CAT)
    elif kind == "csv":
        (folder / "metadata.csv").write_text('file_name,text\nsub/dog.jpg,"a dog, wet"\ncat.png,a cat\n')
    else:
        write_table(folder / "metadata.parquet", [DOG, CAT])
    for given in (settings(folder), DataSettings(dataset_name=str(folder))):
        examples, _ = read(given)
        assert [(example.prompt, example.image, example.where) for example in examples] == [
            ("a dog, wet", BLUE, "sub/dog.jpg"),
            ("a cat", RED, "cat.png"),
        ]


def test_a_filter_reads_the_numbers_of_a_csv(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text,nsfw\nsub/dog.jpg,a dog,0.9\ncat.png,a cat,1e-3\n")
    examples, report = read(settings(folder, filter_column="nsfw", filter_max=0.5))
    assert [example.prompt for example in examples] == ["a cat"]
    assert counts(report) == {"filtered": 1}


def test_every_subfolder_may_have_its_own_metadata(folder: Path) -> None:
    jsonl(folder, CAT)
    jsonl(folder / "sub", {"file_name": "dog.jpg", "text": "a dog"})
    examples, report = read(settings(folder))
    assert [example.where for example in examples] == ["cat.png", "sub/dog.jpg"]
    assert counts(report) == {}


def test_an_image_that_no_metadata_names_is_counted_and_is_no_error(folder: Path) -> None:
    jsonl(folder, CAT)
    examples, report = read(settings(folder, max_bad_share=0.0))
    assert [example.where for example in examples] == ["cat.png"]
    assert [row.where for row in report.kept_rows["not in metadata"]] == ["sub/dog.jpg"]


def test_a_file_that_is_not_there_and_a_line_without_a_caption_are_bad(folder: Path) -> None:
    jsonl(folder, CAT, {"file_name": "gone.png", "text": "gone"}, {"file_name": "sub/dog.jpg"}, {"text": "no file"})
    with pytest.raises(
        InputError, match="3 of 4 rows .*the first bad row is gone.png: gone.png does not exist in photos"
    ):
        read(settings(folder))
    _, report = read(settings(folder, max_bad_share=0.75))
    assert counts(report) == {"missing image file": 2, "empty caption": 1}
    assert report.kept_rows["missing image file"][1].where == "metadata.jsonl line 4"


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "ABSOLUTE", "..\\secret.png"])
def test_a_file_name_that_leads_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    name = str(folder.parent / "secret.png") if name == "ABSOLUTE" else name
    jsonl(folder, {"file_name": name, "text": "a secret"})
    with pytest.raises(InputError, match="leads out of the folder; give it relative"):
        read(settings(folder))


def test_a_folder_without_captions_is_an_error_that_shows_a_right_line(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_examples(settings(folder))
    message = str(caught.value)
    assert "2 images but no captions" in message
    line = json.loads(message[message.index("{") : message.index("}") + 1])
    assert line == {"file_name": "cat.png", "text": "what this image shows"}
    jsonl(folder, line)
    assert len(read(settings(folder))[0]) == 1, "the line that the error shows works"


def test_text_files_beside_the_images_are_captions(folder: Path) -> None:
    (folder / "cat.txt").write_text("a cat\n")
    (folder / "sub" / "dog.txt").write_text("a dög", encoding="utf-8")
    examples, _ = read(settings(folder))
    assert [(example.prompt, example.image, example.where) for example in examples] == [
        ("a cat", RED, "cat.png"),
        ("a dög", BLUE, "sub/dog.jpg"),
    ]


def test_an_image_without_its_text_file_is_bad_and_so_is_one_of_an_odd_format(folder: Path) -> None:
    (folder / "cat.txt").write_text("a cat\n")
    (folder / "photo.heic").write_bytes(picture("red", format="PPM"))
    (folder / "photo.txt").write_text("a photo")
    (folder / "latin.png").write_bytes(picture("green"))
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    _, report = read(settings(folder, max_bad_share=0.75))
    assert counts(report) == {"corrupt image": 1, "empty caption": 2}
    assert [row.detail.split(":")[0] for row in report.kept_rows["empty caption"]] == [
        "latin.txt cannot be read as UTF-8 text",
        "there is no dog.txt beside it",
    ]


def test_the_subfolder_of_the_split_is_read_where_there_is_one(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split).mkdir()
        (folder / split / "cat.png").write_bytes(RED)
        jsonl(folder / split, {"file_name": "cat.png", "text": split})
    assert [example.prompt for example in read(settings(folder))[0]] == ["train"]
    assert [example.prompt for example in read(settings(folder, dataset_split="test"))[0]] == ["test"]
    with pytest.raises(InputError, match=r"no subfolder 'val' \(--dataset_split\)"):
        read_examples(settings(folder, dataset_split="val"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "cat.png", "text": "a"}\n{"file_name": \n',
            "metadata.jsonl line 2 is not JSON",
        ),
        ("metadata.jsonl", '["cat.png", "a"]\n', "line 1 is not an object like"),
        ("metadata.jsonl", '{"filename": "cat.png", "text": "a"}\n', "no column 'file_name'.*nearest is 'filename'"),
        ("metadata.jsonl", '{"file_name": "cat.png", "txet": "a"}\n', "none of the columns text.*nearest is 'txet'"),
        ("metadata.csv", "file_name,text\ncat.png,a cat, wet\n", "metadata.csv line 2 has more than 2 fields"),
        ("metadata.csv", "file_name,text,text\n", "names a column twice"),
        ("metadata.csv", "", "no column 'file_name'; it has no columns"),
        ("metadata.parquet", "text", "metadata.parquet is not a readable parquet file"),
    ],
)
def test_metadata_that_cannot_be_read_is_an_error_that_says_where(
    folder: Path, name: str, text: str, message: str
) -> None:
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read(settings(folder))


def test_two_metadata_files_in_one_folder_are_an_error(folder: Path) -> None:
    jsonl(folder, CAT)
    (folder / "metadata.csv").write_text("file_name,text\ncat.png,a cat\n")
    with pytest.raises(InputError, match="has both metadata.csv and metadata.jsonl: keep one"):
        read_examples(settings(folder))


def test_a_folder_that_is_empty_or_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no images, parquet files or tars"):
        read_examples(settings(tmp_path))
    with pytest.raises(InputError, match="none is not a folder; give a folder of images"):
        read_examples(settings(tmp_path / "none"))
