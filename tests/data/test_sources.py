import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin_diffusion.data import reading
from spin_diffusion.data.reading import read_examples
from spin_diffusion.data.settings import DataSettings, FilterSettings
from spin_diffusion.data.sources import expand_braces, looks_like_a_path, split_of
from spin_diffusion.store.input_error import InputError
from tests.data.pictures import counts, picture, read, write_table, write_tar

RED, BLUE = picture("red"), picture("blue", format="JPEG")


def settings(name: Path | str, **more) -> DataSettings:
    return DataSettings(dataset_name=str(name), **more)


def row(text: str, image: bytes = RED) -> dict[str, object]:
    return {"image": image, "text": text}


def prompts(given: DataSettings) -> list[str]:
    return [example.prompt for example in read(given)[0]]


@pytest.mark.parametrize("name", ["./none", "/none/a.parquet", "none.parquet", "a/b/c", "~/none", "train.tar", "C:\\a"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: pytest.fail("the hub was asked"))
    with pytest.raises(InputError, match="does not exist: give a path that does, or a hub id"):
        read_examples(settings(name))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_id_that_cannot_be_reached_is_one_clear_error(streaming: bool) -> None:
    with pytest.raises(InputError) as caught:
        read_examples(settings("someone/pictures", streaming=streaming))
    assert "'someone/pictures' is no local file or folder" in str(caught.value)
    assert "give the path of a local copy" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_address_and_a_pattern_without_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is an address: give the hub id"):
        read_examples(settings("https://example.org/a.parquet"))
    with pytest.raises(InputError, match="no file matches"):
        read_examples(settings(tmp_path / "*.parquet"))


def test_files_of_an_unknown_or_mixed_kind_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("a")
    with pytest.raises(InputError, match="a.xlsx is neither .parquet nor .tar"):
        read_examples(settings(tmp_path / "a.xlsx"))
    write_table(tmp_path / "data" / "a.parquet", [row("a")])
    write_tar(tmp_path / "data" / "a.tar", [("a.png", RED)])
    with pytest.raises(InputError, match="parquet files and tars: name one kind"):
        read_examples(settings(tmp_path / "data"))
    with pytest.raises(InputError, match="parquet files and tars: name one kind"):
        read_examples(settings(tmp_path / "data" / "*"))


def test_the_split_of_a_folder_is_chosen_by_the_names_of_its_files(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation_unique-00000-of-00001", "test"):
        write_table(tmp_path / "data" / f"{name}.parquet", [row(name)])
    assert prompts(settings(tmp_path)) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert prompts(settings(tmp_path, dataset_split="validation_unique")) == ["validation_unique-00000-of-00001"]
    assert prompts(settings(tmp_path, dataset_split="test")) == ["test"]
    with pytest.raises(InputError, match=r"no files of split 'dev' .* it has test, train, validation_unique"):
        read_examples(settings(tmp_path, dataset_split="dev"))


def test_files_whose_names_speak_of_no_split_are_all_train(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_table(tmp_path / f"{name}.parquet", [row(name)])
    assert prompts(settings(tmp_path)) == ["a", "b"]
    with pytest.raises(InputError, match=r"no files of split 'test'"):
        read_examples(settings(tmp_path, dataset_split="test"))


def test_a_configuration_of_a_folder_is_its_subfolder(tmp_path: Path) -> None:
    for name in ("small", "large"):
        write_table(tmp_path / name / "train.parquet", [row(name)])
    assert prompts(settings(tmp_path, dataset_config_name="small")) == ["small"]
    with pytest.raises(InputError, match=r"no subfolder 'medium' \(--dataset_config_name\)"):
        read_examples(settings(tmp_path, dataset_config_name="medium"))


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00010-ab12.parquet", "train"),
        ("data/validation_unique-00000-of-00001.parquet", "validation_unique"),
        ("train/0000.parquet", "train"),
        ("my_val_set.parquet", "validation"),
        ("trainer.parquet", None),
        ("mine-00000-of-00002.parquet", None),
        ("shards/0000.tar", None),
    ],
)
def test_a_split_is_read_from_a_name_as_the_hub_does(path: str, split: str | None) -> None:
    assert split_of(Path(path)) == split


def test_braces_count_with_leading_zeros_and_can_be_nested_by_repeating() -> None:
    assert expand_braces("{a,b}/{08..10}.tar") == [f"{x}/{n}.tar" for x in "ab" for n in ("08", "09", "10")]
    with pytest.raises(InputError, match="counts backwards"):
        expand_braces("{3..1}.tar")
    with pytest.raises(InputError, match="neither a range"):
        expand_braces("{3}.tar")


def test_a_hub_id_is_told_from_a_path() -> None:
    assert not any(looks_like_a_path(name) for name in ("user/name", "name", "user-1/name.v2_x"))
    assert all(looks_like_a_path(name) for name in (".", "a/b/c", "user/name.parquet", "../a", "a b"))


def dataset(*rows: dict[str, object]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows)).cast_column("image", datasets.Image())


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_gives_the_bytes_as_they_are(streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load_dataset(path: str, name: str | None, **more):
        asked.update(more, path=path, name=name)
        loaded = dataset(
            {"image": {"bytes": BLUE, "path": "x.jpg"}, "text": "a", "junk": 1}, {"image": None, "text": "b"}
        )
        return loaded.to_iterable_dataset() if more["streaming"] else loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    given = settings("user/set", streaming=streaming, dataset_config_name="small", dataset_revision="v1")
    examples, report = read(DataSettings(**{**given.__dict__, "max_bad_share": 0.5}))
    assert [(example.image, example.prompt, example.where) for example in examples] == [
        (BLUE, "a", "user/set[train] row 0")
    ]
    assert counts(report) == {"missing image file": 1}
    assert asked == {
        "path": "user/set",
        "name": "small",
        "split": "train",
        "revision": "v1",
        "streaming": streaming,
    }


def test_a_hub_webdataset_with_a_json_has_its_keys_as_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"jpg": BLUE, "json": {"caption": "a", "nsfw": 0.1}}, {"jpg": BLUE, "json": {"caption": "b", "nsfw": 0.9}}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: datasets.Dataset.from_list(rows))
    assert prompts(settings("user/set", filter=FilterSettings("nsfw", max=0.5))) == ["a"]


def test_a_stream_that_declares_no_columns_shows_them_in_its_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows():
        yield {"image": RED, "text": "a"}
        yield {"image": RED, "text": "b"}

    stream = datasets.IterableDataset.from_generator(rows)
    assert stream.features is None
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: stream)
    assert prompts(settings("user/set", streaming=True)) == ["a", "b"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ValueError("Unknown split 'x'.\nShould be one of ['train']"),
            "cannot be loaded: Unknown split 'x'. Should be",
        ),
        (RuntimeError("Dataset scripts are no longer supported"), "cannot be loaded: Dataset scripts"),
        (datasets.exceptions.DatasetNotFoundError("not on the Hub"), "cannot be reached: not on the Hub"),
        (ConnectionError("no route"), "cannot be reached: no route"),
    ],
)
def test_what_the_datasets_library_raises_becomes_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*args, **more):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=message):
        read_examples(settings("user/set"))


def test_a_hub_data_set_reads_files_of_the_cache_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cache", "home"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "red.png").write_bytes(RED)

    def load(folder: str) -> datasets.Dataset:
        return dataset({"image": str(tmp_path / folder / "red.png"), "text": "a"})

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: load("cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    given = settings("user/set")
    assert [example.image for example in read(given)[0]] == [RED]
    for folder in ("home", "cache/../home"):
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, folder=folder, **more: load(folder))
        with pytest.raises(InputError, match="which is not part of it"):
            read(given)


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    rows = dataset({"image": {"bytes": BLUE, "path": None}, "text": "a"})
    rows.save_to_disk(str(tmp_path / "one"))
    assert [example.image for example in read(settings(tmp_path / "one"))[0]] == [BLUE]
    datasets.DatasetDict(train=rows, extra=rows).save_to_disk(str(tmp_path / "two"))
    assert prompts(settings(tmp_path / "two", dataset_split="extra")) == ["a"]
    with pytest.raises(InputError, match=r"no split 'test' \(--dataset_split\); its splits are train, extra"):
        read_examples(settings(tmp_path / "two", dataset_split="test"))


def test_the_layout_is_chosen_by_the_columns_alone(tmp_path: Path) -> None:
    columns = ["caption", "jpg_0", "jpg_1", "label_0", "label_1"]
    assert reading.find_layout(columns, DataSettings()) is reading.plan_pairs
    assert reading.find_layout(columns[:-1], DataSettings()) is reading.plan_table
    path = write_table(tmp_path / "pickapic_v2" / "train.parquet", [row("a")])
    assert prompts(settings(path)) == ["a"], "the name of the folder must not matter"


def test_a_pattern_does_not_pass_over_a_link_to_nothing(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", [row("a")])
    (tmp_path / "b.parquet").symlink_to("gone.parquet")
    with pytest.raises(InputError, match="b.parquet cannot be opened"):
        read(settings(tmp_path / "*.parquet"))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("suffix", [".parquet", ".tar", ".tar.gz"])
def test_a_pipe_or_a_device_in_the_place_of_the_data_is_an_error(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(InputError, match=f"is a .*{name}, not a file"):
            read_examples(settings(tmp_path / f"{name}{suffix}"))
    with pytest.raises(InputError, match="not a file"):
        read_examples(settings(tmp_path))


def test_text_in_a_parquet_file_or_a_saved_data_set_that_is_not_utf_8_is_left_out(tmp_path: Path) -> None:
    cells = pa.array([b"whole", b"caf\xe9", b"the last"], pa.binary()).view(pa.string())
    table = pa.table({"image": [RED, BLUE, picture("green")], "text": cells})
    with (tmp_path / os.fsdecode(b"caf\xe9.parquet")).open("wb") as file:  # pyarrow itself cannot open such a name
        pq.write_table(table, file)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for name in (os.fsdecode(b"caf\xe9.parquet"), "saved"):
        examples, report = read(settings(tmp_path / name, max_bad_share=0.5))
        assert [example.prompt for example in examples] == ["whole", "the last"]
        assert counts(report) == {"broken characters in the text": 1}
        "".join(example.where for example in examples).encode()
