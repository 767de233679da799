"""The evaluate command as a user types it, on digits; flags with hyphens too."""

import json

import numpy as np
import pytest
from commands import refuses, succeeds

from dit_jax.data.sources import open_source
from dit_jax.files import digest


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    classifier = succeeds("evaluate", f"--make-classifier={folder / 'digits.safetensors'}", "--data=digits")
    assert "of the images held out of digits" in classifier.stdout
    features = f"--features=classifier:{folder / 'digits.safetensors'}"
    reference = succeeds("evaluate", f"--make-reference={folder / 'ref.npz'}", "--data=digits", features)
    assert "449 of 1,797 images of digits" in reference.stdout
    np.savez(folder / "a.npz", arr_0=open_source("digits").images[:300], settings=np.array('{"steps": 50}'))
    return folder


def test_a_table_and_a_report_with_every_setting_and_no_fid(made):
    features = f"--features=classifier:{made / 'digits.safetensors'}"
    report_path = made / "new" / "report.json"
    result = succeeds(
        "evaluate", f"--samples={made / 'a.npz'}", f"--reference={made / 'ref.npz'}", features, f"--json={report_path}"
    )
    report = json.loads(report_path.read_text())
    distance = report["metrics"]["classifier_frechet_distance"]
    assert f"Fréchet distance of classifier features {distance:13.6g}" in result.stdout
    assert "not comparable with published values: features of a classifier" in result.stderr
    assert "FID" not in result.stdout and not {"fid", "sfid", "inception_score"} & set(report["metrics"])
    assert report["features"]["held_out_accuracy"] > 0.95 and report["features"]["data"] == "digits"
    for part, file in (("features", "digits.safetensors"), ("samples", "a.npz"), ("reference", "ref.npz")):
        assert report[part]["sha256"] == digest(made / file)
    assert report["samples"]["settings"] == {"steps": 50} and report["samples"]["count"] == 300
    assert report["reference"]["settings"]["count"] == 449


def test_bad_input_is_one_line(made, tmp_path):
    features = f"--features=classifier:{made / 'digits.safetensors'}"
    samples, reference = f"--samples={made / 'a.npz'}", f"--reference={made / 'ref.npz'}"
    half = tmp_path / "half.npz"
    half.write_bytes((made / "a.npz").read_bytes()[:1000])
    for told, args in {
        "half.npz is not a whole .npz file": [f"--samples={half}", reference, features],
        "expected either --inception=FILE or --features": [samples, reference],
        "--samples needs --reference": [samples, features],
    }.items():
        refuses(told, "evaluate", *args, f"--json={tmp_path / 'report.json'}")
    assert not (tmp_path / "report.json").exists()
