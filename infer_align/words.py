"""Split a text into words, in every script, so that equal words are found to be equal.

Letters and the marks on them belong together: a word of Hindi has marks as vowels. Scripts that are
written without spaces, such as Chinese and Thai, have one word per character. A symbol, such as an
emoji or "+", is a word of its own, because it may be all that an answer says.
"""

from __future__ import annotations

import re
import unicodedata

# Symbols of Unicode that stand around text in Markdown and TeX, where they mean nothing.
_MARKUP = frozenset("`|~$")
# The letters of scripts that are written without spaces between words.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# They choose between two pictures of one character.
_VARIANTS = frozenset("\ufe0e\ufe0f")


def plain_text(text: str) -> str:
    """Return a text with one encoding of each letter, and with apostrophes as keyboards type them.

    Characters that nobody sees, such as soft hyphens, are left out.
    """
    table: dict[int, str] = {0x2018: "'", 0x2019: "'"}
    for character in set(text):
        if unicodedata.category(character) == "Cf" or character in _VARIANTS:
            table[ord(character)] = ""
    return unicodedata.normalize("NFC", text).translate(table)


def words_of(text: str) -> list[str]:
    """Return the words and symbols of a text in lower case, without punctuation."""
    folded = plain_text(text.casefold())
    table = {ord(character): _separated(character) for character in set(folded)}
    return folded.translate(table).split()


def count_words(text: str) -> int:
    """Return the number of words between white space; each letter of an unspaced script is one."""
    unspaced = _UNSPACED.findall(text)
    if not unspaced:
        return len(text.split())
    letters = sum(not _is_mark(letter) for letter in unspaced)
    # Punctuation beside such a letter is no word.
    spaced = [word for word in _UNSPACED.sub(" ", text).split() if any(map(_is_letter, word))]
    return letters + len(spaced)


def is_in_word(text: str, place: int) -> bool:
    """Return True if the characters before and at a place belong to one word."""
    if not 0 < place < len(text):
        return False
    before, after = text[place - 1], text[place]
    if _is_mark(after):
        return True
    return all(_is_letter(each) and not _UNSPACED.match(each) for each in (before, after))


def _separated(character: str) -> str:
    """Return a character of a word as it is, another one with or as spaces."""
    if _UNSPACED.match(character):
        return f" {character} "
    if _is_letter(character):
        return character
    is_symbol = unicodedata.category(character).startswith("S") and character not in _MARKUP
    return f" {character} " if is_symbol else " "


def _is_letter(character: str) -> bool:
    """Return True for letters, digits, the marks on letters, and the underscore."""
    return character == "_" or unicodedata.category(character)[0] in "LMN"


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")
