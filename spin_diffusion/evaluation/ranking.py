"""Who wins of three models or more: all of them against each other, by what the verdict of one model goes by."""

from collections.abc import Sequence

from spin_diffusion.evaluation.records import (
    ComparisonEntry,
    PlaceEntry,
    RankingEntry,
    Scale,
    ScorerEntry,
    ScorerVerdict,
    VerdictEntry,
)
from spin_diffusion.evaluation.statistics import listed, overall_verdict

_MIRRORED: dict[ScorerVerdict, ScorerVerdict] = {"improved": "regressed", "regressed": "improved"}


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
