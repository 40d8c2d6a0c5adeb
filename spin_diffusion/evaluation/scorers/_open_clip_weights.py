"""open_clip's ViT state dict -> transformers' CLIPModel. Every number stays; names, splits and two transposes change.

open_clip keeps one matrix for query, key and value, and multiplies features by its two projections from the left.
"""

from torch import Tensor

from spin_diffusion.evaluation.scorers._checkpoints import count_blocks, take
from spin_diffusion.store.input_error import InputError

TOWERS = {"visual.transformer.resblocks.": "vision_model", "transformer.resblocks.": "text_model"}
SAME = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def is_open_clip(tensors: dict[str, Tensor]) -> bool:
    """Whether the names are open_clip's."""
    return "visual.conv1.weight" in tensors


def to_clip_model(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """CLIPModel's tensors (16 per block and 14 more) of open_clip's (12 per block and 14 more).

    Args:
        where: the file, for the error.

    Returns:
        The tensors, and the name of each in the file.

    Raises:
        InputError: a key is missing, or one is left over; it is named.
    """
    left = dict(tensors)
    converted: dict[str, Tensor] = {}
    names: dict[str, str] = {}

    def put(target: str, source: str, tensor: Tensor) -> None:
        converted[target] = tensor.contiguous()
        names[target] = source

    for source, target in SAME.items():
        put(target, source, take(left, source, where))
    for source, target in TRANSPOSED.items():
        matrix = take(left, source, where)
        if matrix.dim() != 2:
            raise InputError(f"{where}: {source} has shape {tuple(matrix.shape)}, a matrix is expected")
        put(target, source, matrix.T)
    for prefix, tower in TOWERS.items():
        for i in range(count_blocks(tensors, prefix)):
            block = f"{tower}.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                for source, target in IN_BLOCK.items():
                    name = f"{prefix}{i}.{source}.{kind}"
                    put(f"{block}.{target}.{kind}", name, take(left, name, where))
                name = f"{prefix}{i}.attn.in_proj_{kind}"
                joined = take(left, name, where)
                if joined.shape[0] % 3:
                    raise InputError(f"{where}: {name} has shape {tuple(joined.shape)}, not three equal parts")
                for target, part in zip(("q_proj", "k_proj", "v_proj"), joined.chunk(3), strict=True):
                    put(f"{block}.self_attn.{target}.{kind}", name, part)
    if left:
        raise InputError(f"{where}: key {min(left)} is not expected; is it another model's file?")
    return converted, names
