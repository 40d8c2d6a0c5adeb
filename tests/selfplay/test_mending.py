"""Damaged files of a run: what others give again is made anew to the same bytes; else the message's remedy is followed
to the letter, and the run ends with the same bytes."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from spin_diffusion.samples.real import data_manifest
from spin_diffusion.selfplay.record import read_record
from spin_diffusion.store.files import read_json, read_json_lines, read_rows, write_rows
from spin_diffusion.store.hashes import file_hashes
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.run_dir import Damaged
from tests.playing import TRAINING, play_all

SHARDS = [f"{number:05d}-of-00003" for number in range(3)]
SHARD = SHARDS[1]


@pytest.fixture(scope="module")
def unbroken(sdxl_dir, tmp_path_factory):
    """A run that nothing disturbed."""
    output_dir = tmp_path_factory.mktemp("unbroken") / "run"
    play_all(sdxl_dir, output_dir)
    return output_dir


@pytest.fixture
def copied(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "copied")
    return tmp_path / "copied"


def hashes(output_dir) -> dict[str, str]:
    found = file_hashes([output_dir], output_dir)
    return {name: digest for name, digest in found.items() if not name.endswith(("round.json", "metrics.jsonl"))}


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def taken_back(output_dir, state: str) -> None:
    """The second round, finished but for what comes after `state`."""
    path = output_dir / "round-2" / "round.json"
    record = read_json(path)
    path.write_text(json.dumps(record | {"state": state}))


DAMAGES = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


def change_a_digit(path) -> None:
    """One bit of the last number in a JSON file, which is whole JSON of the same types afterwards."""
    data = bytearray(path.read_bytes())
    place = list(re.finditer(rb'": [\d.]*(\d),?\n', data))[-1].start(1)
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("state", "damages"), [("GENERATED", ["cut", "gone"]), ("CACHED", ["flipped"])])
def test_samples_of_a_round_that_goes_on_are_drawn_anew(copied, unbroken, sdxl_dir, state, damages, capsys):
    taken_back(copied, state)
    shutil.rmtree(copied / "round-2" / "unet")
    for damage, shard in zip(damages, SHARDS, strict=False):
        DAMAGES[damage](copied / "round-2" / "samples" / f"{shard}.parquet")
    play_all(sdxl_dir, copied)
    assert hashes(copied) == hashes(unbroken)
    said = capsys.readouterr().out
    assert all(f"{shard}.parquet is " in said for shard in SHARDS[: len(damages)]) and "made anew" in said


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_player_that_was_not_promoted_yet_is_trained_anew(copied, unbroken, sdxl_dir, damage):
    taken_back(copied, "TRAINED")
    DAMAGES[damage](copied / "round-2" / "unet" / "diffusion_pytorch_model.safetensors")
    play_all(sdxl_dir, copied)
    assert hashes(copied) == hashes(unbroken)


@pytest.mark.parametrize("damages", [["flipped", "cut", "empty"], ["gone"]])
def test_encodings_of_the_real_samples_are_made_anew(copied, unbroken, sdxl_dir, damages, capsys):
    for damage, shard in zip(damages, SHARDS, strict=False):
        DAMAGES[damage](copied / "data" / "encoded" / f"{shard}.safetensors")
    play_all(sdxl_dir, copied)
    assert hashes(copied) == hashes(unbroken)
    said = capsys.readouterr().out
    assert damages == ["gone"] or all(f"{shard}.safetensors is " in said for shard in SHARDS) and "made anew" in said


def test_a_finished_round_needs_no_samples(copied, unbroken, sdxl_dir, capsys):
    flip(copied / (flipped := f"round-1/samples/{SHARD}.parquet"))
    shutil.rmtree(copied / "round-2/samples")
    play_all(sdxl_dir, copied)
    kept = {
        name: digest for name, digest in hashes(unbroken).items() if not name.startswith((flipped, "round-2/samples"))
    }
    assert kept.items() <= hashes(copied).items()
    said = capsys.readouterr().out
    assert said.count("needs them no more") == 2


def follow(message: str, output_dir) -> None:
    """Delete what the message says, and nothing else."""
    if prepared := re.search(r"delete (\S+) and run the same command again", message):
        shutil.rmtree(prepared[1]) if (path := output_dir / prepared[1]).is_dir() else path.unlink()
        return
    rounds = re.search(r"delete (round-\d+(?: and round-\d+)*) in (\S+) and run the same command again", message)
    for name in rounds[1].split(" and "):
        shutil.rmtree(f"{rounds[2]}/{name}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("round-2/round.json", "a digit"),
        ("data/manifest.json", "a digit"),
        ("round-1/unet/diffusion_pytorch_model.safetensors", "flipped"),
        ("round-2/unet/config.json", "gone"),
        ("data/manifest.json", b"[]"),
        (f"data/samples/{SHARD}.parquet", "flipped"),
        (f"data/samples/{SHARD}.parquet", "gone"),
    ],
)
def test_the_remedy_that_a_message_names_is_followed_and_works(copied, unbroken, sdxl_dir, name, content):
    path = copied / name
    path.write_bytes(content) if isinstance(content, bytes) else (DAMAGES | {"a digit": change_a_digit})[content](path)
    with pytest.raises(InputError) as caught:
        play_all(sdxl_dir, copied)
    message = str(caught.value)
    assert name.split("/")[-1] in message and "\n" not in message
    follow(message, copied)
    play_all(sdxl_dir, copied)
    assert hashes(copied) == hashes(unbroken)


BROKEN = [
    b"{}",
    b"[]",
    b"abc",
    b"\0",
    b"",
    b"\x80\x81",
    b"[" * 100000,
    b"3",
    b"null",
    b'{"state": "DONE"}',
    b'{"rows": 1}',
]


@pytest.mark.parametrize("content", [*BROKEN, None])
def test_no_content_of_a_record_is_a_traceback(copied, content):
    readers = {
        "round-1/round.json": lambda: read_record(copied / "round-1"),
        "data/manifest.json": lambda: data_manifest(copied / "data"),
    }
    for name, read in readers.items():
        path = copied / name
        path.write_bytes(path.read_bytes()[:-30] if content is None else content)
        with pytest.raises(Damaged, match="run the same command again") as caught:
            read()
        assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "missing"),
    [("PLANNED", "files"), ("GENERATED", "opponent"), ("TRAINED", "training"), ("EVALUATED", "rejected_because"),
     ("REJECTED", "metrics"), ("PROMOTED", "decision")],
)  # fmt: skip
def test_a_record_has_what_its_state_leaves(copied, state, missing):
    path = copied / "round-1" / "round.json"
    record = {key: value for key, value in read_json(path).items() if key != missing}
    path.write_text(json.dumps(record | {"state": state}))
    with pytest.raises(Damaged, match=f"{missing} is missing.*delete round-1 and round-2 in"):
        read_record(copied / "round-1")


def test_a_reader_of_rows_says_what_is_wrong(tmp_path):
    path = tmp_path / "a.parquet"
    write_rows(path, [{"id": "1"}], {})
    with pytest.raises(Damaged, match="a.parquet is damaged .it has no column score"):
        read_rows(path, columns=["id", "score"])
    path.write_bytes(b"PAR1" + b"\0" * 50 + b"PAR1")
    with pytest.raises(Damaged, match="run the same command again"):
        read_rows(path)


@pytest.mark.parametrize("content", [b'{"a": 1}\n{"a"', b"{}\n[1]\n", b"\xff\n", b"\0", b'{"a": 1}'])
def test_lines_of_json_that_are_cut_or_of_another_kind_are_damaged(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(Damaged, match="a.jsonl is damaged"):
        read_json_lines(tmp_path / "a.jsonl")


class Killed(BaseException):
    """Stands for a SIGKILL: no handler may catch it."""


@pytest.fixture(scope="module")
def killed(sdxl_dir, tmp_path_factory):
    """A run that was killed in the fourth step of its first round, with three checkpoints."""
    from spin_diffusion.selfplay import health

    def dying(*args, **kwargs):
        if kwargs["step"] == 3:
            raise Killed

    output_dir = tmp_path_factory.mktemp("killed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(health, "check_finite", dying)
        with pytest.raises(Killed):
            play_all(sdxl_dir, output_dir, replace(TRAINING, checkpointing_steps=1), rounds=1)
    return output_dir


def play_on(sdxl_dir, output_dir, **training) -> None:
    play_all(sdxl_dir, output_dir, replace(TRAINING, checkpointing_steps=1, **training), rounds=1)


NEWEST = "round-1/checkpoint-3/"


@pytest.mark.parametrize(
    ("damages", "resumed"),
    [
        ({NEWEST + "optimizer.bin": "flipped"}, "checkpoint-2"),
        ({NEWEST + "optimizer.bin": "gone", "round-1/checkpoint-2/trainer.json": "cut"}, None),
        ({NEWEST + "hashes.json": "empty"}, "checkpoint-2"),
        ({NEWEST + "hashes.json": "{}"}, "checkpoint-2"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    killed, unbroken, sdxl_dir, tmp_path, capsys, damages, resumed
):
    shutil.copytree(killed, tmp_path / "run")
    for name, damage in damages.items():
        path = tmp_path / "run" / name
        path.write_text(damage) if damage == "{}" else DAMAGES[damage](path)
    play_on(sdxl_dir, tmp_path / "run")
    said = capsys.readouterr().out
    assert (f"Resuming from round-1/{resumed}" in said) if resumed else "Resuming" not in said
    for name in damages:
        assert f"{name} is " in said and "the round goes on from what it kept before" in said
    found, wanted = hashes(tmp_path / "run"), hashes(unbroken)
    weights = [name for name in wanted if name.startswith("round-1/") and name.endswith(".safetensors")]
    assert weights and [found[name] for name in weights] == [wanted[name] for name in weights]


def test_a_damaged_checkpoint_that_was_asked_for_is_refused_with_a_remedy_that_works(killed, sdxl_dir, tmp_path):
    shutil.copytree(killed, tmp_path / "run")
    flip(tmp_path / "run" / NEWEST / "optimizer.bin")
    with pytest.raises(InputError, match="optimizer.bin is damaged .*: give another .*, or latest$"):
        play_on(sdxl_dir, tmp_path / "run", resume_from_checkpoint="checkpoint-3")
    play_on(sdxl_dir, tmp_path / "run", resume_from_checkpoint="latest")


def test_checkpoints_of_another_layout_of_the_player_may_be_deleted_as_the_message_says(killed, sdxl_dir, tmp_path):
    shutil.copytree(killed, tmp_path / "run")
    folder = tmp_path / "run" / NEWEST
    (folder / "trainer.json").write_text(json.dumps(read_json(folder / "trainer.json") | {"kind": "in shards"}))
    (folder / "hashes.json").unlink()
    (folder / "hashes.json").write_text(json.dumps(file_hashes([folder], folder)))
    with pytest.raises(InputError, match=r"or delete all checkpoint-\* in \S+/round-1$"):
        play_on(sdxl_dir, tmp_path / "run")
    for path in folder.parent.glob("checkpoint-*"):
        shutil.rmtree(path)
    play_on(sdxl_dir, tmp_path / "run")
