"""The inspect_attention command as a user types it: a whole report, a smaller network, and refusals."""

import base64
import json
import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import refuses, succeeds
from goldens.cases import seeded_dit
from PIL import Image

from dit_jax import DiTConfig, load_dit, save_dit

CONFIG = DiTConfig(
    input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=2, num_heads=4, num_classes=10, head_gate="token"
)
QUICK = ("--data=digits", "--count=4", "--timesteps=100,900", "--ablate=3")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    model = seeded_dit(CONFIG)
    linear = model.blocks.attn.gate.linear
    for layer, head in ((0, 1), (1, 2), (1, 3)):
        linear.kernel[...] = linear.kernel[...].at[layer, :, head].set(0)
        linear.bias[...] = linear.bias[...].at[layer, head].set(-3.0)
    save_dit(model, folder / "gated.safetensors")
    result = succeeds(
        "inspect_attention",
        f"--weights={folder / 'gated.safetensors'}",
        f"--out={folder / 'report'}",
        f"--prune={folder / 'smaller.safetensors'}",
        *QUICK,
    )
    return folder, result.stdout


class Page(HTMLParser):
    """Scripts by id, every attribute's value, and the ids that there are."""

    def __init__(self, text: str):
        super().__init__()
        self.scripts, self.values, self.ids, self._inside = {}, [], set(), None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.values += attributes.values()
        self.ids.add(attributes.get("id"))
        self._inside = attributes.get("id", "code") if tag == "script" else None

    def handle_data(self, data):
        if self._inside:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data

    def handle_endtag(self, tag):
        self._inside = None


def test_a_report_is_whole(made):
    folder, said = made
    assert {path.name for path in (folder / "report").iterdir()} == {
        "index.html", "report.json", "roles.png", "statistics.png", "conditions.png", "importance.png", "attention.png",
    }  # fmt: skip
    for path in (folder / "report").glob("*.png"):
        assert len(np.unique(np.asarray(Image.open(path).convert("L")))) > 20, path  # not an empty sheet
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["timesteps"] == [100, 900] and report["halves"] == ["conditional", "unconditional"]
    for name, values in report["heads"].items():
        assert np.shape(values) == (2, 3, 2, 4) and np.isfinite(values).all(), name
    assert np.shape(report["roles"]) == (2, 3, 2, 4)
    assert np.shape(report["importance"]["change"]) == (3, 2, 4)
    assert np.shape(report["modulation"]["size"]["mlp_gate"]) == (21, 11, 2)
    shut = np.array(report["widest_gate"]) == 0
    assert np.argwhere(shut).tolist() == [[0, 1], [1, 2], [1, 3]]
    assert np.abs(np.array(report["importance"]["change"])[:, shut]).max() < 1e-6  # removing what is shut
    assert "index.html" in said and "roles of 8 heads: " in said


def test_the_page_needs_nothing_else_and_says_what_the_numbers_say(made):
    folder, _ = made
    text = (folder / "report" / "index.html").read_text()
    page = Page(text)
    assert json.loads(page.scripts["report"]) == json.loads((folder / "report" / "report.json").read_text())
    code = page.scripts["code"]
    assert set(re.findall(r'byId\("([\w-]+)"\)', code)) <= page.ids
    outside = re.compile(r"https?:|//\w+\.\w+|\bfetch\(|XMLHttpRequest|\bimport\s*\(|@import|url\(")
    assert not outside.search(code) and not outside.search(text.split("<script")[0])
    assert not [value for value in page.values if value and re.match(r"(https?:)?//", value)]
    views = json.loads(page.scripts["views"])
    assert len(views["items"]) == 4 * 2 * 2 and views["queries"] == list(range(16)) and views["cells"] == 4
    for view in views["items"]:
        scaled = np.frombuffer(base64.b64decode(view["weights"]), np.uint8).reshape(2, 4, 16, 16)
        largest = np.frombuffer(base64.b64decode(view["largest"]), "<f4").reshape(2, 4, 16, 1)
        assert (scaled.max(axis=-1) == 255).all()
        np.testing.assert_allclose((scaled / 255 * largest).sum(axis=-1), 1, atol=16 * 0.5 / 255)
        for picture in ("noised", "predicted"):
            assert view[picture].startswith("data:image/png;base64,iVBOR")


def test_the_smaller_network_draws_the_same(made):
    folder, said = made
    assert "the blocks have 3, 2 heads and had 4, 4\n" in said
    whole, smaller = load_dit(folder / "gated.safetensors"), load_dit(folder / "smaller.safetensors")
    assert smaller.config.block_heads == (3, 2) and smaller.config.head_dim == 4
    x, t, y = jax.random.normal(jax.random.key(0), (3, 8, 8, 1)), jnp.array([0, 500, 999]), jnp.array([1, 10, 7])
    assert float(jnp.abs(whole(x, t, y) - smaller(x, t, y)).max()) < 2e-5


def test_a_report_on_the_smaller_network_says_what_was_cut(made):
    folder, _ = made
    out = folder / "smaller_report"
    few = ("--data=digits", "--count=2", "--timesteps=500", "--ablate=2")
    result = succeeds("inspect_attention", f"--weights={folder / 'smaller.safetensors'}", f"--out={out}", *few)
    assert "roles of 5 heads: " in result.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["about"]["network"]["heads_left"] == [3, 2] and report["rules"][-1][0] == "cut"
    assert np.argwhere(np.array(report["roles"])[0, 0] == "cut").tolist() == [[1, 2]]
    assert not np.array(report["widest_gate"])[1, 2] and not np.array(report["heads"]["entropy"])[..., 1, 2].any()


def test_bad_input_is_one_line_and_leaves_nothing(made, tmp_path):
    folder, _ = made
    weights = f"--weights={folder / 'gated.safetensors'}"
    plain = tmp_path / "plain.safetensors"
    save_dit(seeded_dit(DiTConfig(**{**CONFIG.__dict__, "head_gate": "none"})), plain)
    out = f"--out={tmp_path / 'report'}"
    for told, args in {
        "is there already": [weights, f"--out={folder / 'report'}", *QUICK],
        "--labels=10: expected whole numbers from 0 to 9": [weights, out, *QUICK, "--labels=10"],
        "one of several processes": [weights, out, "--coordinator=a:1", "--num_processes=2", "--process_id=0"],
        "these heads have no gates": [f"--weights={plain}", out, *QUICK, f"--prune={tmp_path / 'a.safetensors'}"],
    }.items():
        refuses(told, "inspect_attention", *args)
    assert {path.name for path in tmp_path.iterdir()} == {"plain.safetensors"}
