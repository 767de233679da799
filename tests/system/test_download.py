"""The download command against real servers on this machine: what it keeps, what it refuses, what it never does."""

import hashlib
import http.server
import json
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from commands import refuses, succeeds
from huggingface_hub import constants

from dit_jax.checkpoints.published import PUBLISHED, HubRepository, find, locate
from dit_jax.download import fetch, obtain_repository
from dit_jax.errors import InputError

CONTENT = bytes(range(256)) * 2000
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/tiny-dit"


@dataclass
class Page:
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


class Site(http.server.ThreadingHTTPServer):
    """A web server of a few pages, good or bad at being one."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.pages: dict[str, Page] = {}
        self.requests: list[tuple[str, str | None]] = []
        """Path and Range of each request."""
        self.cut_after: int | None = None
        self.knows_range = self.knows_if_range = True


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site, asked = self.server, self.headers["Range"]
        site.requests.append((self.path, asked))
        page = site.pages.get(self.path.partition("?")[0], Page(b"", status=404))
        start, headers, status = 0, dict(page.headers), page.status
        same = self.headers["If-Range"] in (None, page.headers.get("ETag")) or not site.knows_if_range
        if asked and site.knows_range and same:
            start, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(page.body) - 1}/{len(page.body)}"
        if start >= len(page.body) > 0:
            status, headers["Content-Range"] = 416, f"bytes */{len(page.body)}"
        body = page.body[start:]
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: site.cut_after])
            self.close_connection = True

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Site() as server:
        server.pages["/file.pt"] = Page(CONTENT, {"ETag": '"first"'})
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Caches of our own, for this process and those that it starts."""
    for variable in [name for name in os.environ if name.startswith("HF_")] + ["TRANSFORMERS_OFFLINE"]:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub" / "hub"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def cut(site: Site, path: Path, after: int) -> None:
    """Have `after` bytes of the file arrive."""
    site.cut_after = after
    with pytest.raises(InputError, match="cut short"):
        fetch(f"{site.url}/file.pt", path)
    site.cut_after = None
    site.requests.clear()


def test_a_file_is_fetched_once_and_then_only_verified(site, tmp_path):
    first = succeeds("download", "DiT-XL-2-256x256", f"--url={site.url}/file.pt")
    second = succeeds("download", "DiT-XL-2-256x256", HF_HUB_OFFLINE="1")
    path = tmp_path / "cache" / "dit_jax" / "DiT-XL-2-256x256.pt"
    assert path.read_bytes() == CONTENT and locate("DiT-XL-2-256x256") == path
    assert len(site.requests) == 1
    assert f"{path}: fetched from {site.url}" in first.stdout and f"{path}: already there" in second.stdout
    for result in (first, second):
        assert sha256(CONTENT) in result.stdout and "licence CC BY-NC 4.0" in result.stdout
    assert "100%" in first.stderr and "B/s]" in first.stderr


def test_a_damaged_file_in_the_cache_is_not_passed_off_as_good(tmp_path):
    (tmp_path / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"damaged")
    refuses("expected 6726825d; remove it", "download", "inception-fid", f"--out={tmp_path}")


def test_a_wrong_checksum_leaves_nothing(site, tmp_path):
    refuses(
        "expected 6726825d; removed it",
        "download",
        "inception-fid",
        f"--url={site.url}/file.pt",
        f"--out={tmp_path / 'out'}",
    )
    with pytest.raises(InputError, match=f"expected {'0' * 64}"):
        fetch(f"{site.url}/file.pt", tmp_path / "out" / "a.pt", ["0" * 64])
    assert not list((tmp_path / "out").iterdir())


def test_a_given_checksum_is_compared_whatever_its_case(site, tmp_path):
    flags = [f"--url={site.url}/file.pt", f"--out={tmp_path}", f"--sha256={sha256(CONTENT).upper()}"]
    assert "64 of 64 digits known and right" in succeeds("download", "DiT-XL-2-512x512", *flags).stdout


def test_a_transfer_cut_short_has_no_final_name_and_goes_on_from_there(site, tmp_path):
    path = tmp_path / "DiT-XL-2-256x256.pt"
    site.cut_after = 300_000
    told = "of 512,000 bytes; the same command goes on from there"
    refuses(told, "download", "DiT-XL-2-256x256", f"--url={site.url}/file.pt", f"--out={tmp_path}")
    assert not path.exists()
    have = path.with_suffix(".pt.part").stat().st_size
    assert 200_000 < have <= 300_000
    site.cut_after = None
    assert fetch(f"{site.url}/file.pt", path) == sha256(CONTENT)
    assert [asked for _, asked in site.requests] == [None, f"bytes={have - 1}-"]
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]


def test_a_partial_file_that_is_whole_only_lacks_its_name(site, tmp_path):
    cut(site, tmp_path / "a.pt", 300_000)
    (tmp_path / "a.pt.part").write_bytes(CONTENT)  # as if killed before it was renamed
    assert fetch(f"{site.url}/file.pt", tmp_path / "a.pt") == sha256(CONTENT)
    assert site.requests == [("/file.pt", "bytes=511999-")]


@pytest.mark.parametrize("length", [100_000, 400_000])
@pytest.mark.parametrize("knows_if_range", [True, False])
def test_a_file_is_never_spliced_from_two(site, tmp_path, length, knows_if_range):
    cut(site, tmp_path / "a.pt", 300_000)
    other = CONTENT[::-1][:length]
    site.pages["/file.pt"], site.knows_if_range = Page(other, {"ETag": '"second"'}), knows_if_range
    fetch(f"{site.url}/file.pt", tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == other
    assert len(site.requests) == (1 if knows_if_range else 2)


def test_a_server_that_ignores_range_sends_all_of_it_again(site, tmp_path):
    cut(site, tmp_path / "a.pt", 300_000)
    site.knows_range = False
    assert fetch(f"{site.url}/file.pt", tmp_path / "a.pt") == sha256(CONTENT)


def test_without_a_version_a_file_is_started_over(site, tmp_path):
    site.pages["/file.pt"].headers.clear()
    site.cut_after = 1000
    with pytest.raises(InputError, match="starts over"):
        fetch(f"{site.url}/file.pt", tmp_path / "a.pt")
    site.cut_after = None
    assert fetch(f"{site.url}/file.pt", tmp_path / "a.pt") == sha256(CONTENT)
    assert site.requests == [("/file.pt", None)] * 2


def test_a_file_that_is_being_fetched_is_not_fetched_twice(site, tmp_path):
    refused = []

    class Meanwhile(Handler):
        def do_GET(self):
            if self.server.requests == []:
                self.server.requests.append((self.path, None))
                with pytest.raises(InputError) as caught:
                    fetch(f"{site.url}/file.pt", tmp_path / "a.pt")
                refused.append(str(caught.value))
            super().do_GET()

    site.RequestHandlerClass = Meanwhile
    assert fetch(f"{site.url}/file.pt", tmp_path / "a.pt") == sha256(CONTENT)
    assert len(refused) == 1 and "another process is fetching" in refused[0]


def test_no_answer_no_server_no_file_and_no_folder_are_one_line_each(site, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file.pt"
        refuses("within 1 s", "download", "DiT-XL-2-256x256", f"--url={url}", HF_HUB_DOWNLOAD_TIMEOUT="1")
    for told, address in (("Connection refused", url), ("404 Not Found", f"{site.url}/a.pt"), ("https://", "a.pt")):
        with pytest.raises(InputError, match=told):
            fetch(address, tmp_path / "a.pt")
    with pytest.raises(InputError, match="cannot write to the folder"):
        fetch(f"{site.url}/file.pt", Path("/proc/none/a.pt"))
    assert not list(tmp_path.glob("a.pt*"))


def test_offline_variables_forbid_fetching(site):
    refuses(
        "TRANSFORMERS_OFFLINE is set",
        "download",
        "DiT-XL-2-256x256",
        f"--url={site.url}/file.pt",
        TRANSFORMERS_OFFLINE="1",
    )
    refuses("HF_HUB_OFFLINE is set", "download", REPOSITORY, f"--url={site.url}", HF_HUB_OFFLINE="1")
    assert not site.requests


def test_a_wrong_name_and_a_wrong_checksum_are_refused():
    refuses("'DiT' is none of DiT-XL-2-256x256,", "download", "DiT")
    refuses("expected 8 to 64", "download", "DiT-XL-2-256x256", "--sha256=xyz")
    for told, repository, digits in (
        ("for a single file", REPOSITORY, "0" * 64),
        ("no name of a", "some--one/a", None),
    ):
        with pytest.raises(InputError, match=told):
            obtain_repository(HubRepository(repository), None, digits, None)


def publish(site: Site, repository: str, files: dict[str, bytes]) -> None:
    """Answer what huggingface_hub asks of the Hub for a repository, whose .safetensors and .bin are large files."""
    tree = []
    for name, content in files.items():
        entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        headers = {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": COMMIT}
        if name.endswith((".safetensors", ".bin")):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        tree.append(entry)
        site.pages[f"/{repository}/resolve/{COMMIT}/{name}"] = Page(content, headers)
    info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
    site.pages[f"/api/models/{repository}/revision/main"] = Page(json.dumps(info).encode())
    site.pages[f"/api/models/{repository}/tree/{COMMIT}"] = Page(json.dumps(tree).encode())


TINY = {
    "README.md": b"---\nlicense: cc-by-nc-4.0\n---\nA tiny one.\n",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": CONTENT,
    "transformer/diffusion_flax_model.msgpack": b"the same once more",
}


def test_a_hub_repository_is_fetched_and_then_found_and_verified_offline(site, monkeypatch):
    publish(site, REPOSITORY, TINY)
    first = succeeds("download", REPOSITORY, f"--url={site.url}")
    assert f"sha256 {sha256(CONTENT)} transformer/diffusion_pytorch_model.safetensors (64 of 64" in first.stdout
    assert "licence cc-by-nc-4.0" in first.stdout
    asked = len(site.requests)
    assert not any("msgpack" in path for path, _ in site.requests)
    assert succeeds("download", REPOSITORY, HF_HUB_OFFLINE="1").stdout == first.stdout
    monkeypatch.setattr(constants, "ENDPOINT", site.url)
    folder = locate(REPOSITORY)
    assert f"{REPOSITORY}: {folder}" in first.stdout and len(site.requests) == asked
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == CONTENT


def test_a_vae_is_fetched_once_and_has_two_names(site):
    vae = "stabilityai/sd-vae-ft-ema"
    publish(site, vae, {"config.json": b"{}", "a.safetensors": CONTENT, "a.bin": CONTENT[::-1]})
    told = obtain_repository(PUBLISHED["sd-vae-ft-ema"], site.url, None, None)
    assert locate("sd-vae-ft-ema") == locate(vae) is not None
    assert not any(path.endswith(".bin") for path, _ in site.requests)
    assert told[-1] == "licence MIT"


def test_a_repository_is_located_only_once_it_is_whole(site):
    publish(site, REPOSITORY, TINY)
    weights = site.pages.pop(f"/{REPOSITORY}/resolve/{COMMIT}/transformer/diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match="404"):
        obtain_repository(HubRepository(REPOSITORY), site.url, None, None)
    assert locate(REPOSITORY) is None
    site.pages[f"/{REPOSITORY}/resolve/{COMMIT}/transformer/diffusion_pytorch_model.safetensors"] = weights
    obtain_repository(HubRepository(REPOSITORY), site.url, None, None)
    assert locate(REPOSITORY) is not None


def test_a_damaged_blob_of_the_hub_cache_is_named_and_can_be_mended(site):
    publish(site, REPOSITORY, TINY)
    obtain_repository(HubRepository(REPOSITORY), site.url, None, None)
    weights = locate(REPOSITORY) / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"damaged")
    with pytest.raises(InputError, match=f"{weights.resolve()} has the SHA-256 .* remove it"):
        obtain_repository(HubRepository(REPOSITORY), site.url, None, None)
    weights.resolve().unlink()
    obtain_repository(HubRepository(REPOSITORY), site.url, None, None)
    assert weights.read_bytes() == CONTENT


def test_a_repository_goes_where_it_is_told(site, tmp_path):
    publish(site, REPOSITORY, TINY)
    told = obtain_repository(HubRepository(REPOSITORY), site.url, None, str(tmp_path / "out"))
    assert (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == CONTENT
    assert sha256(CONTENT) in told[1] and locate(REPOSITORY) is None


@pytest.mark.parametrize(
    ("told", "page"),
    [
        ("has no such repository", Page(b"", {"X-Error-Code": "RepoNotFound"}, 404)),
        ("accept its terms", Page(b"", {"X-Error-Code": "GatedRepo"}, 403)),
        ("answers 500 Internal Server Error", Page(b"", {}, 500)),
        ("does not answer as the Hub does", Page(b"<html>no Hub</html>")),
    ],
)
def test_what_the_hub_refuses_is_one_line(site, told, page):
    site.pages[f"/api/models/{REPOSITORY}/revision/main"] = page
    with pytest.raises(InputError, match=told):
        obtain_repository(HubRepository(REPOSITORY), site.url, None, None)


def test_a_repository_without_a_server_without_weights_or_without_room_is_one_line(site, tmp_path):
    publish(site, REPOSITORY, {"config.json": b"{}"})
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for told, url, out in (
        ("Connection refused", nowhere, None),
        ("holds no weights", site.url, None),
        ("cannot write to the folder", site.url, str(tmp_path / "file" / "out")),
        ("protocol", "mirror", None),
    ):
        with pytest.raises(InputError, match=told):
            obtain_repository(HubRepository("a/b" if url != site.url else REPOSITORY), url, None, out)


def test_what_is_no_name_is_nowhere():
    assert find("runs") is None and locate("runs") is None
    assert locate("runs/digits") is None and locate("../digits") is None and locate("a/b/c") is None
    assert locate("inception-fid") is None
