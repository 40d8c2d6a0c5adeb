"""What is concluded: of a model by one scorer, by all of them together, of several models, and of a round's player."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from spin_diffusion.evaluation.records import (
    IMAGES,
    AlarmState,
    ComparisonEntry,
    FailOn,
    Modality,
    ModelVerdict,
    PlaceEntry,
    RankingEntry,
    Results,
    Role,
    Scale,
    ScorerEntry,
    ScorerVerdict,
    VerdictEntry,
    modality_of,
    scale_in_words,
)
from spin_diffusion.evaluation.statistics import SIGNIFICANCE, Interval
from spin_diffusion.store.input_error import InputError

_QUALITY: tuple[Role, ...] = ("truth", "in-domain", "held-out", "alignment", "aesthetics")
"""Roles of scorers that can tell better from worse."""
_OF_COVER = frozenset({"recall", "coverage"})
"""Alarms that say that less of what is real is drawn."""
_FROM_GOOD_TO_BAD: tuple[ModelVerdict, ...] = ("improved", "inconclusive", "suspect", "regressed")
_MIRRORED: dict[ScorerVerdict, ScorerVerdict] = {"improved": "regressed", "regressed": "improved"}


def verdict(interval: Interval, p_holm: float, lead: int, drift: bool) -> ScorerVerdict:
    """What one scorer says of a model against the baseline.

    "improved" asks for both a mean difference and a majority of wins that are beyond chance: a mean that a few prompts
    carry and a majority of tiny wins are each not enough. "regressed" mirrors it. It takes 6 prompts at least.

    With tests adjusted by Holm over all of an evaluation, at most 5 % of evaluations call any model improved
    or regressed that is the same as the baseline, however many scorers, models and guidance scales there are. Measured
    with five scorers that have nothing in common, in 1000 simulated evaluations of one model each on 20 and on 200
    prompts: 0.5 and 0.8 % (normal differences), 0.1 and 0.4 % (heavy tails), 0.8 and 1.2 % (many ties). A model that is
    another but whose means are the baseline's, by exponential differences: 3 to 7 %.

    Args:
        interval: of the paired difference, model minus baseline.
        p_holm: the larger p-value of the sign test and the t-test, adjusted by Holm over all that are made at once.
        lead: wins minus losses.
        drift: the score is good neither up nor down; the answer is then "drift", whatever the numbers.
    """
    if drift:
        return "drift"
    if p_holm < SIGNIFICANCE and interval.low > 0 and lead > 0:
        return "improved"
    if p_holm < SIGNIFICANCE and interval.high < 0 and lead < 0:
        return "regressed"
    return "inconclusive"


def overall_verdict(
    verdicts: Mapping[str, ScorerVerdict],
    roles: Mapping[str, Role],
    alarms: Mapping[str, AlarmState],
    modality: Modality = IMAGES,
    moved: Collection[str] = (),
) -> tuple[ModelVerdict, str]:
    """What is concluded of one model at one guidance scale, and why in one sentence.

    The first of these rules that applies:

    1. regressed: a scorer of the role truth, held-out or alignment regressed; or any other that can tell better from
       worse did, none improved, and an alarm is in state "alarm". A fall wins over an alarm.
    2. suspect: any alarm is in state "alarm"; higher scores may be won by cheating, or by fewer kinds of pictures.
    3. improved: the truth improved; or no scorer knows the truth and a held-out one improved.
    4. inconclusive: anything else. An in-domain scorer judges what the model was trained to please, an aesthetics
       scorer does not read the prompt, and an alignment scorer guards against harm: none of them is enough alone.

    Args:
        verdicts: scorer -> its `verdict`.
        roles: scorer -> its role; at least the scorers of `verdicts`.
        alarms: id of the alarm -> its state.
        modality: what the model makes, for the sentence.
        moved: scorers whose interval of the difference excludes 0, for the sentence: a reader of the tables sees it.
    """
    fired = [alarm for alarm, state in alarms.items() if state == "alarm"]
    alarm = f"the alarm{'s' if len(fired) > 1 else ''} {listed(fired)} went off" if fired else ""

    def named(said: ScorerVerdict, *wanted: Role) -> list[str]:
        return [name for name, its in verdicts.items() if its == said and roles[name] in wanted]

    rose, fell = named("improved", *_QUALITY), named("regressed", *_QUALITY)
    if (judges := named("regressed", "truth", "held-out", "alignment")) or (fired and fell and not rose):
        beside = f", although {listed(rose)} improved" if rose else ""
        also = f"; {alarm} too" if fired else ""
        return "regressed", f"The model is worse than the baseline by {listed(judges or fell)}{beside}{also}."
    if fired and set(fired) <= _OF_COVER:
        return "suspect", _why_it_covers_less(fired, rose, modality)
    if fired:
        if rose:
            worse = f", and {listed(fell)} got worse" if fell else ""
            doubt = f"so the higher scores by {listed(rose)} may not mean better {modality.plural}{worse}"
        else:
            doubt = "although no score is clearly better or worse"
        return "suspect", f"T{alarm[1:]}, {doubt}: read what is said there before you believe any score."

    knows_truth = any(roles[name] == "truth" for name in verdicts)
    if knows_truth and (better := named("improved", "truth")):
        return "improved", f"The model is better than the baseline by {listed(better)}, which knows the truth."
    if not knows_truth and (better := named("improved", "held-out")):
        return "improved", (
            f"The model is better than the baseline by {listed(better)}, {modality.held_out}, "
            "and worse by no scorer that counts."
        )

    if not any(roles[name] in _QUALITY for name in verdicts):
        return "inconclusive", "No scorer that can tell better from worse was run."
    return "inconclusive", _why_inconclusive(
        rose, fell, knows_truth, {name: verdicts[name] for name in moved if name in verdicts}
    )


def _why_it_covers_less(fired: Sequence[str], rose: Sequence[str], modality: Modality) -> str:
    what = f"its {modality.plural} cover less of the real ones than the baseline's: {listed(fired)} fell"
    if not rose:
        return f"No score is clearly better, and {what}."
    return (
        f"The model is better than the baseline by {listed(rose)}, but {what}. It may draw good {modality.plural} of "
        "fewer kinds, which no score of a single one sees."
    )


def _why_inconclusive(
    rose: Sequence[str], fell: Sequence[str], knows_truth: bool, moved: Mapping[str, ScorerVerdict]
) -> str:
    if rose:
        lacking = "the scorer that knows the truth" if knows_truth else "no held-out scorer"
        confirms = "does not confirm it" if knows_truth else "confirms it"
        return (
            f"The model is better than the baseline by {listed(rose)} alone, and {lacking} {confirms}; "
            "that is not enough to call it improved."
        )
    if fell:
        return (
            f"The model is worse than the baseline by {listed(fell)} alone, and no other scorer confirms it; "
            "that is not enough to call it regressed."
        )
    drifted = [name for name, its in moved.items() if its == "drift"]
    beside = f" It did change by {listed(drifted)}, which is neither good nor bad." if drifted else ""
    if unconfirmed := [name for name, its in moved.items() if its == "inconclusive"]:
        return (
            f"The mean moved by {listed(unconfirmed)}, but not beyond chance once wins and losses (sign test) and the "
            f"number of tests are minded: a few prompts carry it, or there are too few.{beside}"
        )
    no_scorer = "No scorer that can tell better from worse" if drifted else "No scorer"
    return (
        f"{no_scorer} sees a difference to the baseline: there is none, or it is too small for this many "
        f"prompts.{beside}"
    )


def listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def rank(
    models: Sequence[str],
    scale: Scale,
    entries: Sequence[ComparisonEntry],
    scorers: Sequence[ScorerEntry],
    verdicts: Sequence[VerdictEntry],
) -> RankingEntry | None:
    """The ranking at one guidance scale, as in results.json; None where no scorer may decide.

    A model is better than another if `overall_verdict` without alarms calls it improved over the other. Its place is 1
    plus the number of models that are better than it, so models that are not told apart share one, mostly.

    Args:
        models: the baseline first.
        entries: comparisons with the baseline, and of all others with each other.
        scorers, verdicts: as in results.json.
    """
    roles = {scorer["name"]: scorer["role"] for scorer in scorers}
    ran = [scorer for scorer in scorers if scorer["state"] == "run"]
    deciding = [s for s in ran if s["role"] == "truth"] or [s for s in ran if s["role"] == "held-out"]
    if not deciding:
        return None
    by_pair: dict[tuple[str, str], dict[str, ScorerVerdict]] = {}
    for entry in entries:
        if entry["guidance_scale"] == scale:
            verdict = entry["verdict"]
            by_pair.setdefault((entry["model"], entry["baseline"]), {})[entry["scorer"]] = verdict
            mirrored = by_pair.setdefault((entry["baseline"], entry["model"]), {})
            mirrored[entry["scorer"]] = _MIRRORED.get(verdict, verdict)
    better = {pair for pair, its in by_pair.items() if overall_verdict(its, roles, {})[0] == "improved"}
    places: list[PlaceEntry] = [
        {
            "model": model,
            "place": 1 + sum((other, model) in better for other in models),
            "better_than": [other for other in models if (model, other) in better],
            "worse_than": [other for other in models if (other, model) in better],
        }
        for model in models
    ]
    winner = next((place["model"] for place in places if len(place["better_than"]) == len(models) - 1), None)
    sentence = _sentence(places, winner, listed([scorer["title"] or scorer["name"] for scorer in deciding]))
    doubtful = [v["model"] for v in verdicts if v["verdict"] == "suspect" and v["guidance_scale"] == scale]
    if suspects := [place["model"] for place in places if place["place"] == 1 and place["model"] in doubtful]:
        sentence += f" Alarms went off for {listed(suspects)}: read them before you believe it."
    return {
        "guidance_scale": scale,
        "scorers": [scorer["name"] for scorer in deciding],
        "winner": winner,
        "sentence": sentence,
        "places": sorted(places, key=lambda place: place["place"]),
    }


def _sentence(places: Sequence[PlaceEntry], winner: str | None, by: str) -> str:
    first = [place for place in places if place["place"] == 1]
    names = [place["model"] for place in first]
    if winner is not None:
        return f"{winner} wins: it is better than each of the other {len(places) - 1} models by {by}."
    if not any(place["better_than"] for place in places):
        return f"No winner: none of the {len(places)} models is told apart from another by {by}."
    if not first:
        return f"No winner by {by}: each model is worse than some other."
    beaten = [place["model"] for place in places if all(place["model"] in one["better_than"] for one in first)]
    ahead = f"; better than {listed(beaten)}" if beaten else ""
    if len(first) == 1:
        level = [p["model"] for p in places if p["model"] not in (*names, *first[0]["better_than"])]
        return (
            f"No clear winner by {by}: {names[0]} is worse than none, but not told apart from {listed(level)}{ahead}."
        )
    return f"A tie by {by}: {listed(names)} are not told apart{ahead}."


def failing(results: Results, fail_on: FailOn | None, past: Sequence[VerdictEntry] = ()) -> list[str]:
    """The models, with where and what, whose verdict is `fail_on` or worse; none for None.

    Args:
        past: further verdicts, on older evaluations.

    Raises:
        InputError: there is none, but a scorer that was asked for has said nothing, or no model was compared.
    """
    if fail_on is None:
        return []
    bad = _FROM_GOOD_TO_BAD[_FROM_GOOD_TO_BAD.index(fail_on) :]
    verdicts = [*results["verdicts"], *past]
    found = [
        f"{said['model']} at {scale_in_words(said['guidance_scale'])}: {said['verdict']}"
        for said in verdicts
        if said["verdict"] in bad
    ]
    lacking = _not_run(results)
    if not found and (lacking or not verdicts):
        why = f"{lacking} could not be run" if lacking else "no scorer compared two models: give two, and --scorers"
        raise InputError(f"--fail_on {fail_on} cannot be decided: {why}")
    return found


def _not_run(results: Results) -> str:
    """The scorers that could not be run, joined by commas."""
    return ", ".join(scorer["name"] for scorer in results["scorers"] if scorer["state"] != "run")


def promotion(results: Results, promote_if: Literal["always", "not_regressed", "improved"]) -> tuple[bool, str]:
    """Whether a player is promoted by its comparison with its opponent, and why.

    It counts at every guidance scale: one where the player fell is enough to reject it; to be improved it must be at
    one at least.
    """
    if promote_if == "always":
        return True, ""
    if lacking := _not_run(results):
        raise InputError(f"--promote_if {promote_if} cannot be decided: {lacking} could not be run")
    roles = {scorer["name"]: scorer["role"] for scorer in results["scorers"]}
    at = modality_of(results["protocol"]).at
    fell = [
        f"{entry['scorer']} fell by {-entry['difference']:.3g}" + at.format(scale_in_words(entry["guidance_scale"]))
        for entry in results["comparisons"]
        if entry["verdict"] == "regressed" and roles[entry["scorer"]] in ("truth", "held-out", "alignment")
    ]
    if fell:
        return False, "; ".join(fell)
    if promote_if == "improved" and not any(v["verdict"] == "improved" for v in results["verdicts"]):
        return False, "; ".join(dict.fromkeys(v["reason"] for v in results["verdicts"]))
    return True, ""
