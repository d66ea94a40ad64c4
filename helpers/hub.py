"""Whether the Hugging Face hub can be reached, and how its repositories are named. Needs no torch."""

import re

from huggingface_hub import constants
from huggingface_hub.utils import get_session

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def hub_is_reachable() -> bool:
    """Whether the hub answers. One request, since the hub's own client would retry for half a minute."""
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # what it raises changes with the version of the hub's client
        return False
    return True
