"""What is said of trees that torch wrote, whoever chose their keys; and of names."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from handfast.audit.extent import Extent, Held, Reader, dense
from handfast.audit.formats import states
from handfast.audit.formats.names import doubt, numbered, ranked, runs, unranked
from handfast.audit.formats.states import Piece, Said, Split, number, pieces, read_state
from handfast.audit.found import Clock, Role
from handfast.audit.torch_file import read_torch
from handfast.audit.tree import Object
from handfast.errors import FormatError


def said(tmp_path: Path, state: object, **given: str) -> Said:
    """What is said of a state that was saved."""
    torch.save(state, tmp_path / "state.pt")
    return read_state(read_torch(Reader(), str(tmp_path / "state.pt")).root, **given)


def roles(found: Said) -> dict[str, Role]:
    """The roles by the last part of each path."""
    return {tensor.path.rpartition("/")[2]: tensor.role for tensor in found.tensors}


def trained(kind: Any, **given: Any) -> torch.optim.Optimizer:
    """An optimizer of torch's after two updates."""
    model = nn.Linear(4, 4)
    optimizer: torch.optim.Optimizer = kind(model.parameters(), **given)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.rand(3, 4)).sum().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("kind", "moments", "bounded"),
    [
        (torch.optim.Adam, {"exp_avg": Role.FIRST, "exp_avg_sq": Role.SECOND}, True),
        (torch.optim.AdamW, {"exp_avg": Role.FIRST, "exp_avg_sq": Role.SECOND}, True),
        (torch.optim.NAdam, {"exp_avg": Role.FIRST, "exp_avg_sq": Role.SECOND}, True),
        (torch.optim.RMSprop, {"square_avg": Role.SECOND}, False),
        (torch.optim.Adagrad, {"sum": Role.OTHER}, False),
        (torch.optim.Adadelta, {"square_avg": Role.SECOND, "acc_delta": Role.OTHER}, False),
        (torch.optim.Adamax, {"exp_avg": Role.MOMENTUM, "exp_inf": Role.OTHER}, False),
        (torch.optim.ASGD, {"ax": Role.OTHER}, False),
        (torch.optim.Rprop, {"prev": Role.OTHER}, False),
    ],
)
def test_optimizers_of_torch_are_understood(
    kind: Any, moments: dict[str, Role], bounded: bool, tmp_path: Path
) -> None:
    """What each keeps; betas only where they bound its moments; how many updates it made."""
    found = said(tmp_path, {"optimizer": trained(kind).state_dict()})
    assert moments.items() <= roles(found).items()
    assert bool(found.betas) == bounded
    (count,) = [c for _, c in found.counters if c.clock is Clock.OPTIMIZER]
    assert count.value == 2


def test_what_has_no_counts_says_none(tmp_path: Path) -> None:
    """Momentum alone is no count."""
    found = said(tmp_path, trained(torch.optim.SGD, lr=0.1, momentum=0.9).state_dict())
    assert roles(found) == {"momentum_buffer": Role.MOMENTUM}
    assert found.counters == []


def test_a_first_moment_alone_is_a_momentum(tmp_path: Path) -> None:
    """Lion's, which has betas, too."""
    group = {"params": [0], "betas": (0.9, 0.99), "lr": 1e-4}
    state = {"state": {0: {"exp_avg": torch.rand(4)}}, "param_groups": [group]}
    found = said(tmp_path, state)
    assert roles(found) == {"exp_avg": Role.MOMENTUM}
    assert found.betas == {}


def test_masters_are_known(tmp_path: Path) -> None:
    """By the names that Apex and its heirs give them; they belong to a parameter."""
    group = {"params": ["w"]}
    state = {"state": {"w": {"master_param": torch.rand(4)}}, "param_groups": [group]}
    (tensor,) = said(tmp_path, {"optim": state}).tensors
    assert (tensor.role, tensor.of) == (Role.MASTER, "w")


def test_moments_of_eight_bits_are_none_of_a_check(tmp_path: Path) -> None:
    """What is quantised by blocks obeys no bound: bitsandbytes' names are nobody's moments here."""
    state = {"state1": torch.zeros(4, dtype=torch.uint8), "absmax1": torch.rand(1), "step": 3}
    group = {"params": [0], "betas": (0.9, 0.99)}
    found = said(tmp_path, {"state": {0: state}, "param_groups": [group]})
    assert set(roles(found).values()) == {Role.OTHER}
    assert found.counters[-1][1].value == 3


def test_flat_optimizers_are_understood(tmp_path: Path) -> None:
    """As torch flattens them, each parameter a group for itself."""
    state = {
        "state.a.b.exp_avg": torch.rand(2),
        "state.a.b.exp_avg_sq": torch.rand(2),
        "state.a.b.step": torch.tensor(4.0),
        "param_groups.a.b.betas": (0.9, 0.99),
        "param_groups.a.b.amsgrad": False,
    }
    found = said(tmp_path, {"optimizer": state})
    assert {tensor.of for tensor in found.tensors} == {"a.b"}
    assert list(found.betas.values()) == [(0.9, 0.99)]
    assert [c.value for _, c in found.counters] == [4, 4]
    names = said(tmp_path, {"param_groups.a.b.betas": 1})
    assert names.tensors == []


def test_a_rank_names_what_has_no_names(tmp_path: Path) -> None:
    """So that the third parameter of two ranks is not taken for one."""
    found = said(tmp_path, {"o": trained(torch.optim.Adam).state_dict()}, within="rank 3")
    assert {tensor.of for tensor in found.tensors} == {"rank 3/o[0]", "rank 3/o[1]"}


def test_a_scheduler_that_waits_for_a_metric_counts_no_updates(tmp_path: Path) -> None:
    """Its last epoch is an evaluation; another one's is a step of its own."""
    optimizer = trained(torch.optim.Adam)
    waits = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    steps = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    found = said(tmp_path, {"waits": waits.state_dict(), "steps": steps.state_dict()})
    assert [counter.path for _, counter in found.counters] == ["steps/last_epoch"]


def test_whole_objects_are_read_without_their_code(tmp_path: Path) -> None:
    """A module with its tied weights once, its buffers, its optimizer; nothing else is entered."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
    model[2].weight = model[0].weight
    found = said(tmp_path, {"net": model, "path": Path("x"), "more": [trained(torch.optim.Adam)]})
    assert roles(found)["1.running_mean"] is Role.BUFFER
    assert roles(found)["0.weight"] is Role.PARAMETER
    assert found.betas == {"more[0]/param_groups[0]": (0.9, 0.999)}


def test_what_lies_beside_a_modules_state_is_no_weight(tmp_path: Path) -> None:
    """A loss is not; a name with a dot is, as in checkpoints of TorchTitan."""
    state = {"a.weight": torch.rand(4), "loss": torch.rand(1), "optimizer": {"x": {"y": 1}}}
    assert roles(said(tmp_path, state)) == {"a.weight": Role.PARAMETER, "loss": Role.OTHER}


def test_trees_that_contain_themselves_are_read_once() -> None:
    """A pickle may make one."""
    tree: dict[str, Any] = {"step": 3}
    tree["again"] = tree
    tree["list"] = [tree, tree]
    assert [counter.value for _, counter in read_state(tree).counters] == [3]
    module = Object("Module", (), {"_parameters": {}, "_modules": {}})
    module.fields["_modules"]["inner"] = module  # a dict, behind a Mapping
    assert read_state(module).tensors == []


def nested(levels: int) -> Any:
    """A list in a list, and so on, with a count on each level."""
    tree: Any = {"step": 1}
    for _ in range(levels):
        tree = [tree, {"epoch": 2}]
    return tree


def test_wide_and_deep_trees_are_read() -> None:
    """As deep as pickle can write, without a recursion that they could exhaust; deeper ones can't
    be anybody's, and their paths would take the square of their depth.
    """
    assert len(read_state(nested(900)).counters) == 901
    assert len(read_state([{"step": at} for at in range(30_000)]).counters) == 30_000
    with pytest.raises(FormatError, match="too many objects: more than 1,000 levels"):
        read_state(nested(10_000))


def test_what_a_tree_says_takes_no_more_than_its_room() -> None:
    """One tensor under many names, counts without end, names that grow with each level."""
    memory = 2 * 100 * states.EACH
    one = Extent(Held(b"\0\0\0\0", "x"), "float32", (1,), (1,))
    for tree in (
        {f"w{at}": one for at in range(200)},
        [Extent(Held(b"\0\0\0\0", "x"), "float32", (1,), (1,)) for _ in range(200)],
        [{"step": at} for at in range(200)],
        {"state": {at: {"step": at} for at in range(200)}, "param_groups": []},
        Object("theirs", ([one] * 200,)),
    ):
        with pytest.raises(FormatError, match="100 tensors and counts"):
            read_state(tree, memory=memory)
    long: Any = {"step": 1}
    for _ in range(5):
        long = {"x" * 1000: long}
    with pytest.raises(FormatError, match="names of 4,096 characters"):
        read_state(long)


def test_tensors_in_lists_and_in_objects_of_anybody_are_told() -> None:
    """Nothing says what they are to a training. An object that is in two places is told once."""
    one, other = (Extent(Held(b"\0\0\0\0", "x"), "float32", (1,), (1,)) for _ in range(2))
    config = Object("argparse.Namespace", (), {"table": {"deep": (one,)}, "n": 3})
    found = read_state({"averages": [one, other], "config": config, "again": config})
    assert {tensor.path: tensor.role for tensor in found.tensors} == {
        "averages[0]": Role.OTHER,
        "averages[1]": Role.OTHER,
        "config/table/deep[0]": Role.OTHER,
    }


def test_a_training_that_has_a_last_epoch_is_no_scheduler() -> None:
    """Its model and its optimizer are read all the same; a scheduler's own dicts go by numbers."""
    one = Extent(Held(b"\0\0\0\0", "x"), "float32", (1,), (1,))
    found = read_state({"model": {"w": one}, "last_epoch": 3})
    assert [(tensor.path, tensor.role) for tensor in found.tensors] == [("model/w", Role.PARAMETER)]
    found = read_state({"milestones": {30: 1}, "last_epoch": 3, "_step_count": 4})
    assert [counter.clock for _, counter in found.counters] == [Clock.SCHEDULER]


@pytest.mark.parametrize(
    ("node", "value"),
    [
        (3, 3),
        (True, None),
        (2.0, None),
        ("3", None),
        (Extent(Held(b"\0\0\0\0\0\0\x08\x40", "x"), "float64", (), ()), 3),
        (Extent(Held(b"\0\0\0\0\0\0\x0c\x40", "x"), "float64", (), ()), None),  # 3.5
        (Extent(Held(b"\0\0\xc0\x7f", "x"), "float32", (), ()), None),  # NaN
        (Extent(Held(b"\0\0\x80\x7f", "x"), "float32", (), ()), None),  # infinite
        (Extent(Held(b"\3\0\0\0", "x"), "int32", (), ()), 3),
        (Extent(Held(b"\3", "x"), "bool", (), ()), None),
        (Extent(Held(b"\3\0", "x"), "int32", (), ()), None),  # cut
        (Extent(Held(b"\3\0\0\0", "x"), "int32", (1,), dense((1,))), None),
    ],
)
def test_numbers_are_whole_or_none(node: Any, value: int | None) -> None:
    """A count is an int, or a tensor without dimensions that holds a whole number."""
    assert number(node) == value


def test_pieces_are_told_of_all_kinds_of_tensors(tmp_path: Path) -> None:
    """A tensor, a parameter, one in pieces; nothing of what has no values."""
    torch.save(
        {"p": nn.Parameter(torch.rand(3)), "m": torch.rand(3, device="meta")}, tmp_path / "a"
    )
    root = read_torch(Reader(), str(tmp_path / "a")).root
    assert [piece.values.shape for piece in pieces(root["p"])] == [(3,)]
    assert pieces(root["m"]) == ()
    assert pieces("text") == ()
    piece = Piece(pieces(root["p"])[0].values, (6,), (3,))
    assert pieces(Split((piece,))) == (piece,)


# Names


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("a/step_100", 100),
        ("ckpt_step_4.pt", 4),
        ("epoch=0-step=12.ckpt", 12),
        ("iter_0000500", 500),
        ("global_step40", 40),
        ("checkpoint-7", 7),
        ("100", 100),
        ("model_rank3.pth", None),
        ("step_5/model_rank3.pth", None),
        ("model-00002-of-00005.pt", None),
        ("resnet50.pth", None),
        ("last.pt", None),
        ("step" + "9" * 40, None),
    ],
)
def test_names_say_steps(name: str, step: int | None) -> None:
    """Behind a word for one, or by themselves; not what they say of ranks or of a model."""
    assert numbered(name) == step


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("rank_0.pt", (0, 0)),
        ("model_rank3.pth", (3, 0)),
        ("latest-rank12.pt", (12, 0)),
        ("mp_rank_00_model_states.pt", (0, 0)),
        ("model-00002-of-00005.pt", (2, 5)),
        ("franknote7.pt", None),
        ("last.pt", None),
    ],
)
def test_names_say_ranks(name: str, rank: tuple[int, int] | None) -> None:
    """And of how many; without them the names of all ranks are one."""
    assert ranked(name) == rank
    other = name.replace("3", "7").replace("12", "8").replace("00002", "00004")
    assert (unranked(name) == unranked(other)) == (rank is not None or name == other)


def test_what_an_optimizer_has_in_lists_is_among_the_valueless(tmp_path: Path) -> None:
    """LBFGS's history, and a preconditioner's matrices: no box has lists, so they would be lost."""
    given = {"GG": [torch.rand(3), {"R": torch.rand(3)}], "exp_avg": torch.rand(3), "step": 1}
    groups = [{"params": [0, 1]}]
    state = {0: given | {"project": True, "none": []}, 1: [torch.rand(3)]}
    found = said(tmp_path, {"state": state, "param_groups": groups})
    assert found.valueless == ["state[0]/GG[0]", "state[0]/GG[1]/R", "state[1][0]"]
    assert [tensor.path for tensor in found.tensors] == ["state[0]/exp_avg"]


def test_the_history_of_lbfgs_is_among_the_valueless(tmp_path: Path) -> None:
    """Lists of tensors, of the one entry that it has."""
    optimizer = torch.optim.LBFGS([weight := nn.Parameter(torch.rand(4))], max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight**4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # its stub wants a float
    lost = said(tmp_path, optimizer.state_dict()).valueless
    assert {"state[0]/old_dirs[0]", "state[0]/old_stps[0]", "state[0]/ro[0]"} <= {*lost}


@pytest.mark.parametrize("beside", [{}, {"name.w": torch.rand(3)}])
def test_tensors_by_keys_that_are_no_text_are_said(beside: Any, tmp_path: Path) -> None:
    """A bank of memories by number."""
    bank = {0: torch.rand(3), (1, 2): torch.rand(3)} | beside
    found = said(tmp_path, {"memory_bank": bank})
    paths = {tensor.path for tensor in found.tensors}
    assert {"memory_bank[0]", "memory_bank[(1, 2)]"} <= paths


def test_the_first_word_that_tells_runs_apart_is_told() -> None:
    """Of several the same one, whatever strings hash to."""
    words = ("fold", "seed", "trial", "run", "job", "task")
    older, newer = ("_".join(f"{word}{at}" for word in words) for at in (1, 2))
    assert doubt(f"{newer}_new", f"{older}_old", confirmed=True) == "they are of two folds"


def test_steps_of_a_run_are_found_by_their_names() -> None:
    """In the order of what they say; one without a number stands alone."""
    paths = ["a/step-10", "a/step-9", "b/step-1", "a/last"]
    assert list(runs(paths)) == [
        ("a", ["a/step-9", "a/step-10"]),
        ("b", ["b/step-1"]),
        ("a/last", ["a/last"]),
    ]


EXTRAS: tuple[Any, ...] = (
    torch.zeros(30, dtype=torch.uint8),
    torch.rand(30),
    io.BytesIO(b"a pickle"),
    b"bytes",
    {"scale": torch.rand(3)},
    None,
)


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_a_module_says_beside_its_weights_is_none(extra: Any, tmp_path: Path) -> None:
    """``_extra_state``, of any type, with the module's name before it or not; its weights are what
    they are without it.
    """
    for prefix in ("", "layer."):
        state = {f"{prefix}weight": torch.rand(4), f"{prefix}_extra_state": extra}
        for saved in (state, {"model": state, "optimizer": {}}):
            found = said(tmp_path, saved)
            parameters = [t.of for t in found.tensors if t.role is Role.PARAMETER]
            assert parameters == [f"{prefix}weight"]
            others = {t.role for t in found.tensors if "_extra_state" in t.path}
            assert others <= {Role.OTHER}
            assert found.valueless == []


def test_a_buffer_may_be_called_as_counts_are(tmp_path: Path) -> None:
    """A module's own ``epoch`` is no trainer's; what stands at the top beside the states is."""
    state = {"weight": torch.rand(4), "epoch": torch.tensor(3), "step": torch.tensor(7.0)}
    expected = {"weight": Role.PARAMETER, "epoch": Role.BUFFER, "step": Role.BUFFER}
    for saved in (state, {"model": state}):
        found = said(tmp_path, saved)
        assert roles(found) == expected
        assert found.counters == []
    assert said(tmp_path, {"model": {"weight": torch.rand(4), "epoch": 3}}).counters == []
    beside = {"model": state, "epoch": torch.tensor(5), "step": 9}
    counted = said(tmp_path, beside).counters
    assert [(counter.path, counter.value) for _, counter in counted] == [("epoch", 5), ("step", 9)]
    whole = said(tmp_path, {"weight": torch.rand(4), "step": 9}).counters
    assert [counter.value for _, counter in whole] == [9]


@pytest.mark.parametrize(
    ("name", "step"), [("model 10.pt", 10), ("step 7", 7), ("my model 3 final.pt", 3)]
)
def test_a_blank_before_a_number_is_as_good_as_a_dash(name: str, step: int) -> None:
    """People save by hand; a rank's number is no step's there, either."""
    assert numbered(name) == step
    assert numbered(f"rank 3 {name}") == step
    assert ranked(f"rank 3 {name}") == (3, 0)
