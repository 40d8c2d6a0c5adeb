"""A tensor that is missing, foreign, misshapen or not finite is refused, by both libraries' loaders alike."""

import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPTextModel, CLIPTextModelWithProjection

from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.weights import load_whole
from tests.llm.playing import LANGUAGE

PARTS = {
    "language": AutoModelForCausalLM,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
}


@pytest.fixture
def copied(sdxl_dir, tmp_path):
    """A part's folder of its own, and a function that changes the tensors in its file."""

    def copy(part: str):
        folder = tmp_path / part
        shutil.copytree(LANGUAGE / "base" if part == "language" else sdxl_dir / part, folder)
        return folder

    return copy


def changed(folder, change) -> str:
    """Apply `change(tensors, name)` to a matrix in the middle of the file; its name."""
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    names = sorted(name for name, tensor in tensors.items() if tensor.ndim in (2, 4))
    name = names[len(names) // 2]
    change(tensors, name)
    save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("part", PARTS)
def test_what_is_whole_is_loaded_in_fp32_with_the_files_numbers(copied, part):
    folder = copied(part)
    model = load_whole(PARTS[part], folder, where="--base")
    stored = load_file(next(folder.glob("*.safetensors")))
    own = model.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in own.values() if tensor.is_floating_point())
    found = [own.get(name, own.get(name.removeprefix("text_model."))) for name in stored]
    assert all(torch.equal(a, b) for a, b in zip(found, stored.values(), strict=True))


def remove(tensors, name):
    del tensors[name]


def fill(number):
    def change(tensors, name):
        tensors[name].view(-1)[3] = number

    return change


def cut(tensors, name):
    tensors[name] = tensors[name][:1].contiguous()


def add(tensors, name):
    tensors["another.head.weight"] = torch.zeros(3)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove, "lack"),
        (cut, "shape"),
        (add, "no place"),
        (fill(float("nan")), "not finite"),
        (fill(float("-inf")), "not finite"),
    ],
    ids=["missing", "misshapen", "foreign", "nan", "inf"],
)
def test_what_is_not_is_refused_by_name(copied, part, change, words):
    folder = copied(part)
    name = changed(folder, change)
    with pytest.raises(InputError) as refused:
        load_whole(PARTS[part], folder, where=f"--base {folder}: {part}")
    message = str(refused.value)
    assert message.startswith(f"--base {folder}: {part}: ") and words in message and "\n" not in message
    assert (name.removeprefix("text_model.") if change is not add else "another.head.weight") in message


def test_more_than_one_is_counted(copied):
    folder = copied("unet")

    def several(tensors, name):
        for each in list(tensors)[:4]:
            del tensors[each]

    changed(folder, several)
    with pytest.raises(InputError, match=r"\(and 3 more\)"):
        load_whole(UNet2DConditionModel, folder, where="--base")


def test_a_head_that_is_tied_to_the_embedding_is_stored_once(copied):
    folder = copied("language")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_whole(AutoModelForCausalLM, folder, where="--base")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    with pytest.raises(InputError, match="lack lm_head.weight"):
        load_whole(AutoModelForCausalLM, folder, where="--base")


def test_buffers_that_older_versions_saved_are_not_foreign(copied):
    folder = copied("text_encoder")

    def older(tensors, name):
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    changed(folder, older)
    load_whole(CLIPTextModel, folder, where="--base")
