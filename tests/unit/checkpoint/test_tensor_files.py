"""Writing a checkpoint's tensors: what fails keeps the system's error number, which decides the exit code."""

import errno

import pytest
import torch

from moe.checkpoint.tensor_files import write_tensors


def test_a_folder_that_cannot_be_made_is_an_os_error_with_its_cause(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "weights"
    with pytest.raises(OSError, match="could not be written") as raised:
        write_tensors(folder, {"a": torch.ones(2)}, {"a": 1}, [])
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.ENOTDIR
