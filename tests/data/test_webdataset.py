import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest

from spin_diffusion.data import files
from spin_diffusion.data.reading import read_examples
from spin_diffusion.data.settings import DataSettings, FilterSettings
from spin_diffusion.store.input_error import InputError
from tests.data.pictures import counts, cut_short, picture, read, write_tar

RED, BLUE, GREEN = picture("red"), picture("blue", format="JPEG"), picture("green", format="WEBP")


def settings(path: Path, **more) -> DataSettings:
    return DataSettings(dataset_name=str(path), **more)


def sample(key: str, image: bytes = RED, caption: str = "a fox", extension: str = "png") -> list[tuple[str, bytes]]:
    return [(f"{key}.{extension}", image), (f"{key}.txt", caption.encode())]


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tgz", "w:gz")])
def test_samples_come_in_order_whatever_the_image_format(tmp_path: Path, suffix: str, mode: str) -> None:
    members = sample("b/2", RED, "red") + sample("b/1", BLUE, "blue", "jpg") + sample("b/0", GREEN, "green", "webp")
    examples, _ = read(settings(write_tar(tmp_path / f"0.{suffix}", members, mode)))
    assert [(example.image, example.prompt, example.where) for example in examples] == [
        (RED, "red", f"0.{suffix} sample b/2"),
        (BLUE, "blue", f"0.{suffix} sample b/1"),
        (GREEN, "green", f"0.{suffix} sample b/0"),
    ]


def test_the_keys_of_a_json_are_columns(tmp_path: Path) -> None:
    document = {"caption": "from json", "nsfw": 0.1, "image": "https://example.org", "short": "fox"}
    members = [("0.json", json.dumps(document).encode()), ("0.jpg", BLUE)]
    members += [("1.json", json.dumps(document | {"nsfw": 0.9}).encode()), ("1.jpg", BLUE)]
    path = write_tar(tmp_path / "0.tar", members)
    examples, report = read(settings(path, filter=FilterSettings("nsfw", max=0.5)))
    assert [(example.prompt, example.image) for example in examples] == [("from json", BLUE)]
    assert counts(report) == {"filtered": 1}
    assert read(settings(path, caption_column="short"))[0][0].prompt == "fox"


def test_an_extension_can_be_named_as_the_image_column(tmp_path: Path) -> None:
    members = [("0.input.png", RED), ("0.target.png", picture("blue")), ("0.txt", b"a fox")]
    path = write_tar(tmp_path / "0.tar", members)
    assert read(settings(path, image_column="target.png"))[0][0].image == picture("blue")
    with pytest.raises(InputError, match="none of the columns image.*input.png, target.png, txt"):
        read_examples(settings(path))


@pytest.mark.parametrize("name", ["*.tar", "{00..02}.tar", ""])
def test_several_tars_are_read_one_after_the_other(tmp_path: Path, name: str) -> None:
    for index in (2, 0, 1):
        write_tar(tmp_path / f"{index:02d}.tar", sample("a", caption=f"{index}"))
    examples, _ = read(settings(tmp_path / name))
    assert [example.where for example in examples] == [f"0{index}.tar sample a" for index in range(3)]
    assert [example.prompt for example in examples] == ["0", "1", "2"]


def test_a_missing_tar_of_a_range_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "00.tar", sample("a"))
    with pytest.raises(InputError, match="no file matches .*01.tar"):
        read_examples(settings(tmp_path / "{00..01}.tar"))


def test_members_that_run_code_are_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "sprung", "x"))

    trap = pickle.dumps(Trap())
    members = [(f"0.{kind}", trap) for kind in ("pyd", "pickle", "pkl", "pth", "npy", "cls")]
    examples, _ = read(settings(write_tar(tmp_path / "0.tar", members + sample("0"))))
    assert len(examples) == 1
    assert not (tmp_path / "sprung").exists()


def test_members_are_not_written_to_the_disk_whatever_their_names(tmp_path: Path) -> None:
    members = sample("../../escape") + sample("/etc/escape", caption="b")
    path = write_tar(tmp_path / "deep" / "er" / "0.tar", members)
    assert len(read(settings(path))[0]) == 2
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_samples_with_missing_parts_are_bad(tmp_path: Path) -> None:
    members = sample("0") + [("1.png", RED)] + [("2.txt", b"no image")] + sample("3", cut_short(), extension="jpg")
    members += [("4.json", b"{"), ("4.png", RED)] + sample("5", caption=" ") + [("6.png", RED), ("6.txt", b"caf\xe9")]
    _, report = read(settings(write_tar(tmp_path / "0.tar", members), max_bad_share=0.9))
    assert report.used == 1
    assert counts(report) == {
        "empty caption": 3, "missing image file": 1, "corrupt image": 1, "broken characters in the text": 1
    }  # fmt: skip
    assert report.kept_rows["empty caption"][1].detail.startswith("4.json cannot be read")


def test_a_key_that_comes_twice_is_two_samples(tmp_path: Path) -> None:
    members = sample("0", RED, "first") + sample("0", RED, "second")
    examples, _ = read(settings(write_tar(tmp_path / "0.tar", members)))
    assert [example.prompt for example in examples] == ["first", "second"]


def test_a_member_that_would_not_fit_in_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_MEMBER_BYTES", 1000)
    members = sample("0") + sample("1", RED + bytes(1000))
    _, report = read(settings(write_tar(tmp_path / "0.tar", members), max_bad_share=0.5))
    assert "more than 1000" in report.kept_rows["corrupt image"][0].detail


@pytest.mark.parametrize("keep_bytes", [512, 1024 + 100, 1024 + 512, 3 * 512, 4 * 512, 5 * 512])
def test_a_tar_that_is_cut_short_is_an_error_wherever_the_cut_is(tmp_path: Path, keep_bytes: int) -> None:
    whole = write_tar(tmp_path / "0.tar", sample("0") + sample("1", caption="b"))
    assert whole.stat().st_size > 8 * 512
    assert len(read(settings(whole))[0]) == 2
    whole.write_bytes(whole.read_bytes()[:keep_bytes])
    with pytest.raises(InputError, match="0.tar is not a whole tar.*fetch it again"):
        read(settings(whole))


def test_a_compressed_tar_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "0.tar.gz", sample("0") + sample("1", caption="b"), "w:gz")
    whole.write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(InputError, match="0.tar.gz is not a whole tar"):
        read(settings(whole))


def test_a_file_that_is_no_tar_and_a_tar_without_samples_are_errors(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("hello")
    with pytest.raises(InputError, match="text.tar is not a whole tar"):
        read_examples(settings(tmp_path / "text.tar"))
    write_tar(tmp_path / "readme.tar", [("README", b"hello")])
    with pytest.raises(InputError, match="readme.tar has no samples.*00001.jpg and 00001.txt"):
        read_examples(settings(tmp_path / "readme.tar"))


def test_links_and_devices_in_a_tar_are_left_out_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(RED)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind, target in (
            ("a.png", tarfile.SYMTYPE, str(tmp_path / "secret.png")),
            ("b.png", tarfile.LNKTYPE, "../secret.png"),
            ("c.png", tarfile.CHRTYPE, ""),
            ("d.png", tarfile.FIFOTYPE, ""),
            ("e.txt", tarfile.SYMTYPE, "secret.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
        for name, data in (("/absolute/f.png", RED), ("/absolute/f.txt", b"f"), ("../g.png", BLUE), ("../g.txt", b"g")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    examples, report = read(settings(tmp_path / "0.tar", max_bad_share=0.9))
    assert [(example.prompt, example.image) for example in examples] == [("f", RED), ("g", BLUE)]
    assert counts(report) == {"missing image file": 4, "empty caption": 1}
    assert report.kept_rows["missing image file"][0].detail == "a.png is a link or a device, not a file"
    assert not (tmp_path.parent / "g.png").exists()


def test_names_and_captions_in_a_tar_need_not_be_utf_8(tmp_path: Path) -> None:
    members = sample("caf\udce9", RED, "whole") + [("b.png", BLUE), ("b.txt", b"caf\xe9")]
    examples, report = read(settings(write_tar(tmp_path / "0.tar", members), max_bad_share=0.9))
    assert [(example.prompt, example.where) for example in examples] == [("whole", "0.tar sample caf\\udce9")]
    assert counts(report) == {"broken characters in the text": 1}
    members = [("a.png", RED), ("a.json", b'{"text": "a", "x": "\xe9"}')]
    members += [("b.png", BLUE), ("b.json", b'{"text": "\\ud83d"}')]
    examples, more = read(settings(write_tar(tmp_path / "1.tar", members), max_bad_share=0.9))
    assert [example.prompt for example in examples] == ["a"] and counts(more) == counts(report)
    assert json.dumps(report.as_dict(), ensure_ascii=False).encode() and "\n".join(report.lines()).encode()
