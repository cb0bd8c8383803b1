"""Which export is recognised as made from the same inputs, and which folder is never replaced."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.exports import export
from tests.support.runs import tiny_run
from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.export.manifest import check_base, export_inputs, recorded_parity, weight_hashes
from train.export.merge import MergeJob

# The keys that manifests of earlier versions have: an export from them is recognised as long as they stay.
KEYS = "adapter adapter_config base dtype layout onto run shard_bytes system template verify"


def inputs_of(folder: Path, **changes: Any) -> dict[str, Any]:
    base = folder.parent.parent / "models" / "base-Int4"
    values = {"dtype": torch.float16, "layout": "qwen2", "shard_bytes": 4 * 10**9, **changes}
    return export_inputs(
        "tiny", MergeJob(base, folder / "adapter", **values), weight_hashes(base), onto=False, conversations=30
    )


def test_a_complete_export_from_the_same_inputs_is_recognised(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path)
    out, inputs = export(folder), inputs_of(folder)
    assert " ".join(sorted(inputs)) == KEYS
    assert recorded_parity(out, inputs) == read_json(out / "manifest.json")["parity"]
    for changes in ({"dtype": torch.float32}, {"layout": "qwen"}, {"system": "Another."}, {"template": "plain"}):
        assert recorded_parity(out, inputs_of(folder, **changes)) is None
    (out / "model.safetensors").write_bytes(b"cut off")
    assert recorded_parity(out, inputs) is None


def test_a_folder_without_a_measured_parity_is_no_export(tmp_path: Path) -> None:
    assert recorded_parity(tmp_path / "absent", {}) is None
    (tmp_path / "empty").mkdir()
    assert recorded_parity(tmp_path / "empty", {}) is None
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model" / "manifest.json", {"files": {}})
    with pytest.raises(UserError, match="no export of this program"):
        recorded_parity(tmp_path / "model", {})


def test_the_base_must_be_the_one_that_was_trained_on(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path)
    record, base = json.loads((folder / "run.json").read_text()), tmp_path / "models" / "base-Int4"
    assert set(weight_hashes(base)) == {"config.json", "model.safetensors"}
    check_base(record, base)
    (base / "tokenizer_config.json").write_text("{}")  # no output depends on it
    check_base(record, base)
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"not what run 'tiny' was trained on: config\.json differ"):
        check_base(record, base)
