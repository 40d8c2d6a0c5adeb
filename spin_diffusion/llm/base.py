"""The base of a language run: exactly what its files say, or refused.

A base is a checkpoint in transformers' layout, or a LoRA adapter (PEFT) on one, such as supervised fine-tuning leaves:
adapters are merged into the weights below them before anything is played.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from spin_diffusion.selfplay.record import check_weights
from spin_diffusion.store.configuration import read_configuration
from spin_diffusion.store.input_error import InputError, is_local, one_line
from spin_diffusion.store.run_dir import file_hash
from spin_diffusion.store.weights import check_stored, load_whole, read_headers

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WHOLE = ("model.safetensors", "model.safetensors.index.json")
MOST_ADAPTERS = 8
"""So many may lie on each other."""
UNSEEN = ("num_attention_heads", "hidden_act", "rms_norm_eps")
"""Keys without which a model is another one, though every tensor fits; transformers always writes them."""


class HubOptions(TypedDict):
    """How transformers finds a checkpoint."""

    revision: str
    trust_remote_code: bool


@dataclass(frozen=True)
class LanguageBase:
    """A checkpoint on the disk or the hub, and how it is loaded; that is its identity."""

    name: str
    """Path or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Whether the code that a hub model brings along is run."""

    def options(self) -> HubOptions:
        """For `from_pretrained`."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}

    def file(self, name: str) -> Path | None:
        """Where one of its files lies on this machine, downloaded if need be; None = it has none of that name."""
        found = cached_file(
            self.name,
            name,
            revision=self.revision or "main",
            _raise_exceptions_for_missing_entries=False,
        )
        return Path(found) if found is not None else None

    def adapters(self) -> list["LanguageBase"]:
        """This base, then what its adapter lies on, and so on; the last one is a checkpoint with all weights.

        Raises:
            InputError: an adapter that does not say what it lies on, or one that comes with whole weights.
        """
        chain = [self]
        while (path := chain[-1]._adapter_config()) is not None:
            top, said = chain[-1], read_configuration(path, chain[-1].where())
            below = said.get("base_model_name_or_path")
            if not isinstance(below, str) or not below:
                raise InputError(
                    f"{top.where()}: its {ADAPTER_CONFIG} does not say which checkpoint the adapter lies on: write "
                    "base_model_name_or_path into it"
                )
            if len(chain) > MOST_ADAPTERS or below in [base.name for base in chain]:
                raise InputError(
                    f"{self.where()}: the adapter lies on itself, or on more than {MOST_ADAPTERS} others "
                    f"(base_model_name_or_path in {ADAPTER_CONFIG}): name there the checkpoint with whole weights"
                )
            chain.append(replace(self, name=below, revision=said.get("revision")))
        return chain

    def identity(self) -> dict[str, object]:
        """For the manifest: name, revision, and the adapters that are merged into what, by their bytes."""
        *adapters, root = self.adapters()
        said: dict[str, object] = {"name": self.name, "revision": self.revision}
        if adapters:
            said["adapters"] = [
                {"name": base.name, "revision": base.revision, "sha256": file_hash(base._adapter_weights())}
                for base in adapters
            ]
            said["merged_into"] = {"name": root.name, "revision": root.revision}
        return said

    def code(self, name: Callable[[str], str]) -> str:
        """A Python expression that loads it, and that calls a place on this disk what `name` makes of it."""
        *adapters, root = self.adapters()
        loaded = f"AutoModelForCausalLM.from_pretrained({root._arguments(name)})"
        for adapter in reversed(adapters):
            loaded = f"PeftModel.from_pretrained({loaded}, {adapter._arguments(name)}).merge_and_unload()"
        return loaded

    def where(self) -> str:
        """How messages begin."""
        return f"--model_name_or_path {self.name}"

    def _arguments(self, name: Callable[[str], str]) -> str:
        revision = f", revision={self.revision!r}" if self.revision is not None else ""
        place = name(self.name) if is_local(self.name) else self.name
        return repr(place) + revision + (", trust_remote_code=True" if self.trust_remote_code else "")

    def _adapter_config(self) -> Path | None:
        """Where its adapter's configuration lies; None = it is no adapter."""
        found = find_adapter_config_file(self.name, revision=self.revision)
        if found is None:
            return None
        if whole := next((name for name in WHOLE if self.file(name) is not None), None):
            raise InputError(
                f"{self.where()}: it has both an adapter ({ADAPTER_CONFIG}) and whole weights ({whole}): take out what "
                "is not meant"
            )
        return Path(found)

    def _adapter_weights(self) -> Path:
        path = self.file(ADAPTER_WEIGHTS)
        if path is None:
            raise InputError(
                f"{self.where()}: the adapter has no {ADAPTER_WEIGHTS}: other formats are not read, save it again with "
                "peft's save_pretrained"
            )
        return path


def load_language_model(base: LanguageBase) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in fp32 with its adapters merged, and its tokenizer.

    Raises:
        InputError: it does not exist, cannot be reached, or is none; it is not whole (`store.weights`), quantised, or
            not causal; an adapter that cannot be merged.
    """
    model = load_model(base)
    with _in_one_line(base):
        tokenizer = _load_tokenizer(base)
    check_causal(model, base)
    return model, tokenizer


def load_model(base: LanguageBase) -> PreTrainedModel:
    """The model alone. Raises as `load_language_model`."""
    check_weights(Path(base.name))
    if base.revision is not None and Path(base.name).is_dir():
        raise InputError(f"{base.where()}: a folder has no revisions: leave --revision {base.revision} out")
    with _in_one_line(base):
        *adapters, root = base.adapters()
    where = base.where() + (f", on {root.name}" if adapters else "")
    with _in_one_line(root, where):
        _check_config(root, where, has_adapter=bool(adapters))
        model = load_whole(AutoModelForCausalLM, root.name, where=where, **root.options())
    with _in_one_line(base):
        for adapter in reversed(adapters):
            model = _merged(model, adapter)
    return model


def _merged(model: PreTrainedModel, adapter: LanguageBase) -> PreTrainedModel:
    """The model with the adapter in its weights.

    Raises:
        InputError: not every tensor of the file is in its place and finite, or its kind cannot be merged.
    """
    path, where = adapter._adapter_weights(), f"{adapter.where()} (an adapter)"
    by_hand = (
        "merge it yourself (PEFT's merge_and_unload), save_pretrained() the result with its tokenizer, and give that "
        "folder"
    )
    try:
        wrapped = PeftModel.from_pretrained(model, str(path.parent))
        given = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    except Exception as error:  # PEFT raises what torch and its own parsers do
        raise InputError(f"{where} cannot be put on {model.name_or_path}: {one_line(error)}; {by_hand}") from error
    if not hasattr(wrapped, "merge_and_unload"):
        kind = wrapped.peft_config["default"].peft_type
        raise InputError(
            f"{where} is of the kind {kind}, which has no weights to merge: give a LoRA adapter, or whole weights"
        )
    stored = load_file(path)
    if odd := sorted(set(stored) ^ set(given)):
        is_missing = odd[0] in given
        raise InputError(
            f"{where}: its file {'lacks' if is_missing else 'has'} {odd[0]}, {'which' if is_missing else 'for which'} "
            f"{'its configuration asks for' if is_missing else 'PEFT has no place'}: {by_hand}"
        )
    if odd := [name for name, tensor in stored.items() if not bool(torch.isfinite(tensor).all())]:
        raise InputError(f"{where}: {odd[0]} has numbers that are not finite (NaN or infinity): get its files again")
    if odd := [name for name, tensor in stored.items() if not torch.equal(tensor.to(given[name].dtype), given[name])]:
        raise InputError(f"{where}: PEFT loads {odd[0]} otherwise than its file says: {by_hand}")
    apart = _logits(wrapped)
    merged = wrapped.merge_and_unload()
    if not torch.allclose(apart, _logits(merged), rtol=1e-3, atol=1e-3 * float(apart.abs().max())):
        raise InputError(
            f"{where}: merged into {model.name_or_path} it answers otherwise than on top of it (an adapter on weights "
            "that two layers share, say): give whole weights"
        )
    return merged.requires_grad_(True)  # PEFT froze it


def _check_config(root: LanguageBase, where: str, has_adapter: bool) -> None:
    """Refuse before the weights are read what config.json shows to be no causal language model in full numbers."""
    config = AutoConfig.from_pretrained(root.name, **root.options())
    text, path = config.get_text_config(), root.file("config.json")
    assert path is not None
    written = read_configuration(path, where)
    named = f", and name that in {ADAPTER_CONFIG} (base_model_name_or_path)" if has_adapter else ""
    remedy = f"give the checkpoint that it was made from{named}"
    check_stored(read_headers(_weight_files(root, where)), written, where=where, remedy=remedy)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{where}: a {config.model_type} model has an encoder and a decoder, and only causal language "
            "models are supported: give one"
        )
    # Of a model with several parts, those of the text are written as what differs from the class's own
    for key in UNSEEN if text is config else ():
        if hasattr(text, key) and not {key, text.attribute_map.get(key, key)} & set(written):
            raise InputError(
                f"{where}: config.json does not say {key}, and transformers would take its own default "
                f"({getattr(text, key)}): write the model's own into it"
            )


def _weight_files(root: LanguageBase, where: str) -> list[Path]:
    """Its safetensors files on this machine."""
    whole, index = (root.file(name) for name in WHOLE)
    if whole is not None:
        return [whole]
    named = read_configuration(index, where).get("weight_map", {}) if index is not None else {}
    return [path for name in sorted(set(named.values())) if (path := root.file(name)) is not None]


def _load_tokenizer(base: LanguageBase) -> PreTrainedTokenizerBase:
    """The tokenizer of the first in the chain of adapters that brings one."""
    chain = base.adapters()
    own = next((each for each in chain if each.file("tokenizer_config.json") is not None), chain[-1])
    tokenizer = AutoTokenizer.from_pretrained(own.name, **own.options())
    tokenizer("What its configuration breaks, shows now.", verbose=False)
    # A class of its own makes an empty vocabulary where its files are missing
    files = dict(tokenizer.vocab_files_names)
    whole = files.pop("tokenizer_file", None)
    if files and (whole is None or own.file(whole) is None):
        if lacking := [name for name in files.values() if own.file(name) is None]:
            raise InputError(
                f"{base.where()}: its tokenizer has no {' and no '.join(lacking)}"
                + (f" (nor {whole})" if whole else "")
                + ": put the files of its vocabulary beside it"
            )
    return tokenizer


def check_causal(model: PreTrainedModel, base: LanguageBase) -> None:
    """Raises InputError if what a model says of a token depends on a later one: log p(answer) would be no density."""
    first, other = _logits(model)[:, :-1]
    if not torch.allclose(first, other, rtol=1e-5, atol=1e-5 * float(first.abs().max())):
        raise InputError(
            f"{base.where()}: what this {type(model).__name__} says of a token depends on the tokens behind it, so it "
            "is no causal language model (a masked one needs is_decoder in its config.json): give another"
        )


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Logits of two rows of five tokens that differ in the last, (2, 5, vocabulary)."""
    rows = len(model.get_input_embeddings().weight)
    ids = torch.tensor([[place % rows for place in (1, 2, 3, 4, last)] for last in (5, 6)], device=model.device)
    return model.eval()(input_ids=ids).logits.float()


@contextmanager
def _in_one_line(base: LanguageBase, where: str = "") -> Iterator[None]:
    where = where or base.where()
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # transformers, safetensors, tokenizers and the hub raise dozens of kinds
        if Path(base.name).is_dir() and (lacking := _lacking(Path(base.name))):
            raise InputError(f"{where}: the folder has no {' and no '.join(lacking)}") from error
        raise InputError(
            f"{where}: {one_line(error)}; give a hub id that can be reached, or a local folder with "
            "config.json, safetensors weights and a tokenizer"
        ) from error


def _lacking(folder: Path) -> list[str]:
    """What a folder has not of a language model in transformers' layout."""
    if (folder / ADAPTER_CONFIG).is_file():
        return []
    wanted = {
        "config.json": ["config.json"],
        "weights (*.safetensors)": ["*.safetensors"],
        "tokenizer (tokenizer.json, say)": [
            "tokenizer.json",
            "tokenizer_config.json",
            "*.model",
            "vocab.*",
            "*.tiktoken",
        ],
    }
    return [what for what, names in wanted.items() if not any(any(folder.glob(name)) for name in names)]
