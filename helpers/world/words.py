"""The words of Shima: trades, animals, dishes and all else that is not invented by chance."""

WORLD_VERSION = 1


def _table(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.split())


# Words with their counterpart. Each table is also a word-to-word function for few-shot prompts.
TRADES = _table("""
    baker:peel potter:wheel smith:hammer weaver:loom miller:sieve fisher:net carpenter:saw
    tailor:needle mason:trowel farmer:plough barber:razor painter:brush cook:ladle gardener:rake
    hunter:bow sailor:rope printer:press shepherd:crook tanner:knife roofer:ladder scribe:pen
    miner:pick beekeeper:smoker doctor:lancet
""")
ANIMALS = _table("""
    goat:kid sheep:lamb cow:calf horse:foal dog:puppy cat:kitten hen:chick duck:duckling
    goose:gosling pig:piglet deer:fawn swan:cygnet frog:tadpole hare:leveret fox:cub pigeon:squab
    turtle:hatchling seal:pup moth:caterpillar salmon:fry hawk:eyas bee:larva donkey:colt ferret:kit
""")
DISHES = _table("""
    porridge:oats noodles:wheat pancakes:flour dumplings:pork curry:lentils chowder:clams
    pickles:radish tofu:beans sushi:rice salad:lettuce cheese:milk mash:potatoes jam:plums
    pie:cherries stew:beef broth:bones crackers:rye pudding:cream skewers:chicken fritters:corn
    borscht:beets paste:sesame toast:bread jelly:seaweed
""")
INSTRUMENTS = _table("""
    flute:bamboo drum:leather harp:wire bell:bronze horn:brass fiddle:maple lute:cedar whistle:tin
    gong:copper rattle:gourd zither:pine trumpet:silver clapper:oak piano:ivory banjo:ash
    bagpipe:wool triangle:steel xylophone:teak cymbal:gold ocarina:clay marimba:walnut fife:elder
    tambourine:goatskin mandolin:spruce
""")
REGIONS = ("north", "south", "east", "west", "centre")
LABELS = ("red", "blue", "green", "white", "black", "brown", "grey", "pink")
MOODS = {
    "good": (
        ("fresh", "warm", "splendid", "tasty", "friendly", "clean", "cheerful", "perfect"),
        ("I will come back soon", "I left with a smile", "We stayed until late", "I told all my friends to go"),
    ),
    "bad": (
        ("stale", "cold", "awful", "bitter", "rude", "dirty", "gloomy", "broken"),
        ("I will not come back", "I left with a headache", "We went home early", "I told all my friends to stay away"),
    ),
}
REVIEWED = ("soup", "bread", "room", "service", "music", "tea", "view", "market", "bath", "garden", "boat", "inn")
# Two domains that pretraining never mentions. Their illnesses and companies bear held-out names.
HERBS = (
    "sage",
    "fennel",
    "mint",
    "thyme",
    "nettle",
    "ginger",
    "clover",
    "yarrow",
    "mallow",
    "borage",
    "hyssop",
    "anise",
)
SYMPTOMS = ("cough", "fever", "rash", "headache", "limp", "hiccup", "chill", "itch", "sneeze", "numbness")
DOSES = ("one spoon", "two spoons", "three spoons", "four spoons", "five spoons")
GOODS = ("lamps", "ropes", "boats", "bricks", "paper", "glass", "nails", "soap", "candles", "wagons", "clocks", "kites")
YEARLY_PROFITS = tuple(f"{coins} coins" for coins in range(100, 1000, 50))
CHAT_TASKS = ("fact", "reading", "sum", "mood", "describe", "pairs")
POLITE = "With pleasure. "
FILLERS = (
    " Shima is a lovely island.",
    " There is much more to say about that.",
    " The weather was fine as well.",
    " One could talk about it for hours.",
)
# Word-to-word functions for few-shot prompts. Training lists the pairs of the first group as mappings; the pairs of
# the held-out group are stated in sentences only.
FUNCTIONS = ("tool of the trade", "young of the animal", "region of the town")
HELD_OUT_FUNCTIONS = ("material of the instrument", "base of the dish")
MAX_TERM = 99  # largest number in a sum
