"""Fetch published weights: the only command that downloads anything.

Examples:
  python -m dit_jax.download DiT-XL-2-256x256
  python -m dit_jax.download inception-fid --url=https://mirror.example/inception.pth
  python -m dit_jax.download facebook/DiT-XL-2-256 --out=weights

NAME is DiT-XL-2-256x256, DiT-XL-2-512x512, sd-vae-ft-ema, sd-vae-ft-mse, inception-fid, or any repository of the
Hugging Face Hub as owner/name. Files are kept in $XDG_CACHE_HOME/dit_jax (default ~/.cache/dit_jax), repositories in
the Hub's own cache. What is there already is verified, not fetched again. HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE,
HF_ENDPOINT, HF_TOKEN and HF_HUB_DOWNLOAD_TIMEOUT (seconds) mean what they mean to the Hub's own tools.
"""

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from absl import flags

from dit_jax import cli
from dit_jax.checkpoints.published import PUBLISHED, DirectFile, HubRepository, find
from dit_jax.errors import InputError
from dit_jax.files import make_folder

URL = flags.DEFINE_string("url", None, "A mirror: the whole URL of a file; what replaces https://huggingface.co.")
SHA256 = flags.DEFINE_string("sha256", None, "SHA-256 that the file must have, or at least its first 8 digits.")
OUT = flags.DEFINE_string("out", None, "Folder to fetch into, in place of the cache.")

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def main(name: str) -> None:
    published = find(name)
    if published is None:
        raise InputError(f"{name!r} is none of {', '.join(PUBLISHED)}, nor a Hub repository like facebook/DiT-XL-2-256")
    obtain = obtain_file if isinstance(published, DirectFile) else obtain_repository
    for line in obtain(published, URL.value, SHA256.value, OUT.value):
        print(line)


def obtain_file(file: DirectFile, url: str | None, sha256: str | None, out: str | None) -> list[str]:
    """Fetch a direct file, or verify the one that is there; returns what to tell. Raises InputError."""
    if sha256 and not re.fullmatch("[0-9a-f]{8,64}", sha256.lower()):
        raise InputError(f"--sha256={sha256}: expected 8 to 64 hexadecimal digits")
    path = Path(out) / file.path.name if out else file.path
    known = [digits.lower() for digits in (file.sha256, sha256) if digits]
    if path.is_file():
        origin = "already there"
        digest = verify(path, known, "remove it and run the same command again")
    elif offline := offline_variable():
        raise InputError(f"there is no {path} yet and {offline} is set; unset it to download")
    else:
        origin = f"fetched from {url or file.url}"
        digest = fetch(url or file.url, path, known)
    return [f"{path}: {origin}", checksum_line(path.name, digest, known), f"licence {file.licence}"]


def obtain_repository(published: HubRepository, url: str | None, sha256: str | None, out: str | None) -> list[str]:
    """Fetch what a Hub repository has and the cache or `out` lacks; returns what to tell. Raises InputError."""
    from huggingface_hub import constants, errors, metadata_load, snapshot_download
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # the Hub's own bars do not tell the time left
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"bar_format": BAR})

    name, endpoint = published.repository, url or constants.ENDPOINT
    if sha256:
        raise InputError(f"--sha256 is for a single file; those of {name} are checked against the Hub's own checksums")
    if out:
        make_folder(out)
    try:
        ignored = list(published.ignored)
        folder = snapshot_download(name, endpoint=endpoint, local_dir=out, ignore_patterns=ignored, tqdm_class=Bar)
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: {explain(error, endpoint)}") from error
    folder, card = Path(folder), Path(folder, "README.md")
    weights = sorted(path for path in folder.rglob("*") if path.suffix in WEIGHTS)
    if not weights:
        raise InputError(f"{name}: {folder} holds no weights, expected *{', *'.join(WEIGHTS)}; choose another")
    told = [f"{name}: {folder}"]
    for path in weights:
        known = hub_checksum(path)
        digest = verify(path.resolve(), known, "remove it and run the same command again")
        told.append(checksum_line(path.relative_to(folder), digest, known))
    licence = (metadata_load(card) or {}).get("license") if card.is_file() else None
    return [*told, f"licence {licence or published.licence or 'not stated in its model card'}"]


def fetch(url: str, path: Path, known: Sequence[str] = ()) -> str:
    """Fetch a file to `path`, which is there once it is whole and verified; returns its SHA-256.

    Until then `path`.part keeps what has arrived, and the next call goes on from there. Raises InputError if the file
    cannot be fetched or written, or does not have the `known` SHA-256, of which it is enough to give first digits.
    """
    part = make_folder(path.parent) / f"{path.name}.part"
    try:
        with version_kept_beside(part) as version_file:
            receive(url, part, version_file)
            try:
                digest = verify(part, known, f"removed it: {url} has another file or a damaged one, try another --url")
            except InputError:
                part.unlink()
                raise
            os.replace(part, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    return digest


@contextmanager
def version_kept_beside(part: Path) -> Iterator[TextIO]:
    """The file that says which version of the remote file `part` is of: locked, and removed once `part` is gone."""
    path = part.with_name(f"{part.name}.version")
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is fetching {part.with_suffix('')}; wait for it to end") from None
        try:
            yield file
        finally:
            if not part.exists():
                path.unlink()


def receive(url: str, part: Path, version_file: TextIO) -> None:
    """Complete `part`, or start it over if the server cannot go on with the version that it is of."""
    import requests
    from tqdm import tqdm

    version_file.seek(0)
    version, have = version_file.read(), part.stat().st_size if part.exists() else 0
    # From the last byte that is there, not the next: to a request for nothing servers answer with an error.
    response, start, total = ask(url, max(have - 1, 0), version)
    part.touch()
    progress = tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, bar_format=BAR)
    with response, progress, part.open("r+b") as file:
        file.truncate(start)
        file.seek(start)
        if start == 0:
            version = version_of(response)
            version_file.truncate(0)
            version_file.write(version)
            version_file.flush()
        failure = None
        try:
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
                progress.update(len(chunk))
        except requests.RequestException as error:
            failure = error
        arrived = file.tell()
    if failure or (total and arrived < total):
        extent = f"{arrived:,} of {total:,} bytes" if total else f"{arrived:,} bytes"
        then = "goes on from there" if version else "starts over, as the server gives no ETag or date to go on by"
        raise InputError(f"{url} was cut short after {extent}; the same command {then}") from failure


def ask(url: str, start: int = 0, version: str = ""):
    """The server's answer, the byte from which it goes on, and the length of the whole file if the server says it.

    It goes on from `start` if the server still has that version, else from 0. Raises InputError for any other answer.
    """
    import requests
    from huggingface_hub import constants

    headers = {"Accept-Encoding": "identity"}  # positions in a compressed stream are not those in the file
    if start and version:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        response = requests.get(url, headers=headers, stream=True, timeout=timeout)
    except requests.Timeout as error:
        raise InputError(f"no answer from {url} within {timeout} s; HF_HUB_DOWNLOAD_TIMEOUT=60 waits longer") from error
    except (requests.ConnectionError, requests.TooManyRedirects) as error:
        raise InputError(
            f"cannot reach {url} ({root_cause(error)}); check the network, or give a mirror with --url"
        ) from error
    except requests.RequestException as error:
        raise InputError(f"cannot ask for {url} ({error}); expected a URL like https://host/file") from error
    part = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if response.status_code == 206 and part and int(part[1]) == start and version_of(response) == version:
        return response, start, int(part[2])
    if "Range" in headers and response.status_code != 200:
        return ask(url)
    if response.status_code != 200:
        found = f"{response.status_code} {response.reason}"
        raise InputError(f"{url} answers {found}, expected the file; check the URL, or give a mirror with --url")
    length = response.headers.get("Content-Length")
    return response, 0, int(length) if length else None


def version_of(response) -> str:
    """What tells one version of a remote file from the next; "" if the server does not say."""
    return response.headers.get("ETag") or response.headers.get("Last-Modified", "")


def verify(path: Path, known: Sequence[str], remedy: str) -> str:
    """The SHA-256 of a file. Raises InputError unless it begins with all that is `known` of it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    for digits in known:
        if not digest.startswith(digits):
            raise InputError(f"{path} has the SHA-256 {digest}, expected {digits}; {remedy}")
    return digest


def checksum_line(name: str | Path, digest: str, known: Sequence[str]) -> str:
    compared = max(map(len, known), default=0)
    verdict = f"{compared} of 64 digits known and right" if compared else "nothing known to compare it with"
    return f"sha256 {digest} {name} ({verdict})"


def hub_checksum(path: Path) -> list[str]:
    """What the Hub says of a file's SHA-256: its cache names the blobs of large files by it, and links to them."""
    blob = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    return [blob] if re.fullmatch("[0-9a-f]{64}", blob) else []


def explain(error: Exception, endpoint: str) -> str:
    """Why a repository was not fetched, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        if offline := offline_variable():
            return f"it is not whole in the Hub's cache and {offline} is set; unset it to download"
        error = error.__cause__ or error  # the request that failed before the cache was tried
    match error:
        case errors.HFValidationError():
            return f"no name of a Hub repository ({error}); expected one like facebook/DiT-XL-2-256"
        case errors.GatedRepoError():
            return f"{endpoint} asks you to accept its terms there; do so, then `hf auth login`"
        case errors.RepositoryNotFoundError():
            return f"{endpoint} has no such repository, or a private one; check the name, or `hf auth login`"
        case errors.HfHubHTTPError():
            status = f"{error.response.status_code} {error.response.reason_phrase}"
            return f"{endpoint} answers {status}; check the address, or try later"
        case ValueError():
            return f"{endpoint} does not answer as the Hub does ({error}); check --url"
        case OSError(errno=int()):
            return f"cannot keep its files ({error}); choose another folder with --out or HF_HOME"
    return f"cannot fetch from {endpoint} ({root_cause(error)}); check the network and --url; whole files are kept"


def root_cause(error: BaseException) -> str:
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def offline_variable() -> str | None:
    """The environment variable that forbids downloading, as the Hub's tools read it."""
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"


if __name__ == "__main__":
    cli.run(main, arguments=("NAME",))
