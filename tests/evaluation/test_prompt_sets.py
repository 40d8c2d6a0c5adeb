import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin_diffusion.evaluation.prompt_sets import OWN_SETS, PUBLISHED, PromptRow, PromptSet, load_prompts, prompts_hash
from spin_diffusion.store.input_error import InputError


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def prompts_of(found: PromptSet) -> list[str]:
    return [row.prompt for row in found.rows]


def pairs_of(found: PromptSet) -> list[tuple[str, str | None]]:
    return [(row.prompt, row.category) for row in found.rows]


def refused(spec: str, **arguments: object) -> str:
    with pytest.raises(InputError) as caught:
        load_prompts(spec, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_text_file_has_a_prompt_per_line(tmp_path: Path) -> None:
    found = load_prompts(write(tmp_path / "mine.txt", "a fox\n\n  two cats \n"))
    assert found.rows == (PromptRow("00000", "a fox", None), PromptRow("00001", "two cats", None))
    assert (found.name, found.source, found.licence, found.duplicates) == ("mine", "mine.txt", "not stated", 0)


def test_the_hash_is_of_the_prompts_in_their_order_wherever_they_come_from(tmp_path: Path) -> None:
    text = load_prompts(write(tmp_path / "a.txt", "a fox\nein B\u00e4r"))
    lines = load_prompts(write(tmp_path / "b.jsonl", '{"prompt": "a fox", "tag": "x"}\n{"prompt": "ein B\\u00e4r"}\n'))
    turned = load_prompts(write(tmp_path / "c.txt", "ein B\u00e4r\na fox\n"))
    assert text.sha256 == lines.sha256 != turned.sha256
    assert text.sha256 == hashlib.sha256('["a fox", "ein B\u00e4r"]'.encode()).hexdigest()
    assert text.sha256 == prompts_hash(["a fox", "ein B\u00e4r"])
    # Two prompts are not one of two lines.
    joined = load_prompts(write(tmp_path / "d.json", json.dumps(["a fox\nein B\u00e4r", "x"])))
    apart = load_prompts(write(tmp_path / "e.json", json.dumps(["a fox", "ein B\u00e4r", "x"])))
    assert joined.sha256 != apart.sha256


def test_json_lines_hold_objects_or_strings(tmp_path: Path) -> None:
    content = '{"prompt": "a fox", "category": "animals"}\n\n"two cats"\n{"Prompt": "a cup", "Category": ""}'
    found = load_prompts(write(tmp_path / "x.jsonl", content))
    assert pairs_of(found) == [("a fox", "animals"), ("two cats", None), ("a cup", None)]


def test_geneval_lines_give_their_tag(tmp_path: Path) -> None:
    content = (
        '{"tag": "single_object", "include": [{"class": "kite", "count": 1}], "prompt": "a photo of a kite"}\n'
        '{"tag": "counting", "include": [{"class": "cup", "count": 3}], "prompt": "a photo of three cups"}\n'
    )
    found = load_prompts(write(tmp_path / "evaluation_metadata.jsonl", content))
    assert pairs_of(found) == [("a photo of a kite", "single_object"), ("a photo of three cups", "counting")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (["a fox", "two cats"], [("a fox", None), ("two cats", None)]),
        ([{"prompt": "a fox", "style": "anime"}, "two cats"], [("a fox", "anime"), ("two cats", None)]),
        ({"anime": ["a fox"], "photo": ["two cats"]}, [("a fox", "anime"), ("two cats", "photo")]),
    ],
)
def test_json_holds_a_list_or_lists_by_category(tmp_path: Path, content: object, expected: list) -> None:
    for indent in (None, 2):
        assert pairs_of(load_prompts(write(tmp_path / "x.json", json.dumps(content, indent=indent)))) == expected


def test_a_json_file_of_json_lines_is_read_as_such(tmp_path: Path) -> None:
    found = load_prompts(write(tmp_path / "x.json", '{"prompt": "a fox"}\n{"prompt": "two cats"}\n'))
    assert prompts_of(found) == ["a fox", "two cats"]


def test_a_tsv_of_partiprompts_keeps_its_quotes(tmp_path: Path) -> None:
    content = (
        "Prompt\tCategory\tChallenge\tNote\n"
        '"G I G G L E" in paint\tIllustrations\tWriting\t\n'
        'a sign that says "no"\tSigns\tBasic\t"a note"\n'
        '"a ""quoted"" field"\tSigns\tBasic\n'
    )
    path = write(tmp_path / "PartiPrompts.tsv", content)
    assert pairs_of(load_prompts(path)) == [
        ('"G I G G L E" in paint', "Illustrations"),
        ('a sign that says "no"', "Signs"),
        ('a "quoted" field', "Signs"),
    ]


def test_a_csv_may_quote_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    content = 'id,caption,Category\r\n1,"a fox, red",animals\r\n2,"says ""no""\r\ntwice",\r\n\r\n3,plain,signs\r\n'
    found = load_prompts(write(tmp_path / "x.csv", content))
    assert pairs_of(found) == [("a fox, red", "animals"), ('says "no"\ntwice', None), ("plain", "signs")]


def test_parquet_has_captions_and_may_have_class_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [b"0", b"1"], "caption": ["a fox", "two cats"]}), path)
    assert pairs_of(load_prompts(str(path))) == [("a fox", None), ("two cats", None)]
    features = {"prompts": {"_type": "Value"}, "category": {"names": ["Colors", "Text"], "_type": "ClassLabel"}}
    table = pa.table({"prompts": ["a fox", "two cats"], "category": [1, 0]})
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(described), path)
    assert pairs_of(load_prompts(str(path))) == [("a fox", "Text"), ("two cats", "Colors")]
    pq.write_table(table, path)
    assert pairs_of(load_prompts(str(path))) == [("a fox", "1"), ("two cats", "0")]


def test_a_prompt_and_a_category_are_keys_in_any_case_and_a_category_may_be_missing(tmp_path: Path) -> None:
    lines = write(tmp_path / "x.jsonl", '{"Prompt": "a", "Tag": "x"}\n{"caption": "b"}')
    assert pairs_of(load_prompts(lines)) == [("a", "x"), ("b", None)]
    assert "line 1 has no 'prompt'" in refused(write(tmp_path / "y.jsonl", '{"long": "a"}\n{"prompt": "b"}'))


def test_repeated_prompts_count_once_and_are_counted(tmp_path: Path) -> None:
    content = '{"prompt": "a fox", "tag": "first"}\n{"prompt": " a fox", "tag": "second"}\n"a cup"\n"a fox"\n"A fox"'
    found = load_prompts(write(tmp_path / "x.jsonl", content))
    assert pairs_of(found) == [("a fox", "first"), ("a cup", None), ("A fox", None)]
    assert found.duplicates == 2


def test_the_limit_comes_after_repeats_are_gone(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", "a\na\nb\nc\nd\n")
    found = load_prompts(path, limit=3)
    assert prompts_of(found) == ["a", "b", "c"] and found.duplicates == 1
    assert found.sha256 == load_prompts(write(tmp_path / "y.txt", "a\nb\nc")).sha256
    assert len(load_prompts(path, limit=99).rows) == 4
    for limit in (1, 0, -1):
        assert "too few to compare" in refused(path, limit=limit)


ODD = [
    "quotes \" and ' and \\ and `code`",
    "\u0642\u0637\u0629 \u062d\u0645\u0631\u0627\u0621 (right to left)",
    "emoji \U0001f98a\U0001f3fd\u200d\U0001f52c and \u2764\ufe0f",
    "</script><b>markup</b> &amp; | pipes",
    "separators \u2028 and \u0085 and \x0b inside",
    "no-break\u00a0space",
    "x" * 10_000,
]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".tsv", ".csv"])
def test_odd_prompts_survive_every_format(tmp_path: Path, suffix: str, newline: str, mark: str) -> None:
    if suffix == ".txt":
        lines = ODD
    elif suffix == ".jsonl":
        lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in ODD]
    elif suffix == ".json":
        lines = json.dumps(ODD, indent=1).split("\n")
    else:
        lines = ["prompt", *('"' + prompt.replace('"', '""') + '"' for prompt in ODD)]
    found = load_prompts(write(tmp_path / f"x{suffix}", mark + newline.join(lines) + newline))
    assert prompts_of(found) == ODD


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", b"a fox\ntwo c\xe9ts\n", ["line 2", "UTF-8"]),
        ("x.txt", "a fox\nb".encode("utf-16"), ["line 1", "UTF-8"]),
        ("x.jsonl", b'{"prompt": "a fox"}\n{"prompt": \n', ["line 2", "not JSON"]),
        ("x.jsonl", b'{"prompt": "a fox"}\n\n{"text2": "b"}\n', ["line 3", "'prompt'"]),
        ("x.jsonl", b'{"prompt": "a fox"}\n[1, 2]\n', ["line 2", "expected a string or an object"]),
        ("x.jsonl", b'{"prompt": "a fox"}\n{"prompt": 7}\n', ["line 2", "expected a prompt, got 7"]),
        ("x.jsonl", b'{"prompt": "a fox"}\n{"prompt": null}\n', ["line 2", "got null"]),
        ("x.jsonl", b'{"prompt": "a fox"}\n{"prompt": "  "}\n', ["line 2", "expected a prompt"]),
        (
            "x.jsonl",
            b'{"prompt": "a fox"}\n{"prompt": "\\ud83d half"}\n',
            ["1 prompts are too few", "1 with broken characters"],
        ),
        ("x.jsonl", b'{"prompt": "a fox"}\n' + b"[" * 100_000, ["line 2", "not JSON"]),
        ("x.json", b'["a fox", \n', ["not JSON", "line 2"]),
        ("x.json", b'["a fox", 3]', ["entry 2", "expected a string or an object"]),
        ("x.json", b'{"anime": ["a fox", 3]}', ["entry 2 of 'anime'", "got 3"]),
        ("x.json", b"7", ["entry 1"]),
        ("x.csv", b"name,size\na,b\nc,d\n", ["no column of the prompt", "name, size"]),
        ("x.csv", b"prompt\na fox\nred, green\n", ["line 3", "2 fields", "commas"]),
        ("x.csv", b'prompt,category\n"a" fox,b\n', ["line 2", "not CSV"]),
        ("x.csv", b"prompt,category\n,animals\n", ["line 2", "expected a prompt"]),
        ("x.csv", b"", ["no column of the prompt", "none"]),
        ("x.tsv", b"prompt\tcategory\na\tb\tc\n", ["line 2", "3 fields", "tabs"]),
        ("x.tsv", b"category\tprompt\nanimals\n", ["line 2", "expected a prompt"]),
        ("x.parquet", b"PAR1", ["not a readable parquet"]),
        ("x.md", b"a\nb\n", [".txt, .jsonl"]),
        ("x.txt", b"", ["0 prompts are too few"]),
        ("x.txt", b"\n \n", ["0 prompts are too few"]),
        ("x.json", b"[]", ["0 prompts are too few"]),
        ("x.json", b"{}", ["entry 1", "'prompt'"]),
        ("x.txt", b"one\none\n", ["1 prompts are too few", "give 2 or more"]),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    message = refused(write(tmp_path / name, content))
    assert all(word in message for word in [str(tmp_path / name), *words]), message


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_prompt_with_broken_characters_is_left_out_and_counted(tmp_path: Path, suffix: str) -> None:
    prompts = ["a fox", "a smile \ud83d", "a cat", "\udfff", "a fox"]
    if suffix == ".parquet":
        cells = [prompt.encode("utf-8", "surrogatepass") for prompt in prompts]
        column = pa.array(cells, pa.binary()).view(pa.string())  # as a writer that does not check leaves it
        pq.write_table(pa.table({"prompt": column}), path := tmp_path / "x.parquet")
    else:
        lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
        text = "\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]"
        path = write(tmp_path / f"x{suffix}", text)
    found = load_prompts(str(path))
    assert prompts_of(found) == ["a fox", "a cat"] and (found.broken, found.duplicates) == (2, 1)
    assert found.said_left_out() == "; 1 repeated prompts left out; 2 prompts with broken characters left out"


@pytest.mark.timeout(10)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_a_pipe_or_a_device_is_no_file_of_prompts(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    assert "is a named pipe, not a file" in refused(str(tmp_path / f"pipe{suffix}"))
    assert "is a device, not a file" in refused(str(tmp_path / f"device{suffix}"))


def test_what_does_not_exist_is_refused_with_what_does() -> None:
    assert "there is no such file" in refused("prompts/missing.txt") and "parti" in refused("missing.txt")
    assert "did you mean hpdv2?" in refused("hpdv3")
    message = refused("zzz")
    assert all(name in message for name in (*PUBLISHED, "ten_by_ten", "the path of a file works too"))
    assert "no such file" in refused("/")


def test_every_published_set_says_offline_where_its_file_is() -> None:
    assert set(PUBLISHED) == {"parti", "hpdv2", "pickapic_test", "drawbench"}
    for name, published in PUBLISHED.items():
        message = refused(name)
        assert f"prompt set {name!r} cannot be downloaded" in message
        assert published.address in message and published.files[0] in message and "local file" in message
        assert published.licence


def test_a_published_set_is_read_from_what_the_hub_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, file: str, *, repo_type: str, revision: str) -> str:
        asked.append((repository, file, repo_type, revision))
        style = Path(file).stem
        return write(tmp_path / Path(file).name, json.dumps([f"a {style} fox", "in all styles"]))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = load_prompts("hpdv2")
    assert pairs_of(found) == [
        ("a anime fox", "anime"),
        ("in all styles", "anime"),
        ("a concept-art fox", "concept-art"),
        ("a paintings fox", "paintings"),
        ("a photo fox", "photo"),
    ]
    assert found.name == "hpdv2" and found.duplicates == 3
    hpdv2 = PUBLISHED["hpdv2"]
    assert hpdv2.revision in found.source and "benchmark/anime.json" in found.source
    assert found.licence == hpdv2.licence
    assert asked == [("zhwang/HPDv2", file, "dataset", hpdv2.revision) for file in hpdv2.files]


def test_an_error_of_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> str:
        raise RuntimeError("proxy\nrefused")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    assert "(proxy refused)" in refused("parti")


def test_pinned_revisions_are_whole_hashes_or_the_file_name_has_one() -> None:
    for published in PUBLISHED.values():
        pinned = len(published.revision) == 40 and set(published.revision) <= set("0123456789abcdef")
        assert pinned or published.files[0].endswith("-e852c19ead276a89.parquet")


def test_our_own_set_has_ten_prompts_of_each_of_ten_kinds() -> None:
    found = load_prompts("ten_by_ten")
    assert len(found.rows) == 100 and found.duplicates == 0 and found.licence == "CC0-1.0"
    assert found.source == "evaluation/prompts/ten_by_ten.jsonl"
    assert set(Counter(row.category for row in found.rows).values()) == {10}
    assert len({row.category for row in found.rows}) == 10
    assert [row.id for row in found.rows] == [f"{number:05d}" for number in range(100)]
    by_path = load_prompts(str(OWN_SETS / "ten_by_ten.jsonl"))
    assert by_path.sha256 == found.sha256 and by_path.licence == "CC0-1.0"
    readme = (OWN_SETS / "README.md").read_text()
    assert found.sha256 in readme, "a changed set is another set: say so in its README"


def test_a_local_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own.txt", "a\nb\n")
    assert prompts_of(load_prompts("own.txt")) == ["a", "b"]
