"""`dit_jax.compile` as typed: tables, comparisons, JSON, refusals."""

import json
import subprocess
import sys


def run(*args: str, config: str = "configs/digits.py") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dit_jax.compile", f"--config={config}", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_meshes_are_compared_in_one_table_and_written_as_json(tmp_path):
    out = tmp_path / "report.json"
    local = "--compare=mesh.data=2,mesh.fsdp=2,model.attention=window:2*2,global*2"
    result = run("--topology=cpu:4", "--compare=mesh.data=4", local, f"--json={out}")
    assert result.returncode == 0, result.stderr
    assert "4x1x1" in result.stdout and "2x2x1" in result.stdout
    programs = json.loads(out.read_text())["programs"]
    assert [row["mesh"]["fsdp"] for row in programs] == [1, 2]
    assert [row["attention"] for row in programs] == ["global", "window:2*2,global*2"]
    assert programs[0]["flops"]["analytic"] > programs[1]["flops"]["analytic"]
    assert set(programs[1]["collectives"]) & {"all-gather"} and programs[0]["compile_seconds"] > 0


def test_one_program_is_told_in_detail():
    result = run("--topology=cpu:2", "--what=sample", "--config.sample.steps=3")
    assert result.returncode == 0, result.stderr
    assert "TFLOP a chip" in result.stdout and "temporary" in result.stdout


def test_a_tpu_that_is_not_here_is_compiled_for_with_its_own_attention_kernel():
    small = ["--config.batch_size=4", "--config.model.hidden_size=128", "--config.model.depth=2"]
    small += ["--config.model.num_heads=2", "--config.mesh.fsdp=2"]
    result = run("--topology=v5e:2x2", *small, config="configs/imagenet256.py:DiT-S/2")
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if "2x2x1" in line]
    assert line.split()[3:5] == ["flash", "yes"]
    assert "reduce-scatter" in result.stdout and "all-gather" in result.stdout


def test_bad_arguments_are_refused_in_one_line():
    for args, message in (
        (("--topology=v7:2x2",), "expected one such as"),
        (("--topology=cpu:2", "--compare=model.colour=1"), "expected a field of the config"),
        (("--topology=cpu:2", "--what=encode"), "nothing to encode"),
        (("--topology=cpu:3",), "no multiple of 3"),
    ):
        result = run(*args)
        assert result.returncode == 2 and message in result.stderr, (args, result.stderr)
