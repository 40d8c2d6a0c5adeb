"""How a round is trained: the settings of the loop, and what of them holds in a round."""

import math
from dataclasses import dataclass
from typing import Any, Literal, Union

from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.settings import PerRound, Settings, setting

Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]


Action = Literal["ignore", "warn", "stop", "roll_back"]
Watch = Union[Action, float, list[Union[Action, float]]]  # noqa: UP007 - of Literals, in Python 3.10
"""What is done when a rule of health has something to say, the limit beyond which it has, or both in a list."""
LIMITS = {"saturation": 0.5, "error_growth": 0.1, "distance": 0.2, "gradient_spike": 10.0}
"""The limits of the rules of health that have one."""


@dataclass(frozen=True)
class HealthSettings:
    """What is watched while a round is trained, and what is done about it: ignore; warn; stop = end the round as it is;
    roll_back = end it with the player as it was before the rule's window. Rolled back to its start it is rejected."""

    forgetting: Action = "warn"
    """The player models the real samples worse than the opponent does."""
    forgetting_quarter: Action = "warn"
    """The same in one quarter of the noise levels or lengths, while the mean looks fine."""
    saturation: Watch = setting("ignore", above=0, maximum=1)
    """This share of the pairs, 0.5 where none is given, is told apart beyond doubt (|beta r| > 4)."""
    error_growth: Watch = setting("warn", minimum=0)
    """The player's error (minus score) on the real samples has grown by this share of the opponent's, 0.1."""
    distance: Watch = setting("warn", minimum=0)
    """The weights have moved from the opponent's by this share of their own length, 0.2."""
    gradient_spike: Watch = setting("warn", minimum=1)
    """A gradient norm is so many times the median of the steps before it, 10."""
    nothing_learnt: Literal["ignore", "warn", "stop"] = "warn"
    """After 60 steps the player still tells no pair from another."""

    def __post_init__(self) -> None:
        for rule in LIMITS:
            value = getattr(self, rule)
            if isinstance(value, list) and sorted(isinstance(part, str) for part in value) != [False, True]:
                raise InputError(f"--health {rule} {value}: give an action, a limit or both, as in [stop, 0.3]")

    def action(self, rule: str) -> Action:
        """What is done when the rule has something to say; with a limit alone its default, or stop for ignore."""
        value = getattr(self, rule)
        given: list[Any] = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, str)]
        usual: Any = type(self).__dataclass_fields__[rule].default
        return given[0] if given else "stop" if usual == "ignore" else usual

    def limit(self, rule: str) -> float:
        """The limit beyond which the rule has something to say."""
        value = getattr(self, rule)
        given = [part for part in (value if isinstance(value, list) else [value]) if not isinstance(part, str)]
        return given[0] if given else LIMITS[rule]


@dataclass(frozen=True)
class TrainSettings(Settings):
    """How a round is trained. A list holds one value per round; when it is shorter, its last value repeats."""

    max_train_steps: PerRound[int] | None = setting(500, minimum=1, first=True)
    """Optimizer steps in each round; None = --num_train_epochs."""
    num_train_epochs: PerRound[float] | None = setting(None, above=0)
    """Times that a round sees each real sample, where --max_train_steps is None."""
    train_batch_size: int = setting(1, minimum=1, harmless=True, first=True)
    """Pairs per process and forward pass."""
    gradient_accumulation_steps: int = setting(1, minimum=1, harmless=True)
    """Forward passes per optimizer step."""
    learning_rate: PerRound[float] = setting(2e-5, above=0, first=True)
    """Initial learning rate (after warm-up)."""
    lr_scheduler: Scheduler = "constant_with_warmup"
    """How the rate goes on after warm-up: to 0 in a line or half a cosine, or not at all."""
    lr_warmup_steps: PerRound[int | float] = setting(0, minimum=0)
    """Optimizer steps of warm-up in each round; below 1 the share of the round's steps, 0.1 say."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "rmsprop", "sgd"] = "adamw"
    """adamw_8bit needs the extra `8bit`; rmsprop and sgd have no momentum."""
    adam_weight_decay: float = setting(1e-2, minimum=0)
    """Decoupled weight decay."""
    max_grad_norm: float = setting(1.0, minimum=0)
    """Gradients are clipped to this norm; the norm before clipping is logged. 0 = no clipping."""
    use_ema: bool = False
    """Promote an exponential moving average of the player's weights over the round instead of its last weights."""
    ema_decay: float | None = setting(None, above=0, below=1)
    """Largest decay of that average; default: 0.9999. Of --opponent ema, which keeps this share of itself at every step
    of the player; default: 0.99."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Default: what `accelerate launch` was told. Errors and scores are fp32 in any case."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more work."""
    fused_backward: bool = False
    """Update each weight in the backward pass and let its gradient go: 4 bytes a weight less. For one process, with
    --max_grad_norm 0 and no accumulation."""
    fully_shard: bool = False
    """Share the player's weights, gradients and optimizer state out over the processes while it is trained. An
    accelerate config for FSDP says so as well."""
    allow_tf32: bool = False
    """TF32 matrix products on Ampere and later GPUs."""
    select_every: int | None = setting(None, minimum=1)
    """Every so many optimizer steps of a round its player is judged on the held-out samples (--num_held_out), and the
    best of these steps, the last one among them, is promoted. None = the last step, whatever it is like."""
    select_by: str = "gap"
    """What judges the steps: gap = how much better than at its start the loss tells the held-out samples apart; or, of
    images, NAME[=PATH] of a scorer or a .py file, which scores the player's pictures of the first 32 held-out prompts;
    or fd, the Frechet distance (its bias taken off) of its pictures of all held-out prompts to real ones, in the
    features of --distribution_features. A round of which no step is better than its start is rejected."""
    checkpointing_steps: int = setting(500, minimum=1, harmless=True)
    """Optimizer steps between checkpoints within a round."""
    resume_from_checkpoint: str = setting("latest", harmless=True)
    """latest, or the name of a checkpoint of the round in training (checkpoint-500)."""
    health: HealthSettings = HealthSettings()
    """What is done (ignore, warn, stop, roll_back) when a round goes wrong, and beyond which limit: by rule an action,
    a limit or both, as in "{forgetting: stop, distance: 0.3, saturation: [stop, 0.5]}"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        warmups = self.lr_warmup_steps if isinstance(self.lr_warmup_steps, list) else [self.lr_warmup_steps]
        for steps in warmups:
            if steps >= 1 and steps != int(steps):
                raise InputError(f"--lr_warmup_steps {steps} must be a whole number of steps, or a share below 1")
        if self.max_train_steps is None and self.num_train_epochs is None:
            raise InputError("give the length of a round: --max_train_steps, or --num_train_epochs")


@dataclass(frozen=True)
class LoraSettings(Settings):
    """Train a low-rank adapter in place of all weights."""

    use_lora: bool = setting(False, first=True)
    """Train an adapter; the base's weights stay as they are, and the opponent is a second adapter on them."""
    rank: int = setting(16, minimum=1)
    """Rank of the adapter's matrices."""
    lora_alpha: float | None = setting(None, above=0)
    """The adapter's change is scaled by this over the rank; default: the rank."""
    lora_target_modules: list[str] | None = None
    """Names of the layers that get an adapter; default: a UNet's attention projections (to_k, to_q, to_v, to_out.0),
    all linear layers of a language model but the output's."""

    @property
    def alpha(self) -> float:
        """lora_alpha, or its default."""
        return float(self.rank) if self.lora_alpha is None else self.lora_alpha


def of_round(value: Any, round_: int) -> Any:
    """A setting's value in a round: a list holds one per round and repeats its last."""
    return value[min(round_, len(value)) - 1] if isinstance(value, list) else value


def steps_of_round(settings: TrainSettings, round_: int, pairs: int, world: int) -> tuple[int, int]:
    """Optimizer steps of a round of so many pairs on `world` processes, and how many of them are warm-up."""
    steps = of_round(settings.max_train_steps, round_)
    if steps is None:
        epochs = of_round(settings.num_train_epochs, round_)
        assert epochs is not None, "the configuration checks that one of the two is given"
        steps = max(1, math.ceil(epochs * pairs / pairs_per_step(settings, world)))
    warmup = of_round(settings.lr_warmup_steps, round_)
    return steps, round(warmup * steps) if warmup < 1 else int(warmup)


def pairs_per_step(settings: TrainSettings, world: int) -> int:
    """Pairs in an optimizer step of all processes together."""
    return settings.train_batch_size * settings.gradient_accumulation_steps * world


def pairs_visited(settings: TrainSettings, round_: int, pairs: int, world: int) -> int:
    """How many of so many pairs a round visits at all."""
    steps, _ = steps_of_round(settings, round_, pairs, world)
    return min(pairs, steps * pairs_per_step(settings, world))


def check_batch(pairs: int, settings: TrainSettings, world: int) -> int:
    """Pairs in each optimizer step of `world` processes; InputError when there are fewer pairs than that."""
    per_step = pairs_per_step(settings, world)
    if pairs < per_step:
        raise InputError(
            f"{pairs} pairs are fewer than one batch of {per_step} ({settings.train_batch_size} per process x "
            f"{settings.gradient_accumulation_steps} accumulation steps x {world} processes): lower --train_batch_size "
            "or --gradient_accumulation_steps, or give more examples"
        )
    return per_step
