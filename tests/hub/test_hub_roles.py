"""Files of a repo that are no model: never picked, also where only their header tells."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from orchestrator.demo.tiny_model import write_tiny_model
from orchestrator.errors import InvalidModel, ModelNotFound
from tests.kit.downloads import fetch, look_up
from tests.kit.fake_hub import Hub, Repo

REPO = "owner/Story-GGUF"


@pytest.fixture
def repo(hub: Hub, tmp_path: Path) -> Repo:
    """A model, a draft, and an adapter with the name and label of a preferred variant."""
    adapter = tmp_path / "adapter.gguf"
    writer = gguf.GGUFWriter(adapter, "llama")
    writer.add_type("adapter")
    writer.add_tensor("t", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = write_tiny_model(tmp_path / "model.gguf")
    draft = write_tiny_model(tmp_path / "draft.gguf", seed=1)
    files = {"Story-Q4_K_M.gguf": adapter, "Story-F32.gguf": model, "draft-Story-Q8_0.gguf": draft}
    return hub.add(Repo(REPO, files))


@pytest.mark.usefixtures("repo")
def test_downloaded_adapter_is_refused_and_the_next_load_takes_the_model(records: Path) -> None:
    with pytest.raises(InvalidModel) as refused:
        fetch(records, model_path=REPO)
    assert refused.value.field == "gguf_variant"
    assert "Story-Q4_K_M.gguf" in refused.value.message
    found = fetch(records, model_path=REPO)
    assert found.variant == "F32"
    assert look_up(records, model_path=REPO).weights == found.weights
    with pytest.raises(ModelNotFound):
        fetch(records, model_path=f"{REPO}:Q4_K_M")


@pytest.mark.usefixtures("repo")
@pytest.mark.parametrize("name", ["draft-Story-Q8_0.gguf", "Story-Q4_K_M.gguf"])
def test_what_is_no_model_is_fetched_by_its_path(records: Path, name: str) -> None:
    """To be given to the server by a flag, such as a draft; before and after it is there."""
    for model in (REPO, REPO, f"{REPO}:{name}"):
        variant = None if ":" in model else name
        found = fetch(records, model_path=model, gguf_variant=variant)
        assert found.weights[0].path.endswith(name)
    with pytest.raises(ModelNotFound):
        fetch(records, model_path=REPO, gguf_variant="Q8_0")
