"""Requests to the Hub, with huggingface_hub's session, authentication and errors.

Loaded by its path into the fetcher's process, it imports nothing of this package.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

MAX_LISTING_BYTES = 32 << 20
MAX_FAILURES = 6  # in a row, without a byte in between
LISTING_TRIES = 4  # fewer: nothing has been downloaded yet, and a caller waits for the answer
MAX_BACKOFF_S = 8.0
CONNECT_S = 10.0
READ_S = 20.0


class Failed(Exception):
    """Ends the program, unless it is transient; `members` are those of the parent's `Problem`."""

    def __init__(
        self, category: str, message: str, *, is_transient: bool = False, **members: Any
    ) -> None:
        super().__init__(message)
        self.is_transient = is_transient
        self.members: dict[str, Any] = {"category": category, "message": message, **members}


class Hub:
    """The Hub, or a mirror of it; `waits` is called with the reason before a try is repeated."""

    def __init__(self, setup: dict[str, Any], waits: Callable[[str], object]) -> None:
        import huggingface_hub
        from huggingface_hub import constants, errors, utils

        self._setup, self._waits = setup, waits
        self._lib, self._errors = huggingface_hub, errors
        self._endpoint = constants.ENDPOINT
        self.max_file_bytes: int = getattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 50 << 30)
        try:
            self._session = huggingface_hub.get_session()
        except Exception as error:  # the proxies of the environment are read here
            raise _unusable_proxy(error) from error
        self._http = sys.modules[type(self._session).__module__.partition(".")[0]]
        headers = utils.build_hf_headers(  # type: ignore[attr-defined]
            token=setup["token"], library_name="llama-orchestrator"
        )
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self._raise_for_status = utils.hf_raise_for_status  # type: ignore[attr-defined]
        part_s = setup["stall_timeout_s"] / 10  # so that further tries come before the stall
        self._timeout = self._http.Timeout(min(CONNECT_S, part_s), read=min(READ_S, part_s))

    def listing(self) -> Any:
        """Return repo, commit and model files: name to size and etag (SHA-256 or git's hash)."""
        url = f"{self._endpoint}/api/models/{self._setup['repo']}"
        if (revision := self._setup["revision"]) is not None:
            url += f"/revision/{quote(revision, safe='')}"
        return self._retried(lambda: self._listing(f"{url}?blobs=true"))

    def check_access(self, repo: str, commit: str, name: str) -> None:
        """Ask for a file's headers: a gated repo lists its files for everyone."""
        url = self._lib.hf_hub_url(repo, name, revision=commit)

        def head() -> None:  # the CDN is asked when the bytes are fetched
            with self._stream("HEAD", url, follow_redirects=False) as response:
                if response.status_code >= 400:
                    self._raise_for_status(response)

        self._retried(head)

    def size_and_etag(self, job: dict[str, Any], name: str) -> tuple[Any, Any]:
        """Ask for what the listing of a mirror may lack; the body is not read."""
        url = self._lib.hf_hub_url(job["repo"], name, revision=job["commit"])

        def get() -> tuple[Any, Any]:
            with self._stream("GET", url) as response:
                self._raise_for_status(response)
                _refuse_html(response)
                answers = (*response.history, response)
                sizes = [answer.headers.get("X-Linked-Size") for answer in answers]
                size = next(filter(None, sizes), response.headers.get("Content-Length", ""))
                etag = next(filter(None, map(_linked_etag, answers)), _etag(response, "ETag"))
                return int(size) if size.isdigit() else None, etag

        found: tuple[Any, Any] = self._retried(get)
        return found

    def _retried(self, request: Callable[[], Any]) -> Any:
        failures, most = 0, self._setup["listing_tries"] or LISTING_TRIES
        while True:
            try:
                return request()
            except Exception as error:  # noqa: BLE001 (each library's own; `explain` sorts them)
                failures += 1
                self.wait(self.explain(error), failures, most)

    def wait(self, failed: Failed, failures: int, most: int = MAX_FAILURES) -> None:
        """Wait after so many failures in a row; raise the last, and any that is not transient."""
        patience_s, wait_s = self._setup["stall_timeout_s"], failed.members.get("retry_after_s")
        is_last = failures >= most or (wait_s or 0) >= patience_s
        if is_last or not failed.is_transient:
            raise failed
        if wait_s is None:
            wait_s = min(0.25 * 2**failures, MAX_BACKOFF_S, patience_s / 12)
        self._waits(failed.members["message"])
        time.sleep(wait_s)

    def _listing(self, url: str) -> dict[str, Any]:
        text, files = bytearray(), {}
        with self._stream("GET", url) as response:
            self._raise_for_status(response)
            _refuse_html(response)
            for chunk in response.iter_bytes():
                text += chunk
                if len(text) > MAX_LISTING_BYTES:
                    raise _unusable(f"a listing of more than {MAX_LISTING_BYTES >> 20} MiB")
        try:
            info = json.loads(text)
            for file in info["siblings"]:
                if (name := file["rfilename"]).lower().endswith(".gguf"):
                    lfs = file.get("lfs") or {}
                    etag = lfs.get("sha256") if lfs else file.get("blobId")
                    size = file.get("size")
                    files[name] = lfs.get("size") if size is None else size, etag
            return {"repo": info["id"], "commit": info["sha"], "files": files}
        except ValueError as error:
            raise _unusable(str(error), is_transient=True) from error
        except (AttributeError, KeyError, TypeError) as error:
            raise _unusable(f"{type(error).__name__}: {error}") from error

    def _stream(self, method: str, url: str, **more: Any) -> Any:
        about = {"headers": self._headers, "follow_redirects": True, "timeout": self._timeout}
        return self._session.stream(method, url, **{**about, **more})

    @contextlib.contextmanager
    def body(self, repo: str, commit: str, file: Any, start: int) -> Iterator[Any]:
        """Request a file from a byte on; yield the response, its body unread."""
        url = self._lib.hf_hub_url(repo, file.name, revision=commit)
        headers = {**self._headers, **({"Range": f"bytes={start}-"} if start else {})}
        with self._stream("GET", url, headers=headers) as response:
            if response.status_code != 416:
                self._raise_for_status(response)
            _refuse_html(response)
            if {*map(_linked_etag, (*response.history, response))} - {"", file.etag}:
                raise _changed(file.name)
            yield response

    def fetch_whole(self, repo: str, commit: str, name: str) -> None:
        """Leave a file to the library: over 50 GB the Hub serves it by Xet only."""
        token, cache = self._setup["token"], self._setup["cache_dir"]
        try:
            self._lib.hf_hub_download(repo, name, revision=commit, token=token, cache_dir=cache)
        except Exception as error:
            raise self.explain(error) from error

    def explain(self, error: Exception) -> Failed:
        """Return the failure that an error of any of the libraries means."""
        if isinstance(error, Failed):
            return error
        if isinstance(error, (self._http.LocalProtocolError, UnicodeEncodeError)):
            message = "the token has characters that HTTP headers cannot carry: check hf_token"
            return Failed("hub_unauthorized", message, field="hf_token")
        if isinstance(error, self._http.RequestError):
            return unreachable(error)
        if isinstance(error, OSError) and error.errno is not None:
            raise error  # of the disk, not of the Hub
        for kind, category, field, message in self._meanings():
            if isinstance(error, kind):
                return Failed(category, message, field=field)
        if (response := getattr(error, "response", None)) is not None:
            return self._failed_by_status(response)
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return Failed("hub_error", f"the Hub cannot be used ({what})")

    def _failed_by_status(self, response: Any) -> Failed:
        status, wait_s = response.status_code, _retry_after(response.headers)
        is_hub = str(response.url).startswith(self._endpoint)  # else its CDN: a retry has new links
        if status in {401, 403} and is_hub:
            message = f"the Hub refused {self._setup['repo']} (status {status}): check hf_token"
            return Failed("hub_unauthorized", message, field="hf_token")
        if status == 429:
            message = "the Hub received too many requests: wait, or give hf_token"
            return Failed("hub_rate_limited", message, is_transient=True, retry_after_s=wait_s)
        is_transient = status in {408, 425} or status >= 500 or not is_hub
        message = f"the Hub failed with status {status}: try again later"
        return Failed("hub_unreachable", message, is_transient=is_transient, retry_after_s=wait_s)

    def _meanings(self) -> tuple[tuple[type[Exception], str, str, str], ...]:
        """Errors of the library, specific ones first: class, category, field, message."""
        errors, repo = self._errors, self._setup["repo"]
        token = "what hf_token may read" if "authorization" in self._headers else "give hf_token"
        gone, gated = "model_not_found", "hub_gated"
        terms = f"accept its terms at {self._endpoint}/{repo}, then give hf_token"
        unknown = f"{repo} has no revision {self._setup['revision']!r}: check revision"
        moved = f"{repo} has just changed on the Hub: load it again"
        missing = f"{repo} does not exist on the Hub, or is private: check its name, or {token}"
        return (
            (errors.GatedRepoError, gated, "hf_token", f"{repo} is gated: {terms}"),
            (errors.RevisionNotFoundError, gone, "revision", unknown),
            (errors.EntryNotFoundError, gone, "model_path", moved),
            (errors.RepositoryNotFoundError, gone, "model_path", missing),
            (errors.HFValidationError, gone, "model_path", f"{repo} is not a valid repo id"),
        )


def _etag(response: Any, header: str) -> str:
    return str(response.headers.get(header, "")).removeprefix("W/").strip('"')


def _linked_etag(response: Any) -> str:
    return _etag(response, "X-Linked-ETag")


def starts_at(response: Any, name: str, file_size: int) -> int:
    """Return where in the file the body of a response begins; -1 if it does not say."""
    start, size = 0, response.headers.get("Content-Length")
    if response.status_code != 200:
        text = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", text)
        if response.status_code != 206 or found is None:
            return -1
        start, size = int(found[1]), found[2]
    if size not in {None, "*", str(file_size)}:
        raise _changed(name)
    return start


def _refuse_html(response: Any) -> None:
    if "html" in response.headers.get("Content-Type", ""):
        message = "a web page was received instead of the Hub's answer: sign in to the proxy first"
        raise Failed("hub_unreachable", message, reason="not_the_hub")


def unreachable(error: Exception | str) -> Failed:
    why = (str(error) or type(error).__name__).splitlines()[0][:200]
    if "CERTIFICATE" in why or "SSL" in why or "TLS" in why:
        message = f"the Hub's certificate is not trusted ({why}): check clock, proxy, SSL_CERT_FILE"
        return Failed("hub_unreachable", message, reason="tls")
    message = f"the Hub cannot be reached ({why}): check the network, or try again"
    return Failed("hub_unreachable", message, is_transient=True)


def _unusable_proxy(error: Exception) -> Failed:
    """Say which variable is to blame; its value may contain a password."""
    names = [n for name in ("https_proxy", "http_proxy", "all_proxy") for n in (name, name.upper())]
    given = [name for name in names if os.environ.get(name)]
    odd = [name for name in given if not re.match(r"(?i)https?://[^/\[]", os.environ[name])]
    where = " or ".join(odd or given) or "the environment"
    what = "a proxy that the Hub's client cannot use: correct or unset it"
    if isinstance(error, ImportError):
        what = "a SOCKS proxy, for which the package socksio is missing: install it, or unset it"
    return Failed("hub_unreachable", f"{where} names {what}", reason="proxy")


def _unusable(why: str, *, is_transient: bool = False) -> Failed:
    message = f"the Hub's answer cannot be used ({why[:200]}): try again later"
    return Failed("hub_unreachable", message, is_transient=is_transient)


def _changed(name: str) -> Failed:
    return Failed("hub_corrupt", f"{name} has changed since the Hub listed it: load it again")


def _retry_after(headers: Any) -> float | None:
    """Source: RFC 9110, section 10.2.3; the Hub also sends it in `RateLimit`."""
    text = headers.get("Retry-After", "").strip()
    limit = re.search(r"\bt=(\d{1,7})", headers.get("RateLimit", ""))
    if found := re.fullmatch(r"(\d{1,7})", text) or limit:
        return float(found[1])
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None
