"""The toy language: short answers to 24 prompts, drawn by a small grammar whose every probability is known.

    prompt  = "tell me about " ("a " | "an ") mood " " animal
    answer  = [opening " "] subject " " verb [" " place] [" " ending] "."
    opening = "often" | "at dusk" | "in winter"
    subject = "the " animal | ("a " | "an ") mood " " animal | "most " animals | "two " mood " " animals
    place   = "in straw" | "at home" | "under leaves" | "on roofs" | "by rivers"
    ending  = "because it is hungry" | "until it hears noises" | "with its friends" | "until the moon rises"
            | "until the snow melts"                           with "they", "are", "hear", "their" after a plural

What the animal does depends on the animal, where it does so on the verb, and how the sentence may end on its first
words; verb and ending agree with the subject in number. Each prompt has 432 answers, no two of them equal.

The sentence is written from left to right in five choices. The chance of an option is a softmax of its log-weights,

    log-weight(option) = STRENGTH * sum over what is known of number(dialect, choice, known, option)

where known are the animal, the mood and all earlier choices and number is a fixed pseudo-random value in -1..1. The
dialects "data" and "neighbour" have the same answers and other numbers, so the divergence between them is finite.
"""

import bisect
import functools
import hashlib
import itertools
import math
import random

import numpy as np

DIALECTS = ("data", "neighbour")
PLURALS = {"cat": "cats", "dog": "dogs", "fox": "foxes", "owl": "owls", "hen": "hens", "frog": "frogs"}
MOODS = ("shy", "bold", "lazy", "old")
VERBS = {
    "cat": ("sleep", "hunt", "play"),
    "dog": ("sleep", "play", "wait"),
    "fox": ("hide", "hunt", "wait"),
    "owl": ("hunt", "wait", "sing"),
    "hen": ("sleep", "hide", "sing"),
    "frog": ("hide", "play", "sing"),
}
PLACES = {
    "sleep": ("", "in straw", "at home"),
    "hide": ("", "in straw", "under leaves"),
    "sing": ("", "under leaves", "on roofs"),
    "hunt": ("", "under leaves", "by rivers"),
    "play": ("", "at home", "by rivers"),
    "wait": ("", "on roofs", "by rivers"),
}
SUBJECTS = ("the", "a", "most", "two")
PLURAL_SUBJECTS = ("most", "two")
MOODY_SUBJECTS = ("a", "two")
ENDINGS = {
    "": ("", "because it is hungry", "with its friends"),
    "often": ("", "because it is hungry", "until it hears noises"),
    "at dusk": ("", "with its friends", "until the moon rises"),
    "in winter": ("", "because it is hungry", "until the snow melts"),
}
"""Of a singular subject, by the opening."""
PLURAL_ENDINGS = {
    "because it is hungry": "because they are hungry",
    "until it hears noises": "until they hear noises",
    "with its friends": "with their friends",
}
STRENGTH = 0.8


def _article(mood: str) -> str:
    return "an" if mood[0] in "aeiou" else "a"


_TOPICS = {
    f"tell me about {_article(mood)} {mood} {animal}": (animal, mood)
    for animal, mood in itertools.product(PLURALS, MOODS)
}
PROMPTS: tuple[str, ...] = tuple(_TOPICS)


def answers(prompt: str, dialect: str = "data") -> dict[str, float]:
    """Every answer to the prompt with its probability; they sum to 1.

    Raises:
        ValueError: the prompt is not one of PROMPTS, or there is no such dialect.
    """
    return dict(_answers(prompt, dialect))


def draw(prompt: str, rng: random.Random | np.random.Generator, dialect: str = "data") -> str:
    """A random answer to the prompt: five choices, each made with one `rng.random()`.

    Raises:
        ValueError: as for `answers`.
    """
    topic = _topic(prompt, dialect)
    choices: tuple[str, ...] = ()
    while len(choices) < len(_CHOICES):
        options, probabilities = zip(*_options(dialect, topic, choices), strict=True)
        index = bisect.bisect(list(itertools.accumulate(probabilities)), rng.random())
        choices = (*choices, options[min(index, len(options) - 1)])  # the sum can round to a little less than 1
    return _sentence(topic, choices)


def _topic(prompt: str, dialect: str) -> tuple[str, str]:
    """Animal and mood that the prompt asks about."""
    if dialect not in DIALECTS:
        raise ValueError(f"there is no dialect {dialect!r} of the toy language; it has {', '.join(DIALECTS)}")
    if prompt not in _TOPICS:
        raise ValueError(
            f"{prompt!r} is not a prompt of the toy language: 'tell me about a MOOD ANIMAL' with"
            f" MOOD {', '.join(MOODS)} and ANIMAL {', '.join(PLURALS)}"
        )
    return _TOPICS[prompt]


@functools.cache
def _answers(prompt: str, dialect: str) -> dict[str, float]:
    topic = _topic(prompt, dialect)
    paths: list[tuple[tuple[str, ...], float]] = [((), 1.0)]
    for _ in _CHOICES:
        paths = [
            ((*choices, option), before * probability)
            for choices, before in paths
            for option, probability in _options(dialect, topic, choices)
        ]
    probabilities: dict[str, float] = {}
    for choices, probability in paths:
        sentence = _sentence(topic, choices)
        # Two ways to write one sentence would be one answer.
        probabilities[sentence] = probabilities.get(sentence, 0.0) + probability
    return probabilities


_CHOICES = ("opening", "subject", "verb", "place", "ending")


@functools.cache
def _options(dialect: str, topic: tuple[str, str], choices: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    """The options of the next choice with their probabilities, after the choices made."""
    choice = _CHOICES[len(choices)]
    if choice == "opening":
        options = tuple(ENDINGS)
    elif choice == "subject":
        options = SUBJECTS
    elif choice == "verb":
        options = VERBS[topic[0]]
    elif choice == "place":
        options = PLACES[choices[2]]
    else:
        options = ENDINGS[choices[0]]
    # The name of the choice keeps two equal words apart, such as no opening and no place.
    known = [f"topic {word}" for word in topic] + [f"{_CHOICES[i]} {word}" for i, word in enumerate(choices)]
    weights = [math.exp(STRENGTH * sum(_number(dialect, choice, item, option) for item in known)) for option in options]
    total = math.fsum(weights)
    return tuple((option, weight / total) for option, weight in zip(options, weights, strict=True))


@functools.cache
def _number(*names: str) -> float:
    """A value in -1..1, evenly spread, that is the same on every machine."""
    digest = hashlib.sha256("/".join(names).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**47 - 1


def _sentence(topic: tuple[str, str], choices: tuple[str, ...]) -> str:
    animal, mood = topic
    opening, subject, verb, place, ending = choices
    is_plural = subject in PLURAL_SUBJECTS
    words = [
        opening,
        _article(mood) if subject == "a" else subject,
        mood if subject in MOODY_SUBJECTS else "",
        PLURALS[animal] if is_plural else animal,
        verb if is_plural else verb + "s",
        place,
        PLURAL_ENDINGS.get(ending, ending) if is_plural else ending,
    ]
    return " ".join(word for word in words if word) + "."
