"""OPPONENT: which earlier selves play the opponent."""

from spin_diffusion.selfplay.one_round import Round, StepResult, mixture_hash
from spin_diffusion.selfplay.opponents import Mixture
from spin_diffusion.selfplay.record import RoundRecord, SelfRecord


def choose_opponent(round_: Round, record: RoundRecord) -> StepResult:
    """The selves that draw and those that anchor the scores, with the hashes of their weights."""
    hashes = {k: round_.run.seat_opponent(k) for k in sorted({*round_.mixture, *round_.anchors})}

    def described(selves: Mixture) -> list[SelfRecord]:
        return [{"round": k, "weight": weight, "hash": hashes[k]} for k, weight in sorted(selves.items())]

    members = described(round_.mixture)
    return StepResult(
        {
            "opponent": {
                "rule": round_.settings.opponent,
                "round": max(round_.anchors),
                "hash": mixture_hash(members),
                "members": members,
                "anchors": described(round_.anchors),
            }
        }
    )
