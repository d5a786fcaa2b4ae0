"""Shows that the demo never touches a directory that is not its own, and knows its own model."""

from pathlib import Path

import pytest
import torch

from handfast.demo.job import Job
from handfast.demo.model import Transformer
from handfast.demo.run import claim


def test_a_directory_of_somebody_elses_is_refused_and_left_alone(tmp_path: Path) -> None:
    """``--out ~/thesis`` must not cost the thesis."""
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years")
    with pytest.raises(ValueError, match="not made by the demo"):
        claim(tmp_path)
    assert thesis.read_text() == "years"
    with pytest.raises(ValueError, match="no directory"):
        claim(thesis)


def test_an_earlier_demo_is_cleared_away(tmp_path: Path) -> None:
    """Nothing of the last one is taken for this one's; what a link leads to is not touched."""
    home, elsewhere = tmp_path / "demo", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    claim(home)
    (home / "storm" / "events").mkdir(parents=True)
    (home / "report.html").touch()
    (home / "link").symlink_to(elsewhere)
    claim(home)
    assert [entry.name for entry in home.iterdir()] == [".handfast-demo"]
    assert (elsewhere / "kept").exists()


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    """Made beforehand, say, by whoever mounted a disk there."""
    claim(tmp_path)
    assert (tmp_path / ".handfast-demo").exists()


def test_the_model_has_as_many_parameters_as_is_said() -> None:
    """The report says a million; the formula is held against the model itself."""
    job = Job(run="")
    with torch.device("meta"):
        model = Transformer(97, job.context, job.width, job.layers, job.heads, job.dropout)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert job.parameters(97) == count
    assert 900_000 < count < 1_100_000


def test_a_job_travels_on_a_command_line() -> None:
    """torchrun hands it to each rank as one argument."""
    job = Job(run="/a b/c", saver="dcp", launch=3)
    assert Job.decode(job.encode()) == job
    assert "\n" not in job.encode()


def test_ranks_are_dealt_to_nodes_evenly() -> None:
    """Two nodes of two ranks, each pair neighbours, as a launcher would place them."""
    job = Job(run="/x")
    assert [job.node(rank) for rank in range(4)] == ["node-0", "node-0", "node-1", "node-1"]
    assert job.disks.format(rank=2) == "/x/checkpoints/rank-2"
