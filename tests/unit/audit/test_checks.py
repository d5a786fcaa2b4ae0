"""Shows what the checks find, and what they leave alone because sound checkpoints have it, too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from handfast.audit import numbers
from handfast.audit.checks import Look, check
from handfast.audit.checks.seen import READS
from handfast.audit.extent import Extent, Held, Range, Reader, dense
from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.found import Clock, Counter, Found, Part, Role, Step, Tensor

CERTAIN, STRONG, HINT = Strength


def values(tensor: torch.Tensor) -> Extent:
    """A tensor's values, as a file would have them."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    name = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    return Extent(Held(data, "a file"), name, shape, dense(shape))


def tensor(name: str, role: Role, value: torch.Tensor, **fields: Any) -> Tensor:
    """A tensor of a parameter."""
    return Tensor(f"{role}/{name}", role, values(value), of=name, **fields)


def found(*parts: Part, **fields: Any) -> list[Finding]:
    """What is found in one step."""
    step = Step("step-100", 100, parts, **fields)
    return list(check(Found("test", ".", [step]), Look(deep=True)))


def kinds(findings: Sequence[Finding]) -> set[tuple[Code, Strength]]:
    """What kinds of findings there are."""
    return {(finding.code, finding.strength) for finding in findings}


def counted(*counters: tuple[Clock, int] | Counter, part: str = "a.pt") -> Part:
    """A part with counters."""
    made = [c if isinstance(c, Counter) else Counter(c[0], c[1], str(c[0])) for c in counters]
    return Part(part, counters=made)


class TestCounters:
    """Counters of updates."""

    def test_one_counter_with_two_values_is_certain(self) -> None:
        """Two ranks' copies of one fact: their parts are of two steps (mosaicml/composer#2146)."""
        one = counted((Clock.TRAINER, 100), part="rank0.pt")
        two = counted((Clock.TRAINER, 90), part="rank1.pt")
        (finding,) = found(one, two)
        assert (finding.code, finding.strength) == (Code.COUNTERS, CERTAIN)
        assert finding.parts == ("rank0.pt", "rank1.pt")
        assert "rank1.pt: trainer = 90 (trainer)" in finding.evidence

    def test_clocks_that_disagree_are_strong(self) -> None:
        """Model of step 500, loader of 501 (pytorch/torchtitan#4686), a directory of a third."""
        clocks = counted((Clock.TRAINER, 500), (Clock.LOADER, 501), (Clock.DIRECTORY, 500))
        assert kinds(found(clocks)) == {(Code.COUNTERS, STRONG)}

    @pytest.mark.parametrize(
        "counter",
        [
            Counter(Clock.LOADER, 4000, "batches", updates=False),
            Counter(Clock.SCHEDULER, 100, "last_epoch"),
            Counter(Clock.OPTIMIZER, 97, "step", skips=True),
        ],
        ids=["micro-batches", "alike", "skipped by a scaler"],
    )
    def test_what_sound_checkpoints_have_is_left_alone(self, counter: Counter) -> None:
        """Gradient accumulation, and updates that a GradScaler skipped."""
        assert found(counted((Clock.TRAINER, 100), counter), scaled=True) == []

    def test_an_optimizer_that_lags_without_a_scaler_is_strong(self) -> None:
        """Nothing skips updates there."""
        lagging = Counter(Clock.OPTIMIZER, 97, "step", skips=True)
        assert kinds(found(counted((Clock.TRAINER, 100), lagging))) == {(Code.COUNTERS, STRONG)}

    def test_an_optimizer_that_is_ahead_is_strong_even_with_a_scaler(self) -> None:
        """A scaler skips updates; it makes none."""
        ahead = Counter(Clock.OPTIMIZER, 101, "step", skips=True)
        assert kinds(found(counted((Clock.TRAINER, 100), ahead), scaled=True)) == {
            (Code.COUNTERS, STRONG)
        }

    def test_parameters_that_got_gradients_later_have_smaller_steps(self) -> None:
        """Experts, and what was frozen at first: only the greatest counts."""
        steps = [Counter(Clock.PARAMETER, value, f"p{value}") for value in (100, 40, 7)]
        assert found(counted((Clock.TRAINER, 100), *steps)) == []

    def test_a_parameters_step_that_differs_between_ranks_is_certain(self) -> None:
        """A shard of another step (hiyouga/LlamaFactory#655)."""
        one = counted(Counter(Clock.PARAMETER, 20, "w"), part="rank0.pt")
        two = counted(Counter(Clock.PARAMETER, 10, "w"), part="rank1.pt")
        assert kinds(found(one, two)) == {(Code.COUNTERS, CERTAIN)}


class TestTogether:
    """Clocks that are as far apart in all steps of a run."""

    def told(self, *clocks: tuple[int, int], **fields: Any) -> list[set[tuple[Code, Strength]]]:
        """What is found of steps whose trainer and optimizer have counted so much, for each."""
        steps = [
            Step(
                str(trainer),
                trainer,
                [counted((Clock.TRAINER, trainer), (Clock.OPTIMIZER, optimizer))],
                **fields,
            )
            for trainer, optimizer in clocks
        ]
        told = list(check(Found("test", ".", steps), Look(deep=True)))
        return [kinds([f for f in told if f.step == step.path]) for step in steps]

    def test_clocks_that_are_as_far_apart_in_three_steps_are_a_hint(self) -> None:
        """A trainer that went on from weights alone, whose optimizer began anew; two may be torn,
        and so may one that is further apart.
        """
        strong, hint = {(Code.COUNTERS, STRONG)}, {(Code.COUNTERS, HINT)}
        assert self.told((40, 40), (100, 10), (200, 110), (300, 210)) == [set(), hint, hint, hint]
        assert self.told((100, 10), (200, 110)) == [strong, strong]
        assert self.told((100, 10), (200, 110), (300, 110)) == [strong] * 3
        assert self.told((100, 10), (200, 110), (300, 210), (400, 210))[3] == strong

    def test_copies_of_one_step_are_one(self) -> None:
        """Three of one count are no three steps."""
        strong = {(Code.COUNTERS, STRONG)}
        assert self.told((100, 10), (100, 10), (100, 10)) == [strong] * 3

    def test_what_a_format_found_of_its_parameters_goes_by_them(self) -> None:
        """A part that was trained later, in files of its own."""
        apart = [Finding(Code.COUNTERS, STRONG, "", "by files")]
        steps = [
            Step(
                str(at),
                at,
                [counted(*(Counter(Clock.PARAMETER, at - n, f"p{n}") for n in (0, late)))],
                findings=apart,
            )
            for at, late in ((10, 5), (20, 5), (30, 5), (40, 15))
        ]
        told = [f for f in check(Found("test", ".", steps), Look()) if f.code is Code.COUNTERS]
        assert [finding.strength for finding in told] == [HINT, HINT, HINT, STRONG]
        assert "as far apart" in told[0].says

    def test_of_one_step_what_goes_together_is_known_from_all(self) -> None:
        """With ``only``, as an adoption asks; no other step's files are looked into."""
        clocks = ((100, 10), (200, 110), (300, 210))
        steps = [
            Step(str(t), t, [counted((Clock.TRAINER, t), (Clock.OPTIMIZER, o))]) for t, o in clocks
        ]
        steps[0].parts[0].problem = "cut"
        told = list(check(Found("test", ".", steps), Look(), only=steps[1]))
        assert kinds(told) == {(Code.COUNTERS, HINT)}


class TestValues:
    """Numbers that no training has."""

    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_found_in_moments(self, dtype: str, bad: float) -> None:
        """In every precision, at any place."""
        value = torch.ones(70_000, dtype=getattr(torch, dtype))
        value[69_999] = bad
        part = Part("a.pt", tensors=[tensor("w", Role.FIRST, value)])
        assert kinds(found(part)) == {(Code.NONFINITE, CERTAIN)}

    def test_a_nan_in_a_parameter_is_certain_and_an_infinity_a_hint(self) -> None:
        """A mask may be kept as a parameter; NaN serves nothing."""
        nan = Part("a.pt", tensors=[tensor("w", Role.PARAMETER, torch.tensor([1.0, np.nan]))])
        mask = Part("a.pt", tensors=[tensor("w", Role.PARAMETER, torch.tensor([0.0, -np.inf]))])
        assert kinds(found(nan)) == {(Code.NONFINITE, CERTAIN)}
        assert kinds(found(mask)) == {(Code.NONFINITE, HINT)}

    @pytest.mark.parametrize("named", [True, False])
    def test_a_nan_in_what_was_never_used_is_a_hint(self, named: bool) -> None:
        """Finite moments of all other weights show that no training met it; whether an optimizer
        goes by names or by numbers.
        """
        nan = torch.tensor([1.0, np.nan, 3.0])

        def told(*moments: torch.Tensor, bad: str = "unused") -> set[tuple[Code, Strength]]:
            weights = {"a": torch.ones(5), "b": torch.ones(4), "unused": torch.ones(3)}
            weights[bad] = nan if bad == "unused" else torch.full_like(weights[bad], np.nan)
            every = [tensor(name, Role.PARAMETER, value) for name, value in weights.items()]
            for at, value in enumerate(moments):
                name = "ab"[at] if named and at < 2 else f"[{at}]"
                every += [tensor(name, role, value) for role in (Role.FIRST, Role.SECOND)]
            return kinds(found(Part("a.pt", tensors=every)))

        hint, certain = {(Code.NONFINITE, HINT)}, {(Code.NONFINITE, CERTAIN)}
        assert told(torch.ones(5), torch.ones(4)) == hint
        assert told(torch.ones(5), torch.ones(4), torch.ones(3)) == certain  # it has moments
        assert told() == certain  # nothing is known of its use
        assert told(torch.ones(5), torch.full((4,), np.nan)) == certain
        assert told(torch.ones(5), torch.ones(4), bad="b") == certain  # larger than the unused one

    def test_where_moments_have_names_of_their_own_no_weight_is_known_to_be_unused(self) -> None:
        """Of a wrapper's, for all an audit knows; nor is a weight of which the optimizer has a
        state that is no moment (Adafactor's factors).
        """
        nan = tensor("w", Role.PARAMETER, torch.full((4,), np.nan))
        other = tensor("v", Role.PARAMETER, torch.ones(4))
        for states in (
            [tensor("wrapped.v", Role.FIRST, torch.ones(4))],
            [tensor("[0]", Role.SECOND, torch.ones(4)), tensor("[1]", Role.OTHER, torch.ones(2))],
        ):
            part = Part("a.pt", tensors=[nan, other, *states])
            assert kinds(found(part)) == {(Code.NONFINITE, CERTAIN)}

    def test_two_optimizers_that_go_by_numbers_have_states_of_their_own(self) -> None:
        """``[0]`` in two files are two weights."""
        weights = [
            tensor("a", Role.PARAMETER, torch.ones(4)),
            tensor("b", Role.PARAMETER, torch.full((4,), np.nan)),
        ]
        states = [
            Part(name, tensors=[tensor("[0]", Role.FIRST, torch.ones(4))])
            for name in ("first.bin", "second.bin")
        ]
        told = found(Part("model.bin", tensors=weights), *states)
        assert kinds(told) == {(Code.NONFINITE, CERTAIN)}

    def test_a_flat_row_of_moments_is_of_all_weights(self) -> None:
        """One tensor of moments for a whole group: by its elements no weight is left over."""
        weights = [tensor(name, Role.PARAMETER, torch.full((4,), np.nan)) for name in "ab"]
        row = tensor("[0]", Role.FIRST, torch.ones(8))
        assert kinds(found(Part("a.pt", tensors=[*weights, row]))) == {(Code.NONFINITE, CERTAIN)}

    def test_a_tied_weight_is_no_weight_more(self) -> None:
        """Two names of one storage have one optimizer's state."""
        tied = values(torch.full((4,), np.nan))
        both = [Tensor(name, Role.PARAMETER, tied, of=name) for name in ("head", "embedding")]
        moments = tensor("[0]", Role.FIRST, torch.ones(4))
        assert kinds(found(Part("a.pt", tensors=[*both, moments]))) == {(Code.NONFINITE, CERTAIN)}

    def test_buffers_hold_what_they_like(self) -> None:
        """A causal mask is full of -inf, and a best metric begins at inf."""
        mask = torch.full((8, 8), -torch.inf).triu(1)
        assert found(Part("a.pt", tensors=[tensor("mask", Role.BUFFER, mask)])) == []

    def test_a_second_moment_below_zero_is_certain(self) -> None:
        """It is a mean of squares."""
        part = Part("a.pt", tensors=[tensor("w", Role.SECOND, torch.tensor([1.0, -1e-9]))])
        (finding,) = found(part)
        assert (finding.code, finding.strength) == (Code.NEGATIVE, CERTAIN)
        assert "-1e-09" in finding.evidence[0]

    @pytest.mark.parametrize("name", sorted(numbers.FLOATS))
    def test_bytes_are_read_as_torch_reads_them(self, name: str) -> None:
        """All 256 values of an 8-bit float, and all 65,536 of a 16-bit one."""
        if name.startswith("complex"):
            return
        dtype = getattr(torch, name)
        count = 1 << min(16, 8 * dtype.itemsize)
        kind = {1: np.uint8, 2: np.uint16}.get(dtype.itemsize)
        if kind is None:
            raw = np.random.default_rng(0).integers(0, 256, 8 * count, np.uint8)
        else:
            raw = np.arange(count, dtype=kind)
        theirs = torch.from_numpy(raw.view(np.uint8).copy()).view(dtype)
        wide = theirs.float() if dtype.itemsize < 4 else theirs
        ours = numbers.numbers(memoryview(raw.tobytes()), name)
        np.testing.assert_array_equal(ours, wide.numpy())


class TestMoments:
    """|m| <= K sqrt(v)."""

    def part(self, first: torch.Tensor, second: torch.Tensor, **fields: Any) -> Part:
        """Moments of one parameter."""
        pair = [
            tensor("w", Role.FIRST, first, group="0"),
            tensor("w", Role.SECOND, second, group="0"),
        ]
        return Part("a.pt", tensors=pair, betas={"0": (0.9, 0.999)}, **fields)

    def test_moments_that_no_gradients_make_with_these_betas_are_a_hint(self) -> None:
        """K is 7.27 for AdamW's own betas, and 3.16 after one step; the betas may be new."""
        late = self.part(torch.full((9,), 8.0), torch.ones(9))
        assert kinds(found(late)) == {(Code.MOMENTS, HINT)}
        early = [Counter(Clock.PARAMETER, 1, "w")]
        assert kinds(found(self.part(torch.full((9,), 4.0), torch.ones(9), counters=early))) == {
            (Code.MOMENTS, HINT)
        }
        assert found(self.part(torch.full((9,), 4.0), torch.ones(9))) == []

    def test_moments_that_are_ten_times_too_large_are_strong(self) -> None:
        """Above 72.7 for AdamW's own betas; also for betas that bound more closely by far."""
        close = self.part(torch.full((9,), 72.0), torch.ones(9))
        close.betas = {"0": (0.99, 0.999)}
        assert kinds(found(close)) == {(Code.MOMENTS, HINT)}
        for betas in ((0.9, 0.999), (0.99, 0.999)):
            far = self.part(torch.full((9,), 73.0), torch.ones(9))
            far.betas = {"0": betas}
            assert kinds(found(far)) == {(Code.MOMENTS, STRONG)}

    def test_betas_that_were_changed_are_no_fault(self) -> None:
        """beta1 of 0.9 and then 0.99, by torch's AdamW with gradients that grow: a hint."""
        weight = torch.nn.Parameter(torch.zeros(8))
        optimizer = torch.optim.AdamW([weight])
        for step in range(200):
            weight.grad = torch.full((8,), 1.11**step)
            optimizer.step()
        state = optimizer.state[weight]
        part = self.part(state["exp_avg"], state["exp_avg_sq"])
        part.betas = {"0": (0.99, 0.999)}
        assert kinds(found(part)) == {(Code.MOMENTS, HINT)}

    def test_nothing_is_said_where_no_bound_is_known(self) -> None:
        """Changed betas (none are told), beta1 too large for beta2; a hint in 16 bits."""
        odd = torch.full((9,), 99.0), torch.ones(9)
        part = self.part(*odd)
        part.betas = {}
        assert found(part) == []
        short = self.part(odd[0].bfloat16(), odd[1].bfloat16())
        assert kinds(found(short)) == {(Code.MOMENTS, HINT)}
        part.betas = {"0": (0.99, 0.95)}
        assert found(part) == []

    def test_a_real_training_keeps_the_bound(self) -> None:
        """Sparse and tiny gradients, 200 steps of torch's AdamW."""
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64))
        optimizer = torch.optim.AdamW([weight])
        for _ in range(200):
            scale = 10.0 ** torch.randint(-30, 10, (64,))
            weight.grad = torch.randn(64) * scale * (torch.rand(64) < 0.3)
            optimizer.step()
        state = optimizer.state[weight]
        counters = [Counter(Clock.PARAMETER, 200, "w")]
        assert found(self.part(state["exp_avg"], state["exp_avg_sq"], counters=counters)) == []


class TestMasters:
    """Low-precision weights and their float32 masters."""

    def pair(self, low: torch.Tensor, master: torch.Tensor) -> list[Finding]:
        """What is found of a parameter and its master."""
        both = [tensor("w", Role.PARAMETER, low), tensor("w", Role.MASTER, master)]
        return found(Part("a.pt", tensors=both))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @given(data=st.data())
    def test_rounding_is_torchs_for_every_value(self, dtype: torch.dtype, data: Any) -> None:
        """Any 64 float32 bit patterns that are numbers."""
        raw = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=64, max_size=64))
        master = torch.tensor(raw, dtype=torch.uint32).view(torch.float32)
        master = torch.where(torch.isfinite(master), master, torch.ones(64))
        low = master.to(dtype)
        bits = numbers.rounded(master.numpy(), str(dtype).removeprefix("torch."))
        assert bits.tobytes() == low.view(torch.uint8).numpy().tobytes()

    def test_weights_of_another_step_are_strong(self) -> None:
        """Weights of step 1, masters of step 2 (NVIDIA/nvidia-resiliency-ext#376)."""
        torch.manual_seed(0)
        master = torch.randn(1000)
        stale = (master + 0.1 * torch.randn(1000)).bfloat16()
        assert kinds(self.pair(stale, master)) == {(Code.MASTER, STRONG)}
        assert self.pair(master.bfloat16(), master) == []

    def test_stochastic_rounding_is_a_hint(self) -> None:
        """Each value is one of the two that its master lies between."""
        torch.manual_seed(0)
        master = torch.randn(1000)
        noise = torch.randint(0, 1 << 16, (1000,), dtype=torch.int32)
        up = (master.view(torch.int32) + noise) & -65536
        low = up.view(torch.float32).bfloat16()
        assert (low != master.bfloat16()).any()
        assert kinds(self.pair(low, master)) == {(Code.MASTER, HINT)}

    def test_a_nan_of_any_kind_is_one(self) -> None:
        """A signalling one, as a bit that flipped makes: told, without a warning of NumPy's."""
        nan = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
        told = kinds(self.pair(torch.ones(1).bfloat16(), nan))
        assert told == {(Code.NONFINITE, CERTAIN), (Code.MASTER, STRONG)}
        first = tensor("w", Role.FIRST, nan)
        part = Part("a.pt", tensors=[first, tensor("w", Role.SECOND, nan)], betas={"": (0.9, 0.99)})
        assert kinds(found(part)) == {(Code.NONFINITE, CERTAIN)}

    def test_a_master_in_another_part_is_held_against_the_one_parameter(self) -> None:
        """DeepSpeed keeps them in files of their own."""
        master = torch.randn(100)
        low = Part("model.pt", tensors=[tensor("w", Role.PARAMETER, (master + 1).bfloat16())])
        own = Part("optim.pt", tensors=[tensor("w", Role.MASTER, master)])
        assert kinds(found(low, own)) == {(Code.MASTER, STRONG)}


class TestShards:
    """Whole parts."""

    def shard(self, rank: int, value: torch.Tensor, role: Role = Role.FIRST) -> Part:
        """A rank's piece of a whole."""
        size = len(value)
        piece = tensor("w", role, value, whole=(2 * size,), offset=(rank * size,))
        return Part(f"rank{rank}.pt", {"dp": rank}, tensors=[piece])

    def test_shards_of_two_ranks_with_the_same_bits_are_strong(self) -> None:
        """One rank's file saved under two names; zero shards are not that."""
        same = torch.randn(100)
        assert kinds(found(self.shard(0, same), self.shard(1, same))) == {(Code.IDENTICAL, STRONG)}
        zeros = torch.zeros(100)
        assert found(self.shard(0, zeros), self.shard(1, zeros)) == []

    def test_a_shard_of_zeros_beside_others_is_strong(self) -> None:
        """Memory that was never filled; LoRA's B is zero everywhere, or inside of a shard."""
        empty = found(self.shard(0, torch.randn(100)), self.shard(1, torch.zeros(100)))
        assert kinds(empty) == {(Code.ZERO, STRONG)}

    def test_whole_copies_of_ranks_are_no_shards(self) -> None:
        """DDP's ranks may each save all: alike by design."""
        same = torch.randn(100)
        parts = [
            Part(f"rank{r}.pt", {"dp": r}, tensors=[tensor("w", Role.FIRST, same)]) for r in (0, 1)
        ]
        assert found(*parts) == []

    def test_replicas_that_differ_are_certain_and_named_by_groups(self) -> None:
        """A tensor-parallel norm of which one rank's copy has one other bit."""
        good, bad = torch.ones(8), torch.ones(8)
        bad[3] = 1 + 2**-20
        parts = [
            Part(
                f"tp{rank}.pt",
                tensors=[tensor("norm", Role.PARAMETER, value, replica="norm", promise="by tp")],
            )
            for rank, value in enumerate((good, bad, good))
        ]
        (finding,) = found(*parts)
        assert (finding.code, finding.strength) == (Code.REPLICAS, CERTAIN)
        assert finding.parts == ("tp1.pt",)
        assert "alike in tp0.pt, tp2.pt" in finding.evidence

    def test_a_part_of_another_run_or_job_is_certain(self) -> None:
        """Another run's shard (LMResiliency/lm-resiliency#77), another world size."""
        runs = [Part("a.pt", run="one"), Part("b.pt", run="two")]
        assert kinds(found(*runs)) == {(Code.EXTRA, CERTAIN)}
        worlds = [Part("a.pt", facts={"world": 4}), Part("b.pt", facts={"world": 8})]
        assert kinds(found(*worlds)) == {(Code.WORLD, CERTAIN)}

    def test_what_is_guessed_from_keys_is_a_hint(self) -> None:
        """Runs, jobs, counters, roles and shards of a file that is anybody's to fill."""
        nan = tensor("w", Role.PARAMETER, torch.tensor([1.0, np.nan]))
        runs = [
            Part("a.pt", {"rank": 0}, tensors=[nan], run="one", facts={"world": 4}),
            Part("b.pt", {"rank": 1}, run="two", facts={"world": 8}),
            counted((Clock.TRAINER, 5), part="c.pt"),
            counted((Clock.TRAINER, 6), part="d.pt"),
        ]
        told = found(*runs, missing=[("e.pt", "a name")], extra=[("f.pt", "a name")], guessed=True)
        assert kinds(told) == {
            (code, HINT)
            for code in (Code.EXTRA, Code.WORLD, Code.NONFINITE, Code.COUNTERS, Code.MISSING)
        }
        shards = [self.shard(0, torch.randn(100)), self.shard(1, torch.zeros(100))]
        assert kinds(found(*shards, guessed=True)) == {(Code.ZERO, HINT)}

    def test_a_nan_where_an_optimizer_is_at_work_is_certain_though_roles_are_guessed(self) -> None:
        """A parameter with moments is one that is trained."""
        pair = [
            tensor("w", Role.PARAMETER, torch.tensor([1.0, np.nan])),
            tensor("w", Role.FIRST, torch.zeros(2)),
        ]
        assert kinds(found(Part("a.pt", tensors=pair), guessed=True)) == {(Code.NONFINITE, CERTAIN)}

    def test_absurd_facts_are_told_and_not_written_out(self) -> None:
        """Python refuses to write an integer of 5000 digits."""
        worlds = [Part("a.pt", facts={"world": 4}), Part("b.pt", facts={"world": 10**5000})]
        assert kinds(found(*worlds)) == {(Code.WORLD, CERTAIN)}

    def test_what_the_format_misses_is_told(self) -> None:
        """Missing parts, foreign ones, no commit, what can't be read."""
        told = found(
            Part("a.pt", problem="a.pt: byte 7: the file ends there"),
            Part("b.pt", problem="b.pt: no pickle"),
            missing=[("c.pt", "the index names it")],
            extra=[("d.pt", "of a larger world")],
            commit="the marker",
            committed=False,
        )
        assert kinds(told) == {
            (Code.TRUNCATED, CERTAIN),
            (Code.UNREADABLE, CERTAIN),
            (Code.MISSING, CERTAIN),
            (Code.EXTRA, STRONG),
            (Code.UNCOMMITTED, CERTAIN),
        }


class TestSteps:
    """One step beside another."""

    def step(self, number: int, value: torch.Tensor, role: Role, saved: float = 0.0) -> Step:
        """A step of one part."""
        part = Part(f"{number}/a.pt", tensors=[tensor("w", role, value)], saved=saved)
        return Step(str(number), number, [part])

    @pytest.mark.parametrize(("role", "strength"), [(Role.FIRST, STRONG), (Role.PARAMETER, HINT)])
    def test_a_step_that_repeats_another_is_stale(self, role: Role, strength: Strength) -> None:
        """Steps 90, 110, 120 bit-identical (NVIDIA-NeMo/RL#3312); weights alone may be frozen."""
        same, other = torch.randn(100), torch.randn(100)
        steps = [self.step(n, v, role) for n, v in ((90, same), (100, other), (110, same))]
        for step in steps:
            step.parts[0].counters = [Counter(Clock.TRAINER, step.number or 0, "step")]
        (finding,) = check(Found("test", ".", steps), Look(deep=True))
        assert (finding.code, finding.strength) == (Code.STALE, strength)
        assert (finding.step, finding.evidence) == ("110", ("90",))

    @pytest.mark.parametrize(
        "counter",
        [
            Counter(Clock.LOADER, 0, "micro-batches", updates=False),
            Counter(Clock.TRAINER, 0, "loops, of which a scaler skipped one"),
            Counter(Clock.DIRECTORY, 0, "epoch-90"),
        ],
        ids=["accumulated", "skipped by a scaler", "saved again"],
    )
    def test_moments_that_stood_still_with_no_update_between_are_a_hint(
        self, counter: Counter
    ) -> None:
        """What was saved between two updates, or as another epoch, is no stale state."""
        same = torch.randn(100)
        steps = [self.step(n, same, Role.FIRST) for n in (90, 91)]
        for step in steps:
            moved = msgspec.structs.replace(counter, value=step.number or 0)
            step.parts[0].counters = [moved, Counter(Clock.OPTIMIZER, 90, "step", skips=True)]
            step.scaled = True
        told = check(Found("test", ".", steps), Look(deep=True))
        assert {f.strength for f in told if f.code is Code.STALE} == {HINT}

    def test_times_that_straddle_two_saves_are_a_hint(self) -> None:
        """A file of step 100 that was written after step 200 was begun."""
        first, second = (self.step(n, torch.randn(9), Role.FIRST, n) for n in (100, 200))
        first.parts = [*first.parts, Part("100/b.pt", saved=201.0)]
        told = list(check(Found("test", ".", [first, second]), Look()))
        assert kinds(told) == {(Code.TIMES, HINT)}
        assert told[0].parts == ("100/b.pt",)


@pytest.mark.parametrize("deep", [False, True])
def test_a_tensor_that_repeats_its_storage_is_not_read_to_its_end(deep: bool) -> None:
    """zeros(1).expand(2**34): 64 GiB of one number."""
    values = Extent(Held(bytes(4), "a file"), "float32", (1 << 33,), (0,))
    part = Part("a.pt", tensors=[Tensor("w", Role.PARAMETER, values, of="w")])
    look = Look(deep=deep)
    assert list(check(Found("test", ".", [Step("s", 1, [part])]), look)) == []
    assert look.cut == 1
    assert look.nbytes <= 1 << 20


def test_without_deep_only_the_beginning_is_read() -> None:
    """What is not looked at is counted, and nothing is said of it."""
    value = torch.ones(70_000)
    value[69_999] = torch.nan
    part = Part("a.pt", tensors=[tensor("w", Role.FIRST, value)])
    look = Look()
    assert list(check(Found("test", ".", [Step("s", 1, [part])]), look)) == []
    assert (look.cut, look.nbytes) == (1, 4 << 16)


class Counted(Held):
    """Bytes in memory, and how many of them were read."""

    read_so_far = 0

    def read(self, into: memoryview, at: int) -> None:
        """Count, and read."""
        self.read_so_far += len(into)
        super().read(into, at)


def views(source: Held, count: int, role: Role, size: int = 1000) -> list[Tensor]:
    """Tensors in one storage that overlap, but for one element each."""
    return [
        Tensor(f"{role} {at}", role, Extent(source, "float32", (size,), (1,), at), of=str(at))
        for at in range(count)
    ]


def test_a_storage_under_thousands_of_names_is_read_a_few_times() -> None:
    """Whatever views of it there are, dense or transposed; the rest is told, and no check takes it
    for anything. Another storage beside it is read.
    """
    source, other = Counted(bytes(4 * 6000), "a file"), Counted(bytes(4 * 100), "another")
    turned = [
        Tensor(f"t{at}", Role.PARAMETER, Extent(source, "float32", (20, 50), (1, 20), at), of="t")
        for at in range(100)
    ]
    alone = views(other, 1, Role.PARAMETER, 100)
    part = Part("a.pt", tensors=[*views(source, 5000, Role.PARAMETER), *turned, *alone])
    look = Look(deep=True)
    told = list(check(Found("test", ".", [Step("s", 1, [part])]), look))
    assert kinds(told) == {(Code.UNREAD, HINT)}
    assert 0 < source.read_so_far <= (READS + 1) * source.nbytes
    assert other.read_so_far == other.nbytes
    assert look.cut > 4000
    assert f"{look.cut} tensors of a.pt" in told[0].says


def test_slices_of_one_storage_are_all_read() -> None:
    """The columns of a matrix, as ``chunk`` cuts it in 64: each spans nearly all of it."""
    columns = 64 * 10
    source = Counted(bytes(4 * 100 * columns), "a file")
    every = [
        Tensor(f"{role} {at}", role, Extent(source, "float32", (100, 10), (columns, 1), 10 * at))
        for role in (Role.FIRST, Role.SECOND, Role.MASTER)
        for at in range(64)
    ]
    look = Look(deep=True)
    assert (
        list(check(Found("test", ".", [Step("s", 1, [Part("a.pt", tensors=every)])]), look)) == []
    )
    assert look.cut == 0


def test_pairs_of_two_storages_are_read_a_few_times() -> None:
    """Moments, two at a time; none of them breaks a bound."""
    first, second = (Counted(bytes(4 * 6000), "a file") for _ in range(2))
    tensors = [*views(first, 3000, Role.FIRST), *views(second, 3000, Role.SECOND)]
    part = Part("a.pt", tensors=tensors, betas={"": (0.9, 0.999)})
    told = list(check(Found("test", ".", [Step("s", 1, [part])]), Look(deep=True)))
    assert kinds(told) == {(Code.UNREAD, HINT)}
    assert max(first.read_so_far, second.read_so_far) <= (READS + 2) * first.nbytes


def test_tied_weights_are_read_whole_and_once() -> None:
    """A thousand names of one tensor, each with the NaN at its end."""
    value = torch.ones(300_000)
    value[-1] = np.nan
    data = value.numpy().tobytes()
    source = Counted(data, "a file")
    tied = [
        Tensor(f"w{at}", Role.PARAMETER, Extent(source, "float32", (300_000,), (1,)), of=f"w{at}")
        for at in range(1000)
    ]
    (finding,) = check(
        Found("t", ".", [Step("s", 1, [Part("a.pt", tensors=tied)])]), Look(deep=True)
    )
    assert finding.says.startswith("1000 tensors hold")
    assert source.read_so_far == len(data)


def test_a_copy_of_one_master_in_each_of_many_files_is_held_against_its_weight() -> None:
    """The weight's storage is read as often as there are masters."""
    master = torch.randn(100)
    low = Part("model.pt", tensors=[tensor("w", Role.PARAMETER, master.bfloat16())])
    own = [
        Part(f"{at}.pt", tensors=[tensor("w", Role.MASTER, master + (at == 19))])
        for at in range(20)
    ]
    (finding,) = found(low, *own)
    assert (finding.code, finding.parts) == (Code.MASTER, ("19.pt",))


def test_a_moment_that_repeats_its_storage_beside_one_that_does_not_is_no_trouble() -> None:
    """They have not as many blocks."""
    first = Extent(Held(bytes(4), "a file"), "float32", (1 << 19,), (0,))
    second = values(torch.ones(1 << 19))
    pair = [Tensor("m", Role.FIRST, first, of="w"), Tensor("v", Role.SECOND, second, of="w")]
    assert found(Part("a.pt", tensors=pair, betas={"": (0.9, 0.999)})) == []


def test_what_cant_be_read_is_told_and_costs_nothing(tmp_path: Path) -> None:
    """A file that is gone, and a shape without strides."""
    gone = Range(Reader(), str(tmp_path / "gone"), 0, 400, "gone")
    odd = Held(bytes(400), "odd")
    extents = (Extent(gone, "float32", (100,), (1,)), Extent(odd, "float32", (100,), ()))
    tensors = [Tensor("w", Role.PARAMETER, extent, of="w") for extent in extents]
    (finding,) = found(Part("a.pt", tensors=tensors))
    assert (finding.code, finding.strength) == (Code.TRUNCATED, CERTAIN)
    assert finding.says.startswith("2 tensors")
