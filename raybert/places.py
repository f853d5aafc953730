"""Object storage by its URI, and the folder on this machine that mirrors it: names alone.

Inside raybert every place is a path. That of a mirror says which URI it stands for, so that
`raybert.storage` knows what to bring and where to send it, and errors name the URI.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

SCHEMES = ("s3", "gs")

CACHE = "~/.cache/raybert"
"""Where caches are kept unless RAYBERT_CACHE names another folder."""

HIDDEN = ".raybert-"
"""How names begin of files that are no part of what a folder holds."""

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def is_uri(text: str | Path) -> bool:
    """Whether a text names storage as ``s3://bucket/run`` does."""
    return _URI.match(str(text)) is not None


def checked_uri(text: str) -> str:
    """A URI without a slash at its end.

    Raises:
        ValueError: it names no folder or file in a bucket, or holds what belongs into the
            environment; a secret in it is not repeated.
    """
    found = _URI.fullmatch(text)
    scheme, rest = (found[1].lower(), found[2]) if found else ("", "")
    if scheme not in SCHEMES:
        raise ValueError(
            f"'{scheme}://…' is storage that raybert does not know; it knows s3:// and gs://. "
            "Mount any other and give the path"
        )
    bucket, *parts = rest.rstrip("/").split("/")
    if "@" in bucket or ":" in bucket:
        raise ValueError(
            f"'{scheme}://…' has credentials in it, which recipes and reports would show; give "
            "them in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, "
            "GOOGLE_APPLICATION_CREDENTIALS) or as the machine's role"
        )
    if "?" in rest:
        raise ValueError(
            f"'{scheme}://…?…' has a query, which is not read: give an endpoint with "
            "AWS_ENDPOINT_URL and a region with AWS_REGION"
        )
    strange = [part for part in parts if part in ("", ".", "..") or "\\" in part]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket) or not parts or strange:
        raise ValueError(f"{text!r} names nothing in a bucket; write {scheme}://BUCKET/FOLDER")
    return f"{scheme}://{'/'.join([bucket, *parts])}"


def mirrors() -> Path:
    """The folder of all mirrors on this machine."""
    home = os.environ.get("RAYBERT_CACHE") or CACHE
    return Path(CACHE if is_uri(home) else home).expanduser().absolute() / "mirrors"


def local(place: str | Path) -> Path:
    """The path that stands for a place here: a URI's mirror, or the path itself, absolute.

    Raises:
        ValueError: as `checked_uri`.
    """
    if not is_uri(place):
        return Path(place).expanduser().absolute()
    scheme, _, rest = checked_uri(str(place)).partition("://")
    return mirrors().joinpath(scheme, *rest.split("/"))


def uri_of(path: str | Path, root: Path | None = None) -> str | None:
    """The URI that a path mirrors; nothing where it is a path and no more.

    Args:
        path: absolute.
        root: of the mirrors, where they are another machine's.
    """
    path, root = Path(path), root or mirrors()
    if not path.is_relative_to(root):
        return None
    scheme, *parts = path.relative_to(root).parts or ("",)
    return f"{scheme}://{'/'.join(parts)}" if scheme in SCHEMES and len(parts) > 1 else None


def named(place: str | Path) -> str:
    """A place as recipes and other machines know it: a mirror by its URI."""
    return uri_of(place) or str(place)


def shown(text: object) -> str:
    """A text for the user, in which mirrors are named by their URIs."""
    told = str(text)
    for scheme in SCHEMES:
        told = told.replace(f"{mirrors() / scheme}{os.sep}", f"{scheme}://")
    return told
