"""The models, scorers and numbers of one evaluation as the page shows them."""

from markupsafe import Markup

from spin_diffusion.evaluation.modalities import guidance_scales
from spin_diffusion.evaluation.records import AggregateEntry, ComparisonEntry, PlaceEntry, Results, Scale
from spin_diffusion.evaluation.report import plots
from spin_diffusion.evaluation.report.editions import edition_of
from spin_diffusion.evaluation.report.wording import (
    NAME_CHARACTERS,
    STATES,
    Number,
    State,
    Text,
    decimals_by_scorer,
    difference_number,
    distinct,
    interval_text,
    labels,
    plain,
    shortened,
)


class Labels:
    """Short names, no two alike, and numbers with the decimals of their scorer."""

    def __init__(self, results: Results) -> None:
        self.models = labels(model["name"] for model in results["models"])
        self.decimals = decimals_by_scorer(results)
        self.ran = [scorer for scorer in results["scorers"] if scorer["state"] == "run"]
        """The scorers that gave scores."""
        of_rows = (row["guidance_scale"] for row in results["results"])
        self.scales = distinct([*guidance_scales(results["protocol"]), *of_rows])
        self._protocol, self._edition = results["protocol"], edition_of(results)
        self._titles = {scorer["name"]: scorer["title"] for scorer in results["scorers"]}

    def model(self, name: str) -> str:
        """The label of a model; of one that is not among the models, its shortened name."""
        return self.models.get(name, shortened(name, NAME_CHARACTERS).short)

    def model_text(self, name: str) -> Text:
        """The label of a model, and its whole name behind it where that is longer."""
        whole = shortened(name, NAME_CHARACTERS)
        return Text(self.models[name], whole.full, whole.note)

    def joined(self, names: list[str]) -> str:
        """Labels in one line; a dash for none."""
        return ", ".join(self.models[name] for name in names) or "\u2013"

    def level_with(self, place: PlaceEntry) -> list[str]:
        """The models that one of a ranking is not told apart from."""
        decided = {place["model"], *place["better_than"], *place["worse_than"]}
        return [name for name in self.models if name not in decided]

    def scale(self, scale: Scale) -> str:
        """How samples were drawn, in words."""
        return self._edition.label(self._protocol, scale)

    def title(self, scorer: str, length: int = 60) -> str:
        """The title of a scorer, or its name where it has none."""
        return shortened(self._titles[scorer] or scorer, length).short

    def mean(self, row: AggregateEntry | None) -> Number | None:
        """A mean with its interval."""
        if row is None:
            return None
        digits = self.decimals[row["scorer"]]
        return Number(plain(row["mean"], digits), interval_text(row["low"], row["high"], digits, plain))

    def difference(self, row: ComparisonEntry | None) -> Number | None:
        """A paired difference with its interval."""
        return None if row is None else difference_number(row, self.decimals[row["scorer"]])


def mark(comparison: ComparisonEntry | None) -> State | None:
    """The mark of a significant difference. A drift is marked where its interval excludes 0, and never as good."""
    if comparison is None or comparison["verdict"] == "inconclusive":
        return None
    if comparison["verdict"] == "drift" and comparison["low"] <= 0 <= comparison["high"]:
        return None
    return STATES[comparison["verdict"]]


def own_bar(row: ComparisonEntry) -> Markup:
    """A difference's interval as a picture on its own scale, 0 in the middle."""
    reach = 1.1 * max(abs(row["low"]), abs(row["high"]), abs(row["difference"]))
    return plots.interval_bar(row["low"], row["difference"], row["high"], (-reach, reach))


def win_rate(row: ComparisonEntry) -> str:
    """In percent, with its interval if results.json has one: older ones have none."""
    rate = f"{100 * row['win_rate']:.1f} %"
    if "win_rate_low" not in row:
        return rate
    return f"{rate} {interval_text(100 * row['win_rate_low'], 100 * row['win_rate_high'], 0, plain)}"
