"""Filler: sentences that name no colour and no shape, for prompts whose subject stands among other words."""

import random

TEXT = (
    "the a her his some every this that my our an old new quiet early late long good little door window table paper "
    "letter river morning evening city street garden train music story friend teacher child doctor house room chair "
    "lamp book page coffee bread winter summer weather road bridge station market hotel office camera light shadow "
    "wind rain snow cloud mountain forest island boat harbour animal horse bird dog cat fish tree leaf flower grass "
    "stone wood glass metal cotton wool leather person woman man people crowd voice word name number day week year "
    "hour minute time place thing idea question answer reason plan work game sport ticket money shop lunch dinner "
    "was is had were has been went came saw made took gave found left kept told asked said wrote read walked waited "
    "opened closed carried remembered wanted needed hoped thought knew felt heard watched played moved turned stayed "
    "and or but because when while before after during until with without about from into over under near between "
    "through toward for of to by as not never always often again soon already still almost very quite rather too "
    "please do make sure it should remain tidy simple clean calm careful peculiar ordinary famous certain empty warm "
    "beautiful detailed quality style soft natural sharp focus film lens depth studio scene view"
)
WORDS = TEXT.split()
LETTERS = "eeeetttaaooiinnssrrhhlddcumfpgwybvk"


def sentence(rng: random.Random) -> str:
    """Four to sixteen words, now and then an invented one or a comma."""
    words = []
    for _ in range(rng.randint(4, 16)):
        known = rng.random() < 0.85
        word = rng.choice(WORDS) if known else "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 9)))
        words.append(word + ("," if rng.random() < 0.08 else ""))
    return " ".join(words).rstrip(",").capitalize() + "."


def passage(rng: random.Random, words: int) -> str:
    """Sentences until there are at least so many words."""
    text: list[str] = []
    while sum(s.count(" ") + 1 for s in text) < words:
        text.append(sentence(rng))
    return " ".join(text)


def surrounded(rng: random.Random, prompt: str, words: int) -> str:
    """The prompt as one sentence somewhere in about so many words of filler; a quarter at the very start."""
    before = 0 if rng.random() < 0.25 else round(words * rng.random())
    subject = prompt[0].upper() + prompt[1:] + "."
    return " ".join(part for part in (passage(rng, before), subject, passage(rng, words - before)) if part)
