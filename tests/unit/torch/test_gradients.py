"""Shows when a save falls into the middle of gradient accumulation, and when it does not."""

import copy
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from statekit import Snapshot, same_bytes, unclean_gradients
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from handfast.torch.apply import apply
from handfast.torch.gradients import Watch, optimizers_of
from handfast.torch.tree import nodes

NAMES = ("model/weight", "model/bias")


@pytest.fixture(autouse=True)
def no_watch_outlives_its_test() -> Iterator[None]:
    """Each watches every optimizer of the process."""
    yield
    _global_optimizer_post_hooks.clear()


@pytest.fixture(params=["sgd", "foreach", "fused", "loop", "maximize", "amsgrad", "nesterov"])
def state(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """A watched model and optimizer, of each implementation that torch has on a CPU."""
    options: dict[str, Any] = {
        "foreach": {"foreach": True},
        "fused": {"fused": True},
        "loop": {"foreach": False},
        "maximize": {"maximize": True},
        "amsgrad": {"amsgrad": True},
    }
    model = nn.Linear(4, 2)
    if request.param in options:
        opt: Any = torch.optim.AdamW(model.parameters(), **options[request.param])
    else:
        heavy = request.param == "nesterov"
        opt = torch.optim.SGD(
            model.parameters(), momentum=0.9 * heavy, nesterov=heavy, weight_decay=0.1
        )
    state = {"model": model, "opt": opt}
    end = Watch(state).end
    yield state
    end()


def backward(model: nn.Module, scale: float = 1.0) -> None:
    (model(torch.randn(3, 4) * scale).square().sum()).backward()


@pytest.mark.parametrize("to_none", [True, False], ids=["none", "zeros"])
def test_a_loop_that_accumulates_four_times(state: dict[str, Any], to_none: bool) -> None:
    """Clean after the step and after zero_grad, pending in between: at each of nine windows."""
    model, opt = state["model"], state["opt"]
    assert unclean_gradients(state) == ()
    for _ in range(9):
        for _ in range(4):
            backward(model)
            assert unclean_gradients(state) == NAMES
        opt.step()
        assert unclean_gradients(state) == ()  # consumed, though it is still there
        opt.zero_grad(set_to_none=to_none)
        assert unclean_gradients(state) == ()
        assert unclean_gradients(state) == ()


def test_a_loop_that_zeroes_late_is_clean_after_each_step(state: dict[str, Any]) -> None:
    """zero_grad at the top of the loop: at the save the gradients of the last step are there."""
    model, opt = state["model"], state["opt"]
    for _ in range(20):
        opt.zero_grad()
        backward(model)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert unclean_gradients(state) == NAMES
        opt.step()
        assert unclean_gradients(state) == ()


def test_accumulation_onto_consumed_gradients_is_seen(state: dict[str, Any]) -> None:
    """Without zero_grad the next backward adds to what the step has used."""
    model, opt = state["model"], state["opt"]
    backward(model)
    opt.step()
    backward(model)
    assert unclean_gradients(state) == NAMES


def test_a_new_gradient_at_the_old_address_is_not_taken_for_the_old_one(
    state: dict[str, Any],
) -> None:
    """The allocator gives the same memory again, with the same version: only a mark tells."""
    memory = bytearray(b"\1" * 32)
    for _ in range(3):
        gradient = torch.frombuffer(memory, dtype=torch.float32).detach().reshape(2, 4)
        assert gradient.data_ptr() == torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        assert gradient._version == 0
        state["model"].weight.grad = gradient
        assert unclean_gradients(state) == ("model/weight",)
        state["opt"].step()
        assert unclean_gradients(state) == ()
        memory[:] = b"\1" * 32


def test_only_the_pending_parameter_is_named(state: dict[str, Any]) -> None:
    """A frozen or unused one has no gradient."""
    state["model"].weight.requires_grad_(False)
    backward(state["model"])
    assert unclean_gradients(state) == ("model/bias",)


def test_nan_and_inf_are_not_zero(state: dict[str, Any]) -> None:
    """A gradient that overflowed is pending until a step or zero_grad."""
    for value in (float("nan"), float("inf"), -1e-45):
        state["model"].weight.grad = torch.full((2, 4), value)
        assert unclean_gradients(state) == ("model/weight",)


def test_a_step_that_the_scaler_skipped_is_clean() -> None:
    """Nothing else is called in that step: the window is over all the same."""
    model = nn.Linear(4, 2)
    for opt in (
        torch.optim.SGD(model.parameters()),
        torch.optim.AdamW(model.parameters(), fused=True),
    ):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        state = {"model": model, "opt": opt, "scaler": scaler}
        end = Watch(state).end
        for scale, skipped in ((1.0, False), (float("inf"), True), (1.0, False)):
            opt.zero_grad()
            before, weight = scaler.get_scale(), model.weight.detach().clone()
            for _ in range(2):
                scaler.scale(model(torch.ones(3, 4) * scale).square().sum()).backward()
                assert unclean_gradients(state) == NAMES
            scaler.step(opt)
            scaler.update()
            assert (scaler.get_scale() < before) is skipped
            assert torch.equal(model.weight, weight) is skipped
            assert unclean_gradients(state) == ()
        end()
        assert "step" not in vars(scaler)


def test_each_of_several_optimizers_counts_for_itself() -> None:
    """One that steps every time hides nothing of one that accumulates."""
    one, two = nn.Linear(4, 4), nn.Linear(4, 2)
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (one, two)]
    state = {"one": one, "two": two, "opts": opts}
    Watch(state)
    backward(nn.Sequential(one, two))
    opts[0].step()
    opts[0].zero_grad()
    assert unclean_gradients(state) == ("two/weight", "two/bias")
    opts[1].step()
    assert unclean_gradients(state) == ()


def test_a_step_with_a_closure_is_a_step() -> None:
    """LBFGS runs the backward inside of its step."""
    model = nn.Linear(4, 2)
    opt = torch.optim.LBFGS(model.parameters(), max_iter=3)
    state = {"model": model, "opt": opt}
    Watch(state)

    def closure() -> Tensor:
        opt.zero_grad()
        loss: Tensor = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert unclean_gradients(state) == ()
    backward(model)
    assert unclean_gradients(state) == NAMES


def test_sparse_gradients() -> None:
    """Embeddings with sparse gradients have no dense values to look at."""
    model = nn.Embedding(5, 2, sparse=True)
    state = {"model": model, "opt": torch.optim.SparseAdam(model.parameters())}
    Watch(state)
    for _ in range(3):
        state["opt"].zero_grad()
        assert unclean_gradients(state) == ()
        model(torch.tensor([1, 3])).sum().backward()
        assert unclean_gradients(state) == ("model/weight",)
        state["opt"].step()
        assert unclean_gradients(state) == ()


def test_a_parameter_of_no_module_is_shown_by_its_shape() -> None:
    """Only the optimizer knows it."""
    loose = nn.Parameter(torch.ones(3))
    state = {"opt": torch.optim.SGD([loose])}
    loose.sum().backward()
    assert unclean_gradients(state) == ("a parameter of shape (3,) in no module",)


def test_a_save_in_the_middle_resumes_in_the_middle(state: dict[str, Any]) -> None:
    """With the gradients in the epoch, a step after the resume is the step without a break."""
    model, opt = state["model"], state["opt"]
    other = copy.deepcopy(state)
    backward(model)
    opt.step()
    opt.zero_grad()
    backward(model)
    saved = Snapshot(state, grads=True)
    assert unclean_gradients(state, stored=True) == ()

    def rest(model: nn.Module, opt: torch.optim.Optimizer) -> list[Tensor]:
        backward(model, 2.0)
        opt.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    expected = rest(model, opt)
    saved.restore(other)
    assert unclean_gradients(other) == NAMES
    assert all(map(torch.equal, rest(other["model"], other["opt"]), expected))


def test_a_restore_drops_what_a_broken_off_accumulation_has_left(state: dict[str, Any]) -> None:
    """A rollback in a living process: half a batch must not count twice."""
    model, opt = state["model"], state["opt"]
    backward(model)
    opt.step()
    saved = Snapshot(state)
    backward(model)
    saved.restore(state)
    assert all(parameter.grad is None for parameter in model.parameters())


def pair(seed: int) -> tuple[nn.ModuleList, torch.optim.Optimizer]:
    """Two layers, so that a batch may use one of them alone."""
    torch.manual_seed(seed)
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)


def use(model: nn.ModuleList, *used: int) -> None:
    sum(model[number](torch.ones(2, 4)).square().sum() for number in used).backward()


@pytest.mark.parametrize("to_none", [True, False], ids=["none", "zeros"])
@pytest.mark.parametrize(
    ("before", "after"), [("zero use step", ""), ("use step zero", ""), ("use step", "zero")]
)
def test_layers_that_a_batch_leaves_out_go_on_as_without_a_break(
    before: str, after: str, to_none: bool
) -> None:
    """Gradients of zeros decay a layer that was not used; without any it is left out.

    Which of the two it is depends on what zero_grad() does, and it may come after the save.
    """

    def go(parts: str, model: nn.ModuleList, opt: torch.optim.Optimizer, *used: int) -> None:
        for part in parts.split():
            if part == "zero":
                opt.zero_grad(set_to_none=to_none)
            elif part == "use":
                use(model, *used)
            else:
                opt.step()

    (model, opt), (other, live) = pair(0), pair(1)
    state, fresh = {"model": model, "opt": opt}, {"model": other, "opt": live}
    end = Watch(state).end
    for used in ((0, 1), (1,), (0,)):
        go(after, model, opt)
        go(before, model, opt, *used)
    assert unclean_gradients(state) == ()
    Snapshot(state).restore(fresh)
    go(after, model, opt)  # the resumed loop begins with a batch
    for one in (state, fresh):
        for number, used in enumerate(((1,), (0,), (0, 1))):
            go(after if number else "", one["model"], one["opt"])
            go(before, one["model"], one["opt"], *used)
    pairs = zip(Snapshot(state).captured.tensors, Snapshot(fresh).captured.tensors, strict=True)
    assert all(same_bytes(mine, theirs) for mine, theirs in pairs)
    end()


def test_images_without_a_record_of_zeros_are_restored() -> None:
    """As those that were written before it was kept: no gradients."""
    model, opt = pair(0)
    use(model, 0)
    saved = Snapshot({"model": model, "opt": opt})
    del saved.saved.objects["opt"]["zeros"]
    saved.restore({"model": model, "opt": opt})
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sparse_gradients_are_not_made_zeros() -> None:
    """SparseAdam refuses dense ones."""
    model = nn.Embedding(5, 2, sparse=True)
    state = {"model": model, "opt": torch.optim.SparseAdam(model.parameters())}
    for _ in range(2):
        model(torch.tensor([1, 3])).sum().backward()
        state["opt"].step()
    Snapshot(state).restore(state)
    assert model.weight.grad is None


def test_a_gradient_that_no_name_leads_to_is_not_stored() -> None:
    """A parameter of no module has no path, and so its gradient would be lost."""
    loose, model = nn.Parameter(torch.ones(3)), nn.Linear(4, 2)
    state = {"model": model, "opt": torch.optim.SGD([loose, *model.parameters()])}
    (loose.sum() + model(torch.ones(4)).sum()).backward()
    left = unclean_gradients(state, stored=True)
    assert left == ("a parameter of shape (3,) in no module",)


def test_after_the_watch_ended_nothing_is_marked() -> None:
    """A closed Checkpointer leaves no hooks in the user's training."""
    before = dict(_global_optimizer_post_hooks)
    model = nn.Linear(4, 2)
    opt = torch.optim.SGD(model.parameters())
    end: Callable[[], None] = Watch({"model": model, "opt": opt}).end
    end()
    end()
    assert before == _global_optimizer_post_hooks
    backward(model)
    opt.step()
    assert unclean_gradients({"model": model, "opt": opt}) == NAMES


def test_an_optimizer_that_comes_later_is_watched_from_its_first_step() -> None:
    """A stage of the training begins with an optimizer of its own, and saves after its step."""
    model = nn.Linear(4, 2)
    state: dict[str, Any] = {"model": model, "opt": torch.optim.SGD(model.parameters())}
    end = Watch(state).end
    state["opt"] = torch.optim.AdamW(model.parameters())
    backward(model)
    assert unclean_gradients(state) == NAMES
    state["opt"].step()
    assert unclean_gradients(state) == ()
    backward(model)
    assert unclean_gradients(state) == NAMES
    end()


def test_a_scaler_that_comes_later_is_watched_once_it_was_seen() -> None:
    """From the first save on that finds it in the state; the one that it replaced is left alone."""
    model = nn.Linear(4, 2)
    opt = torch.optim.SGD(model.parameters())
    former, scaler = (torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2))
    state = {"model": model, "opt": opt, "scaler": former}
    watch = Watch(state)
    state["scaler"] = scaler
    watch.look(nodes(state))
    assert "step" not in vars(former)
    for _ in range(2):
        opt.zero_grad()
        scaler.scale(model(torch.full((3, 4), float("inf"))).sum()).backward()
        assert unclean_gradients(state) == NAMES
        scaler.step(opt)
        scaler.update()
        assert unclean_gradients(state) == ()
        watch.look(nodes(state))
    watch.end()
    assert "step" not in vars(scaler)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_watches_that_share_a_scaler_end_in_any_order(order: tuple[int, ...]) -> None:
    """Two Checkpointers on one scaler: the second close raised, and left the first one's step."""
    model = nn.Linear(4, 2)
    opt = torch.optim.SGD(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    state = {"model": model, "opt": opt, "scaler": scaler}
    ends = [Watch(state).end for _ in order]
    for number in order:
        opt.zero_grad()
        scaler.scale(model(torch.full((3, 4), float("inf"))).sum()).backward()
        scaler.step(opt)  # skipped, and yet seen by the watches that are left
        scaler.update()
        assert unclean_gradients(state) == ()
        ends[number]()
    assert "step" not in vars(scaler)
    opt.zero_grad()
    scaler.scale(model(torch.full((3, 4), float("inf"))).sum()).backward()
    scaler.step(opt)
    scaler.update()
    assert unclean_gradients(state) == NAMES


def test_a_step_that_the_user_has_put_in_place_stays() -> None:
    """Below a watch, and above one."""
    scaler: Any = torch.amp.GradScaler("cpu")
    opt = torch.optim.SGD(nn.Linear(1, 1).parameters())
    calls: list[str] = []
    scaler.step = lambda _: calls.append("below")
    end = Watch({"scaler": scaler}).end
    inner = scaler.step
    scaler.step = lambda given: (calls.append("above"), inner(given))
    end()
    scaler.step(opt)
    assert calls == ["above", "below"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its own compiler
def test_a_compiled_step_leaves_its_mark() -> None:
    """torch.compile traces through the optimizer and its hooks."""
    model = nn.Linear(4, 2)
    opt = torch.optim.AdamW(model.parameters())
    state = {"model": model, "opt": opt}
    Watch(state)
    step = torch.compile(opt.step, backend="eager")
    for _ in range(3):
        opt.zero_grad()
        backward(model)
        assert unclean_gradients(state) == NAMES
        step()
        assert unclean_gradients(state) == ()


class Hiding(nn.Linear):
    """Its state shows the weight as a copy, and the bias not at all."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        held = super().state_dict(*args, **kwargs)
        held["weight"] = held["weight"].detach().clone()
        del held["bias"]
        return held


def test_gradients_of_parameters_that_no_state_shows_are_stored() -> None:
    """They counted as stored, and were passed by."""
    one, other = Hiding(4, 2), Hiding(4, 2)
    backward(one)
    opt = torch.optim.SGD(one.parameters())
    assert unclean_gradients({"model": one, "opt": opt}, stored=True) == ()
    Snapshot({"model": one}, grads=True).restore({"model": other})
    for mine, theirs in zip(other.parameters(), one.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert same_bytes(mine.grad, theirs.grad)


class Wrapper:
    """A user's object around an optimizer, which the state has instead of it."""

    def __init__(self, held: object) -> None:
        self.held = held

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize(
    "around",
    [
        Wrapper,
        lambda opt: Wrapper([opt]),
        lambda opt: Wrapper({"a": (opt,)}),
        lambda opt: Wrapper(Wrapper(opt)),
    ],
    ids=["plain", "list", "dict", "twice"],
)
def test_an_optimizer_inside_of_an_object_counts(around: Callable[[Any], Any]) -> None:
    """What it has accumulated is pending, a step clears it, and a restore drops it."""
    model = nn.Linear(4, 2)
    opt = torch.optim.SGD(model.parameters())
    state = {"model": model, "opt": around(opt)}
    end = Watch(state).end
    saved = Snapshot(state)
    backward(model)
    assert unclean_gradients(state) == NAMES
    opt.step()
    assert unclean_gradients(state) == ()
    backward(model)
    saved.restore(state)
    assert model.weight.grad is None
    end()


def test_collections_too_large_for_optimizers_are_not_searched() -> None:
    """An object may hold a million examples; and may hold itself."""
    opt = torch.optim.SGD(nn.Linear(4, 2).parameters())
    many, itself = Wrapper([opt] * 65), Wrapper(opt)
    itself.held = [itself, opt, opt]
    assert list(optimizers_of(nodes({"many": many}))) == []
    assert list(optimizers_of(nodes({"itself": itself, "opt": opt}))) == [opt]


def test_an_object_that_holds_an_optimizer_of_the_state_drops_nothing() -> None:
    """A scheduler of the user's, say: zeros that a restore has made, or gradients that stay."""
    model = nn.Linear(4, 2)
    opt = torch.optim.SGD(model.parameters())
    state = {"model": model, "opt": opt, "s": Wrapper(opt)}
    backward(model)
    saved = Snapshot(state)
    saved.restore(state)
    assert model.weight.grad is not None
    assert not model.weight.grad.any()
    backward(model)
    apply(state, saved.saved, saved.values, only=("s",))
    assert model.weight.grad.any()


class Thorny:
    """An object that must not be looked at closely."""

    __slots__ = ("__weakref__", "held", "never")

    def __init__(self, held: object) -> None:
        self.held = held

    def __getattr__(self, name: str) -> object:
        raise KeyError(name)

    @property
    def lazy(self) -> object:
        raise RuntimeError("called")

    def state_dict(self) -> dict[str, Any]:
        return {}

    load_state_dict = Wrapper.load_state_dict


class Bare(torch.optim.SGD):
    """Not made yet."""

    def __init__(self) -> None:
        """Have no groups."""


def test_nothing_of_the_users_is_called_in_the_search() -> None:
    """No property, no `__getattr__`, no proxy; what lies in a slot is found."""
    opt = torch.optim.SGD(nn.Linear(4, 2).parameters())
    gone = weakref.proxy(Wrapper(None))
    held = Wrapper([gone, Bare(), SimpleNamespace(o=Thorny(opt)), {"x": 1}.values(), type(opt)])
    assert list(optimizers_of(nodes({"held": held}))) == [opt]


def test_gradients_are_found_under_the_names_that_a_state_gives() -> None:
    """As earlier epochs have them: a hook had renamed the keys."""

    def renamed() -> nn.Linear:
        model = nn.Linear(4, 2)
        model.register_state_dict_post_hook(
            lambda m, tree, *_: tree.update({f"old.{key}": tree.pop(key) for key in list(tree)})
        )
        model.register_load_state_dict_pre_hook(
            lambda m, tree, *_: tree.update({key[4:]: tree.pop(key) for key in list(tree)})
        )
        return model

    one, other = renamed(), renamed()
    backward(one)
    saved = Snapshot({"model": one}, grads=True)
    assert "grads/model~1old.weight" in saved.paths()
    saved.restore({"model": other})
    assert one.weight.grad is not None
    assert other.weight.grad is not None
    assert same_bytes(other.weight.grad, one.weight.grad)


class Accelerated(torch.optim.Optimizer):
    """As Accelerate wraps one: an optimizer whose groups are a property."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.optimizer = inner

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, tree: Any) -> None:
        self.optimizer.load_state_dict(tree)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


def test_a_wrapper_whose_groups_are_a_property_counts() -> None:
    """Its accumulation is pending, and a restore drops it."""
    model = nn.Linear(4, 2)
    state = {"model": model, "opt": Accelerated(torch.optim.SGD(model.parameters()))}
    saved = Snapshot(state)
    backward(model)
    assert unclean_gradients(state) == NAMES
    saved.restore(state)
    assert model.weight.grad is None
