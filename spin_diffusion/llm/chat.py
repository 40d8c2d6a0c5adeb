"""Text -> tokens: the one place, for the prompts that answers are drawn to and for the pairs that are scored.

An answer's score is the density that it was drawn from only if both see the same prompt tokens, and if a real answer is
written as a drawn one is: it is the answer and nothing that a template puts around it, it ends with the end token that
the model draws, and where it is cut it has none. What only one side had would tell the sides apart.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from keyword import iskeyword
from typing import Any, NamedTuple, NoReturn

from transformers import PreTrainedTokenizerBase

from spin_diffusion.data.rows import Bad, Expected, LeftOut, Message
from spin_diffusion.store.deadline import fill_template
from spin_diffusion.store.input_error import InputError, broken_character, one_line

OWN_NAMES = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "loop", "namespace")
"""Variables of a chat template that no argument may be named like."""
STAND_INS = 0xF0000
"""First of the private characters that stand for special tokens' texts in the data while a template is filled."""
SAMPLE = ("Which question?", "This answer.")
"""A conversation that shows how a template writes one."""
SAMPLE_TEXTS = ("The quick brown fox.", "  two  spaces ", "a line\n\nand\ta tab\n", "caf\u00e9 \u65e5\u672c \U0001f600")
"""What a tokenizer should give back."""


class Tokens(NamedTuple):
    """The tokens of an answer."""

    ids: list[int]
    """The end token is the last, unless the answer is cut."""
    cut: bool
    """Whether it was longer than the longest answer, or than what the prompt leaves."""


class _Written(NamedTuple):
    """An answer on its way: tokens without the end token, and what they should say."""

    prompt_ids: list[int]
    ids: list[int]
    end_id: int
    text: str
    is_merged: bool
    has_special_text: bool
    is_stripped: bool


class Chat:
    """A tokenizer as conversations and plain text go through it.

    Conversations go through its chat template. Plain text is taken as it is, after the tokens that the tokenizer puts
    in front of all text (bos), and its answers end with the tokenizer's end token. The text of a special token in the
    data stays text: it never becomes the token.
    """

    end_ids: tuple[int, ...]
    """Tokens that end an answer: what the template writes after one, and the tokenizer's end token if that differs."""
    pad_id: int
    """Pad, else unknown, else end token. Any will do, an end token too: what is filled up is masked by its length."""
    counts: Counter[str]
    """Answers so far by what is odd about them: the keys of `notes`."""
    longest: int
    """Tokens of the longest answer so far, before it was cut."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, max_new_tokens: int) -> None:
        """
        Args:
            max_length: largest number of tokens of prompt and answer together.
            max_new_tokens: largest number of tokens of an answer, its end token among them.
        Raises:
            InputError: there is no token that could end an answer.
        """
        assert max_length > 0 and max_new_tokens > 0
        self.tokenizer, self.max_length, self.max_new_tokens = tokenizer, max_length, max_new_tokens
        self.count_anew()
        added = tokenizer.added_tokens_decoder
        self._added = {token.content: (id_, token) for id_, token in added.items() if not token.content.isspace()}
        self._lead, self._after_answer = _around_answer(tokenizer)
        turn_end = _pattern(self._added).search(self._after_answer)
        self._turn_end_id = self._added[turn_end[0]][0] if turn_end else None
        self._trail = self._after_answer[: turn_end.start()] if turn_end else ""
        ends = (self._turn_end_id, tokenizer.eos_token_id)
        self.end_ids = tuple(dict.fromkeys(id_ for id_ in ends if id_ is not None))
        if not self.end_ids:
            raise InputError(
                "the tokenizer has no end token, so no answer would ever end: set its eos_token, or give a chat "
                "template that writes a special token after each answer"
            )
        pads = (tokenizer.pad_token_id, tokenizer.unk_token_id, self.end_ids[-1])
        self.pad_id = next(id_ for id_ in pads if id_ is not None)
        self._ends = _pattern(text for text, (id_, _) in self._added.items() if id_ in self.end_ids)
        controls = [text for text, (id_, token) in self._added.items() if token.special or id_ in self.end_ids]
        self._controls = _pattern(controls)
        self._stand_in = {text: chr(STAND_INS + place) for place, text in enumerate(controls)}
        self._stands_for = {letter: text for text, letter in self._stand_in.items()}
        self._any_stand_in = re.compile(f"[{''.join(self._stands_for)}]" if controls else "(?!)")
        self._never_text = {self._added[text][0] for text in controls}
        if tokenizer.unk_token_id not in self.end_ids:
            self._never_text.discard(tokenizer.unk_token_id)
        self._before_text = _before_text(tokenizer)

    def prompt_ids(self, prompt: str | list[Message]) -> list[int]:
        """What the model is given before it answers.

        Raises:
            LeftOut: it leaves no room for an answer, the template refuses it, or it holds the text of a special token
                and this tokenizer cannot take that as text.
            InputError: a conversation, and there is no chat template to write it.
        """
        return self._prompt_ids(self._asked(prompt), isinstance(prompt, str))

    def answer_ids(self, prompt: str | list[Message], completion: str) -> Tokens:
        """An answer to the prompt, with exactly one end token as the last, unless it is cut.

        Raises:
            LeftOut: as for `prompt_ids`, and for an answer that has no tokens.
            InputError: as for `prompt_ids`, and if the template does not begin an answered conversation as its prompt.
        """
        written = self._written(prompt, completion)
        limit = min(self.max_new_tokens, self.max_length - len(written.prompt_ids))
        ids = [*written.ids, written.end_id]
        odd = {
            "cut": len(ids) > limit,
            "blanks": bool(self._lead + self._trail) and not isinstance(prompt, str),
            "stripped": written.is_stripped,
            "merged": written.is_merged,
            "special text": written.has_special_text,
            "lossy": not self._gives_back(written),
        }
        self.counts.update(name for name, is_so in odd.items() if is_so)
        self.longest = max(self.longest, len(ids))
        return Tokens(ids[:limit], len(ids) > limit)

    def text(self, answer_ids: list[int]) -> str:
        """What an answer says, without the end token; other special tokens that a model drew are shown."""
        return self._decode(answer_ids[:-1] if answer_ids and answer_ids[-1] in self.end_ids else answer_ids)

    def notes(self) -> list[str]:
        """What was counted so far, a line each for people; nothing where nothing occurred."""
        notes = {
            "cut": f"answers cut at --max_new_tokens {self.max_new_tokens} or --max_length {self.max_length}, scored "
            f"without an end token (the longest has {self.longest} tokens)",
            "blanks": f"answers with the chat template's own blanks around them ({self._lead!r} before, {self._trail!r}"
            " behind), scored with those",
            "stripped": "answers from whose ends the chat template takes blanks, scored without those",
            "merged": "answers that melt into their prompt's last token, tokenised by themselves",
            "special text": "answers with a special token's text in them or in their prompt, taken as text",
            "lossy": "answers that the tokenizer does not give back as they were, scored as it reads them",
        }
        return [f"{note}: {self.counts[name]}" for name, note in notes.items() if self.counts[name]]

    def count_anew(self) -> None:
        """Begin the counts again, for other answers."""
        self.counts, self.longest = Counter(), 0

    # From text to text: special tokens' texts in the data are stand-ins, those that are left are the template's own

    def _asked(self, prompt: str | list[Message]) -> str:
        if isinstance(prompt, str):
            return self._hidden(prompt)
        return self._filled(prompt, opens_answer=True)

    def _answered(self, prompt: str | list[Message], completion: str, asked: str) -> tuple[str, str, bool]:
        """What follows the prompt: the answer, blanks at its ends as the template has them; the text of the end token
        behind it, "" where only the tokenizer has one; and whether blanks were taken off.

        Raises:
            LeftOut: the template writes the conversation otherwise than its prompt, or the answer otherwise than it is.
            InputError: it puts something around every answer.
        """
        hidden = self._hidden(completion)
        if isinstance(prompt, str):
            return hidden, "", False
        whole = self._filled([*prompt, {"role": "assistant", "content": completion}], opens_answer=False)
        if not whole.startswith(asked):
            check_template(self.tokenizer)
            raise LeftOut(Bad.REFUSED_BY_TEMPLATE, f"answered, it is written otherwise: {_difference(asked, whole)}")
        answer = whole[len(asked) :]
        end = self._ends.search(answer)
        # Whatever a template writes behind the end, a model that ended its turn never does
        written = answer[: end.start()] if end else answer.removesuffix(self._after_answer)
        if written.strip() != hidden.strip():
            self._refuse_changed(hidden.strip(), written)
        return written, end[0] if end else "", not hidden == written.removeprefix(self._lead).removesuffix(self._trail)

    def _refuse_changed(self, hidden: str, written: str) -> NoReturn:
        """An answer that the template does not write as it is: the generated ones are not changed like that."""
        lead, trail = self._lead.strip(), self._trail.strip()
        if lead + trail and written.strip().removeprefix(lead).removesuffix(trail).strip() == hidden:
            raise _around_every_answer(self._lead, self._trail)
        given, made = self._shown(hidden), self._shown(written.strip())
        place = max(len(os.path.commonprefix([given, made])) - 8, 0)  # with what is alike before it
        raise LeftOut(
            Bad.CHANGED_BY_TEMPLATE,
            f"the answer {given[place : place + 40]!r} is written {made[place : place + 40]!r}: give a template that "
            "writes answers as they are (--chat_template)",
        )

    def _filled(self, messages: list[Message], opens_answer: bool) -> str:
        hidden = [{"role": turn["role"], "content": self._hidden(turn["content"])} for turn in messages]
        return _fill(self.tokenizer, hidden, opens_answer)

    def _hidden(self, text: str) -> str:
        if self._any_stand_in.search(text):
            raise LeftOut(
                Expected.SPECIAL_TOKEN, f"private characters from U+{STAND_INS:X} on cannot be told from stand-ins"
            )
        return self._controls.sub(lambda found: self._stand_in[found[0]], text)

    def _shown(self, text: str) -> str:
        return self._any_stand_in.sub(lambda found: self._stands_for[found[0]], text)

    # From text to tokens and back

    def _prompt_ids(self, asked: str, is_plain: bool) -> list[int]:
        ids = self._before_text * is_plain + self._encode(asked)
        if not ids:
            raise LeftOut(Bad.EMPTY_PROMPT, "it has no tokens")
        if len(ids) >= self.max_length:
            raise LeftOut(
                Expected.PROMPT_TOO_LONG, f"{len(ids)} tokens leave no room for an answer within {self.max_length}"
            )
        return ids

    def _written(self, prompt: str | list[Message], completion: str) -> _Written:
        asked = self._asked(prompt)
        answer, end, is_stripped = self._answered(prompt, completion, asked)
        prompt_ids = self._prompt_ids(asked, isinstance(prompt, str))
        begin = prompt_ids[len(self._before_text) :] if isinstance(prompt, str) else prompt_ids
        ids = self._encode(asked + answer + end)
        is_merged = ids[: len(begin)] != begin
        ids = self._encode(answer + end) if is_merged else ids[len(begin) :]
        # Plain answers, and those of a template without an end token, get the tokenizer's
        end_id = ids.pop() if end else self.end_ids[-1]
        assert end_id in self.end_ids
        if not ids:
            raise LeftOut(Bad.EMPTY_ANSWER, f"the tokenizer makes no tokens of {completion[:80]!r}")
        if any(id_ in self.end_ids for id_ in ids):
            raise LeftOut(
                Expected.SPECIAL_TOKEN, "this tokenizer takes the text of an end token in the answer for the token"
            )
        has_special_text = self._any_stand_in.search(asked + answer) is not None
        return _Written(prompt_ids, ids, end_id, self._shown(answer), is_merged, has_special_text, is_stripped)

    def _encode(self, text: str) -> list[int]:
        """The tokens of a text with stand-ins; special tokens are only those that the template wrote."""
        stand_in = self._any_stand_in.search(text)
        if stand_in is None:
            return _encode(self.tokenizer, text)
        # The pieces between the template's own special tokens, one by one. A tokenizer for which that is not the same
        # as all at once (it puts a space before each piece) shows it on a harmless text.
        harmless = self._any_stand_in.sub("x", text)
        pieces = self._encode_pieces(text)
        if pieces is None or self._encode_pieces(harmless) != _encode(self.tokenizer, harmless):
            raise LeftOut(
                Expected.SPECIAL_TOKEN, f"this tokenizer cannot take {self._stands_for[stand_in[0]]!r} as text"
            )
        return pieces

    def _encode_pieces(self, text: str) -> list[int] | None:
        """None if a special token came out of what is not one."""
        ids: list[int] = []
        start, strips = 0, False
        for found in (*self._controls.finditer(text), None):
            piece = self._shown(text[start : found.start() if found else len(text)])
            id_, token = self._added[found[0]] if found else (None, None)
            piece = piece.lstrip() if strips else piece
            piece = piece.rstrip() if token and token.lstrip else piece
            of_piece = _encode(self.tokenizer, piece, split_special_tokens=True)
            if not self._never_text.isdisjoint(of_piece):
                return None
            ids += of_piece if id_ is None else [*of_piece, id_]
            start, strips = (found.end(), token.rstrip) if found and token else (start, False)
        return ids

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _gives_back(self, written: _Written) -> bool:
        if self._decode(written.ids) == written.text:
            return True
        # By itself a text may lose the space before it, which it has behind its prompt
        return self._decode(written.prompt_ids + written.ids) == self._decode(written.prompt_ids) + written.text


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of what decides the tokens of a text: of the chat template; of the vocabulary, the special tokens and what
    becomes of a few texts."""
    encoded = [_encode(tokenizer, text) for text in (*SAMPLE_TEXTS, *SAMPLE)]
    said = {
        "chat_template": tokenizer.chat_template,
        "tokenizer": [tokenizer.get_vocab(), tokenizer.special_tokens_map, encoded],
    }
    return {
        f"{name}_sha256": hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
        for name, content in said.items()
    }


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, chats: bool) -> list[str]:
    """Whether a tokenizer can serve, once before a run. Returns what is odd about it, a sentence each.

    Args:
        chats: whether the data are conversations.
    Raises:
        InputError: no end token; or conversations, and no chat template that can write them and their prompts alike.
    """
    chat = Chat(tokenizer, max_length=1, max_new_tokens=1)
    found = []
    if chats:
        check_template(tokenizer)
        found += _odd_template(chat)
    given_back = {text: chat._decode(_encode(tokenizer, text, split_special_tokens=True)) for text in SAMPLE_TEXTS}
    changed = [f"{text!r} becomes {back!r}" for text, back in given_back.items() if back != text]
    if changed:
        found.append(f"the tokenizer does not give back every text ({changed[0]}): answers are scored as it reads them")
    return found


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError if there is no chat template, it drops what is said, or writes an answer unlike its prompt."""
    if not tokenizer.chat_template:
        raise InputError(
            "the data are conversations and the tokenizer has no chat template: give a tokenizer with one, a template "
            "with --chat_template, or data of plain prompts and completions"
        )
    try:
        asked, whole = _sample(tokenizer)
    except LeftOut as error:
        raise InputError(f"the chat template cannot write one question and its answer: {error.detail}") from error
    for said, written in ((SAMPLE[0], asked), (SAMPLE[1], whole.removeprefix(asked))):
        if said not in written:
            raise InputError(
                f"the chat template does not write what is said: {said!r} becomes {written!r}; give one with "
                "--chat_template that takes the content of a message as text, and writes it as it is"
            )
    if not whole.startswith(asked):
        raise InputError(
            "the chat template writes a conversation otherwise than the prompt that asks for its answer: "
            f"{_difference(asked, whole)}; answers must be scored behind the prompt that they are drawn to, so give a "
            "template (--chat_template) that writes both alike"
        )


def _odd_template(chat: Chat) -> list[str]:
    found = []
    if chat._turn_end_id is None:
        token = chat.tokenizer.convert_ids_to_tokens(chat.end_ids[-1])
        found.append(f"the chat template writes no special token after an answer: {token!r} is put there")
    if "strftime_now" in str(chat.tokenizer.chat_template):
        pinned = "date_string" in str(chat.tokenizer.chat_template)
        found.append(
            "the chat template may write today's date into prompts: another day gives other prompts"
            + (" (--chat_template_kwargs '{date_string: 26 Jul 2024}' keeps one)" if pinned else "")
        )
    return found


def _around_every_answer(lead: str, trail: str) -> InputError:
    """What is wrong with a template that writes more than the answer between prompt and end token, and what helps."""
    said = [f"{lead!r} before"] * bool(lead.strip()) + [f"{trail!r} behind"] * bool(trail.strip())
    return InputError(
        f"the chat template writes {' and '.join(said)} every real answer, and generated ones do not have it, so it "
        "alone would tell them apart: give a template (--chat_template) that does not, or that writes it behind "
        "add_generation_prompt too, as some do with --chat_template_kwargs '{enable_thinking: false}'"
    )


def with_arguments(template: str | dict[str, str] | None, arguments: Mapping[str, Any]) -> str | dict[str, str]:
    """A chat template whose variables have these values wherever it is filled without others.

    The values become a part of the template, so prompts and conversations, evaluations, other programs and whoever
    loads the tokenizer that a run saves write alike.

    Raises:
        InputError: there is no template, or none of its variables is named so.
    """
    if isinstance(template, dict):
        return {name: _with_arguments(each, arguments) for name, each in template.items()}
    return _with_arguments(template, arguments)


def _with_arguments(template: str | None, arguments: Mapping[str, Any]) -> str:
    if not template:
        raise InputError("--chat_template_kwargs: the tokenizer has no chat template: give one with --chat_template")
    for name, value in arguments.items():
        if not (name.isidentifier() and re.search(rf"\b{name}\b", template)) or name in OWN_NAMES or iskeyword(name):
            raise InputError(
                f"--chat_template_kwargs {name}: the chat template has no variable of this name that may be set: give "
                "one that it reads, such as enable_thinking in Qwen3's"
            )
        # The line's end is taken off by the template's own rules, and its first line stays one
        template = f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}\n{template}"
    return template


def _sample(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A prompt as the template writes it, and the same prompt with its answer. Raises LeftOut if it refuses them."""
    user, assistant = {"role": "user", "content": SAMPLE[0]}, {"role": "assistant", "content": SAMPLE[1]}
    return _fill(tokenizer, [user], True), _fill(tokenizer, [user, assistant], False)


def _fill(tokenizer: PreTrainedTokenizerBase, messages: list[Message], opens_answer: bool) -> str:
    if not tokenizer.chat_template:
        check_template(tokenizer)
    try:
        text = fill_template(
            str(tokenizer.chat_template),
            lambda: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_answer),
        )
    except InputError:
        raise
    except Exception as error:  # of any kind: it is a program of somebody else's
        roles = ", ".join(turn["role"] for turn in messages[:8])
        raise LeftOut(Bad.REFUSED_BY_TEMPLATE, f"turns {roles}: {one_line(error)}") from error
    if (place := broken_character(text)) is not None:
        raise LeftOut(Bad.REFUSED_BY_TEMPLATE, f"the template writes half a character, at {place}, which is no text")
    return text


def _around_answer(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the template writes between the prompt and the last answer, and behind that; "" without a template."""
    if not tokenizer.chat_template:
        return "", ""
    try:
        asked, whole = _sample(tokenizer)
    except LeftOut:
        return "", ""
    before, answer, after = whole.rpartition(SAMPLE[1])
    return before[len(asked) :] if before.startswith(asked) else "", after if answer else ""


def _before_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of all text; what it puts behind it would end the prompt, and is not wanted."""
    bare = _encode(tokenizer, SAMPLE[0])
    whole = tokenizer(SAMPLE[0], verbose=False)["input_ids"]
    places = [place for place in range(len(whole)) if whole[place : place + len(bare)] == bare]
    return list(whole[: places[0]]) if places else []


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])


def _pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """Any of the texts, the longest first; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _difference(asked: str, whole: str) -> str:
    place = len(os.path.commonprefix([asked, whole]))
    return f"{asked[place : place + 40]!r} in the prompt is {whole[place : place + 40]!r} in the conversation"
