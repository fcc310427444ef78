"""The Hugging Face hub: whether it can be asked, found out in seconds, not by the minutes of its client's retries."""

import threading
import urllib.error
import urllib.request
from functools import cache

SECONDS = 5.0


def why_not() -> str | None:
    """Why the hub can't be asked, in a few words; None if it answers."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return _unreachable(constants.ENDPOINT)


@cache
def _unreachable(address: str) -> str | None:
    """One short try, through the proxy of the environment. A name server may hang, so a thread asks."""
    answer: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS).close()
            answer.append(None)
        except urllib.error.HTTPError:
            answer.append(None)  # a server is there
        except (OSError, ValueError) as error:
            answer.append(f"{address} can't be reached: {getattr(error, 'reason', error)}"[:160])

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answer[0] if answer else f"{address} does not answer within {SECONDS:.0f} s"
