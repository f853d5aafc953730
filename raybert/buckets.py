"""The connection to a bucket: its settings, how patient it is, and what its errors say."""

from __future__ import annotations

import errno
import functools
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pyarrow import ArrowException, fs

from raybert.errors import TransientError, UserError

PAUSES = (1.0, 5.0)
"""Seconds before an operation that failed is tried again, beside the libraries' own patience."""

PATIENCE = timedelta(seconds=20)
"""How long Google's library tries by itself; its own limit is a quarter of an hour."""

Returned = TypeVar("Returned")


def settings() -> tuple[str, ...]:
    """What of the environment decides about the connection to S3: endpoint, region."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
    return endpoint, region


@functools.lru_cache
def _connected(scheme: str, bucket: str, settings: tuple[str, ...]) -> fs.FileSystem:
    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=PATIENCE)
    endpoint, region = settings
    options: dict[str, Any] = {}
    if endpoint:
        parts = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        place = parts.netloc + parts.path.rstrip("/")
        options = {"scheme": parts.scheme, "endpoint_override": place}
    elif not region:
        region = fs.resolve_s3_region(bucket)
    options |= {"connect_timeout": 10, "request_timeout": 60, "allow_delayed_open": True}
    return fs.S3FileSystem(region=region or "us-east-1", **options)


def tried(what: str, uri: str, work: Callable[[fs.FileSystem, str], Returned]) -> Returned:
    """What ``work`` returns of a file system and a key in it, after a few tries.

    Args:
        what: what becomes of the URI, as an error says that it could not.
        uri: bucket and key.
        work: may be called again where it failed.

    Raises:
        UserError: none succeeded, or no other could.
    """
    scheme, _, key = uri.partition("://")
    for pause in (*PAUSES, None):
        try:
            return work(_connected(scheme, key.partition("/")[0], settings()), key)
        except (OSError, ArrowException) as error:  # Google's are not the system's
            mend = _mend(scheme, error)
            if pause is None or mend:
                raise (UserError if mend else TransientError)(
                    f"{uri} could not be {what}: {_reason(error)}. "
                    f"{mend or 'Look whether the network and the storage are up'}, and start the "
                    "same command again."
                ) from None
            time.sleep(pause)
    raise AssertionError


def _reason(error: Exception) -> str:
    # Google's library wraps the reason in advice, and repeats it.
    text = " ".join(str(error).split()).split(" error_info=")[0]
    return text.rpartition("The underlying error message was: ")[2].rstrip(".")[:400]


def _mend(scheme: str, error: Exception) -> str:
    """What will not pass by itself, and how to mend it; nothing of what may."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "Make room on this machine, or choose another folder with RAYBERT_CACHE"
    text = str(error).lower().replace("_", "").replace(" ", "")
    if "nosuchbucket" in text or "bucketdoesnotexist" in text or "notfound" in text:
        return "Make the bucket, or mend its name (and AWS_REGION or AWS_ENDPOINT_URL, if set)"
    denied = ("accessdenied", "forbidden", "invalidaccesskey", "signature", "permissiondenied")
    if any(word in text for word in (*denied, "credential", "authenticat", "unauthorized")):
        where = {
            "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role",
            "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account",
        }[scheme]
        return f"Give credentials that may list, read, write and delete there ({where})"
    return ""
