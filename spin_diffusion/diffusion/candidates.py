"""The judge of self-labelled candidates (`samples.candidates`): any scorer of images."""

from spin_diffusion.evaluation.scorers import __name__ as SCORERS
from spin_diffusion.evaluation.scorers import about, load_scorer
from spin_diffusion.evaluation.scoring import check_specs, score_images
from spin_diffusion.evaluation.specs import part_key
from spin_diffusion.samples.candidates import Candidates, Judge
from spin_diffusion.samples.sample import Row
from spin_diffusion.selfplay.round_settings import CandidateSettings
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.pictures import open_picture


def check_scorer(settings: CandidateSettings) -> None:
    """InputError when there is no such scorer, or a higher score is not better; no weights are read."""
    spec = settings.candidate_scorer
    if not settings.num_candidates or spec is None:
        return
    try:
        check_specs([spec])
        said = about(spec)
    except InputError as error:
        raise InputError(f"--candidate_scorer {spec}: {error}") from None
    if said.role == "drift":
        raise InputError(
            f"--candidate_scorer {spec}: neither high nor low is good in a score of drift, so it has no best: give "
            "another scorer, pickscore say, or a .py file of your own"
        )


def candidates_of(settings: CandidateSettings, device: str) -> Candidates | None:
    """What the rounds need to know; None = no candidates are asked for.

    Args:
        device: where the scorer runs, such as "cpu" or "cuda:0".
    """
    spec = settings.candidate_scorer
    if not settings.num_candidates or spec is None:
        return None
    judge = scorer_by_content(spec)
    return Candidates(settings.num_candidates, settings.candidate_share, judge, lambda: scorer_as_judge(spec, device))


def scorer_by_content(spec: str) -> str:
    """A scorer's spec with the hash of what is behind it: code and weights may change between two starts of a run,
    their names do not."""
    return f"{spec} (SHA-256 {part_key(SCORERS, spec)[:16]})"


def scorer_as_judge(spec: str, device: str) -> Judge:
    """A scorer of images as a judge of stored samples; its weights are read now."""
    scorer = load_scorer(spec, device)

    def judge(rows: list[Row]) -> list[float]:
        return score_images(scorer, (open_picture(row["image"]) for row in rows), [row["prompt"] for row in rows])

    return judge
