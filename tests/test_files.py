import errno
import os
from pathlib import Path

import numpy as np
import pytest

from dit_jax.errors import InputError
from dit_jax.files import make_folder, read_npz, replacing, require_renaming


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write to the folder"):
        make_folder(tmp_path / "file" / "run")


def test_an_address_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("gs://bucket/run", Path("gs://bucket/run"), tmp_path / "s3:" / "bucket"):
        with pytest.raises(InputError, match="is an address, expected a path"):
            make_folder(path)
    assert not any(tmp_path.iterdir())


def test_a_disk_that_renames_no_folders_is_refused(tmp_path, monkeypatch):
    require_renaming(tmp_path)

    def rename(*paths):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(InputError, match=r"cannot be renamed \(Too many open files\)"):
        require_renaming(tmp_path)
    assert not any(tmp_path.iterdir())


def test_npz_errors_name_the_fault(tmp_path):
    with pytest.raises(InputError, match="no file"):
        read_npz(tmp_path / "none.npz", ["arr_0"])
    np.savez(tmp_path / "a.npz", other=np.zeros(1000))
    with pytest.raises(InputError, match="lacks the array arr_0; it holds other"):
        read_npz(tmp_path / "a.npz", ["arr_0"])
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:500])
    with pytest.raises(InputError, match=r"not a whole \.npz"):
        read_npz(tmp_path / "b.npz", ["other"])
