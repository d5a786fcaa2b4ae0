"""All of torch's formats at once: whose a checkpoint is, and that no damage stops an audit."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audit.goldens import GOLDEN, Find
from handfast.audit.checks import Look, check
from handfast.audit.extent import Reader
from handfast.audit.formats import (
    accelerate,
    dcp,
    lightning,
    torch_save,
    torchtitan,
    trainer,
    weights,
)
from handfast.audit.place import look
from handfast.audit.run import audit

WHOSE = {
    "torch/bare": "torch.save",
    "torch/everything": "torch.save",
    "torch/traps": "torch.save",
    "torch/module": "torch.save",
    "torch/ranks": "torch.save",
    "fsdp/one": "FSDP full state dict",
    "fsdp/two": "FSDP full state dict",
    "dcp/alone": "torch DCP",
    "dcp/fsdp2": "torch DCP",
    "dcp/replicated": "torch DCP",
    "dcp/separate": "torch DCP",
    "torchtitan/two": "TorchTitan",
    "torchtitan/weights": "TorchTitan",
    "trainer/alone": "Hugging Face Trainer",
    "trainer/two": "Hugging Face Trainer",
    "trainer/adafactor": "Hugging Face Trainer",
    "trainer/weights": "Hugging Face Trainer",
    "accelerate/alone": "Accelerate",
    "accelerate/two": "Accelerate",
    "accelerate/models": "Accelerate",
    "lightning/one": "Lightning",
    "lightning/two": "Lightning",
    "lightning/accumulated": "Lightning",
    "lightning/scaled": "Lightning",
    "lightning/sharded": "Lightning",
    "safetensors/single": "safetensors",
    "safetensors/plain": "safetensors",
    "safetensors/sharded": "safetensors with index",
}

DAMAGED: dict[str, Find] = {
    "dcp/fsdp2": dcp.find,
    "dcp/separate": dcp.find,
    "torchtitan/two": torchtitan.find,
    "lightning/sharded": lightning.find,
    "lightning/scaled": lightning.find,
    "trainer/two": trainer.find,
    "accelerate/models": accelerate.find,
    "safetensors/sharded": weights.find,
    "torch/module": torch_save.find,
    "torch/ranks": torch_save.find,
    "torch/bare": torch_save.find,
}


@pytest.mark.parametrize("variant", WHOSE)
def test_a_sound_checkpoint_is_its_own_formats(variant: str) -> None:
    """Asked in their order, one takes it all, and nothing certain or strong is said of it."""
    found = audit(GOLDEN / variant, deep=True)
    assert {listed.format for listed in found.found} == {WHOSE[variant]}
    assert found.sound
    assert [name for name in found.unknown if not name.endswith("config.json")] == []


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_damage_stops_an_audit(data: st.DataObject, tmp_path: Path) -> None:
    """Whatever bytes of whichever file are others, or missing: all that is left is reported."""
    variant = data.draw(st.sampled_from(sorted(DAMAGED)))
    path = tmp_path / "damaged"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(GOLDEN / variant, path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(files))
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw[: data.draw(st.integers(0, 2 * len(raw)))])
    with Reader() as reader:
        for found in DAMAGED[variant](look(path, reader)):
            assert found.steps or found.findings
            for finding in check(found, Look(deep=True)):
                assert finding.says
