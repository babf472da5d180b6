"""Whether a Hugging Face name can be loaded, asked once and answered within seconds.

``from_pretrained`` without a network retries each of a handful of files, and its error does not say
where it looked. Here a name that is neither a folder nor in the cache costs one request.
"""

from __future__ import annotations

import threading
from pathlib import Path

from lightning_align._errors import argument_error

TIMEOUT_S = 8.0  # for the whole question; resolving the host's name is not bounded by the client

# One of these is in the cache once a model or a tokenizer has been loaded.
INDEX_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")


def resolve_pretrained(where: str, argument: str, name: str, revision: str = "main") -> str:
    """Return ``name`` if it is a folder, or a hub name that is cached or known to the hub.

    Args:
        where: Class or function the user called.
        argument: Name of the argument that holds ``name``.
        name: A folder, or a name on the Hugging Face hub.
        revision: Branch, tag or commit of a hub name.

    Raises:
        ValueError: If there is no such folder and the name is neither cached nor found on the hub.
    """
    if Path(name).expanduser().is_dir():
        return name
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = [try_to_load_from_cache(name, file, revision=revision) for file in INDEX_FILES]
    except HFValidationError:
        rule = "is neither a folder nor a name that the Hugging Face hub could have"
        raise argument_error(where, argument, name, rule) from None
    if any(isinstance(path, str) for path in cached):
        return name
    not_cached = f"is neither a folder nor in the cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        rule = f"{not_cached}, and HF_HUB_OFFLINE forbids to ask the hub"
        way_out = "Give a local folder, or unset HF_HUB_OFFLINE"
        raise argument_error(where, argument, name, rule, way_out)
    problem = ask_hub("model", name, revision)
    if problem is not None:
        way_out = "Give a local folder, or fill the cache while online (then set HF_HUB_OFFLINE=1)"
        raise argument_error(where, argument, name, f"{not_cached}, and {problem}", way_out)
    return name


def ask_hub(kind: str, name: str, revision: str = "main") -> str | None:
    """What stands against loading ``name`` from the hub, or None; answered within ``TIMEOUT_S``.

    Args:
        kind: ``model`` or ``dataset``.
        name: Name on the hub.
        revision: Branch, tag or commit.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    answers: list[str | None] = []

    def ask() -> None:
        try:
            info = HfApi().model_info if kind == "model" else HfApi().dataset_info
            info(name, revision=revision, timeout=TIMEOUT_S)
            answers.append(None)
        except RepositoryNotFoundError:
            answers.append(f"the hub has no such {kind}, or none that your token may read")
        except HfHubHTTPError as error:
            answers.append(f"the hub refused ({error})")
        except Exception as error:
            # Every HTTP client has its own exceptions; whichever it is, the hub did not answer.
            answers.append(f"the hub could not be reached ({type(error).__name__}: {error})")

    # A daemon, because a name server that never answers must not hold up the end of the process.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    return answers[0] if answers else f"the hub did not answer within {TIMEOUT_S:.0f} s"
