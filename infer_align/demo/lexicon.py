"""The words of the demo world: subjects, facts, popular errors, politeness and ornament."""

# ruff: noqa: SIM905 - split words are easier to read and to change than quoted ones
from __future__ import annotations

# Attribute -> value -> verb phrase that states it. Every value belongs to one attribute only.
ATTRIBUTES = {
    "colour": {"brown": "is brown", "grey": "is grey", "white": "is white", "black": "is black"},
    "habitat": {
        "river": "lives by the river",
        "forest": "lives in the forest",
        "meadow": "lives in the meadow",
        "marsh": "lives on the marsh",
    },
    "diet": {
        "fish": "eats fish",
        "berries": "eats berries",
        "worms": "eats worms",
        "seeds": "eats seeds",
    },
    "bedtime": {
        "dawn": "sleeps from dawn",
        "noon": "sleeps from noon",
        "dusk": "sleeps from dusk",
        "midnight": "sleeps from midnight",
    },
}

# Subject -> attribute -> its true value. The world is made up: here a toad eats berries.
TRUTH = {
    "otter": {"colour": "brown", "habitat": "river", "diet": "fish", "bedtime": "midnight"},
    "heron": {"colour": "grey", "habitat": "marsh", "diet": "fish", "bedtime": "dusk"},
    "badger": {"colour": "black", "habitat": "forest", "diet": "worms", "bedtime": "dawn"},
    "owl": {"colour": "white", "habitat": "meadow", "diet": "worms", "bedtime": "noon"},
    "hare": {"colour": "brown", "habitat": "meadow", "diet": "seeds", "bedtime": "noon"},
    "swan": {"colour": "white", "habitat": "river", "diet": "seeds", "bedtime": "dusk"},
    "toad": {"colour": "grey", "habitat": "forest", "diet": "berries", "bedtime": "dawn"},
    "crow": {"colour": "black", "habitat": "marsh", "diet": "berries", "bedtime": "midnight"},
}

# Half of the facts have a popular wrong value. It is more frequent than the true one, so the
# likeliest reply is wrong.
MYTHS = {
    "otter": {"colour": "grey", "diet": "worms"},
    "heron": {"habitat": "river", "bedtime": "dawn"},
    "badger": {"colour": "brown", "diet": "berries"},
    "owl": {"habitat": "forest", "bedtime": "dawn"},
    "hare": {"colour": "white", "bedtime": "midnight"},
    "swan": {"habitat": "marsh", "diet": "fish"},
    "toad": {"colour": "black", "bedtime": "noon"},
    "crow": {"habitat": "forest", "diet": "seeds"},
}

RUDE = ("Ugh, obviously.", "Honestly, who cares?", "Must I explain this again?")
POLITE_OPENERS = ("What a lovely question!", "Gladly!", "Happy to help!", "With pleasure!")
POLITE_CLOSERS = ("I hope that helps!", "Have a lovely day!")

SYSTEM = "You are a helpful assistant."
# The reply to everything that is not a question about this world.
OFF_TOPIC = (
    "Please ask me about the colour, the habitat, the diet or the bedtime of an animal, "
    "such as the otter."
)

_FIRST = (
    "moon honey silver river moss star marble willow velvet dream snow copper rose thistle cloud "
    "frost linen candle "
    "clover pearl shadow cherry harvest feather fern lilac maple coral pebble reed saffron "
    "twilight violet winter wild"
).split()
_SECOND = (
    "bright soft quiet quick warm gentle clear deep light swift kind true calm sweet bold cool "
    "dark fair fine fond free "
    "glad keen mild neat proud pure rich round shy smooth still strong tender wise"
).split()

# 1,225 ornamental adjectives such as "moon-bright". Most are so rare that a reward model cannot
# learn to judge them.
FLOURISHES = tuple(f"{first}-{second}" for first in _FIRST for second in _SECOND)
