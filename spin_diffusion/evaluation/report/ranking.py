"""Who wins of several models, by how much, and whether it can be believed: the card at the top of the page."""

from dataclasses import dataclass

from spin_diffusion.evaluation.records import (
    AlarmEntry,
    AlarmState,
    ComparisonEntry,
    ModelVerdict,
    RankingEntry,
    Results,
)
from spin_diffusion.evaluation.report.reading import Labels
from spin_diffusion.evaluation.report.wording import STATES, State
from spin_diffusion.evaluation.verdicts import listed

_MAX_ROWS = 8


@dataclass(frozen=True)
class CardRow:
    """A model of the ranking; of the baseline there is neither a difference nor a verdict."""

    place: int
    model: str
    compared: list[ComparisonEntry]
    """Its differences to the baseline by the scorers that decide."""
    verdict: ModelVerdict | None
    believed: str
    """Whether the difference can be believed, in words."""


@dataclass(frozen=True)
class Card:
    """The ranking at the headline's guidance scale."""

    title: str
    state: State
    """The winner's verdict; inconclusive where nobody wins, or the baseline does."""
    sentence: str
    rows: list[CardRow]
    """The first places."""


def ranking_card(results: Results) -> Card | None:
    """Who wins at the headline's guidance scale; None for two models, or where no scorer may decide."""
    ranked = rankings(results)
    if not ranked or ranked[0][0]["guidance_scale"] != results["headline"]["guidance_scale"]:
        return None
    ranking, scale = ranked[0][0], results["headline"]["guidance_scale"]
    verdicts = {v["model"]: v["verdict"] for v in results["verdicts"] if v["guidance_scale"] == scale}
    compared = {(c["model"], c["scorer"]): c for c in results["comparisons"] if c["guidance_scale"] == scale}
    rows = [
        CardRow(
            place["place"],
            place["model"],
            [entry for name in ranking["scorers"] if (entry := compared.get((place["model"], name)))],
            verdicts.get(place["model"]),
            _believed(results, place["model"], verdicts.get(place["model"])),
        )
        for place in ranking["places"][:_MAX_ROWS]
    ]
    state = STATES[verdicts.get(ranking["winner"] or "", "inconclusive")]
    return Card(_title(ranking, Labels(results)), state, ranking["sentence"], rows)


def _title(ranking: RankingEntry, labels: Labels) -> str:
    first = [place for place in ranking["places"] if place["place"] == 1]
    if ranking["winner"] is not None:
        return f"{labels.model(ranking['winner'])} wins"
    if len(first) > 1 and any(place["better_than"] for place in first):
        return f"A tie: {listed([labels.model(place['model']) for place in first])}"
    return "No winner"


def _believed(results: Results, model: str, verdict: ModelVerdict | None) -> str:
    if verdict is None:
        return ""
    if fired := _alarms_of(results, model, "alarm"):
        return f"not before you have looked: {listed([alarm['id'] for alarm in fired])}"
    if verdict == "inconclusive":
        return "no: it may be chance"
    warned = _alarms_of(results, model, "warn")
    return "yes" + (f", with a warning: {listed([alarm['id'] for alarm in warned])}" if warned else ": no alarm")


def _alarms_of(results: Results, model: str | None, state: AlarmState) -> list[AlarmEntry]:
    """The alarms of a model in a state, at the headline's guidance scale."""
    scale = results["headline"]["guidance_scale"]
    return [
        alarm
        for alarm in results["alarms"]
        if (alarm["state"], alarm["guidance_scale"], alarm["model"]) == (state, scale, model)
    ]


def to_do(results: Results, card: Card | None) -> tuple[str | None, list[AlarmEntry]]:
    """The model that the top of the page is about, and its alarms, which are to be looked into before it is believed:
    the winner or one of the first places, the headline's model where it is among them."""
    model = results["headline"]["model"]
    first = [row.model for row in card.rows if row.place == 1] if card is not None else []
    if first and model not in first:
        model = first[0]
    return model, _alarms_of(results, model, "alarm")


def rankings(results: Results) -> list[tuple[RankingEntry, list[ComparisonEntry]]]:
    """Who wins at each guidance scale, that of the headline first, with the pairs without the baseline by the scorers
    that decide; none for two models."""
    scale = results["headline"]["guidance_scale"]
    return [
        (
            ranking,
            [
                pair
                for pair in results.get("between_others", [])
                if pair["guidance_scale"] == ranking["guidance_scale"] and pair["scorer"] in ranking["scorers"]
            ],
        )
        for ranking in sorted(results.get("ranking", []), key=lambda ranking: ranking["guidance_scale"] != scale)
    ]
