"""What to do when the Hub refuses, fails or is out of reach."""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""The base of all errors of the HTTP client that huggingface_hub is built on; releases differ in which it is."""

UPLOAD_ERRORS: tuple[type[Exception], ...] = (TRANSPORT_ERROR, OSError, ValueError)
"""What an upload raises: errors of the HTTP client in use (dropped connections among them), of files, of metadata."""


def explain(error: Exception, repo_id: str | None) -> str:
    """Says in two sentences why an upload failed and how to go on.

    Args:
        error: One of `UPLOAD_ERRORS`.
        repo_id: Where the upload was to go, if that is known.
    """
    target = repo_id or "the Hub"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, OfflineModeIsEnabled):
        return "Offline mode is on. Unset HF_HUB_OFFLINE and do it again."
    if status == 401:
        return (
            f"The Hub does not accept the access token for {target} (401), or there is none. "
            "Log in by `hf auth login`, or set HF_TOKEN to a token with write permission, and do it again."
        )
    if status == 403:
        return (
            f"The access token may not write to {target} (403). Make a token with write permission for that namespace "
            "at https://huggingface.co/settings/tokens, or choose a repository of your own."
        )
    if status == 404:
        return f"There is no {target} that you may see (404). Check the name and the revision; a revision must exist."
    if status in (409, 412):
        return f"Somebody else is changing {target} ({status}). Do it again: it goes on from what is there."
    if status == 413:
        return f"{target} does not take a file of this size (413)."
    if status == 429:
        return "The Hub asks for patience: too many requests (429). Wait a few minutes and do it again."
    if status == 400 or (isinstance(error, ValueError) and "metadata" in str(error).lower()):
        return f"The Hub refuses what it was sent for {target}: see above. `hf-sage card` shows and checks the card."
    if status is not None and status >= 500:
        return f"The Hub failed ({status}). Do it again later: what has arrived in {target} is not sent again."
    if isinstance(error, TRANSPORT_ERROR):
        return (
            f"The connection to {target} failed ({type(error).__name__}). Check the network (and HF_ENDPOINT, if it is "
            "set), and do it again: what has arrived is not sent again."
        )
    return f"The upload to {target} did not succeed. Mend what is said above and do it again."
