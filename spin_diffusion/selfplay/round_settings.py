"""How the rounds are played: the settings, and what of them holds in a round."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from spin_diffusion.selfplay.objective_names import OBJECTIVES, Generated, Objective, is_file, title_of
from spin_diffusion.selfplay.train_settings import of_round
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import code_hash
from spin_diffusion.store.named import load_module
from spin_diffusion.store.settings import SEEDS, PerRound, Settings, setting

OpponentName = Literal["latest", "base", "last_two", "pool", "ema"]
"""The rules of `opponents`, by name."""

DEFAULT_BETA = 5000.0
MAX_BETA = 1e30
"""Beyond, its product with a difference of scores is no number in fp32."""


@dataclass(frozen=True)
class RoundSettings(Settings):
    """The game that is played. A list holds one value per round; when it is shorter, its last value repeats."""

    rounds: int = setting(3, minimum=1, maximum=10_000, harmless=True, first=True)
    """Rounds of self-play, counted from 1."""
    keep_rounds: int | None = setting(None, minimum=1, harmless=True)
    """Keep the weights of so many rounds, the last ones, and of those that the next round plays with. Samples, records
    and evaluations of the others stay. None = keep all weights."""
    objective: PerRound[str] = setting("spin", choices=OBJECTIVES, or_file=True, first=True)
    """The loss of a pair, or a file with a `loss` of your own. dpo takes the generated side from the data set's own
    worse samples, sft needs none, all others play the opponent."""
    objective_options: dict[str, float] | None = None
    """Further numbers of the objective, as "{threshold: 0.001}" for dro or "{weight: 0.1}" for mapo. mu weighs the
    generated side of space; default: --num_generated, as its theorem wants it. sft_weight adds, to any of them, so many
    times beta times the loss of sft, which holds the real side up; at r = 0 spin pulls it with 0.5."""
    generated_from: Literal["opponent", "data"] | None = None
    """Where the generated side comes from; default: the objective's own place. data = the data set's worse samples."""
    beta: PerRound[float | Literal["auto"]] = setting(DEFAULT_BETA, above=0, maximum=MAX_BETA)
    """Temperature on r. In the convention of SPIN-Diffusion and Diffusion-DPO (2000 to 5000). auto = for each
    round by the size of its scores, so that a margin of a quarter of the error is one that counts as learnt."""
    num_generated: int = setting(1, minimum=1)
    """Samples that the opponent draws for each real one."""
    opponent: OpponentName = "latest"
    """Which earlier selves draw the generated samples and anchor the score: latest, base, last_two (half each), pool
    (all alike), ema (a moving average of the player's weights, by --ema_decay)."""
    anchor: Literal["opponent", "base"] = "opponent"
    """Whose score the player's is compared with: the opponent that drew the samples, or always the base."""
    real_parts: int = setting(1, minimum=1)
    """Split the real samples into this many parts; round k plays with part k and sees it for the first time."""
    samples_per_shard: int = setting(64, minimum=1)
    """Real samples per file, and what is drawn for them; what a killed process loses at most."""
    seed: int = setting(0, minimum=0, below=SEEDS)
    """Seed of everything random in the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        objectives = self.objective if isinstance(self.objective, list) else [self.objective]
        if self.objective_options or any(is_file(name) for name in objectives):
            # Needs torch, for which a look at --help does not wait
            from spin_diffusion.selfplay.objectives import check_options, loss_of

            for name in objectives:
                loss_of(name)
                objective_of(name)
            check_options(list(dict.fromkeys(objectives)), self.objective_options or {})
        if self.keep_rounds is not None and self.opponent == "pool":
            raise InputError(
                f"--keep_rounds {self.keep_rounds} removes weights, and --opponent pool draws from all earlier selves: "
                "leave --keep_rounds out, or give another --opponent"
            )
        if self.real_parts > self.samples_per_shard:
            raise InputError(
                f"--real_parts {self.real_parts} must be at most --samples_per_shard {self.samples_per_shard}: each "
                "part takes rows of every file"
            )

    def numbers(self, round_: int) -> dict[str, float]:
        """What the objective of a round is computed with, beside the scores; for `--beta auto` the default stands in
        until the scores are there."""
        beta = of_round(self.beta, round_)
        usual = {"beta": DEFAULT_BETA if beta == "auto" else float(beta), "mu": float(self.num_generated)}
        return usual | (self.objective_options or {})

    @property
    def stop_when_learnt(self) -> bool:
        """Whether a round whose held-out gap is not above 0 is rejected and ends the run."""
        return False


def objective_of(name: str) -> Objective:
    """What is known of an objective; InputError for a file that cannot be imported or says what cannot be."""
    if not is_file(name):
        return OBJECTIVES[name]
    module = load_module(__name__, name)
    generated: Any = getattr(module, "GENERATED", "opponent")
    if generated not in get_args(Generated):
        raise InputError(f"{name}: GENERATED is {generated!r}: give one of {', '.join(get_args(Generated))}")
    return Objective(generated, str(getattr(module, "METHOD", title_of(name))), str(getattr(module, "PAPER", "")))


def file_hashes(names: list[str]) -> dict[str, str]:
    """The content of the files among some objectives, with what lies beside them and is imported, by path."""
    return {name: code_hash(Path(name)) for name in names if is_file(name)}


def objectives_of(rounds: RoundSettings) -> list[str]:
    """The objectives of the rounds, each once."""
    return list(dict.fromkeys(of_round(rounds.objective, k) for k in range(1, rounds.rounds + 1)))


def source_of(rounds: RoundSettings, objective: str) -> Literal["opponent", "data", "none"]:
    """Where the generated side comes from when an objective is trained."""
    own = objective_of(objective).generated
    return own if own == "none" else rounds.generated_from or own
