"""`dit_jax.compile` as typed: tables, comparisons, JSON, refusals."""

import json
import re

import pytest
from commands import refuses, succeeds
from ml_collections import ConfigDict

from dit_jax.compile import changed
from dit_jax.errors import InputError

DIGITS = "--config=configs/digits.py"


def test_meshes_are_compared_in_one_table_and_written_as_json(tmp_path):
    out = tmp_path / "report.json"
    local = "--compare=mesh.data=2,mesh.fsdp=2,model.attention=window:2*2,global*2"
    result = succeeds("compile", DIGITS, "--topology=cpu:4", "--compare=mesh.data=4", local, f"--json={out}")
    assert "4x1x1" in result.stdout and "2x2x1" in result.stdout
    programs = json.loads(out.read_text())["programs"]
    assert [row["mesh"]["fsdp"] for row in programs] == [1, 2]
    assert [row["attention"] for row in programs] == ["global", "window:2*2,global*2"]
    assert programs[0]["flops"]["analytic"] > programs[1]["flops"]["analytic"]
    assert set(programs[1]["collectives"]) & {"all-gather"} and programs[0]["compile_seconds"] > 0


def test_one_program_is_told_in_detail():
    result = succeeds("compile", DIGITS, "--topology=cpu:2", "--what=sample", "--config.sample.steps=3")
    assert "TFLOP a chip" in result.stdout and "temporary" in result.stdout


def test_a_tpu_that_is_not_here_is_compiled_for_with_its_own_attention_kernel():
    small = ["--config.batch_size=4", "--config.model.hidden_size=128", "--config.model.depth=2"]
    small += ["--config.model.num_heads=2", "--config.mesh.fsdp=2"]
    result = succeeds("compile", "--config=configs/imagenet256.py:DiT-S/2", "--topology=v5e:2x2", *small)
    (line,) = [line for line in result.stdout.splitlines() if "2x2x1" in line]
    assert line.split()[3:5] == ["flash", "yes"]
    assert "reduce-scatter" in result.stdout and "all-gather" in result.stdout
    # Attention is a quarter of the work, and its kernel makes seven products where analysis counts six.
    compiled = float(re.search(r"analytic without recomputation \((.*)\)", result.stdout)[1])
    assert compiled == pytest.approx(1 + 1 / 4 / 6, abs=0.01)


@pytest.mark.parametrize(("topology", "mesh"), [("v4:2x2x1", "4x1x1"), ("v5e:1x1", "1x1x1")])
def test_a_tpu_is_one_device_whatever_cores_it_has_and_may_be_alone(topology, mesh):
    result = succeeds("compile", DIGITS, f"--topology={topology}", "--config.model.depth=1")
    assert mesh in result.stdout


def test_what_slices_exchange_is_told_apart():
    result = succeeds("compile", DIGITS, "--topology=2*v5e:2x2", "--config.mesh.fsdp=4", "--config.batch_size=64")
    assert re.search(r"slice-to-slice: \d+ times, 0\.\d+ GB sent a chip, 0\.\d+ of them out of its", result.stdout)
    assert re.search(r"estimate: .*\bhosts 0\.\d+ s\)", result.stdout)


def test_compared_values_have_the_types_of_their_fields():
    config = ConfigDict(dict(steps=1, model=dict(learn_sigma=True, mlp_ratio=4.0, attention="global")))
    now = changed(config, "steps=2,model.learn_sigma=false,model.mlp_ratio=3,model.attention=window:2*2,global*1")
    assert now.to_dict() == dict(steps=2, model=dict(learn_sigma=False, mlp_ratio=3.0, attention="window:2*2,global*1"))
    assert config.steps == 1
    for change in ("steps=2.7", "steps=many", "steps", "model.learn_sigma=0", "model=3", "model.colour=1", "colour=1"):
        with pytest.raises(InputError, match=f"--compare={change}: expected a field of the config and a value of its"):
            changed(config, change)


def test_bad_arguments_are_refused_in_one_line():
    for args, message in (
        (("--topology=v7:2x2",), "expected one such as"),
        (("--topology=cpu:2", "--compare=model.colour=1"), "expected a field of the config"),
        (("--topology=v5e:3x5",), "not divisible"),
        (("--topology=cpu:2", "--what=encode"), "nothing to encode"),
        (("--topology=cpu:3",), "choose a multiple of 3"),
    ):
        refuses(message, "compile", DIGITS, *args)
