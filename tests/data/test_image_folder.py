import json
import os
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin_diffusion.data.reading import read_examples
from spin_diffusion.data.settings import DataSettings, FilterSettings
from spin_diffusion.store.input_error import InputError
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
    examples, report = read(settings(folder, filter=FilterSettings("nsfw", max=0.5)))
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
    with pytest.raises(InputError, match="3 of 4 rows .*gone.png: gone.png does not exist in photos"):
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
    assert counts(report) == {"corrupt image": 1, "empty caption": 1, "broken characters in the text": 1}
    assert report.kept_rows["empty caption"][0].detail == "there is no dog.txt beside it"
    detail = "character 4 of latin.txt is half of one, or its bytes are not UTF-8"
    assert report.kept_rows["broken characters in the text"][0].detail == detail


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
        ("metadata.jsonl", '["cat.png", "a"]\n', "entry 1 is not an object like"),
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


# Links


def test_a_link_to_a_folder_is_followed_wherever_it_leads(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    for name, colour in (("a", "green"), ("deep/b", "pink")):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / f"{name}.png").write_bytes(picture(colour))
        (elsewhere / f"{name}.txt").write_text(colour)
    (folder / "cat.txt").write_text("a cat")
    (folder / "sub" / "dog.txt").write_text("a dog")
    (folder / "linked").symlink_to("../elsewhere")
    examples, report = read(settings(folder))
    assert [example.where for example in examples] == ["cat.png", "linked/a.png", "linked/deep/b.png", "sub/dog.jpg"]
    assert counts(report) == {}
    (folder.parent / "only").mkdir()
    (folder.parent / "only" / "linked").symlink_to(elsewhere)
    assert [example.prompt for example in read(settings(folder.parent / "only"))[0]] == ["green", "pink"]


def test_a_folder_that_links_lead_to_twice_or_back_is_read_once_and_said(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere" / "deep"
    elsewhere.mkdir(parents=True)
    (elsewhere / "b.png").write_bytes(picture("pink"))
    jsonl(elsewhere, {"file_name": "b.png", "text": "pink"})
    jsonl(folder, DOG, CAT)
    for name, target in (
        ("around", ".."),  # a loop
        ("itself", "."),
        ("same", "sub"),  # read under its own name
        ("x", "../elsewhere"),
        ("y", str(elsewhere.parent)),  # x once more
        ("sub/up", "../../photos"),
        ("../elsewhere/deep/round", "../../elsewhere"),
    ):
        (folder / name).symlink_to(target)
    examples, report = read(settings(folder))
    assert sorted(example.prompt for example in examples) == ["a cat", "a dog, wet", "pink"]
    assert counts(report) == {"link to a folder that is read already": 6}
    left_out = {row.where: row.detail for row in report.kept_rows["link to a folder that is read already"]}
    assert sorted(left_out) == ["around", "itself", "same", "sub/up", "x/deep/round", "y"]
    assert left_out["y"] == f"it leads to {elsewhere.parent}"


def test_a_link_to_nothing_is_counted_and_named(folder: Path) -> None:
    (folder / "cat.txt").write_text("a cat")
    (folder / "sub" / "dog.txt").symlink_to("nowhere.txt")
    (folder / "gone.png").symlink_to("/nowhere/gone.png")
    (folder / "gone.txt").write_text("gone")
    (folder / "set_b").symlink_to("../set_b")
    (folder / "set.old").symlink_to("set.old")  # to itself
    _, report = read(settings(folder, max_bad_share=0.9))
    assert report.used == 1
    assert counts(report) == {"link to nothing": 2, "missing image file": 1, "empty caption": 1}
    first = report.kept_rows["missing image file"][0]
    assert str(first) == "gone.png: gone.png is a link to /nowhere/gone.png, which does not exist"
    assert str(report.kept_rows["link to nothing"][1]) == "set_b: it leads to ../set_b, which does not exist"
    with pytest.raises(InputError, match="2 link to nothing"):
        read(settings(folder))


def test_a_folder_with_nothing_but_a_link_to_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to("/nowhere/images")
    with pytest.raises(InputError, match="no images.*1 links or folders.*images: .*/nowhere/images, which"):
        read_examples(settings(tmp_path))


def test_a_subfolder_that_cannot_be_read_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "cat.txt").write_text("a cat")
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    _, report = read(settings(folder, max_bad_share=0.5))
    assert str(report.kept_rows["folder that cannot be read"][0]) == "sub: Permission denied"


# What is no file


@pytest.fixture
def odd(folder: Path):
    """The folder, and a function that puts something odd in the place of a file."""

    def put(name: str, kind: str) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        else:
            os.chdir(folder)  # a socket's path has at most 108 bytes
            socket.socket(socket.AF_UNIX).bind(name)

    return folder, put


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
@pytest.mark.parametrize("name", ["cat.png", "cat.txt"])
def test_what_is_no_file_in_the_place_of_an_image_or_a_caption_is_counted(
    odd, kind: str, name: str, monkeypatch
) -> None:
    folder, put = odd
    monkeypatch.chdir(folder)
    (folder / "cat.txt").write_text("a cat")
    (folder / "sub" / "dog.txt").write_text("a dog")
    put(name, kind)
    if (name, kind) == ("cat.png", "folder"):
        jsonl(folder, CAT, DOG)
    _, report = read(settings(folder, max_bad_share=0.5))
    assert counts(report) == {"missing image file" if name == "cat.png" else "empty caption": 1}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_what_is_no_file_in_the_place_of_the_metadata_is_an_error(odd, kind: str, suffix: str, monkeypatch) -> None:
    folder, put = odd
    monkeypatch.chdir(folder)
    put(f"metadata{suffix}", kind)
    with pytest.raises(InputError, match=f"metadata{suffix} (is a|cannot be opened)"):
        read_examples(settings(folder))


def test_more_bytes_than_a_caption_has_are_not_read(folder: Path) -> None:
    (folder / "cat.txt").write_text("a cat")
    with (folder / "sub" / "dog.txt").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing
    _, report = read(settings(folder, max_bad_share=0.5))
    assert "at most 1,048,576 are read" in report.kept_rows["empty caption"][0].detail


# Strings of a disk


def test_the_ends_of_names_may_be_written_in_capitals(folder: Path) -> None:
    (folder / "cat.png").rename(folder / "CAT.PNG")
    (folder / "CAT.TXT").write_text("a cat")
    (folder / "sub" / "dog.jpg").unlink()
    assert [example.prompt for example in read(settings(folder))[0]] == ["a cat"]
    (folder / "metadata.JSONL").write_text(json.dumps({"file_name": "CAT.PNG", "text": "by metadata"}))
    assert [example.prompt for example in read(settings(folder))[0]] == ["by metadata"]


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_an_image_whose_name_is_not_utf_8_is_read_and_its_place_can_be_printed(folder: Path, kind: str) -> None:
    name = os.fsencode(folder) + b"/caf\xe9"
    Path(os.fsdecode(name + b".png")).write_bytes(picture("pink"))
    (folder / "sub" / "dog.jpg").unlink()
    if kind == "txt":
        (folder / "cat.txt").write_text("a cat")
        Path(os.fsdecode(name + b".txt")).write_text("a caf\u00e9", encoding="utf-8-sig")
    elif kind == "csv":
        (folder / "metadata.csv").write_bytes(b"file_name,text\ncat.png,a cat\n" + b"caf\xe9.png,a caf\xc3\xa9\n")
    else:
        lines = b'{"file_name": "cat.png", "text": "a cat"}\n{"file_name": "caf\xe9.png", "text": "a caf\xc3\xa9"}\n'
        (folder / "metadata.jsonl").write_bytes(lines)
    examples, report = read(settings(folder))
    assert {example.prompt: example.where for example in examples} == {
        "a cat": "cat.png",
        "a caf\u00e9": "caf\\udce9.png",
    }
    assert counts(report) == {}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt", "parquet"])
def test_a_caption_with_broken_characters_is_left_out_and_counted(folder: Path, kind: str) -> None:
    if kind == "jsonl":
        jsonl(folder, {"file_name": "cat.png", "text": "a smile \ud83d"}, DOG)
    elif kind == "csv":
        (folder / "metadata.csv").write_bytes(b"file_name,text\ncat.png,caf\xe9\nsub/dog.jpg,a dog\n")
    elif kind == "txt":
        (folder / "cat.txt").write_bytes("a cat".encode("utf-16"))
        (folder / "sub" / "dog.txt").write_text("a dog")
    else:
        cells = pa.array([b"caf\xe9", b"a dog"], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"file_name": ["cat.png", "sub/dog.jpg"], "text": cells}), folder / "metadata.parquet")
    examples, report = read(settings(folder, max_bad_share=0.5))
    assert len(examples) == 1 and examples[0].image == BLUE
    assert counts(report)["broken characters in the text"] == 1
    assert json.dumps(report.as_dict(), ensure_ascii=False).encode()
