"""A base is what its files say, or it is refused in one line; and what it was loaded with is not forgotten."""

import json
import os
import shutil

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from spin_diffusion.diffusion.base import Base, load_checkpoint, python_arguments
from spin_diffusion.diffusion.images import decode_latents, encode_pixels, vae_hash
from spin_diffusion.diffusion.model_sources import read_source
from spin_diffusion.diffusion.noising import read_noising
from spin_diffusion.runs.image_lines import loading_code
from spin_diffusion.store.files import weights_hash
from spin_diffusion.store.input_error import InputError
from tests.tiny import BETAS

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
UNET, VAE = "unet/config.json", "vae/config.json"
ENCODER, ENCODER_2 = "text_encoder/config.json", "text_encoder_2/config.json"
TOKENIZER = "tokenizer/tokenizer_config.json"
MISSING = object()
OLDER = {"_diffusers_version": "0.19.3"}


@pytest.fixture
def base(sdxl_dir, tmp_path):
    """A copy of the SDXL pipeline to change."""
    return shutil.copytree(sdxl_dir, tmp_path / "base")


@pytest.fixture
def sd_base(sd1_dir, tmp_path):
    """The same of SD."""
    return shutil.copytree(sd1_dir, tmp_path / "sd_base")


def edit(folder, name, **changes):
    """Set keys of a JSON file, or remove those that are MISSING."""
    content = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not MISSING}))


def named(folder, kind, **settings):
    """Give the pipeline another scheduler, in both of its files."""
    kept = BETAS if "Flow" not in kind and "EDM" not in kind else {}
    getattr(diffusers, kind)(**kept, **settings).save_pretrained(folder / "scheduler")
    edit(folder, INDEX, scheduler=["diffusers", kind])


def retensored(folder, part, change):
    """Apply a function to the tensors of a part's file."""
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(folder, *words, **options):
    with pytest.raises(InputError) as error:
        load_checkpoint(Base(str(folder), **options))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# Schedulers


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_max": 120.0, "sigma_data": 1.0}),
        ("EDMDPMSolverMultistepScheduler", {"sigma_max": 80.0, "sigma_data": 0.5}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 2.5}),
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("LCMScheduler", {}),
        ("TCDScheduler", {}),
        ("IPNDMScheduler", None),
    ],
)
def test_another_noise_than_ddpms_is_refused(base, kind, settings):
    if settings is None:
        edit(base, INDEX, scheduler=["diffusers", kind])
        edit(base, SCHEDULER, _class_name=kind)
    else:
        named(base, kind, **settings)
    refused(base, "its scheduler", kind, "not supported", "DDIMScheduler")


@pytest.mark.parametrize(
    "kind",
    ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler",
     "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler",
     "DEISMultistepScheduler", "KDPM2DiscreteScheduler"],
)  # fmt: skip
def test_every_sampler_of_ddpms_noise_is_read_alike(base, sdxl_dir, kind):
    named(base, kind)
    noising = read_noising(dict(load_checkpoint(str(base))[1].scheduler.config), "x")
    usual = read_noising(dict(load_checkpoint(str(sdxl_dir))[1].scheduler.config), "x")
    assert torch.equal(noising.abar, usual.abar) and noising.prediction_type == usual.prediction_type


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta_start": MISSING}, ["beta_start", "0.00085"]),
        ({"beta_end": None}, ["beta_end"]),
        ({"beta_schedule": MISSING}, ["beta_schedule"]),
        ({"num_train_timesteps": MISSING}, ["num_train_timesteps"]),
        ({"num_train_timesteps": 0}, ["num_train_timesteps 0"]),
        ({"steps_offset": -5}, ["steps_offset -5"]),
        ({"steps_offset": "1"}, ["steps_offset '1'"]),
        ({"steps_offset": 1000}, ["steps_offset 1000"]),
        ({"timestep_spacing": "foo"}, ["timestep_spacing is 'foo'", "leading"]),
        ({"beta_start": "0.00085"}, ["beta_start '0.00085'"]),
        ({"beta_schedule": "cosine"}, ["beta_schedule is 'cosine'"]),
        ({"trained_betas": [0.1, 0.2]}, ["trained_betas", "1000"]),
        ({"prediction_type": "sample"}, ["prediction_type is 'sample'"]),
        ({"prediction_type": "flow_prediction"}, ["prediction_type is 'flow_prediction'"]),
        ({"timestep_type": "continuous"}, ["timestep_type is 'continuous'"]),
        ({"use_flow_sigmas": True}, ["use_flow_sigmas is True"]),
        ({"variance_type": "learned_range"}, ["variance_type is 'learned_range'"]),
        ({"sigma_data": 0.5}, ["sigma_data"]),
        ({"shift": 3.0}, ["shift"]),
        ({"rescale_betas_zero_snr": MISSING}, ["rescale_betas_zero_snr"]),
        ({"_class_name": "DDIMScheduler"}, ["EulerDiscreteScheduler", "DDIMScheduler"]),
        ({"_class_name": MISSING}, ["EulerDiscreteScheduler"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_key_of_the_scheduler_that_decides_the_noise_is_there_and_known(base, changes, words):
    edit(base, SCHEDULER, **changes)
    refused(base, "its scheduler", *words)


def test_what_older_files_have_and_lack_is_harmless(base, sd_base):
    old = OLDER | {"timestep_spacing": MISSING, "prediction_type": MISSING, "rescale_betas_zero_snr": MISSING}
    edit(base, SCHEDULER, **old, clip_sample=False, sample_max_value=1.0, set_alpha_to_one=False, skip_prk_steps=True)
    younger = ["attention_type", "dropout", "reverse_transformer_layers_per_block", "resnet_skip_time_act"]
    edit(base, UNET, **OLDER, **dict.fromkeys(younger, MISSING), use_ema_warmup=False, decay=0.999)
    edit(
        base, VAE, **OLDER, **dict.fromkeys(["latents_mean", "latents_std", "shift_factor", "use_quant_conv"], MISSING)
    )
    edit(base, ENCODER, dropout=0.0, torch_dtype="float32", eos_token_id=2)
    _, pipeline = load_checkpoint(str(base))
    assert read_noising(dict(pipeline.scheduler.config), "x").prediction_type == "epsilon"
    # Stable Diffusion's VAE is older than the key
    edit(sd_base, VAE, **OLDER, scaling_factor=MISSING)
    assert load_checkpoint(str(sd_base))[1].vae.config.scaling_factor == 0.18215


# Configurations of the other parts


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        (UNET, {"class_embed_type": "timestep"}, ["its UNet", "class label"]),
        (UNET, {"num_class_embeds": 7}, ["num_class_embeds is 7"]),
        (UNET, {"time_cond_proj_dim": 256}, ["LCM"]),
        (UNET, {"encoder_hid_dim_type": "ip_image_proj"}, ["IP-Adapter"]),
        (UNET, {"attention_type": "gated"}, ["GLIGEN"]),
        (UNET, {"dual_cross_attention": True}, ["dual_cross_attention"]),
        (UNET, {"addition_embed_type": "text"}, ["its UNet"]),
        (UNET, {"attention_head_dim": MISSING, **OLDER}, ["attention_head_dim", "missing"]),
        (UNET, {"norm_num_groups": MISSING, **OLDER}, ["norm_num_groups", "missing"]),
        (UNET, {"resnet_out_scale_factor": MISSING}, ["resnet_out_scale_factor", "missing"]),
        (UNET, {"addition_time_embed_dim": MISSING, **OLDER}, ["added embedding"]),
        (UNET, {"gated_blocks": 1}, ["gated_blocks", "does not know"]),
        (UNET, {"layers_per_block": 10**7}, ["its UNet", "layers_per_block is 10000000"]),
        (UNET, {"layers_per_block": [1, 10**7]}, ["layers_per_block is 10000000"]),
        (UNET, {"norm_eps": "1e-5"}, ["norm_eps is '1e-5'", "1e-05 by default"]),
        (UNET, {"upcast_attention": "false"}, ["upcast_attention is 'false'", "False by default"]),
        (UNET, {"act_fn": 1}, ["act_fn is 1", "'silu' by default"]),
        (UNET, {"_class_name": "UNetMotionModel"}, ["UNetMotionModel"]),
        (UNET, {"quantization_config": {"quant_method": "bitsandbytes"}}, ["quantised"]),
        (VAE, {"_class_name": "AutoencoderTiny"}, ["AutoencoderTiny"]),
        (VAE, {"scaling_factor": MISSING, **OLDER}, ["scaling_factor is missing", "0.13025"]),
        (VAE, {"force_upcast": "no"}, ["force_upcast is 'no'"]),
        (VAE, {"scaling_factor": 0}, ["scaling_factor is 0"]),
        (VAE, {"shift_factor": 0.1}, ["shift_factor", "StableDiffusionXLPipeline"]),
        (VAE, {"latents_mean": [0, 0, 0, 0]}, ["latents_mean alone"]),
        (VAE, {"latents_mean": [0, 0], "latents_std": [1, 1]}, ["4 channels"]),
        (VAE, {"latents_mean": [0, 0, 0, 0], "latents_std": [1, 1, 1, 0]}, ["latents_std", "above 0"]),
        (VAE, {"residual": True}, ["residual", "does not know"]),
        (VAE, {"quantization_config": {"quant_method": "torchao"}}, ["quantised"]),
        (ENCODER, {"model_type": "t5"}, ["its text_encoder", "'t5'"]),
        (ENCODER, {"num_hidden_layers": 10**7}, ["its text_encoder", "num_hidden_layers is 10000000"]),
        (ENCODER, {"hidden_act": MISSING}, ["hidden_act", "missing"]),
        (ENCODER, {"num_attention_heads": MISSING}, ["num_attention_heads", "missing"]),
        (ENCODER, {"eos_token_id": 5}, ["eos_token_id"]),
        (ENCODER, {"eos_token_id": MISSING}, ["49407"]),
        (ENCODER, {"vocab_size": 400}, ["400 embeddings"]),
        (ENCODER, {"causal": False}, ["causal", "does not know"]),
        (ENCODER, {"quantization_config": {"quant_method": "gptq"}}, ["quantised"]),
        (ENCODER_2, {"projection_dim": MISSING}, ["its text_encoder_2", "projection_dim"]),
        (TOKENIZER, {"model_max_length": MISSING}, ["its tokenizer", "model_max_length"]),
        (TOKENIZER, {"model_max_length": 512}, ["512", "77 positions"]),
        (TOKENIZER, {"pad_token": MISSING}, ["pad_token"]),
        (TOKENIZER, {"tokenizer_class": "T5Tokenizer"}, ["T5Tokenizer"]),
        (INDEX, {"unet": ["diffusers", "UNet2DModel"]}, ["UNet2DModel"]),
        (INDEX, {"text_encoder": ["kolors", "ChatGLMModel"]}, ["ChatGLMModel", "CLIPTextModel"]),
        (INDEX, {"text_encoder": [None, None]}, ["nothing as its text_encoder"]),
        (INDEX, {"controlnet": ["diffusers", "ControlNetModel"]}, ["controlnet"]),
        (INDEX, {"force_zeros_for_empty_prompt": MISSING}, ["force_zeros_for_empty_prompt"]),
        (INDEX, {"_class_name": ["pipeline", "Own"]}, ["Own", "StableDiffusionXLPipeline"]),
    ],
)
def test_a_key_that_changes_what_is_computed_is_there_and_known(base, file, changes, words):
    edit(base, file, **changes)
    refused(base, str(base), *words)


def test_what_its_own_pipeline_does_not_apply_is_refused(sd_base):
    edit(sd_base, VAE, latents_mean=[0, 0, 0, 0], latents_std=[1, 1, 1, 1])
    refused(sd_base, "latents_mean", "StableDiffusionPipeline does not apply")


@pytest.mark.parametrize("file", [INDEX, SCHEDULER, UNET, ENCODER, TOKENIZER])
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", None, "a pipe"])
def test_a_configuration_that_is_none_is_refused(base, file, content):
    (base / file).unlink()
    if content == "a pipe":
        os.mkfifo(base / file)
    elif content is not None:
        (base / file).write_text(content)
    refused(base, str(base))


def test_a_tokenizer_without_its_words_is_refused(base):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (base / "tokenizer" / name).unlink()
    refused(base, "its tokenizer", "vocab.json is missing")


def test_an_adapter_beside_a_part_is_refused(base):
    (base / "text_encoder" / "adapter_config.json").write_text("{}")
    refused(base, "its text_encoder", "adapter")


# Weights


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae", "unet"])
def test_every_tensor_of_every_part_is_there(base, part):
    def lose(tensors):
        del tensors[sorted(name for name, tensor in tensors.items() if tensor.ndim > 1)[3]]

    retensored(base, part, lose)
    refused(base, str(base), "UNet" if part == "unet" else "VAE" if part == "vae" else part, "lack")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(base, dtype):
    retensored(base, "unet", lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    refused(base, "its UNet", "quantised")


def test_older_names_of_tensors_are_the_same_tensors(base, sdxl_dir):
    names = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}

    def older_vae(tensors):
        for name in list(tensors):
            for new, old in names.items():
                if new in name:
                    tensors[name.replace(new, old)] = tensors.pop(name)

    retensored(base, "vae", older_vae)
    retensored(base, "text_encoder", lambda t: t.update({"text_model.embeddings.position_ids": torch.arange(77)[None]}))
    (_, found), (_, usual) = load_checkpoint(str(base)), load_checkpoint(str(sdxl_dir))
    for part in ("vae", "text_encoder"):
        assert weights_hash(getattr(found, part)) == weights_hash(getattr(usual, part))


def test_weights_in_several_files_are_one_model_and_none_may_be_lost(base, sdxl_dir):
    for part, kind in (("unet", UNet2DConditionModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        model = kind.from_pretrained(base / part)
        shutil.rmtree(base / part)
        model.save_pretrained(base / part, max_shard_size="60KB")
    assert len(list((base / "unet").glob("*.safetensors"))) > 2
    assert weights_hash(load_checkpoint(str(base))[1].unet) == weights_hash(load_checkpoint(str(sdxl_dir))[1].unet)
    sorted((base / "unet").glob("*.safetensors"))[1].unlink()
    refused(base, "its UNet")


def test_pickled_weights_are_not_loaded(base):
    file = next((base / "vae").glob("*.safetensors"))
    torch.save(load_file(file), base / "vae" / "diffusion_pytorch_model.bin")
    file.unlink()
    refused(base, "its VAE", "safe_serialization=True")


# The VAE's statistics


def test_latents_are_standardised_as_the_pipeline_does(base):
    mean, std = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
    plain = load_checkpoint(str(base))[1].vae
    edit(base, VAE, latents_mean=mean, latents_std=std)
    pipeline = load_checkpoint(str(base))[1]
    vae, generator = pipeline.vae, torch.Generator().manual_seed(0)
    m, s = (torch.tensor(numbers).view(1, 4, 1, 1) for numbers in (mean, std))
    z = torch.randn(1, 4, 16, 16, generator=generator)
    pixels = torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1
    scale = vae.config.scaling_factor
    with torch.no_grad():
        encoded, decoded = (vae.encode(pixels).latent_dist.mean - m) * scale / s, vae.decode(z * s / scale + m).sample
    assert torch.equal(encode_pixels(vae, pixels, ["x"]), encoded)
    assert torch.equal(decode_latents(vae, z, ["x"]), decoded)
    # diffusers' own pipeline decodes the same latents to the same picture
    pipeline.set_progress_bar_config(disable=True)
    how = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0}
    latents, drawn = (
        pipeline("a fox", generator=torch.Generator().manual_seed(0), output_type=kind, **how).images
        for kind in ("latent", "pt")
    )
    ours = (decode_latents(vae, latents, ["x"]) / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(ours, drawn, atol=1e-6)
    assert vae_hash(vae) != vae_hash(plain)


# What it was loaded with


@pytest.fixture
def fp16(sd1_dir, tmp_path):
    """A base whose weights have the variant fp16 alone."""
    pipeline = DiffusionPipeline.from_pretrained(sd1_dir).to(torch.float16)
    pipeline.save_pretrained(tmp_path / "fp16", variant="fp16")
    return tmp_path / "fp16"


def test_a_variant_is_asked_for_by_its_flag(fp16, sd1_dir):
    refused(fp16, "give --variant fp16")
    refused(fp16, "--variant non_ema", "give --variant fp16", variant="non_ema")
    refused(sd1_dir, "--variant fp16", "leave --variant out", variant="fp16")
    _, pipeline = load_checkpoint(Base(str(fp16), variant="fp16"))
    stored = load_file(fp16 / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert all(torch.equal(pipeline.unet.state_dict()[name], tensor.float()) for name, tensor in stored.items())


def test_a_part_without_the_variant_is_loaded_plainly_as_diffusers_does(fp16, sd1_dir):
    shutil.rmtree(fp16 / "vae")
    shutil.copytree(sd1_dir / "vae", fp16 / "vae")
    found = load_checkpoint(Base(str(fp16), variant="fp16"))[1].vae
    assert weights_hash(found) == weights_hash(AutoencoderKL.from_pretrained(sd1_dir / "vae"))


def test_another_vae_is_checked_like_the_bases_own(base, sdxl_dir, tmp_path):
    other = shutil.copytree(sdxl_dir / "vae", tmp_path / "vae")
    retensored(tmp_path, "vae", lambda tensors: next(iter(tensors.values())).add_(1.0))
    shutil.rmtree(base / "vae")
    _, pipeline = load_checkpoint(Base(str(base), vae=str(other)))
    assert weights_hash(pipeline.vae) == weights_hash(AutoencoderKL.from_pretrained(other))
    edit(other, "config.json", scaling_factor=MISSING, **OLDER)
    refused(base, f"--pretrained_vae_model_name_or_path {other}", "scaling_factor", vae=str(other))
    refused(base, "whole pipeline", str(sdxl_dir / "vae"), vae=str(sdxl_dir))
    refused(base, "does not exist", vae="./nowhere")
    refused(base, "from_single_file", vae=str(next(other.glob("*.safetensors"))))
    refused(base, "UNet2DConditionModel", "AutoencoderKL", vae=str(sdxl_dir / "unet"))
    AutoencoderKL.from_pretrained(sdxl_dir / "vae").save_pretrained(tmp_path / "fp16", variant="fp16")
    refused(base, "variant='fp16').save_pretrained(FOLDER)", vae=str(tmp_path / "fp16"))


def test_a_rounds_base_is_all_that_its_run_was_started_with(fp16, sd1_dir, tmp_path):
    base = Base(str(fp16), variant="fp16", vae=str(sd1_dir / "vae"))
    folder = tmp_path / "run" / "round-1"
    shutil.copytree(sd1_dir / "unet", folder / "unet")
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(json.dumps({"base": base.as_dict() | {"weights": "0"}}))
    # The flags are of pipelines that are named themselves
    assert read_source(f"round1={folder}", variant="bf16", vae="another/vae").base == base
    assert read_source(f"base={fp16}", None, "fp16", base.vae).base == base
    manifest.write_text(json.dumps({"base": base.as_dict() | {"vae": str(tmp_path / "gone")}}))
    with pytest.raises(InputError, match="gone, which is not there"):
        read_source(f"round1={folder}")
    for damaged in ({"base": base.as_dict() | {"vae": 5}}, {"base": {"name": str(fp16)}}, {"base": "a name"}, []):
        manifest.write_text(json.dumps(damaged))
        with pytest.raises(InputError, match="above it that names its base \\(.*manifest.json is damaged"):
            read_source(f"round1={folder}")


def test_the_lines_that_load_it_run(fp16, sd1_dir):
    base = Base(str(fp16), variant="fp16", vae=str(sd1_dir / "vae"))
    code = loading_code(base, "StableDiffusionPipeline", "unet", python_arguments(str(sd1_dir / "unet")))
    found: dict = {}
    exec(code, found)
    vae = AutoencoderKL.from_pretrained(sd1_dir / "vae")
    assert weights_hash(found["pipeline"].vae) == weights_hash(vae) and found["pipeline"].unet is found["unet"]
    plain = loading_code(Base("owner/name"), "StableDiffusionXLPipeline", "lora", '"there"')
    assert plain.splitlines() == [
        "import torch", "from diffusers import StableDiffusionXLPipeline", "",
        'pipeline = StableDiffusionXLPipeline.from_pretrained("owner/name", dtype=torch.float32)',
        'pipeline.load_lora_weights("there")',
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["plain", 'quo"ted', "back\\slash", "\U0001f984 horn", "half\udce9", "line\nbreak"])
def test_a_name_in_code_is_read_back_as_it_is(name):
    assert eval(f"dict(name={python_arguments(name, revision=name)})") == {"name": name, "revision": name}
    assert python_arguments(name).isascii() or python_arguments(name).isprintable()
