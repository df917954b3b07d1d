"""Who wins, by a clock that says what it is told."""

from dataclasses import asdict, dataclass

import pytest
import torch

from neox_hf.errors import RecipeError
from neox_hf.kernels.launch_choice import DeviceLaunches, LaunchChoice, for_every_shape, launches_on
from neox_hf.kernels.launch_file import TunedLaunch
from neox_hf.tuning import Work, search, table
from neox_hf.tuning.agreement import disagreement
from neox_hf.tuning.search import ROUNDS

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rows:
    rows: int


ONE, TWO, FOUR = map(Rows, (1, 2, 4))
SUM = LaunchChoice("sum", for_every_shape(ONE, TWO, FOUR))
NORM = LaunchChoice("norm", for_every_shape(ONE, FOUR))


def work(choice, results=lambda launch: 1.0, name="work"):
    """Launches `choice` once, whose results follow from the launch."""

    def prepare(random):
        def call():
            launch = choice.chosen(CPU, torch.float32, 8)
            return (torch.full((3,), float(results(launch))),)

        return call

    return Work(name, prepare)


class ToldClock:
    """ms of what the next call would launch: a list for each launch, one figure a round, or one for all rounds."""

    def __init__(self, ms, choice=SUM):
        self.ms_of, self.choice, self.told = ms, choice, []

    def first_call(self, work):
        return work.prepare(None)

    def calls(self, work):
        return [work.prepare(None)]

    def ms(self, calls):
        calls[0]()
        launch = self.choice.chosen(CPU, torch.float32, 8)
        self.told.append(launch)
        figures = self.ms_of[launch]
        return figures if isinstance(figures, float) else figures[self.told.count(launch) - 1]


def searched(ms, results=lambda launch: 1.0, **options):
    clock = ToldClock(ms)
    tuning = search([work(SUM, results)], launches_on(CPU), clock, **({"seconds": 60.0} | options))
    return tuning, clock


@pytest.mark.parametrize(
    ("ms", "best"),
    [
        ((1.0, 0.9, 0.8), FOUR),
        ((1.0, 0.8, 0.9), TWO),
        ((1.0, 1.1, 1.2), ONE),
        ((1.0, 0.981, 0.99), ONE),
        ((1.0, 0.979, 0.99), TWO),
        ((1.0, 0.98, 0.98), ONE),
    ],
)
def test_only_what_is_quicker_by_more_than_two_per_cent_wins(ms, best):
    tuning, _ = searched(dict(zip((ONE, TWO, FOUR), ms, strict=True)))
    (outcome,) = tuning.outcomes
    assert (outcome.default, outcome.best) == (ONE, best)
    assert outcome.ms == dict(zip((ONE, TWO, FOUR), ms, strict=True))
    assert SUM.chosen(CPU, torch.float32, 8) is ONE, "nothing that was tried stays"


def test_medians_count_and_candidates_take_turns():
    odd = [1.0] * ROUNDS
    odd[0] = 0.01
    tuning, clock = searched({ONE: 1.0, TWO: odd, FOUR: 1.0})
    assert tuning.outcomes[0].best is ONE
    assert clock.told[:6] == [ONE, TWO, FOUR, FOUR, TWO, ONE]
    assert len(clock.told) == 3 * ROUNDS


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_who_computes_something_else_cannot_win(wrong):
    tuning, clock = searched({ONE: 1.0, TWO: 0.1, FOUR: 0.9}, lambda launch: wrong if launch is TWO else 1.0)
    (outcome,) = tuning.outcomes
    assert outcome.best is FOUR
    assert TWO not in clock.told
    assert outcome.refused[TWO].startswith("result 0 differs by ")
    assert "refused: sum, float32 [8]: rows 2: result 0 differs by" in table(tuning)


def test_who_cannot_be_launched_cannot_win():
    def results(launch):
        if launch is TWO:
            raise RuntimeError("out of resource: shared memory")
        return 1.0

    tuning, _ = searched({ONE: 1.0, FOUR: 0.9}, results)
    assert tuning.outcomes[0].refused == {TWO: "cannot be launched: out of resource: shared memory"}
    assert tuning.outcomes[0].best is FOUR


def test_each_question_is_asked_once():
    clock = ToldClock({ONE: 1.0, TWO: 0.5, FOUR: 1.0})
    tuning = search([work(SUM), work(SUM)], launches_on(CPU), clock, 60.0)
    assert [outcome.question.key.op for outcome in tuning.outcomes] == ["sum"]


def test_what_the_file_says_is_no_default():
    launches = DeviceLaunches({})
    (question,) = launches_on(CPU).asked_by(work(SUM).prepare(None))
    assert launches.of(question) is ONE
    tuned = DeviceLaunches({question.key: asdict(FOUR)})
    assert tuned.of(question) is FOUR
    with launches_on(CPU).trying(question, FOUR):
        tuning, _ = searched({ONE: 1.0, TWO: 1.0, FOUR: 1.5})
    assert (tuning.outcomes[0].default, tuning.outcomes[0].best) == (ONE, ONE)


def test_time_that_is_up_leaves_the_rest_alone():
    seconds = iter(range(100))
    both = [work(SUM, name="first"), work(NORM, name="second")]
    clock = ToldClock({ONE: 1.0, TWO: 0.5, FOUR: 0.5})
    tuning = search(both, launches_on(CPU), clock, 2.5, now=lambda: next(seconds))
    (outcome,) = tuning.outcomes
    assert outcome.question.key.op == "sum"
    assert list(outcome.ms) == [ONE, TWO], "a candidate that there is no time to compile is left out"
    assert tuning.unreached == ["second"]
    assert table(tuning).endswith("no time was left for: second. Give more --seconds")


def test_what_does_not_fit_in_memory_is_told():
    def prepare(random):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    with pytest.raises(RecipeError, match=r"tuning by AdamW takes more memory .* smaller --micro-batch\. tried"):
        search([Work("AdamW", prepare)], launches_on(CPU), ToldClock({}), 60.0)


def test_what_is_kept():
    def entry(shape, launch, ms):
        return TunedLaunch("sum", "float32", shape, {"rows": launch}, 1.0, ms)

    before = [entry((8,), 4, 0.7), entry((9,), 2, 0.7)]
    winning, _ = searched({ONE: 1.0, TWO: 0.5, FOUR: 1.0})
    assert winning.merged_into(before) == [entry((9,), 2, 0.7), entry((8,), 2, 0.5)]
    losing, _ = searched({ONE: 1.0, TWO: 1.0, FOUR: 1.0})
    assert losing.merged_into(before) == [entry((9,), 2, 0.7)], "where the default is best, it stays a default"


def test_the_table():
    tuning, _ = searched({ONE: 0.2, TWO: 0.1, FOUR: 0.3})
    assert table(tuning).splitlines() == [
        "op   dtype    shape  default ms  best ms  choice",
        "sum  float32  8      0.2000      0.1000   rows 2 instead of rows 1",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_last_place_is_no_disagreement(dtype):
    x = torch.randn(1000).to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    next_out, far_out = ((x.view(bits) + places).view(dtype) for places in (1, 100))
    assert disagreement([next_out], [x]) is None
    assert disagreement([far_out], [x]) is not None
    assert disagreement([torch.zeros(0, dtype=dtype)], [torch.zeros(0, dtype=dtype)]) is None


def test_another_shape_or_dtype_disagrees():
    assert disagreement([torch.ones(2)], [torch.ones(3)]) == "result 0 is torch.float32 [2], not torch.float32 [3]"
    assert "torch.float16 [2]" in disagreement([torch.ones(2)], [torch.ones(2).half()])
