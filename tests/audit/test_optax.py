"""What the paths of a JAX training's state say, without any file."""

from collections.abc import Iterable

import pytest

from handfast.audit.formats.optax import Meaning, meaning
from handfast.audit.found import Clock, Role

NAMES = ("first.kernel", "first.bias")
INTEGERS = ("count", "step", "mini_step", "gradient_step", "fin_steps")


def tree(*paths: str) -> Meaning:
    """Read a tree of leaves by their paths; those that count are integers."""
    leaves = {tuple(path.split(".")): path.split(".") for path in paths}
    kinds = {
        path: "int32" if {*names[-2:]} & {*INTEGERS} else "float32"
        for path, names in leaves.items()
    }
    return meaning(kinds)


def below(prefix: str, names: Iterable[str] = NAMES) -> list[str]:
    """A tree of parameters below a prefix."""
    return [f"{prefix}.{name}" for name in names]


def adam(prefix: str) -> list[str]:
    """The state of ``scale_by_adam``."""
    return [f"{prefix}.count", *below(f"{prefix}.mu"), *below(f"{prefix}.nu")]


def roles(found: Meaning) -> dict[str, Role]:
    """The roles of leaves by their paths."""
    return {".".join(path): leaf.role for path, leaf in found.leaves.items()}


def of(found: Meaning, path: str) -> str:
    """Which parameter a leaf belongs to."""
    return found.leaves[tuple(path.split("."))].of


def counts(found: Meaning) -> dict[str, tuple[Clock, bool, bool]]:
    """What counts: the clock, whether it counts updates, and whether it skips some."""
    return {".".join(c.path): (c.clock, c.updates, c.skips) for c in found.counts}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("count mu nu", {"mu": Role.FIRST, "nu": Role.SECOND}),
        ("count mu nu nu_max", {"mu": Role.FIRST, "nu": Role.SECOND, "nu_max": Role.OTHER}),
        ("count mu", {"mu": Role.MOMENTUM}),
        ("nu", {"nu": Role.SECOND}),
        ("trace", {"trace": Role.MOMENTUM}),
        ("count v_row v_col v", {"v_row": Role.OTHER, "v": Role.OTHER}),
        ("count mu nu hessian_fn_state", {"mu": Role.OTHER, "nu": Role.OTHER}),
    ],
)
def test_a_state_is_known_by_its_fields(fields: str, expected: dict[str, Role]) -> None:
    """Adam's, AMSGrad's, Lion's, RMSProp's, SGD's, Adafactor's; Sophia's second one may be < 0."""
    paths = below("params")
    for field in fields.split():
        at = f"opt_state.0.{field}"
        paths += [at] if field in ("count", "hessian_fn_state") else below(at)
    found = roles(tree(*paths))
    assert {f: found[f"opt_state.0.{f}.first.kernel"] for f in expected} == expected


def test_parameters_are_what_the_moments_are_of() -> None:
    """Whatever their collection is called; an average of them has no moments of its own."""
    found = tree(*below("params"), *below("ema_params"), *adam("opt_state.0"), "rng")
    assert roles(found)["params.first.kernel"] is Role.PARAMETER
    assert roles(found)["ema_params.first.kernel"] is Role.OTHER
    assert of(found, "params.first.kernel") == of(found, "opt_state.0.nu.first.kernel")
    other = tree(*below("model.weights"), *adam("opt_state.0"))
    assert roles(other)["model.weights.first.bias"] is Role.PARAMETER


def test_frozen_parameters_are_parameters() -> None:
    """They stand beside those that have moments."""
    found = tree(*below("params", [*NAMES, "frozen.kernel"]), *adam("opt_state.0"))
    assert roles(found)["params.frozen.kernel"] is Role.PARAMETER


def test_statistics_of_batches_are_buffers() -> None:
    """flax keeps them in a collection of their own."""
    found = roles(tree(*below("params"), "batch_stats.norm.mean", *adam("opt_state.0")))
    assert found["batch_stats.norm.mean"] is Role.BUFFER


def test_two_trainings_in_one_tree_are_kept_apart() -> None:
    """A generator and a discriminator with parameters of the same names."""
    names = ("generator", "critic")
    found = tree(*(p for n in names for p in (*below(f"{n}.params"), *adam(f"{n}.opt_state"))))
    for name in names:
        assert of(found, f"{name}.params.first.bias") == f"{name}.first.bias"
        assert of(found, f"{name}.opt_state.mu.first.bias") == f"{name}.first.bias"


def test_wrapped_leaves_are_known_by_their_wrapper_s_name() -> None:
    """nnx puts each value under a key of its own."""
    paths = [f"{path}.value" for path in (*below("model"), *adam("optimizer.opt_state.0"))]
    found = tree(*paths, "optimizer.step.value")
    assert roles(found)["optimizer.opt_state.0.mu.first.kernel.value"] is Role.FIRST
    assert roles(found)["model.first.kernel.value"] is Role.PARAMETER
    assert counts(found)["optimizer.step.value"] == (Clock.TRAINER, True, False)


def test_weights_alone_are_known_by_their_collection() -> None:
    """Without an optimizer nothing but the name says so; other arrays are anything."""
    found = roles(tree(*below("params"), "metrics.loss"))
    assert found["params.first.kernel"] is Role.PARAMETER
    assert found["metrics.loss"] is Role.OTHER


def test_what_counts_updates_agrees() -> None:
    """A TrainState's steps, the optimizer's and the schedule's count."""
    found = tree("step", *below("params"), *adam("opt_state.0"), "opt_state.1.count")
    assert counts(found) == {
        "step": (Clock.TRAINER, True, False),
        "opt_state.0.count": (Clock.OPTIMIZER, True, False),
        "opt_state.1.count": (Clock.SCHEDULER, True, False),
    }


def test_other_numbers_count_nothing() -> None:
    """A step beside no optimizer, a count of examples, a count that is a float."""
    found = tree(*below("params"), *adam("opt_state.0"), "data.step", "data.count")
    assert [*counts(found)] == ["opt_state.0.count"]


def accumulated(*more: str) -> Meaning:
    """Adam within MultiSteps."""
    fields = [f"opt_state.{name}" for name in ("mini_step", "gradient_step", "skip_state")]
    return tree("step", *below("params"), *fields, *adam("opt_state.inner_opt_state.0"), *more)


def test_within_multisteps_an_update_is_several_steps() -> None:
    """Its own count agrees with those within, and with no other."""
    assert counts(accumulated()) == {
        "step": (Clock.TRAINER, False, False),
        "opt_state.gradient_step": (Clock.OPTIMIZER, True, False),
        "opt_state.inner_opt_state.0.count": (Clock.OPTIMIZER, True, False),
    }


def test_two_multisteps_agree_on_nothing() -> None:
    """Each takes as many steps as it likes."""
    second = [f"other.opt_state.{n}" for n in ("mini_step", "gradient_step", "inner_opt_state.x")]
    assert not any(updates for _, updates, _ in counts(accumulated(*second)).values())


@pytest.mark.parametrize(
    "fields",
    [("inner_state", "step"), ("adv_state", "cache", "opt_state", "steps_since_sync")],
)
def test_what_is_updated_at_times_is_held_against_nothing(fields: tuple[str, ...]) -> None:
    """``conditionally_transform`` and SAM."""
    inner = fields[0]
    paths = [f"opt_state.{name}" for name in fields if name != inner]
    found = tree(*below("params"), *paths, *adam(f"opt_state.{inner}.0"))
    assert counts(found)[f"opt_state.{inner}.0.count"] == (Clock.OPTIMIZER, False, False)


def test_a_scaled_loss_makes_updates_that_are_skipped() -> None:
    """``apply_if_finite`` and flax's DynamicScale: a count may lag, and the training's does not."""
    finite = ["notfinite_count", "last_finite", "total_notfinite"]
    paths = [f"opt_state.{name}" for name in finite]
    found = tree("step", *below("params"), *paths, *adam("opt_state.inner_state.0"))
    assert found.scaled
    assert counts(found)["opt_state.inner_state.0.count"] == (Clock.OPTIMIZER, True, True)
    assert counts(found)["step"] == (Clock.TRAINER, True, False)
    scaled = tree("step", *below("params"), *adam("opt_state.0"), "dynamic_scale.fin_steps")
    assert scaled.scaled
    assert counts(scaled)["opt_state.0.count"] == (Clock.OPTIMIZER, True, True)
    assert not tree(*adam("opt_state.0")).scaled
